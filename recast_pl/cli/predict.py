"""The command `predict`: classifies images with a trained task, or with one that it finds for each image."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recast_pl.cli.options import chosen_device, declare_device, declare_trust
from recast_pl.data.task_images import BadImagePolicy
from recast_pl.errors import DataError, RunError
from recast_pl.files import STANDARD_OUTPUT, is_standard_output, write_atomic
from recast_pl.inference.files import classify_files, find_files, read_names
from recast_pl.inference.prediction import REFUSE, Prediction, RoutedPrediction
from recast_pl.inference.predictor import Predictor, load
from recast_pl.learning.patch import TaskPatch
from recast_pl.rules import ANY_TASK
from recast_pl.runs.evaluation import check_choice
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console

IMAGES_SKIPPED = 3
"""The exit status if some images cannot be read and the others are classified."""

_NAMED = 20  # bad images that are named one by one


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--task", type=str | None, help="Name of a trained task; auto to find that of each image.")
    at = "Version of the task, by number (default: the present one)."
    parser.add_argument("--at", type=PositiveInt | None, help=at)
    parser.add_argument("--patch", type=str | None, help="Or a patch file, as 'patch average' and 'quantize' write.")
    images = "Image files, folders (searched at any depth), and patterns such as 'photos/**/*.jpg'."
    parser.add_argument("--images", type=str, nargs="+", default=[], help=images)
    parser.add_argument("--list", type=str | None, help="Text file with one image or folder a line; - for its input.")
    parser.add_argument("--output", type=str, default=STANDARD_OUTPUT, help="File to write; - for standard output.")
    formats = (
        "csv: path,label,probability, or path,task,label,probability,task_probability with --task auto; "
        "jsonl: an object for each image (default: by the ending of --output)."
    )
    parser.add_argument("--format", type=Literal["csv", "jsonl"] | None, help=formats)
    classes = "How many classes to write for each image, the most probable first; 0 for all."
    parser.add_argument("--top_k", type=NonNegativeInt, default=1, help=classes)
    refuse = "With --task auto: share of known images that may be refused as of task 'none'; 0 to refuse no image."
    parser.add_argument("--refuse", type=float, default=REFUSE, help=refuse)
    bad = "What to do with an image that cannot be read: skip it and exit with status 3, or stop with an error."
    parser.add_argument("--on_bad_image", type=BadImagePolicy, default="skip", help=bad)
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Writes the most probable classes of each image; returns 3 if some images cannot be read."""
    check_choice(RunFolder(config.run_dir), config.task, config.patch)
    if config.at is not None and config.task in (None, ANY_TASK):
        raise RunError(f"--at {config.at} is a version of one task; add --task NAME, or leave out --at")
    names = [*config.images, *(read_names(config.list) if config.list else [])]
    if not names:
        raise DataError("no image is named; add --images FILE or FOLDER, or --list FILE")
    files, others = find_files(names)
    model, task = _load(config)
    rows_on_screen = is_standard_output(config.output) and sys.stdout.isatty()
    log = _Log(len(files), stop=config.on_bad_image == "error", bar=not rows_on_screen)
    with log.progress:
        found = log.follow(classify_files(model, task, files, log.on_bad, config.refuse))
        ending = Path(config.output).suffix.lower()
        write = _FORMATS[config.format or ("jsonl" if ending in (".jsonl", ".ndjson") else "csv")]
        write_atomic(config.output, write(found, config.top_k or None, task is None))
    return log.report(others)


def _load(config: Namespace) -> tuple[Predictor, str | None]:
    """The predictor, and the name of the task to use; None if tasks are to be found."""
    task = config.task
    if task == ANY_TASK:
        model = load(config.run_dir, device=chosen_device(config), trust=config.trust, on_demand=True)
        _ = model.router  # so that a missing signature is found before any image is read
        return model, None
    first = [task or next(iter(RunFolder(config.run_dir).finished()))]
    at = {} if config.at is None else {task: config.at}
    model = load(config.run_dir, device=chosen_device(config), tasks=first, trust=config.trust, at=at)
    if config.patch is not None:
        patch = TaskPatch.load(config.patch)
        if patch.task in model.tasks:  # the file may be an averaged or quantized version
            model.remove(patch.task)
        task = model.add_patch(patch)
    return model, task


class _Log:
    """Shows progress and bad images on standard error.

    Args:
        count: Number of images.
        stop: Whether a bad image is an error.
        bar: Whether to show a progress bar, if standard error is a terminal.
    """

    def __init__(self, count: int, stop: bool, bar: bool) -> None:
        self._count, self._stop, self._bad = count, stop, 0
        console = open_console(stderr=True)
        columns = TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=False,  # rows may go there
            disable=not (bar and console.is_terminal),
        )
        self._bar = self.progress.add_task("", total=count)

    def on_bad(self, error: DataError) -> None:
        """Counts a bad image, and names the first ones."""
        if self._stop:
            raise error
        self._bad += 1
        if self._bad <= _NAMED:
            self._print(f"skipped: {error}")

    def follow(self, found: Iterable[tuple[Path, Prediction | None]]) -> Iterator[tuple[Path, Prediction]]:
        """Passes on the images that could be read; raises DataError if there was none."""
        for path, prediction in found:
            self.progress.advance(self._bar)
            if prediction is not None:
                yield path, prediction
        if self._bad == self._count:
            raise DataError(f"none of the {self._count:,} images can be read; check --images and --list")

    def report(self, others: int) -> int:
        """Prints how many images were skipped, and how many other files the folders have; returns the exit status."""
        if others:
            self._print(f"{others:,} other files in the folders have no ending of an image and were left out")
        if not self._bad:
            return 0
        self._print(f"{self._bad:,} of {self._count:,} images cannot be read and were skipped")
        return IMAGES_SKIPPED

    def _print(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True)


def _csv_rows(found: Iterable[tuple[Path, Prediction]], top_k: int | None, routed: bool) -> Iterator[str]:
    yield "path,task,label,probability,task_probability\n" if routed else "path,label,probability\n"
    for path, prediction in found:
        text = io.StringIO()
        for label, p in (prediction.ranked(top_k) or {prediction.label: prediction.probability}).items():
            row = [path, label, f"{p:.6f}"]
            if isinstance(prediction, RoutedPrediction):
                row = [path, prediction.task, *row[1:], f"{prediction.task_probability:.6f}"]
            csv.writer(text, lineterminator="\n").writerow(row)
        yield text.getvalue()


def _json_rows(found: Iterable[tuple[Path, Prediction]], top_k: int | None, routed: bool) -> Iterator[str]:
    for path, prediction in found:
        row = {"path": str(path), **asdict(prediction), "probabilities": prediction.ranked(top_k)}
        yield json.dumps(row) + "\n"


_FORMATS: dict[str, Callable[[Iterable[tuple[Path, Prediction]], int | None, bool], Iterator[str]]] = {
    "csv": _csv_rows,
    "jsonl": _json_rows,
}
