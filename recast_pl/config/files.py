"""Finds configuration files: given by path, shipped with the package, or kept in a run folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml

from recast_pl.errors import RunError

_PACKAGE = Path(__file__).parents[1]

_FOLDERS = (Path("configs"), _PACKAGE.parent / "configs", _PACKAGE / "configs")

RUN_KEYS = ("seed_everything", "model", "data", "trainer")
"""The top-level entries of a run's config.yaml: everything that decides the run."""


def find_config(name: str) -> str:
    """Finds a configuration in the working folder, in its `configs/`, or among those shipped with the package.

    Args:
        name: A path, or the name of a shipped configuration, such as `vit.yaml`.

    Raises:
        RunError: If there is no such file.
    """
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
        RunError: If the config.yaml is damaged.
    """
    parts = [part for word in words for part in word.split("=", 1)]
    given = dict(itertools.pairwise(parts))
    if given.get("--resume", "").lower() == "true" and "--run_dir" in given and not {"--config", "-c"} & set(parts):
        path = Path(given["--run_dir"]) / "config.yaml"
        if path.is_file():
            check_run_config(path)
            return ["--config", str(path), *words]
    return list(words)


def check_run_config(path: Path) -> None:
    """Checks that a run's config.yaml can be read and is complete; the parser's own errors do not name the file.

    Raises:
        RunError: If it is damaged.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); restore it") from cause
    missing = set(RUN_KEYS) - set(content if isinstance(content, dict) else ())
    if missing:
        raise RunError(f"{path} is damaged (it has no {', '.join(sorted(missing))}); restore it")
