"""What was learnt, in use: any task of a run, for images of any kind, from many threads."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.images import decode_any
from recast_pl.errors import DataError, PatchError, RunError
from recast_pl.inference.mixed import MixedTasks
from recast_pl.inference.states import TaskStates
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file, a PIL image, an array (H, W, 3) or a tensor (3, H, W); the last two uint8, or floating point in [0, 1]."""

_BATCH = 64  # images that are decoded and classified at a time, so that any number of them fits into memory

_lock = threading.Lock()  # generated weights are cached by torch for the whole process


@dataclass(frozen=True)
class Prediction:
    """What a task says of an image.

    Args:
        task: Name of the task.
        label: The most probable class.
        probability: Its probability.
        probabilities: Probabilities of all classes of the task, by name.
    """

    task: str
    label: str
    probability: float
    probabilities: dict[str, float]


def load(
    run_dir: str | Path,
    module: TILModule | None = None,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
) -> "Predictor":
    """Makes what a run has learnt ready for use.

    Args:
        run_dir: The run folder.
        module: The module of the run's backbone and method, not yet built; None to make it from `config.yaml` (with
            the precision of the run's trainer), which needs jsonargparse.
        device: Where to compute; None for where the run's trainer would, or where the module is.
        tasks: Names of the tasks to read, at least one; None for all.

    Returns:
        The run's tasks.

    Raises:
        RunError: If the folder holds no learnt task, or jsonargparse is missing.
        PatchError: If a patch is damaged, or is not of this backbone and method.
    """
    precision = Precision()
    with isolate_rng():  # random weights, if the run began with them, are found again; the caller's draws stay
        if module is None:
            module, precision, place = _from_config(run_dir)
            device = place if device is None else device
        folder = RunFolder(run_dir)
        patches = list(folder.load_patches(tasks).values())
        restore(module, folder, patches[-1].image_size)
    predictor = Predictor(precision.convert_module(module.to(device or module.device)), precision, len(patches))  # type: ignore[arg-type]
    for patch in patches:
        predictor._add(patch)
    return predictor


class Predictor:
    """Classifies images with learnt tasks; `recast_pl.load` makes it of a run.

    Many threads may predict by different tasks, and add and remove tasks, at the same time.

    Args:
        module: Built, with what its tasks share; from now on the predictor's own.
        precision: In which it computes; None for that of its weights.
        room: Tasks to have room for at first.

    Raises:
        RunError: If the module is not built.
    """

    def __init__(self, module: TILModule, precision: Precision | None = None, room: int = 0) -> None:
        if module.backbone is None:
            raise RunError("TILModule has no backbone yet; call build(image_size) first")
        self._module, self._precision = module.eval(), precision or Precision()
        self._states = TaskStates(len(module.pieces), room)
        self._network = MixedTasks(module.backbone, module.pieces, self._states)
        self._tasks: dict[str, _Task] = {}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were learnt or added."""
        return list(self._tasks)

    def classes(self, task: str) -> list[str]:
        """Class names of a task, in order of label.

        Raises:
            RunError: If there is no such task.
        """
        return list(self._find(task).classes)

    def image_size(self, task: str) -> int:
        """Height and width in pixels to which a task's images are brought.

        Raises:
            RunError: If there is no such task.
        """
        return self._find(task).image_size

    def predict(
        self,
        images: Picture | Sequence[Picture],
        task: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Classifies images, each by a task of its own or all by the same, preprocessed as in training.

        Args:
            images: One image or a sequence of them: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W) of
                any size; or a batch (N, H, W, 3) or (N, 3, H, W). Numbers are uint8, or floating point in [0, 1],
                which are rounded to the 256 values that files have.
            task: The task for all; None where `tasks` is given.
            tasks: The task of each image; None where `task` is given.

        Returns:
            A prediction for each image, in their order.

        Raises:
            RunError: If there is no such task.
            DataError: If an image cannot be read, or not just one of `task` and `tasks` fits.
        """
        items = _listed(images)
        names = _names(len(items), task, tasks)
        known = {name: self._find(name) for name in dict.fromkeys(names)}
        found: dict[int, Prediction] = {}
        # by size, because those of a batch are of one; by task, so that batches are of few
        order = sorted(range(len(items)), key=lambda i: (known[names[i]].image_size, known[names[i]].row))
        for size in sorted({entry.image_size for entry in known.values()}):
            alike = [i for i in order if known[names[i]].image_size == size]
            for chunk in (alike[start : start + _BATCH] for start in range(0, len(alike), _BATCH)):
                pixels = torch.stack([decode_any(items[i], size) for i in chunk])  # (B, 3, S, S)
                found |= zip(chunk, self._classify(pixels, [(names[i], known[names[i]]) for i in chunk]), strict=True)
        return [found[i] for i in range(len(items))]

    def add_patch(self, patch: str | Path | TaskPatch) -> str:
        """Takes in a task that was learnt elsewhere, on the same base by the same method.

        Args:
            patch: A file of `patches/`, or what it holds.

        Returns:
            Name of the task.

        Raises:
            PatchError: If the patch is damaged or does not belong here, or a task has its name; nothing has changed
                then.
        """
        patch = patch if isinstance(patch, TaskPatch) else TaskPatch.load(patch)
        if not self._module.isolated:
            raise PatchError(
                f"tasks of {self._module.method} share weights, which the patch of {patch.task!r} does not hold; "
                "load the run that it was learnt in"
            )
        self._add(patch)
        return patch.task

    def remove(self, task: str) -> None:
        """Forgets a task; its name is free again.

        Raises:
            RunError: If there is no such task.
        """
        with _lock:
            self._states.remove(self._find(task).row)
            del self._tasks[task]

    def _add(self, patch: TaskPatch) -> None:
        with _lock:
            if patch.task in self._tasks:
                raise PatchError(f"there is a task {patch.task!r} already; remove it first, or rename the new one")
            self._module.check_patch(patch)
            for piece, state in zip(self._module.pieces, patch.pieces, strict=True):
                piece.load_task_state(state)  # which refuses what is not its own
            head = {name: tensor.to(self._module.device) for name, tensor in self._module.head_of(patch).items()}
            self._tasks[patch.task] = _Task(self._states.add(patch.pieces), patch.classes, head, patch.image_size)

    def _find(self, name: str) -> "_Task":
        task = self._tasks.get(name)
        if task is None:
            raise RunError(f"task {name!r} is not learnt; learnt are {', '.join(self.tasks)}")
        return task

    @torch.no_grad()
    def _classify(self, pixels: Tensor, tasks: Sequence[tuple[str, "_Task"]]) -> list[Prediction]:
        """What each image's task says of uint8 images (B, 3, S, S); those of a task follow one another."""
        groups = [(name, task, len(list(same))) for (name, task), same in itertools.groupby(tasks)]
        with _lock, self._precision.forward_context():
            for name, task, _ in groups:
                if self._tasks.get(name) is not task:
                    raise RunError(f"task {name!r} was removed while it was to predict; predict again")
            images = tv.to_dtype(pixels.to(self._module.device), torch.float32, scale=True)
            rows, counts = [task.row for _, task, _ in groups], [count for *_, count in groups]
            features = self._network.features(self._precision.convert_input(images), rows, counts)  # (B, D)
            parts = [
                F.linear(part, *(task.head[name].to(part.dtype) for name in ("weight", "bias")))
                .softmax(1)
                .float()
                .cpu()
                for (_, task, _), part in zip(groups, features.split(counts), strict=True)
            ]
        return [
            _prediction(name, task.classes, row.tolist())
            for (name, task, _), part in zip(groups, parts, strict=True)
            for row in part  # (classes,)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Where a task's states are, and what it has beside them."""

    row: int
    classes: Sequence[str]
    head: Mapping[str, Tensor]
    image_size: int


def _from_config(run_dir: str | Path) -> tuple[TILModule, Precision, torch.device]:
    """The module of a run, and with what precision and where its trainer would evaluate."""
    try:
        from recast_pl.config.run import open_run  # noqa: PLC0415
    except ModuleNotFoundError as cause:
        raise RunError(
            f"reading {run_dir}/config.yaml needs {cause.name}; install it (pip install 'jsonargparse[signatures]'), "
            "or give load the module=TILModule(...) of the run's backbone and method"
        ) from cause
    _, init = open_run(str(run_dir))
    trainer = TrainerFactory(init.trainer).alone().for_evaluation()
    return init.model, trainer.precision_plugin, trainer.strategy.root_device


def _listed(images: Any) -> list[Any]:
    """The images of a sequence or batch, or the one image."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def _names(count: int, task: str | None, tasks: Sequence[str] | None) -> list[str]:
    """The task of each of so many images."""
    if (task is None) == (tasks is None):
        raise DataError("predict takes either task=NAME for all images, or tasks=[NAME, ...] with one for each")
    names = [task] * count if task is not None else list(tasks or ())
    if len(names) != count or isinstance(tasks, str):
        raise DataError(f"tasks={tasks!r} names {len(names)} tasks for {count} images; name one for each image")
    return names


def _prediction(task: str, classes: Sequence[str], probabilities: list[float]) -> Prediction:
    best = max(range(len(classes)), key=probabilities.__getitem__)
    return Prediction(task, classes[best], probabilities[best], dict(zip(classes, probabilities, strict=True)))
