"""What the classes of a model are called."""

import re
from collections.abc import Mapping, Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from vip.errors import UserError
from vip.options import nearest


def class_names(num_classes: int, class_to_idx: Mapping[str, int] | None = None) -> list[str]:
    """Names of a model's classes.

    Args:
        num_classes: Number of classes.
        class_to_idx: Class folders and their indices, as checkpoints store them.

    Returns:
        The names of the folders, ImageNet's written out ('tench, Tinca tinca' for n01440764); without folders those of
        the ImageNet of as many classes, else 'class 0' and so on.
    """
    if class_to_idx:
        folders = {index: str(name) for name, index in class_to_idx.items()}
        return _write_out([folders.get(index, f"class {index}") for index in range(num_classes)])
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return list(ImageNetInfo(subset).label_descriptions()) if subset else [f"class {i}" for i in range(num_classes)]


def _write_out(names: list[str]) -> list[str]:
    """ImageNet's names of folders, which are WordNet's numbers, in words; all others as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    info = ImageNetInfo()
    try:
        return [info.label_name_to_description(name) for name in names]
    except KeyError:  # of a class that is in no ImageNet
        return names


def find_class(wanted: str, names: Sequence[str]) -> int:
    """The index of the class that is called so, or has this index; a name before an index.

    Args:
        wanted: A name, one of the several that ImageNet's classes have, or an index.
        names: What `class_names` gave.

    Raises:
        UserError: If there is no such class, or several.
    """
    found = [i for i, name in enumerate(names) if name == wanted]
    found = found or [i for i, name in enumerate(names) if wanted in name.split(", ")]
    if len(found) > 1:
        raise UserError(f"{wanted!r} names the classes {', '.join(map(str, found))}: give one of these.")
    if found:
        return found[0]
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(
        f"No class is called {wanted!r}.{nearest(wanted, names)} There are {len(names)}, and their indices begin at 0."
    )
