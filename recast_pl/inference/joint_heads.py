"""Accuracy among the classes of all tasks by the heads of a method that trains all of them, as one joint classifier."""

from collections.abc import Sequence

import torch
from lightning import Trainer

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.piece import Piece
from recast_pl.runs.class_rows import Accuracies
from recast_pl.runs.evaluation import percent_right, split_features
from recast_pl.runs.folder import TaskFiles


class JointHeads:
    """Measures how often the highest logit over the heads of all tasks is that of the image's class, as `joint`."""

    measures: Sequence[str] = ("joint",)

    def check(self, module: TILModule) -> None:
        """Raises RunError if a piece also keeps numbers of each task, so that there is no joint network."""
        own = [p for p in module.pieces if p.isolated or type(p).task_state is not Piece.task_state]
        if own:
            raise RunError(
                f"--evaluation class compares the heads of all tasks on one network, but each task has numbers of "
                f"{type(own[0]).__name__} of its own; leave out one of them"
            )

    def measure(
        self, module: TILModule, data: SequentialTaskDataModule, files: Sequence[TaskFiles], evaluator: Trainer
    ) -> Accuracies:
        """Measures all tasks of some files, as `ClassEvaluation` describes.

        Raises:
            RunError: If the network has learnt further tasks since, which cannot be undone.
        """
        if module.old_tasks != [each.task for each in files]:
            raise RunError(
                f"accuracies after task {files[-1].task!r} can only be measured before the next task is trained, "
                "which changes the network; start another --run_dir with --evaluation class"
            )
        found: Accuracies = {"joint": {}}
        start = 0
        for index, each in enumerate(files):
            data.select(index)
            test = split_features(module, data, "test", evaluator)
            with torch.no_grad():
                features = test.features.to(module.current()[1].weight.dtype)
                logits = [head(features) for head in module.old_heads]
            found["joint"][each.task] = percent_right(torch.cat(logits, 1).argmax(1) == start + test.labels)
            start += logits[index].shape[1]
        module.cpu()
        return found
