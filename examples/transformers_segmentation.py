"""A Vision Permutator as transformers' `TimmBackbone` below `UperNetForSemanticSegmentation`, on generated scenes.

python -m examples.transformers_segmentation --model vip_nano4_32 --steps 40
"""

import sys

import timm
import torch
from timm.models import get_model_input_config
from torch.utils.data import DataLoader
from transformers import TimmBackbone, TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

from examples.segmentation.data import CLASSES, scenes
from vip.cli import run  # whatever is imported of vip registers its models with timm
from vip.cli.arguments import Parser, at_least
from vip.training.weights import check_model_name


def create(model: str, img_size: int | None = None, out_indices: tuple[int, ...] = (0, 1, 2, 3)) -> torch.nn.Module:
    """UperNet over the features of a model by its name in timm, with random weights.

    Args:
        model: The name.
        img_size: Height and width of the images; None: those that the model is for.
        out_indices: Stages, or blocks, whose features it reads, three or more: its auxiliary head reads the third.
            Without them transformers takes the last one only.
    """
    backbone = TimmBackboneConfig(backbone=model, out_indices=list(out_indices))
    config = UperNetConfig(
        backbone_config=backbone, num_labels=len(CLASSES), hidden_size=64, auxiliary_channels=32, loss_ignore_index=255
    )
    segmenter = UperNetForSemanticSegmentation(config)
    if img_size is not None:  # the configuration has no place for it
        segmenter.backbone = TimmBackbone(backbone, img_size=img_size)
    return segmenter


def train(segmenter: torch.nn.Module, img_size: int, steps: int) -> list[float]:
    """Train on that many batches of 4 scenes; returns the loss of each."""
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for pixel_values, labels in DataLoader(scenes(4 * steps, img_size, training=True), 4):
        loss = segmenter.train()(pixel_values=pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: list[str]) -> None:
    """Train a few steps, and say what came of it."""
    parser = Parser(prog="transformers_segmentation", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm (default: vip_nano4_32)")
    parser.add_argument("--steps", type=at_least(1), default=40, help="batches of 4 scenes (default: 40)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    torch.manual_seed(0)
    own_size = get_model_input_config(timm.create_model(args.model, device="meta"))["input_size"][-1]
    img_size = 2 * own_size
    losses = train(create(args.model, img_size), img_size, args.steps)
    last = losses[-5:]
    print(f"{args.model} at {img_size} pixels: loss {losses[0]:.2f} at first, {sum(last) / len(last):.2f} at last")


if __name__ == "__main__":
    sys.exit(run("transformers_segmentation", main))
