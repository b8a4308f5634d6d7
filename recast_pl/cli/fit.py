"""The command `fit`: trains a stream of tasks, or fits templates by gradient."""

import os
import re
import shlex
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace
from lightning import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recast_pl.cli.interruption import interruptible, is_main_process
from recast_pl.cli.parser import short_reason
from recast_pl.config.comparing import check_same_run, recorded_text
from recast_pl.config.files import PRECISION_KEY, with_resumed_config
from recast_pl.config.paths import add_images, locate_data, locate_paths, recorded_path
from recast_pl.config.run import config_text, declare_run, til
from recast_pl.config.task_list import with_task_of_run
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.errors import RecastError, RunError
from recast_pl.files import writing
from recast_pl.inference.class_evaluation import class_evaluation
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.stream_results import StreamResults
from recast_pl.reporting.tables import MOST_TASKS
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.mimicry import fit_mimicry
from recast_pl.runs.relearning import Request
from recast_pl.runs.reservation import clean, make_folder, reserved
from recast_pl.runs.stream import Stream
from recast_pl.studies.engines import ONE_DEVICE, Engine, run_units
from recast_pl.terminal import open_console

_RUN_DIR = "RECAST_PL_RUN_DIR"  # tells the processes that DDP starts the run folder of the first one

_GOOD_COSINE = 0.98  # between a fitted and a pretrained weight; the paper's fits reach 0.985


def declare(parser: LightningArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; also found in configs/.")
    parser.add_argument("--run_dir", type=str | None, help="Run folder (default: logs/CONFIG/TIME).")
    resume = "Continue the run in --run_dir; a fit of templates that was interrupted starts over."
    parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=resume)
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Tasks to train now (default: all).")
    parser.add_argument("--engine", type=Engine | None, help="Where to train the tasks, each on one device.")
    extend = "Task of the run in --run_dir that gets more images and classes, as a new version."
    parser.add_argument("--extend", type=str | None, help=extend)
    path = "With --extend: folder or manifest of the images to add; classes that are new come after the old ones."
    parser.add_argument("--path", type=str | None, help=path)
    refine = "With --extend: train what the task has learnt further (default: only its head is found again)."
    parser.add_argument("--refine", type=bool, nargs="?", const=True, default=False, help=refine)
    declare_run(parser)


def completed(words: Sequence[str]) -> list[str]:
    """Adds the configuration of a run that is resumed, or whose task is extended."""
    extends = "--extend" in [word.partition("=")[0] for word in words]
    return with_task_of_run(words, "--extend") if extends else with_resumed_config(words)


def run(parser: LightningArgumentParser, config: Namespace) -> int:
    """Trains the stream of tasks, or fits templates by gradient if the model is a `MimicryModule`."""
    if config.extend is not None or config.path is not None:
        return _extend(parser, config)
    run_dir = _run_dir(config)
    alone = is_main_process() and not config.only  # others share the folder on purpose
    with writing(run_dir), reserved(run_dir) if alone else nullcontext():
        return _fit(parser, config, run_dir)


def _extend(parser: LightningArgumentParser, config: Namespace) -> int:
    """Adds images and classes to a task of a run."""
    from recast_pl.cli.relearn import make_version  # noqa: PLC0415, which imports this module

    if config.extend is None or config.path is None:
        raise RunError("--extend TASK and --path FOLDER go together; give both, with the --run_dir of the task")
    if config.only or config.engine is not None:
        raise RunError("--extend makes a new version of one task in this process; leave out --only and --engine")
    path = recorded_path(RunFolder(config.run_dir), config.path)
    return make_version(parser, config, Request(config.extend, "new", path, continues=True, refine=config.refine))


def _fit(parser: LightningArgumentParser, config: Namespace, run_dir: Path) -> int:
    with explained_failures():
        text = config_text(parser, config)
    if is_main_process():
        if not config.resume:
            RunFolder(run_dir).check_unused()
        check_same_run(parser, RunFolder(run_dir).config, text)
        if not config.only:  # otherwise other processes may be writing there
            clean(run_dir)
    text = recorded_text(parser, RunFolder(run_dir), text)
    init = instantiated(parser, config, RunFolder(run_dir))
    console = open_console()

    if isinstance(init.model, MimicryModule):
        _fit_templates(init, run_dir, text, console)
        status = 0
    else:
        with interruptible() as interruption:
            status = _train(init, run_dir, text, console)
        if interruption.signal is not None:
            return _report_interruption(run_dir, interruption.signal)
    if is_main_process():
        kept = TrainerFactory(init.trainer).keeps
        console.print(f"run folder: {run_dir}" if kept else "a trial by fast_dev_run: nothing is kept", soft_wrap=True)
    return status


@contextmanager
def explained_failures() -> Iterator[None]:
    """A context in which a class that refuses its arguments is an error of one line."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, RecastError):
            raise
        if unwritable := re.search(r"cannot represent an object', <(.+?)>", str(error)):
            raise RunError(
                f"config.yaml cannot hold {unwritable[1]}; give that argument as text or a number"
            ) from error
        raise RunError(f"the options cannot be used: {short_reason(str(error))}") from error


def instantiated(
    parser: LightningArgumentParser, config: Namespace, folder: RunFolder, seed: int | None = None
) -> Namespace:
    """Makes model, data and trainer, with files that are looked for where the run was started, too.

    Args:
        parser: The command's parser.
        config: Its result; paths are changed in place.
        folder: The run folder.
        seed: Of the weights, if they are random; None for that of the configuration.
    """
    locate_paths(config.model, folder.model_folders())
    locate_data(config.data, folder.start_folders())
    seed_everything(config.seed_everything if seed is None else seed, verbose=False)
    with explained_failures():
        init: Namespace = parser.instantiate(config)
    add_images(init.data, folder)
    return init


def make_stream(init: Namespace, run_dir: Path, text: str, console: Console, most: int = MOST_TASKS) -> Stream:
    """Makes the stream of a run from its parts; `text` is the content of its config.yaml, and `most` rows are shown."""
    trainers = TrainerFactory(init.trainer)
    results = StreamResults(console, trainers, most)
    if init.get("engine") is not None:
        trainers = trainers.alone(accelerator="cpu")  # this process only merges, and may lack the engine's devices
    model, seed, precision = til(init.model), init.seed_everything, init[PRECISION_KEY]
    if init.joint and init.evaluation != "class":
        raise RunError("--joint names classifiers over the classes of all tasks; add --evaluation class")
    evaluation = class_evaluation(model, init.joint) if init.evaluation == "class" else None
    return Stream(model, init.data, run_dir, trainers, seed, text, console, results, precision, evaluation, init.budget)


def _fit_templates(init: Namespace, run_dir: Path, text: str, console: Console) -> None:
    if init.engine is not None or init.only:
        raise RunError("MimicryModule does not train tasks; leave out --engine and --only")
    if RunFolder(run_dir).mimicry.is_file():
        console.print("the templates are fitted already")
        return
    trainers = TrainerFactory(init.trainer)
    fitted, cosines = fit_mimicry(init.model, RunFolder(run_dir), trainers, init.seed_everything, text)
    if is_main_process():
        console.print(fitted.table())
        mean, name = statistics.mean(cosines.values()), min(cosines, key=lambda weight: cosines[weight])
        quality = f"weight cosine with the pretrained network: mean {mean:.4f}, lowest {cosines[name]:.4f} ({name})"
        remedy = "; such weights harm the tasks: use the rates and epochs of mimicry_vit.yaml, or use the closed form"
        console.print(quality + (remedy if cosines[name] < _GOOD_COSINE else ""), soft_wrap=True)


def _train(init: Namespace, run_dir: Path, text: str, console: Console) -> int:
    """Trains the tasks in this process or on the engine; returns 1 if one of them failed."""
    stream = make_stream(init, run_dir, text, console)
    if init.engine is not None:
        return _train_on_engine(stream, init, console)
    stream.run(init.only)
    return 0


def _train_on_engine(stream: Stream, init: Namespace, console: Console) -> int:
    """Trains each task by its own command line."""
    stream.check_isolated("--engine")
    if not stream.trainers.keeps:
        raise RunError("--engine needs the results of each task, and --trainer.fast_dev_run keeps none; leave out one")
    for key in ("devices", "num_nodes"):
        if init.trainer.get(key) not in ("auto", 1, "1"):
            raise RunError(
                f"--trainer.{key} {init.trainer[key]} does not work with --engine, which gives each task one device; "
                "leave out one of them"
            )
    words = _resuming(stream.folder.path)
    units = {f"task {name}": [*words, *ONE_DEVICE, "--only", name] for name in stream.begin(init.only)}
    failed = run_units(init.engine, units, lambda name: console.print(f"{name} is trained"))
    stream.gather()
    if failed:
        print(f"to continue: python -m recast_pl {shlex.join(words)}, with the engine", file=sys.stderr)
    return int(failed != 0)


def _resuming(run_dir: Path) -> list[str]:
    return ["fit", "--run_dir", str(run_dir), "--resume", "true"]


def _report_interruption(run_dir: Path, number: int) -> int:
    """Prints how to continue; returns the exit status."""
    if is_main_process():
        resuming = shlex.join(_resuming(run_dir))
        kept = f"everything trained so far is kept. To continue: python -m recast_pl {resuming}"
        after = kept if RunFolder(run_dir).config.is_file() else "nothing has been trained yet"
        print(f"recast_pl: interrupted by {signal.Signals(number).name}; {after}", file=sys.stderr)
    return 128 + number


def _run_dir(config: Namespace) -> Path:
    """Returns the given run folder, or names a new one."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    if config.resume:
        raise RunError("--resume true needs the --run_dir to continue")
    if not is_main_process():
        if _RUN_DIR not in os.environ:
            raise RunError("several processes were started from outside; give all of them the same --run_dir")
        return Path(os.environ[_RUN_DIR])
    name = Path(str(config.config[-1])).stem if config.config else "run"
    run_dir = make_folder(Path("logs") / name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    os.environ[_RUN_DIR] = str(run_dir)
    return run_dir
