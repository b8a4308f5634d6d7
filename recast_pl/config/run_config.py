"""The configuration of a run: the options that decide it, the files that hold them, and how they are found again."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.folder import RunFolder

_PACKAGE = Path(__file__).parents[1]

CONFIG_FOLDERS = (Path("configs"), _PACKAGE.parent / "configs", _PACKAGE / "configs")

STRICT: Any = {"exit_on_error": False, "allow_abbrev": False}


def run_parser() -> LightningArgumentParser:
    """The parser of all that decides a run: what `config.yaml` holds."""
    parser = LightningArgumentParser(**STRICT)
    declare_run(parser)
    return parser


def declare_run(parser: LightningArgumentParser) -> None:
    """Adds seed, model, data and trainer to a parser, as in LightningCLI."""
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


def config_text(config: Namespace) -> str:
    """The content of config.yaml: all that decides the run, with defaults spelt out."""
    kept = config.clone()
    for key in ("config", "run_dir", "resume", "only", "engine"):
        kept.pop(key, None)
    text: str = run_parser().dump(kept, skip_link_targets=False)
    return text


def open_run(folder: str) -> tuple[Path, Namespace]:
    """Finds a run again.

    Args:
        folder: The run folder.

    Returns:
        The folder, and the run's model, datamodule and settings of the trainer.

    Raises:
        RunError: If the folder holds no run of tasks.
    """
    run_dir, init = read_run(folder)
    til(init.model)
    return run_dir, init


def read_run(folder: str) -> tuple[Path, Namespace]:
    """Finds a run again, be it of tasks or of a gradient fit.

    Args:
        folder: The run folder.

    Returns:
        The folder, and the run's seed, model, datamodule and settings of the trainer.

    Raises:
        RunError: If the folder holds no run.
    """
    run_dir = Path(folder)
    path = RunFolder(run_dir).config
    if not path.is_file():
        raise RunError(f"{run_dir} is not a run folder, it has no config.yaml; give the folder that 'fit' printed")
    _check_config(path)
    parser = run_parser()
    config = parser.parse_path(path)
    seed_everything(config.seed_everything, verbose=False)
    return run_dir, parser.instantiate(config)


def check_same_run(path: Path, text: str) -> None:
    """A resumed run must have the config it began with, but for what decides no result."""
    if not path.exists():
        return
    parser = run_parser()  # dumped defaults inside of lists depend on how they were given: compare them parsed
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


def til(model: LightningModule) -> TILModule:
    """The model, if it is one that learns tasks.

    Raises:
        RunError: If it is not.
    """
    if not isinstance(model, TILModule):
        raise RunError(f"model {type(model).__name__} learns no tasks; use recast_pl.TILModule or a subclass")
    return model


def with_config_paths(argv: Sequence[str]) -> list[str]:
    """Finds bare config names in the working folder, then among the shipped configs."""
    found = list(argv)
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c") and equals:
            found[i] = f"{option}={_find_config(value)}"
        elif word in ("--config", "-c") and i + 1 < len(argv):
            found[i + 1] = _find_config(argv[i + 1])
    return found


def with_resumed_config(argv: list[str]) -> list[str]:
    """`fit --run_dir DIR --resume true` alone continues with the run's own config."""
    words = [part for word in argv for part in word.split("=", 1)]
    asked = dict(itertools.pairwise(words))
    if asked.get("--resume") == "true" and "--run_dir" in asked and not {"--config", "-c"} & set(words):
        path = RunFolder(asked["--run_dir"]).config
        if path.is_file():
            _check_config(path)
            return [argv[0], "--config", str(path), *argv[1:]]
    return argv


def _find_config(name: str) -> str:
    for folder in (Path(), *CONFIG_FOLDERS):
        if (folder / name).is_file():
            return str(folder / name)
    shipped = sorted({p.relative_to(f).as_posix() for f in CONFIG_FOLDERS for p in f.rglob("*.yaml")})
    raise RunError(f"config {name!r} was not found here nor in configs/, which has {', '.join(shipped)}")


def _check_config(path: Path) -> None:
    """Refuses a run's config that is damaged, in its own name."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise RunError(f"cannot read {path} ({cause}); restore it") from cause
    missing = {"seed_everything", "model", "data", "trainer"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise RunError(f"{path} is damaged (it has no {', '.join(sorted(missing))}); restore it")
