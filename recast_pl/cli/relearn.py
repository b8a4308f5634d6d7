"""The command `relearn`: learns a task of a run again, as a new version of it."""

import signal
import sys
from collections.abc import Sequence

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli.fit import explained_failures, instantiated
from recast_pl.cli.interruption import interruptible
from recast_pl.config.comparing import recorded_text
from recast_pl.config.files import PRECISION_KEY
from recast_pl.config.relearning import check_same_base
from recast_pl.config.run import config_text, declare_run, til
from recast_pl.config.task_list import name_all_tasks, with_task_of_run
from recast_pl.errors import DataError, RunError
from recast_pl.files import writing
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.stream_results import StreamResults
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.relearning import Keep, Relearning, Request
from recast_pl.runs.reservation import clean, reserved
from recast_pl.terminal import open_console


def declare(parser: LightningArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file over the configuration of the run.")
    parser.add_argument("--run_dir", type=str | None, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a trained task.")
    keep = "Which version becomes the present one: the best on the validation images, the new or the old one."
    parser.add_argument("--keep", type=Keep, default="best", help=keep)
    declare_run(parser)


def completed(words: Sequence[str]) -> list[str]:
    """Puts the configuration of the run before the options."""
    return with_task_of_run(words, "--task")


def run(parser: LightningArgumentParser, config: Namespace) -> int:
    """Learns the task again; the options may change all but the base."""
    if config.task is None:
        raise RunError("relearn needs the name of a task; add --task NAME")
    return make_version(parser, config, Request(config.task, config.keep))


def make_version(parser: LightningArgumentParser, config: Namespace, request: Request) -> int:
    """Makes a new version of a task.

    Args:
        parser: The command's parser.
        config: Its result, which has a `run_dir` and the options of `declare_run`.
        request: What the new version shall be.

    Returns:
        The exit status.
    """
    folder = RunFolder(config.run_dir)
    folder.trained([request.task])
    with writing(folder.path), reserved(folder.path), interruptible() as interruption:
        clean(folder.path)
        stream = _stream(parser, config, folder)
        _check_images(stream, request.task)
        new, present = stream.learn(request)
        stream.console.print(
            f"{request.task}: version {new} is made, version {present} is the present one", soft_wrap=True, markup=False
        )
    if interruption.signal is None:
        return 0
    name = signal.Signals(interruption.signal).name
    print(
        f"recast_pl: interrupted by {name}; the present version stays, and the same command continues the new one",
        file=sys.stderr,
    )
    return 128 + interruption.signal


def _stream(parser: LightningArgumentParser, config: Namespace, folder: RunFolder) -> Relearning:
    """Builds the stream of the run with the options that were given."""
    with explained_failures():
        text = config_text(parser, config)
    seed = check_same_base(parser, folder.config, text)
    text = recorded_text(parser, folder, text, alone=True)
    config.data.seed = seed  # of the splits, which stay
    init = instantiated(parser, config, folder, seed)
    if config.data.order_seed is None:
        name_all_tasks(init.data, folder)
    init.data.order = init.seed_everything
    console, trainers = open_console(), TrainerFactory(init.trainer).alone()
    return Relearning(
        til(init.model),
        init.data,
        folder.path,
        trainers,
        init.seed_everything,
        text,
        console,
        StreamResults(console, trainers),
        init[PRECISION_KEY],
        budget=init.budget,
    )


def _check_images(stream: Relearning, name: str) -> None:
    """Raises DataError, naming the option that helps, if the images of the task are not there."""
    for task in stream.data.tasks:
        if task.name == name and task.own_path is not None and not task.own_path.exists():
            raise DataError(
                f"the images of task {name!r} are read again, and are not at {task.own_path}; name the folder that has "
                f"them now: --data.tasks.{name}.path FOLDER"
            )
