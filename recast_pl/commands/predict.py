"""`predict`: classifies images with a learnt task."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.commands.configs import open_run
from recast_pl.files import write_atomic
from recast_pl.runs import predict_images
from recast_pl.tables import table_csv
from recast_pl.training import TrainerFactory


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str, required=True, help="Name of a learnt task.")
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Image files.")
    parser.add_argument("--output", type=str, required=True, help="CSV file: path,label,probability.")


def run(config: Namespace) -> int:
    """Writes the most probable class of each image as CSV."""
    run_dir, init = open_run(config.run_dir)
    images = [Path(image) for image in config.images]
    trainers = TrainerFactory(init.trainer).alone()
    rows = predict_images(init.model, run_dir, config.task, images, trainers)
    lines = ([path, label, f"{probability:.6f}"] for path, label, probability in rows)
    write_atomic(Path(config.output), table_csv(["path", "label", "probability"], lines))
    return 0
