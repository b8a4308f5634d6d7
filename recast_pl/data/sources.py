"""Finds the images of a task, downloads them if needed, and checks them."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recast_pl.data.cache import bad_images_message, find_bad_images
from recast_pl.data.catalogue import CATALOGUE, DataSet, RemoteFile
from recast_pl.data.datasets import ImageSource
from recast_pl.data.download import ARCHIVES, extract, fetch, move_into
from recast_pl.data.folders import open_folder
from recast_pl.data.manifests import SUFFIXES, open_manifest
from recast_pl.data.tasks import SPLITS, TaskConfig
from recast_pl.data.torchvision_sets import open_torchvision, torchvision_class
from recast_pl.errors import DataError
from recast_pl.files import exclusive

_TORCHVISION = "torchvision/"


def open_source(task: TaskConfig, root: Path, least: int = 2) -> ImageSource:
    """Finds the images of a task, without downloading or decoding any.

    Args:
        task: The task.
        root: Folder of data sets known by name.
        least: Classes that a folder or manifest must have.

    Raises:
        DataError: If the images are missing or not arranged as they must be.
    """
    path = task.own_path
    is_folder = path is not None and not (path.suffix.lower() in SUFFIXES and not path.is_dir())
    if task.classes != "top" and not is_folder:
        raise DataError(f"task {task.name!r} has classes: {task.classes}, which only a folder of images takes")
    if path is not None:
        return open_folder(path, task.classes, least) if is_folder else open_manifest(path, least)
    name, folder = dataset_name(task), _folder_of(task, root)
    if name.startswith(_TORCHVISION):
        return open_torchvision(name.removeprefix(_TORCHVISION), folder, task.args)
    if not CATALOGUE[name].is_present(folder):
        raise DataError(
            f"data set {name!r} is not in {str(folder)!r}; get it with 'python -m recast_pl data prepare {name}'"
        )
    return CATALOGUE[name].open(folder, task.args)


def prepare_source(task: TaskConfig, root: Path) -> None:
    """Downloads what a task needs and is not on disk. If several processes do so, the others wait for the first.

    The arguments are those of `open_source`.

    Raises:
        DataError: If it cannot be downloaded or written.
    """
    if task.own_path is not None:
        return
    name, folder = dataset_name(task), _folder_of(task, root)
    try:
        if name.startswith(_TORCHVISION):
            _prepare_torchvision(name, folder, task.args)
        elif not CATALOGUE[name].is_present(folder):
            with exclusive(folder / f".{name}.lock", f"preparing {name}"):
                _download(name, CATALOGUE[name], folder)
    except OSError as cause:
        raise DataError(
            f"cannot write to {folder} ({cause}); set data.root to a folder that you may write and that has space"
        ) from cause


def is_present(task: TaskConfig, root: Path) -> bool:
    """Whether the images of a task are where they should be, whether or not they can be used; arguments as above."""
    if task.own_path is not None:
        return task.own_path.exists()
    try:
        open_source(task, root)
    except DataError:
        return False
    return True


def dataset_name(task: TaskConfig) -> str:
    """The data set that a task names; raises DataError if there is none, or it does not take the task's arguments."""
    name = task.dataset or task.name
    if name.startswith(_TORCHVISION):
        torchvision_class(name.removeprefix(_TORCHVISION), task.args)
    elif name in CATALOGUE:
        CATALOGUE[name].check_args(task.args)
    else:
        raise DataError(
            f"unknown task {name!r}; known by name: {', '.join(CATALOGUE)}, torchvision/CLASS. For your own images "
            f"give a path: {{name: {task.name}, path: FOLDER}} with FOLDER/CLASS/IMAGE"
        )
    return name


def source_faults(name: str, root: Path) -> list[str]:
    """Checks a data set on disk: its counts against the published ones, and whether its images can be read.

    Args:
        name: A data set of the catalogue, or `torchvision/CLASS`.
        root: Folder of data sets.

    Returns:
        One line for each fault; an empty list if the data set is complete.

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


def _folder_of(task: TaskConfig, root: Path) -> Path:
    """The folder of a task's data set. Each torchvision class has its own, where it may name files as it likes."""
    if task.path is not None:
        return Path(task.path).expanduser()
    name = task.dataset or task.name
    return root / name.removeprefix(_TORCHVISION) if name.startswith(_TORCHVISION) else root


def _count_faults(data_set: DataSet, source: ImageSource, what: Sequence[str]) -> list[str]:
    wanted = Counter(data_set.images) + Counter(classes=data_set.classes)
    found = Counter(source.splits) + Counter(classes=len(source.classes))
    names = {"classes": "classes", "": "images without split"} | {split: f"{split} images" for split in SPLITS}
    return [f"{found[key]:,} {names[key]} rather than {wanted[key]:,}" for key in what if found[key] != wanted[key]]


def _prepare_torchvision(name: str, root: Path, args: Mapping[str, Any]) -> None:
    """Downloads into a separate folder first, so that an interrupted download is not taken for a complete data set."""
    cls = name.removeprefix(_TORCHVISION)
    if _opens(cls, root, args):
        return
    with exclusive(root.parent / f".{root.name}.lock", f"preparing {name}"):
        if _opens(cls, root, args):  # another process has prepared it in the meantime
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


def _download(name: str, data_set: DataSet, root: Path) -> None:
    """Downloads the missing files of a data set; removes them again if the counts are wrong."""
    if not data_set.files and not data_set.is_present(root):
        place = root / data_set.present
        raise DataError(f"data set {name!r} cannot be downloaded: {data_set.note}; its files are expected in {place}")
    missing = [file for file in data_set.files if not (root / file.provides).exists()]
    placed = [path for file in missing for path in _place(file, root)]
    try:
        _check_counts(name, data_set, root)
    except DataError:
        for path in placed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _check_counts(name: str, data_set: DataSet, root: Path) -> None:
    # images without split, which few runs use, are counted by `source_faults` only
    faults = _count_faults(data_set, data_set.open(root, {}), ("classes", *SPLITS))
    if faults:
        raise DataError(f"data set {name!r} in {root} is not complete: {', '.join(faults)}; prepare it again")


def _place(file: RemoteFile, root: Path) -> list[Path]:
    """Downloads a file and, if it is an archive, unpacks it; returns what is new."""
    folder = root / file.folder
    target = folder / file.url.rpartition("/")[2].partition("?")[0]
    is_users = target.exists()  # then it stays
    fetch(file.url, target, file.md5)
    if not target.name.endswith(ARCHIVES):
        return [target]
    try:
        entries = extract(target, folder, Path(file.provides).relative_to(file.folder).parts[0])
    except DataError as error:
        if not is_users:
            target.unlink()  # useless, where an archive that met a full disk is not
        raise DataError(f"{error} (from {file.url})") from error
    if not is_users:
        target.unlink()
    return entries
