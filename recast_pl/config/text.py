"""The text of configurations: YAML in which `${NAME}` stands for an environment variable."""

import os
import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from recast_pl.errors import RunError

MODE = "recast_pl"
"""The parser mode of jsonargparse that reads configurations with `read_yaml`."""

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def read_yaml(text: str, path: str = "") -> Any:
    """Reads YAML, and puts in the values of environment variables.

    An entry that is one variable takes its type from the value, so that `batch_size: ${BATCH}` is a number. Keys and
    comments stay as they are.

    Args:
        text: The YAML.
        path: Where it comes from, for error messages.

    Raises:
        RunError: If a variable is not set.
    """
    return _expand(get_loader("yaml")(text), path)


def _expand(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(entry, path) for key, entry in value.items()}
    if isinstance(value, list):
        return [_expand(entry, path) for entry in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = _VARIABLE.sub(lambda match: _variable(match[1], path), value)
    if not _VARIABLE.fullmatch(value):
        return text
    typed = get_loader("yaml")(text)
    return typed if isinstance(typed, bool | int | float) else text


def _variable(name: str, path: str) -> str:
    if name not in os.environ:
        where = f" in {path}" if path else ""
        raise RunError(
            f"${{{name}}}{where} names an environment variable that is not set; set {name}, or write its value"
        )
    return os.environ[name]


set_loader(MODE, read_yaml, (yaml.YAMLError,))
