"""Scenes of scikit-learn's handwritten digits on textured backgrounds, with masks and boxes."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

CLASSES = ["background", *"0123456789"]


class Scene(NamedTuple):
    """An image `[3, H, W]`, mostly from 0 to 1, its classes `[H, W]`, and the box and class of each digit."""

    image: torch.Tensor
    mask: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor


def digits(training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits `[N, 8, 8]` from 0 to 1 and their classes from 1 on: 80 % for training, 20 % held out."""
    images, labels = load_digits(return_X_y=True)
    splits = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)  # as vip.data.digits
    chosen = splits[0] if training else splits[1]
    return torch.from_numpy(images[chosen]).float().view(-1, 8, 8) / 16, torch.from_numpy(labels[chosen]) + 1


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> torch.Tensor:
    """Colors that change slowly, with stripes, a disc that is no digit, and noise, `[3, H, W]`."""
    colors = torch.from_numpy(rng.uniform(0, 0.7, (1, 3, 3, 3))).float()
    y, x = np.mgrid[: size[0], : size[1]]
    angle, period, row, column, radius = rng.random(5) * (np.pi, 10, *size, 10) + (0, 4, 0, 0, 3)
    stripes = 0.15 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    disc = ((y - row) ** 2 + (x - column) ** 2 < radius**2) * rng.uniform(-0.5, 0.5)
    noise = rng.normal(0, 0.05, (3, *size))
    return F.interpolate(colors, size=size, mode="bicubic")[0] + torch.from_numpy(stripes + disc + noise).float()


def scene(
    rng: np.random.Generator, digits: tuple[torch.Tensor, torch.Tensor], size: tuple[int, int], count: int = 4
) -> Scene:
    """Put up to `count` bright digits of 20 to 32 pixels on a texture, none over another and at least one."""
    image, mask = _texture(rng, size), torch.zeros(size, dtype=torch.int64)
    boxes, labels = [], []
    for i in rng.integers(len(digits[0]), size=count):
        side = int(rng.integers(20, 33))
        row, column = int(rng.integers(size[0] - side + 1)), int(rng.integers(size[1] - side + 1))
        place = (slice(row, row + side), slice(column, column + side))
        if mask[place].any():
            continue
        ink = F.interpolate(digits[0][i][None, None], size=side, mode="bilinear")[0, 0].mul(1.5).clamp(max=1)
        color = torch.from_numpy(rng.uniform(0.8, 1.2, (3, 1, 1))).float()
        paper = image[:, row : row + side, column : column + side]
        paper.lerp_(color.expand_as(paper), ink.expand_as(paper))
        mask[place][ink > 0.5] = digits[1][i]
        inked = (ink > 0.5).nonzero()
        top, left, bottom, right = *inked.amin(0), *(inked.amax(0) + 1)
        boxes.append([column + int(left), row + int(top), column + int(right), row + int(bottom)])
        labels.append(int(digits[1][i]))
    return Scene(image, mask, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels))


def scenes(count: int, size: int, training: bool) -> TensorDataset:
    """Square scenes with their masks, the same ones at every call; those held out hold other digits."""
    rng, of = np.random.default_rng(0 if training else 1), digits(training)
    made = [scene(rng, of, (size, size)) for _ in range(count)]
    return TensorDataset(torch.stack([s.image for s in made]).sub(0.4).div(0.3), torch.stack([s.mask for s in made]))
