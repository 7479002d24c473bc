"""Label maps to test with."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from vip.errors import UserError
from vip.token_labels.maps import LabelMap, write_map


def random_map(seed: int = 0, shape: tuple[int, int, int] = (5, 4, 4), classes: int = 10) -> LabelMap:
    """A map of random logits and classes; at least one cell names the highest class."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(0, 4, shape).astype(np.float16))
    indices = torch.from_numpy(rng.integers(0, classes, shape, dtype=np.int32))
    indices.view(-1)[rng.integers(indices.numel())] = classes - 1
    return LabelMap(values, indices)


def write_maps(root: Path, keys: Iterable[str], **options: object) -> dict[str, LabelMap]:
    """Write a random map for every key in the published layout."""
    maps = {key: random_map(i, **options) for i, key in enumerate(sorted(keys))}  # type: ignore[arg-type]
    for key, label_map in maps.items():
        write_map(root / f"{key}.pt", label_map)
    return maps


def identical(a: LabelMap | None, b: LabelMap | None) -> bool:
    """Whether two maps are the same to the bit; `equal` would take -0 for 0."""
    assert a is not None and b is not None
    assert {m.values.dtype for m in (a, b)} == {torch.float16} and {m.indices.dtype for m in (a, b)} == {torch.int32}
    same_values = a.values.contiguous().view(torch.int16).equal(b.values.contiguous().view(torch.int16))
    return same_values and a.indices.equal(b.indices)


def one_line(error: UserError) -> str:
    """The message of an error, which has to be one line of bearable length."""
    message = str(error)
    assert message and "\n" not in message and len(message) < 600
    return message
