"""`vip generate-label`: write the label maps of training images, for token labeling."""

from vip.cli.arguments import parse
from vip.training.config import GENERATE_FLAGS_WITHOUT_EFFECT, GenerateConfig
from vip.training.generation import generate_labels


def main(argv: list[str]) -> None:
    """Parse the command line and generate."""
    config, given = parse(GenerateConfig, argv, "vip generate-label", GENERATE_FLAGS_WITHOUT_EFFECT)
    generate_labels(config, given)
