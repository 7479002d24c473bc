"""Fine-tune an encoder, a Vision Permutator or an LV-ViT, for semantic segmentation of generated scenes.

python -m examples.segmentation.train --model vip_nano4_32 --checkpoint output/train/RUN
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.utils import draw_segmentation_masks, save_image

from examples.segmentation.data import CLASSES, scenes
from vip.cli import run
from vip.cli.arguments import Parser, at_least
from vip.errors import UserError
from vip.files import replacing, save
from vip.training.weights import check_model_name, find_checkpoint, load_finetune

BATCH_SIZE = 8
COLORS = ["black", "red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "white", "purple", "brown"]


class Segmenter(nn.Module):
    """The features of a timm model, a feature pyramid, and a classifier of the pixels.

    Args:
        model: Name in timm of a model with features.
        size: Height and width of the images.
        checkpoint: Weights of the model to begin with, of whatever classes and image size, or None for random ones.
    """

    def __init__(self, model: str, size: int, checkpoint: Path | None = None, channels: int = 64) -> None:
        super().__init__()
        self.encoder = cast(Any, timm.create_model(model, features_only=True, img_size=size))
        if checkpoint:
            trained = timm.create_model(model, num_classes=0, img_size=size)
            print(f"{checkpoint}: {load_finetune(trained, checkpoint)}")
            own = self.encoder.model.state_dict()  # which has no final norm
            self.encoder.model.load_state_dict({k: v for k, v in trained.state_dict().items() if k in own})
        self.pyramid = FeaturePyramidNetwork(self.encoder.feature_info.channels(), channels)
        block = partial(Conv2dNormActivation, channels, channels)
        self.classifier = nn.Sequential(block(), block(), nn.Conv2d(channels, len(CLASSES), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` to logits `[B, classes, H, W]`."""
        features = self.pyramid({str(i): y for i, y in enumerate(self.encoder(x))})
        finest = features["0"].shape[-2:]
        merged = sum(F.interpolate(y, size=finest, mode="bilinear") for y in features.values())
        return F.interpolate(self.classifier(merged), size=x.shape[-2:], mode="bilinear")


@torch.inference_mode()
def predict(model: Segmenter, images: torch.Tensor) -> torch.Tensor:
    """Classes `[N, H, W]` of images `[N, 3, H, W]`."""
    return torch.cat([model.eval()(batch).argmax(1) for batch in images.split(32)])


def mean_iou(predicted: torch.Tensor, mask: torch.Tensor) -> float:
    """Intersection over union of the pixels of a class, its mean over all classes."""
    classes = list(range(len(CLASSES)))
    return float(jaccard_score(mask.flatten(), predicted.flatten(), average="macro", labels=classes, zero_division=0))


def train(model: Segmenter, scenes: TensorDataset, epochs: int, lr: float) -> None:
    """Train, and print how it goes."""
    loader = DataLoader(scenes, BATCH_SIZE, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader), pct_start=0.1)
    weight = torch.tensor([0.2] + [1.0] * (len(CLASSES) - 1))  # most pixels are background
    start = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for images, mask in loader:
            loss = F.cross_entropy(model.train()(images), mask, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        print(f"epoch {epoch + 1:3}  loss {total:.4f}  {time.monotonic() - start:.0f} s", flush=True)


def picture(path: Path, images: torch.Tensor, *masks: torch.Tensor) -> None:
    """Write a row of images, and below it one for each `[N, H, W]` of classes, drawn over them."""
    shown = images.mul(0.3).add(0.4).clamp(0, 1)
    rows = [torch.cat(list(shown), 2)]
    for mask in masks:
        layers = F.one_hot(mask, len(CLASSES)).movedim(3, 1).bool()
        layers[:, 0] = False
        drawn = [draw_segmentation_masks(i, m, 0.8, COLORS) for i, m in zip(shown, layers, strict=True)]
        rows.append(torch.cat(drawn, 2))
    with replacing(path) as unfinished:
        save_image(F.interpolate(torch.cat(rows, 1)[None], scale_factor=2), unfinished, format="png")


def main(argv: list[str]) -> None:
    """Train, and leave the weights and a picture."""
    parser = Parser(prog="segmentation", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm (default: vip_nano4_32)")
    parser.add_argument("--checkpoint", metavar="RUN", help="run or file to take the encoder from; else it is random")
    parser.add_argument("--epochs", type=at_least(1), default=16, help="passes over the scenes (default: 16)")
    parser.add_argument("--scenes", type=at_least(BATCH_SIZE), default=400, help="training scenes (default: 400)")
    size = at_least(32)  # into which every digit fits
    parser.add_argument("--img-size", type=size, default=64, help="height and width of the scenes (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: 2e-3)")
    parser.add_argument("--output", type=Path, default="output/segmentation", help="folder to write (%(default)s)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    torch.manual_seed(0)
    try:
        model = Segmenter(args.model, args.img_size, find_checkpoint(args.checkpoint) if args.checkpoint else None)
    except ValueError as e:  # an image size that the patches do not divide
        raise UserError(str(e)) from e
    train(model, scenes(args.scenes, args.img_size, training=True), args.epochs, args.lr)
    images, mask = scenes(200, args.img_size, training=False).tensors
    predicted = predict(model, images)
    iou, least = mean_iou(predicted, mask), mean_iou(torch.zeros_like(mask), mask)
    print(f"mIoU of {args.model}: {iou:.1%} on {len(mask)} held-out scenes; of background everywhere: {least:.1%}")
    args.output.mkdir(parents=True, exist_ok=True)
    save({"arch": args.model, "state_dict": model.state_dict()}, args.output / "model.pth.tar")
    picture(args.output / "predictions.png", images[:12], mask[:12], predicted[:12])
    print(f"wrote {args.output}/model.pth.tar and predictions.png: images, masks, predictions")


if __name__ == "__main__":
    sys.exit(run("segmentation", main))
