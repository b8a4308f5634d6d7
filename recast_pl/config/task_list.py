"""The list of tasks in a run's `config.yaml`, which changes while the rest of the file stays as it is."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from recast_pl.config.files import with_run_config
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.tasks import TaskConfig
from recast_pl.errors import RunError
from recast_pl.files import write_atomic
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.layout import plain_yaml
from recast_pl.runs.reservation import changing

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@contextmanager
def changed_tasks(folder: RunFolder) -> Iterator[list[dict[str, Any]]]:
    """Yields the entries of `data.tasks` of a run to be changed in place; they are written when the block ends.

    Other processes that change them wait, so that what one adds is not lost by another.

    Args:
        folder: The run folder, which has a `config.yaml`.

    Raises:
        RunError: If `fit` is training all tasks in the folder, the order of tasks depends on their number, or
            `config.yaml` is damaged.
    """
    with changing(folder.path):
        content = plain_yaml(folder.config)
        if content["data"].get("order_seed") is not None:
            raise RunError(
                f"data.order_seed is {content['data']['order_seed']} in {folder.config}, which puts tasks in another "
                "order when their number changes; list them in the order wanted, in a run without it"
            )
        tasks = content["data"]["tasks"]
        before = copy.deepcopy(tasks)
        yield tasks
        if tasks != before:
            write_atomic(folder.config, _text(content))


def with_tasks(path: Path, choose: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> str:
    """The text of a run's configuration with some of its tasks: parsing takes milliseconds for each.

    Args:
        path: The `config.yaml`.
        choose: Returns the entries of `data.tasks` to have instead of all.

    Raises:
        RunError: If it is damaged.
    """
    content = plain_yaml(path)
    content["data"]["tasks"] = choose(content["data"]["tasks"])
    return _text(content)


def with_task_of_run(words: Sequence[str], option: str) -> list[str]:
    """Puts the run's configuration before the options of a command that changes the one task that an option names.

    Other tasks are left out of it, unless options are about tasks, too, or their order depends on their number.

    Raises:
        RunError: As `with_run_config`.
    """
    completed = with_run_config(words)
    given = dict(itertools.pairwise(part for word in words for part in word.split("=", 1)))
    others = any(word.startswith("--data.tasks") for word in words)
    if completed == list(words) or option not in given or others:
        return completed
    content = plain_yaml(RunFolder(given["--run_dir"]).config)
    if content["data"].get("order_seed") is not None:
        return completed
    content["data"]["tasks"] = [task for task in content["data"]["tasks"] if task["name"] == given[option]]
    return ["--config", _text(content), *words]


def name_all_tasks(data: SequentialTaskDataModule, folder: RunFolder) -> None:
    """Puts the names of all tasks that a run lists now before new ones: no more is needed of those kept apart."""
    known = {task.name: task for task in data.tasks}
    listed = [task["name"] for task in plain_yaml(folder.config)["data"]["tasks"]]
    data.tasks = [known.pop(name) if name in known else TaskConfig(name) for name in listed] + list(known.values())


def _text(content: dict[str, Any]) -> str:
    """As jsonargparse writes it, so that only the lines of tasks change."""
    text: str = yaml.dump(content, Dumper=_DUMPER, sort_keys=False, default_flow_style=False, allow_unicode=True)
    return text


def put_task(tasks: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Puts an entry in the place of the one with its name, or at the end."""
    for index, other in enumerate(tasks):
        if other["name"] == entry["name"]:
            tasks[index] = entry
            return
    tasks.append(entry)
