"""Label noise: training and validation images with wrong labels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.datasets import ImageSource
from recast_pl.data.tasks import derive_seed, name_places
from recast_pl.errors import DataError


@dataclass(frozen=True)
class LabelNoise:
    """Gives training and validation images wrong labels; test labels stay right.

    Validation images have wrong labels, too, because nobody whose labels are noisy has clean ones to validate with.
    Which images have a wrong label, and which one, depends on their names and the seed. A higher rate keeps the wrong
    labels of a lower one.

    Args:
        rate: The probability that a label is wrong, above 0 and below 1.
        kind: `symmetric`: every other class is equally likely. `pair`: the label is that of the next class (pair
            flipping; Han et al., "Co-teaching", NeurIPS 2018).

    Raises:
        DataError: If the rate is out of range.
    """

    rate: float
    kind: Literal["symmetric", "pair"] = "symmetric"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise DataError(
                f"data.label_noise.rate={self.rate} must be above 0 and below 1, or leave out data.label_noise"
            )

    def applied(self, source: ImageSource, splits: Mapping[str, NDArray[np.int64]], seed: int) -> ImageSource:
        """The images with the labels that they are trained and validated with.

        Args:
            source: The images.
            splits: Image indices by split.
            seed: Of the task.

        Raises:
            DataError: If no training image is labelled as one of the classes.
        """
        seed, classes = derive_seed(seed, "label noise"), len(source.classes)
        wrong = name_places(source.names, seed) < self.rate
        wrong[splits["test"]] = False
        others = classes - 1 if self.kind == "symmetric" else 1
        steps = 1 + (others * name_places(source.names, derive_seed(seed, "class"))).astype(np.int64)
        labels = np.where(wrong, (source.labels + steps) % classes, source.labels)
        lost = np.setdiff1d(source.labels[splits["train"]], labels[splits["train"]])
        if len(lost):
            raise DataError(
                f"data.label_noise.rate={self.rate:g} leaves no training image with the label "
                f"{source.classes[lost[0]]!r} in {source.location!r}; use a lower rate or more images"
            )
        return replace(source, labels=labels)
