"""The options that decide a run, and the model, data and trainer that are built from them."""

import threading
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import BUDGET_KEY, EVALUATION_KEYS, PRECISION_KEY, RUN_KEYS, no_run, read_run_config
from recast_pl.config.paths import add_images, check_weights, locate_data, locate_paths, move_images
from recast_pl.config.text import MODE
from recast_pl.config.trust import check_trusted
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.learning.budget import Budget
from recast_pl.learning.device import evaluation_settings, find_device
from recast_pl.learning.patch import Precision
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.joint_classifier import JointClassifier
from recast_pl.runs.folder import RunFolder

STRICT: Any = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": MODE}
"""Settings of every parser: errors are raised, options are written out, and `${NAME}` is an environment variable."""

_parsing = threading.Lock()  # jsonargparse cannot parse in several threads


def declare_run(parser: LightningArgumentParser) -> None:
    """Adds seed, model, data and trainer to a parser, as LightningCLI does, and how patches are stored."""
    parser.add_argument("--seed_everything", type=int, default=42, help="Seed of all random numbers of the run.")
    precision = "How patches are stored: fp32, or compactly with 8, 4 or 2 bits for each weight of the head."
    parser.add_argument(f"--{PRECISION_KEY}", type=Precision, default="fp32", help=precision)
    evaluation = "task: images whose task is known; class: also among the classes of all tasks so far."
    parser.add_argument("--evaluation", type=Literal["task", "class"], default="task", help=evaluation)
    joint = "Classifiers over the classes of all tasks to measure beside the router, with --evaluation class."
    parser.add_argument("--joint", type=tuple[JointClassifier, ...], default=(), help=joint)
    parser.add_class_arguments(Budget, BUDGET_KEY)
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
    kept = Namespace(**{key: config[key] for key in (*RUN_KEYS, PRECISION_KEY, BUDGET_KEY, *EVALUATION_KEYS)})  # type: ignore[no-untyped-call]
    text: str = parser.dump(kept, skip_link_targets=False, skip_unset=False)  # null may differ from the default
    return text


def read_run(
    folder: str | Path,
    device: torch.device | None = None,
    trust: bool = False,
    data_root: str | None = None,
    images: bool = True,
) -> tuple[Path, Namespace]:
    """Builds the model and data of a run folder, which holds a run of tasks or a gradient fit of templates.

    The run may have been trained on another machine: of the trainer's settings only those are kept that change what an
    evaluation computes. Relative paths are looked for in the working folder, then where the run was started.

    Args:
        folder: The run folder.
        device: Where to compute; None for what this machine has.
        trust: Whether the run may use code outside of this package, timm, torchvision and torch.
        data_root: Folder that the images were moved to; None if they were not.
        images: Whether the tasks of the data are used; without them, a run of many tasks is opened sooner.

    Returns:
        The folder, and the run's seed, model, datamodule, and settings of a trainer that evaluates on this machine.

    Raises:
        RunError: If the folder holds no run, uses code that is not trusted, or needs a file that is missing.
    """
    run = RunFolder(folder)
    if not run.config.is_file():
        raise RunError(f"{no_run(run)}; give the folder that 'fit' printed")
    content = read_run_config(run.config)
    content = {key: content[key] for key in (*RUN_KEYS, PRECISION_KEY) if key in content}
    content["trainer"] = evaluation_settings(content["trainer"], device or find_device())
    if not images:
        content["data"]["tasks"] = []
    if not trust:
        check_trusted(content, run.config)
    if data_root is not None:
        move_images(content["data"], data_root)
    locate_data(content["data"], run.start_folders())
    locate_paths(content["model"], run.model_folders())
    check_weights(content["model"], run.config, run.model_folders())
    with _parsing:
        parser = LightningArgumentParser(**STRICT)
        declare_run(parser)
        config = parser.parse_object(content)  # not a path, for which the parser changes the working folder
        seed_everything(config.seed_everything, verbose=False)
        init = parser.instantiate(config)
    add_images(init.data, run, data_root)
    return run.path, init


def open_run(
    folder: str | Path,
    device: torch.device | None = None,
    trust: bool = False,
    data_root: str | None = None,
    images: bool = True,
) -> tuple[Path, Namespace]:
    """Does the same as `read_run`, and raises RunError also if the run trains no tasks."""
    run_dir, init = read_run(folder, device, trust, data_root, images)
    til(init.model)
    return run_dir, init


def til(model: LightningModule) -> TILModule:
    """Returns the model; raises RunError if it does not train tasks."""
    if not isinstance(model, TILModule):
        raise RunError(f"model {type(model).__name__} does not train tasks; use recast_pl.TILModule or a subclass")
    return model
