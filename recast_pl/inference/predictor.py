"""Predictions by the tasks of a run, for images of any kind, from any number of threads."""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.images import decode_any
from recast_pl.errors import DataError, PatchError, RunError
from recast_pl.inference.loaded_task import LoadedTask, SignatureSource
from recast_pl.inference.mixed_batch import MixedBatch, PackedState
from recast_pl.inference.pictures import Picture, as_list
from recast_pl.inference.prediction import REFUSE, Prediction, RoutedPrediction, find_candidates
from recast_pl.learning.device import find_device
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.router import Router
from recast_pl.learning.signature import Signature
from recast_pl.learning.til_module import TILModule
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.rules import ImageSize, height_and_width
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder, TaskFiles

_BATCH = 64  # images that are decoded and classified at a time, so that any number of them fits into memory

_lock = threading.Lock()  # of all predictors, because a precision may set the default type of the entire process


def load(
    run_dir: str | Path,
    module: TILModule | None = None,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    trust: bool = False,
    at: Mapping[str, int] | None = None,
    on_demand: bool = False,
) -> "Predictor":
    """Loads the tasks of a run for prediction.

    Args:
        run_dir: The run folder.
        module: The run's backbone and method, not yet built; None to make it from `config.yaml` (with the precision of
            the run's trainer), which needs jsonargparse.
        device: Where to compute, such as `cpu` or `cuda:1`; `auto` for what this machine has; None for that, or for
            where the module is. Where the run was trained does not matter.
        tasks: Names of the tasks to read, at least one; None for all.
        trust: Whether the run may use code outside of this package, timm, torchvision and torch, such as your own
            pieces. Only for runs of people you trust: opening one runs that code.
        at: The version of some tasks, by task; of all others the present one is read.
        on_demand: Whether to read and check each patch but the last when its task is first used: quicker for many.

    Returns:
        The predictor with all tasks of the run.

    Raises:
        RunError: If the folder holds no trained task or not a version that is asked for, or uses code that is not
            trusted, there is no such device, or jsonargparse is missing.
        PatchError: If a patch is damaged, or belongs to another backbone or method.
    """
    precision, place = Precision(), find_device(device) if device is not None or module is None else module.device
    # random weights, if the run began with them, are made again; the caller's generators are left alone
    with _lock, _single_precision(), isolate_rng():
        if module is None:
            module, precision = _from_config(run_dir, place, trust)
        folder = RunFolder(run_dir)
        files = folder.trained(tasks, at)
        patches = {one.task: one.load()[0] for one in (files[-1:] if on_demand else files)}
        restore(module, folder, patches[files[-1].task].image_size)
    predictor = Predictor(precision.convert_module(module.to(place)), precision)  # type: ignore[arg-type]
    for one in files:
        if one.task in patches:
            predictor._add(patches[one.task], one.load_signature)
        else:
            predictor._tasks[one.task] = one
    return predictor


class Predictor:
    """Classifies images by trained tasks; `recast_pl.load` makes it from a run.

    Any number of threads may predict, and add and remove tasks, at the same time.

    Args:
        module: The built module, with what its tasks share. Only the predictor may use it from now on.
        precision: The precision to compute in; None for that of the module's weights.

    Raises:
        RunError: If the module is not built.
    """

    def __init__(self, module: TILModule, precision: Precision | None = None) -> None:
        if module.backbone is None:
            raise RunError("TILModule has no backbone yet; call build(image_size) first")
        self._module, self._precision = module.eval(), precision or Precision()
        self._network = MixedBatch(module.backbone, module.pieces)
        self._tasks: dict[str, LoadedTask | TaskFiles] = {}  # of those that were not used yet, the files
        self._router: Router | None = None  # made when it is needed, and again after tasks have changed
        self._frozen: PackedState | None = None  # the states of the pieces that every task starts from

    def __reduce__(self) -> NoReturn:
        raise RunError("a Predictor cannot be copied or sent to another process; call recast_pl.load there")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were trained or added."""
        return list(self._tasks)

    def classes(self, task: str) -> list[str]:
        """Class names of a task, in order of label; raises RunError if there is no such task."""
        return list(self._find(task).classes)

    def image_size(self, task: str) -> ImageSize:
        """Height and width in pixels of a task's images; raises RunError if there is no such task."""
        return self._find(task).image_size

    def predict(
        self,
        images: Picture | Sequence[Picture],
        task: str | None = None,
        tasks: Sequence[str] | None = None,
        refuse: float = REFUSE,
    ) -> list[Prediction]:
        """Classifies images, preprocessed as in training, all by the same task, each by its own, or by one to be found.

        Args:
            images: One image or several: paths, bytes of image files, PIL images, arrays (H, W, 3) or tensors (3, H, W)
                of any size, also grey (H, W); or a batch (N, H, W, 3) or (N, 3, H, W). Values are uint8, or floating
                point in [0, 1], rounded to uint8.
            task: The task for all images.
            tasks: The task of each image. If this and `task` are None, the task of each image is found.
            refuse: If tasks are to be found, the share of images of the known tasks that may be refused, from 0 to 1:
                as many are refused as their validation images, and more of those that belong to no task.

        Returns:
            A prediction for each image, in order; `RoutedPrediction` if tasks were found.

        Raises:
            RunError: If there is no such task, or tasks are to be found and one has no signature.
            PatchError: If the probabilities of a task are not finite numbers, or a signature does not belong here.
            DataError: If an image cannot be read, both `task` and `tasks` are given, or `refuse` is out of range.
        """
        items = as_list(images)
        if task is None and tasks is None:
            return [*self._predict_any(items, refuse)]
        names = _task_of_each(len(items), task, tasks)
        sizes = {name: self.image_size(name) for name in dict.fromkeys(names)}
        found: dict[int, Prediction] = {}
        for chunk in _chunks(sorted(range(len(items)), key=names.__getitem__)):  # by task: fewer tasks in a batch
            pixels = [decode_any(items[i], sizes[names[i]]) for i in chunk]
            found |= zip(chunk, self.predict_tensors(pixels, [names[i] for i in chunk]), strict=True)
        return [found[i] for i in range(len(items))]

    def predict_tensors(self, images: Tensor | Sequence[Tensor], tasks: Sequence[str]) -> list[Prediction]:
        """Classifies images that are decoded already, each by its own task.

        Args:
            images: uint8 (N, 3, H, W), or N tensors (3, H, W), each of the image size of its task.
            tasks: The task of each image (N,).

        Returns:
            A prediction for each image, in order.

        Raises:
            RunError: If there is no such task.
            PatchError: If the probabilities of a task are not finite numbers.
            DataError: If an image does not have the type or shape above, or if the numbers of images and tasks differ.
        """
        if len(images) != len(tasks):
            raise DataError(f"{len(images)} images and {len(tasks)} tasks are given; name one task for each image")
        entries = {name: self._find(name) for name in dict.fromkeys(tasks)}
        for image, name in zip(images, tasks, strict=True):
            shape = (3, *height_and_width(entries[name].image_size))
            if image.dtype != torch.uint8 or image.shape != shape:
                raise DataError(f"an image is {image.dtype} {tuple(image.shape)}; task {name!r} needs uint8 {shape}")
        found: dict[int, Prediction] = {}
        by_task = sorted(range(len(tasks)), key=tasks.__getitem__)
        for size in {entry.image_size for entry in entries.values()}:
            for chunk in _chunks([i for i in by_task if entries[tasks[i]].image_size == size]):
                batch = torch.stack([images[i] for i in chunk])  # (B, 3, S, S)
                found |= zip(chunk, self._classify(batch, [(tasks[i], entries[tasks[i]]) for i in chunk]), strict=True)
        return [found[i] for i in range(len(tasks))]

    def route_tensors(self, images: Tensor | Sequence[Tensor], refuse: float = REFUSE) -> list[RoutedPrediction]:
        """Classifies images that are decoded already, each by a task that is found.

        Arguments, results and errors are those of `predict`, of images as for `predict_tensors`, all of `any_size`.
        """
        if not 0 <= refuse < 1:
            raise DataError(f"refuse={refuse} must be at least 0 and below 1: the share of known images to refuse")
        router, size = self.router, self.any_size
        for image in images:
            if image.dtype != torch.uint8 or image.shape != (3, *height_and_width(size)):
                raise DataError(f"an image is {image.dtype} {tuple(image.shape)}; uint8 of {size} pixels is needed")
        found: list[RoutedPrediction] = []
        for chunk in _chunks(range(len(images))):
            pixels = torch.stack([images[i] for i in chunk])
            candidates = find_candidates(router.tasks, router.route(self._frozen_features(pixels)), refuse)
            asked = [(image, task) for image, each in zip(pixels, candidates, strict=True) for task in each.asked]
            answers = iter(self.predict_tensors([image for image, _ in asked], [task for _, task in asked]))
            found += [each.answer(list(itertools.islice(answers, len(each.asked)))) for each in candidates]
        return found

    @property
    def router(self) -> Router:
        """Finds the tasks of images by the signatures of all tasks.

        Raises:
            RunError: If tasks share weights, the predictor has no tasks, or one has no signature.
            PatchError: If a signature is damaged or belongs to another base or image size.
        """
        if (router := self._router) is not None:  # without waiting for images that are being classified
            return router
        with _lock:
            if not self._module.isolated:
                raise RunError(
                    f"tasks of {self._module.method} share weights, so that there is no frozen network to find the "
                    "task of an image by; name the task"
                )
            if self._router is None:
                self._router = Router(map(self.signature, self._tasks))
            return self._router

    def signature(self, name: str) -> Signature:
        """Reads the signature of a task; raises RunError if it has none, and PatchError if it does not belong here."""
        task = self._entry(name)
        if isinstance(task, LoadedTask):
            return task.read_signature(name, self._module.base)
        signature = task.load_signature()
        signature.check(self._module.base, signature.image_size)
        if signature.task != name:  # otherwise the patch, whose classes are compared with its own, is read later
            signature.check_task(name, task.load()[0].classes)
        return signature

    @property
    def any_size(self) -> ImageSize:
        """Height and width in pixels of images whose task is to be found; errors are those of `router`."""
        return self.router.image_size

    def add_patch(
        self, patch: str | Path | TaskPatch, signature: str | Path | Signature | None = None, replace: bool = False
    ) -> str:
        """Adds a task that was trained elsewhere, on the same base by the same method.

        Args:
            patch: A file of `patches/`, or its content.
            signature: The file of the same name in `signatures/`, or its content; None if the tasks of images are
                never to be found.
            replace: Whether it takes the place of a task of its name.

        Returns:
            Name of the task.

        Raises:
            PatchError: If the patch is damaged or does not belong here, a task has its name, or the signature is
                damaged or that of another task; nothing changes.
        """
        patch = patch if isinstance(patch, TaskPatch) else TaskPatch.load(patch)
        if signature is not None:
            content = signature if isinstance(signature, Signature) else Signature.load(signature)
            content.check(patch.base, patch.image_size)
            content.check_task(patch.task, patch.classes)
        if not self._module.isolated:
            raise PatchError(
                f"tasks of {self._module.method} share weights, which the patch of {patch.task!r} does not hold; "
                "load the run that it was trained in"
            )
        self._add(patch, signature, replace)
        return patch.task

    def remove(self, task: str) -> None:
        """Removes a task, whose name can be used again; raises RunError if there is no such task."""
        with _lock:
            self._entry(task)
            del self._tasks[task]
            self._router = None

    def _predict_any(self, items: Sequence[Any], refuse: float) -> list[RoutedPrediction]:
        """Predictions for images whose tasks are to be found."""
        size, found = self.any_size, list[RoutedPrediction]()
        for chunk in _chunks(range(len(items))):
            found += self.route_tensors([decode_any(items[i], size) for i in chunk], refuse)
        return found

    @torch.no_grad()
    def _frozen_features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of uint8 images (B, 3, S, S) by the network that every task starts from."""
        with _lock, self._precision.forward_context():
            if self._frozen is None:
                with isolate_rng():
                    for piece in self._module.pieces:
                        piece.begin_task()
                self._frozen = self._network.pack([piece.task_state() for piece in self._module.pieces])
            images = tv.to_dtype(pixels.to(self._module.device), torch.float32, scale=True)
            return self._network.features(self._precision.convert_input(images), [self._frozen], [len(images)]).float()

    def _add(self, patch: TaskPatch, signature: SignatureSource, replace: bool = False) -> None:
        with _lock:
            if patch.task in self._tasks and not replace:
                raise PatchError(f"there is a task {patch.task!r} already; remove it first, or rename the new one")
            self._tasks[patch.task] = self._loaded(patch.widened(), signature)
            self._router = None

    def _loaded(self, patch: TaskPatch, signature: SignatureSource) -> LoadedTask:
        self._module.check_patch(patch)
        for piece, state in zip(self._module.pieces, patch.pieces, strict=True):
            piece.load_task_state(state)  # refuses a state that does not fit
        head = self._module.head_of(patch)
        weight, bias = (head[name].to(self._module.device) for name in ("weight", "bias"))
        packed = self._network.pack(patch.pieces)
        return LoadedTask(packed, patch.classes, weight, bias, patch.image_size, signature)

    def _entry(self, name: str) -> LoadedTask | TaskFiles:
        entry = self._tasks.get(name)
        if entry is None:
            raise RunError(f"no task is named {name!r}; the tasks are {', '.join(self.tasks)}")
        return entry

    def _find(self, name: str) -> LoadedTask:
        entry = self._entry(name)
        if isinstance(entry, LoadedTask):
            return entry
        patch = entry.load()[0].widened()
        with _lock:
            task = self._loaded(patch, entry.load_signature)
            if entry.signature.is_file():  # the router may have used it
                task.read_signature(name, self._module.base)
            if self._tasks.get(name) is entry:  # it was not removed or replaced meanwhile
                self._tasks[name] = task
        return task

    @torch.no_grad()
    def _classify(self, pixels: Tensor, tasks: Sequence[tuple[str, LoadedTask]]) -> list[Prediction]:
        """Predictions for uint8 images (B, 3, S, S) that are sorted by task."""
        groups = [(name, task, len(list(same))) for (name, task), same in itertools.groupby(tasks)]
        with _lock, self._precision.forward_context():
            for name, *_ in groups:  # one that was replaced meanwhile still answers
                if name not in self._tasks:
                    raise RunError(f"task {name!r} was removed before its images were classified; predict again")
            images = tv.to_dtype(pixels.to(self._module.device), torch.float32, scale=True)
            states, counts = [task.state for _, task, _ in groups], [count for *_, count in groups]
            features = self._network.features(self._precision.convert_input(images), states, counts)  # (B, D)
            parts = [
                F.linear(part, task.weight.to(part.dtype), task.bias.to(part.dtype)).softmax(1).float().cpu()
                for (_, task, _), part in zip(groups, features.split(counts), strict=True)
            ]
        for (name, _, _), part in zip(groups, parts, strict=True):
            if not part.isfinite().all():
                raise PatchError(f"task {name!r} gives probabilities that are not finite; train it again")
        return [
            Prediction.of(name, task.classes, row.tolist())
            for (name, task, _), part in zip(groups, parts, strict=True)
            for row in part  # (classes,)
        ]


@contextmanager
def _single_precision() -> Iterator[None]:
    """A context in which networks are made in single precision, as they were in training, whatever the default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _from_config(run_dir: str | Path, device: torch.device, trust: bool) -> tuple[TILModule, Precision]:
    """The module of a run, and the precision that its trainer would evaluate with on a device."""
    try:
        from recast_pl.config.run import open_run  # noqa: PLC0415
    except ModuleNotFoundError as cause:
        raise RunError(
            f"reading {run_dir}/config.yaml needs {cause.name}; install it (pip install 'jsonargparse[signatures]'), "
            "or call load with module=TILModule(...) of the run's backbone and method"
        ) from cause
    _, init = open_run(run_dir, device, trust, images=False)
    return init.model, TrainerFactory(init.trainer).for_evaluation().precision_plugin


def _task_of_each(count: int, task: str | None, tasks: Sequence[str] | None) -> list[str]:
    """The task of each of `count` images."""
    if task is not None and tasks is not None:
        raise DataError("predict takes either task=NAME for all images, or tasks=[NAME, ...] with one for each")
    names = [task] * count if task is not None else list(tasks or ())
    if len(names) != count or isinstance(tasks, str):
        raise DataError(f"tasks={tasks!r} names {len(names)} tasks for {count} images; name one for each image")
    return names


def _chunks(indices: Sequence[int]) -> list[Sequence[int]]:
    return [indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH)]
