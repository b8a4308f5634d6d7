"""The command `watch`: learns each folder of images that is put into an inbox, as a task of a run."""

import shlex
import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat

from recast_pl.cli import add
from recast_pl.cli.interruption import interruptible
from recast_pl.cli.parser import command_parser
from recast_pl.cli.parser import run as run_command
from recast_pl.config.changing import task_names
from recast_pl.config.elements import parse_options
from recast_pl.errors import BusyError, DataError, RecastError, StorageError
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.inbox import Inbox
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    inbox = "Folder to look into; each folder in it becomes the task of its name."
    parser.add_argument("--inbox", type=str, required=True, help=inbox)
    parser.add_argument("--options", type=str, default="", help="Further options of add, quoted as one word.")
    every = "Seconds between two looks; a folder that changes between them is not complete yet."
    parser.add_argument("--every", type=NonNegativeFloat, default=10.0, help=every)
    parser.add_argument("--once", type=bool, default=False, help="Learn what is there, and end.")


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Learns what is in the inbox, and what is put into it, until a signal arrives."""
    folder, inbox, options = RunFolder(config.run_dir), Inbox(Path(config.inbox)), shlex.split(config.options)
    task_names(folder)
    if not inbox.folder.is_dir():
        raise DataError(f"the inbox {inbox.folder} is not a folder; make it, or correct --inbox")
    words = ["--run_dir", config.run_dir, "--task", "any", *options]
    parse_options(command_parser("add"), add.completed(words))  # so that a wrong option does not reject every task
    console = open_console()
    console.print(f"watching {inbox.folder}; Ctrl-C stops it", soft_wrap=True)
    looks = 2 if config.once else None  # the second finds what has not changed since the first
    with interruptible() as interruption:
        while looks is None or looks:
            for images in inbox.complete(folder.finished_names()):
                status = _learn(folder, images, inbox, options)
                if status:
                    return status
            looks = None if looks is None else looks - 1
            if looks != 0:
                time.sleep(config.every)
    return 0 if interruption.signal is None else 128 + interruption.signal


def _learn(folder: RunFolder, images: Path, inbox: Inbox, options: list[str]) -> int:
    """Learns a folder as a task, or writes why it cannot be; returns the status of a signal that ended it, or 0."""
    console = open_console()
    named = ["--run_dir", str(folder.path), "--task", images.name]
    try:
        status = run_command(["add", *named, "--path", str(images.resolve()), *options])
    except BusyError as error:
        console.print(f"{images.name} waits: {error}", soft_wrap=True, markup=False)
        return 0
    except StorageError:
        raise  # it is not the fault of the images
    except (RecastError, ValueError) as error:
        cause = error if isinstance(error, RecastError) else error.__cause__
        if not isinstance(cause, RecastError):
            raise
        if images.name in task_names(folder):  # nothing of it may stay, or a better folder would not fit
            run_command(["remove", *named])
        path = inbox.reject(images, " ".join(str(cause).split()))
        console.print(f"{images.name} is rejected, see {path}", soft_wrap=True, markup=False)
        return 0
    inbox.accept(images)
    return status
