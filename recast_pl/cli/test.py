"""The command `test`: evaluates the trained tasks of a run again."""

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import declare_data_root, declare_device, declare_trust, opened
from recast_pl.config.paths import check_images
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.tables import evaluation_table
from recast_pl.runs.evaluation import evaluate_run
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    declare_data_root(parser)
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Evaluates all trained tasks from their patches; returns 1 if an accuracy differs from the recorded one."""
    run_dir, init = opened(config)
    check_images(init.data)
    rows = evaluate_run(init.model, init.data, RunFolder(run_dir), TrainerFactory(init.trainer))
    open_console().print(evaluation_table(rows), crop=False)

    return int(any(recorded != measured for _, recorded, measured in rows))
