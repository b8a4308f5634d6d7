"""Which tasks a run has, and how their files are named: POSITION_TASK.

It imports nothing heavy, so that `list` answers at once.
"""

import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recast_pl.errors import RunError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first one is far quicker, where it was built

PATCH_SUFFIXES = (".safetensors", ".recast")
"""The endings of patches: as all tensors are kept, and compact."""


RECEIVED = "received"
"""The folder of tasks that a server has received, arranged like a run folder, without records."""


def task_file_name(position: int, task: str) -> str:
    """The name that all files of a task have in their folders, without the ending."""
    return f"{position:02d}_{task}"


def patch_files(run: Path) -> list[tuple[int, str, Path]]:
    """The position, task and patch of each finished task, in the order of the stream.

    Raises:
        RunError: If a patch has no position in its name.
    """
    found = []
    for path in _visible(run / "patches"):
        if path.suffix not in PATCH_SUFFIXES:
            continue
        position, task = _parts(path.stem)
        if position is None:
            raise RunError(f"{path} is not named POSITION_TASK{path.suffix}, as 'fit' names patches; move it away")
        found.append((position, task, path))
    return sorted(found, key=lambda entry: entry[0])  # as numbers: as text, 99_a would follow 100_b


def shares_weights(run: Path) -> bool:
    """Whether the trained tasks of a run share weights, so that none of them can be taken out or put in."""
    return any((run / "shared").glob("*"))


def positions(run: Path, tasks: Sequence[str]) -> list[int]:
    """The position of each task of a stream, by which its files are named.

    A task that is finished or begun keeps its position when others are removed. Any other has the one after the task
    before it in the list.
    """
    known = {task: position for position, task, _ in patch_files(run)}
    for path in _visible(run / "checkpoints"):
        position, task = _parts(path.name)
        if position is not None:
            known[task] = position
    found: list[int] = []
    for task in tasks:
        found.append(known.get(task, found[-1] + 1 if found else 0))
    return found


def plain_yaml(path: Path) -> dict[str, Any]:
    """The content of a configuration, with its environment variables as they are written; raises RunError if damaged.

    Nothing but reading and writing lists of tasks needs it; `recast_pl.config` reads everything else.
    """
    try:
        content = dict(parse_yaml(path.read_bytes()))
        content["data"]["tasks"] = list(content["data"]["tasks"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as cause:
        raise RunError(f"cannot read the tasks of {path} ({cause}); restore it") from cause
    return content


def parse_yaml(content: bytes) -> Any:
    """The content of YAML, which the caller may change; raises yaml.YAMLError if it is damaged.

    A command reads the configuration of a run several times, and 1,000 tasks take longer to parse than to copy.
    """
    return pickle.loads(_pickled(content))


@lru_cache(maxsize=4)
def _pickled(content: bytes) -> bytes:
    return pickle.dumps(yaml.load(content, _LOADER))


def _visible(folder: Path) -> Iterator[Path]:
    """The entries of a folder, if there is one; hidden ones, such as the `._NAME` of other systems, do not count."""
    return (path for path in folder.glob("*") if not path.name.startswith("."))


def _parts(name: str) -> tuple[int | None, str]:
    position, _, task = name.partition("_")
    return (int(position), task) if position.isdecimal() and task else (None, name)
