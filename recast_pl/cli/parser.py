"""The commands, one in each module: `declare` says what it takes, `run` does it."""

import importlib
import logging
import threading
import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli import COMMANDS
from recast_pl.config.run_config import STRICT, with_config_paths, with_resumed_config
from recast_pl.files import STORAGE_FAULTS


def run(argv: Sequence[str]) -> int:
    """Runs a command.

    Args:
        argv: The command line, whose first word is one of `recast_pl.cli.COMMANDS`.

    Returns:
        The exit status.

    Raises:
        RecastError: If the user has something to mend; so do jsonargparse's and Lightning's errors.
    """
    _quieten_libraries()
    name = argv[0]
    config = command_parser(name).parse_args(with_resumed_config(with_config_paths(argv)))
    status: int = importlib.import_module(f"recast_pl.cli.{name}").run(config[name])
    return status


def command_parser(name: str) -> LightningArgumentParser:
    """The parser of a command line with one command.

    Args:
        name: Of the command.
    """
    parser = LightningArgumentParser(prog="recast_pl", **STRICT)
    command = new_parser(name)
    parser.add_subcommands(dest="command").add_subcommand(name, command)
    importlib.import_module(f"recast_pl.cli.{name}").declare(command)  # jsonargparse wants the outer level first
    return parser


def _quieten_thread(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands a full disk to the main one, where it is said once."""
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in STORAGE_FAULTS):
        threading.__excepthook__(failure)


def _quieten_libraries() -> None:
    """Silences what Lightning would say anew for each task, and Pillow for each image; what matters stays."""
    threading.excepthook = _quieten_thread
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`Trainer.predict` .*",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags; an image that cannot be read is reported


def new_parser(command: str) -> LightningArgumentParser:
    """A parser without options.

    Args:
        command: Name of the command it is for.
    """
    return LightningArgumentParser(description=COMMANDS[command], **STRICT)
