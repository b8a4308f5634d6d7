"""`predict`: classifies images with a learnt task."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.files import write_atomic
from recast_pl.predictor import load
from recast_pl.tables import table_csv


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str, required=True, help="Name of a learnt task.")
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Image files.")
    parser.add_argument("--output", type=str, required=True, help="CSV file: path,label,probability.")


def run(config: Namespace) -> int:
    """Writes the most probable class of each image as CSV."""
    predictions = load(config.run_dir).predict(config.images, task=config.task)
    lines = (
        [Path(image), found.label, f"{found.probability:.6f}"]
        for image, found in zip(config.images, predictions, strict=True)
    )
    write_atomic(Path(config.output), table_csv(["path", "label", "probability"], lines))
    return 0
