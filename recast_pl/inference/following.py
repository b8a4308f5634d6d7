"""Keeps the tasks of a predictor equal to those of its run folder, which other processes may change."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from recast_pl.errors import RecastError, StorageError
from recast_pl.files import write_atomic
from recast_pl.inference.predictor import Predictor
from recast_pl.learning.patch import TaskPatch
from recast_pl.runs.folder import RunFolder, TaskFiles
from recast_pl.runs.layout import patch_files, shares_weights
from recast_pl.runs.removal import remove_files

_keeping = threading.Lock()


@dataclass(frozen=True)
class _Version:
    """A patch as it is now: its files, the time of its last change in nanoseconds, and its bytes."""

    files: TaskFiles = field(compare=False)
    time: int
    size: int


class Follower:
    """Adds, replaces and removes tasks of a predictor as their patches come, change and go.

    It reads the names and times of files alone, unless one has changed. Tasks that a server has received are found in
    `received/`; a task of the run goes before one of the same name there.

    Args:
        predictor: It has all tasks of the run.
        folder: The run folder.
        report: Called with a line for each change, and once for each patch that cannot be used.
    """

    def __init__(self, predictor: Predictor, folder: RunFolder, report: Callable[[str], object]) -> None:
        self._predictor, self._folder, self._report = predictor, folder, report
        self._follows = not shares_weights(folder.path)  # with shared weights a patch is not enough
        own = _versions(folder) if self._follows else {}
        self._known = {task: version for task, version in own.items() if task in predictor.tasks}
        self._faults: dict[str, _Version] = {}  # what was reported, so that it is not again
        self._fault = ""

    def look(self) -> None:
        """Makes the changes since the last call."""
        if self._follows:
            with _keeping:  # a task that is deleted meanwhile would come back
                self._look()

    def _look(self) -> None:
        try:
            found = _versions(self._folder.received) | _versions(self._folder)
        except OSError:  # such as too many open files, for a moment
            return
        except RecastError as error:  # a file that is not a patch of a run
            if str(error) != self._fault:
                self._report(str(error))
            self._fault = str(error)
            return
        for task in [task for task in self._known if task not in found]:
            del self._known[task]
            if task in self._predictor.tasks:
                self._predictor.remove(task)
                self._report(f"task {task} is removed")
        for task, version in found.items():
            if self._known.get(task) != version:
                self._take(task, version)

    def _take(self, task: str, version: _Version) -> None:
        files = version.files
        try:
            patch = files.load()[0] if files.record.exists() else TaskPatch.load(files.patch)
            signature = files.signature if files.signature.is_file() else None
            self._predictor.add_patch(patch, signature, replace=True)
        except (RecastError, OSError) as error:  # it may be written just now, so it is tried again
            if self._faults.get(task) != version:
                self._report(f"task {task} cannot be used: {error}")
            self._faults[task] = version
            return
        self._report(f"task {task} is {'changed' if task in self._known else 'added'}")
        self._known[task] = version


@contextmanager
def following(follower: Follower, seconds: float) -> Iterator[None]:
    """Looks for changes again and again in another thread while the block runs."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(seconds):
            follower.look()

    thread = threading.Thread(target=work, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def keep_received(folder: RunFolder, patch: TaskPatch, content: bytes, signature: bytes | None) -> None:
    """Writes a task that a server has received into its run folder, where it outlives the server.

    Args:
        folder: The run folder.
        patch: The task.
        content: The file of its patch.
        signature: The file of its signature; None if there is none.

    Raises:
        StorageError: If it cannot be written.
    """
    with _keeping:
        received = folder.received
        files = received.files_of([*received.finished_names(), patch.task])[-1]
        if signature is not None:
            write_atomic(files.signature, signature)
        write_atomic(files.plain if patch.rounded is None else files.compact, content)


def forget_received(folder: RunFolder, task: str) -> bool:
    """Deletes a task that a server has received from its run folder.

    Args:
        folder: The run folder.
        task: Name of the task.

    Returns:
        Whether it was there; False for a task of the run itself, which goes before one of the same name.

    Raises:
        StorageError: If it cannot be deleted.
    """
    with _keeping:
        if task in folder.finished_names() or task not in folder.received.finished_names():
            return False
        try:
            remove_files(folder.received.finished()[task])
        except OSError as cause:
            raise StorageError(f"cannot delete task {task!r} of {folder.received.path} ({cause})") from cause
        return True


def _versions(folder: RunFolder) -> dict[str, _Version]:
    """The version of each patch of a folder, by task."""
    found = {}
    for position, task, path in patch_files(folder.path):
        with suppress(OSError):  # it was removed meanwhile
            facts = path.stat()
            found[task] = _Version(folder.files(position, task), facts.st_mtime_ns, facts.st_size)
    return found
