"""A run in a repository of the Hugging Face Hub: which files it has there, and how they come and go."""

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recast_pl.compat.huggingface import hub_failures
from recast_pl.errors import HubError, RecastError, one_line
from recast_pl.files import STORAGE_FAULTS, writing
from recast_pl.runs.layout import PATCH_SUFFIXES

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"
"""How the user gets a token."""

_FOLDERS = ("patches", "tasks", "signatures")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Args:
        commit: The commit, as 40 hexadecimal digits.
        paths: Paths of all files.
    """

    commit: str
    paths: tuple[str, ...]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The paths of each trained task, by its name, in the order of the stream."""
        patches = [PurePosixPath(path) for path in self.paths if path.startswith("patches/")]
        found: dict[str, list[str]] = {}
        for patch in sorted(patches, key=lambda patch: (len(patch.stem.partition("_")[0]), patch.stem)):
            position, _, task = patch.stem.partition("_")
            if patch.suffix in PATCH_SUFFIXES and position.isdecimal() and task:
                found[task] = [path for path in self.paths if _is_of_task(path, patch.stem)]
        return found

    @property
    def configs(self) -> list[str]:
        """Paths of the configurations."""
        return [path for path in self.paths if PurePosixPath(path).match("config*.yaml") and "/" not in path]

    @property
    def of_run(self) -> list[str]:
        """Paths of all files that a push replaces: those of tasks, and the configurations."""
        return [*self.configs, *(path for path in self.paths if path.split("/")[0] in _FOLDERS)]


class Repository:
    """A repository of a model; nothing is asked of the server before it is used.

    Every method raises HubError if the server cannot be reached or refuses, and StorageError if the disk is full.

    Args:
        name: OWNER/NAME.
        revision: A branch, tag or commit; None for the branch `main`.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415

        self.name, self.revision, self._api = name, revision, HfApi()

    @property
    def url(self) -> str:
        """The address of its page."""
        return f"{self._api.endpoint}/{self.name}"

    def listing(self) -> Listing:
        """Its files."""
        with self._failures():
            info = self._api.model_info(self.name, revision=self.revision)
        return Listing(str(info.sha), tuple(file.rfilename for file in info.siblings or ()))

    def make(self, private: bool) -> None:
        """Creates the repository and the branch, unless they are there.

        Args:
            private: Whether only its owner may see it; a public one is refused then.
        """
        from huggingface_hub import get_token  # noqa: PLC0415

        with self._failures():
            if get_token() is None:
                raise HubError(f"there is no token to write to {self.name} with; {LOG_IN}")
            self._api.create_repo(self.name, private=private or None, exist_ok=True)
            if private and not self._api.model_info(self.name).private:
                raise HubError(
                    f"{self.name} is there and public; make it private at {self.url}/settings, or name another --repo"
                )
            if self.revision is not None:
                self._api.create_branch(self.name, branch=self.revision, exist_ok=True)

    def download(self, listing: Listing, paths: Collection[str], again: bool = False) -> Path:
        """Downloads the files that the cache of this machine lacks, and returns their folder in the cache.

        An interrupted download is continued by the next one.

        Args:
            listing: Of the commit to take.
            paths: Paths of the files.
            again: Whether to download also what is here already.
        """
        with self._failures(), _bars_on_terminals():
            folder = self._api.snapshot_download(
                self.name, revision=listing.commit, allow_patterns=list(paths), force_download=again
            )
        return Path(folder)

    def upload(self, folder: Path, paths: Sequence[str], before: Listing, message: str) -> str:
        """Writes files in one commit; they replace those of the last push.

        Args:
            folder: Has the files.
            paths: Their paths, in the folder and in the repository.
            before: The files that the repository has; if that has changed meanwhile, nothing is written.
            message: Of the commit.

        Returns:
            The address of the commit; that of the last one if nothing differs.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415

        gone = [CommitOperationDelete(path) for path in before.of_run if path not in paths]
        new = [CommitOperationAdd(path, folder / path) for path in paths]
        with self._failures(), _bars_on_terminals():
            commit = self._api.create_commit(
                self.name,
                [*gone, *new],
                commit_message=message,
                revision=self.revision,
                parent_commit=before.commit,
            )
        return str(commit.commit_url)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns what the library raises into errors of one line, which never show a token."""
        try:
            yield
        except RecastError:
            raise
        except hub_failures() as cause:
            if isinstance(cause, OSError) and cause.errno in STORAGE_FAULTS:
                with writing(Path(cause.filename or ".")):
                    raise
            raise HubError(self._reason(cause)) from None  # requests in the traceback have the token

    def _reason(self, cause: Exception) -> str:
        from huggingface_hub import errors  # noqa: PLC0415

        here = f"revision {self.revision!r} of {self.name}" if self.revision else self.name
        if isinstance(cause, errors.LocalEntryNotFoundError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        if type(cause) is errors.HfHubHTTPError:
            return self._refusal(cause.response.status_code, here, cause)
        missing = f"there is no repository {self.name} at {self._api.endpoint}, or you may not see it; check --repo, or"
        known: dict[type[Exception], str] = {
            errors.GatedRepoError: f"{self.name} is gated: ask for access at {self.url}, and {LOG_IN}",
            errors.RepositoryNotFoundError: f"{missing} {LOG_IN}",
            errors.RevisionNotFoundError: f"there is no {here}; check --revision",
            errors.HFValidationError: f"{self.name!r} cannot be the name of a repository; give --repo OWNER/NAME",
            errors.OfflineModeIsEnabled: f"{here} cannot be reached, because HF_HUB_OFFLINE is set; unset it",
        }
        other = f"{here} cannot be reached at {self._api.endpoint} ({_without_token(one_line(cause))}); try again"
        return next((text for kind, text in known.items() if isinstance(cause, kind)), other)

    def _refusal(self, status: int, here: str, cause: Exception) -> str:
        reasons = {
            401: f"the token is not accepted; {LOG_IN}",
            403: f"the token may not do this to {here}; take one that may write there, or name another --repo",
            412: f"{here} was changed meanwhile; give the command again",
        }
        text = f"{self._api.endpoint} refuses {here}: {_without_token(one_line(cause))}; try again"
        return reasons.get(status, text)


def _is_of_task(path: str, stem: str) -> bool:
    """Whether a file belongs to the task whose files have this name without the ending."""
    place = PurePosixPath(path)
    return str(place.parent) in _FOLDERS and place.stem == stem


def _without_token(text: str) -> str:
    """A text without the token of the environment, and without others, which begin with `hf_`."""
    token = os.environ.get("HF_TOKEN")
    return re.sub(r"\bhf_\w+", "hf_…", text.replace(token, "…") if token else text)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Shows the library's progress bars on a terminal only."""
    from huggingface_hub import utils  # noqa: PLC0415

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
