"""Tasks that clients add to a server, and take out again."""

import hmac
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastapi import Request
from starlette.exceptions import HTTPException

from recast_pl.errors import PatchError, RunError, StorageError
from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.schema import TOKEN_VARIABLE, Task
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.signature import Signature

Keep = Callable[[TaskPatch, bytes, bytes | None], object]
Forget = Callable[[str], bool]


class TaskChanges:
    """Adds tasks for the holders of a token, and removes those that were added.

    Args:
        predictor: The tasks.
        token: The token; None if nobody may change tasks.
        keep: Stores an added task; see `create_app`.
        forget: Deletes a stored task; see `create_app`.
    """

    def __init__(self, predictor: Predictor, token: str | None, keep: Keep | None, forget: Forget | None) -> None:
        self._predictor, self._token, self._keep, self._forget = predictor, token, keep, forget
        self._added: set[str] = set()
        self._lock = threading.Lock()

    def check_token(self, request: Request) -> None:
        """Raises HTTPException unless a request has the token."""
        if self._token is None:
            raise HTTPException(403, f"changing tasks is off; start the server with {TOKEN_VARIABLE} set to allow it")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        valid = hmac.compare_digest(given.encode("latin-1"), self._token.encode())
        if not (valid and scheme.lower() == "bearer"):
            reason = f"changing tasks needs the header Authorization: Bearer TOKEN with the server's {TOKEN_VARIABLE}"
            raise HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})

    def add(self, patch_content: bytes, signature_content: bytes | None) -> Task:
        """Adds a task from the files of its patch and signature, and stores it; or does neither."""
        with self._lock:
            patch = self._checked(patch_content, signature_content)
            self._store(patch, patch_content, signature_content)
            self._added.add(patch.task)
        return Task(patch.task, patch.classes)

    def remove(self, name: str) -> Task:
        """Takes out a task that was added, for good. Those that the server was started with stay."""
        with self._lock:
            try:
                task = Task(name, self._predictor.classes(name))
                stored = self._forget(name) if self._forget else name in self._added
            except RunError as error:
                raise HTTPException(404, str(error)) from error
            except StorageError as error:
                raise HTTPException(500, "the task cannot be deleted; see the server's disk") from error
            if not stored:
                reason = f"task {name!r} was not added here but belongs to the run; take it out there, with 'remove'"
                raise HTTPException(409, reason)
            self._added.discard(name)
            with suppress(RunError):  # what follows the run folder may have been faster
                self._predictor.remove(name)
        return task

    def _checked(self, patch_content: bytes, signature_content: bytes | None) -> TaskPatch:
        """Adds a task to the predictor if it belongs there."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                (folder / "patch").write_bytes(patch_content)
                patch, signature = TaskPatch.load(folder / "patch"), None
                if patch.task in self._predictor.tasks:
                    raise HTTPException(409, f"there is a task {patch.task!r} already; rename the new one")
                if signature_content is not None:
                    (folder / "signature").write_bytes(signature_content)
                    signature = Signature.load(folder / "signature")
                self._predictor.add_patch(patch, signature)
            except PatchError as error:
                raise HTTPException(422, str(error).replace(f"{folder}{os.sep}", "the ")) from error
        return patch

    def _store(self, patch: TaskPatch, content: bytes, signature: bytes | None) -> None:
        """Keeps an added task for later, or takes it out again."""
        if self._keep is None:
            return
        try:
            self._keep(patch, content, signature)
        except StorageError as error:
            self._predictor.remove(patch.task)
            raise HTTPException(500, "the task cannot be stored, so it was not added; see the server's disk") from error
