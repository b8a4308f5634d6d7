"""The command `test`: evaluates the trained tasks of a run again."""

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from recast_pl.config.run import open_run
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.tables import evaluation_table
from recast_pl.runs.evaluation import evaluate_run
from recast_pl.runs.folder import RunFolder


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Evaluates all trained tasks from their patches; returns 1 if an accuracy differs from the recorded one."""
    run_dir, init = open_run(config.run_dir)
    rows = evaluate_run(init.model, init.data, RunFolder(run_dir), TrainerFactory(init.trainer).alone())
    Console().print(evaluation_table(rows), crop=False)
    return int(any(recorded != measured for _, recorded, measured in rows))
