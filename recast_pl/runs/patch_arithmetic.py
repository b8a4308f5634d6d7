"""Adds the robustness of one task of a run to others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lightning import Trainer
from torch import Tensor

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import PatchError
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.robust_signature import robust_signature
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.patch_merging import MergedAccuracy, PatchTester, check_linear, layer_values, start_states


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
        PatchError: If the patches do not fit the run, their weights are not linear in what they keep, or there is no
            layer.
    """
    if layers < 1:
        raise PatchError(f"layers={layers} must be at least 1: how many layers the signature has")
    patches = [patch.widened() for patch in patches]
    all_patches = [robust.widened(), clean.widened(), *patches]
    check_linear(module, all_patches)
    values = in_order(module, layer_values(module, [start_states(module.pieces), *(p.pieces for p in all_patches)]))
    changes = [value - value[0] for value in values.values()]
    signature = robust_signature([c[1] for c in changes], [c[2] for c in changes], layers)
    tester, changed, rows = PatchTester(module, data, evaluator), list[TaskPatch](), list[MergedAccuracy]()
    for place, patch in enumerate(patches, 3):  # after the start and the two tasks of the signature
        before = tester.accuracy(patch)
        for (parameter, value), part in zip(values.items(), signature, strict=True):
            parameter.data = (value[place] + scale * part).to(parameter)
        found = replace(patch, pieces=[piece.task_state() for piece in module.pieces], rounded=None)
        after = tester.accuracy(found)
        changed.append(replace(found, metrics={} if after is None else {"accuracy": after}))
        rows.append(MergedAccuracy(patch.task, before, after))
    return changed, rows


def in_order(module: TILModule, values: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The values of parameters in the order of the network."""
    return {p: values[p].to(torch.float64) for p in (*module.parameters(), *module.buffers()) if p in values}
