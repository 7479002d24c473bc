"""The stream of training samples is a pure function of seed, epoch and place."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from vip.data.loaders import create_train_loader
from vip.data.order import EpochOrder, derive_seed, seed_generators
from vip.training.config import TrainConfig

CPU = torch.device("cpu")
DATA_CONFIG = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


class Draws(Dataset):
    """Samples that show what the three global generators give, and count how often they are read."""

    transform = None

    def __init__(self, count: int) -> None:
        self.reads = torch.zeros(count, dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.reads[index] += 1
        draws = [random.random(), np.random.rand(), torch.rand(1).item()]
        return (np.array(draws)[:, None, None] * np.ones((3, 8, 8)) * 255).astype(np.uint8), index


def stream(
    data: Draws,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    batch: int = 4,
    epoch: int = 0,
    first: int = 0,
    **options,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = TrainConfig(workers=workers, **{"mixup": 0.0, "cutmix": 0.0, **options})
    loader = create_train_loader(data, config, DATA_CONFIG, batch, None, CPU, rank, world, seed=7)
    loader.sampler.set_epoch(epoch, first)
    torch.rand(random.randint(0, 9))  # whatever was drawn before
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("options", [{"reprob": 0.0}, {"reprob": 0.9, "remode": "pixel"}], ids=["plain", "erasing"])
def test_loader_processes_do_not_matter(options: dict) -> None:
    alone = stream(Draws(23), 0, **options)
    assert len(alone) == 5
    assert same(alone, stream(Draws(23), 1, **options)) and same(alone, stream(Draws(23), 3, **options))
    assert not same(alone, stream(Draws(23), 0, epoch=1, **options))


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 40), st.integers(1, 4), st.integers(1, 3), st.data())
def test_from_any_batch_on_the_stream_is_the_same_and_nothing_is_read_twice(
    count: int, batch: int, world: int, data: st.DataObject
) -> None:
    for rank in range(world):
        whole = stream(Draws(count), rank=rank, world=world, batch=batch, epoch=3, reprob=0.5)
        done = data.draw(st.integers(0, len(whole)))
        images = Draws(count)
        rest = stream(images, rank=rank, world=world, batch=batch, epoch=3, first=done * batch * world, reprob=0.5)
        assert same(whole[done:], rest)
        assert images.reads.sum() == batch * (len(whole) - done) and images.reads.max() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(1, 4), st.integers(0, 5))
def test_processes_share_one_order_and_its_augmentation(count: int, world: int, epoch: int) -> None:
    orders = [EpochOrder(range(count), 7, rank, world) for rank in range(world)]
    alone = EpochOrder(range(count), 7)
    for order in (*orders, alone):
        order.set_epoch(epoch)
    keys = [key for keys in zip(*orders, strict=True) for key in keys]
    assert keys == list(alone)[: len(keys)] and len(keys) == count // world * world
    textbook = DistributedSampler(range(count), 1, 0, shuffle=True, seed=7)
    textbook.set_epoch(epoch)
    assert [index for index, _ in alone] == list(textbook)


def test_views_of_repeated_augmentation_differ() -> None:
    orders = [EpochOrder(range(600), 7, rank, 2, repeats=3) for rank in range(2)]
    keys = [key for order in orders for key in order]
    assert len(set(keys)) == len(keys), "each view is seeded for itself"
    assert max(Counter(index for index, _ in keys).values()) == 3
    orders[0].set_epoch(1)
    assert list(orders[0]) != keys[: len(orders[0])]


def test_seeds_scatter() -> None:
    seeds = [derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(100)]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**63
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.03, "of 10,000 the share of each bit is within 6 standard deviations"
    assert derive_seed(1, 2, 3) == 6520558355739401531, "the same on every machine"


@pytest.mark.parametrize("devices", [True, False])
def test_all_generators_are_seeded(devices: bool) -> None:
    draws = []
    for _ in range(2):
        seed_generators(2**62 + 5, devices)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
