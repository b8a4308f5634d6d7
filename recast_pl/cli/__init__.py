"""The command line. It imports nothing heavy before a command is known, so that `--help` answers at once."""

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from functools import cache

import recast_pl
from recast_pl.errors import RecastError

COMMANDS = {
    "fit": "Train a stream of tasks, or fit templates by gradient.",
    "add": "Learn one more task into a run.",
    "watch": "Learn each folder of images that is put into an inbox, as a task of a run.",
    "relearn": "Learn a task of a run again, and keep the better version.",
    "list": "List the tasks of a run.",
    "remove": "Take a task out of a run.",
    "rename": "Give a task of a run another name.",
    "merge": "Put the tasks of copies of a run into it.",
    "push": "Upload trained tasks of a run to a repository of the Hugging Face Hub.",
    "pull": "Download trained tasks from a repository of the Hugging Face Hub, into a new folder or a run.",
    "test": "Evaluate every trained task of a run again.",
    "predict": "Classify images with a trained task.",
    "export": "Export a trained task as a plain model: safetensors, ONNX or torch.export.",
    "patch": "Show, compare, verify, average or quantize patches, the files of trained tasks.",
    "serve": "Serve trained tasks over HTTP: an API for programs, and a web page.",
    "compare": "Train several methods with several seeds, into one table; run it again to continue.",
    "analyze": "Analyse a decomposition: diversity and similarity of templates, parameters saved.",
    "sweep": "Train over a grid of options and seeds, into a table and a figure; run it again to continue.",
    "board": "Train methods on streams with several seeds, into results and one page; run it again to continue.",
    "reproduce": "Train a table or figure of the paper, and print ours beside it; run it again to continue.",
    "robustness": "Test trained tasks on worse images and under attack, several runs side by side.",
    "imagenet": "Compare a pretrained classifier before and after decomposition, on images.",
    "report": "Write one page of tables and figures about runs.",
    "data": "List, download and verify data sets.",
}

_SPINS = "1000"


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: The command line; None for `sys.argv`.

    Returns:
        The exit status: 0; 1 if `test` finds a difference, `data verify` a fault, or a run on an engine fails; 2 after
        an error that the user can fix; 3 if `predict` skips images that cannot be read; 130 after Ctrl-C.
    """
    _bound_spinning()
    argv = [*(sys.argv[1:] if args is None else args)]  # not by list(), which is a command of this package
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    if not argv or argv[0] not in COMMANDS:
        return _no_command(argv)
    if argv[0] == "list":  # which must not wait for the imports below
        return _list(argv[1:])
    parser = importlib.import_module("recast_pl.cli.parser")
    from jsonargparse import ArgumentError  # noqa: PLC0415
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    _freeze_modules()
    try:
        status: int = parser.run(argv)
    except (RecastError, ArgumentError, MisconfigurationException) as error:
        return _refuse(error)
    except ValueError as error:  # jsonargparse wraps the errors of constructors
        if not isinstance(error.__cause__, RecastError):
            raise
        return _refuse(error.__cause__)
    except KeyboardInterrupt:  # `fit`, `compare` and `serve` end in their own ways
        print("recast_pl: interrupted", file=sys.stderr)
        return 130
    return status


def _list(words: list[str]) -> int:
    try:
        status: int = importlib.import_module("recast_pl.cli.list").main(words, COMMANDS["list"])
    except RecastError as error:
        return _refuse(error)
    return status


@cache
def _freeze_modules() -> None:
    """Leaves the objects of imported modules out of collections of garbage: with them, each full one takes 0.4 s.

    Only once, as garbage that is there is left out, too, and a process may run many commands.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries report them as leaks


def _bound_spinning() -> None:
    """Bounds how long idle threads of OpenMP spin, unless the user has set it; OpenMP reads it when torch is imported.

    By default they spin so long that one other busy process makes a run many times slower (`benchmarks/busy.py`).
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _no_command(argv: Sequence[str]) -> int:
    """Shows the help or the version, or reports that the command is missing or unknown."""
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
