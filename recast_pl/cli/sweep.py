"""The command `sweep`: a grid over options with several seeds, into a table and a figure."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.comparing import DEFAULT_SEEDS, declare_fit_options, fit_options, run_comparison
from recast_pl.studies.sweep import Sweep
from recast_pl.studies.sweep_file import read_sweep


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", type=str, required=True, help="YAML file of the sweep; also in configs/.")
    parser.add_argument("--base", type=str, nargs="+", default=[], help="Configs laid over the base of the sweep.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="Seeds to train with (default: the sweep's).")
    output = "Folder for the tables, and POINT/SEED for each run (default: logs/SWEEP)."
    parser.add_argument("--output", type=str | None, help=output)
    declare_fit_options(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Runs `fit` for each point and seed, writes tables and the figure, and prints the tables."""
    engine = parser.instantiate(config).engine
    path = Path(config.config)
    sweep = read_sweep(path)
    folder = Path(config.output or Path("logs") / path.stem)
    options = fit_options(config.options, engine)
    points = sweep.write_points(folder, config.base)
    seeds = config.seeds or sweep.seeds or DEFAULT_SEEDS
    comparison = Sweep(folder, points, seeds, options, x=sweep.x, series=sweep.series, over=sweep.over)
    return run_comparison(comparison, engine)
