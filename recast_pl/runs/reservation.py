"""Gives a run folder to one process at a time, for long or for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from recast_pl.errors import BusyError
from recast_pl.files import exclusive, remove_unfinished, writing
from recast_pl.runs.folder import RunFolder

_held: set[Path] = set()  # lock files of this process


def make_folder(parent: Path, name: str) -> Path:
    """Makes a new folder, also if other processes do so at the same time.

    Args:
        parent: Where to make it.
        name: Its name; if that is taken, the folder is called NAME_2, or NAME_3, and so on.

    Raises:
        StorageError: If the folder cannot be made.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        count, path = 1, parent / name
        while True:
            try:
                path.mkdir()
            except FileExistsError:
                count += 1
                path = parent / f"{name}_{count}"
            else:
                return path


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps other processes away from a run folder while the block runs; blocks in one process may be nested.

    The folder is made if it is missing, and removed if it is empty in the end, so that a failed start leaves nothing.
    A process that is killed frees its folder.

    Args:
        folder: The run folder.

    Raises:
        BusyError: If another process has reserved the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / RunFolder.LOCK).resolve()
    if path in _held:
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise BusyError(
            f"another process is working in run folder {folder}; wait until it ends, or name another --run_dir"
        ) from cause
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        with suppress(OSError):  # some systems cannot remove a file that is open
            path.unlink()  # before it is released: no other process can have taken it
        lock.release()
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Lets one process at a time change the tasks of a run, for a moment; others that do the same wait.

    Args:
        folder: The run folder.

    Raises:
        BusyError: If another process has reserved the folder, as `fit` does.
    """
    with exclusive(folder / RunFolder.TASKS_LOCK, f"changing the tasks of {folder}"), reserved(folder):
        yield


def clean(folder: Path) -> None:
    """Removes what killed processes left in a run folder, unless another process may be writing there.

    Args:
        folder: The run folder, which this process has reserved. Others may have reserved tasks in it, as `add` does.
    """
    others = (path for path in folder.rglob(RunFolder.LOCK) if path.resolve() not in _held)
    if not any(map(_is_locked, others)):
        remove_unfinished(folder)


def _is_locked(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
