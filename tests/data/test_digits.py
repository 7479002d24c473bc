import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vip.data.config import DatasetConfig
from vip.data.datasets import check_same_classes, create_split
from vip.data.digits import write_digits
from vip.errors import UserError

load_digits = pytest.importorskip("sklearn.datasets").load_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    assert write_digits(folder) == (1437, 360)
    return folder


def test_every_digit_is_written_once_with_its_label(digits: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    files = sorted(digits.rglob("*.png"), key=lambda file: int(file.stem))
    assert [int(file.stem) for file in files] == list(range(1797))
    assert [int(file.parent.name) for file in files] == labels.tolist()
    for file, pixels in list(zip(files, images, strict=True))[::50]:
        written = np.asarray(Image.open(file))
        assert written.dtype == np.uint8 and written.shape == (8, 8)
        assert np.abs(written.flatten() - pixels * 255 / 16).max() <= 0.5  # 16 is white


def test_split_is_stratified(digits: Path) -> None:
    counts = {split: Counter(f.parent.name for f in (digits / split).rglob("*.png")) for split in ("train", "val")}
    assert sum(counts["train"].values()) == 1437 and sum(counts["val"].values()) == 360
    for digit in map(str, range(10)):
        assert counts["val"][digit] / (counts["val"][digit] + counts["train"][digit]) == pytest.approx(0.2, abs=0.01)


def test_digits_are_a_data_set(digits: Path) -> None:
    train, val = (create_split(DatasetConfig(data=str(digits)), name, False) for name in ("train", "validation"))
    check_same_classes(train, val)
    image, target = val[0]
    assert image.mode == "RGB" and 0 <= target <= 9


def test_writing_twice_leaves_the_first_alone(digits: Path) -> None:
    file = next(digits.rglob("*.png"))
    before = file.stat().st_mtime_ns
    assert write_digits(digits) == (1437, 360)
    assert file.stat().st_mtime_ns == before


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="Cannot write the digits to .*letters"):
        write_digits(tmp_path / "letters")
    assert [path.name for path in tmp_path.rglob("*")] == ["letters", "mine.txt"]


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write the digits to .*file/digits"):
        write_digits(tmp_path / "file" / "digits")


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        write_digits(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()
