"""`fit`: learns a stream of tasks, or fits templates by gradient."""

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace
from lightning import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recast_pl.cli.interruption import interruptible, is_main_process
from recast_pl.cli.parser import new_parser
from recast_pl.config.run_config import check_same_run, config_text, declare_run, til
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.errors import RunError
from recast_pl.files import remove_unfinished, writing
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.stream_results import StreamResults
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.mimicry import fit_mimicry
from recast_pl.runs.stream import Stream
from recast_pl.studies.engines import ONE_DEVICE, Engine, run_units

_RUN_DIR = "RECAST_PL_RUN_DIR"  # how the processes that DDP starts learn the folder of the first one

_NEAR = 0.98  # of a weight's cosine; the paper's fits have 0.985


def declare(parser: LightningArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; also found in configs/.")
    parser.add_argument("--run_dir", type=str | None, help="Run folder (default: logs/CONFIG/TIME).")
    parser.add_argument("--resume", type=bool, default=False, help="Continue the run in --run_dir.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Tasks to learn now (default: all).")
    parser.add_argument("--engine", type=Engine | None, help="Where to learn the tasks, one on each device.")
    declare_run(parser)


def run(config: Namespace) -> int:
    """Learns the stream, or fits templates by gradient where the model is a `MimicryModule`."""
    run_dir = _run_dir(config)
    with writing(run_dir):
        return _fit(config, run_dir)


def _fit(config: Namespace, run_dir: Path) -> int:
    text = config_text(config)
    if is_main_process():
        if not config.resume:
            RunFolder(run_dir).check_unused()
        check_same_run(RunFolder(run_dir).config, text)
        if not config.only:  # else others may be writing
            remove_unfinished(run_dir)
    seed_everything(config.seed_everything, verbose=False)
    parser = new_parser("fit")
    declare(parser)
    init = parser.instantiate(config)
    console, status = Console(), 0
    if isinstance(init.model, MimicryModule):
        if init.engine is not None or init.only:
            raise RunError("MimicryModule learns no tasks; leave out --engine and --only")
        trainers = TrainerFactory(init.trainer)
        fitted, near = fit_mimicry(init.model, RunFolder(run_dir), trainers, config.seed_everything, text)
        if is_main_process():
            console.print(fitted.table())
            console.print(_quality(near), soft_wrap=True)
    else:
        with interruptible() as interruption:
            status = _learn(init, run_dir, text, console)
        if interruption.signal is not None:
            return _say_how_to_go_on(run_dir, interruption.signal)
    if is_main_process():
        console.print(f"run folder: {run_dir}", soft_wrap=True)
    return status


def _quality(similarities: Mapping[str, float]) -> str:
    """How near fitted weights are to the pretrained ones, and what to do if they are not."""
    name, lowest = min(similarities.items(), key=lambda item: item[1])
    mean = sum(similarities.values()) / len(similarities)
    said = f"cosine with the pretrained weights: mean {mean:.4f}, lowest {lowest:.4f} ({name})"
    remedy = "; tasks suffer from weights so far off: fit by mimicry/vae_mse.yaml, or leave the fit to the closed form"
    return said + (remedy if lowest < _NEAR else "")


def _learn(init: Namespace, run_dir: Path, text: str, console: Console) -> int:
    """Learns the tasks in this process, or on an engine; 1 if that failed for some."""
    trainers, seed = TrainerFactory(init.trainer), init.seed_everything
    results = StreamResults(console, trainers)
    if init.engine is None:
        Stream(til(init.model), init.data, run_dir, trainers, seed, text, console, results).run(init.only)
        return 0
    here = trainers.alone(accelerator="cpu")  # which need not have what the engine has
    learning = Stream(til(init.model), init.data, run_dir, here, seed, text, console, results)
    learning.check_isolated("--engine")
    _check_one_device(init.trainer)
    left = learning.begin(init.only)
    words = ["fit", "--run_dir", str(run_dir), "--resume", "true", *ONE_DEVICE, "--only"]
    failed = run_units(
        init.engine, {f"task {name}": [*words, name] for name in left}, lambda name: console.print(f"{name} is learnt")
    )
    learning.merge()
    if failed:
        print(f"to go on: python -m recast_pl {_resuming(run_dir)}, with the engine", file=sys.stderr)
    return int(failed != 0)


def _check_one_device(settings: Mapping[str, Any]) -> None:
    asked = {key: settings.get(key) for key in ("devices", "num_nodes")}
    wrong = {key: value for key, value in asked.items() if value not in ("auto", 1, "1")}
    if wrong:
        (key, value), *_ = wrong.items()
        raise RunError(
            f"--trainer.{key} {value} is not for --engine, which has one device for each task; leave out either"
        )


def _resuming(run_dir: Path) -> str:
    return shlex.join(["fit", "--run_dir", str(run_dir), "--resume", "true"])


def _say_how_to_go_on(run_dir: Path, number: int) -> int:
    if is_main_process():
        kept = f"what is learnt is kept. To go on: python -m recast_pl {_resuming(run_dir)}"
        after = kept if RunFolder(run_dir).config.is_file() else "nothing has been learnt yet"
        print(f"recast_pl: interrupted by {signal.Signals(number).name}; {after}", file=sys.stderr)
    return 128 + number


def _run_dir(config: Namespace) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir)
    if config.resume:
        raise RunError("--resume true needs the --run_dir to continue")
    if not is_main_process():
        if _RUN_DIR not in os.environ:
            raise RunError("several processes were started from outside; give them one --run_dir")
        return Path(os.environ[_RUN_DIR])
    name = Path(str(config.config[-1])).stem if config.config else "run"
    run_dir = Path("logs") / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[_RUN_DIR] = str(run_dir)
    return run_dir
