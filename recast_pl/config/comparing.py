"""Decides whether a run may be resumed with the given options."""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import EVALUATION_KEYS, PRECISION_KEY
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder

_READING = ("root", "cache", "num_workers")  # settings of the data: where and how images are read changes no result


def check_same_run(parser: LightningArgumentParser, path: Path, text: str) -> None:
    """Checks that a resumed run keeps its configuration; only learning rates, and where images are, may differ.

    Args:
        parser: A parser with the options of `declare_run`.
        path: The config.yaml of the run; if it does not exist, nothing is checked.
        text: The configuration to resume with, as `config_text` returns it.

    Raises:
        RunError: If model, data, seed or the precision of patches differ.
    """
    if not path.exists():
        return
    # compared after parsing, because the text of defaults inside lists depends on how they were given
    before, after = parser.parse_string(path.read_text(encoding="utf-8")), parser.parse_string(text)
    for config in (before, after):
        for key in _READING:
            config.data.pop(key, None)
        for task in config.data.tasks:
            task.pop("path", None)
        settings = config.model.get("init_args") or {}
        for part in (settings.get("optimizer"), *(settings.get("pieces") or ())):
            for key in ("lr", "learning_rate"):  # a resumed task may have another rate
                if part is not None and "init_args" in part:
                    part.init_args.pop(key, None)
    changed = [key for key in ("model", "data", "seed_everything", PRECISION_KEY) if before.get(key) != after.get(key)]
    if changed:
        delete = "" if RunFolder(path.parent).is_begun else f", or delete {path.parent}, which has trained nothing yet"
        raise RunError(
            f"{changed[0]} differs from {path}, and resuming would mix two runs; "
            f"resume with the same options, or start another --run_dir{delete}"
        )


def recorded_text(parser: LightningArgumentParser, folder: RunFolder, text: str) -> str:
    """Returns the content of a run's config.yaml if it says the same as a text in other words, or else that text.

    If all tasks of the run are trained, where and how images are read does not count, nor how they are evaluated.

    Args:
        parser: A parser with the options of `declare_run`.
        folder: The run folder; it need not have a config.yaml.
        text: A configuration, as `config_text` returns it.
    """
    if not folder.config.exists():
        return text
    recorded = folder.config.read_text(encoding="utf-8")
    before, after = parser.parse_string(recorded), parser.parse_string(text)
    if folder.is_trained and len(folder.finished()) == len(before.data.tasks):
        for config in (before, after):
            for key in EVALUATION_KEYS:
                config.pop(key, None)
            for key in _READING:
                config.data.pop(key, None)
    return recorded if before == after else text
