"""Where the pixels of an augmented image come from, as matrices from (u, v, 1) to (x, y, 1).

Places in an image are shares of its width and height: (0, 0) is the left top corner, (1, 1) the right bottom one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.functional import get_image_size

from vip.data.moves import MOVES, Matrix, crop_matrix, policy_ops
from vip.errors import UserError


class Move(NamedTuple):
    """A step of a transform that moved pixels.

    Attributes:
        kind: 'crop', 'flip' or 'augment'.
        matrix: Where its output is in its input, `[3, 3]`.
    """

    kind: str
    matrix: Matrix


@dataclass(frozen=True)
class Region:
    """The part of an image that the evaluation transform of timm shows.

    Attributes:
        img_size: Height and width of its output.
        crop_pct: Share of the resized image that the crop keeps.
        crop_mode: 'center' resizes the shorter side and crops, 'squash' ignores the aspect ratio, 'border' resizes the
            longer side and pads.
    """

    img_size: tuple[int, int]
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def matrix(self, width: int, height: int) -> Matrix:
        """The matrix of the output over an image of this size."""
        rows, columns = self.img_size
        if self.crop_mode == "squash":
            shares = self.crop_pct, self.crop_pct
        else:  # pixels of the output for one of the image
            pick = max if self.crop_mode == "center" else min
            scale = pick(columns / width, rows / height) / self.crop_pct
            shares = columns / (width * scale), rows / (height * scale)
        return crop_matrix((1 - shares[0]) / 2, (1 - shares[1]) / 2, *shares)


class TrackedTransform:
    """A training transform of timm that also tells what part of the image its output shows.

    Args:
        transform: What `timm.data.create_transform(..., is_training=True)` gave.

    Raises:
        UserError: If it holds a step whose geometry is not known.
    """

    def __init__(self, transform: Any) -> None:
        self.steps = [_track(step) for step in transform.transforms]

    def __call__(self, image: Image.Image) -> tuple[Any, list[Move]]:
        """Transform an image; returns the result and, in order, what moved its pixels."""
        moves = []
        for step in self.steps:
            image, made = step(image)
            moves += made
        return image, moves


def compose(moves: Iterable[Move]) -> Matrix:
    """The matrix of moves made one after the other."""
    return reduce(np.matmul, (move.matrix for move in moves), np.eye(3))


def published_box(moves: Sequence[Move]) -> Matrix:
    """What the published code takes for the image's place: the crop with its axes exchanged, no rotation or shift."""
    matrix = np.eye(3)
    for kind, step in moves:
        if kind == "crop":
            (width, _, left), (_, height, top), _ = step
            matrix = matrix @ crop_matrix(top, left, height, width)
        elif kind == "flip":
            matrix = matrix @ step
    return matrix


def shown_share(moves: Sequence[Move], grid: tuple[int, int], points: int = 4) -> np.ndarray:
    """The share of each token that shows the image, and not what rotations and shifts fill up with.

    Args:
        moves: What was done to the image, in order.
        grid: Height and width of the token grid.
        points: Places of a token along each axis that are looked at.
    """
    rows, columns = (np.arange(size * points, dtype=np.float64) + 0.5 for size in grid)
    v, u = np.meshgrid(rows / len(rows), columns / len(columns), indexing="ij")
    place = np.stack((u.ravel(), v.ravel(), np.ones(u.size)))
    shown = np.ones(u.size, dtype=bool)
    for move in reversed(moves):
        place = move.matrix @ place
        shown &= (np.abs(place[:2] - 0.5) <= 0.5).all(0)
    return shown.reshape(grid[0], points, grid[1], points).mean((1, 3))


_KEEP_PLACES = (
    transforms.ColorJitter,
    transforms.Grayscale,
    transforms.Lambda,
    transforms.Normalize,
    transforms.RandomApply,  # of a color jitter or a blur
    transforms.RandomGrayscale,
    MaybePILToTensor,
    MaybeToTensor,
    RandomErasing,  # an erased place keeps its label: its surroundings tell what is there
    transforms.Resize,  # of --no-aug, to height and width, so that the crop after it keeps everything
    transforms.CenterCrop,
)


def _track(step: Any) -> Callable[[Any], tuple[Any, list[Move]]]:
    if isinstance(step, _KEEP_PLACES):
        return partial(_keep, step)
    if isinstance(step, RandomResizedCropAndInterpolation):
        return _Crop(step)
    if isinstance(step, transforms.RandomHorizontalFlip):
        return partial(_flip, step, crop_matrix(1, 0, -1, 1))
    if isinstance(step, transforms.RandomVerticalFlip):
        return partial(_flip, step, crop_matrix(0, 1, 1, -1))
    if isinstance(step, RandAugment | AutoAugment):
        return _Augment(step)
    raise UserError(f"Token labels cannot follow {type(step).__name__}: leave out --train-crop-mode and --aa augmix.")


def _keep(step: Any, image: Any) -> tuple[Any, list[Move]]:
    return step(image), []


def _flip(step: Any, matrix: Matrix, image: Any) -> tuple[Any, list[Move]]:
    flipped = step(image)
    return flipped, [] if flipped is image else [Move("flip", matrix)]


class _Crop:
    """Runs timm's random crop and keeps what it drew."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop, self.draw = crop, crop.get_params
        crop.get_params = self._get_params  # type: ignore[method-assign]  # an attribute of this one crop

    def _get_params(self, *args: Any) -> tuple[int, int, int, int]:
        self.drawn = self.draw(*args)
        return self.drawn

    def __call__(self, image: Image.Image) -> tuple[Image.Image, list[Move]]:
        columns, rows = get_image_size(image)
        cropped = self.crop(image)
        top, left, height, width = self.drawn
        matrix = crop_matrix(left / columns, top / rows, width / columns, height / rows)
        return cropped, [Move("crop", matrix)]


class _Augment:
    """Runs a policy of timm and collects where it moved the pixels."""

    def __init__(self, policy: RandAugment | AutoAugment) -> None:
        self.policy = policy
        self.moves: list[Move] = []
        for op in policy_ops(policy):
            if op.name in MOVES:
                function: Any = op.aug_fn
                op.aug_fn = partial(self._move, op.name, function)  # type: ignore[assignment]

    def _move(self, name: str, function: Callable, image: Any, amount: float, **kwargs: Any) -> Any:
        width, height = get_image_size(image)
        pixels = crop_matrix(0, 0, width, height)
        self.moves.append(Move("augment", np.linalg.inv(pixels) @ MOVES[name](width, height, amount) @ pixels))
        return function(image, amount, **kwargs)

    def __call__(self, image: Image.Image) -> tuple[Image.Image, list[Move]]:
        self.moves = []
        image = self.policy(image)
        return image, self.moves
