"""The images of one task: found, split, and decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from recast_pl.data.cache import CacheMode, DecodedImages, bad_images_message, decode_images
from recast_pl.data.changes import SplitImages, describe_images
from recast_pl.data.class_streams import choose_classes
from recast_pl.data.datasets import ImageSource
from recast_pl.data.imbalance import Imbalance
from recast_pl.data.joining import join_sources, join_splits
from recast_pl.data.label_noise import LabelNoise
from recast_pl.data.tasks import (
    SPLITS,
    ClassSubset,
    SplitPolicy,
    Splits,
    TaskConfig,
    choose_evenly,
    choose_images,
    derive_seed,
    split_images,
)
from recast_pl.errors import DataError
from recast_pl.rules import ImageSize

BadImagePolicy = Literal["error", "skip"]


@dataclass(frozen=True)
class ImageSettings:
    """How the images of all tasks are split and decoded; see the options of `SequentialTaskDataModule`."""

    seed: int
    split: SplitPolicy
    held_out: str | None
    imbalance: Imbalance | None
    label_noise: LabelNoise | None
    size: ImageSize
    cache: CacheMode
    cache_folder: Path
    on_bad_image: BadImagePolicy


class TaskImages:
    """The images of a task: found, split, and decoded when they are first needed.

    Args:
        task: The task.
        sources: Its images, and those that were added to them.
        settings: How they are split and decoded.

    Raises:
        DataError: If a split has no image, or a class no training image.
    """

    def __init__(self, task: TaskConfig, sources: Sequence[ImageSource], settings: ImageSettings) -> None:
        self.task, self.source, self.settings = task, join_sources(sources), settings
        self.seed = derive_seed(settings.seed, task.split_as or task.name)
        for note in self.source.notes:
            rank_zero_warn(f"task {task.name!r}: {note}")
        parts = [self._divided(source, None if i else task.images) for i, source in enumerate(sources)]
        self.splits = join_splits(parts, [len(source.labels) for source in sources])
        self._check_splits("give each class at least 3 images, or images for every split")
        if settings.imbalance is not None:
            self.splits = settings.imbalance.thinned(self.source, self.splits, self.seed)
        self._right_labels = self.source.labels
        if settings.label_noise is not None:
            self.source = settings.label_noise.applied(self.source, self.splits, self.seed)

    def _divided(self, source: ImageSource, count: int | dict[str, int] | None) -> Splits:
        """The splits of so many images of a source, in all or of each split; None for all."""
        of_splits = count if isinstance(count, dict) else {}
        chosen = choose_images(source.names, None if isinstance(count, dict) else count, self.seed)
        labels, names = source.labels[chosen], [source.names[index] for index in chosen]
        given = [source.splits[index] for index in chosen]
        try:
            splits = split_images(labels, given, names, self.seed, self.settings.split, self.settings.held_out)
        except DataError as error:
            raise DataError(f"task {self.task.name!r}: {error}") from error
        splits = {name: chosen[indices] for name, indices in splits.items()}
        for name, most in of_splits.items():
            kept = choose_images([source.names[index] for index in splits[name]], most, self.seed)
            splits[name] = splits[name][kept]
        return splits

    @cached_property
    def decoded(self) -> DecodedImages:
        """All images. Those that cannot be read leave the splits, or stop the run."""
        settings, count = self.settings, len(self.source.labels)
        decoded = decode_images(self.source, settings.size, settings.cache, settings.cache_folder)
        if decoded.bad:
            message = bad_images_message(self.task.name, decoded.bad, count)
            if settings.on_bad_image == "error":
                raise DataError(f"{message}; repair them, or train without them: --data.on_bad_image skip")
            rank_zero_warn(f"{message}; they are skipped")
            # after the split, so that one bad image does not move the others
            self.splits = {name: np.setdiff1d(split, list(decoded.bad)) for name, split in self.splits.items()}
            self._check_splits("repair the images that cannot be read")
        self._report_duplicates(decoded.equal)
        return decoded

    def indices(self, split: str, most: int | None = None) -> NDArray[np.int64]:
        """The images of a split, of the training split at most some; raises DataError if these are too few.

        Args:
            split: The split.
            most: How many training images to use; None for all.
        """
        indices = self.splits[split]
        if split != "train" or most is None or most >= len(indices):
            return indices
        labels = self.source.labels[indices]
        if most < len(np.unique(labels)):
            raise DataError(
                f"budget.images={most} is too small for task {self.task.name!r}, which has {len(np.unique(labels))} "
                "classes; set at least one training image of each"
            )
        return indices[choose_evenly(labels, [self.source.names[index] for index in indices], most, self.seed)]

    @cached_property
    def record(self) -> dict[str, SplitImages]:
        """The images by split, without those that cannot be read."""
        _ = self.decoded
        record = describe_images(self.source, self.splits)
        if self.settings.label_noise is not None:
            for name, split in self.splits.items():
                record[name]["wrong_labels"] = int((self.source.labels != self._right_labels)[split].sum())
        return record

    def _report_duplicates(self, groups: Sequence[Sequence[int]]) -> None:
        """Warns of equal images in different splits, which make accuracies look better than they are."""
        split_of = {index: name for name, split in self.splits.items() for index in split.tolist()}
        found = [[i for i in group if i in split_of] for group in groups]
        found = [group for group in found if len({split_of[i] for i in group}) > 1]
        if found:
            shown = "; ".join(" = ".join(f"{self.source.names[i]} ({split_of[i]})" for i in g[:3]) for g in found[:3])
            more = "; ..." if len(found) > 3 else ""
            rank_zero_warn(
                f"{len(found):,} images of task {self.task.name!r} are in more than one split, as files with equal "
                f"pixels: {shown}{more}; remove the copies, or measured accuracies are too high"
            )

    def _check_splits(self, remedy: str) -> None:
        empty = [name for name in SPLITS if not len(self.splits[name])]
        if empty:
            raise DataError(f"task {self.task.name!r} has no {empty[0]} image; {remedy}")
        if self.task.images is not None or self.settings.held_out is not None:
            trained = set(self.source.labels[self.splits["train"]].tolist())
            lost = [name for label, name in enumerate(self.source.classes) if label not in trained]
            if lost:
                count = sum(map(len, self.splits.values()))
                raise DataError(
                    f"task {self.task.name!r} has no training image of class {lost[0]!r} among its {count} images; "
                    "use more"
                )


class SubsetImages(TaskImages):
    """The images of some classes of a source: they keep the split, the label and the pixels that they have there.

    Args:
        task: The task.
        subset: Its classes.
        whole: The images of all classes.

    Raises:
        DataError: If the source has fewer classes.
    """

    def __init__(self, task: TaskConfig, subset: ClassSubset, whole: TaskImages) -> None:
        self.task, self.settings, self.seed, self._whole = task, whole.settings, whole.seed, whole
        names = whole.source.classes
        if subset.classes > len(names):
            raise DataError(
                f"task {task.name!r} has subset.classes={subset.classes}, but {whole.source.location!r} has "
                f"{len(names)} classes; choose 2 to {len(names)}"
            )
        chosen = choose_classes(subset, names, whole.seed)
        labels = np.full(len(names), -1)  # of all other classes
        labels[chosen] = np.arange(len(chosen))
        self._right_labels = labels[whole._right_labels]
        classes = [names[index] for index in chosen]
        self.source = replace(whole.source, classes=classes, labels=labels[whole.source.labels])
        self._restrict()

    @cached_property
    def decoded(self) -> DecodedImages:
        """The images of all classes, as they are decoded only once. Those that cannot be read leave the splits."""
        decoded = self._whole.decoded
        self._restrict()
        return decoded

    def _restrict(self) -> None:
        self.splits = {name: split[self.source.labels[split] >= 0] for name, split in self._whole.splits.items()}
        self._check_splits("give each class at least 3 images that can be read, or images for every split")
