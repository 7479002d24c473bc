"""A Vision Permutator below torchvision's feature pyramid and detector, on images of any size with digits to find.

python -m examples.torchvision_detection --model vip_nano4_32 --steps 60
"""

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

from examples.segmentation.data import CLASSES, digits, scene
from vip.cli import run  # whatever is imported of vip registers its models with timm
from vip.cli.arguments import Parser, at_least
from vip.training.weights import check_model_name

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]


class Pyramid(nn.Module):
    """What torchvision asks of a backbone: named maps, all of `out_channels`."""

    def __init__(self, model: str, out_indices: list[int], out_channels: int) -> None:
        super().__init__()
        body = timm.create_model(model, features_only=True, out_indices=out_indices, dynamic_img_size=True)
        self.body = cast(Any, body)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `[B, 3, H, W]` to maps `[B, out_channels, H / stride, W / stride]`, the finest first."""
        return self.fpn({str(i): features for i, features in enumerate(self.body(x))})


def create(model: str, out_indices: list[int], min_size: int = 64, max_size: int = 160) -> FCOS:
    """A detector; images are resized to a shorter side of `min_size`, or a longer one of `max_size`."""
    backbone = Pyramid(model, out_indices, 64)
    strides = backbone.body.feature_info.reduction()
    return FCOS(
        backbone,
        num_classes=len(CLASSES),
        anchor_generator=AnchorGenerator(tuple((s // 2,) for s in strides), ((1.0,),) * len(strides)),
        min_size=min_size,
        max_size=max_size,
        size_divisible=max(strides),  # torchvision pads each batch to a multiple of it; its default, 32, fits few ViPs
    )


def batches(training: bool, batch_size: int) -> Iterator[Batch]:
    """Scenes without end, each of a height and width of its own."""
    rng, of = np.random.default_rng(0 if training else 1), digits(training)
    while True:
        sizes = rng.integers(48, 129, size=(batch_size, 2))
        scenes = [scene(rng, of, (int(height), int(width))) for height, width in sizes]
        yield [s.image for s in scenes], [{"boxes": s.boxes, "labels": s.labels} for s in scenes]


def train(detector: FCOS, steps: int) -> list[float]:
    """Train on that many batches of 4; returns the loss of each."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for images, targets in islice(batches(training=True, batch_size=4), steps):
        loss = sum(detector.train()(images, targets).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def found(detector: FCOS, count: int = 30) -> float:
    """Share of the digits of held-out scenes that are in a box (IoU over 0.5) of their class, with a score over 0.3."""
    images, targets = next(batches(training=False, batch_size=count))
    hits = []
    for output, target in zip(detector.eval()(images), targets, strict=True):
        same = output["labels"][:, None] == target["labels"]
        hit = (box_iou(output["boxes"], target["boxes"]) > 0.5) & same & (output["scores"] > 0.3)[:, None]
        hits.append(hit.any(0))
    return float(torch.cat(hits).float().mean())


def main(argv: list[str]) -> None:
    """Train, and say how much is found."""
    parser = Parser(prog="torchvision_detection", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm (default: vip_nano4_32)")
    parser.add_argument("--out-indices", type=int, nargs="+", default=[0, 3], help="stages to use (default: 0 3)")
    parser.add_argument("--steps", type=at_least(1), default=60, help="batches of 4 images (default: 60)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    torch.manual_seed(0)
    detector = create(args.model, args.out_indices)
    before = found(detector)
    losses = train(detector, args.steps)
    print(f"{args.model}: loss {losses[0]:.2f} at first, {sum(losses[-10:]) / len(losses[-10:]):.2f} at last")
    print(f"digits found in held-out images of any size: {before:.1%} before, {found(detector):.1%} after")


if __name__ == "__main__":
    sys.exit(run("torchvision_detection", main))
