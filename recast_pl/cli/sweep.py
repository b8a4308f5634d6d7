"""The command `sweep`: a grid over options with several seeds, into a table and a figure."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.sweeping import declare_sweep_options, run_sweep


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", type=str, required=True, help="YAML file of the sweep; also in configs/.")
    output = "Folder for the tables, and POINT/SEED for each run (default: logs/SWEEP)."
    parser.add_argument("--output", type=str | None, help=output)
    declare_sweep_options(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Runs `fit` for each point and seed, writes tables and the figure, and prints the tables."""
    path = Path(config.config)
    return run_sweep(parser, config, path, Path(config.output or Path("logs") / path.stem))
