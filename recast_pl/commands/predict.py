"""`predict`: classifies images with a learnt task."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.commands.configs import open_run
from recast_pl.files import write_atomic
from recast_pl.runs import choose_patch, predict_images
from recast_pl.tables import table_csv
from recast_pl.training import TrainerFactory


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a learnt task.")
    parser.add_argument("--patch", type=str | None, help="Or a file of one, as 'patch average' or 'quantize' write it.")
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Image files.")
    parser.add_argument("--output", type=str, required=True, help="CSV file: path,label,probability.")


def run(config: Namespace) -> int:
    """Writes the most probable class of each image as CSV."""
    run_dir, init = open_run(config.run_dir)
    patch = choose_patch(run_dir, config.task, config.patch)
    images = [Path(image) for image in config.images]
    trainers = TrainerFactory(init.trainer).alone()
    rows = predict_images(init.model, run_dir, patch, images, trainers)
    lines = ([path, label, f"{probability:.6f}"] for path, label, probability in rows)
    write_atomic(Path(config.output), table_csv(["path", "label", "probability"], lines))
    return 0
