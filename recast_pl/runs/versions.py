"""Versions of a task. A new one is made beside the present one, and then takes its place in one step.

Versions that are not the present one lie in `versions/NUMBER`, in files that are called as in the run folder. While a
new one is made, `versions/NN_TASK.json` tells its number and what was asked for, so that the same command goes on after
an interruption. As soon as it says `taken`, the new version is the present one, although its files still lie in
`versions/NUMBER`. They are then copied to where the present one belongs, and `versions/NN_TASK.json` is removed.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from recast_pl.errors import RunError
from recast_pl.files import json_text, read_json, sha256, write_atomic
from recast_pl.runs.folder import Record, RunFolder, TaskFiles


class NewVersion:
    """A new version of a task of a run, from its beginning until it takes the place of the present one, or does not.

    Args:
        folder: The run folder, which is reserved for this process.
        task: Name of a finished task.
        request: All that decides what the new version will be. If the same was begun before, it is continued.

    Raises:
        RunError: If the task is not finished, or a file is damaged.
    """

    def __init__(self, folder: RunFolder, task: str, request: Mapping[str, Any]) -> None:
        (present,) = folder.trained([task])
        self._main = TaskFiles(folder.path, present.position, task)
        self._folder, self._request = folder, dict(request)
        self.request_sum = sha256(json_text(self._request).encode())[:12]
        begun = self._read()
        self._continues = begun is not None and begun["request"] == self._request
        self.taken: bool = begun is not None and self._continues and begun["taken"]
        versions = folder.versions(present)
        self.number: int = begun["version"] if begun and self._continues else max(versions) + 1
        record = versions[max(versions)].load_record()
        self.latest: Record | None = record if not begun and record.get("request") == self.request_sum else None
        """The record of the latest version, if it was made by the same request."""

    def begin(self) -> None:
        """Notes what is made; gives up what another request began, unless that was taken."""
        begun = self._read()
        if begun is not None and not self._continues:
            _settle(self._folder.version(begun["version"], self._main), self._main, begun["taken"])
        self._note()

    @property
    def files(self) -> TaskFiles:
        """Where the new version is made."""
        return self._folder.version(self.number, self._main)

    @property
    def present(self) -> TaskFiles:
        """The version before; the new one, once it is taken."""
        return self._folder.files(self._main.position, self._main.task)

    def take(self) -> None:
        """Makes the new version, which is complete, the present one; the one before is kept."""
        if not self.taken:
            before = self.present.load_record().get("version", 1)
            _copy(self._main, self._folder.version(before, self._main))
            self.taken = True
            self._note()
        _copy(self.files, self._main)

    def close(self) -> None:
        """Ends the making of the new version; the present one may be either."""
        self._main.change.unlink()
        if self.taken:
            _remove(self.files)

    def _read(self) -> dict[str, Any] | None:
        path = self._main.change
        return read_json(path, RunError, version=int, taken=bool, request=dict) if path.is_file() else None

    def _note(self) -> None:
        change = {"version": self.number, "taken": self.taken, "request": self._request}
        write_atomic(self._main.change, json_text(change))


def added_images(folder: RunFolder, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Folders and manifests of images that were added to those of the configuration, by task, for some tasks."""
    if not (folder.path / "versions").is_dir():  # then no record is read
        return {}
    finished = set(folder.finished_names())
    trained = folder.files_of([task for task in tasks if task in finished])
    records = ((files.task, files.load_record()) for files in trained)
    return {task: record["added"] for task, record in records if record.get("added")}


def _copy(source: TaskFiles, target: TaskFiles) -> None:
    """Copies a version, its patch last, over another one or to where there is none."""
    patch = target.compact if source.patch == source.compact else target.plain
    pairs = [(source.signature, target.signature), (source.record, target.record), (source.patch, patch)]
    for before, after in pairs:
        if before.is_file():  # older runs have no signatures
            write_atomic(after, before.read_bytes())
    for other in {target.plain, target.compact} - {patch}:
        other.unlink(missing_ok=True)


def _remove(files: TaskFiles) -> None:
    for path in (files.patch, files.record, files.signature):
        path.unlink(missing_ok=True)
    shutil.rmtree(files.checkpoints, ignore_errors=True)


def _settle(new: TaskFiles, main: TaskFiles, taken: bool) -> None:
    """Ends a change that was interrupted."""
    if taken:
        _copy(new, main)
        main.change.unlink()
    _remove(new)
