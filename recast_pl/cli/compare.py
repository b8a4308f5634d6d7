"""The command `compare`: several methods and seeds, into one table."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.comparing import DEFAULT_SEEDS, declare_fit_options, fit_options, run_studies
from recast_pl.studies.comparison import Comparison, Point, config_words


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--base", type=str, nargs="+", default=[], help="Configs that all methods share.")
    parser.add_argument("--configs", type=str, nargs="+", required=True, help="One config for each method.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*DEFAULT_SEEDS], help="Seeds to train with.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the table, and METHOD/SEED for each run.")
    alone = "Method whose runs train each task alone, such as finetune_each; adds forward transfer to the table."
    parser.add_argument("--alone", type=str | None, help=alone)
    declare_fit_options(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Runs `fit` for each method and seed, and prints the table."""
    engine = parser.instantiate(config).engine
    points = [Point(Path(name).stem, config_words([*config.base, name]), {}) for name in config.configs]
    options = fit_options(config.options, engine)
    comparison = Comparison(Path(config.output), points, config.seeds, options, config.alone)
    return run_studies([comparison], engine)
