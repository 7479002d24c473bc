"""`vip validate`: validate checkpoints or models."""

from vip.cli.arguments import parse
from vip.training.config import VALIDATE_FLAGS_WITHOUT_EFFECT, ValidateConfig
from vip.training.validation import validate_all


def main(argv: list[str]) -> int:
    """Parse the command line, validate and print; 1 if a row of several failed."""
    config, given = parse(ValidateConfig, argv, "vip validate", VALIDATE_FLAGS_WITHOUT_EFFECT)
    return validate_all(config, given)
