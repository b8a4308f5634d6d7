"""An inbox: a folder into which people and programs put folders of images, each of which becomes a task."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from recast_pl.files import write_atomic

_STATE = "state of the folder: "


class Inbox:
    """Finds the folders that are complete and were not looked at before.

    What was done is told by files alone, so that nothing is lost if the process is killed: a task that is learnt is in
    the run, and one that is rejected has `NAME.rejected.txt` beside it.

    Args:
        folder: The inbox.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[Path, str] = {}  # the state of each folder when it was looked at last

    def complete(self, learnt: Collection[str]) -> list[Path]:
        """The folders that have not changed since the last call, in order of name.

        Args:
            learnt: Names of the tasks that are learnt, whose folders are left out, as are those that were rejected
                and have not changed since.
        """
        before, self._seen = self._seen, {}
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and path.name not in learnt:
                self._seen[path] = _state(path)
        return [path for path, state in self._seen.items() if before.get(path) == state != self._rejected_state(path)]

    def reject(self, images: Path, reason: str) -> Path:
        """Writes why a folder cannot be learnt into a file beside it, and returns that file."""
        path = _rejection(images)
        write_atomic(path, f"{reason}\n\nChange the folder, and it is tried again.\n{_STATE}{_state(images)}\n")
        return path

    def accept(self, images: Path) -> None:
        """Removes the reason why a folder was rejected before."""
        _rejection(images).unlink(missing_ok=True)

    def _rejected_state(self, images: Path) -> str | None:
        path = _rejection(images)
        if not path.is_file():
            return None
        *_, last = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return last.removeprefix(_STATE)


def _rejection(images: Path) -> Path:
    return images.with_name(f"{images.name}.rejected.txt")


def _state(folder: Path) -> str:
    """A digest of the names, sizes and times of all files in a folder, at any depth."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        try:
            facts = path.stat()
        except OSError:  # it was removed meanwhile
            continue
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
