"""Label maps on disk: the published layout, a file an image, and a packed one.

The published layout is `<root>/<class folder>/<file stem up to the first dot>.pt`, each file a bare float16 tensor
`[2, k, H, W]`: the k strongest logits of each cell, and their class indices, which float16 holds exactly up to 2048.
The packed one (see `vip.token_labels.packing`) holds the same in a few large files, with integer indices.
`label_maps.json` beside either says what part of the images the maps cover; the published set has none.
"""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vip.errors import UserError
from vip.files import UnreadableFile, load_without_code, replacing, save
from vip.token_labels.geometry import Region

RECORD = "label_maps.json"
CROP_MODES = ("center", "squash", "border")
EXACT_CLASSES = 2048  # float16 holds every class index below exactly
MOST_LOGITS = 2**20  # of a map, were it a square of its longer side: as many does training read of it


class LabelMap(NamedTuple):
    """The strongest classes of each cell of a map."""

    values: torch.Tensor  # logits [k, H, W], float16
    indices: torch.Tensor  # classes [k, H, W], int32


class DamagedMap(Exception):
    """A label map that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class MapRecord:
    """What a set of label maps says of itself.

    Attributes:
        region: The part of an image that its map covers.
        num_classes: Classes of the annotator, None if unknown.
        classes: Their names in order, None if unknown.
        model: The annotator.
        weights: Fingerprint of its weights.
        transfer: Whether the images are of other classes than the annotator's.
    """

    region: Region
    num_classes: int | None = None
    classes: list[str] | None = None
    model: str = ""
    weights: str = ""
    transfer: bool = False

    def write(self, root: Path) -> None:
        """Write `label_maps.json` into a folder of maps."""
        content = {"region": asdict(self.region), **{k: v for k, v in vars(self).items() if k != "region"}}
        root.mkdir(parents=True, exist_ok=True)
        with replacing(root / RECORD) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(root: Path) -> "MapRecord | None":
        """Read the record of a folder of maps, None if it has none.

        Raises:
            UserError: If it is damaged.
        """
        try:
            content = json.loads((root / RECORD).read_text(encoding="utf-8"))
            region = content.pop("region")
            record = MapRecord(Region(tuple(region.pop("img_size")), **region), **content)
            record._check()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            reason = f"{type(e).__name__}: {e}"[:300]
            raise UserError(f"{root / RECORD} is damaged ({reason}); generate the maps again.") from e
        return record

    def _check(self) -> None:
        rows, columns = self.region.img_size
        sized = all(isinstance(n, int) and 1 <= n <= 2**16 for n in (rows, columns))
        cropped = 0.01 <= self.region.crop_pct <= 2 and self.region.crop_mode in CROP_MODES  # as --crop-pct
        if not (sized and cropped):
            raise ValueError(f"no such region: {reprlib.repr(self.region)}")
        if not (self.num_classes is None or (isinstance(self.num_classes, int) and self.num_classes > 0)):
            raise ValueError(f"num_classes is {self.num_classes!r}")
        names = self.classes or []
        if not (
            isinstance(names, list) and all(isinstance(name, str) for name in names) and len({*names}) == len(names)
        ):
            raise ValueError("classes are no list of names")


def check_shape(shape: Sequence[int]) -> None:
    """Refuse a map that training could not hold.

    Args:
        shape: The map's k, H and W.

    Raises:
        ValueError: If it is too large, or none.
    """
    k, height, width = shape
    if min(shape) < 1 or k * max(height, width) ** 2 > MOST_LOGITS:
        raise ValueError(f"{k}x{height}x{width} logits, more than training takes ({MOST_LOGITS})")


class LabelMaps(Protocol):
    """A set of label maps; the key of a map is `<class folder>/<file stem up to the first dot>`."""

    root: Path
    record: MapRecord | None

    def read(self, key: str) -> LabelMap | None:
        """Read a map, None if there is none.

        Raises:
            DamagedMap: If it cannot be read.
            UserError: If it is no label map, or reading it would run code.
        """

    def keys(self) -> Iterator[str]:
        """The keys of all maps."""

    def classes(self) -> set[str]:
        """The class folders that there are maps for."""


class FolderMaps:
    """Label maps in the published layout."""

    def __init__(self, root: Path) -> None:
        self.root, self.record = root, MapRecord.read(root)

    def read(self, key: str) -> LabelMap | None:
        """See `LabelMaps`."""
        path = self.root / f"{key}.pt"
        try:
            content = load_without_code(path)
        except FileNotFoundError:
            return None
        except UnreadableFile as e:
            if e.code:
                raise UserError(
                    f"The label map {path} is refused: {e}. Generate it again from a source you trust."
                ) from e
            raise DamagedMap(str(e)) from e
        return _split(content, path)

    def keys(self) -> Iterator[str]:
        """See `LabelMaps`."""
        for folder in sorted(self.classes()):
            for name in sorted(os.listdir(self.root / folder)):
                if name.endswith(".pt") and not name.startswith("."):
                    yield f"{folder}/{name.removesuffix('.pt')}"

    def classes(self) -> set[str]:
        """See `LabelMaps`."""
        return {e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith(".")}


def _split(content: Any, path: Path) -> LabelMap:
    """Check a tensor in the published layout."""
    found = type(content).__name__
    if isinstance(content, torch.Tensor) and content.layout is torch.strided and not content.is_meta:
        content = torch.detach(content)  # without attributes of its own, which may be called as its methods are
        found = f"{str(content.dtype).removeprefix('torch.')} {list(content.shape)}"
        if content.dtype is torch.float16 and content.ndim == 4 and len(content) == 2 and content.numel():
            try:
                check_shape(content.shape[1:])
            except ValueError as e:
                raise UserError(f"The label map {path} has {e}; generate it with a lower --top-k or --img-size.") from e
            values, indices = content
            if not values.isfinite().all():
                raise UserError(f"The label map {path} holds logits that are not finite; generate it again.")
            if not (indices.isfinite() & (indices >= 0) & (indices == indices.floor())).all():
                raise UserError(
                    f"The label map {path} holds class indices that are no whole numbers; generate it again."
                )
            if indices.max() > EXACT_CLASSES:
                raise UserError(
                    f"The label map {path} names class {int(indices.max())}, and float16 rounds those beyond "
                    f"{EXACT_CLASSES}; generate it again with --format packed."
                )
            return LabelMap(values, indices.int())
    raise UserError(f"{path} holds {found}, expected a label map: float16 [2, k, H, W].")


def write_map(path: Path, label_map: LabelMap) -> None:
    """Write a map in the published layout, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    assert int(label_map.indices.max()) <= EXACT_CLASSES, "float16 cannot hold these indices"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(torch.stack((label_map.values.half(), label_map.indices.half())), path)


def map_key(filename: str) -> str:
    """The key of the map of an image.

    Args:
        filename: Path of the image, which ends in `<class folder>/<file>`.

    Raises:
        UserError: If it does not.

    Example:
        >>> map_key("train/n01440764/n01440764_10026.JPEG")
        'n01440764/n01440764_10026'
    """
    path = Path(filename)
    if path.parent.name in ("", ".."):  # as in a tar file of tar files
        raise UserError(f"The image {filename} is in no class folder, by which its label map could be found.")
    return f"{path.parent.name}/{path.name.partition('.')[0]}"


def map_keys(filenames: Iterable[str]) -> list[str]:
    """The keys of the maps of images.

    Raises:
        UserError: If two images would share one.
    """
    seen: dict[str, str] = {}
    for name in filenames:
        key = map_key(name)
        if key in seen:
            raise UserError(
                f"{seen[key]} and {name} would share the label map {key}.pt, which is named by the class folder and "
                "what is before the first dot; rename one of them."
            )
        seen[key] = name
    return list(seen)
