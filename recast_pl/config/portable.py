"""Copies a run for others: what its tasks need, without the places and names of this machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recast_pl.config.changing import task_names
from recast_pl.config.paths import NO_FILES, locate_paths
from recast_pl.config.trust import check_trusted, entries
from recast_pl.errors import RunError
from recast_pl.files import sealed_json, write_atomic
from recast_pl.runs.folder import RunFolder, TaskFiles, config_name
from recast_pl.runs.layout import plain_yaml
from recast_pl.runs.merging import copy_files
from recast_pl.runs.results import refresh_results

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_PATHS = ("weights", "decomposition", "path", "vectors", "root")  # options that name a file or folder, or several

_DROPPED = ("logger", "profiler", "plugins", "default_root_dir")  # of the trainer: where it writes, and own objects

_AUTOMATIC = ("accelerator", "devices", "strategy")  # of the trainer: what this machine has


def write_portable(folder: RunFolder, tasks: Sequence[str] | None, target: Path, weights: bool) -> RunFolder:
    """Copies finished tasks of a run, in their present versions, with all that others need to use them.

    Of a path outside of the working folder only the last part stays, and records lose the name of the machine. What
    was trained and measured is kept as it is. What only serves to continue training is left out.

    Args:
        folder: The run, whose tasks are kept apart.
        tasks: Names of the tasks; None for all that are finished.
        target: The new folder.
        weights: Whether to copy the files of pretrained weights that the configuration names.

    Returns:
        The copy.

    Raises:
        RunError: If a task is not finished, or a file of weights or a record is missing or damaged.
        PatchError: If a patch or a signature is damaged.
    """
    copied, chosen = RunFolder(target), folder.trained(tasks)
    chosen = sorted({files.task: files for files in chosen}.values(), key=lambda files: files.position)
    write_atomic(copied.config, _portable_config(folder.config, [files.task for files in chosen]))
    for files in chosen:
        _copy_task(folder, files, copied)
    named = weight_files(plain_yaml(folder.config), folder.model_folders())
    others = [path for path in folder.path.glob("*.safetensors") if path.name not in named]
    for path in [*others, *(named.values() if weights else ())]:
        if not path.is_file():
            raise RunError(f"the weights {path.name!r} are not at {path}; put the file into {folder.path}")
        write_atomic(target / path.name, path.read_bytes())
    if folder.summary.is_file():
        write_atomic(copied.summary, folder.summary.read_bytes())
        refresh_results(copied, task_names(copied), None)
    return copied


def weight_files(config: Mapping[str, Any], folders: Sequence[Path] = ()) -> dict[str, Path]:
    """The files of pretrained weights that a configuration names, by their names without folders.

    Args:
        config: The configuration.
        folders: Where they are looked for after the working folder.
    """
    texts = [value for key, value in entries(config["model"]) if key == "weights" and isinstance(value, str)]
    named = [text for text in texts if text not in NO_FILES]
    return {Path(name).name: Path(locate_paths(name, folders, "weights")).expanduser() for name in named}


def _portable_config(path: Path, tasks: Sequence[str]) -> bytes:
    """A configuration with some tasks, in the order in which they were trained, and without places of this machine."""
    content = plain_yaml(path)
    data, trainer = content["data"], content["trainer"]
    listed = {entry["name"]: entry for entry in data["tasks"]}
    data["tasks"], data["order_seed"] = [listed.get(task, {"name": task}) for task in tasks], None
    trainer |= {key: None for key in _DROPPED if key in trainer} | {key: "auto" for key in _AUTOMATIC if key in trainer}
    callbacks = [each for each in trainer.get("callbacks") or () if _is_trusted(each)]
    trainer |= {"num_nodes": 1, "callbacks": callbacks or None}
    text: str = yaml.dump(
        _without_places(content), Dumper=_DUMPER, sort_keys=False, default_flow_style=False, allow_unicode=True
    )
    return text.encode()


def _copy_task(folder: RunFolder, files: TaskFiles, copied: RunFolder) -> None:
    """Copies a task, with the configurations that it was trained with."""
    target = TaskFiles(copied.path, files.position, files.task)
    _, record = files.load()
    copy_files(files, target)
    if files.signature.is_file():
        target.load_signature()
    if "configs" in record:
        used = {config_name(path.read_bytes()): path for path in folder.path.glob("config*.yaml")}
        contents = [_portable_config(used[name], [files.task]) for name in record["configs"] if name in used]
        for content in contents:
            copied.keep_config(content, replace=False)
        record["configs"] = [config_name(content) for content in contents]
    if "added" in record:
        record["added"] = _without_places(record["added"], "path")
    if "origin" in record:  # its machine is NAME, SYSTEM, PROCESSOR
        record["origin"]["machine"] = record["origin"]["machine"].partition(", ")[2]
    write_atomic(target.record, sealed_json(record))


def _without_places(value: Any, key: str = "") -> Any:
    """A configuration, or a part of it, in which paths outside of the working folder are cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_places(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_places(entry, key) for entry in value]
    if key not in _PATHS or not isinstance(value, str):
        return value
    path = Path(value)
    outside = path.is_absolute() or value.startswith("~") or ".." in path.parts
    if outside and key == "root":
        return None
    return path.name if outside else value


def _is_trusted(callback: Any) -> bool:
    """Whether everybody may open a run with this callback of the trainer."""
    try:
        check_trusted({"callbacks": callback}, "")
    except RunError:
        return False
    return True
