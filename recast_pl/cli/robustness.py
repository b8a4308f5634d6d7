"""The command `robustness`: trained tasks on worse images and under attack, several runs side by side."""

from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import chosen_device, declare_data_root, declare_device, declare_trust
from recast_pl.config.run import open_run
from recast_pl.errors import RunError
from recast_pl.files import json_text, write_atomic
from recast_pl.reporting.document import Heading, write_document
from recast_pl.reporting.robustness import (
    difference_cells,
    overview_cells,
    robustness_blocks,
    robustness_csv,
)
from recast_pl.reporting.tables import terminal_table
from recast_pl.runs.collection import find_collections
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.robustness import Attacks
from recast_pl.studies.robustness import join_runs, study_robustness
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    runs = "Run folders, or folders of them, as 'compare' makes."
    parser.add_argument("--run_dir", type=str, nargs="+", required=True, help=runs)
    output = "Folder for robustness.json, .csv, .md and .html, and figures/."
    parser.add_argument("--output", type=str, required=True, help=output)
    baseline = "Name of the run that others are compared with, which is that of its folder (default: the first)."
    parser.add_argument("--baseline", type=str | None, help=baseline)
    images = "The most test images of a task, evenly spaced (default: all)."
    parser.add_argument("--images", type=int | None, help=images)
    epsilons = "Largest changes of a channel of a pixel by the attacks, of 255 levels."
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.25, 1.0, 4.0], help=epsilons)
    parser.add_argument("--pgd_steps", type=int, default=10, help="Steps of PGD.")
    declare_data_root(parser)
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Measures the runs, prints tables, and writes the results, a page and its figures."""
    _check(config)
    console, output, device = open_console(), Path(config.output), chosen_device(config)
    collections = find_collections(map(Path, config.run_dir))
    runs = join_runs(collections)
    for folder, reason in (item for collection in collections for item in collection.unfinished.items()):
        console.print(f"left out: {folder}, {reason}", soft_wrap=True)

    def opened(folder: Path) -> Any:
        return open_run(folder, device, config.trust, config.data_root)[1]

    baseline = config.baseline or next(iter(runs))
    attacks = Attacks(tuple(config.epsilons), config.pgd_steps)
    content = study_robustness(runs, baseline, attacks, config.images, opened, partial(console.print, soft_wrap=True))
    write_atomic(output / RunFolder.ROBUSTNESS, json_text(content))
    console.print(terminal_table(overview_cells(content)), crop=False)
    if content["differences"]:
        console.print(terminal_table(difference_cells(content), 3), crop=False)
    write_atomic(output / "robustness.csv", robustness_csv(content))
    write_document([Heading("Robustness", 1), *robustness_blocks(content, "robustness")], output, "robustness")
    console.print(f"page: {output / 'robustness'}.html", soft_wrap=True)
    return 0


def _check(config: Namespace) -> None:
    """Raises RunError if an option is out of range."""
    for option in ("images", "pgd_steps"):
        if config[option] is not None and config[option] < 1:
            raise RunError(f"--{option} {config[option]} must be at least 1")
    for epsilon in config.epsilons:
        if not 0 < epsilon <= 255:
            raise RunError(f"--epsilons {epsilon:g} must be above 0 and at most 255, the levels of a pixel")
