"""The stream of tasks as a LightningDataModule: decoded once, augmented on the device."""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.datasets import ImageSource, open_source
from recast_pl.data.tasks import SPLITS, TaskConfig, check_names, derive_seed, split_images
from recast_pl.errors import DataError

RawBatch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (B, 3, H, W), labels (B,), and which images to mirror (B,)."""


class SequentialTaskDataModule(LightningDataModule):
    """Streams classification tasks; one is current at a time, the first until `select` is called.

    Batches reach the model as images (B, 3, S, S) in [0, 1] and labels (B,). What a training batch holds
    depends on (seed, task, epoch) alone: not on the workers, and not on where training was interrupted.

    Args:
        tasks: The tasks, in order (any sequence).
        image_size: S, height and width in pixels.
        batch_size: Images of a batch, on each process.
        num_workers: Processes that load; 0 is best as long as no task has `transforms`, as images are in memory.
        seed: Seed of splits, order and augmentation.

    Raises:
        DataError: If names of tasks are missing or not distinct.
    """

    def __init__(
        self,
        # a tuple, because the command line merges an overriding list into the one before, element by element
        tasks: tuple[TaskConfig, ...] = (),
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"data.{name}={value} must be at least 1")
        self.tasks = list(tasks)
        self.image_size, self.batch_size, self.num_workers, self.seed = image_size, batch_size, num_workers, seed
        self._streams: dict[str, _TaskImages] = {}
        self._current = 0

    def select(self, index: int) -> None:
        """Makes a task the current one.

        Args:
            index: Its position in the stream.
        """
        self._current = index

    def check(self) -> None:
        """Finds the images of all tasks without decoding them, so that no task fails after hours.

        Raises:
            DataError: If a task cannot be found.
        """
        check_names(self.tasks)
        for task in self.tasks:
            self._open(task)

    @property
    def task_name(self) -> str:
        """Name of the current task."""
        return self._images.task.name

    @property
    def classes(self) -> list[str]:
        """Class names of the current task, in order of label."""
        return self._images.source.classes

    @property
    def sizes(self) -> dict[str, int]:
        """Images of the current task by split."""
        return {split: len(indices) for split, indices in self._images.splits.items()}

    def setup(self, stage: str) -> None:
        """Finds the images of all tasks and decodes those of the current one."""
        self.check()
        _ = self._images.pixels

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Training images of the current task, shuffled anew in each epoch, augmented."""
        sampler = TaskSampler(self._split("train", augment=True), *self._rank(), shuffle=True, seed=self._task_seed)
        return self._loader(sampler)

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
        images = tv.to_dtype(images, torch.float32, scale=True)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
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
            self._streams[task.name] = _TaskImages(task, open_source(task), self.image_size, seed)
        return self._streams[task.name]

    def _split(self, split: str, augment: bool = False) -> "TaskSplit":
        images = self._images
        labels = torch.from_numpy(images.source.labels)
        seed = self._task_seed if augment else None
        return TaskSplit(images.pixels, labels, images.splits[split], images.task, seed)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, sampler: "TaskSampler") -> DataLoader[RawBatch]:
        return DataLoader(
            sampler.dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


class _TaskImages:
    """The images of a task: found, split, and decoded once when first needed."""

    def __init__(self, task: TaskConfig, source: ImageSource, size: int, seed: int) -> None:
        self.task, self.source, self.size = task, source, size
        self.splits = split_images(source.labels, source.splits, seed)
        empty = [name for name in SPLITS if not len(self.splits[name])]
        if empty:
            raise DataError(
                f"task {task.name!r} has no {empty[0]} image; give each class at least 3 images, "
                "or images for every split"
            )

    @cached_property
    def pixels(self) -> Tensor:
        """All images (N, 3, H, W), uint8."""
        return self.source.decode(np.arange(len(self.source.labels)), self.size)


class TaskSplit(Dataset[RawBatch]):
    """A split of a task, read in whole batches.

    Args:
        pixels: All images of the task (N, 3, H, W), uint8.
        labels: Their class indices (N,).
        indices: Which of them the split has.
        task: How to augment.
        seed: Seed of the augmentation; None for none.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, indices: NDArray[np.int64], task: TaskConfig, seed: int | None
    ) -> None:
        self.pixels, self.labels, self.indices, self.seed = pixels, labels, indices, seed
        self.flip, self.transforms = task.flip, tuple(task.transforms)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[tuple[int, int]]) -> RawBatch:
        """The batch of samples (epoch, position)."""
        positions = [position for _, position in keys]
        which = torch.from_numpy(self.indices[positions])
        pixels, labels = self.pixels[which], self.labels[which]
        if self.seed is None:
            return pixels, labels, torch.zeros(len(keys), dtype=torch.bool)
        flips = _coin_tosses(self.seed, keys[0][0], len(self))[positions] & self.flip
        return self._transform(pixels, keys, self.seed), labels, torch.from_numpy(flips)

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


class TaskSampler(DistributedSampler[Any]):
    """Yields (epoch, position), so that randomness needs no state in the workers.

    Training shares are padded to equal length, as DDP needs; evaluation shares are not, so that every image
    counts once. As a `DistributedSampler` it is told the epoch by Lightning, and left in place.

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

    def _share(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]


def _as_is(batch: Any) -> Any:
    return batch
