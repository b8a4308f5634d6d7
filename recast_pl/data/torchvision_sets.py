"""Data sets of torchvision, read through its own classes."""

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from torch.utils.data import ConcatDataset

from recast_pl.data.datasets import ImageSource
from recast_pl.data.images import ImageFiles, ImageItems, Images, stat_digest
from recast_pl.errors import DataError, one_line

_SPLIT_NAMES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}


def torchvision_class(name: str, args: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Finds a class in `torchvision.datasets` by name, and the names of the arguments it takes.

    Raises:
        DataError: If there is no such class, or it does not take the arguments.
    """
    cls = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torchvision.datasets.VisionDataset)):
        known = ", ".join(n for n in torchvision.datasets.__all__ if n[0].isupper())
        raise DataError(f"torchvision has no data set {name!r}; it has {known}")
    parameters = {p for base in cls.__mro__[:-1] for p in inspect.signature(base).parameters}  # all but object's
    unknown = sorted(set(args) - parameters)
    if unknown:
        raise DataError(
            f"torchvision's {name} takes no argument {unknown[0]!r}; it takes {', '.join(sorted(parameters))}"
        )
    return cls, parameters


def open_torchvision(name: str, root: Path, args: Mapping[str, Any], download: bool = False) -> ImageSource:
    """Opens a classification data set, with its official splits if it has them.

    The validation split serves as test split if there is no test split, as is usual for these data sets.

    Args:
        name: Name of the class in `torchvision.datasets`.
        root: Folder of its files.
        args: Further arguments of the class.
        download: Whether torchvision may download the data set.

    Raises:
        DataError: If there is no such data set, or the folder does not hold it, or it has no labels.
    """
    torchvision_class(name, args)
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        return _open(name, root, args, download)
    except DataError:
        raise
    except Exception as cause:  # torchvision's classes raise many types of errors on damaged lists
        raise DataError(
            f"torchvision's {name} cannot be opened in {str(root)!r} ({one_line(cause)}); get it with 'python -m "
            f"recast_pl data prepare torchvision/{name}', or remove it first if it is there and damaged"
        ) from cause


def _open(name: str, root: Path, args: Mapping[str, Any], download: bool) -> ImageSource:
    parts = _open_splits(name, root, args, download)
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    labels = [np.asarray(_read_labels(name, part)) for part in parts.values()]
    classes = _class_names(next(iter(parts.values())), 1 + max(int(part.max()) for part in labels))
    files = [_find_files(part) for part in parts.values()]
    names = [f"{split}/{index}" for split, part in parts.items() for index in range(len(part))]
    images: Images
    if all(files):
        images = ImageFiles([file for found in files for file in found])
        names = [os.path.relpath(path, root) for path in images.paths]
    else:
        every = list(parts.values())
        images = ImageItems(name, ConcatDataset(every), _native_side(every), lambda: _fingerprint(every, root))
    splits = [split for split, part in parts.items() for _ in range(len(part))]
    settings = "".join(f" {key}={args[key]}" for key in sorted(args))
    return ImageSource(classes, np.concatenate(labels), splits, images, f"{root.resolve()}/{name}{settings}", names)


def _open_splits(name: str, root: Path, args: Mapping[str, Any], download: bool) -> dict[str, Any]:
    """The data set once for each of its splits, or once under an empty string."""
    cls, parameters = torchvision_class(name, args)
    settings = dict(args) | ({"download": download} if "download" in parameters else {})
    if "train" in parameters and "train" not in args:
        return {split: cls(str(root), train=split == "train", **settings) for split in ("train", "test")}
    if "split" not in parameters or "split" in args:
        return {"": cls(str(root), **settings)}
    found = {split: _open_first(cls, root, names, settings) for split, names in _SPLIT_NAMES.items()}
    return {split: part for split, part in found.items() if part is not None}


def _open_first(cls: Any, root: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Any:
    """The first of the splits that the class knows; None if it knows none of them."""
    for name in names:
        try:
            return cls(str(root), split=name, **settings)
        except ValueError as refusal:
            if "for argument split" not in str(refusal):  # torchvision: "Unknown value 'val' for argument split."
                raise
    return None


def _read_labels(name: str, dataset: Any) -> list[int]:
    """Labels from the list that the class keeps, or else, slowly, from its items."""
    for candidate in _kept_lists(dataset, ("targets", "_labels", "labels", "y"), 1):
        if _agrees(dataset, candidate):
            return [int(label) for label in candidate]
    labels = [dataset[i][1] for i in range(len(dataset))]
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(f"torchvision's {name} does not have one label for each image; use a classification data set")
    return [int(label) for label in labels]


def _kept_lists(dataset: Any, names: Sequence[str], column: int) -> Iterator[Sequence[Any]]:
    """The lists that a class keeps of its items: attributes of these names, or a column of its list of samples."""
    samples = ("_samples", "samples", "imgs")
    for name in (*names, *samples):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset) > 0:
            yield [value[column] for value in values] if name in samples else values


def _agrees(dataset: Any, labels: Sequence[Any]) -> bool:
    """Whether some items have the labels that the class keeps; its arguments may ask for other labels."""
    for index in np.linspace(0, len(dataset) - 1, min(8, len(dataset)), dtype=int).tolist():
        try:
            label = dataset[index][1]
        except Exception:  # the image cannot be read, which decoding will report
            continue
        if not isinstance(label, int | np.integer) or label != labels[index]:
            return False
    return True


def _find_files(dataset: Any) -> list[Path]:
    """The image files of a data set; empty if it keeps no list of them."""
    for values in _kept_lists(dataset, ("_image_files", "_images", "data"), 0):
        if isinstance(values[0], str | Path):
            return [Path(value) for value in values]
    return []


def _class_names(dataset: Any, count: int) -> list[str]:
    for attribute in ("classes", "categories", "bin_classes"):
        names = getattr(dataset, attribute, None)
        if names is not None and len(names) == count:
            firsts = [str(name[0] if isinstance(name, tuple) else name) for name in names]  # the first of several names
            # ImageNet has two classes "crane"
            return [f"{name} ({label})" if firsts.count(name) > 1 else name for label, name in enumerate(firsts)]
    return [str(label) for label in range(count)]


def _native_side(parts: Sequence[Any]) -> int | None:
    """Height and width of square images kept in one array; None for others."""
    if any(getattr(part, "data", None) is None for part in parts):
        return None
    sides = {side for part in parts for side in part[0][0].size}
    return sides.pop() if len(sides) == 1 else None


def _fingerprint(parts: Sequence[Any], root: Path) -> str:
    """SHA-256 of the arrays that hold the images, or else of the states of all files of the data set."""
    arrays = [getattr(part, "data", None) for part in parts]
    if any(array is None for array in arrays):
        return stat_digest(sorted(path for path in root.rglob("*") if path.is_file()))
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
