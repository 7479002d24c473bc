"""What a model said of each image of a validation: written by `vip validate --predictions`, read by `vip report`."""

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vip.errors import UserError
from vip.files import replacing

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions of N images.

    Attributes:
        target: `[N]`, their classes.
        top: `[N, K]`, the classes that were found likeliest, best first; K is 5, or the classes where they are fewer.
        probability: `[N, K]`, their softmax.
        classes: Names of the classes; of indices where the data set has no names.
        model: Name of the model.
        checkpoint: Where its weights are from.
    """

    target: np.ndarray
    top: np.ndarray
    probability: np.ndarray
    classes: list[str]
    model: str
    checkpoint: str


@dataclass
class Recorder:
    """Collects predictions batch by batch."""

    targets: list[torch.Tensor] = field(default_factory=list)
    tops: list[torch.Tensor] = field(default_factory=list)
    probabilities: list[torch.Tensor] = field(default_factory=list)

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add logits `[B, C]` and classes `[B]`."""
        probability, top = output.float().softmax(1).topk(min(TOP, output.shape[1]))
        self.targets.append(target.cpu())
        self.tops.append(top.cpu())
        self.probabilities.append(probability.cpu())

    def predictions(self, classes: list[str], model: str, checkpoint: str) -> Predictions:
        """All of them."""
        target, top, probability = (
            torch.cat(values).numpy() for values in (self.targets, self.tops, self.probabilities)
        )
        return Predictions(target, top, probability, classes, model, checkpoint)


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write an `.npz` file that NumPy reads without pickle.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(predictions).items()}
            np.savez_compressed(file, **arrays)
    except OSError as e:
        raise UserError(
            f"Cannot write {path} ({e.strerror}); give --predictions a file in a folder that is there."
        ) from e


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote.

    Raises:
        UserError: If it is missing, damaged or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            values = {name: content[name] for name in Predictions.__dataclass_fields__}
    # what NumPy raises at files of other kinds is of many kinds
    except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} holds no predictions ({e}); write it anew by vip validate --predictions.") from e
    found = Predictions(
        **{name: values[name] for name in ("target", "top", "probability")},
        classes=[str(name) for name in values["classes"].flat],
        model=str(values["model"]),
        checkpoint=str(values["checkpoint"]),
    )
    count = len(found.classes)
    whole = found.target.ndim == 1 and found.top.ndim == 2 and found.top.shape == found.probability.shape
    whole = whole and np.issubdtype(found.probability.dtype, np.floating)
    if not whole or len(found.top) != len(found.target) or not len(found.target) or not found.top.shape[1]:
        raise UserError(
            f"{path} holds predictions of other forms than vip validate --predictions writes; write it anew."
        )
    if not all(
        np.issubdtype(a.dtype, np.integer) and (0 <= a).all() and (a < count).all() for a in (found.target, found.top)
    ):
        raise UserError(f"{path} names classes beyond the {count} it has; write it anew by vip validate --predictions.")
    return found
