"""What the predictions of a validation say: accuracy of each class, classes taken for others, calibration."""

from dataclasses import dataclass

import numpy as np

from vip.errors import UserError
from vip.reporting.predictions import Predictions

BINS = 15  # as in Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599


@dataclass(frozen=True)
class ClassAccuracy:
    """How many images of a class there were, and how many of them were recognized."""

    name: str
    images: int
    correct: int

    @property
    def percent(self) -> float:
        """Its accuracy in percent."""
        return 100 * self.correct / self.images


@dataclass(frozen=True)
class Confusion:
    """How many images of a class were taken for another, and which share of the class that is, in percent."""

    target: str
    predicted: str
    count: int
    percent: float


@dataclass(frozen=True)
class Calibration:
    """How often a model is right when it says that it is sure by so much, in bins of equal width.

    Attributes:
        count: `[BINS]`, images in each.
        confidence: `[BINS]`, mean probability of the class found likeliest; NaN where there is no image.
        accuracy: `[BINS]`, share of the images for which that class is the true one; NaN where there is no image.
        error: Expected calibration error: the mean difference of the two over all images.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def topk_percent(predictions: Predictions, k: int) -> float:
    """Share of the images of which the true class is among the `k` likeliest, in percent."""
    return 100 * float((predictions.top[:, :k] == predictions.target[:, None]).any(1).mean())


def accuracy_of_classes(predictions: Predictions) -> list[ClassAccuracy]:
    """Accuracy of each class that has images, the lowest first, of equals in the order of the classes."""
    target, count = predictions.target, len(predictions.classes)
    images = np.bincount(target, minlength=count)
    correct = np.bincount(target[predictions.top[:, 0] == target], minlength=count)
    found = [
        ClassAccuracy(name, n, right)
        for name, n, right in zip(predictions.classes, images.tolist(), correct.tolist(), strict=True)
        if n
    ]
    return sorted(found, key=lambda each: each.percent)


def most_confused(predictions: Predictions, most: int) -> list[Confusion]:
    """Pairs of a class and another that its images are taken for, up to `most`, the most frequent first."""
    target, top, names = predictions.target, predictions.top[:, 0], predictions.classes
    wrong = top != target
    pairs, counts = np.unique(np.stack([target[wrong], top[wrong]], 1), axis=0, return_counts=True)
    images = np.bincount(target)
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        Confusion(names[true], names[predicted], int(count), 100 * int(count) / int(images[true]))
        for (true, predicted), count in zip(pairs[order], counts[order], strict=True)
    ]


def calibration(predictions: Predictions) -> Calibration:
    """Calibration of the class found likeliest, in `BINS` bins of equal width, each with its upper edge.

    Raises:
        UserError: If the probabilities are none.
    """
    probability = predictions.probability[:, 0].astype(np.float64)
    if not ((0 <= probability) & (probability <= 1 + 1e-6)).all():  # a softmax in float32 may round to above 1
        raise UserError(
            f"The predictions of {predictions.checkpoint} hold probabilities that are not within 0 and 1; write them "
            "anew by vip validate --predictions."
        )
    right = predictions.top[:, 0] == predictions.target
    bins = np.digitize(probability, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, values, minlength=BINS) for values in (probability, right)]
    confidence, accuracy = (np.divide(s, count, out=np.full(BINS, np.nan), where=count > 0) for s in sums)
    return Calibration(count, confidence, accuracy, float(np.abs(sums[1] - sums[0]).sum() / len(right)))
