"""Decides whether a run may be resumed with the given options."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import EVALUATION_KEYS, PRECISION_KEY
from recast_pl.config.paths import MODEL_FILES, NO_FILES
from recast_pl.config.task_list import with_tasks
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder

_READING = ("root", "cache", "num_workers")  # settings of the data: where and how images are read changes no result

_OF_LATER_TASKS = {  # settings that change neither the base nor a task that is trained, so that later tasks may differ
    "data": ("batch_size", "transforms", "on_bad_image", "max_pixels"),
    "model": ("optimizer", "lr_scheduler"),
}


def check_same_run(parser: LightningArgumentParser, path: Path, text: str, adding: str | None = None) -> None:
    """Checks that a resumed run keeps its configuration.

    Learning rates, and where images and missing files of weights are, may differ. Tasks may be added at the end, and
    then also other settings of training, which they are trained with.

    Args:
        parser: A parser with the options of `declare_run`.
        path: The config.yaml of the run; if it does not exist, nothing is checked.
        text: The configuration to resume with, as `config_text` returns it.
        adding: Name of a task that is added, or added again with other settings; None to compare all tasks.

    Raises:
        RunError: If model, data, seed or the precision of patches differ.
    """
    if not path.exists():
        return
    # compared after parsing, because the text of defaults inside lists depends on how they were given
    after = parser.parse_string(text)
    before = parser.parse_string(path.read_text(encoding="utf-8") if adding is None else with_tasks_of(after, path))
    later = adding is not None or _leave_out_appended(before, after)
    for config in (before, after):
        _leave_out_harmless(config, later, adding)
    for key in ("seed_everything", "model", "data", PRECISION_KEY):  # the seed is in the data, too
        for name, old, new in _differences(before.get(key), after.get(key), key):
            begun = RunFolder(path.parent).is_begun
            delete = "" if begun else f", or delete {path.parent}, which has trained nothing yet"
            raise RunError(
                f"{key} differs from {path}: {name} is {old!r:.80} there and {new!r:.80} now, and resuming would mix "
                f"two runs; resume with the same options, or start another --run_dir{delete}"
            )


def with_tasks_of(config: Namespace, path: Path) -> str:
    """The text of a run's configuration, with those of its tasks that another configuration has."""
    names = {task.name for task in config.data.tasks}
    return with_tasks(path, lambda tasks: [task for task in tasks if task["name"] in names])


def _leave_out_appended(before: Namespace, after: Namespace) -> bool:
    """Removes the tasks of a configuration that follow those of another one; returns whether there are any."""
    count = len(before.data.tasks)
    appended = after.data.tasks[count:]
    if not appended or before.data.order_seed is not None:  # which would move tasks
        return False
    after.data.tasks = after.data.tasks[:count]
    return True


def _leave_out_harmless(config: Namespace, later: bool, adding: str | None) -> None:
    """Removes the settings that may differ between two sessions of a run."""
    settings = config.model.get("init_args") or {}
    for key in (*_READING, *(_OF_LATER_TASKS["data"] if later else ())):
        config.data.pop(key, None)
    for key in _OF_LATER_TASKS["model"] if later else ():
        settings.pop(key, None)
    config.data.tasks = [task for task in config.data.tasks if task.name != adding]
    for task in config.data.tasks:
        task.pop("path", None)
    for part in (settings.get("optimizer"), *(settings.get("pieces") or ())):
        for key in ("lr", "learning_rate"):  # a resumed task may have another rate
            if part is not None and "init_args" in part:
                part.init_args.pop(key, None)


def _differences(before: Any, after: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name and both values of each entry that differs between two configurations, at any depth."""
    old, new = _entries(before), _entries(after)
    if not old or not new:
        if before != after and not _is_moved_file(name, before, after):
            yield name, _plain(before), _plain(after)
        return
    for key in dict.fromkeys([*old, *new]):
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}")


def _entries(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Namespace):
        return vars(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def _is_moved_file(name: str, before: Any, after: Any) -> bool:
    """Whether an entry names a file that is no longer where it was."""
    named = all(isinstance(value, str) and value not in NO_FILES for value in (before, after))
    return named and name.rpartition(".")[2] in MODEL_FILES and not Path(before).expanduser().exists()


def recorded_text(parser: LightningArgumentParser, folder: RunFolder, text: str, alone: bool = False) -> str:
    """Returns the content of a run's config.yaml if it says the same as a text in other words, or else that text.

    If all tasks of the text are trained, where and how images are read does not count, nor how they are evaluated.

    Args:
        parser: A parser with the options of `declare_run`.
        folder: The run folder; it need not have a config.yaml.
        text: A configuration, as `config_text` returns it.
        alone: Whether the text may have only some of the tasks; then the others are left out of the content, too.
    """
    if not folder.config.exists():
        return text
    after = parser.parse_string(text)
    recorded = with_tasks_of(after, folder.config) if alone else folder.config.read_text(encoding="utf-8")
    before = parser.parse_string(recorded)
    if folder.is_trained and {task.name for task in before.data.tasks} <= folder.finished().keys():
        for config in (before, after):
            for key in EVALUATION_KEYS:
                config.pop(key, None)
            for key in _READING:
                config.data.pop(key, None)
    return recorded if before == after else text
