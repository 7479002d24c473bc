"""Accuracy of classes, confusions and calibration, against loops over the images."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from vip.errors import UserError
from vip.reporting.analysis import BINS, accuracy_of_classes, calibration, most_confused, topk_percent
from vip.reporting.predictions import Predictions


def random_predictions(images: int = 500, classes: int = 12, seed: int = 0) -> Predictions:
    """Class 1 has no images; every other image is recognized."""
    rng = np.random.default_rng(seed)
    target = rng.choice([c for c in range(classes) if c != 1], images)
    top = rng.permuted(np.tile(np.arange(classes), (images, 1)), axis=1)[:, :5]
    for i in range(0, images, 2):
        j = int(np.argmax(top[i] == target[i]))
        top[i, 0], top[i, j] = target[i], top[i, 0]
    probability = np.sort(rng.dirichlet([0.3] * 8, images).astype(np.float32), 1)[:, ::-1][:, :5]
    return Predictions(target, top, probability, [f"class {i}" for i in range(classes)], "model", "checkpoint")


def test_accuracy_of_classes() -> None:
    p = random_predictions()
    found = accuracy_of_classes(p)
    assert [each.percent for each in found] == sorted(each.percent for each in found)
    assert {each.name for each in found} == set(p.classes) - {"class 1"} and sum(each.images for each in found) == 500
    for each in found:
        own = [i for i in range(500) if p.classes[p.target[i]] == each.name]
        right = [i for i in own if p.top[i][0] == p.target[i]]
        assert (each.images, each.correct) == (len(own), len(right)) and 0 < len(right) < len(own)
        assert each.percent == pytest.approx(100 * len(right) / len(own))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk(k: int) -> None:
    p = random_predictions()
    assert topk_percent(p, k) == pytest.approx(
        100 * sum(t in row[:k] for t, row in zip(p.target, p.top, strict=True)) / 500
    )


def test_most_confused() -> None:
    p = random_predictions()
    pairs = Counter((int(t), int(row[0])) for t, row in zip(p.target, p.top, strict=True) if t != row[0])
    expected = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    found = most_confused(p, 20)
    assert [((each.target, each.predicted), each.count) for each in found] == [
        ((f"class {true}", f"class {predicted}"), count) for (true, predicted), count in expected[:20]
    ]
    for each, ((true, _), count) in zip(found, expected, strict=False):
        assert each.percent == pytest.approx(100 * count / int((p.target == true).sum()))
    assert len(most_confused(p, 10**6)) == len(pairs)


def test_nothing_is_confused() -> None:
    p = random_predictions()
    right = Predictions(p.target, p.target[:, None], p.probability[:, :1], p.classes, "", "")
    assert most_confused(right, 10) == [] and all(each.percent == 100 for each in accuracy_of_classes(right))


@pytest.mark.parametrize("images", [1, 7, 500])
def test_calibration(images: int) -> None:
    """Against the definition of Guo et al., image by image: bin m holds the confidences in ((m - 1) / M, m / M]."""
    p = random_predictions(images)
    found = calibration(p)
    error = 0.0
    for m in range(1, BINS + 1):
        inside = [i for i in range(images) if Fraction(m - 1, BINS) < float(p.probability[i, 0]) <= Fraction(m, BINS)]
        assert found.count[m - 1] == len(inside)
        if not inside:
            assert np.isnan(found.accuracy[m - 1]) and np.isnan(found.confidence[m - 1])
            continue
        accuracy = sum(p.top[i, 0] == p.target[i] for i in inside) / len(inside)
        confidence = sum(float(p.probability[i, 0]) for i in inside) / len(inside)
        assert found.accuracy[m - 1] == pytest.approx(accuracy)
        assert found.confidence[m - 1] == pytest.approx(confidence)
        error += len(inside) / images * abs(accuracy - confidence)
    assert found.error == pytest.approx(error) and error > 0


def test_edges_of_bins() -> None:
    """An upper edge is within its bin, 0 in the first; a softmax that rounds to above 1 is in the last."""
    values = np.array([[0.0], [0.2], [np.nextafter(0.2, 1)], [1.0], [1 + 1e-7]])
    p = Predictions(np.zeros(5, int), np.zeros((5, 1), int), values, ["only"], "", "")
    assert np.flatnonzero(np.bincount(np.repeat(np.arange(BINS), calibration(p).count))).tolist() == [0, 2, 3, 14]


def test_a_model_that_knows_how_sure_it_is() -> None:
    top = np.array([0] * 80 + [1] * 20)[:, None]
    p = Predictions(np.zeros(100, int), top, np.full((100, 1), 0.8), ["a", "b"], "", "")
    assert calibration(p).error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.1, np.inf])
def test_what_is_no_probability(value: float) -> None:
    p = random_predictions(3)
    p.probability[1, 0] = value
    with pytest.raises(UserError, match="not within 0 and 1"):
        calibration(p)
