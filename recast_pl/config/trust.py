"""Refuses to open a run whose configuration would run code of others.

A configuration names classes and functions by their dotted paths, and opening a run imports and calls them. So a run
folder from elsewhere could run any code. Everything is looked at before anything is imported.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torchvision

from recast_pl.backbones.builders import FunctionSource, find_source
from recast_pl.errors import RunError

_CLASSES = ("recast_pl.", "torch.optim.", "torch.nn.", "torchvision.transforms.", "timm.optim.")

_NOT_IMPORTED = {
    "weights",
    "decomposition",
    "path",
    "root",
    "name",
    "dataset",
    "targets",
    "vectors",
}  # plain text, never a function

_UNPICKLED = {"checkpoint_path", "pretrained_cfg"}  # arguments of timm: some versions unpickle such files

# a text here would name a function, or another file of YAML; `fit` writes neither
_NOT_TEXT = {
    *("model", "init_args", "backbone", "pieces", "layout", "optimizer", "lr_scheduler", "source"),
    *("data", "tasks", "transforms"),
}


def check_trusted(content: Mapping[str, Any], where: object) -> None:
    """Checks that a configuration names no code but that of this package, timm, torchvision and torch.

    Args:
        content: The configuration, as read from YAML.
        where: Its file, for the error message.

    Raises:
        RunError: If it names other code.
    """
    for key, value in entries(content):
        name = value.get("name") if key == "backbone" and isinstance(value, Mapping) else value
        if not _is_trusted(key, value):
            raise RunError(
                f"{where} uses code that is not part of recast_pl, timm, torchvision or torch: {name}. If you trust "
                "whoever made the run, add --trust (in Python: trust=True)"
            )


def _is_trusted(key: str, value: Any) -> bool:
    if key == "backbone" and isinstance(value, Mapping):
        return "name" not in value or _is_known_backbone(str(value["name"]))
    if key in _UNPICKLED:
        return False
    if key == "class_path":
        return _is_known_class(str(value))
    if not isinstance(value, str) or key in _NOT_IMPORTED:
        return True
    return key not in _NOT_TEXT and not _is_import_path(value)


def entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of a configuration, at any depth, with its key; an entry of a list has the key of the list."""
    yield key, value
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from entries(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from entries(entry, key)


def _is_known_backbone(name: str) -> bool:
    """Whether a name is a model of timm or torchvision, also as a dotted path, or a backbone of this package."""
    if not isinstance(find_source(name, "random", {}), FunctionSource):
        return True
    module, _, function = name.rpartition(".")
    if module.startswith("timm.models"):
        return bool(timm.is_model(function))
    if module.startswith("torchvision.models"):
        return function in torchvision.models.list_models()
    return module in ("recast_pl.backbones", "recast_pl.backbones.lite0")


def _is_known_class(path: str) -> bool:
    """Whether a path without dots, which only stands for a class in memory, or a class of the known libraries.

    A function or method is not enough: `lightning.LightningModule.load_from_checkpoint` would unpickle a file.
    """
    module, _, name = path.rpartition(".")
    if not module:
        return True
    if not path.startswith(_CLASSES):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(_CLASSES)


def _is_import_path(text: str) -> bool:
    """Whether a text could name a function to import, as options that take a callable allow."""
    first, *others = text.split(".")
    if not others or not all(part.isidentifier() for part in (first, *others)):
        return False
    try:
        return importlib.util.find_spec(first) is not None
    except ValueError:  # a module in memory that was not found by name, such as __main__
        return True
