"""A task as a user names it, and how its images are split."""

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from recast_pl.errors import DataError

SPLITS = ("train", "val", "test")

SplitPolicy = Literal["official", "ratio"]

_HELD_OUT = 0.15  # of each class, for validation and again for test: the paper's ratio, made to add up


@dataclass(frozen=True)
class TaskConfig:
    """One task of the stream.

    Args:
        name: Its name; without `dataset` and `path`, that of a data set of `recast_pl data list` too.
        path: A folder of `CLASS/IMAGE` or of `train|val|test/CLASS/IMAGE`, or a `.csv` or `.parquet` file with
            columns path, label and perhaps split. With `dataset`, where that data set lies. None for a data set
            known by name, below the datamodule's root.
        dataset: A data set of `recast_pl data list`, or `torchvision/CLASS`; None for that of the task's name, or
            for the images in `path`.
        args: Further arguments of the data set's torchvision class, such as `{annotation_level: family}`.
        flip: Whether training images are mirrored at random; wrong for digits and text.
        transforms: Further transforms (of `torchvision.transforms.v2`) for training images, each applied to one
            uint8 image (3, H, W) and seeded by (seed, task, epoch, image).
    """

    name: str
    path: str | None = None
    dataset: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = True
    transforms: Sequence[nn.Module] = ()


def check_names(tasks: Sequence[TaskConfig]) -> None:
    """Refuses a stream whose task names cannot name files or tell tasks apart.

    Raises:
        DataError: Naming the task.
    """
    if not tasks:
        raise DataError("data.tasks is empty; list at least one task, such as [{name: defects, path: /data/defects}]")
    for task in tasks:
        if not re.fullmatch(r"\w[\w.\- ]*", task.name):
            raise DataError(f"task name {task.name!r} cannot name a file; use letters, digits, '_', '-' and '.'")
    names = [task.name.casefold() for task in tasks]  # file systems may not tell cases apart
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"task {twice[0]!r} is listed twice in data.tasks; give each its own name")


def derive_seed(*parts: int | str) -> int:
    """A seed of 32 bits that depends on all its parts and on nothing else, on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def split_images(
    labels: NDArray[np.int64], given: Sequence[str], seed: int, policy: SplitPolicy = "official"
) -> dict[str, NDArray[np.int64]]:
    """Divides images into train, validation and test, stratified by class.

    Args:
        labels: Class index of each image (N,).
        given: Official split of each image, or an empty string where it has none (N).
        seed: Decides the division of images that no official split decides.
        policy: `official` keeps the source's splits, and leaves out images that are in none of them; a source
            without any is divided by ratio. `ratio` divides all images anew: the paper's 75-15-15 adds up to
            105 %, and is taken as 70-15-15.

    Returns:
        Image indices by split, ascending. A split that the source lacks is 15 % of each class of the training
        images, but at least one image of a class that has three.
    """
    official = policy == "official" and any(given)
    split = np.array(given if official else ["train"] * len(labels), dtype="<U5")
    generator = np.random.default_rng(seed)
    missing = [name for name in ("val", "test") if not (split == name).any()]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero((labels == label) & (split == "train")))
        share = max(1, round(_HELD_OUT * len(members))) if len(members) > len(missing) else 0
        for position, name in enumerate(missing):
            split[members[position * share : (position + 1) * share]] = name
    return {name: np.flatnonzero(split == name) for name in SPLITS}


def split_digest(splits: Mapping[str, NDArray[np.int64]]) -> str:
    """Sixteen hexadecimal digits that are equal where splits are, on every machine.

    Args:
        splits: Image indices by split.
    """
    text = ";".join(f"{name}:{','.join(map(str, splits[name]))}" for name in SPLITS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
