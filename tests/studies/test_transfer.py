"""The study of transfer, on images of a few colours."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studies import transfer
from vip.errors import UserError


def write_images(root: Path, train: int, val: int, names: tuple[str, ...]) -> Path:
    """Noise, so many images of each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_links(tmp_path: Path) -> None:
    """So many random images to train on, each once, and all of those to test on."""
    write_images(tmp_path / "data", 9, 30, ("cat", "dog", "emu"))

    def files(folder: Path) -> set[Path]:
        return {path.resolve() for path in folder.rglob("*.*") if path.is_file()}

    chosen = []
    for seed in (1, 2):
        folder = tmp_path / f"linked{seed}"
        for _ in range(2):  # the second time finds them there
            transfer.link_images(tmp_path / "data", folder, ["cat", "emu"], 4, seed)
        assert {path.name for path in (folder / "train").iterdir()} == {"cat", "emu"}
        assert len(files(folder / "train")) == 8 and files(folder / "train") < files(tmp_path / "data/train")
        assert len(files(folder / "val")) == 40
        assert files(folder / "test") == files(tmp_path / "data/val/cat") | files(tmp_path / "data/val/emu")
        chosen.append(files(folder / "train"))
    assert chosen[0] != chosen[1]


def test_table() -> None:
    rows = [
        {"images_a_class": n, "way": way, "top1": top1}
        for way, n, top1 in (("a", 5, 10.0), ("a", 5, 20.0), ("b", 5, 7.0), ("a", 50, 30.0), ("b", 50, 1.0))
    ]
    lines = transfer.table(rows, ("b", "a")).splitlines()
    assert lines[0] == "| | 5 images a class | 50 images a class |"
    assert lines[2:] == ["| b | 7.00 | 1.00 |", "| a | 15.00 ± 7.07 | 30.00 |"]


@pytest.mark.parametrize(
    "argv, words",
    [((), "nowhere/train (No such"), (("--images", 0), "'0', expected"), (("--epochs", "x"), "'x', expected")],
)
def test_mistakes(tmp_path: Path, argv: tuple, words: str) -> None:
    with pytest.raises(UserError) as caught:
        transfer.main([str(a) for a in (tmp_path / "nowhere", *argv)])
    assert words in str(caught.value)


def test_other_classes_in_val(tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "val/ant"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="expected the same in both"):
        transfer.main([str(tmp_path)])
    with pytest.raises(UserError, match="val .No such"):
        (tmp_path / "val").rename(tmp_path / "test")
        transfer.main([str(tmp_path)])


@pytest.mark.slow
def test_whole_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any) -> None:
    """Each way once, and nothing twice."""
    caplog.set_level("INFO")
    write_images(tmp_path / "data", 4, 3, ("ant", "bee", "cow", "dog"))
    flags = ["--output", tmp_path / "out", "--images", 2, "--seeds", 1, "--epochs", 1, "--pretrain-epochs", 1]
    argv = [str(a) for a in (tmp_path / "data", *flags, "--workers", 0)]
    transfer.main(argv)
    out = capsys.readouterr()
    assert [line.split(" | ")[0].strip("| ") for line in out.out.splitlines() if "." in line[-6:]][1:] == [
        *transfer.TUNED,
        *transfer.TAUGHT,
    ]
    assert (
        caplog.text.count("made anew: head.weight (other classes there)") == len(transfer.TUNED) - 2
    )  # all but scratch
    with open(tmp_path / "out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["count"]) for row in rows] == [("1", "6")] * 8
    transfer.main(argv)
    again = capsys.readouterr()
    assert again.out == out.out and "Epoch" not in again.err
    monkeypatch.setattr(transfer.vip.cli, "main", lambda argv: 2)
    with pytest.raises(SystemExit):
        transfer.main([*argv, "--seeds", "2"])
