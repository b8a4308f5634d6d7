"""Adapt one pretrained vision model to any number of tasks: each a patch of a few dozen numbers and a head.

An implementation of RECAST (Tasnim and Plummer, *Reparameterized, Compact weight Adaptation for Sequential
Tasks*, ICLR 2025).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recast_pl.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Imports the public names on first use, so that the help of the command line does not wait for torch."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        api = importlib.import_module("recast_pl.api")
        if name == "__all__":
            return sorted(public for public in vars(api) if not public.startswith("_"))
        return getattr(api, name)
