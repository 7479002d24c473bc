"""Which sample comes when, and with which random numbers: pure functions of seed, epoch and place.

A stopped run continues at the sample it had reached, without decoding what was seen, and the stream of samples does not
depend on the number of loader processes: every sample is augmented with generators seeded for it alone.
"""

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

Key = tuple[int, int]  # index of a sample, seed of its augmentation

SAMPLE, COLLATION, DEVICE, STEP = range(4)  # what a seed is for


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits, a function of numbers that is the same everywhere and scatters close ones."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, devices: bool = True) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Args:
        seed: The seed.
        devices: Seed torch's generators of all devices; otherwise that of the CPU alone, which takes a hundredth of the
            time.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class EpochOrder(Sampler[Key]):
    """The training samples of one process in one epoch, from any place on.

    Two processes together take the samples in the order in which one would.

    Args:
        dataset: Map-style data set.
        seed: Seed of the order and of the augmentation.
        rank: Index of this process.
        world_size: Number of processes.
        repeats: Views of each image in an epoch, as timm's repeated augmentation has them; 0 for plain epochs.
    """

    def __init__(self, dataset: Any, seed: int, rank: int = 0, world_size: int = 1, repeats: float = 0) -> None:
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats
        self.order: RepeatAugSampler | DistributedSampler  # of all processes together
        if repeats:
            self.order = RepeatAugSampler(dataset, 1, 0, num_repeats=repeats)
        else:
            self.order = DistributedSampler(dataset, 1, 0, shuffle=True, seed=seed)
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and how many samples of all processes together to leave out at its beginning."""
        self.epoch, self.first = epoch, first
        self.order.set_epoch(derive_seed(self.seed, epoch) >> 1 if self.repeats else epoch)

    def __len__(self) -> int:
        # an uneven rest is dropped, as it is in one process, and not filled up with images twice
        return max(0, len(self.order) - self.first) // self.world_size

    def __iter__(self) -> Iterator[Key]:
        order = list(self.order)
        places = range(self.first + self.rank, self.first + len(self) * self.world_size, self.world_size)
        for place in places:
            view = place if self.repeats else 0
            yield order[place], derive_seed(self.seed, self.epoch, SAMPLE, order[place], view)


class SeededDataset(Dataset):
    """A data set that is read by the keys of an `EpochOrder`, a batch at a time.

    Args:
        dataset: Map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """Read a batch; the generators are left seeded for its collation."""
        samples = []
        for index, seed in keys:
            seed_generators(seed, devices=False)
            samples.append(self.dataset[index])
        seed_generators(derive_seed(COLLATION, keys[0][1]), devices=False)
        return samples


class SeededLoader(DataLoader):
    """A loader over an `EpochOrder` that seeds all generators for what happens to a batch on the device."""

    def __iter__(self) -> Any:
        order = self.sampler
        assert isinstance(order, EpochOrder) and self.batch_size is not None
        first = order.first // (self.batch_size * order.world_size)
        for number, batch in enumerate(super().__iter__(), first):
            seed_generators(derive_seed(order.seed, order.epoch, DEVICE, number, order.rank))
            yield batch
