"""Merges the patches of several tasks of a run, and measures what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from recast_pl.data.batches import TaskSplit
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import PatchError
from recast_pl.learning.ada_merging import fit_factors
from recast_pl.learning.merged_tasks import MergedTasks
from recast_pl.learning.merging import Merger, TaskVectors, flatten, unflatten
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.piece import Piece
from recast_pl.runs.evaluation import activate, has_images, measure, split_features

_MOST_IMAGES = 512  # of a task, for AdaMerging


@dataclass(frozen=True)
class MergedAccuracy:
    """The test accuracies in percent of a task, from its own patch and merged; None if its images are not here."""

    task: str
    alone: float | None
    merged: float | None


def merge_patches(
    module: TILModule, data: SequentialTaskDataModule, patches: Sequence[TaskPatch], how: str, merger: Merger,
    evaluator: Trainer,
) -> tuple[MergedTasks, list[MergedAccuracy]]:  # fmt: skip
    """Merges patches of different tasks of a run.

    Args:
        module: The run's method, built on its base.
        data: The run's tasks; their images are needed only to choose settings and to measure.
        patches: The tasks to merge, in any precision.
        how: Name of the way to merge.
        merger: The way to merge.
        evaluator: Measures.

    Returns:
        The merged tasks, and the accuracy of each.

    Raises:
        PatchError: If the patches do not belong together or cannot be merged this way, or images are needed that are
            not here.
    """
    check_mergeable(module, patches)
    judge = _Judge(module, data, patches, evaluator)
    if merger.exact and not keeps_numbers(module):
        raise PatchError(
            f"{how} does not work with {', '.join(module.method)}, whose numbers are factors of the weights; merge by "
            "arithmetic, ties or consensus"
        )
    merged = merger.merge(judge.vectors, judge)
    start = judge.vectors.start
    own = [judge.is_own(index, merged.of_task(index, start)) for index in range(len(patches))]
    pieces = patches[0].pieces if own == [True] else judge.states(merged.numbers)
    found = MergedTasks(list(patches), pieces, merged.masks, {"method": how} | merged.settings).as_read()
    rows = [
        MergedAccuracy(p.task, judge.tester.accuracy(p), judge.tester.accuracy(found.patch(i, judge.start)))
        for i, p in enumerate(patches)
    ]
    measured = [
        patch if same else replace(patch, metrics={} if row.merged is None else {"accuracy": row.merged})
        for patch, same, row in zip(patches, own, rows, strict=True)
    ]
    return replace(found, tasks=measured), rows


def check_mergeable(module: TILModule, patches: Sequence[TaskPatch]) -> None:
    """Raises PatchError unless all patches fit the module, belong to different tasks, and can be merged."""
    names = [patch.task for patch in patches]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PatchError(f"two patches are of task {twice!r}; merge different tasks, or use 'patch average'")
    for patch in patches:
        module.check_patch(patch)
    for piece, state in zip(module.pieces, patches[0].pieces, strict=True):
        if not module.isolated or (state and not piece.linear):
            raise PatchError(
                f"tasks of {piece.name} cannot be merged, because the weights are not linear in what a task keeps; "
                "merge tasks of Recast, Spectral, LoRA, LoRAXS, TinyLoRA, Scale, HeadScale, ATLAS, PartialFineTune or "
                "FullFineTune"
            )


def start_states(pieces: Sequence[Piece]) -> list[dict[str, Tensor]]:
    """The states that every task starts from; what the pieces hold is lost."""
    with isolate_rng():
        for piece in pieces:
            piece.begin_task()
    return [piece.task_state() for piece in pieces]


def layer_values(module: TILModule, states: Sequence[Sequence[Mapping[str, Tensor]]]) -> dict[Tensor, Tensor]:
    """What some task states, the first of which is loaded, set in each layer.

    Args:
        module: The run's method, whose pieces keep numbers, see `keeps_numbers`.
        states: Of T tasks, a state for each piece.

    Returns:
        For each parameter that tasks change, in the order of the network, its values (T, *shape).

    Raises:
        PatchError: If a method does not tell its layers apart.
    """
    values = dict[Tensor, Tensor]()
    for piece, of_piece in zip(module.pieces, zip(*states, strict=True), strict=True):
        found = piece.unpack({name: torch.stack([state[name] for state in of_piece]) for name in of_piece[0]})
        if found is None:
            raise PatchError(f"the layers of {piece.name} cannot be told apart in its states; use another way to merge")
        values |= found
    return {p: values[p] for p in (*module.parameters(), *module.buffers()) if p in values}


def keeps_numbers(module: TILModule) -> bool:
    """Whether the states of all pieces are the numbers in which weights are linear, and not factors of them."""
    return all(type(piece).numbers is Piece.numbers for piece in module.pieces)


class PatchTester:
    """Measures patches on the test images of a run's tasks.

    Args:
        module: The run's method, built on its base.
        data: The run's tasks.
        evaluator: Measures.
    """

    def __init__(self, module: TILModule, data: SequentialTaskDataModule, evaluator: Trainer) -> None:
        self._module, self._data, self._evaluator = module, data, evaluator
        self.places = {task.name: place for place, task in enumerate(data.tasks)}
        """The position of each task in the stream."""
        self._there: dict[str, bool] = {}

    def accuracy(self, patch: TaskPatch) -> float | None:
        """Test accuracy in percent; None if the images of the task are not here."""
        if not self.has_images(patch.task):
            return None
        return measure(self._module, self._data, self.places[patch.task], patch, self._evaluator)

    def has_images(self, task: str) -> bool:
        """Whether the images of a task are here."""
        if task not in self._there:
            self._there[task] = task in self.places and has_images(self._data, self.places[task])
        return self._there[task]


class _Judge:
    """Measures merged numbers on the images of a run's tasks, see `recast_pl.learning.merging.Judge`."""

    def __init__(
        self, module: TILModule, data: SequentialTaskDataModule, patches: Sequence[TaskPatch], evaluator: Trainer
    ) -> None:
        self._module, self._data, self._evaluator = module, data, evaluator
        self._patches = [patch.widened() for patch in patches]
        self.start = start_states(module.pieces)
        """The states that every task starts from."""
        self.tester = PatchTester(module, data, evaluator)
        """Measures on test images."""
        tuned = torch.stack([flatten(self._numbers(patch.pieces)) for patch in self._patches])
        self.vectors = TaskVectors(flatten(self._numbers(self.start)), tuned)
        """The numbers of all tasks."""

    def states(self, numbers: Tensor) -> list[dict[str, Tensor]]:
        """The states of the pieces for some numbers (N,)."""
        parts = unflatten(numbers, like=self._numbers(self.start))
        return [dict(piece.from_numbers(part)) for piece, part in zip(self._module.pieces, parts, strict=True)]

    def is_own(self, index: int, numbers: Tensor) -> bool:
        """Whether numbers (N,) are those of a task."""
        return torch.equal(numbers.float(), self.vectors.tuned[index].float())

    def patch(self, index: int, numbers: Tensor) -> TaskPatch:
        """The patch of a task with other numbers (N,), with its own state if the numbers are its own."""
        own = self._patches[index]
        return own if self.is_own(index, numbers) else replace(own, pieces=self.states(numbers), rounded=None)

    def score(self, index: int, numbers: Tensor) -> tuple[float, float]:
        """Accuracy in [0, 1] on validation images, and the negative cross-entropy."""
        self._select(index, self.patch(index, numbers))
        features = split_features(self._module, self._data, "val", self._evaluator)
        accuracy, loss = features.score(self._module.current()[1])
        return accuracy, -loss

    def refine(self, steps: int, scale: float) -> Tensor:
        """Numbers (N,) of AdaMerging."""
        layers = layer_values(self._module, [self.start, *(patch.pieces for patch in self._patches)])
        tasks = [(self._unlabelled(index), patch.head) for index, patch in enumerate(self._patches)]
        for parameter, value in fit_factors(self._module.current()[0], layers, tasks, steps, scale).items():
            parameter.data = value
        return flatten(self._numbers([piece.task_state() for piece in self._module.pieces]))

    def _numbers(self, states: Sequence[Any]) -> list[dict[str, Tensor]]:
        return [dict(piece.numbers(state)) for piece, state in zip(self._module.pieces, states, strict=True)]

    def _unlabelled(self, index: int) -> Tensor:
        """Validation images of a task (V, 3, S, S), on the device."""
        self._select(index, self._patches[index])
        split = self._data.plain_dataloader("val").dataset
        assert isinstance(split, TaskSplit)
        chosen = torch.linspace(0, len(split) - 1, min(len(split), _MOST_IMAGES)).round().long().tolist()
        device = self._evaluator.strategy.root_device
        self._module.to(device)
        images, _ = self._data.on_after_batch_transfer([part.to(device) for part in split.__getitems__(chosen)], 0)
        return images

    def _select(self, index: int, patch: TaskPatch) -> None:
        """Makes a task the current one, and selects its images; raises PatchError if there are no validation images."""
        task = patch.task
        there = self.tester.has_images(task)
        if there:
            activate(self._module, self._data, self.tester.places[task], patch)
        if not there or not len(self._data.plain_dataloader("val").dataset):  # type: ignore[arg-type]
            raise PatchError(
                f"task {task!r} has no validation images here, by which settings are chosen; give --scale to choose "
                "the factor yourself, --data_root if its images were moved, or --method ties, which needs none"
            )
