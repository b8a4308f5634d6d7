"""The command `add`: learns one more task into a run, as `fit --resume` does with one more task in its list."""

import itertools
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from jsonargparse import ActionConfigFile, Namespace, get_loader
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recast_pl.cli.fit import explained_failures, instantiated, make_stream
from recast_pl.cli.interruption import interruptible, is_main_process
from recast_pl.config.comparing import check_same_run
from recast_pl.config.files import no_run
from recast_pl.config.paths import recorded_path
from recast_pl.config.run import config_text, declare_run, til
from recast_pl.config.task_list import changed_tasks, name_all_tasks, put_task, with_tasks
from recast_pl.errors import RunError
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.folder import RunFolder, TaskFiles
from recast_pl.runs.images import check_images
from recast_pl.runs.layout import positions, shares_weights
from recast_pl.runs.reservation import changing, reserved
from recast_pl.runs.stream import Stream
from recast_pl.terminal import open_console

_ROWS = 10  # tasks that the table shows at the end, where a run may have 1,000


def declare(parser: LightningArgumentParser) -> None:
    """Adds the options of the command."""
    # not required of the parser, which also reads configurations, that have neither
    parser.add_argument("--run_dir", type=str | None, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of the task.")
    path = "Its images: a folder or manifest, as in data.tasks (default: the data set that is called like the task)."
    parser.add_argument("--path", type=str | None, help=path)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file laid over the run's configuration.")
    declare_run(parser)


def completed(words: Sequence[str]) -> list[str]:
    """Puts the configuration of the run, with the task at the end of its list, before the options."""
    parts = [part for word in words for part in word.split("=", 1)]
    given = dict(itertools.pairwise(parts))
    if {"--help", "-h"} & set(words):
        return list(words)
    for option in ("--run_dir", "--task"):
        if option not in given:
            raise RunError(f"{option} is missing; add needs --run_dir DIR --task NAME, and --path FOLDER of its images")
    folder = RunFolder(given["--run_dir"])
    if not folder.config.is_file():
        raise RunError(f"add needs a run: {no_run(folder)}; to start one, use 'fit'")
    path = recorded_path(folder, given["--path"]) if "--path" in given else None

    def choose(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if path is not None or all(task["name"] != given["--task"] for task in tasks):
            put_task(tasks, {"name": given["--task"]} | ({} if path is None else {"path": path}))
        apart = folder.is_trained and not shares_weights(folder.path)
        return [task for task in tasks if task["name"] == given["--task"]] if apart else tasks  # others cost time

    return ["--config", with_tasks(folder.config, choose), *words]


def run(parser: LightningArgumentParser, config: Namespace) -> int:
    """Learns the task, unless that is done, and writes the results of all tasks."""
    folder, console = RunFolder(config.run_dir), open_console()
    with explained_failures():
        text = config_text(parser, config)
    check_same_run(parser, folder.config, text, adding=config.task)
    (entry,) = (task for task in get_loader("yaml")(text)["data"]["tasks"] if task["name"] == config.task)
    init = instantiated(parser, config, folder)
    name_all_tasks(init.data, folder)
    if not TrainerFactory(init.trainer).keeps:
        raise RunError("--trainer.fast_dev_run keeps nothing, so that no task would be added; leave it out")
    with interruptible() as interruption:
        _add(init, folder, entry, text, console)
    if interruption.signal is not None:
        if is_main_process():
            name = signal.Signals(interruption.signal).name
            print(f"recast_pl: interrupted by {name}; repeat the command to continue", file=sys.stderr)
        return 128 + interruption.signal
    if is_main_process():
        console.print(f"task {config.task} is in {folder.path}", soft_wrap=True)
    return 0


def _add(init: Namespace, folder: RunFolder, entry: dict[str, Any], text: str, console: Console) -> None:
    name, data = str(entry["name"]), init.data
    if not _is_finished(init, folder, name):
        data.prepare([[task.name for task in data.tasks].index(name)])  # a task that cannot be used is not listed
        if is_main_process():
            with changed_tasks(folder) as tasks:
                put_task(tasks, entry)
    stream = _stream(init, folder, text, console)
    if not til(init.model).isolated:
        with reserved(folder.path) if is_main_process() else nullcontext():
            stream.run()
        return
    files = _files(folder, [task.name for task in data.tasks], name)
    if not files.patch.exists() or init.evaluation == "class":  # which needs the network also for the results
        with reserved(files.checkpoints) if is_main_process() else nullcontext():
            stream.run([name])
    if is_main_process():
        with changing(folder.path):
            _stream(init, folder, text, console).gather()


def _stream(init: Namespace, folder: RunFolder, text: str, console: Console) -> Stream:
    """The stream of all tasks that the run lists now."""
    name_all_tasks(init.data, folder)
    return make_stream(init, folder.path, text, console, _ROWS)


def _is_finished(init: Namespace, folder: RunFolder, name: str) -> bool:
    """Whether the task is trained; raises RunError if it was trained on other images."""
    names = [task.name for task in init.data.tasks]
    files = _files(folder, names, name)
    if not files.patch.exists():
        return False
    if init.data.is_there(names.index(name)):
        check_images(init.data, names.index(name), files.load_record(), resuming=True)
    return True


def _files(folder: RunFolder, names: Sequence[str], name: str) -> TaskFiles:
    index = names.index(name)
    return folder.files(positions(folder.path, names)[index], name)
