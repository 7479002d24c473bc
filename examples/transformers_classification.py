"""A Vision Permutator in transformers' timm wrapper, on scikit-learn's digits: train, save, load by `Auto...`.

python -m examples.transformers_classification --model vip_nano4_32 --epochs 3
"""

import sys

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

from vip.cli import run  # whatever is imported of vip registers its models with timm
from vip.cli.arguments import Parser, at_least
from vip.training.weights import check_model_name


def digits() -> tuple[list[Image.Image], torch.Tensor, list[int], list[int]]:
    """The digits as images, their labels, and which are for training and which held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = [Image.fromarray((p.reshape(8, 8) * 255 / 16).astype(np.uint8)).convert("RGB") for p in pixels]
    train, held_out = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)
    return images, torch.from_numpy(labels), train, held_out


def create(model: str, **model_args: object) -> TimmWrapperForImageClassification:
    """A model by its name in timm, with random weights; `model_args` are those of `timm.create_model`."""
    cfg = timm.get_pretrained_cfg(model)  # image size, mean and deviation, for the image processor
    assert cfg is not None
    config = TimmWrapperConfig(architecture=model, num_labels=10, model_args=model_args, pretrained_cfg=cfg.to_dict())
    return TimmWrapperForImageClassification(config)


def train(model: TimmWrapperForImageClassification, epochs: int) -> float:
    """Train on the digits; returns the accuracy on the held-out ones."""
    images, labels, train_set, held_out = digits()
    processor = TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
    pixel_values = processor(images)["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in torch.tensor(train_set)[torch.randperm(len(train_set))].split(64):
            optimizer.zero_grad()
            model(pixel_values=pixel_values[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
    with torch.inference_mode():
        logits = model.eval()(pixel_values=pixel_values[held_out]).logits
    return float((logits.argmax(1) == labels[held_out]).float().mean())


def main(argv: list[str]) -> None:
    """Train, save, load, and say how well."""
    parser = Parser(prog="transformers_classification", description=__doc__)
    parser.add_argument("--model", default="vip_nano4_32", help="name in timm (default: vip_nano4_32)")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="passes over the 1437 digits (default: 3)")
    parser.add_argument("--output", default="output/transformers", help="folder to write (default: %(default)s)")
    args = parser.parse_args(argv)
    check_model_name(args.model)
    torch.manual_seed(0)
    model = create(args.model)
    print(f"{args.model}: {train(model, args.epochs):.1%} of the held-out digits, 10.0% by chance")
    model.save_pretrained(args.output)
    processor = AutoImageProcessor.from_pretrained(args.output)
    again = AutoModelForImageClassification.from_pretrained(args.output).eval()
    images, labels, _, held_out = digits()
    with torch.inference_mode():
        scores = again(**processor(images[held_out[0]])).logits.softmax(1)[0]
    print(f"{args.output} holds it: a {labels[held_out[0]]} is a {scores.argmax()} with {scores.max():.2f}")


if __name__ == "__main__":
    sys.exit(run("transformers_classification", main))
