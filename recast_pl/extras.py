"""Libraries that only a part of the program needs, and that are installed with an extra."""

import importlib
from typing import Any

from recast_pl.errors import RunError


def needed(module: str, extra: str) -> Any:
    """Imports a library.

    Args:
        module: Its name.
        extra: What installs it.

    Raises:
        RunError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise RunError(f'{module} is not installed; pip install "recast-pl[{extra}]"') from cause
