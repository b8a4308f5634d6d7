"""The commands, each declared by the types it takes."""

import itertools
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recast_pl import stream
from recast_pl.cli import COMMANDS
from recast_pl.comparison import Comparison
from recast_pl.data.catalogue import CATALOGUE, PAPER, source_faults
from recast_pl.data.module import BadImagePolicy, SequentialTaskDataModule, data_root
from recast_pl.data.tasks import TaskConfig
from recast_pl.decomposition.module import MimicryModule
from recast_pl.engines import ONE_DEVICE, Engine, Here, run_units
from recast_pl.errors import RunError
from recast_pl.files import STORAGE_FAULTS, remove_unfinished, write_atomic, writing
from recast_pl.report import catalogue_table, evaluation_table, table_csv
from recast_pl.til.module import TILModule
from recast_pl.training import TrainerFactory

CONFIG_FOLDERS = (Path("configs"), Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")
_STRICT: Any = {"exit_on_error": False, "allow_abbrev": False}
_RUN_DIR = "RECAST_PL_RUN_DIR"  # how the processes that DDP starts learn the folder of the first one


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
    config = command_parser(argv[0]).parse_args(_with_resumed_config(_with_config_paths(argv)))
    commands = {"fit": fit, "test": test, "predict": predict, "data": data, "compare": compare}
    command = config.pop("command")
    return commands[command](config[command])


def command_parser(name: str) -> ArgumentParser:
    """The parser of one command.

    Args:
        name: Of the command.
    """
    parser = ArgumentParser(prog="recast_pl", **_STRICT)
    commands = parser.add_subcommands(dest="command")
    parsers = {"fit": fit_parser, "test": test_parser, "predict": predict_parser, "compare": compare_parser}
    if name == "data":
        data_parser = ArgumentParser(description=COMMANDS[name], **_STRICT)
        commands.add_subcommand(name, data_parser)
        _add_data_actions(data_parser)  # jsonargparse wants the outer level first
    else:
        commands.add_subcommand(name, parsers[name]())
    return parser


def fit_parser() -> LightningArgumentParser:
    """The parser of `fit`: model, data and trainer, as in LightningCLI."""
    parser = LightningArgumentParser(description=COMMANDS["fit"], **_STRICT)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; also found in configs/.")
    parser.add_argument("--run_dir", type=str | None, help="Run folder (default: logs/CONFIG/TIME).")
    parser.add_argument("--resume", type=bool, default=False, help="Continue the run in --run_dir.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Tasks to learn now (default: all).")
    parser.add_argument("--engine", type=Engine | None, help="Where to learn the tasks, one on each device.")
    parser.add_argument("--seed_everything", type=int, default=42, help="Decides all randomness of the run.")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(SequentialTaskDataModule, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.link_arguments("seed_everything", "data.seed")
    parser.set_defaults(
        {
            "trainer.enable_model_summary": False,  # one for each task would say the same
            "trainer.log_every_n_steps": 10,  # tasks are short
            "trainer.num_sanity_val_steps": 0,  # the probe has read the validation images already
        }
    )
    return parser


def test_parser() -> ArgumentParser:
    """The parser of `test`."""
    parser = ArgumentParser(description=COMMANDS["test"], **_STRICT)
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    return parser


def predict_parser() -> ArgumentParser:
    """The parser of `predict`."""
    parser = ArgumentParser(description=COMMANDS["predict"], **_STRICT)
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str, required=True, help="Name of a learnt task.")
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Image files.")
    parser.add_argument("--output", type=str, required=True, help="CSV file: path,label,probability.")
    return parser


def compare_parser() -> ArgumentParser:
    """The parser of `compare`."""
    parser = ArgumentParser(description=COMMANDS["compare"], **_STRICT)
    parser.add_argument("--base", type=str, nargs="+", default=[], help="Configs that all methods share.")
    parser.add_argument("--configs", type=str, nargs="+", required=True, help="A config for each method.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1998, 3142592], help="Seeds to learn with.")
    parser.add_argument("--output", type=str, required=True, help="Folder: METHOD/SEED for each run, and the table.")
    parser.add_argument("--options", type=str, default="", help="Further options of fit, quoted as one word.")
    parser.add_argument(
        "--alone",
        type=str | None,
        help="Method whose runs say what each task reaches alone, such as finetune_each; adds forward transfer.",
    )
    parser.add_argument("--engine", type=Engine | None, help="Where to make the runs, one on each device.")
    return parser


def _add_data_actions(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(dest="action")
    for name, text in (
        ("list", "Show which data sets there are, and which are on disk."),
        ("prepare", "Download data sets and decode their images; by default the paper's six."),
        ("verify", "Count and decode every image of data sets; by default of those on disk."),
    ):
        action = ArgumentParser(description=text, **_STRICT)
        if name != "list":
            action.add_argument("names", type=str, nargs="*", help="Names, as 'list' shows; or torchvision/CLASS.")
        action.add_argument("--root", type=str | None, help="Folder of data sets (default: $RECAST_PL_DATA or data).")
        if name == "prepare":
            action.add_argument("--image_size", type=int, default=224, help="Height and width to decode to, in pixels.")
            action.add_argument("--on_bad_image", type=BadImagePolicy, default="error", help="As --data.on_bad_image.")
        actions.add_subcommand(name, action, help=text)


def fit(config: Namespace) -> int:
    """Learns the stream, or fits templates by gradient where the model is a `MimicryModule`."""
    run_dir = _run_dir(config)
    with writing(run_dir):
        return _fit(config, run_dir)


def _fit(config: Namespace, run_dir: Path) -> int:
    text = _config_text(config)
    if _is_main_process():
        stream.check_run_folder(run_dir, config.resume)
        _check_same_run(run_dir / "config.yaml", text)
        if not config.only:  # else others may be writing
            remove_unfinished(run_dir)
    seed_everything(config.seed_everything, verbose=False)
    init = fit_parser().instantiate(config)
    console, status = Console(), 0
    if isinstance(init.model, MimicryModule):
        if init.engine is not None or init.only:
            raise RunError("MimicryModule learns no tasks; leave out --engine and --only")
        trainers = TrainerFactory(init.trainer)
        decomposition = stream.fit_mimicry(init.model, run_dir, trainers, config.seed_everything, text)
        console.print(decomposition.table())
    else:
        with _interruptible() as interruption:
            status = _learn(init, run_dir, text, console)
        if interruption.signal is not None:
            return _say_how_to_go_on(run_dir, interruption.signal)
    if _is_main_process():
        console.print(f"run folder: {run_dir}", soft_wrap=True)
    return status


def _learn(init: Namespace, run_dir: Path, text: str, console: Console) -> int:
    """Learns the tasks in this process, or on an engine; 1 if that failed for some."""
    trainers, seed = TrainerFactory(init.trainer), init.seed_everything
    if init.engine is None:
        # the run's own config stays: that of a process that learns some of the tasks may name fewer devices
        kept = None if init.only and (run_dir / "config.yaml").is_file() else text
        stream.Stream(_til(init.model), init.data, run_dir, trainers, seed, kept, console).run(init.only)
        return 0
    here = trainers.alone(accelerator="cpu")  # which need not have what the engine has
    learning = stream.Stream(_til(init.model), init.data, run_dir, here, seed, text, console)
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


@dataclass
class _Interruption:
    """By which signal learning was interrupted; None if it was not."""

    signal: int | None = None


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Ends what is within at Ctrl-C, SIGTERM and SIGHUP; the state after the last epoch has been kept by then."""
    interruption = _Interruption()

    def interrupt(number: int, frame: object) -> None:
        interruption.signal = interruption.signal or number
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in numbers if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield interruption
    except BaseException:  # such as SystemExit, which the trainer makes of it, or that another process has gone
        if interruption.signal is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_how_to_go_on(run_dir: Path, number: int) -> int:
    if _is_main_process():
        kept = f"what is learnt is kept. To go on: python -m recast_pl {_resuming(run_dir)}"
        after = kept if (run_dir / "config.yaml").is_file() else "nothing has been learnt yet"
        print(f"recast_pl: interrupted by {signal.Signals(number).name}; {after}", file=sys.stderr)
    return 128 + number


def test(config: Namespace) -> int:
    """Evaluates all learnt tasks from their patches; 1 if a number differs from the recorded one."""
    run_dir, init = _open_run(config.run_dir)
    rows = stream.evaluate_run(init.model, init.data, run_dir, TrainerFactory(init.trainer).alone())
    Console().print(evaluation_table(rows))
    return int(any(recorded != measured for _, recorded, measured in rows))


def predict(config: Namespace) -> int:
    """Writes the most probable class of each image as CSV."""
    run_dir, init = _open_run(config.run_dir)
    images = [Path(image) for image in config.images]
    trainers = TrainerFactory(init.trainer).alone()
    rows = stream.predict_images(init.model, run_dir, config.task, images, trainers)
    lines = ([path, label, f"{probability:.6f}"] for path, label, probability in rows)
    write_atomic(Path(config.output), table_csv(["path", "label", "probability"], lines))
    return 0


def data(config: Namespace) -> int:
    """Lists, prepares or verifies data sets."""
    action = config.pop("action")
    return {"list": _list_data, "prepare": _prepare_data, "verify": _verify_data}[action](config[action])


def _list_data(options: Namespace) -> int:
    Console().print(catalogue_table(CATALOGUE, data_root(options.root)))
    return 0


def _prepare_data(options: Namespace) -> int:
    for name in options.names or PAPER:
        task = TaskConfig("prepared", dataset=name)
        one = SequentialTaskDataModule(
            (task,), options.image_size, root=options.root, on_bad_image=options.on_bad_image
        )
        one.prepare_data()
        Console().print(f"{name}: {len(one.classes)} classes, {one.sizes}, in {one.root}", soft_wrap=True)
    return 0


def _verify_data(options: Namespace) -> int:
    """1 if a data set is not what its authors published, or has images that cannot be read."""
    root = data_root(options.root)
    names = options.names or [name for name, row in CATALOGUE.items() if row.is_present(root)]
    good = True
    for name in names:
        faults = source_faults(name, root)
        good &= not faults
        Console().print(f"{name}: {'; '.join(faults) or 'whole'}", soft_wrap=True, highlight=False)
    return int(not good)


def compare(config: Namespace) -> int:
    """Runs `fit` for each method and seed, and prints the table."""
    engine = compare_parser().instantiate(config).engine
    options = [*shlex.split(config.options), *(ONE_DEVICE if engine else ())]
    comparison = Comparison(Path(config.output), config.base, config.configs, config.seeds, options, config.alone)
    with _interruptible() as interruption:
        status = comparison.run(engine or Here())
    if interruption.signal is not None:
        return 128 + interruption.signal
    if not status:
        Console().print(comparison.table(), f"table: {comparison.folder}/comparison.md", soft_wrap=True)
    return status


def _open_run(folder: str) -> tuple[Path, Namespace]:
    run_dir = Path(folder)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir} is no run folder, it has no config.yaml; give the folder that 'fit' printed")
    _check_config(path)
    parser = fit_parser()
    config = parser.parse_path(path)
    seed_everything(config.seed_everything, verbose=False)
    init = parser.instantiate(config)
    _til(init.model)
    return run_dir, init


def _til(model: LightningModule) -> TILModule:
    if not isinstance(model, TILModule):
        raise RunError(f"model {type(model).__name__} learns no tasks; use recast_pl.TILModule or a subclass")
    return model


def _run_dir(config: Namespace) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir)
    if config.resume:
        raise RunError("--resume true needs the --run_dir to continue")
    if not _is_main_process():
        if _RUN_DIR not in os.environ:
            raise RunError("several processes were started from outside; give them one --run_dir")
        return Path(os.environ[_RUN_DIR])
    name = Path(str(config.config[-1])).stem if config.config else "run"
    run_dir = Path("logs") / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[_RUN_DIR] = str(run_dir)
    return run_dir


def _is_main_process() -> bool:
    """Whether this process is the first, by what torchrun (which sets all of them) or Lightning and srun say."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def _config_text(config: Namespace) -> str:
    """The content of config.yaml: all that decides the run, with defaults spelt out."""
    kept = config.clone()
    for key in ("config", "run_dir", "resume", "only", "engine"):
        kept.pop(key, None)
    text: str = fit_parser().dump(kept, skip_link_targets=False)
    return text


def _check_same_run(path: Path, text: str) -> None:
    """A resumed run must have the config it began with, but for what decides no result."""
    if not path.exists():
        return
    parser = fit_parser()  # dumped defaults inside of lists depend on how they were given: compare them parsed
    before, after = parser.parse_path(path), parser.parse_string(text)
    for config in (before, after):
        for key in ("root", "cache", "num_workers"):  # where and how images are read decides no result
            config.data.pop(key, None)
        _without_rates(config)
    changed = [key for key in ("model", "data", "seed_everything") if before.get(key) != after.get(key)]
    if changed:
        raise RunError(
            f"{changed[0]} differs from {path}, so that resuming would mix two runs; "
            "resume with the same options, or begin another --run_dir"
        )


def _without_rates(config: Namespace) -> None:
    """A task may be resumed with other learning rates."""
    settings = config.model.get("init_args") or {}
    for part in (settings.get("optimizer"), *(settings.get("pieces") or ())):
        for key in ("lr", "learning_rate"):
            if part is not None and "init_args" in part:
                part.init_args.pop(key, None)


def _with_config_paths(argv: Sequence[str]) -> list[str]:
    """Finds bare config names in the working folder, then among the shipped configs."""
    found = list(argv)
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c") and equals:
            found[i] = f"{option}={_find_config(value)}"
        elif word in ("--config", "-c") and i + 1 < len(argv):
            found[i + 1] = _find_config(argv[i + 1])
    return found


def _find_config(name: str) -> str:
    for folder in (Path(), *CONFIG_FOLDERS):
        if (folder / name).is_file():
            return str(folder / name)
    shipped = sorted({p.relative_to(f).as_posix() for f in CONFIG_FOLDERS for p in f.rglob("*.yaml")})
    raise RunError(f"config {name!r} was not found here nor in configs/, which has {', '.join(shipped)}")


def _with_resumed_config(argv: list[str]) -> list[str]:
    """`fit --run_dir DIR --resume true` alone continues with the run's own config."""
    words = [part for word in argv for part in word.split("=", 1)]
    asked = dict(itertools.pairwise(words))
    if asked.get("--resume") == "true" and "--run_dir" in asked and not {"--config", "-c"} & set(words):
        path = Path(asked["--run_dir"]) / "config.yaml"
        if path.is_file():
            _check_config(path)
            return [argv[0], "--config", str(path), *argv[1:]]
    return argv


def _check_config(path: Path) -> None:
    """Refuses a run's config that is damaged, in its own name."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); restore it") from cause
    missing = {"seed_everything", "model", "data", "trainer"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise RunError(f"{path} is damaged (it has no {', '.join(sorted(missing))}); restore it")


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
