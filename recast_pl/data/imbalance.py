"""Imbalance: tasks some of whose classes have few images.

    n_i = n / ρ^(i/(C − 1))                          exponential (Cui et al. 2019)
    n_i = n for i < C/2, and n / ρ for the others    step (Buda et al. 2018)

for the classes i = 0 … C − 1 with n images each, rounded down; ρ is the ratio of the largest class to the smallest. Cao
et al. ("Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019) use both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.datasets import ImageSource
from recast_pl.data.tasks import derive_seed, name_places
from recast_pl.errors import DataError


@dataclass(frozen=True)
class Imbalance:
    """Leaves out training and validation images, so that some classes have few; test images stay.

    Each class is thinned from its own number of images. Which classes become rare depends on their names and the seed;
    with long-tailed CIFAR of the papers it is the order of the classes. Which images stay depends on their names and
    the seed; a larger ratio leaves a part of what a smaller one does.

    Args:
        kind: `exponential`: from class to class, a constant share is left. `step`: half of the classes keep all.
        ratio: How much a class is thinned at most, above 1: the largest class divided by the smallest, if all have the
            same number of images.

    Raises:
        DataError: If the ratio is not above 1.
    """

    kind: Literal["exponential", "step"] = "exponential"
    ratio: float = 10.0

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise DataError(f"data.imbalance.ratio={self.ratio} must be above 1, or leave out data.imbalance")

    def divisors(self, classes: int) -> NDArray[np.float64]:
        """What the number of images is divided by, for each class (C,), from the most to the least frequent."""
        place = np.arange(classes)
        exponents = place / max(1, classes - 1) if self.kind == "exponential" else place >= classes / 2
        return np.power(self.ratio, exponents.astype(np.float64))

    def thinned(
        self, source: ImageSource, splits: Mapping[str, NDArray[np.int64]], seed: int
    ) -> dict[str, NDArray[np.int64]]:
        """The images by split that stay; a class that has validation images keeps at least one.

        Args:
            source: The images.
            splits: Image indices by split.
            seed: Of the task.

        Raises:
            DataError: If a class is left without a training image.
        """
        seed = derive_seed(seed, "imbalance")
        images, order = name_places(source.names, seed), np.argsort(name_places(source.classes, seed), kind="stable")
        kept: dict[str, NDArray[np.int64]] = {"test": splits["test"]}
        for split, least in (("train", 0), ("val", 1)):
            parts = []
            for label, divisor in zip(order.tolist(), self.divisors(len(order)), strict=True):
                members = splits[split][source.labels[splits[split]] == label]
                count = max(least, int(len(members) / divisor))
                if len(members) and not count:
                    raise DataError(
                        f"data.imbalance.ratio={self.ratio:g} leaves no training image of class "
                        f"{source.classes[label]!r} in {source.location!r}, which has {len(members)}; lower the ratio"
                    )
                parts.append(members[np.argsort(images[members], kind="stable")[:count]])
            kept[split] = np.sort(np.concatenate(parts))
        return {split: kept[split] for split in splits}
