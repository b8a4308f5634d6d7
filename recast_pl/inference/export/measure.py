"""What an ONNX graph costs and how well it does: bytes, time for an image, and accuracy on the test images of a run."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from recast_pl.data.batches import TaskSplit
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.inference.export.graph import Session
from recast_pl.runs.evaluation import has_images

_MOST = 1000
"""Test images of all tasks together."""

_BATCH = 16

_RUNS = 9

Tasks = Mapping[str, Mapping[str, Tensor]]
"""Inputs of each task beside the images, by task."""

TestImages = dict[str, tuple[Tensor, Tensor]]
"""By task, images (N, 3, S, S) in [0, 1] and labels (N,)."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a graph.

    Args:
        size: Bytes of the file.
        milliseconds: Median time of one image on one core.
        accuracy: Mean over tasks, in percent; None without images.
        agreement: Share of the images in percent whose class is that of another graph; None without images.
        shift: Largest difference of a probability from those of the other graph; None without images.
    """

    size: int
    milliseconds: float
    accuracy: float | None
    agreement: float | None
    shift: float | None


def test_images(data: SequentialTaskDataModule, classes: Mapping[str, list[str]]) -> TestImages:
    """Up to 1,000 test images of some tasks, as far as they are on this machine, evenly spaced in their splits.

    Args:
        data: The stream of the run.
        classes: Class names of the tasks by task; images of a task with other classes are left out.
    """
    names = [task.name for task in data.tasks]
    known = [name for name in classes if name in names and has_images(data, names.index(name))]
    found: TestImages = {}
    for name in known:
        data.select(names.index(name))
        split = data.plain_dataloader("test").dataset
        assert isinstance(split, TaskSplit)
        count = min(len(split), max(1, _MOST // len(known)))
        if data.classes != classes[name] or not count:
            continue
        positions = np.linspace(0, len(split) - 1, count).round().astype(int).tolist()
        found[name] = data.on_after_batch_transfer(split.__getitems__([(0, position) for position in positions]), 0)
    return found


def compare(graphs: Mapping[str, bytes], tasks: Tasks, images: TestImages, example: Tensor) -> Table:
    """A table of what was measured of graphs, by name; the first is the one that the others are compared with.

    Args:
        graphs: The ONNX files.
        tasks: Inputs of each task beside the images, by task.
        images: Test images of some of the tasks.
        example: An image (1, 3, S, S) to take the time of.
    """
    rows: dict[str, Measured] = {}
    reference = None
    for name, content in graphs.items():
        rows[name], found = measure(content, tasks, images, example, reference)
        reference = reference or found
    return _table(rows)


def measure(
    content: bytes,
    tasks: Tasks,
    images: TestImages,
    example: Tensor,
    reference: TestImages | None = None,
) -> tuple[Measured, TestImages]:
    """Measures a graph.

    Args:
        content: The ONNX file.
        tasks: Inputs of each task beside the images, by task.
        images: Test images of some of the tasks.
        example: An image (1, 3, S, S) to take the time of.
        reference: What this function has returned for the graph to compare with; None for none.

    Returns:
        What was measured, and for each task the probabilities (N, classes) and the labels (N,).
    """
    session = Session(content)
    found = {
        name: (torch.cat([*_probabilities(session, pixels, tasks[name])]), labels)
        for name, (pixels, labels) in images.items()
    }
    right = [float((p.argmax(1) == labels).double().mean()) for p, labels in found.values()]
    agreement = shift = None
    if reference:
        pairs = [(p, reference[name][0]) for name, (p, _) in found.items()]
        agreement = 100 * float(torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs]).double().mean())
        shift = max(float((a - b).abs().max()) for a, b in pairs)
    accuracy = 100 * sum(right) / len(right) if right else None
    milliseconds = _milliseconds(session, {"images": example} | dict(next(iter(tasks.values()))))
    return Measured(len(content), milliseconds, accuracy, agreement, shift), found


def _probabilities(session: Session, images: Tensor, inputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for part in images.split(_BATCH):
        yield session.logits({"images": part, **inputs}).softmax(1)


def _milliseconds(session: Session, inputs: Mapping[str, Tensor]) -> float:
    """Median time of a run of the graph."""
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        session.logits(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _table(rows: Mapping[str, Measured]) -> Table:
    """A table of what was measured, with a row for each precision; the first is the one to compare with."""
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("precision")
    for column in ("bytes", "ms an image", "accuracy", "same class", "probability moves"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2f} %"
        same = "" if row.agreement is None else f"{row.agreement:.2f} %"
        moves = "" if row.shift is None else f"{row.shift:.1e}"
        table.add_row(name, f"{row.size:,}", f"{row.milliseconds:.1f}", accuracy, same, moves)
    return table
