"""Puts the tasks of copies of a run together, such as those that several machines have added to."""

from collections.abc import Sequence
from dataclasses import dataclass

from recast_pl.errors import PatchError, RunError
from recast_pl.files import write_atomic
from recast_pl.learning.patch import TaskPatch
from recast_pl.runs.folder import RunFolder, TaskFiles


@dataclass(frozen=True)
class NewTask:
    """A task that another copy of a run has more: the copy, and its files there."""

    copy: RunFolder
    files: TaskFiles


def find_new_tasks(folder: RunFolder, copies: Sequence[RunFolder]) -> list[NewTask]:
    """The tasks that copies of a run have and it has not, in order of copies.

    Raises:
        RunError: If copies have different tasks of one name; it names all of them.
        PatchError: If a copy is of another base or method, or a file of a new task is damaged.
    """
    known, new = {name.casefold(): files for name, files in folder.finished().items()}, list[NewTask]()
    first = next(iter(known.values())).load()[0]
    conflicts = []
    for copy in copies:
        for name, files in copy.finished().items():
            other = known.setdefault(name.casefold(), files)
            if other is files:
                _check_fits(files, first)
                new.append(NewTask(copy, files))
            elif other.load_record()["patch"] != files.load_record()["patch"]:
                conflicts.append(f"{name!r} ({other.patch} and {files.patch})")
    if conflicts:
        raise RunError(
            f"different tasks have one name: {', '.join(conflicts)}; rename one of each: 'rename --run_dir DIR --task "
            "NAME --name OTHER'"
        )
    return new


def copy_files(source: TaskFiles, target: TaskFiles) -> None:
    """Copies the files of a finished task to another place; the patch, which marks it finished, comes last."""
    pairs = [(source.signature, target.signature), (source.record, target.record)]
    patch = target.compact if source.patch == source.compact else target.plain
    for old, new in [*pairs, (source.patch, patch)]:
        if old.is_file():
            write_atomic(new, old.read_bytes())


def _check_fits(files: TaskFiles, first: TaskPatch) -> None:
    patch, _ = files.load()
    for what, ours, theirs in (("base", first.base, patch.base), ("method", first.method, patch.method)):
        if ours != theirs:
            raise PatchError(
                f"{files.patch} is of {what} {theirs!r:.80}, and the run is of {ours!r:.80}; merge copies of one run"
            )
