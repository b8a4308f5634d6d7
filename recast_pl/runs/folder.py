"""A run folder read again: its learnt tasks, evaluated or used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recast_pl.errors import PatchError, RunError
from recast_pl.files import read_sealed_json, sha256
from recast_pl.learning.patch import SharedState, TaskPatch
from recast_pl.learning.til_module import TILModule

Record = dict[str, Any]
"""What `tasks/` holds of a finished task: its facts, the accuracies measured just after it, by task, and the digest of
its patch."""


def load_patches(run_dir: Path) -> dict[str, TaskPatch]:
    """The learnt tasks of a run by name, in order.

    Raises:
        RunError: If there are none.
    """
    patches = (load_finished(run_dir, path.stem)[0] for path in patch_paths(run_dir))
    return {patch.task: patch for patch in patches}


def load_finished(run_dir: Path, name: str) -> tuple[TaskPatch, Record]:
    """Reads the patch and the record of a finished task, which must belong together and to that task.

    Args:
        run_dir: The run folder.
        name: Of the files, without their endings.
    """
    path = run_dir / "patches" / f"{name}.safetensors"
    patch, record = TaskPatch.load(path), read_sealed_json(run_dir / "tasks" / f"{name}.json", RunError)
    if name.partition("_")[2] != patch.task or record["patch"] != sha256(path.read_bytes()):
        raise PatchError(f"{path} is not the patch that tasks/{name}.json tells of; restore the one that was there")
    return patch, record


def accuracy_matrix(records: Sequence[Record]) -> list[list[float | None]]:
    """Accuracies by task learnt and task tested.

    Of a task that was learnt later, or by another process, nothing was measured after the ones behind it: as such
    tasks are kept apart, what it reached itself is what it would have reached.
    """
    own = {record["task"]["name"]: record["task"]["accuracy"] for record in records}
    return [
        [record["accuracies"].get(name, own[name]) if j <= i else None for j, name in enumerate(own)]
        for i, record in enumerate(records)
    ]


def percent(fraction: float) -> float:
    """A fraction as a percentage, rounded so that it reads the same wherever it is printed."""
    return round(100 * fraction, 4)


def patch_paths(run_dir: Path) -> list[Path]:
    paths = sorted((run_dir / "patches").glob("*.safetensors"))
    if not paths:
        raise RunError(f"{run_dir} holds no learnt task; give the folder of a run made by 'fit'")
    return paths


def load_shared(module: TILModule, path: Path) -> None:
    """Takes what tasks share, if they share anything."""
    if not module.isolated:
        module.load_shared_state(SharedState.load(path))


def check_run_folder(run_dir: Path, resume: bool) -> None:
    """Makes sure that a new run does not touch an old one.

    Raises:
        RunError: If the folder has content and is not to be resumed.
    """
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise RunError(f"run folder {run_dir} exists; add --resume true to continue it, or name another --run_dir")
