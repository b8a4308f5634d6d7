"""Evaluates the trained tasks of a run."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from recast_pl.data.batches import RawBatch, TaskSplit
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import DataError, PatchError, RunError
from recast_pl.learning.features import Features, extract_features
from recast_pl.learning.patch import SharedState, TaskPatch
from recast_pl.learning.probe import Probes
from recast_pl.learning.til_module import Batch, TILModule
from recast_pl.learning.trainer import Score, TrainerFactory
from recast_pl.methods.recast import Recast
from recast_pl.rules import ImageSize
from recast_pl.runs.folder import RunFolder, Validation
from recast_pl.runs.images import check_images
from recast_pl.runs.metrics import accuracy_matrix


def evaluate_run(
    module: TILModule, data: SequentialTaskDataModule, folder: RunFolder, trainers: TrainerFactory
) -> list[tuple[str, float, float | None]]:
    """Measures every trained task of a run again, from its patch, if its images are on this machine.

    Args:
        module: The run's method and backbone, not yet built.
        data: The run's tasks.
        folder: The run folder.
        trainers: Makes the trainer that evaluates.

    Returns:
        The name, recorded and measured accuracy in percent of each task, in the order of the stream; None if the
        images are not here.

    Raises:
        RunError: If no task is trained or has its images here, or the images of a task have changed since.
        DataError: If the images of a task cannot be used.
        PatchError: If a patch is damaged.
    """
    finished, evaluator = folder.finished(), trainers.for_evaluation()
    names, records = [task.name for task in data.tasks], [files.load_record() for files in finished.values()]
    places = {name: names.index(name) for name in finished if name in names and has_images(data, names.index(name))}
    if not places:
        raise RunError(f"no task of {folder.path} can be measured, because none of their images are here")
    restore(module, folder, data.image_size)
    for name, record in zip(finished, records, strict=True):
        if name in places:
            check_images(data, places[name], record, resuming=False)
    recorded = accuracy_matrix(records)[-1]
    return [
        (name, accuracy, measure(module, data, places[name], files.load()[0], evaluator) if name in places else None)
        for (name, files), accuracy in zip(finished.items(), recorded, strict=True)
        if accuracy is not None
    ]


def has_images(data: SequentialTaskDataModule, index: int) -> bool:
    """Prepares the images of a task; returns False if they are not here and cannot be downloaded."""
    try:
        data.prepare([index])
    except DataError:
        if data.is_there(index):
            raise
        return False
    return True


def check_choice(folder: RunFolder, task: str | None, file: str | None) -> None:
    """Raises RunError unless exactly one of a task's name and a patch file is given."""
    if (task is None) == (file is None):
        given, tasks = "neither" if task is None else "both", ", ".join(folder.finished())
        raise RunError(f"{given} of --task and --patch are given; give one, trained are {tasks}")


def choose_patch(folder: RunFolder, task: str | None, file: str | None) -> TaskPatch:
    """Reads the patch of a trained task, or a patch file; raises RunError unless exactly one of the two is given."""
    check_choice(folder, task, file)
    return folder.load_patches([task])[task] if task is not None else TaskPatch.load(str(file))


def restore(module: TILModule, folder: RunFolder, image_size: ImageSize) -> None:
    """Builds a module, which has the run's method and backbone, on the base of a run, with what its tasks share."""
    for piece in module.pieces:
        piece.load_base(folder.path)
    module.build(image_size)
    if not module.isolated:
        *_, last = folder.finished().values()
        module.load_shared_state(SharedState.load(last.shared))


def trained_coefficients(module: TILModule, folder: RunFolder) -> dict[str, Tensor]:
    """Mean coefficients (Σ n,) of all weights, by trained task of a run; empty if no task trains coefficients.

    Args:
        module: The run's method; it need not be built.
        folder: The run folder.
    """
    indices = [index for index, piece in enumerate(module.pieces) if isinstance(piece, Recast)]
    patches = folder.load_patches() if folder.is_trained and indices else {}
    return {task: torch.cat([p.pieces[index]["coefficients"] for index in indices]) for task, p in patches.items()}


def sample_images(data: SequentialTaskDataModule, count: int) -> Tensor:
    """Up to `count` test images (N, 3, S, S) in [0, 1] of the first task, evenly spaced to show many classes."""
    data.prepare_data()
    data.select(0)
    split = data.plain_dataloader("test").dataset
    assert isinstance(split, TaskSplit)
    positions = np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int).tolist()
    images, _ = data.on_after_batch_transfer(split.__getitems__([(0, position) for position in positions]), 0)
    return images


def activate(module: TILModule, data: SequentialTaskDataModule, index: int, patch: TaskPatch) -> None:
    """Makes a trained task the current one, and selects its images; arguments and errors as in `measure`."""
    data.select(index)
    if data.classes != patch.classes:
        raise PatchError(
            f"task {patch.task!r} has classes {data.classes}, its patch has {patch.classes}; restore the images"
        )
    module.activate(patch)


def measure(
    module: TILModule, data: SequentialTaskDataModule, index: int, patch: TaskPatch, evaluator: Trainer
) -> float:
    """The accuracy in percent of a trained task on its test split.

    Args:
        module: Built on the patch's base.
        data: The stream.
        index: Position of the task in the stream, from 0.
        patch: The trained task.
        evaluator: Runs the test.

    Raises:
        PatchError: If the classes of the images are not those of the patch, or the patch does not fit the module.
    """
    activate(module, data, index, patch)
    (result,) = evaluator.test(module, datamodule=data, verbose=False)
    return rounded(result["test/accuracy"])


def split_features(
    module: TILModule,
    data: SequentialTaskDataModule,
    split: str,
    evaluator: Trainer,
    positions: Sequence[int] | None = None,
) -> Features:
    """Features of images of the selected task by the current task of a module, on the evaluator's device.

    Args:
        module: Built, with a current task.
        data: The stream, of which a task is selected.
        split: Its split.
        evaluator: Decides the device and the precision.
        positions: Positions of the images in the split; None for all of them.
    """
    device, precision = evaluator.strategy.root_device, evaluator.precision_plugin

    def batches() -> Iterator[Batch]:
        loader = data.plain_dataloader(split)
        for batch in loader if positions is None else _some(loader, positions):
            images, labels = data.on_after_batch_transfer([part.to(device) for part in batch], 0)
            yield precision.convert_input(images), labels

    precision.convert_module(module.to(device))
    backbone, _ = module.current()
    with module.merged():
        return extract_features(backbone, batches(), precision)


def _some(loader: DataLoader[RawBatch], positions: Sequence[int]) -> Iterator[RawBatch]:
    """Batches of the images at some positions of a split."""
    split, size = loader.dataset, loader.batch_size or 1
    assert isinstance(split, TaskSplit)
    for start in range(0, len(positions), size):
        yield split.__getitems__(positions[start : start + size])


def rounded(percentage: float) -> float:
    """A percentage that reads the same wherever it is printed."""
    return round(percentage, 4)


def percent_right(right: Tensor) -> float:
    """The share of images (N,) that are right, as a percentage."""
    return rounded(100 * float(right.double().mean()))


def probe_accuracies(probes: Probes) -> dict[str, float]:
    """Test accuracies in percent of the probes of a task, by their names in `ProbeAccuracies`."""
    found = {"probe_accuracy": probes.converged, "sgd_probe_accuracy": probes.budgeted}
    return {name: rounded(100 * accuracy) for name, accuracy in found.items() if accuracy is not None}


def validation(score: Score | None) -> Validation:
    """What a run reports about a validation score; nothing if there is none, or no validation image."""
    if score is None or not math.isfinite(score[1]):
        return {}
    return {"validation_accuracy": rounded(100 * score[0]), "validation_loss": rounded(score[1])}
