"""Options for one piece or one task, such as `--model.pieces.rank 4`; the parser itself knows only whole lists."""

import dataclasses
import inspect
import json
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace, get_loader
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import with_config_paths
from recast_pl.config.run import config_text
from recast_pl.data.class_streams import drawn_tasks
from recast_pl.data.tasks import TaskConfig
from recast_pl.errors import RunError

_OPTION = re.compile(r"--(model|data)\.(?:init_args\.)?(pieces|tasks)\.(.+)")


class _Override(NamedTuple):
    """An option for one element of a list: of which list, the words after it, and the text of the value."""

    list: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"--{self.list}.{self.key}"


def parse_options(parser: LightningArgumentParser, words: Sequence[str]) -> Namespace:
    """Parses the options of a command, which may find configurations by name and change one piece or one task.

    An option names the element by its class, its task or its position from 0 (`--model.pieces.LoRA.rank 4`,
    `--data.tasks.signs.path FOLDER`, `--model.pieces.0.layout.groups 3`), or not at all if only one takes the argument.
    After that, a task that stands for several (`subset.tasks`) is replaced by them.

    Raises:
        RunError: If a configuration is not found, or an option fits no element or several.
    """
    words, overrides = _split(with_config_paths(words))
    if overrides:
        config = parser.parse_args([word for word in words if not word.startswith("--print_config")])
        content = get_loader("yaml")(config_text(parser, config))
        lists = {
            "model.pieces": content["model"]["init_args"].get("pieces", ()),
            "data.tasks": content["data"].get("tasks", ()),
        }
        for override in overrides:
            _apply(override, lists[override.list])
        for name in dict.fromkeys(override.list for override in overrides):
            words += [f"--{name}", json.dumps(lists[name])]
    config = parser.parse_args(words)
    if config.get("data.tasks"):
        config["data.tasks"] = [drawn for task in config.data.tasks for drawn in drawn_tasks(task)]
    return config


def _split(words: Sequence[str]) -> tuple[list[str], list[_Override]]:
    """Separates the options for single elements from all others."""
    others, overrides, rest = list[str](), list[_Override](), iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        found = _OPTION.fullmatch(option)
        if found is None:
            others.append(word)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise RunError(f"{option} has no value; give one")
        overrides.append(_Override(f"{found[1]}.{found[2]}", found[3], text))
    return others, overrides


def _apply(override: _Override, elements: Sequence[dict[str, Any]]) -> None:
    """Changes the element that an option means."""
    element, key = _find(override, elements)
    first, *others = key.split(".")
    if first not in _arguments(element):
        raise RunError(f"{override}: {_label(element)} takes no {first!r}; it takes {', '.join(_arguments(element))}")
    entries = element.setdefault("init_args", {}) if "class_path" in element else element
    for part, following in zip([first, *others], others, strict=False):
        entries = entries.setdefault(part, {})
        if not isinstance(entries, dict):
            raise RunError(f"{override}: {part!r} has no entries, so none can be {following!r}; leave that out")
    entries[(others or [first])[-1]] = get_loader("yaml")(override.value)


def _find(override: _Override, elements: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The element that an option means, and what the option says about it."""
    position, _, rest = override.key.partition(".")
    if position.isdecimal() and rest and int(position) < len(elements):
        return elements[int(position)], rest
    named = [e for e in elements if override.key.casefold().startswith(f"{_label(e)}.".casefold())]
    if len(named) == 1:
        return named[0], override.key[len(_label(named[0])) + 1 :]
    taking = named or [element for element in elements if position in _arguments(element)]
    if len(taking) == 1:
        return taking[0], override.key
    labels = [_label(element) for element in (taking or elements)]
    how = f"name one of them, such as --{override.list}.{_example(labels)}.…"
    if not taking:
        raise RunError(f"{override} fits none of {', '.join(labels) or 'the empty list'}; {how}")
    raise RunError(f"{override} fits {' and '.join(labels)}; {how}")


def _example(labels: Sequence[str]) -> str:
    """How to name the first element: by its label, or by its position if another has the same label."""
    return labels[0] if labels and labels.count(labels[0]) == 1 else "0"


def _label(element: Mapping[str, Any]) -> str:
    """The class name of a piece, or the name of a task."""
    return str(element["class_path"]).rpartition(".")[2] if "class_path" in element else str(element["name"])


def _arguments(element: Mapping[str, Any]) -> list[str]:
    """The arguments that a piece or a task takes."""
    if "class_path" in element:
        return list(inspect.signature(pkgutil.resolve_name(element["class_path"])).parameters)
    return [field.name for field in dataclasses.fields(TaskConfig)]
