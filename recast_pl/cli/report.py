"""The command `report`: one page of tables and figures about runs."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.learning.trainer import tensorboard
from recast_pl.reporting.document import Chart, write_document
from recast_pl.reporting.report import compose
from recast_pl.runs.collection import find_collections
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--runs", type=str, nargs="+", required=True, help="Run folders, or folders of them.")
    parser.add_argument("--output", type=str, required=True, help="Folder for report.html, report.md and figures/.")


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the page as HTML and Markdown, and its figures for TensorBoard."""
    folders, output = [Path(folder) for folder in config.runs], Path(config.output)
    collections = find_collections(folders)
    blocks = compose(collections, folders, output)
    write_document(blocks, output, "report")
    logger = tensorboard(output, "report")
    for block in blocks:
        if isinstance(block, Chart):
            logger.experiment.add_figure(block.name, block.figure)
    logger.finalize("success")
    unfinished = sum(len(collection.unfinished) for collection in collections)
    missing = f" ({unfinished} unfinished runs, which it names)" if unfinished else ""
    open_console().print(f"report: {output}/report.html{missing}", soft_wrap=True)
    return 0
