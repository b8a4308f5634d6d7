"""The command `predict`: classifies images with a trained task."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import chosen_device, declare_device, declare_trust
from recast_pl.files import write_atomic
from recast_pl.inference.predictor import load
from recast_pl.learning.patch import TaskPatch
from recast_pl.reporting.tables import table_csv
from recast_pl.runs.evaluation import check_choice
from recast_pl.runs.folder import RunFolder


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a trained task.")
    parser.add_argument("--patch", type=str | None, help="Or a patch file, as 'patch average' and 'quantize' write.")
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Image files.")
    parser.add_argument("--output", type=str, required=True, help="CSV file to write: path,label,probability.")
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the most probable class of each image as CSV."""
    folder, task = RunFolder(config.run_dir), config.task
    check_choice(folder, task, config.patch)
    first = [task or next(iter(folder.finished()))]
    model = load(folder.path, device=chosen_device(config), tasks=first, trust=config.trust)
    if config.patch is not None:
        patch = TaskPatch.load(config.patch)
        if patch.task in model.tasks:  # the file may be an averaged or quantized version
            model.remove(patch.task)
        task = model.add_patch(patch)
    predictions = model.predict(config.images, task=task)
    rows = (
        [Path(image), prediction.label, f"{prediction.probability:.6f}"]
        for image, prediction in zip(config.images, predictions, strict=True)
    )
    write_atomic(Path(config.output), table_csv(["path", "label", "probability"], rows))
    return 0
