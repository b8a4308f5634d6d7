"""Where the images of a task are: found, downloaded when they are needed, and checked."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recast_pl.data.cache import bad_images_message, find_bad_images
from recast_pl.data.catalogue import CATALOGUE, DataSet, RemoteFile
from recast_pl.data.datasets import ImageSource, open_folder, open_manifest, open_torchvision, torchvision_class
from recast_pl.data.download import extract, fetch, is_archive, move_into
from recast_pl.data.tasks import SPLITS, TaskConfig
from recast_pl.errors import DataError
from recast_pl.files import exclusive

_TORCHVISION = "torchvision/"


def open_source(task: TaskConfig, root: Path) -> ImageSource:
    """Finds the images of a task, without downloading or decoding any.

    Args:
        task: The task.
        root: Folder of data sets known by name.

    Raises:
        DataError: If the task, a folder or a class has no images.
    """
    path = None if task.path is None else Path(task.path).expanduser()
    if path is not None and task.dataset is None:
        return open_manifest(path) if path.suffix.lower() in (".csv", ".parquet") else open_folder(path)
    name, root = dataset_name(task), path or root
    if name.startswith(_TORCHVISION):
        return open_torchvision(name.removeprefix(_TORCHVISION), path or _own_folder(root, name), task.args)
    if not CATALOGUE[name].is_present(root):
        raise DataError(
            f"data set {name!r} is not in {str(root)!r}; get it with 'python -m recast_pl data prepare {name}'"
        )
    return CATALOGUE[name].open(root, task.args)


def prepare_source(task: TaskConfig, root: Path) -> None:
    """Downloads what a task needs and what is not on disk; one process at a time, others wait for it.

    Args:
        task: The task.
        root: Folder of data sets known by name.

    Raises:
        DataError: If it cannot be had.
    """
    if task.path is not None and task.dataset is None:
        return
    name = dataset_name(task)
    root = root if task.path is None else Path(task.path).expanduser()
    try:
        if name.startswith(_TORCHVISION):
            _prepare_torchvision(name, root if task.path is not None else _own_folder(root, name), task.args)
        elif not CATALOGUE[name].is_present(root):
            with exclusive(root / f".{name}.lock", f"preparing {name}"):
                _download(name, CATALOGUE[name], root)
    except OSError as cause:
        raise DataError(f"cannot write to {root} ({cause}); set data.root to a folder with room and rights") from cause


def dataset_name(task: TaskConfig) -> str:
    """The data set that a task names.

    Raises:
        DataError: If there is none of that name, or it does not take the task's arguments.
    """
    name = task.dataset or task.name
    if name.startswith(_TORCHVISION):
        torchvision_class(name.removeprefix(_TORCHVISION), task.args)
    elif name in CATALOGUE:
        CATALOGUE[name].check_args(task.args)
    else:
        raise DataError(
            f"unknown task {name!r}; known by name: {', '.join(CATALOGUE)}, torchvision/CLASS. For images of your own "
            f"give a path: {{name: {task.name}, path: FOLDER}} with FOLDER/CLASS/IMAGE"
        )
    return name


def source_faults(name: str, root: Path) -> list[str]:
    """What is wrong with a data set on disk: counts that differ from the published ones, images that cannot be read.

    Args:
        name: A data set of the catalogue, or `torchvision/CLASS`.
        root: Folder of data sets.

    Returns:
        A line for each fault; none if it is whole.

    Raises:
        DataError: If it is not on disk.
    """
    try:
        source = open_source(TaskConfig("verified", dataset=name), root)
    except DataError as error:
        if name in CATALOGUE and CATALOGUE[name].is_present(root):
            return [str(error)]
        raise
    faults = _count_faults(CATALOGUE[name], source, ("classes", "", *SPLITS)) if name in CATALOGUE else []
    bad = find_bad_images(source)
    return faults + ([bad_images_message(name, bad, len(source.labels))] if bad else [])


def _count_faults(row: DataSet, source: ImageSource, what: Sequence[str]) -> list[str]:
    wanted = {"classes": row.classes} | dict(row.images)
    found = {"classes": len(source.classes)} | Counter(source.splits)
    names = {"classes": "classes", "": "images in no split"} | {split: f"{split} images" for split in SPLITS}
    return [
        f"{found.get(key, 0):,} {names[key]} rather than {wanted.get(key, 0):,}"
        for key in what
        if found.get(key, 0) != wanted.get(key, 0)
    ]


def _prepare_torchvision(name: str, root: Path, args: Mapping[str, Any]) -> None:
    """Downloads into a folder beside, so that what an interrupted download leaves is not taken for the whole."""
    cls = name.removeprefix(_TORCHVISION)
    if _opens(cls, root, args):
        return
    with exclusive(root.parent / f".{root.name}.lock", f"preparing {name}"):
        if _opens(cls, root, args):  # another process has prepared it meanwhile
            return
        part = root.with_name(f".{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            open_torchvision(cls, part, args, download=True)
            move_into(root, part)
        except DataError as error:
            raise DataError(str(error).replace(str(part), str(root))) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _opens(cls: str, root: Path, args: Mapping[str, Any]) -> bool:
    try:
        open_torchvision(cls, root, args)
    except DataError:
        return False
    return True


def _own_folder(root: Path, name: str) -> Path:
    """Below which torchvision may keep files as it likes."""
    return root / name.removeprefix(_TORCHVISION)


def _download(name: str, row: DataSet, root: Path) -> None:
    if not row.files and not row.is_present(root):
        raise DataError(
            f"data set {name!r} cannot be downloaded: {row.note}; its files are expected in {root / row.present}"
        )
    placed: list[Path] = []
    for file in row.files:
        if not file.is_present(root):
            placed += _place(file, root)
    try:
        _check_counts(name, row, root)
    except DataError:
        for path in placed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _check_counts(name: str, row: DataSet, root: Path) -> None:
    source = row.open(root, {})
    faults = _count_faults(
        row, source, ("classes", *SPLITS)
    )  # what is in no split is of no use to most: `verify` tells
    if faults:
        raise DataError(f"data set {name!r} in {root} is not whole: {', '.join(faults)}; prepare it again")


def _place(file: RemoteFile, root: Path) -> list[Path]:
    """Puts a file, or what it holds, in place; returns what has come."""
    folder = root / file.folder
    target = folder / file.url.rpartition("/")[2].partition("?")[0]
    was_there = target.exists()
    fetch(file.url, target, file.md5)
    if not is_archive(target.name):
        return [target]
    try:
        entries = extract(target, folder, Path(file.provides).relative_to(file.folder).parts[0])
    except DataError as error:
        if not was_there:
            target.unlink()  # it is of no use; what the user put there stays
        raise DataError(f"{error} (from {file.url})") from error
    if not was_there:
        target.unlink()
    return entries
