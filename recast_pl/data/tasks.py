"""A task as a user names it, and how its images are divided into splits."""

import hashlib
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from recast_pl.errors import DataError
from recast_pl.rules import TASK_RULE, is_task_name

SPLITS = ("train", "val", "test")

SplitPolicy = Literal["official", "ratio"]

ClassFolders = Literal["top", "leaf"]

Splits = dict[str, NDArray[np.int64]]
"""Image indices by split, in ascending order."""

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}

_HELD_OUT = 0.15  # share of each class for validation, and again for test: the paper's 75-15-15 adds up to 105 %


@dataclass(frozen=True)
class ClassSubset:
    """Some classes of a source, drawn at random by their names and the seed (`recast_pl.data.class_streams`).

    Args:
        classes: How many classes a task has, at least 2. They keep their names and order.
        tasks: How many tasks to make of this one, called `NAME_000`, `NAME_001` and so on, each with a draw of its own,
            as in "SCoLe" (Lesort et al., 2023). None for one task with its own name.
        ratio: How much more often the most frequent class is drawn than the rarest; 1 for all alike.
        draw: Number of the draw, or of the first of several.

    Raises:
        DataError: If a number is too small.
    """

    classes: int
    tasks: int | None = None
    ratio: float = 1.0
    draw: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("classes", self.classes, 2), ("tasks", self.tasks, 1), ("draw", self.draw, 0)):
            if value is not None and value < least:
                raise DataError(f"data.tasks.subset.{name}={value} must be at least {least}")
        if not 1 <= self.ratio < float("inf"):
            raise DataError(f"data.tasks.subset.ratio={self.ratio} must be at least 1, which draws all classes alike")


@dataclass(frozen=True)
class TaskConfig:
    """One task of the stream.

    Args:
        name: Name of the task. Without `dataset` and `path` it is also the name of a data set of
            `recast_pl data list`.
        path: A folder of `CLASS/IMAGE` or `train|val|test/CLASS/IMAGE`, or a `.csv`, `.tsv` or `.parquet` file with
            columns path, label and, if images have official splits, split. With `dataset`, the folder of that data
            set. None for a data set known by name, which lies below the datamodule's root.
        dataset: A data set of `recast_pl data list`, or `torchvision/CLASS`. None for the data set called like the
            task, or for the images in `path`.
        args: Further arguments of the data set's torchvision class, such as `{annotation_level: family}`.
        flip: Whether training images are mirrored at random. False for digits and text.
        transforms: Further transforms (of `torchvision.transforms.v2`) for training images, each applied to one
            uint8 image (3, H, W) and seeded by (seed, task, epoch, image). If there are none, those of the datamodule.
        classes: Which folders of `path` are classes, if folders lie in folders: `top`, the uppermost ones, with all
            images below them; `leaf`, the innermost ones, named by their paths, such as `birds/owls`.
        images: How many images to use, of all splits together or of each split, such as `{train: 100, test: 1000}`;
            a split that is not named keeps all. Which ones depends on their names and the seed alone. None for all.
        split_as: The name that decides, with the seed, how images without official splits are divided; None for the
            task's own. `rename` sets it, so that the split stays.
        subset: Which of the classes to use, for long streams of tasks in which classes come back; None for all.
    """

    name: str
    path: str | None = None
    dataset: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = True
    transforms: Sequence[nn.Module] = ()
    classes: ClassFolders = "top"
    images: int | dict[str, int] | None = None
    split_as: str | None = None
    subset: ClassSubset | None = None

    @property
    def own_path(self) -> Path | None:
        """The user's own folder or manifest; None for a data set known by name."""
        return None if self.path is None or self.dataset is not None else Path(self.path).expanduser()


def check_names(tasks: Sequence[TaskConfig]) -> None:
    """Raises DataError if there are no tasks, or a name cannot be a file name or is listed twice."""
    if not tasks:
        raise DataError("data.tasks is empty; list at least one task, such as [{name: defects, path: /data/defects}]")
    for task in tasks:
        if not is_task_name(task.name):
            raise DataError(f"task name {task.name!r:.80} cannot name a file; choose {TASK_RULE}")
    counts = Counter(task.name.casefold() for task in tasks)  # some file systems ignore case
    repeated = sorted(name for name, count in counts.items() if count > 1)

    if repeated:
        raise DataError(f"task {repeated[0]!r} is listed twice in data.tasks; give each its own name")


def check_images(tasks: Sequence[TaskConfig]) -> None:
    """Raises DataError if `images` of a task is below 1 or names no split."""
    for task in tasks:
        of_splits = task.images if isinstance(task.images, dict) else {}
        for split in of_splits:
            if split not in SPLITS:
                raise DataError(
                    f"data.tasks.{task.name}.images has {split!r}; give it {', '.join(SPLITS)}, or one number"
                )
        named = [(f"images.{split}", count) for split, count in of_splits.items()]
        for name, count in [*named, ("images", task.images)]:
            if isinstance(count, int) and count < 1:
                raise DataError(f"data.tasks.{task.name}.{name}={count} must be at least 1")


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on its parts alone, on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def normal_text(text: str) -> str:
    """The text without surrounding spaces, and with letters such as `é` spelled in one way (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text.strip())


def find_split(name: str) -> str | None:
    """The split that a folder or a manifest means by a name such as `Train` or `validation`; None if it means none."""
    return next((split for split, names in _SPLIT_NAMES.items() if name.strip().casefold() in names), None)


def hold_out(given: Sequence[str], names: Sequence[str], pattern: str) -> list[str]:
    """The splits of images if those whose names match are tested and never trained on, and no others are tested.

    Args:
        given: Official split of each image, or an empty string where it has none (N).
        names: Name of each image (N).
        pattern: As in `fnmatch`: `*` is any text, also with `/`.

    Returns:
        `test` for images that match: for official test images, or for all of them if there is none. For other images
        `train`, or their official split. An empty string for images to leave out.

    Raises:
        DataError: If all names match, or none of an image that could be tested.
    """
    apart, has_test = [fnmatchcase(normal_text(name), pattern) for name in names], "test" in given

    def place(held: bool, split: str) -> str:
        if held:
            return "test" if split == "test" or not has_test else ""
        return "" if split == "test" else split or "train"

    splits = [place(held, split) for held, split in zip(apart, given, strict=True)]
    for split, count in (("test", "none"), ("train", "all")):
        if split not in splits:
            raise DataError(
                f"held_out={pattern!r} matches {count} of {len(names):,} images, such as {', '.join(names[:2])}, that "
                f"are there to {split}; give a pattern that matches some of these names, such as '*_scan.*'"
            )
    return splits


def choose_images(names: Sequence[str], count: int | None, seed: int) -> NDArray[np.int64]:
    """Chooses images by their names and a seed alone, independently of how `split_images` divides them.

    Args:
        names: Name of each image (N).
        count: How many images to choose; None for all, as if it is more than N.
        seed: Decides which.

    Returns:
        Indices in ascending order. A smaller count gives a part of a larger one.
    """
    chosen = np.argsort(name_places(names, derive_seed(seed, "images")), kind="stable")[:count]
    return np.sort(chosen).astype(np.int64)


def choose_evenly(labels: NDArray[np.int64], names: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Chooses about as many images of each class, by their names and a seed alone.

    Args:
        labels: Class index of each image (N,).
        names: Name of each image (N).
        count: How many images to choose, at most N. Of a class that has too few, all are chosen.
        seed: Decides which.

    Returns:
        Indices in ascending order. A smaller count gives a part of a larger one.
    """
    places = name_places(names, derive_seed(seed, "images"))
    turns = np.zeros(len(labels), np.int64)  # in which turn each class gives this image
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turns[members[np.argsort(places[members], kind="stable")]] = np.arange(len(members))
    return np.sort(np.lexsort((places, turns))[:count]).astype(np.int64)


def split_images(
    labels: NDArray[np.int64],
    given: Sequence[str],
    names: Sequence[str],
    seed: int,
    policy: SplitPolicy = "official",
    held_out: str | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Divides images into train, validation and test.

    The split of an image depends on its name and the seed alone, so that images may be added and removed. Only in a
    small class do others matter, when a split would have none of its images: then the nearest image takes that place.

    Args:
        labels: Class index of each image (N,).
        given: Official split of each image, or an empty string where it has none (N).
        names: Name of each image, different for different images (N).
        seed: Decides about the images that have no official split.
        policy: `official` keeps the source's splits and leaves out images that are in none of them; a source
            without splits is divided by ratio. `ratio` divides all images 70-15-15.
        held_out: Pattern of names of images to hold out, see `hold_out`; None for none.

    Returns:
        Image indices by split, in ascending order. A split that the source lacks gets each training image with a
        probability of 15 %, and at least one image of each class that has enough for one in every split.
    """
    given = given if policy == "official" else [""] * len(labels)
    given = given if held_out is None else hold_out(given, names, held_out)
    split = np.array(given if any(given) else ["train"] * len(labels), dtype="<U5")
    missing = [name for name in ("val", "test") if not (split == name).any()]
    places = name_places(names, seed)
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & (split == "train"))
        if len(members) > len(missing):
            members, start = members[np.argsort(places[members])], 0
            for position, name in enumerate(missing):
                end = int(np.searchsorted(places[members], _HELD_OUT * (position + 1)))
                end = min(max(end, start + 1), len(members) - len(missing) + position)  # leave one for each other split
                split[members[start:end]] = name
                start = end
    return {name: np.flatnonzero(split == name) for name in SPLITS}


def name_places(names: Sequence[str], seed: int) -> NDArray[np.float64]:
    """A place in [0, 1) for each name (N,), which looks random and depends on the name and the seed alone."""
    texts = (f"{seed}/{normal_text(name)}".encode(errors="surrogateescape") for name in names)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, ">u8") / 2.0**64


def split_digest(splits: Mapping[str, NDArray[np.int64]]) -> str:
    """Sixteen hexadecimal digits that are equal where splits (image indices) are equal, on every machine."""
    text = ";".join(f"{name}:{','.join(map(str, splits[name]))}" for name in SPLITS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
