"""Damaged and hostile files are read, or refused in one line, in bounded time and memory, and crash nothing."""

import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_runs import EXAMPLES, tally
from fuzzed_bytes import KINDS, MIB, Kind, judge

FEW = 100
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that reads the files of all kinds."""
    folder = tmp_path_factory.mktemp("bytes")
    seed = random.randrange(2**32) if EXAMPLES else 0
    command = [sys.executable, HERE / "fuzzed_bytes.py", str(seed), str(EXAMPLES or FEW), folder]
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    at = (folder / "at").read_text() if (folder / "at").exists() else "the whole files"
    assert done.returncode == 0, f"status {done.returncode} at {at}, in {folder}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_files(outcomes: dict[str, Any], pytestconfig: pytest.Config, kind: str) -> None:
    found = outcomes[kind]
    assert not found["bad"], "\n".join(found["bad"])
    counts = tally(pytestconfig, f"{kind}, {found['memory'] / MIB:.0f} MiB, {found['seconds']:.1f} s")
    counts.update(found["tally"])
    assert counts.total() > (EXAMPLES or FEW)
    assert min(counts["accepted"], counts["refused"]) > counts.total() / 50


def hungry(path: Path) -> None:
    """Takes 64 MiB, mapped anew: what tests before left free is in memory already, and malloc would give that."""
    with mmap.mmap(-1, 64 * MIB) as taken:
        taken[:: mmap.PAGESIZE] = b"x" * (len(taken) // mmap.PAGESIZE)
        assert len(taken) > path.stat().st_size


def careless(path: Path) -> None:
    """Lets an error of a parser out."""
    json.loads(path.read_bytes())


@pytest.mark.parametrize("read, words", [(hungry, "took 6"), (careless, "JSONDecodeError")])
def test_bad_readers_are_found(tmp_path: Path, read: Callable[[Path], None], words: str) -> None:
    (tmp_path / "x").write_bytes(b"no JSON")
    kind = Kind(lambda: [], None, dict, read, memory=32 * MIB)
    assert words in judge(kind, tmp_path / "x")[0]
