"""Runs one command. Each command is a module with `declare(parser)`, its options, and `run(parser, config)`.

It may also have `completed(words)`, which adds to its command line what a run folder says.
"""

import importlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli import COMMANDS
from recast_pl.config.elements import parse_options
from recast_pl.config.files import with_resumed_config
from recast_pl.config.run import STRICT
from recast_pl.errors import RunError
from recast_pl.files import STORAGE_FAULTS

_WARM_UP = "cannot be written in YAML, because its parts need the optimizer; for a warm-up use recast_pl.WarmUp"

_REMEDIES = {name: f"{name} {_WARM_UP}" for name in ("SequentialLR", "ChainedScheduler")}
"""What to do where an option names a class that jsonargparse cannot make."""


def run(argv: Sequence[str]) -> int:
    """Runs a command line, whose first word is one of `recast_pl.cli.COMMANDS`, and returns the exit status.

    Raises:
        RecastError: If the user made a mistake; jsonargparse and Lightning raise their own errors.
    """
    _quieten_libraries()
    name, *words = argv
    parser = command_parser(name)
    completed: Callable[[Sequence[str]], list[str]] = getattr(_command(name), "completed", with_resumed_config)
    try:
        config = parse_options(parser, completed(words))
    except ArgumentError as error:
        remedies = [remedy for class_name, remedy in _REMEDIES.items() if class_name in str(error)]
        if remedies:
            raise RunError(remedies[0]) from error
        raise RunError(short_reason(str(error))) from error

    status: int = _command(name).run(parser, config)
    return status


def short_reason(message: str) -> str:
    """The part of jsonargparse's message that helps: it lists every type an option may have, and why each one fails.

    Args:
        message: The message, of many lines.

    Returns:
        The option and the last class that was given with wrong arguments, or else the message as it is.
    """
    failures = re.findall(r"Problem with given class_path '([^']+)':\s*(.+?)(?=\n\s*- |\Z)", message, re.DOTALL)
    if not failures:
        return message
    option = re.match(r'Parser key "[^"]+": ', message)
    return (option[0] if option else "") + ": ".join(failures[-1])


def command_parser(name: str) -> LightningArgumentParser:
    """Returns the parser of a command, with its options declared."""
    parser = LightningArgumentParser(prog=f"recast_pl {name}", description=COMMANDS[name], **STRICT)
    _command(name).declare(parser)
    return parser


def _command(name: str) -> Any:
    return importlib.import_module(f"recast_pl.cli.{name}")


def _quieten_libraries() -> None:
    """Silences what Lightning would print for each task, and Pillow for each image; other warnings stay."""
    threading.excepthook = _hide_full_disk
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks"):  # they print only what the user has asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*requested to overfit but enabled .* shuffling.*",
        ".*scheduler is using 'interval': 'epoch'.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`Trainer.predict` .*",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # unusual tags; unreadable images raise errors


def _hide_full_disk(failure: threading.ExceptHookArgs) -> None:
    """Hides the traceback if TensorBoard's thread cannot write: the main thread reports that error in one line."""
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in STORAGE_FAULTS):
        threading.__excepthook__(failure)
