"""The user's own images: folders of classes, and manifests in CSV or Parquet."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recast_pl.data.images import ImageFiles, Images, images_below
from recast_pl.data.tasks import SPLITS, find_split
from recast_pl.errors import DataError
from recast_pl.rules import LABEL_RULE, find_bad_label

_LAYOUTS = "CLASS/IMAGE or train|val|test/CLASS/IMAGE"

_COLUMNS = ("path", "label", "split")

_Image = tuple[Path, str, str]  # file, class and split


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not decoded yet.

    Args:
        classes: Class names, in order of label.
        labels: Class index of each image (N,).
        splits: `train`, `val` or `test` for each image; an empty string for an image without official split.
        images: The images (N).
        location: Where the images come from; different for different sources.

    Raises:
        DataError: If two classes have one name, or a patch cannot hold a name.
    """

    classes: Sequence[str]
    labels: NDArray[np.int64]
    splits: Sequence[str]
    images: Images
    location: str

    def __post_init__(self) -> None:
        name = find_bad_label(self.classes)
        if name is not None:
            raise DataError(
                f"class {name!r:.80} of {self.location!r} is listed twice, or is not {LABEL_RULE}; rename the class"
            )


def open_folder(root: Path) -> ImageSource:
    """Finds images in `CLASS/IMAGE`, or in `train|val|test/CLASS/IMAGE`.

    Images may lie at any depth below their class folder. Folders of splits are recognised in any case; `training`,
    `valid`, `validation` and `testing` are also accepted.

    Raises:
        DataError: If the folder is missing, does not have one of the two layouts, or lacks training images of a class.
    """
    if not root.is_dir():
        raise DataError(f"folder {str(root)!r} does not exist (from {Path.cwd()}); correct the task's path")
    split_folders = _find_split_folders(root)
    classes = sorted({name for folder in split_folders.values() for name in _subfolders(folder)})
    rows = [
        (file, name, split)
        for name in classes
        for split, folder in split_folders.items()
        for file in _class_images(folder / name)
    ]
    return _make_source("folder", root, classes, rows)


def open_manifest(path: Path) -> ImageSource:
    """Finds images that a CSV or Parquet file lists in the columns `path`, `label` and, optionally, `split`.

    Paths are relative to the manifest's folder, or absolute. Classes are the labels, as text, in sorted order. Names
    of columns and splits are recognised in any case, and splits by the same names as for `open_folder`.

    Raises:
        DataError: If the file cannot be read, a row is wrong, or a class has no training image.
    """
    if not path.is_file():
        raise DataError(f"manifest {str(path)!r} does not exist (from {Path.cwd()}); correct the task's path")
    rows: list[_Image] = []
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    for number, (file, label, name) in enumerate(read(path), 1):
        split = find_split(name) if name else ""
        if not file or not label or split is None:
            raise DataError(
                f"manifest {path}, row {number}: path {file!r}, label {label!r}, split {name!r}; "
                "give each row a path, a label, and a split of train, val or test, or leave out all splits"
            )
        rows.append((path.parent / file, label, split))
    splits = [split for *_, split in rows]
    if any(splits) and not all(splits):
        raise DataError(
            f"manifest {path}, row {splits.index('') + 1} has no split and other rows have one; give all rows a split, "
            "or none"
        )
    repeated = [file for file, count in Counter(file for file, *_ in rows).items() if count > 1]
    if repeated:
        raise DataError(f"manifest {path} lists {str(repeated[0])!r} more than once; list each image once")
    return _make_source("manifest", path, sorted({label for _, label, _ in rows}), rows)


def _make_source(kind: str, path: Path, classes: Sequence[str], rows: Sequence[_Image]) -> ImageSource:
    """Numbers the classes of images; raises DataError for fewer than two, or one without a training image."""
    if len(classes) < 2:
        remedy = f"arrange images as {_LAYOUTS}" if kind == "folder" else "list images with other labels"
        raise DataError(f"{kind} {str(path)!r} has {len(classes)} classes and needs at least 2; {remedy}")
    trained = {name for _, name, split in rows if split in ("", "train")}
    for name in (name for name in classes if name not in trained):
        twins = [other for other in classes if other != name and other.casefold() == name.casefold()]
        fault = f"class {name!r} has no training image; add images or remove the class"
        if twins:
            fault = f"classes {twins[0]!r} and {name!r} differ only in case; give both one name"
        raise DataError(f"{kind} {str(path)!r}: {fault}")
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index[name] for _, name, _ in rows])
    images = ImageFiles([file for file, _, _ in rows])
    return ImageSource(classes, labels, [split for _, _, split in rows], images, str(path.resolve()))


def _find_split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, in the order of `SPLITS`; the root under an empty string if it has no split folders."""
    names = _subfolders(root)
    found = {name: split for name in names if (split := find_split(name))}
    if not found:
        return {"": root}
    others = [name for name in names if name not in found and images_below(root / name)]
    if others:
        fault = f"beside other folders of images, such as {others[0]!r}"
    elif "train" not in found.values():
        fault = "but no folder 'train'"
    elif len(found) > len(set(found.values())):
        fault = "and two of them name the same split"
    else:
        folders = {split: root / name for name, split in found.items()}
        return {split: folders[split] for split in SPLITS if split in folders}
    raise DataError(
        f"folder {str(root)!r} has split folders ({', '.join(found)}) {fault}; arrange images as {_LAYOUTS}, or, if "
        "these are classes, rename their folders or list the images in a CSV file"
    )


def _class_images(folder: Path) -> list[Path]:
    """The images of a class; refuses a class that is divided into splits, which would otherwise be merged."""
    images, depth = images_below(folder), len(folder.parts)
    subfolders = sorted({image.parts[depth] for image in images if len(image.parts) > depth + 1})
    inside = {name: split for name in subfolders if (split := find_split(name))}
    if len(set(inside.values())) > 1:
        raise DataError(
            f"class folder {str(folder)!r} has split folders ({', '.join(inside)}) inside; arrange images as "
            f"{_LAYOUTS}, or, if this folder is the data set, give its path"
        )
    return images


def _read_csv(path: Path) -> Iterator[tuple[str, ...]]:
    """Path, label and split of each row of a manifest; an empty string for a missing value."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = _find_columns(path, reader.fieldnames or ())
            for row in reader:
                yield _values(row, columns)
    except (UnicodeDecodeError, csv.Error) as cause:
        raise DataError(f"cannot read manifest {path} ({cause}); save it as CSV in UTF-8") from cause


def _read_parquet(path: Path) -> Iterator[tuple[str, ...]]:

    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("a Parquet manifest needs pyarrow: pip install pyarrow, or save it as CSV") from cause
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"cannot read manifest {path} ({cause}); save it again as Parquet") from cause
    columns = _find_columns(path, table.column_names)
    for row in table.select([column for column in columns if column is not None]).to_pylist():
        yield _values(row, columns)


def _find_columns(path: Path, names: Sequence[str]) -> list[str | None]:
    """The manifest's own names of its columns path, label and split; None for a missing split."""
    found: list[str | None] = []
    for column in _COLUMNS:
        matches = [column] if column in names else [name for name in names if name.strip().casefold() == column]
        if len(matches) > 1 or (not matches and column != "split"):
            raise DataError(
                f"manifest {path} needs one column {column!r} and has {len(matches)} (its columns are {list(names)}); "
                f"name them {','.join(_COLUMNS)}"
            )
        found.append(matches[0] if matches else None)
    return found


def _values(row: Mapping[str, Any], columns: Sequence[str | None]) -> tuple[str, ...]:
    return tuple("" if column is None or row[column] is None else str(row[column]) for column in columns)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones, in sorted order; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
