"""Makes the signatures of the trained tasks of a run, from their images."""

from collections.abc import Iterator
from dataclasses import replace

from lightning import Trainer

from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import PatchError, RunError
from recast_pl.learning.til_module import TILModule
from recast_pl.runs.evaluation import restore, split_features
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.images import check_images


def sign_run(module: TILModule, data: SequentialTaskDataModule, folder: RunFolder, evaluator: Trainer) -> Iterator[str]:
    """Writes the signature of each trained task that has none, as `fit` does when a task begins.

    Args:
        module: The run's method and backbone, not yet built.
        data: The run's tasks.
        folder: The run folder.
        evaluator: Decides the device and the precision.

    Yields:
        The name of each task whose signature was written.

    Raises:
        RunError: If tasks share weights, no task is trained, or the images of a task have changed since.
        PatchError: If a patch is damaged.
    """
    if not module.isolated:
        raise RunError(f"tasks of {module.method} share weights, so that no frozen network could tell them apart")
    waiting = {name: files for name, files in folder.finished().items() if not files.signature.is_file()}
    data.prepare_data()
    restore(module, folder, data.image_size)
    names = [task.name for task in data.tasks]
    for name, files in waiting.items():
        patch, record = files.load()
        check_images(data, names.index(name), record, resuming=False)
        data.select(names.index(name))
        module.begin_task(name, data.classes)
        if patch.base != module.base:
            raise PatchError(f"{files.patch} is of base {patch.base[:12]}…, the run has {module.base[:12]}…")
        signature = module.sign(*(split_features(module, data, split, evaluator) for split in ("train", "val")))
        module.activate(patch)
        confidence = split_features(module, data, "val", evaluator).confidence(module.current()[1])
        replace(signature, confidence=confidence).save(files.signature)
        yield name
