"""Evaluates trained tasks of a run."""

from pathlib import Path

import numpy as np
from lightning import Trainer
from torch import Tensor

from recast_pl.data.batches import TaskSplit
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import PatchError, RunError
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.methods.recast import Recast
from recast_pl.runs.folder import accuracy_matrix, load_finished, load_patches, load_shared, patch_paths, percent


def evaluate_run(
    module: TILModule, data: SequentialTaskDataModule, run_dir: Path, trainers: TrainerFactory
) -> list[tuple[str, float, float]]:
    """Measures every learnt task of a run again, from its patch.

    Returns:
        Task, accuracy recorded in percent, accuracy measured in percent.

    Raises:
        RunError: If nothing has been learnt.
    """
    data.prepare_data()
    evaluator = trainers.for_evaluation()
    patches = load_patches(run_dir)
    restore(module, run_dir, data.image_size)
    records = [load_finished(run_dir, path.stem)[1] for path in patch_paths(run_dir)]
    recorded = accuracy_matrix(records)[-1]
    positions = {task.name: index for index, task in enumerate(data.tasks)}
    return [
        (name, accuracy, measure(module, data, positions[name], patch, evaluator))
        for (name, patch), accuracy in zip(patches.items(), recorded, strict=True)
        if accuracy is not None
    ]


def choose_patch(run_dir: Path, task: str | None, file: str | None) -> TaskPatch:
    """A learnt task of a run, or a patch that was made of some.

    Args:
        run_dir: The run folder.
        task: Name of the learnt task; None for the file.
        file: Path of a patch; None for the task.

    Raises:
        RunError: If neither or both are given, or the run has not learnt the task.
    """
    patches = load_patches(run_dir)
    if (task is None) == (file is None):
        given = "neither" if task is None else "both"
        raise RunError(f"{given} of --task and --patch are given; give one, learnt are {', '.join(patches)}")
    if file is not None:
        return TaskPatch.load(file)
    if task not in patches:
        raise RunError(f"task {task!r} is not learnt in {run_dir}; learnt are {', '.join(patches)}")
    return patches[task]


def open_task(module: TILModule, run_dir: Path, patch: TaskPatch) -> None:
    """Builds a module as a run's tasks need it, and activates one.

    Args:
        module: Of the run's method and backbone.
        run_dir: The run folder.
        patch: The task.
    """
    restore(module, run_dir, patch.image_size)
    module.activate(patch)


def restore(module: TILModule, run_dir: Path, image_size: int) -> None:
    """Builds a module as a run's tasks need it, so that they can be activated.

    Args:
        module: Of the run's method and backbone.
        run_dir: The run folder.
        image_size: Height and width of the input in pixels.
    """
    for piece in module.pieces:
        piece.load_base(run_dir)
    module.build(image_size)
    load_shared(module, run_dir / "shared" / patch_paths(run_dir)[-1].name)


def learnt_coefficients(module: TILModule, run_dir: Path) -> dict[str, Tensor]:
    """What the tasks of a run have made of the coefficients.

    Args:
        module: Of the run's method; it need not be built.
        run_dir: The run folder.

    Returns:
        Mean coefficients, weight after weight (Σ n,), by learnt task; none if nothing has been learnt.
    """
    if not any((run_dir / "patches").glob("*.safetensors")):
        return {}
    (index,) = (i for i, piece in enumerate(module.pieces) if isinstance(piece, Recast))
    return {task: patch.pieces[index]["coefficients"] for task, patch in load_patches(run_dir).items()}


def sample_images(data: SequentialTaskDataModule, count: int) -> Tensor:
    """Test images of the first task, evenly spaced, so that they are of many classes.

    Args:
        data: The stream.
        count: How many at most.

    Returns:
        Images (N, 3, S, S) in [0, 1].
    """
    data.prepare_data()
    data.select(0)
    split = data.plain_dataloader("test").dataset
    assert isinstance(split, TaskSplit)
    positions = np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int).tolist()
    images, _ = data.on_after_batch_transfer(split.__getitems__([(0, position) for position in positions]), 0)
    return images


def measure(
    module: TILModule, data: SequentialTaskDataModule, index: int, patch: TaskPatch, evaluator: Trainer
) -> float:
    """Accuracy in percent of a learnt task on its test split.

    Args:
        module: Built, of the method and base of the patch.
        data: Its stream.
        index: Position of the task in the stream.
        patch: The learnt task.
        evaluator: Runs the test.
    """
    data.select(index)
    if data.classes != patch.classes:
        raise PatchError(
            f"task {patch.task!r} has classes {data.classes}, its patch has {patch.classes}; restore the images"
        )
    module.activate(patch)
    (result,) = evaluator.test(module, datamodule=data, verbose=False)
    return percent(result["test/accuracy"])
