"""Files that are whole or not there, and files that cannot do harm."""

import argparse
import errno
import logging
import mmap
import os
import pickle
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from vip.errors import UserError

_logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file takes the place of `path` once it is complete and on disk.

    Raises:
        OSError: If it cannot be written; what was at `path` is untouched then.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "notes.txt") as path:
        ...     _ = path.write_text("whole")
        ...     (folder / "notes.txt").exists()
        False
        >>> (folder / "notes.txt").read_text()
        'whole'
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, patience: float = 0) -> Iterator[None]:
    """Keep other processes out of a folder.

    Args:
        folder: The folder.
        patience: Seconds to wait for another process to leave it.

    Raises:
        UserError: If another process is in it.
        OSError: If it cannot be written to.
    """
    with open(folder / ".lock", "ab") as lock:
        if sys.platform != "win32":  # which has no such locks
            _wait_for(lock, folder, time.monotonic() + patience)
        yield


def _wait_for(lock: IO[bytes], folder: Path, deadline: float) -> None:
    import fcntl

    while True:
        try:
            return fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by other processes
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return _logger.warning(f"{folder} cannot be locked ({e.strerror}): start no second process in it.")
        if time.monotonic() > deadline:
            raise UserError(f"Another process works in {folder}: wait for it, stop it, or choose another folder.")
        time.sleep(0.5)


def save(content: Any, path: str | Path) -> None:
    """What `torch.save` writes, whole or not there.

    Raises:
        OSError: If it cannot be written; what was at `path` is untouched then.
    """
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as e:  # torch's own, about positions in the file, hides the file system's
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


class UnreadableFile(Exception):
    """A file that cannot be read; the message is the reason.

    Attributes:
        code: What reading it would run, empty where it is only damaged.
    """

    def __init__(self, reason: str, code: list[str]) -> None:
        super().__init__(reason)
        self.code = code


def check_records(path: str | Path) -> bool:
    """Check what `torch.save` wrote against the CRC-32 that it gave to each record, which `torch.load` leaves unread.

    Takes no longer, and no more memory, than reading the file does, whatever the file claims to hold.

    Returns:
        Whether there was a checksum: torch before 1.6, and where it is told to, writes none.

    Raises:
        UnreadableFile: If a record or the list of them is damaged.
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch too tells its archives from its older files
            return False
        name = "the list of its records"
        try:
            with zipfile.ZipFile(file) as archive:
                records = _stored_records(archive, os.path.getsize(path))
                if not any(record.CRC for record in records):
                    return False
                for record in records:
                    name = f"the record {record.filename[:100]!r}"
                    with archive.open(record) as content:
                        while content.read(2**20):
                            pass
        except (UnreadableFile, OSError):
            raise
        except Exception as e:  # zipfile's many and undocumented kinds for damaged archives
            raise UnreadableFile(f"{name} is not what was written", []) from e
        return True


def _stored_records(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """The records of an archive of torch, which together are no larger than the file is."""
    records = archive.infolist()
    if any(record.compress_type or record.compress_size != record.file_size for record in records):
        raise UnreadableFile("it holds compressed records, and torch writes none", [])
    if any(record.is_dir() or record.external_attr & 0x10 for record in records):
        raise UnreadableFile("a record is marked as a folder, of which torch reads nothing", [])
    if sum(record.file_size for record in records) > size:
        raise UnreadableFile("its records overlap", [])
    return records


def _refuse_bombs(path: str | Path) -> None:
    """Refuse a file that `torch.load` would unpack to more than it is."""
    with open(path, "rb") as file:
        if not (size := os.path.getsize(path)):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\nbytearray\n") >= 0:  # the one thing that torch allows and that takes what it is told
                raise UnreadableFile("it holds a bytearray, which may be of any size", [])
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                _stored_records(archive, size)


def load_without_code(path: str | Path) -> Any:
    """Read what `torch.save` wrote, onto the CPU, without running code that the file may hold.

    Takes no more memory than is in proportion to the file, whatever it claims to hold.

    Raises:
        UnreadableFile: If it is damaged, or would run code.
        FileNotFoundError: If there is no such file.
    """
    try:
        _refuse_bombs(path)
        # timm's checkpoints hold their args as a namespace; torch's warnings advise to allow more
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, UnreadableFile):
        raise
    except Exception as e:  # bytes that torch has not written make its readers raise nearly anything
        code = sorted(set(re.findall(r"(?:GLOBAL |(?:class|function) (?=\w+\.))([\w.]*\w)", str(e))))
        if isinstance(e, pickle.UnpicklingError) and code:
            raise UnreadableFile(f"loading it would run code ({', '.join(code)})", code) from e
        # torch's own text would advise to allow code
        raise UnreadableFile("it is empty" if Path(path).stat().st_size == 0 else type(e).__name__, []) from e
