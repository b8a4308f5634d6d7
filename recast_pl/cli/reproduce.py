"""The command `reproduce`: a table or figure of the paper, ours beside the published values."""

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.sweeping import declare_sweep_options, run_sweep
from recast_pl.config.files import find_config
from recast_pl.errors import RunError


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--table", type=int | None, help="Number of a table of the paper.")
    parser.add_argument("--figure", type=int | None, help="Or the number of a figure.")
    root = "Folder of the data sets, which are downloaded if they are not there (default: $RECAST_PL_DATA, or data)."
    parser.add_argument("--data_root", type=str | None, help=root)
    output = "Folder for all tables and figures, such as table2/ROW/SEED in it."
    parser.add_argument("--output", type=str, default="logs/paper", help=output)
    declare_sweep_options(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Trains all rows of a table or points of a figure, continuing what exists, and prints ours beside the paper's."""
    path = _find_item(config.table, config.figure)
    if config.data_root is not None:
        config.options = f"--data.root {shlex.quote(config.data_root)} {config.options}"
    return run_sweep(parser, config, path, Path(config.output) / path.stem)


def _find_item(table: int | None, figure: int | None) -> Path:
    """Finds the file of a table or figure; raises RunError if none or both are given, or there is no such file."""
    folder = Path(find_config("paper/protocol.yaml")).parent
    names = sorted(path.stem for kind in ("table", "figure") for path in folder.glob(f"{kind}*.yaml"))
    wanted = [f"{kind}{number}" for kind, number in (("table", table), ("figure", figure)) if number is not None]
    if len(wanted) != 1 or wanted[0] not in names:
        what = " and ".join(wanted) or "nothing"
        raise RunError(f"reproduce was asked for {what}; give --table or --figure and a number: {', '.join(names)}")
    return folder / f"{wanted[0]}.yaml"
