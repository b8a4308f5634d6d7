"""The stream of tasks as a LightningDataModule."""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_convert
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.batches import RawBatch, TaskSampler, TaskSplit, apply_transforms, check_transforms, share_of_step
from recast_pl.data.cache import CacheMode
from recast_pl.data.changes import SplitImages, find_changes
from recast_pl.data.class_streams import drawn_tasks, whole_task
from recast_pl.data.imbalance import Imbalance
from recast_pl.data.label_noise import LabelNoise
from recast_pl.data.sources import dataset_name, is_present, open_source, prepare_source
from recast_pl.data.task_images import BadImagePolicy, ImageSettings, SubsetImages, TaskImages
from recast_pl.data.tasks import (
    SplitPolicy,
    TaskConfig,
    check_images,
    check_names,
    derive_seed,
    split_digest,
)
from recast_pl.errors import DataError
from recast_pl.rules import LARGEST_SIDE, ImageSize, height_and_width, read_size


def data_root(root: str | None) -> Path:
    """The folder of data sets and caches: the given one, or else $RECAST_PL_DATA, or else `data`."""
    return Path(root or os.environ.get("RECAST_PL_DATA") or "data").expanduser()


class SequentialTaskDataModule(LightningDataModule):
    """Streams classification tasks. One task is current at a time: the first until `select` is called.

    Batches reach the model as images (B, 3, S, S) in [0, 1] and labels (B,). The content of a training batch depends
    on (seed, task, epoch) alone: not on the workers, and not on where training was interrupted.

    Args:
        tasks: The tasks, in order (any sequence).
        image_size: Height and width in pixels: one number, or two such as `[128, 256]`.
        batch_size: Images in a batch, on each process.
        num_workers: Processes that decode and transform; None for one for each core, but at most 8. Used only where
            images are decoded or transformed while training: copying decoded images to another process takes longer
            than reading them.
        seed: Seed of splits, order and augmentation.
        root: Folder of data sets known by name, and of caches; None for $RECAST_PL_DATA, or `data` if it is not set.
        split: `official` keeps the splits of a source that has them; `ratio` divides all images 70-15-15.
        cache: Where decoded images are kept: `disk` in a file mapped by all processes, `ram` in the memory of each
            process, `off` nowhere.
        on_bad_image: What to do about images that cannot be read: `error` to stop before training, `skip` to
            train without them.
        order_seed: Seed of another order of the tasks, to see what the order changes; None for the order given. A
            task has the same split and batches at every position.
        max_pixels: Images of more pixels, by their headers, cannot be read; None for Pillow's limit, 178,956,970.
            Decoding takes up to 26 bytes for each pixel.
        transforms: The `transforms` of tasks that have none of their own (any sequence).
        imbalance: Leaves out images of some classes; None for all images.
        label_noise: Gives some images wrong labels; None for right ones.
        held_out: Pattern of names of images, such as `*_scan.*`, that are tested and never trained on, to see what
            another source of images changes. No others are tested then. A source's splits are kept: of the images that
            match, its test images count, of the others its training and validation images. Where it has none, all
            images that match are tested. Names are paths in a task's folder, or as its manifest lists them. None to
            hold out no images by name.

    Raises:
        DataError: If a size or limit is below 1, or `order_seed` below 0.
    """

    def __init__(
        self,
        # a tuple, because the command line merges an overriding list into the one before, element by element
        tasks: tuple[TaskConfig, ...] = (),
        image_size: ImageSize = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        seed: int = 42,
        root: str | None = None,
        split: SplitPolicy = "official",
        cache: CacheMode = "disk",
        on_bad_image: BadImagePolicy = "error",
        order_seed: int | None = None,
        max_pixels: int | None = None,
        transforms: tuple[nn.Module, ...] = (),
        imbalance: Imbalance | None = None,
        label_noise: LabelNoise | None = None,
        held_out: str | None = None,
    ) -> None:
        super().__init__()
        tasks = tuple(drawn for task in tasks for drawn in drawn_tasks(task))
        check_images(tasks)
        for name, value in (("batch_size", batch_size), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise DataError(f"data.{name}={value} must be at least 1")
        size = read_size(image_size)
        if size is None:
            raise DataError(
                f"data.image_size={image_size} must be 1 to {LARGEST_SIDE} pixels: one number, or height and width"
            )
        if order_seed is not None and order_seed < 0:
            raise DataError(f"data.order_seed={order_seed} must be at least 0, or null for the order given")
        order = range(len(tasks)) if order_seed is None else np.random.default_rng(order_seed).permutation(len(tasks))
        self.tasks = [replace(tasks[i], transforms=tasks[i].transforms or tuple(transforms)) for i in order]
        self.image_size, self.batch_size, self.num_workers, self.seed = size, batch_size, num_workers, seed
        self.root = data_root(root)
        self.split, self.cache, self.on_bad_image, self.max_pixels = split, cache, on_bad_image, max_pixels
        self.imbalance, self.label_noise = imbalance, label_noise
        self.held_out = held_out
        self._opened: dict[str, TaskImages] = {}
        self._wholes: list[TaskImages] = []  # whose classes are divided among tasks
        self._added: dict[str, list[TaskConfig]] = {}
        self.order = seed  # of batches and augmentation
        self._current = self._train_images = 0
        self._train_on: TaskSplit | None = None
        self._most: int | None = None  # training images
        self._prepared = False

    def select(self, index: int) -> None:
        """Makes the task at a position of the stream the current one."""
        self._current, self._train_on = index, None

    def add_images(self, task: str, paths: Sequence[str]) -> None:
        """Adds images to a task. Its old images keep their splits and labels; new classes come after the old ones.

        Args:
            task: Name of the task.
            paths: Folders or manifests, as `TaskConfig.path` names them, but one class is enough.

        Raises:
            DataError: If the task has a subset of classes.
        """
        if any(t.subset for t in self.tasks if t.name == task):
            raise DataError(
                f"task {task!r} has drawn classes of a source, so it takes no more images; add another task"
            )
        self._added[task] = [replace(t, path=p, dataset=None) for t in self.tasks if t.name == task for p in paths]
        self._opened.pop(task, None)
        self._prepared = False

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Replaces the training images until a task is selected.

        Args:
            images: uint8 (N, 3, H, W), plain; they are augmented as their own tasks ask.
            labels: Positions of their tasks, and class indices within these (N, 2); batches contain them unchanged.
        """
        tasks = [self.tasks[task] for task in labels[:, 0].tolist()]
        self._train_on = TaskSplit(images, labels, np.arange(len(images)), tasks, self._images.seed)

    def check(self, indices: Iterable[int] | None = None) -> None:
        """Checks the stream as far as possible without downloads; raises DataError if a task cannot be used.

        Args:
            indices: Positions of the tasks whose images are looked at; None for all.
        """
        check_names(self.tasks)
        for task in self._chosen(indices):
            check_transforms(task, self.image_size)
            if task.own_path is not None:
                self._open(task)
            else:
                dataset_name(task)

    def prepare_data(self) -> None:
        """Downloads and decodes the images of all tasks, so that no task fails after hours.

        If several processes do so, the others wait for the first and use its files.

        Raises:
            DataError: If images of a task are missing or, unless they are to be skipped, cannot be read.
        """
        if not self._prepared:  # the trainer calls this for each fit and test
            self.prepare()

    def prepare(self, indices: Iterable[int] | None = None) -> None:
        """Does the same as `prepare_data` for the tasks at some positions, the only ones that are used; None for all.

        Raises:
            DataError: If images of one of these tasks are missing or, unless they are to be skipped, cannot be read.
        """
        chosen = None if indices is None else list(indices)
        self.check(chosen)
        for task in self._chosen(chosen):
            prepare_source(task, self.root)
        for task in self._chosen(chosen):
            _ = self._open(task).decoded
        self._prepared = True

    def is_there(self, index: int) -> bool:
        """Whether the images of the task at a position are on this machine, without a download."""
        return all(is_present(part, self.root) for part in self._parts(self.tasks[index]))

    def _chosen(self, indices: Iterable[int] | None) -> list[TaskConfig]:
        return self.tasks if indices is None else [self.tasks[index] for index in indices]

    @property
    def task_name(self) -> str:
        """Name of the current task."""
        return self._images.task.name

    @property
    def classes(self) -> list[str]:
        """Class names of the current task, in order of label."""
        return list(self._images.source.classes)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of the current task by split, as far as they are used."""
        return {split: len(self._images.indices(split, self._most)) for split in self._images.splits}

    def training_images(self, names: Collection[str]) -> dict[str, int]:
        """Number of training images of some tasks, by name; raises DataError if too few are allowed of one."""
        tasks = [task for task in self.tasks if task.name in names]
        return {task.name: len(self._open(task).indices("train", self._most)) for task in tasks}

    def limit_training(self, count: int | None) -> None:
        """Uses this many training images of each task, about as many of each class; None for all.

        The splits stay, and the other images of the training split are not used at all.
        """
        self._most = count

    @property
    def split_digest(self) -> str:
        """Equal on two machines whose splits of the current task are equal, image by image."""
        return split_digest(self._images.splits)

    @property
    def image_record(self) -> dict[str, SplitImages]:
        """The images of the current task by split, for `find_changes` later."""
        return self._images.record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to say about the images of the current task."""
        return {"task": self.task_name, "images": self.image_record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises DataError if the images of the current task have changed since a checkpoint was written."""
        changes = find_changes(state_dict["images"], self.image_record)
        if state_dict["task"] == self.task_name and changes:
            raise DataError(
                f"the images of task {self.task_name!r} have changed since its training was interrupted: {changes}; "
                "restore them, or start another --run_dir"
            )

    def setup(self, stage: str) -> None:
        """Finds the images of the current task."""
        if not self._prepared:  # called for each fit and test
            check_names(self.tasks)
        _ = self._images.decoded

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Training images of the current task, augmented, in a new order for each epoch."""
        seed = derive_seed(self.order, self.task_name)
        loader = self._loader(self._train_on or self._split("train", seed), seed)
        self._train_images = len(loader.dataset)  # type: ignore[arg-type]
        return loader

    def share_of_step(self, step: int) -> float:
        """The weight of this process's mean loss in a step of the epoch, from 0; see `recast_pl.data.batches`."""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return 1.0
        return share_of_step(self._train_images, self.batch_size, trainer.world_size, trainer.global_rank, step)

    def val_dataloader(self) -> DataLoader[RawBatch]:
        """Validation images of the current task, each on one process."""
        return self._loader(self._split("val"))

    def test_dataloader(self) -> DataLoader[RawBatch]:
        """Test images of the current task, each on one process."""
        return self._loader(self._split("test"))

    def plain_dataloader(self, split: str, everywhere: bool = True) -> DataLoader[RawBatch]:
        """Images of a split in order, not augmented: all of them on every process, or the share of this process.

        Process r of R has images r, r + R, …; if there are none, one image whose label is -1.
        """
        return self._loader(self._split(split), everywhere=everywhere)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Mirrors images where the batch says so; returns them (B, 3, S, S) in [0, 1], on the device, and labels."""
        images, labels, flip, *plain = batch
        self._plain: Tensor = plain[0] if plain else images
        return self._convert(_mirror(images, flip)), labels

    @property
    def plain_images(self) -> Tensor:
        """Images of the latest batch (B, 3, S, S) in [0, 1] on the device, before augmentation."""
        return self._convert(self._plain)

    def augment(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Augments plain images as their tasks ask, with torch's global random generator.

        Args:
            images: uint8 (B, 3, H, W), on any device; the result is alike.
            tasks: Positions of their tasks in the stream (B,).
        """
        configs = [self.tasks[task] for task in tasks.tolist()]
        results = [apply_transforms(image, config.transforms) for image, config in zip(images, configs, strict=True)]
        flip = (torch.rand(len(images)) < 0.5) & torch.tensor([config.flip for config in configs])
        return _mirror(torch.stack(results), flip.to(images.device))

    @property
    def _images(self) -> TaskImages:
        if not 0 <= self._current < len(self.tasks):
            raise DataError(f"task {self._current} was selected, but the stream has {len(self.tasks)} tasks")
        return self._open(self.tasks[self._current])

    def _parts(self, task: TaskConfig) -> list[TaskConfig]:
        return [task, *self._added.get(task.name, ())]

    def _open(self, task: TaskConfig) -> TaskImages:
        if task.name not in self._opened:
            if task.subset is None:
                self._opened[task.name] = self._opened_whole(task)
            else:
                self._opened[task.name] = SubsetImages(task, task.subset, self._whole(whole_task(task)))
        return self._opened[task.name]

    def _whole(self, task: TaskConfig) -> TaskImages:
        found = next((images for images in self._wholes if images.task == task), None)
        if found is None:
            found = self._opened_whole(task)
            self._wholes.append(found)
        return found

    def _opened_whole(self, task: TaskConfig) -> TaskImages:
        sources = [open_source(part, self.root, least=1 + (part is task)) for part in self._parts(task)]
        for source in sources:
            source.images.max_pixels = self.max_pixels
        settings = ImageSettings(
            seed=self.seed,
            split=self.split,
            held_out=self.held_out,
            imbalance=self.imbalance,
            label_noise=self.label_noise,
            size=self.image_size,
            cache=self.cache,
            cache_folder=self.root / "cache",
            on_bad_image=self.on_bad_image,
        )
        return TaskImages(task, sources, settings)

    def _split(self, split: str, seed: int | None = None) -> TaskSplit:
        images = self._images
        labels = torch.from_numpy(images.source.labels)
        indices = images.indices(split, self._most)
        return TaskSplit(images.decoded.pixels, labels, indices, [images.task] * len(indices), seed)

    def _loader(self, split: TaskSplit, seed: int | None = None, everywhere: bool = False) -> DataLoader[RawBatch]:
        """Reads a split in order or, with a seed, in random order; each process reads its share, or everything."""
        processes = (self.trainer.world_size, self.trainer.global_rank) if self.trainer and not everywhere else (1, 0)
        workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        if self.cache != "off" and not split.transforms:
            workers = 0
        return DataLoader(
            split,
            self.batch_size,
            sampler=TaskSampler(split, *processes, seed is not None, seed or 0, batch_size=self.batch_size),
            num_workers=workers,
            collate_fn=default_convert,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def _convert(self, images: Tensor) -> Tensor:
        """Converts uint8 to [0, 1] and enlarges images that are stored smaller."""
        images, size = tv.to_dtype(images, torch.float32, scale=True), self.image_size
        if images.shape[-2:] == height_and_width(size):
            return images
        return F.interpolate(images, height_and_width(size), mode="bilinear", align_corners=False)  # (B, 3, H, W)


def _mirror(images: Tensor, which: Tensor) -> Tensor:
    return torch.where(which[:, None, None, None], images.flip(-1), images)
