"""Batches of images whose colour is their number, so that what a loader gives tells where it comes from."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_loader
from timm.data.loader import fast_collate
from torch.utils.data import Dataset
from torchvision.datasets import MNIST

from vip.data.augmentation import create_mixup
from vip.data.config import DatasetConfig
from vip.data.datasets import create_split
from vip.data.loaders import CollateReadable, create_eval_loader, create_train_loader
from vip.errors import UserError
from vip.training.config import TrainConfig

CPU = torch.device("cpu")
DATA_CONFIG = dict(
    input_size=(3, 8, 8),
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    crop_pct=1.0,
    crop_mode="center",
)
PLAIN = dict(no_aug=True, mixup=0.0, cutmix=0.0, reprob=0.0, workers=0)


class Numbered(Dataset):
    """Image number i has the colour (i % 256, i // 256, 0) and the label i."""

    transform: Any = None

    def __init__(self, count: int, size: int = 8) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.new("RGB", (self.size, self.size), (i % 256, i // 256, 0))), i


def numbers(images: torch.Tensor) -> list[int]:
    """What is in the images, read from their first pixel."""
    red, green = (images[:, :2, 0, 0] * 255).round().long().T
    return (red + 256 * green).tolist()


def train_batches(
    count: int, batch: int, rank: int = 0, world: int = 1, epoch: int = 0, **options: object
) -> list[list[int]]:
    config = TrainConfig(**{**PLAIN, **options})
    loader = create_train_loader(Numbered(count), config, DATA_CONFIG, batch, None, CPU, rank, world)
    loader.sampler.set_epoch(epoch)
    batches = []
    for images, targets in loader:
        assert numbers(images) == targets.tolist()
        batches.append(targets.tolist())
    assert len(batches) == len(loader)
    return batches


# Order and distribution of training images


def test_two_processes_at_16_see_the_batches_of_one_at_32() -> None:
    for epoch in (0, 3):
        alone = train_batches(101, 32, epoch=epoch)
        assert len(alone) == 3
        together = [train_batches(101, 16, rank, 2, epoch) for rank in (0, 1)]
        for whole, first, second in zip(alone, *together, strict=True):
            assert sorted(whole) == sorted(first + second)
    assert train_batches(101, 32, epoch=0) != train_batches(101, 32, epoch=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(1, 6), st.integers(1, 5))
def test_any_number_of_processes_sees_the_batches_of_one(more: int, batch: int, world: int) -> None:
    count = batch * world + more
    alone = train_batches(count, batch * world)
    together = [train_batches(count, batch, rank, world) for rank in range(world)]
    assert [sorted(b) for b in alone] == [sorted(sum(parts, [])) for parts in zip(*together, strict=True)]
    assert len(alone) == count // (batch * world)
    seen = sum(alone, [])
    assert len(seen) == len(set(seen)), "an epoch visits no image twice"


def test_order_depends_on_the_seed() -> None:
    def order(seed: int) -> list[int]:
        loader = create_train_loader(Numbered(40), TrainConfig(**PLAIN), DATA_CONFIG, 40, None, CPU, seed=seed)
        return next(iter(loader))[1].tolist()

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("count, world, filled", [(10, 1, 10), (11, 1, 10), (11, 2, 4), (3, 1, 2)])
def test_a_data_set_smaller_than_a_batch_is_one_smaller_batch(
    count: int, world: int, filled: int, caplog: pytest.LogCaptureFixture
) -> None:
    (batch,) = train_batches(count, 16, 0, world)
    assert len(set(batch)) == filled
    assert f"less than --batch-size 16: an epoch is one batch of {filled}." in caplog.text


@pytest.mark.parametrize("count, world", [(1, 1), (3, 2)])
def test_too_few_images_for_a_batch(count: int, world: int) -> None:
    with pytest.raises(UserError, match=r"has 1 image\(s\) for each process, expected at least 2"):
        train_batches(count, 16, 0, world)
    assert len(train_batches(count, 1, 0, world)) == 1


@pytest.mark.parametrize("count", [30, 300])
def test_repeated_augmentation_gives_each_process_its_own_view_of_the_same_images(count: int) -> None:
    ranks = [train_batches(count, 5, rank, 3, aug_repeats=3.0) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    seen = sum(ranks[0], [])
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("workers", [1, 2])
def test_views_of_an_image_differ_between_processes(workers: int) -> None:
    options = dict(mixup=0.0, cutmix=0.0, reprob=0.0, aa="none", color_jitter=0.9, aug_repeats=2.0, workers=workers)
    config = TrainConfig(**options)
    views = [
        next(iter(create_train_loader(Numbered(60), config, DATA_CONFIG, 30, None, CPU, rank, 2))) for rank in (0, 1)
    ]
    assert torch.equal(views[0][1], views[1][1])
    alike = torch.isclose(views[0][0], views[1][0]).flatten(1).all(1)
    assert alike.float().mean() < 0.5  # nearly black ones may be


def test_repeated_augmentation_in_one_process() -> None:
    seen = sum(train_batches(30, 6, aug_repeats=2.0), [])
    assert len(seen) == 30 and seen[::2] == seen[1::2] and len(set(seen)) == 15


def test_loader_processes_repeat_with_the_seed() -> None:
    """Augmentation is random between images and the same between runs."""

    def views(seed: int) -> torch.Tensor:
        data = Numbered(12, 16)
        config = TrainConfig(mixup=0.0, cutmix=0.0, reprob=0.0, workers=2, aa="none", color_jitter=0.9)
        loader = create_train_loader(data, config, DATA_CONFIG, 4, None, CPU, seed=seed)
        images, targets = map(torch.cat, zip(*loader, strict=True))
        return images[targets.argsort()]

    assert torch.equal(views(1), views(1))
    assert not torch.equal(views(1), views(2))


# Evaluation


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_evaluation_visits_each_image_exactly_once(count: int, batch: int, world: int, prefetcher: bool) -> None:
    config = TrainConfig(**PLAIN, no_prefetcher=not prefetcher)
    seen: list[int] = []
    for rank in range(world):
        mine: list[int] = []
        for images, targets in create_eval_loader(Numbered(count), config, DATA_CONFIG, batch, CPU, rank, world):
            assert numbers(images) == targets.tolist() and len(images) <= batch
            mine += targets.tolist()
        assert mine == sorted(mine)
        seen += mine
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("batch", [0, -1])
def test_no_validation_batch(batch: int) -> None:
    with pytest.raises(UserError, match="validation batch size"):
        create_eval_loader(Numbered(3), TrainConfig(**PLAIN), DATA_CONFIG, batch, CPU)


def test_negative_number_of_loader_processes() -> None:
    with pytest.raises(UserError, match="--workers is -1"):
        create_eval_loader(Numbered(3), TrainConfig(**{**PLAIN, "workers": -1}), DATA_CONFIG, 1, CPU)


@pytest.mark.parametrize("no_prefetcher", [False, True])
def test_evaluation_batches_are_normalized(image_folder: Path, no_prefetcher: bool) -> None:
    """Against numpy: both the prefetcher and the loader processes subtract the mean and divide by the deviation."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    config = TrainConfig(data=str(image_folder), **PLAIN, no_prefetcher=no_prefetcher)
    data_config = {**DATA_CONFIG, "input_size": (3, 32, 32), "mean": mean, "std": std}
    data = create_split(config, "validation", False)
    ((images, _),) = create_eval_loader(data, config, data_config, 15, CPU)
    for i, image in enumerate(images):
        pixels = np.asarray(Image.open(image_folder / "val" / data.filename(i)), np.float64) / 255
        expected = ((pixels - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)


def test_evaluation_crop_is_the_centre() -> None:
    """A frame of white around a black centre: at 50 % of the size only the centre is left."""

    class Framed(Numbered):
        def __getitem__(self, i: int) -> tuple[Any, int]:
            image = Image.new("RGB", (64, 48), "white")
            image.paste("black", (16, 8, 48, 40))
            return self.transform(image), i

    config = {**DATA_CONFIG, "crop_pct": 0.5}
    ((images, _),) = create_eval_loader(Framed(1), TrainConfig(**PLAIN), config, 1, CPU)
    assert images.shape == (1, 3, 8, 8) and images.max() == 0


def test_batches_of_unreadable_images_have_no_rows(tmp_path: Path) -> None:
    for i in range(5):
        path = tmp_path / "val" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    for i in (1, 2, 3):
        (tmp_path / "val" / "a" / f"{i}.png").write_bytes(b"")
    for no_prefetcher in (False, True):
        config = TrainConfig(data=str(tmp_path), **PLAIN, no_prefetcher=no_prefetcher)
        data = create_split(config, "validation", False)
        batches = list(create_eval_loader(data, config, DATA_CONFIG, 2, CPU))
        assert [tuple(images.shape) for images, _ in batches] == [(1, 3, 8, 8), (0, 3, 8, 8), (1, 3, 8, 8)]
        assert [len(targets) for _, targets in batches] == [1, 0, 1]
        assert [numbers(images) for images, _ in batches] == [[0], [], [4]]


def test_collate_leaves_out_what_is_none() -> None:
    collate = CollateReadable(fast_collate, (3, 2, 2))
    images = [np.full((3, 2, 2), i, np.uint8) for i in range(3)]
    batch, targets = collate([(images[0], 0), None, (images[2], 2)])
    assert batch.dtype == torch.uint8 and batch[:, 0, 0, 0].tolist() == targets.tolist() == [0, 2]
    batch, targets = collate([None, None])
    assert batch.shape == (0, 3, 2, 2) and targets.shape == (0,)


# Mixing and splits


def mixed_batches(workers: int = 0, **options: object) -> tuple[Any, Iterable[tuple[torch.Tensor, torch.Tensor]]]:
    options = {**PLAIN, "mixup": 1.0, "workers": workers, **options}
    config = TrainConfig(**options)
    mixup = create_mixup(config, 16, smoothing=0.0, collate=not config.no_prefetcher)
    return mixup, create_train_loader(Numbered(16), config, DATA_CONFIG, 8, mixup, CPU)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_mixes_images_and_targets_alike(mode: str) -> None:
    """The colour is the number, so a mixed image's colour is the mean of its target."""
    _, loader = mixed_batches(mixup_mode=mode)
    for images, targets in loader:
        assert targets.shape == (8, 16)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        mean = (targets * torch.arange(16)).sum(1)
        assert ((images[:, 0, 0, 0] * 255 - mean).abs() <= 0.51).all()  # mixed images are whole numbers again
        assert (targets > 0).sum(1).max() == 2
        shares = [tuple(round(s, 4) for s in sorted(target.tolist())[-2:]) for target in targets]
        assert len(set(shares)) == 1 if mode == "batch" else len(set(shares)) > 2
        assert (shares == shares[::-1]) == (mode != "elem")


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_mixup_or_cutmix(switch_prob: float) -> None:
    """Mixup leaves one colour in an image, CutMix two of whole numbers."""
    _, loader = mixed_batches(cutmix=1.0, mixup_switch_prob=switch_prob, mixup_mode="elem")
    images = torch.cat([images for images, _ in loader])
    colours = {len(image.unique()) for image in images[:, 0]}
    assert colours == {1} if switch_prob == 0 else 2 in colours


def test_cutmix_share_of_the_area_is_the_target() -> None:
    _, loader = mixed_batches(mixup=0.0, cutmix=1.0)
    for images, targets in loader:
        pixels = (images[:, 0] * 255).round().long()
        for image, target in zip(pixels, targets, strict=True):
            share = torch.bincount(image.flatten(), minlength=16) / image.numel()
            torch.testing.assert_close(share, target)


def test_mixup_needs_an_even_batch() -> None:
    config = TrainConfig(**{**PLAIN, "mixup": 1.0})
    mixup = create_mixup(config, 16, 0.0, collate=True)
    with pytest.raises(AssertionError, match="even"):
        next(iter(create_train_loader(Numbered(9), config, DATA_CONFIG, 9, mixup, CPU)))


@pytest.mark.parametrize("workers", [0, 1])
def test_mixup_can_be_switched_off_between_epochs(workers: int) -> None:
    mixup, loader = mixed_batches(workers)
    assert any((targets > 0).sum(1).max() == 2 for _, targets in loader)
    mixup.mixup_enabled = False
    for images, targets in loader:
        assert (targets > 0).sum(1).max() == 1 and numbers(images) == targets.argmax(1).tolist()
    mixup.mixup_enabled = True
    assert any((targets > 0).sum(1).max() == 2 for _, targets in loader)


def test_no_mixup_without_mixup() -> None:
    assert create_mixup(TrainConfig(**PLAIN), 16, 0.1, collate=True) is None


SPLITS = dict(aug_splits=3, aa="augmix-m9-w3", scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, color_jitter=0.0)


def test_augmix_splits_follow_each_other() -> None:
    """The first split of a batch is clean, the others are views of the same images in the same order."""
    config = TrainConfig(**{**PLAIN, "no_aug": False, **SPLITS, "train_interpolation": "nearest"})
    torch.manual_seed(0)
    ((images, targets),) = create_train_loader(Numbered(24), config, DATA_CONFIG, 24, None, CPU)
    clean, second, third = images.chunk(3)
    assert numbers(clean) == targets[:24].tolist()
    assert targets[:24].tolist() == targets[24:48].tolist() == targets[48:].tolist()
    assert not torch.equal(clean, second) and not torch.equal(second, third)


@pytest.mark.parametrize("option", ["no_prefetcher", "no_aug"])
def test_augmix_refuses_what_it_cannot_work_with(option: str) -> None:
    config = TrainConfig(**{**PLAIN, "no_aug": False, **SPLITS, option: True})
    with pytest.raises(UserError, match=f"--aug-splits.*--{option.replace('_', '-')}"):
        create_train_loader(Numbered(24), config, DATA_CONFIG, 24, None, CPU)


def test_augmix_of_gray_torchvision_images() -> None:
    class Digits(MNIST):
        def __init__(self) -> None:
            self.transform = self.target_transform = None
            self.data = torch.arange(24, dtype=torch.uint8)[:, None, None].expand(24, 8, 8)
            self.targets = torch.arange(24)

    config = TrainConfig(**{**PLAIN, "no_aug": False, **SPLITS})
    ((images, targets),) = create_train_loader(Digits(), config, DATA_CONFIG, 24, None, CPU)
    assert images.shape == (72, 3, 8, 8)
    np.testing.assert_allclose(images[:24, :, 0, 0] * 255, targets[:24, None].repeat(1, 3), atol=1e-3)


@pytest.mark.parametrize("resplit", [False, True])
def test_random_erasing_can_spare_the_first_split(resplit: bool) -> None:
    options = {**PLAIN, "no_aug": False, **SPLITS, "reprob": 1.0, "remode": "const", "resplit": resplit}
    torch.manual_seed(0)
    ((images, targets),) = create_train_loader(Numbered(24), TrainConfig(**options), DATA_CONFIG, 24, None, CPU)
    red = (images[:24, 0] * 255).round().flatten(1)
    assert bool((red == targets[:24, None]).all()) == resplit


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("fast", [False, True])
def test_random_erasing_is_that_of_timm(fast: bool, mode: str) -> None:
    """The same places of the same images are erased on the device, with the same numbers."""
    config = TrainConfig(**{**PLAIN, "no_aug": False, "reprob": 0.5, "remode": mode, "fast_images": fast})
    data, shared = Numbered(2), {name: DATA_CONFIG[name] for name in ("input_size", "mean", "std", "interpolation")}
    own: Any = create_train_loader(data, config, DATA_CONFIG, 2, None, CPU)
    theirs: Any = create_loader(
        data, batch_size=2, is_training=True, re_prob=0.5, re_mode=mode, num_workers=0, device=CPU, **shared
    )
    erased = []
    for loader in (own, theirs):
        random.seed(0)
        torch.manual_seed(0)
        erased.append(loader.random_erasing(torch.ones(64, 3, 16, 16)))
    torch.testing.assert_close(*erased, rtol=0, atol=0)
    untouched = (erased[0] == 1).flatten(1).all(1).sum()
    assert 16 < untouched < 48 and type(own) is type(theirs)


def test_one_channel(tmp_path: Path) -> None:
    path = tmp_path / "val" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (200, 100, 50)).save(path)
    config = DatasetConfig(data=str(tmp_path))
    data = create_split(config, "validation", False, in_chans=1)
    one_channel = {**DATA_CONFIG, "input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    ((images, _),) = create_eval_loader(data, TrainConfig(**PLAIN), one_channel, 1, CPU)
    luma = (299 * 200 + 587 * 100 + 114 * 50) / 1000  # ITU-R 601
    assert images.shape == (1, 1, 8, 8) and abs(images[0, 0, 0, 0] * 255 - luma) <= 1
