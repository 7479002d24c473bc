"""scikit-learn's handwritten digits as an image folder: 1,797 real 8x8 images of 10 classes."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from vip.errors import UserError


def write_digits(folder: str | Path) -> tuple[int, int]:
    """Write the digits to `folder/train` and `folder/val`, unless they are there already.

    The split is scikit-learn's stratified one: 80 % for training, 20 % held out.

    Args:
        folder: Folder to create.

    Returns:
        Number of training and validation images.

    Raises:
        UserError: If scikit-learn is not installed, or the folder cannot be written or holds something else.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise UserError("The digits come with scikit-learn: pip install scikit-learn.") from e
    folder = Path(folder).resolve()
    images, labels = load_digits(return_X_y=True)
    splits = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return len(splits[0]), len(splits[1])
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for split, indices in zip(("train", "val"), splits, strict=True):
            for i in indices:
                path = unfinished / split / str(labels[i]) / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((images[i].reshape(8, 8) * 255 / 16).round().astype(np.uint8)).save(path)
        unfinished.rename(folder)
    except OSError as e:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"Cannot write the digits to {folder} ({e.strerror}); name a folder that is yet to be.") from e
    return len(splits[0]), len(splits[1])
