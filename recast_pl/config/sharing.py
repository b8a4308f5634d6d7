"""Runs and their tasks in repositories of the Hugging Face Hub: `push` and `pull`.

What they need of jsonargparse is imported when they are called, so that `import recast_pl` does without it.
"""

import errno
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from recast_pl.errors import RunError
from recast_pl.files import write_atomic, writing
from recast_pl.reporting.card import CARD, write_card
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.hub import Repository
from recast_pl.runs.removal import check_apart


def push(
    run_dir: str | Path,
    repo: str,
    tasks: Sequence[str] | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    weights: bool = False,
) -> str:
    """Uploads trained tasks of a run to a repository, with what others need to use them, in one commit.

    A task takes the place of the one of its name; other tasks of the repository stay. The card, `README.md`, is made
    again. Paths and the name of this machine are left out.

    Args:
        run_dir: The run folder.
        repo: OWNER/NAME of the repository, which is created if it is missing.
        tasks: Names of the tasks; None for all that are finished.
        license: Identifier of the licence for the card, such as `apache-2.0`; None to state none.
        private: Whether only the owner may see it.
        revision: The branch; None for `main`.
        weights: Whether to upload also the file of pretrained weights, if the run names one.

    Returns:
        The address of the commit.

    Raises:
        RunError: If the folder holds no run, a task is not finished, or tasks share weights.
        PatchError: If a patch is damaged, or the repository has other tasks of another base or method.
        HubError: If the server cannot be reached, refuses, or the repository was changed meanwhile.
    """
    from recast_pl.config import exchange, portable  # noqa: PLC0415

    folder, repository = RunFolder(run_dir), Repository(repo, revision)
    exchange.check_run(folder)
    check_apart(folder, "'push'")
    with tempfile.TemporaryDirectory() as scratch:
        staged = portable.write_portable(folder, tasks, Path(scratch) / "run", weights)
        names = staged.finished_names()
        repository.make(private)
        before = repository.listing()
        exchange.keep_others(repository, before, staged, Path(scratch) / "others")
        write_atomic(staged.path / CARD, write_card(staged, repo, license))
        return repository.upload(staged.path, exchange.pushed_paths(staged), before, f"Add {', '.join(names)}")


def pull(
    repo: str,
    run_dir: str | Path,
    tasks: Sequence[str] | None = None,
    revision: str | None = None,
    trust: bool = False,
) -> list[str]:
    """Downloads a run, or some of its tasks, from a repository: into a new folder, or into a run on the same base.

    Everything is checked before the folder is changed. No code of the repository is run.

    Args:
        repo: OWNER/NAME of the repository.
        run_dir: A new folder, or that of a run.
        tasks: Names of the tasks; None for all.
        revision: A branch, tag or commit; None for the branch `main`.
        trust: Whether the configuration may name code outside of this package, timm, torchvision and torch.

    Returns:
        Names of the tasks that the folder did not have before.

    Raises:
        RunError: If the repository has no such task, its configuration names code that is not trusted, the folder is
            in use, or has another task of the same name.
        PatchError: If a file is damaged, or the run in the folder has another base or method.
        HubError: If the server cannot be reached or refuses.
    """
    from recast_pl.config import exchange, merging  # noqa: PLC0415

    target, repository = RunFolder(run_dir), Repository(repo, revision)
    is_new = not target.config.is_file()
    if is_new and target.path.exists() and any(target.path.iterdir()):
        raise RunError(f"{target.path} has files but holds no run; give a new folder, or a run on the same base")
    parent = target.path.absolute().parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{target.path.name}.", dir=parent)  # beside it, to be moved in one step
    try:
        copy = RunFolder(Path(scratch) / "run")
        exchange.receive(repository, repository.listing(), tasks, copy, trust, whole=is_new)
        with exchange.named(copy.path, repo):
            return _place(copy, target) if is_new else merging.merge(target, [copy])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(copy: RunFolder, target: RunFolder) -> list[str]:
    """Moves a run to where no run is."""
    names = copy.finished_names()
    with writing(target.path):
        if target.path.is_dir():
            target.path.rmdir()
        try:
            copy.path.rename(target.path)
        except OSError as cause:
            if cause.errno != errno.ENOTEMPTY:
                raise
            raise RunError(f"{target.path} was made by another process meanwhile; give the command again") from cause
    return names
