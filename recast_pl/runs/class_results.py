"""How well the classes of a task are told apart: what a record keeps of the predictions on the test images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

_CONFUSIONS = 400  # that a record keeps: all of 20 classes


class ClassResults(TypedDict):
    """Counts of test images by class.

    Args:
        names: The classes.
        images: Test images of each class.
        predicted: Test images that were taken for each class.
        right: Test images of each class that were recognised.
        confused: The most frequent confusions, as [index of the class, index of the predicted class, images].
    """

    names: list[str]
    images: list[int]
    predicted: list[int]
    right: list[int]
    confused: list[list[int]]


class ClassMeasures(NamedTuple):
    """Measures of one class in percent; None where there is no such image."""

    name: str
    images: int
    recall: float | None
    precision: float | None
    f1: float | None


def class_results(names: Sequence[str], pairs: NDArray[np.int64]) -> ClassResults:
    """Counts the predictions on the test images of a task.

    Args:
        names: The classes.
        pairs: Index of the class and of the predicted class of each image (N, 2).
    """
    labels, predicted = pairs[:, 0], pairs[:, 1]
    wrong, counts = np.unique(pairs[labels != predicted], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_CONFUSIONS]
    return ClassResults(
        names=list(names),
        images=_counts(labels, len(names)),
        predicted=_counts(predicted, len(names)),
        right=_counts(labels[labels == predicted], len(names)),
        confused=[[*map(int, wrong[index]), int(counts[index])] for index in order],
    )


def balanced_accuracy(results: ClassResults) -> float:
    """The mean over classes of the share of test images that are recognised, in percent; NaN without test images."""
    shares = [right / images for right, images in zip(results["right"], results["images"], strict=True) if images]
    return 100 * sum(shares) / len(shares) if shares else float("nan")


def merge_seeds(results: Sequence[ClassResults]) -> ClassResults:
    """Adds up the results of several runs on one task; those of the first one if their classes differ."""
    first, *others = results
    if any(other["names"] != first["names"] for other in others):
        return first
    confused: Counter[tuple[int, int]] = Counter()
    for result in results:
        for label, predicted, count in result["confused"]:
            confused[label, predicted] += count
    return ClassResults(
        names=first["names"],
        images=[sum(counts) for counts in zip(*(result["images"] for result in results), strict=True)],
        predicted=[sum(counts) for counts in zip(*(result["predicted"] for result in results), strict=True)],
        right=[sum(counts) for counts in zip(*(result["right"] for result in results), strict=True)],
        confused=[[*pair, count] for pair, count in confused.most_common()],
    )


def class_measures(results: ClassResults) -> Iterator[ClassMeasures]:
    """Yields recall (the part of a class that is recognised), precision and F1 of each class."""
    columns = (results["names"], results["images"], results["predicted"], results["right"])
    for name, images, predicted, right in zip(*columns, strict=True):
        f1 = _share(2 * right, images + predicted)
        yield ClassMeasures(name, images, _share(right, images), _share(right, predicted), f1)


def confusion_matrix(results: ClassResults) -> NDArray[np.int64] | None:
    """Images by class (rows) and predicted class (columns); None if some confusions were not kept."""
    matrix = np.diag(np.array(results["right"], dtype=np.int64))
    for label, predicted, count in results["confused"]:
        matrix[label, predicted] = count
    return matrix if matrix.sum() == sum(results["images"]) else None


def _counts(classes: NDArray[np.int64], number: int) -> list[int]:
    return [int(count) for count in np.bincount(classes, minlength=number)]


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
