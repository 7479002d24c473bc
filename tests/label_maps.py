"""Label maps for tests."""

from pathlib import Path

import torch

from vip.token_labels.maps import LabelMap, map_key, write_map


def write_maps(images: Path, root: Path, grid: tuple[int, int] = (6, 6)) -> Path:
    """Maps in which the class of the image leads in every cell, before one that is drawn."""
    classes = sorted(path.name for path in images.iterdir())
    generator = torch.Generator().manual_seed(0)
    for path in sorted(images.glob("*/*")):
        first = torch.full((1, *grid), classes.index(path.parent.name))
        second = (first + torch.randint(1, 4, (1, *grid), generator=generator)) % 4
        values = torch.tensor([4.0, 2.0]).view(2, 1, 1).expand(2, *grid)
        write_map(root / f"{map_key(str(path))}.pt", LabelMap(values, torch.cat((first, second))))
    return root
