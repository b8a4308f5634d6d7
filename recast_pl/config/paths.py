"""Finds the files that the configuration of a run names, although run, files or working folder have moved."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import DataError, RunError
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.versions import added_images

_PATHS = ("weights", "decomposition", "path", "root")  # the options that take a path

NO_FILES = ("hub", "random")
"""Weights that are not a file."""

MODEL_FILES = ("weights", "decomposition")
"""Files of the model, whose content the fingerprint of the base tells apart."""


def locate_paths(value: Any, folders: Sequence[Path], key: str = "") -> Any:
    """Changes relative paths that are not in the working folder to those in the first folder that has them.

    A file of the model that is nowhere, whose path may also be absolute, is looked for by its last part.

    Args:
        value: A configuration, or a part of it; it is changed in place.
        folders: Where to look after the working folder.
        key: The option that has this value.

    Returns:
        The value.
    """
    entries = vars(value) if isinstance(value, Namespace) else value
    if isinstance(entries, dict):
        for name, entry in entries.items():
            entries[name] = locate_paths(entry, folders, name)
    elif isinstance(value, list | tuple):
        return type(value)(locate_paths(entry, folders) for entry in value)
    elif key in _PATHS and isinstance(value, str) and value not in NO_FILES:
        path = Path(value).expanduser()
        if path.exists():
            return value
        names = [path, Path(path.name)] if key in MODEL_FILES else [path]
        places = [folder / name for name in names for folder in folders]
        return next((str(place) for place in places if place.exists()), value)
    return value


def locate_data(data: dict[str, Any] | Namespace, folders: Sequence[Path]) -> None:
    """Does the same for the `data` of a configuration, including the default folder of data sets."""
    if data.get("root") is None and "RECAST_PL_DATA" not in os.environ:
        data["root"] = "data"
    locate_paths(data, folders)


def move_images(data: dict[str, Any], root: str) -> None:
    """Changes the `data` of a configuration to images that were moved to another folder.

    Args:
        data: It is changed in place.
        root: The folder of data sets known by name. A task's own path is looked for in it, in full if it is relative,
            and then by its last part.
    """
    data["root"] = root
    for task in data.get("tasks") or ():
        if task.get("path") is not None:
            path, folder = Path(task["path"]), Path(root).expanduser()
            whole = folder / path
            task["path"] = str(whole if not path.is_absolute() and whole.exists() else folder / path.name)


def add_images(data: SequentialTaskDataModule, folder: RunFolder, root: str | None = None) -> None:
    """Adds the images that tasks of a run were extended with, as their records name them.

    Args:
        data: The run's tasks.
        folder: The run folder.
        root: Folder that the images were moved to; None if they were not.
    """
    for task, paths in added_images(folder, [task.name for task in data.tasks]).items():
        entries: dict[str, Any] = {"tasks": [{"path": path} for path in paths]}
        if root is not None:
            move_images(entries, root)
        locate_paths(entries, folder.start_folders())
        data.add_images(task, [entry["path"] for entry in entries["tasks"]])


def recorded_path(folder: RunFolder, path: str) -> str:
    """A path as a record of a run names it: relative to the folder that the run was started in, or else in full."""
    place = Path(path).expanduser()
    from_start = [start for start in folder.start_folders() if (start / place).resolve() == place.resolve()]
    return str(place if from_start else place.resolve())


def check_images(data: SequentialTaskDataModule) -> None:
    """Raises DataError, naming the option that helps, if a folder or manifest of a run's tasks is not there."""
    for task in data.tasks:
        path = task.own_path
        if path is not None and not path.exists():
            raise DataError(
                f"the images of task {task.name!r} are not at {path}; if they were moved, name the folder that has "
                f"{path.name!r} now: --data_root FOLDER"
            )


def check_weights(model: Any, config: Path, folders: Sequence[Path]) -> None:
    """Raises RunError if a file of pretrained weights is missing that the `model` of a configuration names."""
    if isinstance(model, Mapping):
        weights = model.get("weights")
        if isinstance(weights, str) and weights not in NO_FILES and not Path(weights).expanduser().is_file():
            where = " or in ".join(["the working folder", *dict.fromkeys(map(str, folders))])
            raise RunError(
                f"{config} needs the weights {weights!r}, not found in {where}; put them there, or correct "
                f"model.init_args.backbone.weights in {config}"
            )
        for entry in model.values():
            check_weights(entry, config, folders)
