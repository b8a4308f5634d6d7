"""How tasks come from and go to repositories: which files belong there, and what is checked of those that come."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recast_pl.config.changing import refresh, task_names
from recast_pl.config.merging import merge
from recast_pl.config.portable import weight_files
from recast_pl.config.task_list import changed_tasks
from recast_pl.config.trust import check_trusted
from recast_pl.errors import PatchError, RecastError, RunError
from recast_pl.files import read_tensors, writing
from recast_pl.reporting.card import CARD
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.hub import Listing, Repository
from recast_pl.runs.layout import plain_yaml


def check_run(folder: RunFolder) -> None:
    """Raises RunError if a folder holds no run, naming those that are near."""
    task_names(folder)


def keep_others(repository: Repository, before: Listing, staged: RunFolder, place: Path) -> None:
    """Takes the tasks of a repository that a push does not replace."""
    others = [task for task in before.tasks if task not in staged.finished_names()]
    if others:
        theirs = RunFolder(place)
        receive(repository, before, others, theirs, trust=True, whole=False)
        with named(place, repository.name):
            merge(staged, [theirs])


def receive(
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
        with named(copy.path, repository.name):
            _copy(repository.download(listing, listing.configs, again), listing.configs, copy.path)
            if not trust:
                _check_trusted(copy)
            paths += [path for path in listing.paths if whole and _is_beside(path, copy) and path not in paths]
            _copy(repository.download(listing, paths, again), paths, copy.path)
            try:
                _check(copy)
            except (PatchError, RunError) as error:
                if again:
                    raise type(error)(f"{error}; the owner of the repository can push it again") from error
            else:
                break
    with changed_tasks(copy) as entries:
        entries[:] = [entry for entry in entries if entry["name"] in wanted]
    refresh(copy)


def _copy(source: Path, paths: Sequence[str], target: Path) -> None:
    for path in paths:
        with writing(target / path):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)


def pushed_paths(folder: RunFolder) -> list[str]:
    """The paths in a folder that belong into a repository."""
    paths = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file())
    return [*Listing("", tuple(paths)).of_run, *(path for path in paths if path == CARD or _is_beside(path, folder))]


def _is_beside(path: str, folder: RunFolder) -> bool:
    """Whether a file of a run serves all of its tasks: templates and other parts of the base, weights, and results."""
    is_named = path in weight_files(plain_yaml(folder.config))
    return "/" not in path and (path == RunFolder.SUMMARY or path.endswith(".safetensors") or is_named)


def _check_trusted(copy: RunFolder) -> None:
    """Refuses other code, also in the trainer, which commands that train would run."""
    for path in copy.path.glob("config*.yaml"):
        check_trusted(plain_yaml(path), path)


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
def named(place: Path, name: str) -> Iterator[None]:
    """Names the repository in errors, where they name the temporary folder of its files."""
    try:
        yield
    except RecastError as error:
        raise type(error)(str(error).replace(str(place), name)) from error
