"""Finds configuration files: given by path, shipped with the package, or kept in a run folder."""

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recast_pl.config.text import read_yaml
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder

_PACKAGE = Path(__file__).parents[1]

_FOLDERS = (Path("configs"), _PACKAGE.parent / "configs", _PACKAGE / "configs")

RUN_KEYS = ("seed_everything", "model", "data", "trainer")
"""The top-level entries that every config.yaml of a run has."""

PRECISION_KEY = "patch_precision"
"""A further one, which older runs lack; together they are everything that decides what a run trains."""

BUDGET_KEY = "budget"
"""What each task may cost, which a resumed run may change."""

EVALUATION_KEYS = ("evaluation", "joint")
"""Others, which change no patch."""


def find_config(name: str) -> str:
    """Finds a configuration in the working folder, in its `configs/`, or among those shipped with the package.

    Args:
        name: A path, or the name of a shipped configuration, such as `vit.yaml`; or several lines, which are the
            configuration itself.

    Raises:
        RunError: If there is no such file.
    """
    if "\n" in name:
        return name
    for folder in (Path(), *_FOLDERS):
        if (folder / name).is_file():
            return str(folder / name)
    shipped = sorted({p.relative_to(f).as_posix() for f in _FOLDERS for p in f.rglob("*.yaml")})
    raise RunError(f"config {name!r} was found neither here nor in configs/, which has {', '.join(shipped)}")


def with_config_paths(words: Sequence[str]) -> list[str]:
    """Replaces the values of `--config` and `-c` in a command line by the paths that `find_config` returns."""
    found = list(words)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c") and equals:
            found[i] = f"{option}={find_config(value)}"
        elif word in ("--config", "-c") and i + 1 < len(words):
            found[i + 1] = find_config(words[i + 1])
    return found


def with_resumed_config(words: Sequence[str]) -> list[str]:
    """Adds the run's own config.yaml to `--run_dir DIR --resume true` if no other configuration is given.

    Args:
        words: The options of `fit`.

    Raises:
        RunError: If the folder holds no run, or the config.yaml is damaged.
    """
    parts = [part for word in words for part in word.split("=", 1)]
    given = dict(itertools.pairwise(parts))
    if {"--config", "-c"} & set(parts) or "--run_dir" not in given or not _resumes(parts):
        return list(words)
    folder = RunFolder(given["--run_dir"])
    if not folder.config.is_file():
        raise RunError(f"there is nothing to resume: {no_run(folder)}; to start a new run, give a --config")
    read_run_config(folder.config)
    return ["--config", str(folder.config), *words]


def with_run_config(words: Sequence[str]) -> list[str]:
    """Puts the run's own config.yaml before the options of a command that changes a task of the run in `--run_dir`.

    Raises:
        RunError: If the folder is missing or holds no run, or the config.yaml is damaged.
    """
    parts = [part for word in words for part in word.split("=", 1)]
    given = dict(itertools.pairwise(parts))
    if {"--help", "-h"} & set(parts):
        return list(words)
    if "--run_dir" not in given:
        raise RunError("the folder of the run is missing; add --run_dir DIR")
    folder = RunFolder(given["--run_dir"])
    if not folder.config.is_file():
        raise RunError(f"{no_run(folder)}; give the folder of a run")
    read_run_config(folder.config)
    return ["--config", str(folder.config), *words]


def _resumes(parts: Sequence[str]) -> bool:
    """Whether the parts of a command line ask to resume, in any spelling that the option itself takes."""
    if "--resume" not in parts:
        return False
    value = next(iter(parts[parts.index("--resume") + 1 :]), "--")
    return value.startswith("--") or value.lower() in ("true", "yes", "on")


def no_run(folder: RunFolder) -> str:
    """Says that a folder is not a run folder, and which ones are near it."""
    path = folder.path
    if not path.is_dir():
        runs = (
            [near for near in RunFolder.find(path.parent) if near.path.parent == path.parent]
            if path.parent.is_dir()
            else []
        )
        close = difflib.get_close_matches(path.name, [near.path.name for near in runs], n=3)
        hint = f" (did you mean {' or '.join(str(path.parent / name) for name in close)}?)" if close else ""
        return f"{path} is not a run folder: it does not exist{hint}"
    runs = RunFolder.find(path)
    hint = f"; the last run in it is {runs[-1].path}" if runs else ""
    return f"{path} is not a run folder: it has no config.yaml{hint}"


def read_run_config(path: Path) -> dict[str, Any]:
    """Reads a run's config.yaml, and checks that it is complete; the parser's own errors do not name the file.

    Raises:
        RunError: If it is damaged.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); restore it") from cause
    run: dict[str, Any] = content if isinstance(content, dict) else {}
    missing = [
        key for key in RUN_KEYS if not (isinstance(run.get(key), dict) or (key == "seed_everything" and key in run))
    ]
    if missing:
        raise RunError(f"{path} is damaged (it has no {', '.join(sorted(missing))}); restore it")
    return run
