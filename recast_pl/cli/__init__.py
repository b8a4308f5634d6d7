"""The command line. Nothing heavy is imported before a command is known, so that help is there at once."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import recast_pl
from recast_pl.errors import RecastError

COMMANDS = {
    "fit": "Learn a stream of tasks, or fit templates by gradient.",
    "test": "Evaluate every learnt task of a run again.",
    "predict": "Classify images with a learnt task.",
    "export": "Hand a learnt task out as a plain model: safetensors, ONNX or torch.export.",
    "patch": "Show, compare, verify, average or quantize files of learnt tasks.",
    "serve": "Answer over HTTP with learnt tasks, for programs and, on a page, for people.",
    "compare": "Learn by several methods and seeds, into one table; the same command goes on.",
    "analyze": "Measure a decomposition: diversity, similarity, numbers saved.",
    "sweep": "Learn by a grid over options and seeds, into a table and a figure; the same command goes on.",
    "imagenet": "Compare a pretrained classifier with itself, decomposed, on images.",
    "report": "State runs as one page of tables and figures.",
    "data": "List, download and verify data sets.",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: The command line; None for that of the process.

    Returns:
        The exit status: 0, 1 if `test` finds a difference or `data verify` a fault, 2 if the user has something to
        mend.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] not in COMMANDS:
        return _no_command(argv)
    parser = importlib.import_module("recast_pl.cli.parser")
    from jsonargparse import ArgumentError  # noqa: PLC0415
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    try:
        status: int = parser.run(argv)
    except (RecastError, ArgumentError, MisconfigurationException) as error:
        return _refuse(error)
    except ValueError as error:  # jsonargparse's own, about what a constructor has raised
        if not isinstance(error.__cause__, RecastError):
            raise
        return _refuse(error.__cause__)
    return status


def _no_command(argv: Sequence[str]) -> int:
    """Shows the help, or says that there is no such command."""
    description = (recast_pl.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("recast_pl", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=recast_pl.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands, each with its own --help")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    try:
        parser.parse_args(argv)
    except argparse.ArgumentError as error:
        return _refuse(error)
    return _refuse(f"a command is missing; choose one of {', '.join(COMMANDS)}, or --help")


def _refuse(error: object) -> int:
    print(f"recast_pl: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
