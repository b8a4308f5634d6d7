"""Which images a task was trained on, and what has changed since."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.datasets import ImageSource
from recast_pl.data.tasks import SPLITS, normal_text


class SplitImages(TypedDict):
    """The images of a split: how many each class has, and a digest of their names, classes and sizes in bytes.

    `wrong_labels` is how many of them have a wrong label on purpose, by `data.label_noise`.
    """

    classes: dict[str, int]
    digest: str
    wrong_labels: NotRequired[int]


def describe_images(source: ImageSource, splits: Mapping[str, NDArray[np.int64]]) -> dict[str, SplitImages]:
    """The images of each split (indices), for a later comparison, on any machine and wherever the images are."""
    sizes, described = source.images.sizes(), {}
    for split in SPLITS:
        labels = [source.classes[label] for label in source.labels[splits[split]]]
        lines = sorted(
            f"{normal_text(source.names[index])}\0{label}\0{sizes[index]}\n".encode(errors="surrogateescape")
            for index, label in zip(splits[split].tolist(), labels, strict=True)
        )
        counts = Counter(labels)
        digest = hashlib.sha256(b"".join(lines)).hexdigest()[:16]
        described[split] = SplitImages(classes={name: counts[name] for name in source.classes}, digest=digest)
    return described


def find_changes(before: Mapping[str, SplitImages], now: Mapping[str, SplitImages]) -> str:
    """What has changed between two descriptions of images, on one line; an empty string if nothing has."""
    return "; ".join(
        _split_changes(split, before[split], now[split]) for split in SPLITS if before[split] != now[split]
    )


def _split_changes(split: str, before: SplitImages, now: SplitImages) -> str:
    old, new = before["classes"], now["classes"]
    changes = [
        f"{name!r} from {old.get(name, 0):,} to {new.get(name, 0):,}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if not changes:
        return f"as many {split} images as before, but others"
    more = f" and {len(changes) - 5:,} more classes" if len(changes) > 5 else ""
    total = f"from {sum(old.values()):,} to {sum(new.values()):,} {split} images"
    return f"{total} ({', '.join(changes[:5])}{more})"
