"""The command `rename`: gives a trained task of a run another name."""

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.changing import refresh, task_names
from recast_pl.config.task_list import changed_tasks
from recast_pl.errors import RunError
from recast_pl.rules import TASK_RULE, is_task_name
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.removal import check_apart, rename_task
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str, required=True, help="Name of a trained task.")
    parser.add_argument("--name", type=str, required=True, help="Its new name.")


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the files of the task again under the new name, and makes the results again."""
    folder, old, new = RunFolder(config.run_dir), config.task, config.name
    check_apart(folder, "'rename'")
    finished = folder.finished()
    interrupted = old not in finished and new in finished and old in task_names(folder)
    if old not in finished and not interrupted:
        raise RunError(f"task {old!r} is not trained in {folder.path}; trained are {', '.join(finished)}")
    if not is_task_name(new):
        raise RunError(f"--name {new!r:.80} cannot name a file; choose {TASK_RULE}")
    others = {name.casefold() for name in task_names(folder) if name != old}
    if new.casefold() in others:
        raise RunError(f"--name {new!r} is the name of another task; choose one that is free")
    with changed_tasks(folder) as tasks:
        if not interrupted:
            rename_task(folder, old, new)
        for task in tasks:
            if task["name"] == old:
                task.update(_renamed(task, new))
    refresh(folder)
    open_console().print(f"task {old} of {folder.path} is called {new} now", soft_wrap=True)
    return 0


def _renamed(task: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What changes in the entry of a task: its images and their split stay those of its first name."""
    old = task["name"]
    by_name = task.get("path") is None and task.get("dataset") is None
    return {"name": name, "split_as": task.get("split_as") or old} | ({"dataset": old} if by_name else {})
