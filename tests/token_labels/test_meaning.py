"""What token targets mean: pictures whose colours are classes, through the loader, mixing and dense targets.

The label maps say what the pictures show. So the target of each token has to name the colours that the augmented,
mixed image shows under it, with what probability it shows them.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup

from vip.data.config import DatasetConfig
from vip.data.datasets import create_split
from vip.data.loaders import create_train_loader
from vip.token_labels.dataset import TokenLabelDataset, collate_token_labels
from vip.token_labels.geometry import Region
from vip.token_labels.maps import FolderMaps, LabelMap, MapRecord, map_key, write_map
from vip.token_labels.mixing import DenseMixup
from vip.token_labels.targets import TokenLabels, dense_targets
from vip.training.config import TrainConfig

COLOURS = np.array(list(itertools.product((90, 240), repeat=3)), dtype=np.uint8)  # the corners of a cube
CLASSES = len(COLOURS)
PATCHES = 3  # along each side of a picture
SIZES = [(240, 240), (330, 200), (180, 300), (400, 160)]  # width and height
CELLS = 18  # of a map, along each side
CERTAIN = 12.0  # logit of the class of a cell of one colour, the others' are 0
GRID = (14, 14)
DATA_CONFIG = dict(input_size=(3, 224, 224), interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
REGIONS = {"image": Region((1, 1), crop_mode="squash"), "center": Region((1, 1))}  # what the maps cover
GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
CROPS = dict(hflip=0.0, vflip=0.0, aa="none")
ALL = dict(hflip=0.5, vflip=0.5, aa="rand-n2-m9-p0.7-mstd0.5-inc1")


# ---- pictures and their maps


def picture(size: tuple[int, int], region: Region, label: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of random colours in the region, around them the colour of the picture's own class; `[H, W]` classes."""
    width, height = size
    patches = rng.permutation(np.arange(PATCHES**2) % CLASSES).reshape(PATCHES, PATCHES)
    (wide, _, left), (_, high, top), _ = region.matrix(width, height)
    x = np.floor(((np.arange(width) + 0.5) / width - left) / wide * PATCHES).astype(int)
    y = np.floor(((np.arange(height) + 0.5) / height - top) / high * PATCHES).astype(int)
    inside = ((y >= 0) & (y < PATCHES))[:, None] & ((x >= 0) & (x < PATCHES))
    return np.where(inside, patches[np.ix_(y.clip(0, PATCHES - 1), x.clip(0, PATCHES - 1))], label)


def label_map(classes: np.ndarray, region: Region) -> LabelMap:
    """What an annotator that knows all would say of the region: logits by the share of each class in a cell."""
    height, width = classes.shape
    (wide, _, left), (_, high, top), _ = region.matrix(width, height)
    points = (np.arange(CELLS * 8) + 0.5) / (CELLS * 8)
    x, y = ((left + wide * points) * width).astype(int), ((top + high * points) * height).astype(int)
    shares = F.one_hot(torch.from_numpy(classes[np.ix_(y, x)]), CLASSES).float().unflatten(0, (CELLS, 8))
    values, indices = (CERTAIN * shares.unflatten(2, (CELLS, 8)).mean((1, 3))).permute(2, 0, 1).topk(5, dim=0)
    return LabelMap(values.half(), indices.int())


@dataclass
class Pictures:
    """An image folder and its maps."""

    root: Path

    def dataset(self, published: bool = False, region: str = "auto") -> TokenLabelDataset:
        images: Any = create_split(DatasetConfig(data=str(self.root / "images")), "train", is_training=True)
        return TokenLabelDataset(images, FolderMaps(self.root / "maps"), CLASSES, GRID, region, published)


@pytest.fixture(scope="module")
def all_pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pictures]:
    """Four pictures a class; their maps cover the whole image, or the square in the middle."""
    return {name: write_pictures(tmp_path_factory.mktemp(name), region) for name, region in REGIONS.items()}


def write_pictures(root: Path, region: Region) -> Pictures:
    rng = np.random.default_rng(0)
    for label, (i, size) in itertools.product(range(CLASSES), enumerate(SIZES)):
        classes = picture(size, region, label, rng)
        path = root / "images" / "train" / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS[classes]).save(path)
        write_map(root / "maps" / f"{map_key(str(path))}.pt", label_map(classes, region))
    MapRecord(region).write(root / "maps")
    return Pictures(root)


@pytest.fixture(autouse=True)
def only_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """RandAugment without what changes colours; its fill is the mean, black."""
    monkeypatch.setattr("timm.data.auto_augment._RAND_INCREASING_TRANSFORMS", GEOMETRIC)


def batches(
    dataset: TokenLabelDataset, batch_size: int, epochs: int = 1, **options: Any
) -> list[tuple[torch.Tensor, TokenLabels]]:
    """Epochs through the training loader; images are in 0 to 255."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    config = TrainConfig(**{"workers": 0, "reprob": 0.0, "color_jitter": 0.0, "scale": [0.08, 1.0]} | options)
    loader = create_train_loader(
        dataset,
        config,
        DATA_CONFIG,
        batch_size,
        mixup=None,
        device=torch.device("cpu"),
        collate_samples=collate_token_labels,
    )
    return [(images * 255, labels) for _ in range(epochs) for images, labels in loader]


# ---- what an image shows, and whether the targets say so


def colour_shares(images: torch.Tensor) -> torch.Tensor:
    """The share of each colour among the pixels under each token, `[B, H', W', K + 1]`; the last is the rest, fill."""
    colours = torch.from_numpy(np.concatenate([COLOURS, np.zeros_like(COLOURS[:1])])).float()
    nearest = torch.cdist(images.permute(0, 2, 3, 1).flatten(1, 2), colours).argmin(-1).unflatten(1, images.shape[-2:])
    shares = F.one_hot(nearest, CLASSES + 1).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(shares, images.shape[-1] // GRID[0]).permute(0, 2, 3, 1)


def pure(shares: torch.Tensor) -> torch.Tensor:
    """Tokens under which nearly all pixels have the same colour, `[B, H', W']`."""
    return shares[..., :CLASSES].amax(-1) > 0.98


def agreement(targets: torch.Tensor, shares: torch.Tensor) -> float:
    """The share of tokens of one colour whose target is that colour's class with a probability over 0.9."""
    tokens = pure(shares)
    assert tokens.float().mean() > 0.3, "many tokens show one colour"
    right = targets.argmax(-1) == shares.argmax(-1)
    return ((targets.amax(-1) > 0.9) & right)[tokens].float().mean().item()


def distance(targets: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Total variation between targets and what tokens show, `[B, H', W']`."""
    return (targets - shares).abs().sum(-1) / 2


def report(what: str, **figures: float) -> None:
    print(f"{what}: {', '.join(f'{name} {100 * figure:.1f} %' for name, figure in figures.items())}")


# ---- where the map is read

# Measured: every token of one colour agrees. What a map of cells that touch two colours leaves open shows in the
# distance, 4 % on the average over all tokens.
LEAST_AGREEMENT, MOST_DISTANCE = 0.97, 0.08


@pytest.mark.parametrize("augmentation", [CROPS, ALL], ids=["crops", "all"])
@pytest.mark.parametrize("region", REGIONS)
def test_targets_are_what_the_tokens_show(all_pictures: dict[str, Pictures], region: str, augmentation: dict) -> None:
    """And with the published reading they are not."""
    agreements = {}
    for published in (False, True):
        loaded = batches(all_pictures[region].dataset(published), 16, epochs=3, **augmentation)
        shares = colour_shares(torch.cat([images for images, _ in loaded]))
        targets = torch.cat([dense_targets(labels, CLASSES, GRID).tokens for _, labels in loaded])
        agreements[published] = agreement(targets, shares)
        away = distance(targets, shares[..., :CLASSES])[shares[..., CLASSES] < 0.02].mean().item()
        report(f"{region}, {published=}", agreement=agreements[published], distance=away)
        assert published or away < MOST_DISTANCE
    assert agreements[False] > LEAST_AGREEMENT
    assert agreements[True] < 0.5  # measured: 26 to 35 %


def test_without_augmentation(all_pictures: dict[str, Pictures]) -> None:
    (loaded,) = batches(all_pictures["center"].dataset(), CLASSES * len(SIZES), no_aug=True)
    images, labels = loaded
    assert agreement(dense_targets(labels, CLASSES, GRID).tokens, colour_shares(images)) > LEAST_AGREEMENT


def test_maps_of_the_middle_read_as_maps_of_the_image_are_wrong(all_pictures: dict[str, Pictures]) -> None:
    """So the test above does tell whether the region is respected."""
    loaded = batches(all_pictures["center"].dataset(region="image"), 16, **CROPS)
    shares = colour_shares(torch.cat([images for images, _ in loaded]))
    targets = torch.cat([dense_targets(labels, CLASSES, GRID).tokens for _, labels in loaded])
    share = agreement(targets, shares)
    report("wrong region", agreement=share)
    assert share < 0.8


@pytest.mark.parametrize("region", REGIONS)
def test_fill_has_the_class_of_the_image(all_pictures: dict[str, Pictures], region: str) -> None:
    """All of it, or by its share of the token."""
    loaded = batches(all_pictures[region].dataset(), 16, epochs=3, **ALL)
    shares = colour_shares(torch.cat([images for images, _ in loaded]))
    targets = torch.cat([dense_targets(labels, CLASSES, GRID).tokens for _, labels in loaded])
    label = F.one_hot(torch.cat([labels.target for _, labels in loaded]), CLASSES)[:, None, None]
    colours, fill = shares[..., :CLASSES], shares[..., CLASSES]
    away = distance(targets, colours + fill[..., None] * label)
    assert (fill > 0.98).float().mean() > 0.05 and away[fill > 0.98].max() < 0.05
    partly = (fill > 0.02) & (fill < 0.98) & ((colours > 0.02).sum(-1) == 1)
    report(f"{region}, fill", mean=away[partly].mean().item(), wrong=(away[partly] > 0.15).float().mean().item())
    assert partly.float().mean() > 0.02 and away[partly].mean() < 0.05
    assert (away[partly] > 0.15).float().mean() < 0.02


# ---- mixed images

MODES = ("batch", "pair", "elem")


def mixed_batches(pictures: Pictures, published: bool = False, **mixup: Any) -> list[tuple[Any, ...]]:
    """Images before and after mixing, and the dense targets; in batches of an even and of an odd size."""
    made = []
    for batch_size in (8, 5):
        loaded = batches(pictures.dataset(), batch_size, **ALL)
        mix = DenseMixup(Mixup(num_classes=CLASSES, label_smoothing=0.0, **mixup), GRID, published)
        for images, labels in loaded:
            plain = images.clone()
            images, labels = mix(images, labels)
            made.append((plain, images, dense_targets(labels, CLASSES, GRID).tokens))
    return made


@pytest.mark.parametrize("mode", MODES)
def test_cutmix_targets_are_what_the_tokens_show(all_pictures: dict[str, Pictures], mode: str) -> None:
    """And mixed by the share of the whole image, as published, they are not."""
    agreements = {}
    for published in (False, True):
        made = mixed_batches(all_pictures["center"], published, mixup_alpha=0.0, cutmix_alpha=1.0, mode=mode)
        targets = torch.cat([tokens for _, _, tokens in made])
        agreements[published] = agreement(targets, colour_shares(torch.cat([images for _, images, _ in made])))
    report(f"CutMix by {mode}", aligned=agreements[False], published=agreements[True])
    assert agreements[False] > LEAST_AGREEMENT
    assert agreements[True] < 0.7


def own_share(plain: torch.Tensor, other: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """The factors with which two images were added, by the pixels: least squares, `[B]`."""
    difference = (plain - other).flatten(1)
    return ((mixed - other).flatten(1) * difference).sum(1) / difference.square().sum(1).clamp(min=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_mixup_targets_are_mixed_as_the_pixels(all_pictures: dict[str, Pictures], mode: str) -> None:
    """The colours of both images, by the factor that the pixels tell."""
    near, shares_seen = [], []
    for plain, mixed, targets in mixed_batches(all_pictures["center"], mixup_alpha=0.8, mode=mode):
        pairs = len(plain) // 2
        other = plain.clone()
        other[: 2 * pairs] = plain[: 2 * pairs].flip(0)
        own = own_share(plain, other, mixed)[:, None, None, None]
        shares, other_shares = colour_shares(plain), colour_shares(other)
        expected = own * shares[..., :CLASSES] + (1 - own) * other_shares[..., :CLASSES]
        near.append((distance(targets, expected) < 0.1)[pure(shares) & pure(other_shares)])
        shares_seen.append(own.flatten())
    share = torch.cat(near).float().mean().item()
    report(f"mixup by {mode}", agreement=share)
    assert share > LEAST_AGREEMENT
    assert torch.cat(shares_seen).std() > 0.2, "the factors vary"
