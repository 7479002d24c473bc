"""Labels of a validation that are not the folders' own: some classes only, several right ones, ImageNet's test sets."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet

from vip.data.datasets import class_to_idx
from vip.errors import UserError
from vip.training.config import ValidateConfig
from vip.training.runtime import Runtime

# Test sets for models of ImageNet's 1000 classes: file of the classes they have, in timm, where they have not all.
_SUBSETS = {"imagenet-a": "imagenet_a_indices.txt", "imagenet-r": "imagenet_r_indices.txt"}


def label_subset(config: ValidateConfig) -> torch.Tensor | None:
    """Indices of the only classes that can be predicted, in the order of the data set's; None for all.

    Raises:
        UserError: If the file of `--valid-labels` is none of class indices.
    """
    if name := _SUBSETS.get(config.test_set):
        return torch.tensor([int(line) for line in (files("timm.data") / "_info" / name).read_text().split()])
    if not config.valid_labels:
        return None
    try:
        return torch.tensor([int(line) for line in Path(config.valid_labels).read_text().split()])
    except (OSError, ValueError) as e:
        raise UserError(f"--valid-labels {config.valid_labels} is not a file of class indices, one a line: {e}") from e


def create_real_labels(config: ValidateConfig, dataset: Any, runtime: Runtime) -> RealLabelsImagenet | None:
    """Labels of which any is right (arXiv 2006.07159), None where they are not asked for.

    Raises:
        UserError: If they are not to be had, or not for these images.
    """
    own = config.test_set == "imagenet-real"
    if not (config.real_labels or own):
        return None
    flag = "--test-set imagenet-real" if own else f"--real-labels {config.real_labels}"
    if runtime.distributed:
        raise UserError(f"{flag} needs the predictions in one process; validate without torchrun.")
    names = dataset.filenames(basename=True)
    try:
        real_labels = RealLabelsImagenet(names, real_json=None if own else config.real_labels)
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{flag} cannot be read: {e}") from e
    except AssertionError as e:  # timm compares the numbers of labels and images
        raise UserError(f"{flag} is not for {len(names)} images.") from e
    if strange := [name for name in names if name not in real_labels.real_labels]:
        raise UserError(f"{flag} is for ImageNet's ILSVRC2012_val_00000001.JPEG and so on, not {strange[0]}.")
    return real_labels


def check_test_set(config: ValidateConfig, dataset: Any, num_classes: int, trained_on: dict[str, int] | None) -> None:
    """Refuse folders that are not those of the test set, and models of other classes than ImageNet's.

    Raises:
        UserError: With what differs.
    """
    name, synsets = config.test_set, ImageNetInfo().label_names()
    if num_classes != len(synsets) or (trained_on and trained_on != {s: i for i, s in enumerate(synsets)}):
        raise UserError(
            f"--test-set {name} is for models of ImageNet's 1000 classes, and this one has {num_classes} others."
        )
    subset = label_subset(config)
    expected = synsets if subset is None else [synsets[i] for i in subset]
    found = class_to_idx(dataset) or {}
    folders = sorted(found, key=found.__getitem__)
    if name == "imagenet-v2":  # whose folders are the indices, as 7 or as 0007
        expected = [str(i) for i in range(len(synsets))]
        folders = [folder.lstrip("0") or "0" for folder in folders]
    if folders != expected:
        strange = next((folder for folder in folders if folder not in expected), None)
        which = f"{strange} is none of them" if strange else f"there are {len(folders)}"
        raise UserError(
            f"--test-set {name} has {len(expected)} folders, {expected[0]} to {expected[-1]}; {which} in {config.data}."
        )
