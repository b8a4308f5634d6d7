"""The stream of tasks as a LightningDataModule: decoded once, augmented on the device."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.cache import CacheMode, DecodedImages, Pixels, bad_images_message, decode_images
from recast_pl.data.datasets import ImageSource
from recast_pl.data.sources import dataset_name, open_source, prepare_source
from recast_pl.data.tasks import SPLITS, SplitPolicy, TaskConfig, check_names, derive_seed, split_digest, split_images
from recast_pl.errors import DataError

RawBatch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (B, 3, H, W), labels (B,), -1 for an image that is not to count, and which images to mirror (B,)."""

BadImagePolicy = Literal["error", "skip"]

_ROOT = "RECAST_PL_DATA"


class SequentialTaskDataModule(LightningDataModule):
    """Streams classification tasks; one is current at a time, the first until `select` is called.

    Batches reach the model as images (B, 3, S, S) in [0, 1] and labels (B,). What a training batch holds
    depends on (seed, task, epoch) alone: not on the workers, and not on where training was interrupted.

    Args:
        tasks: The tasks, in order (any sequence).
        image_size: S, height and width in pixels.
        batch_size: Images of a batch, on each process.
        num_workers: Processes that decode and transform; None for one for each core, but at most 8. Used where
            there is anything to decode or transform while training: reading decoded images is a mere copy, which
            sending them to another process would make slower.
        seed: Seed of splits, order and augmentation.
        root: Folder of data sets known by name, and of caches; None for $RECAST_PL_DATA, or else `data`.
        split: `official` keeps the splits of a source that has them; `ratio` divides all images 70-15-15.
        cache: Where images are kept when decoded: `disk`, a file mapped by all processes; `ram`, the memory of each
            process; `off`, nowhere.
        on_bad_image: What to do about images that cannot be read: `error` to stop before training, `skip` to
            train without them.
        order_seed: Seed of another order of the tasks, to see what the order does; None for the order given. It
            changes nothing else: a task has the same split and batches wherever it stands.

    Raises:
        DataError: If a size is below 1, or `order_seed` below 0.
    """

    def __init__(
        self,
        # a tuple, because the command line merges an overriding list into the one before, element by element
        tasks: tuple[TaskConfig, ...] = (),
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        seed: int = 42,
        root: str | None = None,
        split: SplitPolicy = "official",
        cache: CacheMode = "disk",
        on_bad_image: BadImagePolicy = "error",
        order_seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"data.{name}={value} must be at least 1")
        if order_seed is not None and order_seed < 0:
            raise DataError(f"data.order_seed={order_seed} must be at least 0, or null for the order given")
        order = range(len(tasks)) if order_seed is None else np.random.default_rng(order_seed).permutation(len(tasks))
        self.tasks = [tasks[index] for index in order]
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self.root = data_root(root)
        self.split, self.cache, self.on_bad_image = split, cache, on_bad_image
        self._streams: dict[str, _TaskImages] = {}
        self._current = 0
        self._train_on: TaskSplit | None = None
        self._prepared = False
        self._flipped = torch.zeros(0, dtype=torch.bool)

    def select(self, index: int) -> None:
        """Makes a task the current one.

        Args:
            index: Its position in the stream.
        """
        self._current, self._train_on = index, None

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Trains on other images until a task is selected; they are mirrored at random where their task asks for it.

        Args:
            images: uint8 (N, 3, H, W).
            labels: Position of the task, and class index within it (N, 2).
        """
        split = TaskSplit(images, labels, np.arange(len(images)), self._images.task, self._task_seed)
        split.flip, split.transforms = np.array([task.flip for task in self.tasks])[labels[:, 0]], ()
        self._train_on = split

    def unaugmented(self, images: Tensor) -> Tensor:
        """The images (B, 3, S, S) of the last batch as they were before they were mirrored at random."""
        return torch.where(self._flipped[:, None, None, None], images.flip(-1), images)

    def augmented(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Mirrors images at random where their task asks for it.

        Args:
            images: (B, 3, S, S).
            tasks: Positions of their tasks (B,).
        """
        flip = torch.tensor([task.flip for task in self.tasks])[tasks.cpu()] & (torch.rand(len(images)) < 0.5)
        return torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)

    def check(self) -> None:
        """Refuses a stream that cannot be learnt, before anything is downloaded.

        Raises:
            DataError: Naming the task.
        """
        check_names(self.tasks)
        for task in self.tasks:
            if task.path is not None and task.dataset is None:
                self._open(task)
            else:
                dataset_name(task)

    def prepare_data(self) -> None:
        """Downloads and decodes the images of all tasks, so that no task fails after hours.

        Processes that come second wait for the first, and find its work done.

        Raises:
            DataError: If images of a task cannot be had or, unless they are to be skipped, cannot be read.
        """
        if self._prepared:  # the trainer asks anew for each fit and test
            return
        self.check()
        for task in self.tasks:
            prepare_source(task, self.root)
        for task in self.tasks:
            _ = self._open(task).decoded
        self._prepared = True

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
        """Images of the current task by split."""
        return {split: len(indices) for split, indices in self._images.splits.items()}

    @property
    def split_digest(self) -> str:
        """Equal on two machines whose splits of the current task are equal, image by image."""
        return split_digest(self._images.splits)

    def setup(self, stage: str) -> None:
        """Finds the images of the current task."""
        check_names(self.tasks)
        _ = self._images.decoded

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Training images of the current task, shuffled anew in each epoch, augmented."""
        split = self._train_on or self._split("train", augment=True)
        return self._loader(TaskSampler(split, *self._rank(), shuffle=True, seed=self._task_seed))

    def val_dataloader(self) -> DataLoader[RawBatch]:
        """Validation images of the current task, each on one process."""
        return self._loader(TaskSampler(self._split("val"), *self._rank(), shuffle=False))

    def test_dataloader(self) -> DataLoader[RawBatch]:
        """Test images of the current task, each on one process."""
        return self._loader(TaskSampler(self._split("test"), *self._rank(), shuffle=False))

    def plain_dataloader(self, split: str) -> DataLoader[RawBatch]:
        """A split in order, whole on every process, without augmentation."""
        return self._loader(TaskSampler(self._split(split), 1, 0, shuffle=False))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """On the device: to [0, 1], mirrored where asked, resized up where the source is smaller."""
        images, labels, flip = batch
        self._flipped = flip
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)  # while they are small
        images = tv.to_dtype(images, torch.float32, scale=True)
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)  # (B, 3, S, S)
        return images, labels

    @property
    def _images(self) -> "_TaskImages":
        if not 0 <= self._current < len(self.tasks):
            raise DataError(f"task {self._current} was selected, the stream has {len(self.tasks)}")
        return self._open(self.tasks[self._current])

    @property
    def _task_seed(self) -> int:
        return derive_seed(self.seed, self._images.task.name)

    def _open(self, task: TaskConfig) -> "_TaskImages":
        if task.name not in self._streams:
            seed = derive_seed(self.seed, task.name)
            self._streams[task.name] = _TaskImages(task, open_source(task, self.root), self, seed)
        return self._streams[task.name]

    def _split(self, split: str, augment: bool = False) -> "TaskSplit":
        images = self._images
        labels = torch.from_numpy(images.source.labels)
        seed = self._task_seed if augment else None
        return TaskSplit(images.decoded.pixels, labels, images.splits[split], images.task, seed)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, sampler: "TaskSampler") -> DataLoader[RawBatch]:
        dataset = sampler.dataset
        assert isinstance(dataset, TaskSplit)
        workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        if self.cache != "off" and not dataset.transforms:
            workers = 0
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


class _TaskImages:
    """The images of a task: found, split, and decoded when first needed."""

    def __init__(self, task: TaskConfig, source: ImageSource, data: SequentialTaskDataModule, seed: int) -> None:
        self.task, self.source, self.data = task, source, data
        self.splits = split_images(source.labels, source.splits, seed, data.split)
        self._check_splits("give each class at least 3 images, or images for every split")

    @cached_property
    def decoded(self) -> DecodedImages:
        """All images; those that cannot be read leave the splits, or stop the run."""
        data, count = self.data, len(self.source.labels)
        decoded = decode_images(self.source, data.image_size, data.cache, data.root / "cache")
        if decoded.bad:
            message = bad_images_message(self.task.name, decoded.bad, count)
            if data.on_bad_image == "error":
                raise DataError(f"{message}; mend them, or go without them with --data.on_bad_image skip")
            rank_zero_warn(f"{message}; they are skipped")
            # after the split, so that one bad image does not move the others
            self.splits = {name: np.setdiff1d(split, list(decoded.bad)) for name, split in self.splits.items()}
            self._check_splits("mend the images that cannot be read")
        return decoded

    def _check_splits(self, remedy: str) -> None:
        empty = [name for name in SPLITS if not len(self.splits[name])]
        if empty:
            raise DataError(f"task {self.task.name!r} has no {empty[0]} image; {remedy}")


def data_root(root: str | None) -> Path:
    """Folder of data sets and caches.

    Args:
        root: As given by the user; None for $RECAST_PL_DATA, or else `data`.
    """
    return Path(root or os.environ.get(_ROOT) or "data").expanduser()


class TaskSplit(Dataset[RawBatch]):
    """A split of a task, read in whole batches.

    Args:
        pixels: All images of the task (N, 3, H, W), uint8; read only as `pixels[which]`.
        labels: Their class indices (N,).
        indices: Which of them the split has.
        task: How to augment.
        seed: Seed of the augmentation; None for none.
    """

    def __init__(
        self, pixels: Pixels, labels: Tensor, indices: NDArray[np.int64], task: TaskConfig, seed: int | None
    ) -> None:
        self.pixels, self.labels, self.indices, self.seed = pixels, labels, indices, seed
        self.flip: bool | NDArray[np.bool_] = task.flip
        """Whether to mirror images at random, for all or for each position."""
        self.transforms = tuple(task.transforms) if seed is not None else ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[tuple[int, int]]) -> RawBatch:
        """The batch of samples (epoch, position)."""
        positions = [position for _, position in keys]
        which = torch.from_numpy(self.indices[positions])
        pixels, labels = self.pixels[which], self.labels[which]
        if self.seed is None:
            labels[torch.tensor(positions) == _NOTHING] = -1
            return pixels, labels, torch.zeros(len(keys), dtype=torch.bool)
        flips = _coin_tosses(self.seed, keys[0][0], len(self)) & self.flip
        return self._transform(pixels, keys, self.seed), labels, torch.from_numpy(flips[positions])

    def _transform(self, pixels: Tensor, keys: Sequence[tuple[int, int]], seed: int) -> Tensor:
        if not self.transforms:
            return pixels
        results = []
        with torch.random.fork_rng(devices=[]):
            for image, (epoch, position) in zip(pixels, keys, strict=True):
                torch.manual_seed(derive_seed(seed, epoch, position))
                for transform in self.transforms:
                    image = transform(image)  # noqa: PLW2901
                results.append(image)
        return torch.stack(results)


@lru_cache(maxsize=2)
def _coin_tosses(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    return np.random.default_rng((seed, epoch)).random(count) < 0.5


_NOTHING = -1  # a position; of an image that does not count


class TaskSampler(DistributedSampler[Any]):
    """Yields (epoch, position), so that randomness needs no state in the workers.

    Training shares are padded to equal length, as DDP needs; evaluation shares are not, so that every image counts
    once, and a process without any gets an image that does not count, because all must evaluate. As a
    `DistributedSampler` it is told the epoch by Lightning, and left in place.

    Args:
        dataset: What to sample.
        replicas: Number of processes.
        rank: This process.
        shuffle: Whether for training.
        seed: Seed of the order.
    """

    def __init__(self, dataset: TaskSplit, replicas: int, rank: int, shuffle: bool, seed: int = 0) -> None:
        super().__init__(dataset, replicas, rank, shuffle=shuffle, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        positions = super().__iter__() if self.shuffle else iter(self._share())
        return ((self.epoch, position) for position in positions)

    def __len__(self) -> int:
        return super().__len__() if self.shuffle else len(self._share())

    def _share(self) -> Sequence[int]:
        return range(self.rank, len(self.dataset), self.num_replicas) or (_NOTHING,)  # type: ignore[arg-type]


def _as_is(batch: Any) -> Any:
    return batch
