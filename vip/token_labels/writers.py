"""Writers of label maps as they are made: resumable, in one process or many."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Protocol

from vip.errors import UserError
from vip.token_labels.maps import FolderMaps, LabelMap, write_map
from vip.token_labels.packing import SHARD_MAPS, PackedMaps, shard_path, shards_in, write_shard

_logger = logging.getLogger(__name__)

Labelled = tuple[int, str, LabelMap]  # index of an image, key and content of its map


class Writer(Protocol):
    """Where label maps go."""

    pending: list[int]  # indices of this process's images that have no map yet
    there: int  # number of maps that were there

    def write(self, labelled: Iterator[Labelled]) -> None:
        """Write maps, which come in the order of `pending`."""


class FolderWriter:
    """Writes the published layout.

    Args:
        root: Where to.
        keys: Of all images, in order.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, root: Path, keys: Sequence[str], rank: int, world_size: int) -> None:
        self.root = root
        done = set(FolderMaps(root).keys()) if root.is_dir() else set()
        pending = [i for i, key in enumerate(keys) if key not in done]
        self.pending, self.there = pending[rank::world_size], len(keys) - len(pending)

    def write(self, labelled: Iterator[Labelled]) -> None:
        """See `Writer`."""
        with ThreadPoolExecutor(8, "label-maps") as pool:  # a file has to be on disk before it is renamed: much waiting
            writes: list[Future] = []
            for _, key, label_map in labelled:
                writes.append(pool.submit(write_map, self.root / f"{key}.pt", label_map))
                if len(writes) >= 512:
                    self._finish(writes)
            self._finish(writes)

    def _finish(self, writes: list[Future]) -> None:
        try:
            for write in writes:
                write.result()
        except OSError as e:
            raise _cannot_write(self.root, e) from e
        writes.clear()


def _cannot_write(root: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write label maps to {root} ({error.strerror}); once it can be, repeat the command.")


class PackedWriter:
    """Writes shards of images that follow one another, so that any number of processes can go on where others were.

    Arguments as of `FolderWriter`.

    Raises:
        UserError: If there are maps of other images.
    """

    def __init__(self, root: Path, keys: Sequence[str], rank: int, world_size: int) -> None:
        self.root = root
        shards = [range(i, min(i + SHARD_MAPS, len(keys))) for i in range(0, len(keys), SHARD_MAPS)]
        there = [n for n in range(len(shards)) if shard_path(root, n).exists()]
        done = set(PackedMaps(root).keys()) if shards_in(root) else set()
        expected = {keys[i] for n in there for i in shards[n]}
        if done - expected:
            raise UserError(
                f"{root} holds packed maps of other images, or in another order, such as {min(done - expected)}: name "
                "another folder."
            )
        if (missing := sorted(expected - done)) and rank == 0:
            _logger.warning(
                f"{len(missing)} images have no map in the shards that are there, as they could not be read or were "
                f"added since: {', '.join(missing[:5])}. A shard that is removed is made again."
            )
        pending = [n for n in range(len(shards)) if n not in there][rank::world_size]
        self.pending, self.there = [i for n in pending for i in shards[n]], len(done)

    def write(self, labelled: Iterator[Labelled]) -> None:
        """See `Writer`."""
        for number, maps in groupby(labelled, lambda item: item[0] // SHARD_MAPS):
            try:
                write_shard(shard_path(self.root, number), [(key, label_map) for _, key, label_map in maps])
            except OSError as e:
                raise _cannot_write(self.root, e) from e
