"""Labelled images that are not decoded yet, and how they are made from lists of files."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.images import ImageFiles, Images
from recast_pl.data.tasks import normal_text
from recast_pl.errors import DataError
from recast_pl.rules import LABEL_RULE, find_bad_label

LAYOUTS = "CLASS/IMAGE or train|val|test/CLASS/IMAGE"


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not decoded yet.

    Args:
        classes: Class names, in order of label.
        labels: Class index of each image (N,).
        splits: `train`, `val` or `test` for each image; an empty string for an image without official split.
        images: The images (N).
        location: Where the images come from; different for different sources.
        names: A name for each image (N), which stays the same when the source moves; it decides about the split.
        notes: What a user should know about how the source was read, one line each.

    Raises:
        DataError: If two classes have one name, or a patch cannot hold a name.
    """

    classes: Sequence[str]
    labels: NDArray[np.int64]
    splits: Sequence[str]
    images: Images
    location: str
    names: Sequence[str]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        name = find_bad_label(self.classes)
        if name is not None:
            raise DataError(
                f"class {name!r:.80} of {self.location!r} is listed twice, or is not {LABEL_RULE}; rename the class"
            )


class LabelledFile(NamedTuple):
    """An image file with its class as written, its split (or an empty string), and its name within the source."""

    path: Path
    label: str
    split: str
    name: str


def make_source(
    kind: str,
    path: Path,
    files: Sequence[LabelledFile],
    empty: Iterable[str] = (),
    notes: Sequence[str] = (),
    least: int = 2,
) -> ImageSource:
    """Numbers the classes of images.

    Args:
        kind: `folder` or `manifest`, for messages.
        path: The folder or manifest.
        files: The images. Spellings of a class that differ only in spaces around it, or in Unicode, count as one.
        empty: Further classes, which may have no image.
        notes: As in `ImageSource`.
        least: Classes that it must have: 1 if the images are added to those of a task.

    Raises:
        DataError: If there are fewer classes, or one without a training image.
    """
    spellings = defaultdict(set)
    for label in (*empty, *(file.label for file in files)):
        spellings[normal_text(label)].add(label)
    classes = sorted(spellings)
    if len(classes) < least:
        remedy = f"arrange images as {LAYOUTS}" if kind == "folder" else "list images with other labels"
        raise DataError(f"{kind} {str(path)!r} has {len(classes)} classes and needs at least {least}; {remedy}")
    index = {spelling: label for label, name in enumerate(classes) for spelling in spellings[name]}
    _check_trained(kind, path, classes, {normal_text(file.label) for file in files if file.split in ("", "train")})
    return ImageSource(
        classes,
        np.array([index[file.label] for file in files], dtype=np.int64),
        [file.split for file in files],
        ImageFiles([file.path for file in files]),
        str(path.resolve()),
        [file.name for file in files],
        [*notes, *_spelling_notes(spellings)],
    )


def _check_trained(kind: str, path: Path, classes: Sequence[str], trained: set[str]) -> None:
    for name in (name for name in classes if name not in trained):
        twins = [other for other in classes if other != name and other.casefold() == name.casefold()]
        fault = f"class {name!r} has no training image; add images or remove the class"
        if twins:
            fault = f"classes {twins[0]!r} and {name!r} differ only in case; give both one name"
        raise DataError(f"{kind} {str(path)!r}: {fault}")


def _spelling_notes(spellings: dict[str, set[str]]) -> list[str]:
    """A line about classes that are spelled in several ways; no line if there are none."""
    # as ASCII, because different spellings of a letter look the same
    merged = [f"{' and '.join(map(ascii, sorted(every)))}" for every in spellings.values() if len(every) > 1]
    if not merged:
        return []
    more = f", and {len(merged) - 5:,} more" if len(merged) > 5 else ""
    return [f"labels that differ only in spaces or in Unicode are read as one class: {', '.join(merged[:5])}{more}"]
