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
    """Evaluates trained tasks from their patches; returns 1 if an accuracy differs from the recorded one.

    Tasks whose images are not here are named.
    """
    run_dir, init = opened(config)
    if all(task.own_path is not None and not task.own_path.exists() for task in init.data.tasks):
        check_images(init.data)
    rows = evaluate_run(init.model, init.data, RunFolder(run_dir), TrainerFactory(init.trainer))
    console = open_console()
    console.print(evaluation_table(rows), crop=False)
    lost = [task for task, _, measured in rows if measured is None]
    if lost:
        names = ", ".join(lost)
        remedy = "if their images were moved, name the folder: --data_root FOLDER"
        console.print(f"not measured again: {names}; {remedy}", soft_wrap=True, markup=False)
    return int(any(measured not in (recorded, None) for _, recorded, measured in rows))
