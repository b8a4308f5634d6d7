"""Batches of a task: which images they hold, in which order, and how these are augmented."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from recast_pl.data.cache import Pixels
from recast_pl.data.tasks import TaskConfig, derive_seed
from recast_pl.errors import DataError, one_line
from recast_pl.rules import ImageSize, height_and_width, size_text

RawBatch = tuple[Tensor, ...]
"""Images uint8 (B, 3, H, W), labels (B,) with -1 for an image that does not count, and which images to mirror (B,).

If a task's transforms have changed the images, there is a fourth part: the images before the transforms.
"""

_NO_IMAGE = -1  # a position that stands for an image that does not count


class TaskSplit(Dataset[RawBatch]):
    """A split of a task, read a batch at a time.

    Args:
        pixels: All images of the task (N, 3, H, W), uint8; read only as `pixels[which]`.
        labels: Their class indices (N,).
        indices: Positions of the images of the split.
        tasks: How to augment each image of the split.
        seed: Seed of the augmentation; None for no augmentation.
    """

    def __init__(
        self, pixels: Pixels, labels: Tensor, indices: NDArray[np.int64], tasks: Sequence[TaskConfig], seed: int | None
    ) -> None:
        self.pixels, self.labels, self.indices, self.tasks, self.seed = pixels, labels, indices, tasks, seed
        self.flips = np.array([task.flip for task in tasks])
        self.transforms = seed is not None and any(task.transforms for task in tasks)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> RawBatch:
        """Reads a batch, given (epoch, position in the split) of each image, or its position alone.

        Lightning's sampler for `overfit_batches` gives positions alone; every epoch is then augmented like the first.
        """
        pairs = [(0, key) if isinstance(key, int) else key for key in keys]
        positions = [position for _, position in pairs]
        which = torch.from_numpy(self.indices[positions])
        images, labels = self.pixels[which], self.labels[which]
        if self.seed is None:
            labels[torch.tensor(positions) == _NO_IMAGE] = -1
            return images, labels, torch.zeros(len(keys), dtype=torch.bool)
        flips = torch.from_numpy((_coin_tosses(self.seed, pairs[0][0], len(self)) & self.flips)[positions])
        if not self.transforms:
            return images, labels, flips
        changed = []
        with torch.random.fork_rng(devices=[]):
            for image, (epoch, position) in zip(images, pairs, strict=True):
                torch.manual_seed(derive_seed(self.seed, epoch, position))
                changed.append(apply_transforms(image, self.tasks[position].transforms))
        return torch.stack(changed), labels, flips, images


def apply_transforms(image: Tensor, transforms: Sequence[Any]) -> Tensor:
    """Applies the transforms of a `TaskConfig`, in order, to a uint8 image (3, H, W)."""
    for transform in transforms:
        image = transform(image)
    return image


def check_transforms(task: TaskConfig, size: ImageSize) -> None:
    """Applies the transforms of a task to one image, so that those that do not fit are refused before training.

    Args:
        task: The task.
        size: Height and width of the image in pixels.

    Raises:
        DataError: If a transform fails, or returns something else than a uint8 image, or too large a one.
    """
    with torch.random.fork_rng(devices=[]):
        image: Any = torch.randint(256, (3, *height_and_width(size)), dtype=torch.uint8)
        for transform in task.transforms:
            try:
                image = transform(image)
            except Exception as cause:  # transforms raise errors of any type
                raise DataError(
                    f"task {task.name!r}: transform {type(transform).__name__} cannot be applied to a uint8 image "
                    f"of {size_text(size)} pixels ({one_line(cause)}); correct its arguments or leave it out"
                ) from cause
            if not (isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3):
                raise DataError(
                    f"task {task.name!r}: transform {type(transform).__name__} must return a uint8 image like the one "
                    "that it gets; leave it out, because images are converted and normalised after the transforms"
                )
        found, wanted = tuple(image.shape[1:]), height_and_width(size)
        if found[0] > wanted[0] or found[1] > wanted[1]:
            raise DataError(
                f"task {task.name!r}: the transforms return images of {size_text(found)} pixels; give them at most the "
                f"size of data.image_size, {size_text(size)}"
            )


@lru_cache(maxsize=2)
def _coin_tosses(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    return np.random.default_rng((seed, epoch)).random(count) < 0.5


class TaskSampler(DistributedSampler[Any]):
    """Yields (epoch, position), so that workers need no random state. It takes the arguments of its base class.

    Each process gets a share, so that batch i of all processes together holds the same images for any number of
    processes. All processes must make the same steps, so one whose share of the last batch is empty gets an image that
    does not count: in evaluation its label is -1; in training the step has no weight (see `share_of_step`). Lightning
    sets the epoch of a `DistributedSampler` and does not replace it.

    Args:
        batch_size: Images in a batch, on each process.
    """

    def __init__(self, *args: Any, batch_size: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        share, (order, padding) = self._share(), self._order()
        return ((self.epoch, position) for position in [*order[share.start :: share.step], *padding][: len(self)])

    def __len__(self) -> int:
        share = self._share()
        if not self.shuffle:
            return max(1, len(share))
        steps = -(-share.stop // (self.batch_size * share.step))
        return max(len(share), (steps - 1) * self.batch_size + 1)

    def _share(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]

    def _order(self) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of all images in order, and the image that does not count."""
        count = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return range(count), [_NO_IMAGE]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return order, order[:1]


def share_of_step(images: int, batch_size: int, processes: int, rank: int, step: int) -> float:
    """The weight of a process's mean loss in a training step, by which the mean over processes is that over images.

    Args:
        images: Images of the training split.
        batch_size: Images in a batch, on each process.
        processes: Number of processes.
        rank: This one, from 0.
        step: The step of the epoch, from 0.

    Returns:
        1, except in the last step: number of processes · own images / images of all. 0 for a process without images.
    """
    together = min(batch_size * processes, images - step * batch_size * processes)
    if together <= 0:  # Lightning's sampler for `overfit_batches` repeats images
        return 1.0
    return processes * len(range(rank, together, processes)) / together
