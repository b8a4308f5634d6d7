"""Sources of labelled images: folders, manifests, and torchvision's data sets."""

import csv
import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torchvision.datasets
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from recast_pl.data.images import ImageFiles, ImageItems, Images, images_below, stat_digest
from recast_pl.data.tasks import SPLITS
from recast_pl.errors import DataError

_TORCHVISION_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not yet decoded.

    Args:
        classes: Class names, in order of label.
        labels: Class index of each image (N,).
        splits: `train`, `val` or `test` for each image; an empty string for an image in no official split.
        images: The images (N).
        location: Where they come from; tells sources apart.
    """

    classes: Sequence[str]
    labels: NDArray[np.int64]
    splits: Sequence[str]
    images: Images
    location: str


def open_folder(root: Path) -> ImageSource:
    """Images in `CLASS/IMAGE`, or in `train|val|test/CLASS/IMAGE`.

    Raises:
        DataError: If the folder is missing or no folder of classes, or a class has no images.
    """
    if not root.is_dir():
        raise DataError(f"folder {str(root)!r} does not exist (from {Path.cwd()}); correct the task's path")
    top = _subfolders(root)
    split_roots = {name: root / name for name in SPLITS if name in top}
    if "train" not in split_roots:
        split_roots = {"": root}
    classes = sorted({name for folder in split_roots.values() for name in _subfolders(folder)})
    if len(classes) < 2:
        raise DataError(
            f"folder {str(root)!r} has {len(classes)} class folders and needs at least 2; "
            "arrange images as CLASS/IMAGE or train|val|test/CLASS/IMAGE"
        )
    files: list[Path] = []
    labels: list[int] = []
    splits: list[str] = []
    for label, name in enumerate(classes):
        found = [(split, file) for split, folder in split_roots.items() for file in images_below(folder / name)]
        if not any(split in ("", "train") for split, _ in found):
            raise DataError(f"class folder {str(root)!r}/{name} holds no training image; add images or remove it")
        splits += [split for split, _ in found]
        files += [file for _, file in found]
        labels += [label] * len(found)
    return ImageSource(classes, np.array(labels), splits, ImageFiles(files), str(root.resolve()))


def open_manifest(path: Path) -> ImageSource:
    """Images listed in a CSV or Parquet file with columns `path`, `label` and perhaps `split`.

    Paths are relative to the manifest's folder, or absolute. Classes are the labels, as text, in sorted order.

    Raises:
        DataError: If the file cannot be read or a row is wrong; with the first row that is.
    """
    if not path.is_file():
        raise DataError(f"manifest {str(path)!r} does not exist (from {Path.cwd()}); correct the task's path")
    rows = list(_read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path))
    for number, (file, label, split) in enumerate(rows, 1):
        if not file or not label or split not in ("", *SPLITS):
            raise DataError(
                f"manifest {path}, row {number}: path {file!r}, label {label!r}, split {split!r}; "
                "give each row a path, a label, and a split of train, val or test, or no row a split"
            )
    files, labels, splits = ([row[column] for row in rows] for column in range(3))
    if any(splits) and not all(splits):
        raise DataError(
            f"manifest {path}, row {splits.index('') + 1} has no split and others have; give all one, or none"
        )
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise DataError(f"manifest {path} lists {twice[0]!r} more than once; an image may be in one split only")
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise DataError(f"manifest {path} has {len(classes)} different labels and needs at least 2")
    index = {name: label for label, name in enumerate(classes)}
    images = ImageFiles([path.parent / file for file in files])
    return ImageSource(classes, np.array([index[label] for label in labels]), splits, images, str(path.resolve()))


def open_torchvision(name: str, root: Path, args: Mapping[str, Any], download: bool = False) -> ImageSource:
    """A classification data set of torchvision, with its official splits where it has them.

    One without a test split is tested on its validation split, as its users do.

    Args:
        name: Name of the class in `torchvision.datasets`.
        root: Folder of its files.
        args: Further arguments of the class.
        download: Whether torchvision may download it.

    Raises:
        DataError: If there is no such data set, or it is not in the folder, or has no labels.
    """
    torchvision_class(name, args)
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        return _open_torchvision(name, root, args, download)
    except DataError:
        raise
    except Exception as cause:  # on damaged lists torchvision's classes raise nearly anything
        text = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(
            f"torchvision's {name} cannot be opened in {str(root)!r} ({text}); get it with 'python -m recast_pl data "
            f"prepare torchvision/{name}', or remove it first if it is there and damaged"
        ) from cause


def _open_torchvision(name: str, root: Path, args: Mapping[str, Any], download: bool) -> ImageSource:
    parts = _torchvision_parts(name, root, args, download)
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    labels = [np.asarray(_labels(name, part)) for part in parts.values()]
    classes = _class_names(next(iter(parts.values())), 1 + max(int(part.max()) for part in labels))
    files = [_files(part) for part in parts.values()]
    images: Images
    if all(found is not None for found in files):
        images = ImageFiles([file for found in files for file in found or ()])
    else:
        every = list(parts.values())
        images = ImageItems(name, ConcatDataset(every), _native_side(every), lambda: _fingerprint(every, root))
    splits = [split for split, part in parts.items() for _ in range(len(part))]
    settings = "".join(f" {key}={args[key]}" for key in sorted(args))
    return ImageSource(classes, np.concatenate(labels), splits, images, f"{root.resolve()}/{name}{settings}")


def torchvision_class(name: str, args: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """A data set's class, and the arguments it takes.

    Raises:
        DataError: If there is no such class, or it does not take the arguments given.
    """
    cls = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torchvision.datasets.VisionDataset)):
        known = ", ".join(n for n in torchvision.datasets.__all__ if n[0].isupper())
        raise DataError(f"torchvision has no data set {name!r}; it has {known}")
    parameters = {p for base in cls.__mro__[:-1] for p in inspect.signature(base).parameters}  # but for object's
    unknown = sorted(set(args) - parameters)
    if unknown:
        raise DataError(
            f"torchvision's {name} takes no argument {unknown[0]!r}; it takes {', '.join(sorted(parameters))}"
        )
    return cls, parameters


class _Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


def _torchvision_parts(name: str, root: Path, args: Mapping[str, Any], download: bool) -> dict[str, Any]:
    """The data set once for each split it has, or once under an empty string."""
    cls, parameters = torchvision_class(name, args)
    settings = dict(args) | ({"download": download} if "download" in parameters else {})
    if "train" in parameters and "train" not in args:
        return {split: cls(str(root), train=split == "train", **settings) for split in ("train", "test")}
    if "split" not in parameters or "split" in args:
        return {"": cls(str(root), **settings)}
    found = {split: _first_known(cls, root, names, settings) for split, names in _TORCHVISION_SPLITS.items()}
    return {split: part for split, part in found.items() if part is not None}


def _first_known(cls: Any, root: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Any:
    """The first of the splits that the class knows; None if it knows none of them."""
    for name in names:
        try:
            return cls(str(root), split=name, **settings)
        except ValueError as refusal:
            if "for argument split" not in str(refusal):  # torchvision: "Unknown value 'val' for argument split."
                raise
    return None


def _labels(name: str, dataset: _Dataset) -> list[int]:
    """Labels from wherever the class keeps them, or else, slowly, from its items."""
    for candidate in _kept_labels(dataset):
        if len(candidate) == len(dataset) and _agrees(dataset, candidate):
            return [int(label) for label in candidate]
    labels = [dataset[i][1] for i in range(len(dataset))]
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(f"torchvision's {name} has no label for each image, so that it is no classification task")
    return [int(label) for label in labels]


def _kept_labels(dataset: Any) -> Iterator[Sequence[Any]]:
    for attribute in ("targets", "_labels", "labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values):
            yield values
    for attribute in ("_samples", "samples", "imgs"):
        pairs = getattr(dataset, attribute, None)
        if pairs is not None and len(pairs):
            yield [pair[1] for pair in pairs]


def _agrees(dataset: _Dataset, labels: Sequence[Any]) -> bool:
    """Whether what a class keeps is what it hands out: its arguments may ask for other labels."""
    for index in np.linspace(0, len(dataset) - 1, min(8, len(dataset)), dtype=int).tolist():
        try:
            label = dataset[index][1]
        except Exception:  # the image cannot be read, which is found when it is decoded
            continue
        if not isinstance(label, int | np.integer) or label != labels[index]:
            return False
    return True


def _files(dataset: Any) -> list[Path] | None:
    """The files of a data set; None if it has no list of them."""
    for attribute in ("_image_files", "_images", "data", "_samples", "samples", "imgs"):
        values = getattr(dataset, attribute, None)
        if values is None or len(values) != len(dataset):
            continue
        if attribute in ("_samples", "samples", "imgs"):
            values = [pair[0] for pair in values]
        if isinstance(values[0], str | Path):
            return [Path(value) for value in values]
    return None


def _class_names(dataset: Any, count: int) -> list[str]:
    for attribute in ("classes", "categories", "bin_classes"):
        names = getattr(dataset, attribute, None)
        if names is not None and len(names) == count:
            return [str(name[0] if isinstance(name, tuple) else name) for name in names]  # of several, the first
    return [str(label) for label in range(count)]


def _native_side(parts: Sequence[Any]) -> int | None:
    """Height and width of square images kept in one array; None for others."""
    if any(getattr(part, "data", None) is None for part in parts):
        return None
    sides = {side for part in parts for side in part[0][0].size}
    return sides.pop() if len(sides) == 1 else None


def _fingerprint(parts: Sequence[Any], root: Path) -> str:
    """Of the arrays that hold the images, or else of all files of the data set."""
    arrays = [getattr(part, "data", None) for part in parts]
    if any(array is None for array in arrays):
        return stat_digest(sorted(path for path in root.rglob("*") if path.is_file()))
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_csv(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                yield row["path"] or "", row["label"] or "", row.get("split") or ""
    except (UnicodeDecodeError, csv.Error) as cause:
        raise DataError(f"manifest {path} is no CSV file in UTF-8 ({cause}); save it as one") from cause


def _read_parquet(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("a Parquet manifest needs pyarrow: pip install pyarrow, or save it as CSV") from cause
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"manifest {path} is no Parquet file ({cause}); save it anew") from cause
    _check_columns(path, table.column_names)
    names = [name for name in ("path", "label", "split") if name in table.column_names]
    for row in table.select(names).to_pylist():
        yield tuple("" if row.get(name) is None else str(row[name]) for name in ("path", "label", "split"))  # type: ignore[misc]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    lacking = [name for name in ("path", "label") if name not in columns]
    if lacking:
        raise DataError(
            f"manifest {path} has columns {list(columns)} and lacks {lacking[0]!r}; name its columns path,label,split"
        )


def _subfolders(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []
