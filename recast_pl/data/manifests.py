"""The user's own lists of images, as CSV, TSV or Parquet."""

import csv
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from recast_pl.data.datasets import ImageSource, LabelledFile, make_source
from recast_pl.data.tasks import find_split, normal_text
from recast_pl.errors import DataError

SUFFIXES = (".csv", ".tsv", ".parquet")

_COLUMNS = ("path", "label", "split")

_Table = tuple[Sequence[str], Sequence[Mapping[Any, Any]]]  # names of columns, and rows


def open_manifest(path: Path, least: int = 2) -> ImageSource:
    """Finds images that a CSV, TSV or Parquet file lists in the columns `path`, `label` and, optionally, `split`.

    Paths are relative to the manifest's folder, or absolute. Classes are the labels, as text, in sorted order. Spaces
    around values do not count. Names of columns and splits are recognised in any case, and splits by the same names
    as for `open_folder`.

    Args:
        path: The file.
        least: As in `make_source`.

    Raises:
        DataError: If the file cannot be read, a row is wrong, or a class has no training image.
    """
    if not path.is_file():
        raise DataError(f"manifest {str(path)!r} does not exist (from {Path.cwd()}); correct the task's path")
    names, table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)
    columns = _find_columns(path, names)
    if columns[2] is None:
        _check_no_splits(path, names, table)
    rows = [_read_row(path, number, row, columns) for number, row in enumerate(table, 1)]
    splits = [row.split for row in rows]
    if any(splits) and not all(splits):
        raise DataError(
            f"manifest {path}, row {splits.index('') + 1} has no split and other rows have one; give all rows a split, "
            "or none"
        )
    _check_repeated(path, rows)
    return make_source("manifest", path, rows, least=least)


def _read_row(path: Path, number: int, row: Mapping[Any, Any], columns: Sequence[str | None]) -> LabelledFile:
    values = [None if column is None else row[column] for column in columns]
    # a missing number is NaN, the only value that differs from itself
    file, label, name = ("" if value is None or value != value else str(value) for value in values)  # noqa: PLR0124
    file, split = file.strip(), find_split(name) if name.strip() else ""
    if None in row:
        raise DataError(
            f"manifest {path}, row {number} has more values than the header has columns; put values that contain a "
            "separator into double quotes"
        )
    if not file or not label.strip() or split is None or "\0" in file:
        raise DataError(
            f"manifest {path}, row {number}: path {file!r}, label {label!r}, split {name!r}; "
            "give each row a path, a label, and a split of train, val or test, or leave out all splits"
        )
    return LabelledFile(path.parent / file, label, split, Path(os.path.normpath(file)).as_posix())


def _check_repeated(path: Path, rows: Sequence[LabelledFile]) -> None:
    """Refuses a file that is listed twice, also under two spellings of its path."""
    real_folder = cache(os.path.realpath)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        place = str(Path(real_folder(row.path.parent), row.path.name))
        if place in seen:
            before = seen[place]
            spelling = f", as {str(rows[before - 1].path)!r}" if rows[before - 1].path != row.path else ""
            raise DataError(
                f"manifest {path} lists {str(row.path)!r} more than once, in row {before}{spelling} and in row "
                f"{number}; list each image once"
            )
        seen[place] = number


def _read_text(path: Path) -> _Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True, strict=True)
            return reader.fieldnames or (), list(reader)
    except (UnicodeDecodeError, csv.Error) as cause:
        raise DataError(
            f"cannot read manifest {path} ({cause}); save it as {path.suffix[1:].upper()} in UTF-8"
        ) from cause


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("a Parquet manifest needs pyarrow: pip install pyarrow, or save it as CSV") from cause
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"cannot read manifest {path} ({cause}); save it again as Parquet") from cause
    names = table.column_names
    columns = [column for column in _find_columns(path, names) if column is not None]
    if len(columns) < len(_COLUMNS):  # then other columns are checked, too
        columns = [name for name in names if names.count(name) == 1]
    return names, table.select(columns).to_pylist()


def _find_columns(path: Path, names: Sequence[str]) -> list[str | None]:
    """The manifest's own names of its columns path, label and split; None for a missing split."""
    found: list[str | None] = []
    for column in _COLUMNS:
        exact = [name for name in names if name == column]
        matches = exact or [name for name in names if normal_text(name).casefold() == column]
        if len(matches) > 1 or (not matches and column != "split"):
            raise DataError(
                f"manifest {path} needs one column {column!r} and has {len(matches)} (its columns are {list(names)}); "
                f"name them {','.join(_COLUMNS)}"
            )
        found.append(matches[0] if matches else None)
    return found


def _check_no_splits(path: Path, names: Sequence[str], table: Sequence[Mapping[Any, Any]]) -> None:
    """Refuses a column of splits that has another name, whose test images would otherwise be trained on."""
    for name in names:
        values = {str(row.get(name)) for row in table}
        if values and all(find_split(value) for value in values):
            raise DataError(f"manifest {path} has no column 'split', but {name!r} holds splits; name it split")
