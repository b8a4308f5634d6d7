"""How the trained tasks of a run classify worse images, and how often they are right as often as they say."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from recast_pl.data.batches import TaskSplit
from recast_pl.data.corruptions import (
    CORRUPTIONS,
    JPEG,
    RESOLUTION,
    Condition,
    Degradation,
    check_size,
    degradations,
    degrade,
)
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.learning.attacks import pgd
from recast_pl.learning.calibration import fit_temperature
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.piece import Classifier
from recast_pl.runs.evaluation import activate, restore, split_features
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.images import check_images

CLEAN, FGSM, PGD = Condition("clean"), "fgsm", "pgd"

MEASURES: Mapping[str, tuple[str, ...]] = {
    "clean": (CLEAN.kind,),
    "corrupted": CORRUPTIONS,
    "low resolution": (RESOLUTION,),
    "JPEG": (JPEG,),
    "FGSM": (FGSM,),
    "PGD": (PGD,),
}
"""The kinds of conditions that the accuracy of a measure is a mean over."""


@dataclass(frozen=True)
class Attacks:
    """How images are attacked.

    Args:
        epsilons: Largest changes of a channel of a pixel, of 255 levels.
        steps: Steps of PGD.
    """

    epsilons: tuple[float, ...]
    steps: int

    def conditions(self) -> dict[Condition, tuple[float, int]]:
        """The attacks: ε for images in [0, 1], and the steps."""
        kinds = ((FGSM, 1), (PGD, self.steps))
        return {Condition(kind, level): (level / 255, steps) for kind, steps in kinds for level in self.epsilons}


@dataclass(frozen=True)
class Answers:
    """What a task answers for N images under one condition.

    Args:
        correct: Whether the class is right (N,).
        confidence: Its probability (N,).
        calibrated: Its probability with the temperature of the task (N,).
    """

    correct: Tensor
    confidence: Tensor
    calibrated: Tensor


@dataclass(frozen=True)
class TaskRobustness:
    """The answers of a trained task.

    Args:
        positions: Positions of the test images in the data of the task (N,), in ascending order.
        images: A digest of all test images of the task.
        temperature: The temperature that fits the validation images best.
        answers: By condition.
    """

    positions: tuple[int, ...]
    images: str
    temperature: float
    answers: dict[Condition, Answers]

    def shares(self, measure: str) -> Tensor:
        """The share of the conditions of a measure under which each image is recognised (N,), in double precision."""
        kinds = MEASURES[measure]
        chosen = [answers.correct for condition, answers in self.answers.items() if condition.kind in kinds]
        return torch.stack(chosen).double().mean(0)


def measure_robustness(
    module: TILModule,
    data: SequentialTaskDataModule,
    folder: RunFolder,
    evaluator: Trainer,
    attacks: Attacks,
    limit: int | None = None,
) -> Iterator[tuple[str, TaskRobustness]]:
    """Classifies the test images of every trained task of a run under all conditions.

    Args:
        module: The run's method and backbone, not yet built.
        data: The run's tasks.
        folder: The run folder.
        evaluator: Decides the device and the precision.
        attacks: The attacks.
        limit: The most test images of a task, evenly spaced to show many classes; None for all.

    Yields:
        The name of each task, in the order of the stream, and its answers.

    Raises:
        RunError: If no task is trained, the images of a task have changed since, or the package of corruptions is
            missing.
        PatchError: If a patch is damaged.
        DataError: If the images are smaller than the corruptions need.
    """
    check_size(data.image_size)
    conditions = _Conditions(degradations(), attacks)
    data.prepare_data()
    restore(module, folder, data.image_size)
    module.eval()
    names = [task.name for task in data.tasks]
    for name, files in folder.finished().items():
        patch, record = files.load()
        check_images(data, names.index(name), record, resuming=False)
        activate(module, data, names.index(name), patch)
        yield name, _measure_task(module, data, evaluator, conditions, limit)


@dataclass(frozen=True)
class _Conditions:
    """Everything that is done to images."""

    changes: Mapping[Condition, Degradation]
    attacks: Attacks

    def apply(
        self, network: Classifier, images: Tensor, labels: Tensor, task: str, positions: list[int]
    ) -> Iterator[tuple[Condition, Tensor]]:
        """Yields a batch (B, 3, S, S) in [0, 1] as it is, and under each condition; attacks are on `network`."""
        yield CLEAN, images
        for condition, change in self.changes.items():
            yield condition, degrade(images, condition, change, task, positions)
        for condition, (epsilon, steps) in self.attacks.conditions().items():
            yield condition, pgd(network, images, labels, epsilon, steps)


def _measure_task(
    module: TILModule, data: SequentialTaskDataModule, evaluator: Trainer, conditions: _Conditions, limit: int | None
) -> TaskRobustness:
    temperature, network = _temperature(module, data, evaluator), _in_precision(module, evaluator)
    split = data.plain_dataloader("test").dataset
    assert isinstance(split, TaskSplit)
    count = len(split) if limit is None else min(limit, len(split))
    chosen = np.linspace(0, len(split) - 1, count).round().astype(int).tolist()
    found: dict[Condition, list[Answers]] = {}
    with module.testing() as start_stream:
        classifiers = defaultdict[Condition, Classifier](lambda: _in_precision(start_stream(), evaluator))
        for start in range(0, count, data.batch_size):
            some = chosen[start : start + data.batch_size]
            batch = [part.to(module.device) for part in split.__getitems__(some)]
            images, labels = data.on_after_batch_transfer(batch, 0)
            positions = split.indices[some].tolist()
            for condition, changed in conditions.apply(network, images, labels, module.task_name, positions):
                answers = _answers(classifiers[condition], changed, labels, temperature)
                found.setdefault(condition, []).append(answers)
    digest = data.image_record["test"]["digest"]
    joined = {condition: _join(parts) for condition, parts in found.items()}
    return TaskRobustness(tuple(split.indices[chosen].tolist()), digest, temperature, joined)


@torch.no_grad()
def _temperature(module: TILModule, data: SequentialTaskDataModule, evaluator: Trainer) -> float:
    validation, head = split_features(module, data, "val", evaluator), module.current()[1]
    return fit_temperature(head(validation.features.to(head.weight.dtype)), validation.labels)


def _in_precision(network: Classifier, evaluator: Trainer) -> Classifier:
    """A network, in the precision of the run."""
    precision = evaluator.precision_plugin

    def classify(images: Tensor) -> Tensor:
        with precision.forward_context():
            return network(precision.convert_input(images))

    return classify


@torch.no_grad()
def _answers(network: Classifier, images: Tensor, labels: Tensor, temperature: float) -> Answers:
    values = network(images).float()
    confidence, predicted = values.softmax(1).max(1)
    calibrated = (values / temperature).softmax(1).max(1).values
    return Answers((predicted == labels).cpu(), confidence.cpu(), calibrated.cpu())


def _join(parts: list[Answers]) -> Answers:
    return Answers(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
