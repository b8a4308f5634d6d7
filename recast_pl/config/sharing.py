"""Runs and their tasks in repositories of the Hugging Face Hub: `push` and `pull`."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recast_pl.config.changing import refresh, task_names
from recast_pl.config.merging import merge
from recast_pl.config.portable import weight_files, write_portable
from recast_pl.config.task_list import changed_tasks
from recast_pl.config.trust import check_trusted
from recast_pl.errors import PatchError, RecastError, RunError
from recast_pl.files import read_tensors, write_atomic, writing
from recast_pl.reporting.card import write_card
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.hub import Listing, Repository
from recast_pl.runs.layout import plain_yaml
from recast_pl.runs.removal import check_apart

_CARD = "README.md"


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
    folder, repository = RunFolder(run_dir), Repository(repo, revision)
    task_names(folder)
    check_apart(folder, "'push'")
    with tempfile.TemporaryDirectory() as scratch:
        staged = write_portable(folder, tasks, Path(scratch) / "run", weights)
        names = staged.finished_names()
        repository.make(private)
        before = repository.listing()
        _keep_others(repository, before, staged, Path(scratch) / "others")
        write_atomic(staged.path / _CARD, write_card(staged, repo, license))
        return repository.upload(staged.path, _pushed(staged), before, f"Add {', '.join(names)}")


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
    target, repository = RunFolder(run_dir), Repository(repo, revision)
    is_new = not target.config.is_file()
    if is_new and target.path.exists() and any(target.path.iterdir()):
        raise RunError(f"{target.path} has files but is no run; give a new folder, or that of a run on the same base")
    parent = target.path.absolute().parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{target.path.name}.", dir=parent)  # beside it, to be moved in one step
    try:
        copy = RunFolder(Path(scratch) / "run")
        _receive(repository, repository.listing(), tasks, copy, trust, whole=is_new)
        with _named(copy.path, repo):
            return _place(copy, target) if is_new else merge(target, [copy])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(copy: RunFolder, target: RunFolder) -> list[str]:
    """Moves a run to where no run is."""
    names = copy.finished_names()
    with writing(target.path):
        if target.path.is_dir():
            target.path.rmdir()
        copy.path.rename(target.path)
    return names


def _keep_others(repository: Repository, before: Listing, staged: RunFolder, place: Path) -> None:
    """Takes the tasks of a repository that a push does not replace."""
    others = [task for task in before.tasks if task not in staged.finished_names()]
    if others:
        theirs = RunFolder(place)
        _receive(repository, before, others, theirs, trust=True, whole=False)
        with _named(place, repository.name):
            merge(staged, [theirs])


def _receive(
    repository: Repository, listing: Listing, tasks: Sequence[str] | None, copy: RunFolder, trust: bool, whole: bool
) -> None:
    """Downloads tasks of a repository into a new folder, and checks them.

    Args:
        repository: The repository.
        listing: Its files.
        tasks: Names of the tasks; None for all.
        copy: The folder.
        trust: Whether the configuration may name other code.
        whole: Whether to download also what a new run needs beside its tasks: templates, weights, results.
    """
    found = listing.tasks
    if not found or RunFolder.CONFIG not in listing.paths:
        raise RunError(f"{repository.name} holds no run that 'push' wrote; check --repo and --revision")
    missing = [task for task in tasks or () if task not in found]
    if missing:
        raise RunError(f"task {missing[0]!r} is not in {repository.name}, which has {', '.join(found)}; check --tasks")
    wanted = list(found if tasks is None else tasks)
    paths = [*listing.configs, *(path for task in wanted for path in found[task])]
    for again in (False, True):  # what is damaged may only be so in the cache
        shutil.rmtree(copy.path, ignore_errors=True)
        try:
            with _named(copy.path, repository.name):
                _copy(repository.download(listing, listing.configs, again), listing.configs, copy.path)
                _check_configs(copy, trust)
                beside = [path for path in listing.paths if whole and _is_beside(path, copy)]
                _copy(repository.download(listing, [*paths, *beside], again), [*paths, *beside], copy.path)
                _check(copy)
            break
        except (PatchError, RunError):
            if again:
                raise
    with changed_tasks(copy) as entries:
        entries[:] = [entry for entry in entries if entry["name"] in wanted]
    refresh(copy)


def _copy(source: Path, paths: Sequence[str], target: Path) -> None:
    for path in paths:
        with writing(target / path):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)


def _pushed(folder: RunFolder) -> list[str]:
    """The paths in a folder that belong into a repository."""
    paths = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file())
    return [*Listing("", tuple(paths)).of_run, *(path for path in paths if path == _CARD or _is_beside(path, folder))]


def _is_beside(path: str, folder: RunFolder) -> bool:
    """Whether a file of a run serves all of its tasks: templates and other parts of the base, weights, and results."""
    is_named = path in weight_files(plain_yaml(folder.config))
    return "/" not in path and (path == RunFolder.SUMMARY or path.endswith(".safetensors") or is_named)


def _check_configs(copy: RunFolder, trust: bool) -> None:
    """Refuses other code, also in the trainer, which commands that train would run."""
    for path in copy.path.glob("config*.yaml"):
        content = plain_yaml(path)
        if not trust:
            check_trusted(content, path)


def _check(copy: RunFolder) -> None:
    """Checks every file against its checksum, and that all tasks have one base."""
    patches = []
    for files in copy.trained():
        patches.append(files.load()[0])
        if files.signature.is_file():
            files.load_signature()
    for patch in patches:
        if patch.base != patches[0].base:
            raise PatchError(f"tasks {patches[0].task!r} and {patch.task!r} of {copy.path} have different bases")
    weights = weight_files(plain_yaml(copy.config))
    for path in copy.path.glob("*.safetensors"):
        if path.name not in weights:
            read_tensors(path, PatchError)


@contextmanager
def _named(place: Path, name: str) -> Iterator[None]:
    """Names the repository in errors, where they name the temporary folder of its files."""
    try:
        yield
    except RecastError as error:
        raise type(error)(str(error).replace(str(place), name)) from error
