"""What `sweep` and `reproduce` share: their options, and running the file of a sweep."""

import json
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace, get_loader

from recast_pl.cli.comparing import DEFAULT_SEEDS, declare_fit_options, fit_options, run_studies
from recast_pl.cli.parser import command_parser
from recast_pl.config.elements import parse_options
from recast_pl.config.files import find_config
from recast_pl.config.run import config_text
from recast_pl.studies.comparison import config_words
from recast_pl.studies.engines import ONE_DEVICE
from recast_pl.studies.fits import Fits
from recast_pl.studies.sweep import Sweep
from recast_pl.studies.sweep_file import SweepConfig, read_sweep


def declare_sweep_options(parser: ArgumentParser) -> None:
    """Adds `--base`, `--seeds`, `--options` and `--engine`."""
    parser.add_argument("--base", type=str, nargs="+", default=[], help="Configs laid over the base of the sweep.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="Seeds to train with (default: the sweep's).")
    declare_fit_options(parser)


def run_sweep(parser: ArgumentParser, config: Namespace, path: Path, folder: Path) -> int:
    """Runs `fit` for each point and seed of a file, writes tables and figures, and prints the tables.

    Args:
        parser: The parser of the command.
        config: The options of `declare_sweep_options`.
        path: The file; those that it names in `after` run first.
        folder: Folder for the results.
    """
    config.engine = parser.instantiate(config).engine
    return run_studies(list(_studies(config, path, folder)), config.engine)


def _studies(config: Namespace, path: Path, folder: Path) -> Iterator[Fits | Sweep]:
    """Yields what a file asks for, in order."""
    sweep = read_sweep(path)
    for name in sweep.after:
        yield from _studies(config, Path(find_config(name)), folder.parent / Path(name).stem)
    options = fit_options(config.options, config.engine)
    if sweep.fits:
        one_device = ONE_DEVICE if config.engine else ()
        yield Fits(folder, sweep.fits, [*_backbone_words(sweep, [*config.base], options), *one_device])
    if sweep.points:
        points = sweep.write_points(folder, config.base)
        seeds = config.seeds or sweep.seeds or DEFAULT_SEEDS
        axes = (sweep.x, sweep.series, sweep.over)
        yield Sweep(folder, points, seeds, options, None, *axes, sweep.notes)


def _backbone_words(sweep: SweepConfig, base: list[str], options: list[str]) -> list[str]:
    """Returns options of `fit` that give fits of templates the backbone of the runs, and the size of their images."""
    configs = [*sweep.base, *base]
    if not configs:
        return []
    parser = command_parser("fit")
    content = get_loader("yaml")(config_text(parser, parse_options(parser, [*config_words(configs), *options])))
    backbone, size = content["model"]["init_args"]["backbone"], content["data"]["image_size"]
    return ["--model.backbone", json.dumps(backbone), "--model.image_size", json.dumps(size)]
