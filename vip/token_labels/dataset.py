"""Training images with their label maps."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.functional import get_image_size

from vip.data.datasets import ReadableImageDataset, class_to_idx
from vip.errors import UserError
from vip.token_labels.config import TokenLabelConfig
from vip.token_labels.geometry import Region, TrackedTransform, compose, published_box, shown_share
from vip.token_labels.maps import DamagedMap, LabelMap, LabelMaps, map_key, map_keys
from vip.token_labels.store import open_label_maps
from vip.token_labels.targets import NOWHERE, Grid, TokenLabels

_logger = logging.getLogger(__name__)

REGIONS = {
    "center": Region((1, 1)),  # what the published generator's centre crop shows
    "image": Region((1, 1), crop_mode="squash"),
}


class TokenLabelDataset(ReadableImageDataset):
    """An image folder whose samples carry label maps: `(image, TokenLabels)`.

    An image without a map, or with a damaged one, has its class for a label; both are counted.

    Args:
        dataset: The images.
        maps: Their label maps.
        num_classes: Classes of the model.
        grid: Height and width of the token grid.
        region: 'center' or 'image': the part of an image that its map covers; 'auto': what the maps say, else 'center'.
        published: Read the maps where the published code reads them.

    Raises:
        UserError: If the maps are not for these images or classes.
    """

    def __init__(
        self,
        dataset: ReadableImageDataset,
        maps: LabelMaps,
        num_classes: int,
        grid: Grid,
        region: str = "auto",
        published: bool = False,
    ) -> None:
        super().__init__(dataset, dataset.is_training, dataset.max_bad_images, dataset.decode)
        self.maps, self.num_classes, self.grid, self.published = maps, num_classes, grid, published
        self._check_classes()
        recorded = maps.record.region if maps.record is not None else REGIONS["center"]
        self.region = REGIONS.get(region, recorded)
        self.without_map = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # one table for all workers
        self.map_shape = self._first_map().values.shape

    def _check_classes(self) -> None:
        maps, known = self.maps, class_to_idx(self) or {}
        record = maps.record
        if record is not None and record.transfer:
            raise UserError(
                f"The label maps in {maps.root} were made with --transfer, by an annotator of other classes than the "
                "images have; make them with one of the same classes."
            )
        if record is not None and record.num_classes is not None and record.num_classes != self.num_classes:
            raise UserError(
                f"The label maps in {maps.root} name {record.num_classes} classes, the training has {self.num_classes}."
            )
        if record is not None and record.classes and {name: i for i, name in enumerate(record.classes)} != known:
            others = [name for name, i in known.items() if record.classes[i : i + 1] != [name]]
            other = (others or [name for name in record.classes if name not in known])[0]
            raise UserError(
                f"The label maps in {maps.root} were made for other classes than the images have, for example {other}; "
                "generate them with an annotator that was trained on the same class folders."
            )
        folders = {key.rpartition("/")[0] for key in map_keys(self.filenames())}
        if missing := sorted(folders - maps.classes()):
            names = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            raise UserError(
                f"{maps.root} has no label maps for {len(missing)} of {len(folders)} class folders: {names}; it has "
                f"{', '.join(sorted(maps.classes())[:3])}, ... Is it the right folder?"
            )

    def _first_map(self) -> LabelMap:
        for index in range(len(self)):
            if (label_map := self._read(index)) is not None:
                return label_map
        raise UserError(f"None of the {len(self)} training images has a label map in {self.maps.root}.")

    def _read(self, index: int) -> LabelMap | None:
        """The map of an image; None, counted, where there is none that can be read."""
        key = map_key(self.reader.filename(index))
        try:
            label_map = self.maps.read(key)
        except DamagedMap as e:
            label_map = None
            if not self.without_map[index]:
                _logger.warning(f"The label map {self.maps.root / key} is damaged ({e}): its image has its class alone")
        if label_map is None:
            self.without_map[index] = True
            return None
        highest = int(label_map.indices.max())
        if highest >= self.num_classes:
            raise UserError(
                f"The label map {self.maps.root / key} names class {highest}, the training has {self.num_classes} "
                "classes; generate the maps with an annotator of the same classes."
            )
        return label_map

    @property
    def transform(self) -> Any:
        """The training transform, followed by the labels."""
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._transform = None if transform is None else TrackedTransform(transform)

    def make_sample(self, index: int, image: Any, target: Any) -> tuple[Any, TokenLabels]:
        """Make the sample of a decoded image."""
        size = get_image_size(image)
        image, moves = self.transform(image)
        label_map = self._read(index)
        if label_map is None:
            empty = torch.zeros(self.map_shape)
            label_map, box = LabelMap(empty.half(), empty.int()), NOWHERE
        elif label_map.values.shape != self.map_shape:
            raise UserError(
                f"The label map of {self.filename(index)} is {list(label_map.values.shape)}, others are "
                f"{list(self.map_shape)}; generate all of them at one --img-size."
            )
        else:
            place = (
                published_box(moves) if self.published else np.linalg.inv(self.region.matrix(*size)) @ compose(moves)
            )
            box = torch.from_numpy(place[:2]).float()
        shown = np.ones(self.grid) if self.published else shown_share(moves, self.grid)
        return image, TokenLabels(
            target=torch.tensor(target),
            map_values=label_map.values,
            map_indices=label_map.indices,
            box=box,
            shown=torch.from_numpy(shown).float(),
        )

    def files_without_map(self) -> list[str]:
        """File names of the images seen so far whose class stood in for a map."""
        return [str(self.filename(i)) for i in self.without_map.nonzero().flatten().tolist()]


def open_token_labels(images: Any, config: TokenLabelConfig, num_classes: int, grid: Grid) -> TokenLabelDataset:
    """Put the label maps of `--token-label-data` beside training images.

    Raises:
        UserError: If the data set has no files, or the maps are missing or not for them.
    """
    if not isinstance(images, ReadableImageDataset):
        raise UserError("--token-label-data goes by the names of image files: it needs an image folder or a tar file.")
    maps = open_label_maps(config.token_label_data)
    published = config.token_label_crop == "published"
    dataset = TokenLabelDataset(images, maps, num_classes, grid, config.token_label_region, published)
    k, height, width = dataset.map_shape
    _logger.info(f"Label maps of {height}x{width} cells, {k} classes each, for {grid[0]}x{grid[1]} tokens: {maps.root}")
    return dataset


def collate_token_labels(
    collate: Callable[[list[Any]], Any], samples: Sequence[tuple[Any, TokenLabels]]
) -> tuple[torch.Tensor, TokenLabels]:
    """Collate samples of a `TokenLabelDataset`.

    Args:
        collate: Collates pairs of an image and its class index.
        samples: The samples.
    """
    images, _ = collate([(image, int(labels.target)) for image, labels in samples])
    return images, TokenLabels.collate([labels for _, labels in samples])
