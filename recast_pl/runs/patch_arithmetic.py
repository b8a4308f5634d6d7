"""Adds the robustness of one task of a run to others."""

from collections.abc import Sequence
from dataclasses import replace

from lightning import Trainer

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import PatchError
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.robust_signature import robust_signature
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.patch_merging import (
    MergedAccuracy,
    PatchTester,
    check_mergeable,
    keeps_numbers,
    layer_values,
    start_states,
)


def add_robustness(
    module: TILModule, data: SequentialTaskDataModule, robust: TaskPatch, clean: TaskPatch,
    patches: Sequence[TaskPatch], layers: int, scale: float, evaluator: Trainer,
) -> tuple[list[TaskPatch], list[MergedAccuracy]]:  # fmt: skip
    """Adds a robust weight signature, see `recast_pl.learning.robust_signature`, to tasks.

    Args:
        module: The run's method, built on its base.
        data: The run's tasks; their images are needed only to measure.
        robust: A task that was trained on degraded images.
        clean: The same task, trained on the images as they are.
        patches: The tasks to change, in any precision.
        layers: How many of the weights that a task changes have a signature, from the first of the network.
        scale: Factor of the signature; 0 changes nothing.
        evaluator: Measures.

    Returns:
        The changed tasks, with their heads, in full precision; and the test accuracy of each, before and after.

    Raises:
        PatchError: If the patches do not fit the run, two to change are of one task, the method cannot be merged or
            keeps factors of its weights, or there is no layer.
    """
    if layers < 1:
        raise PatchError(f"layers={layers} must be at least 1: how many layers the signature has")
    check_mergeable(module, patches)
    for patch in (robust, clean):
        module.check_patch(patch)
    if not keeps_numbers(module):
        raise PatchError(
            f"patch arithmetic does not work with {', '.join(module.method)}, whose patches keep factors of the weights"
        )
    widened = [patch.widened() for patch in (robust, clean, *patches)]
    values = layer_values(module, [start_states(module.pieces), *(patch.pieces for patch in widened)])
    changes = [value.double() - value[0].double() for value in values.values()]
    signature = robust_signature([change[1] for change in changes], [change[2] for change in changes], layers)
    tester, changed, rows = PatchTester(module, data, evaluator), list[TaskPatch](), list[MergedAccuracy]()
    for place, patch in enumerate(widened[2:], 3):  # after the start and the two tasks of the signature
        before = tester.accuracy(patch)
        for (parameter, value), part in zip(values.items(), signature, strict=True):
            parameter.data = (value[place].double() + scale * part).to(parameter)
        found = replace(patch, pieces=[piece.task_state() for piece in module.pieces], rounded=None)
        try:
            module.check_patch(found)
        except PatchError as cause:
            raise PatchError(f"scale={scale} makes numbers that no patch can hold; choose a smaller factor") from cause
        after = tester.accuracy(found)
        changed.append(replace(found, metrics={} if after is None else {"accuracy": after}))
        rows.append(MergedAccuracy(patch.task, before, after))
    return changed, rows
