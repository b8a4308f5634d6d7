"""The user's own folders of images: which folders are splits, which are classes, and what is left out."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from recast_pl.data.datasets import LAYOUTS, ImageSource, LabelledFile, make_source
from recast_pl.data.images import files_below, is_image_file, is_visible
from recast_pl.data.tasks import SPLITS, ClassFolders, find_split
from recast_pl.errors import DataError


class _File(NamedTuple):
    """A file in the task's folder: its path, the names of the folders that lead to it, and its own name."""

    path: Path
    folders: tuple[str, ...]
    name: str


def open_folder(root: Path, classes: ClassFolders = "top", least: int = 2) -> ImageSource:
    """Finds images in `CLASS/IMAGE`, or in `train|val|test/CLASS/IMAGE`.

    Images may lie at any depth below their class folder, and links to folders are followed. Folders are splits if all
    folders with images have names of splits (`train`, `training`, `val`, `valid`, `validation`, `dev`, `test`,
    `testing`, `eval`, in any case) and the images lie in folders inside. If folders with other names stand beside and
    all images lie directly in them, all are classes: `bus`, `car` and `train` are three. Anything else is refused.

    Args:
        root: The folder.
        classes: As in `TaskConfig`.
        least: As in `make_source`.

    Raises:
        DataError: If the folder is missing, does not have one of the two layouts, or lacks training images of a class.
    """
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else f"does not exist (from {Path.cwd()})"
        remedy = "correct the task's path, to a folder or a .csv, .tsv or .parquet file"
        raise DataError(f"folder {str(root)!r} {reason}; {remedy}")
    files = [_File(path, path.parent.relative_to(root).parts, path.name) for path in files_below(root)]
    images = [file for file in files if is_image_file(file.path)]
    splits, notes = _find_splits(root, images)
    depth = 1 if splits else 0  # of class folders
    labelled = [file for file in images if len(file.folders) > depth]
    _check_inner_splits(root, labelled, depth)
    if classes == "leaf":
        _check_leaves(root, labelled)
    rows = [
        LabelledFile(
            file.path,
            file.folders[depth] if classes == "top" else "/".join(file.folders[depth:]),
            splits[file.folders[0]] if splits else "",
            "/".join((*file.folders, file.name)),
        )
        for file in labelled
    ]
    rows.sort(key=lambda row: (row.label, SPLITS.index(row.split) if row.split else 0))  # stable: by path, then
    parents = [root / name for name in splits] if splits else [root]
    empty = [name for parent in parents for name in _subfolders(parent)] if classes == "top" else []
    return make_source("folder", root, rows, empty, [*notes, *_left_out(root, files, labelled, depth)], least)


def _find_splits(root: Path, images: Iterable[_File]) -> tuple[dict[str, str], list[str]]:
    """The split that each folder means, none if folders are classes; and lines about unusual names of classes."""
    direct = {file.folders[0] for file in images if len(file.folders) == 1}
    nested = {file.folders[0] for file in images if len(file.folders) > 1}
    found = {name: split for name in _subfolders(root) if (split := find_split(name))}
    others = sorted((direct | nested) - found.keys())
    if not found:
        return {}, []
    if others and not nested & found.keys():
        names = " and ".join(map(repr, found))
        return {}, [f"{names} in {str(root)!r} is read as a class, because no folders of images are inside"]
    if others:
        fault = f"beside other folders of images, such as {others[0]!r}"
    elif "train" not in found.values():
        fault = "but no folder 'train'"
    elif len(found) > len(set(found.values())):
        fault = "and two of them name the same split"
    elif not any(found[name] == "train" for name in nested):
        fault = "but no folders of classes inside of the one for training"
    else:
        return found, []
    raise DataError(
        f"folder {str(root)!r} has split folders ({', '.join(found)}) {fault}; arrange images as {LAYOUTS}, or, if "
        "these are classes, rename their folders or list the images in a CSV file"
    )


def _check_inner_splits(root: Path, images: Iterable[_File], depth: int) -> None:
    """Refuses a class folder that is divided into splits, which would otherwise be merged."""
    inside = defaultdict(set)
    for folders in {file.folders for file in images}:
        for level in range(depth + 1, len(folders)):
            if find_split(folders[level]):
                inside[folders[:level]].add(folders[level])
    for parent, names in sorted(inside.items()):
        if len({find_split(name) for name in names}) > 1:
            raise DataError(
                f"class folder {str(root.joinpath(*parent))!r} has split folders ({', '.join(sorted(names))}) inside; "
                f"arrange images as {LAYOUTS}, or, if this folder is the data set, give its path"
            )


def _check_leaves(root: Path, images: Iterable[_File]) -> None:
    """Refuses images beside folders of images, which belong to no innermost folder."""
    holders = {file.folders for file in images}
    for folders in sorted(holders):
        for level in range(1, len(folders)):
            if folders[:level] in holders:
                raise DataError(
                    f"folder {str(root.joinpath(*folders[:level]))!r} has images beside folders of images such as "
                    f"{folders[level]!r}, so it is not an innermost folder; move these images, or set the task's "
                    "classes to top"
                )


def _left_out(root: Path, files: Sequence[_File], used: Sequence[_File], depth: int) -> list[str]:
    """A line that counts and names the files that are left out; no line if there are none."""
    reasons: Mapping[str, list[_File]] = defaultdict(list)
    taken = {file.path for file in used}
    for file in files:
        if file.path in taken:
            continue
        if is_image_file(file.path):
            reasons["images outside of class folders"].append(file)
        elif len(file.folders) > depth:
            reasons[f"{file.path.suffix.lower()} files" if file.path.suffix else "files without an ending"].append(file)
    if not reasons:
        return []
    count = sum(map(len, reasons.values()))
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))[:5]
    parts = [
        f"{len(found):,} {reason}, such as {'/'.join((*found[0].folders, found[0].name))!r}" for reason, found in most
    ]
    more = f"; and {len(reasons) - len(most)} more kinds" if len(reasons) > len(most) else ""
    return [f"{count:,} files of {str(root)!r} are left out: {'; '.join(parts)}{more}"]


def _subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, in sorted order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_visible(path.name))
