"""The list of tasks in a run's `config.yaml`, which changes while the rest of the file stays as it is."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

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
