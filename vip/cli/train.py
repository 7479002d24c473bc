"""`vip train`: train a model."""

from vip.cli.arguments import parse
from vip.training.config import TRAIN_FLAGS_WITHOUT_EFFECT, TrainConfig
from vip.training.trainer import train


def main(argv: list[str]) -> None:
    """Parse the command line and train."""
    config, _ = parse(TrainConfig, argv, "vip train", TRAIN_FLAGS_WITHOUT_EFFECT)
    train(config)
