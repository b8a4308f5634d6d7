"""Decides whether a task of a run may be learnt again with the given options."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.config.files import PRECISION_KEY
from recast_pl.config.task_list import with_tasks
from recast_pl.errors import RunError

_COMMON = (
    *("model.class_path", "model.init_args.backbone", "model.init_args.pieces"),
    *("data.image_size", "data.split", "data.order_seed", PRECISION_KEY),
)  # what no version of a task changes


def check_same_base(parser: LightningArgumentParser, path: Path, text: str) -> int:
    """Checks that a task which is learnt again keeps its run's base, method, splits and order of tasks.

    Args:
        parser: A parser with the options of `declare_run`.
        path: The config.yaml of the run.
        text: The configuration to learn it with, as `config_text` returns it.

    Returns:
        The seed of the run, which decides the splits.

    Raises:
        RunError: If one of them differs.
    """
    # compared after parsing, because the text of defaults inside lists depends on how they were given
    before, after = parser.parse_string(with_tasks(path, lambda tasks: [])), parser.parse_string(text)
    for config in (before, after):
        _leave_out_rates(config)
    for key in _COMMON:
        if before.get(key) != after.get(key):
            raise RunError(
                f"{key} is {before.get(key)!r:.200} in {path} and {after.get(key)!r:.200} here, which would not fit "
                "the run; leave it out, or train in another --run_dir"
            )
    seed: int = before.seed_everything
    return seed


def _leave_out_rates(config: Namespace) -> None:
    for piece in (config.model.get("init_args") or {}).get("pieces") or ():
        if "init_args" in piece:
            piece.init_args.pop("learning_rate", None)
