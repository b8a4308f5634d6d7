"""Takes the tasks of copies of a run into it, with what `config.yaml` and the results say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recast_pl.config.changing import refresh, task_names
from recast_pl.config.task_list import changed_tasks, put_task
from recast_pl.runs.folder import RunFolder, config_name
from recast_pl.runs.layout import plain_yaml
from recast_pl.runs.merging import NewTask, copy_files, find_new_tasks
from recast_pl.runs.removal import check_apart


def merge(folder: RunFolder, copies: Sequence[RunFolder]) -> list[str]:
    """Puts the tasks of copies of a run into it that it does not have, and makes its results again.

    Args:
        folder: The run.
        copies: Copies of it, which stay as they are.

    Returns:
        Names of the tasks that are new, in order of copies.

    Raises:
        RunError: If a folder holds no run, its tasks share weights, or different tasks have one name.
        PatchError: If a copy is of another base or method, or a file of a new task is damaged.
    """
    for each in (folder, *copies):
        task_names(each)
        check_apart(each, "'merge'")
    new = find_new_tasks(folder, copies)
    for task in new:
        _take(folder, task)
    refresh(folder)
    return [task.files.task for task in new]


def _take(folder: RunFolder, task: NewTask) -> None:
    """Copies a task behind all others, with the configurations that its record names."""
    for name in task.files.load_record().get("configs", ()):
        for path in task.copy.path.glob("config*.yaml"):
            if config_name(path.read_bytes()) == name:
                folder.keep_config(path.read_bytes(), replace=False)
    with changed_tasks(folder) as tasks:
        put_task(tasks, _entry(task))
        names = [entry["name"] for entry in tasks]
        copy_files(task.files, folder.files_of(names)[names.index(task.files.task)])


def _entry(task: NewTask) -> dict[str, Any]:
    """The entry of a task in the list of its copy, with a path that does not depend on where that run was started."""
    listed = plain_yaml(task.copy.config)["data"]["tasks"]
    entry = next((dict(entry) for entry in listed if entry["name"] == task.files.task), {"name": task.files.task})
    starts, path = task.copy.start_folders(), entry.get("path")
    if path is not None and not Path(path).expanduser().is_absolute() and starts:
        entry["path"] = str(starts[-1] / path)
    return entry
