"""The command `remove`: takes a task out of a run."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.changing import refresh, task_names
from recast_pl.config.task_list import changed_tasks
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.removal import check_apart, remove_files, remove_task
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str, required=True, help="Name of the task, trained or not.")


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Removes the files of the task and its entry in the list, and makes the results again."""
    folder = RunFolder(config.run_dir)
    check_apart(folder, "'remove'")
    names, received = task_names(folder), folder.received.finished_names()
    if config.task not in [*names, *received]:
        others = ", ".join([*names, *received])
        raise RunError(f"no task of {folder.path} is named {config.task!r}; the tasks are {others}")
    if config.task in received:
        remove_files(folder.received.finished()[config.task])
    if config.task in names:
        _remove(folder, config.task, names)
    open_console().print(f"task {config.task} is removed from {folder.path}", soft_wrap=True)
    return 0


def _remove(folder: RunFolder, name: str, names: Sequence[str]) -> None:
    with changed_tasks(folder) as tasks:
        remove_task(folder, folder.files_of(names)[names.index(name)])
        tasks[:] = [task for task in tasks if task["name"] != name]
    refresh(folder)
