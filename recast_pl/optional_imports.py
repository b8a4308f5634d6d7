"""Imports of packages that only an extra installs."""

import importlib
from typing import Any

from recast_pl.errors import RunError


def extra(module: str, name: str) -> Any:
    """Imports a module that an extra installs.

    Args:
        module: The module to import.
        name: The extra.

    Raises:
        RunError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise RunError(f'{module} is not installed; pip install "recast-pl[{name}]"') from cause
