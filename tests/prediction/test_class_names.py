"""What classes are called, and which one a name means."""

import pytest
from timm.data import ImageNetInfo

from vip.errors import UserError
from vip.prediction.classes import class_names, find_class


def test_imagenet() -> None:
    names = class_names(1000)
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca" and names[281] == "tabby, tabby cat" and names[999].startswith("toilet")
    assert len(class_names(21841)) == 21841 and len(class_names(11821)) == 11821


def test_folders_of_imagenet_are_written_out() -> None:
    synsets = ImageNetInfo().label_names()
    assert class_names(1000, {synset: i for i, synset in enumerate(synsets)}) == class_names(1000)
    assert class_names(2, {"n02123045": 1, "n01440764": 0}) == ["tench, Tinca tinca", "tabby, tabby cat"]
    assert class_names(2, {"n99999999": 1, "n01440764": 0}) == ["n01440764", "n99999999"]


def test_folders() -> None:
    assert class_names(3, {"red": 2, "blue": 0, "green": 1}) == ["blue", "green", "red"]
    assert class_names(3, {"red": 2, "blue": 0}) == ["blue", "class 1", "red"]
    assert class_names(1000, {"cat": 0})[:2] == ["cat", "class 1"]


def test_no_names() -> None:
    assert class_names(3) == class_names(3, {}) == ["class 0", "class 1", "class 2"]


def test_find_class() -> None:
    names = ["one", "0", "tench, Tinca tinca", "crane", "crane"]
    for wanted, index in (("one", 0), ("0", 1), ("Tinca tinca", 2), ("tench, Tinca tinca", 2), ("4", 4)):
        assert find_class(wanted, names) == index
    for wanted, words in (
        ("crane", "names the classes 3, 4"),
        ("5", "No class is called '5'"),
        ("-1", "No class is called"),
        ("ones", "Did you mean one"),
        ("", "No class is called"),
    ):
        with pytest.raises(UserError, match=words):
            find_class(wanted, names)
