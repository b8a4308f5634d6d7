"""The options that decide a run, and the model, data and trainer that are built from them."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import RUN_KEYS, check_run_config
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.folder import RunFolder

STRICT: Any = {"exit_on_error": False, "allow_abbrev": False}
"""Settings of every parser: errors are raised, and options are written out."""


def declare_run(parser: LightningArgumentParser) -> None:
    """Adds seed, model, data and trainer to a parser, as LightningCLI does."""
    parser.add_argument("--seed_everything", type=int, default=42, help="Seed of all random numbers of the run.")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(SequentialTaskDataModule, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.link_arguments("seed_everything", "data.seed")
    parser.set_defaults(
        {
            "trainer.enable_model_summary": False,  # it would appear again for each task
            "trainer.log_every_n_steps": 10,  # tasks are short
            "trainer.num_sanity_val_steps": 0,  # the probe has already read the validation images
        }
    )


def config_text(parser: LightningArgumentParser, config: Namespace) -> str:
    """Returns the content of config.yaml: everything that decides the run, with defaults written out.

    Args:
        parser: A parser with the options of `declare_run`.
        config: Its result.
    """
    kept = Namespace(**{key: config[key] for key in RUN_KEYS})  # type: ignore[no-untyped-call]
    text: str = parser.dump(kept, skip_link_targets=False, skip_none=False)  # null may differ from the default
    return text


def read_run(folder: str) -> tuple[Path, Namespace]:
    """Builds the model and data of a run folder, which holds a run of tasks or a gradient fit of templates.

    Returns:
        The folder, and the run's seed, model, datamodule and trainer settings.

    Raises:
        RunError: If the folder holds no run.
    """
    run_dir = Path(folder)
    path = RunFolder(run_dir).config
    if not path.is_file():
        raise RunError(f"{run_dir} is not a run folder: it has no config.yaml; give the folder that 'fit' printed")
    check_run_config(path)
    parser = LightningArgumentParser(**STRICT)
    declare_run(parser)
    config = parser.parse_path(path)
    seed_everything(config.seed_everything, verbose=False)
    return run_dir, parser.instantiate(config)


def open_run(folder: str) -> tuple[Path, Namespace]:
    """Does the same as `read_run`, and raises RunError also if the run trains no tasks."""
    run_dir, init = read_run(folder)
    til(init.model)
    return run_dir, init


def til(model: LightningModule) -> TILModule:
    """Returns the model; raises RunError if it does not train tasks."""
    if not isinstance(model, TILModule):
        raise RunError(f"model {type(model).__name__} does not train tasks; use recast_pl.TILModule or a subclass")
    return model
