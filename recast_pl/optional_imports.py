"""Packages that not every user has."""

import importlib
from typing import Any

from recast_pl.errors import RunError


def extra(module: str, name: str) -> Any:
    """Imports a package of an extra.

    Args:
        module: The package's module.
        name: Of the extra.

    Raises:
        RunError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise RunError(f'{module} is not installed; pip install "recast-pl[{name}]"') from cause
