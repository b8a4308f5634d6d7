"""The tasks of a run at a glance. It imports nothing heavy, so that `list` answers at once."""

import json
from pathlib import Path
from typing import NamedTuple

from recast_pl.errors import RunError
from recast_pl.runs.layout import RECEIVED, patch_files, plain_yaml, task_file_name


class TaskLine(NamedTuple):
    """What `list` shows of a task; all but the name are None if it is not trained.

    Args:
        task: Its name.
        classes: Number of classes.
        accuracy: On the test images in percent, just after training.
        bytes: Of its patch.
        date: When it was trained, in ISO format; empty in older runs; `received` if a server has received its patch.
        version: Number of its present version.
    """

    task: str
    classes: int | None = None
    accuracy: float | None = None
    bytes: int | None = None
    date: str | None = None
    version: int | None = None


def list_tasks(run_dir: str | Path) -> list[TaskLine]:
    """The finished tasks of a run in the order of the stream, then those not trained yet, then those received.

    Raises:
        RunError: If the folder holds no task, or a record is damaged.
    """
    run = Path(run_dir)
    lines = [_line(run / "tasks" / f"{task_file_name(position, task)}.json") for position, task, _ in patch_files(run)]
    config, trained = run / "config.yaml", {line.task for line in lines}
    if config.is_file():
        listed = [str(task["name"]) for task in plain_yaml(config)["data"]["tasks"]]
        lines += [TaskLine(task) for task in listed if task not in trained]
    lines += [
        TaskLine(task, bytes=path.stat().st_size, date="received") for _, task, path in patch_files(run / RECEIVED)
    ]
    if not lines:
        raise RunError(f"{run} holds no task; give the folder of a run made by 'fit'")
    return lines


def _line(record: Path) -> TaskLine:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        task = content["task"]
        numbers = int(task["classes"]), float(task["accuracy"]), int(task["patch_bytes"])
        return TaskLine(
            task["name"], *numbers, content.get("origin", {}).get("date", ""), int(content.get("version", 1))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise RunError(f"cannot read {record} ({cause}); restore it") from cause
