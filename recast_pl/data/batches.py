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

    def __getitems__(self, keys: list[tuple[int, int]]) -> RawBatch:
        """Reads a batch, given (epoch, position in the split) of each image."""
        positions = [position for _, position in keys]
        which = torch.from_numpy(self.indices[positions])
        images, labels = self.pixels[which], self.labels[which]
        if self.seed is None:
            labels[torch.tensor(positions) == _NO_IMAGE] = -1
            return images, labels, torch.zeros(len(keys), dtype=torch.bool)
        flips = torch.from_numpy((_coin_tosses(self.seed, keys[0][0], len(self)) & self.flips)[positions])
        if not self.transforms:
            return images, labels, flips
        changed = []
        with torch.random.fork_rng(devices=[]):
            for image, (epoch, position) in zip(images, keys, strict=True):
                torch.manual_seed(derive_seed(self.seed, epoch, position))
                changed.append(apply_transforms(image, self.tasks[position].transforms))
        return torch.stack(changed), labels, flips, images


def apply_transforms(image: Tensor, transforms: Sequence[Any]) -> Tensor:
    """Applies the transforms of a `TaskConfig`, in order, to a uint8 image (3, H, W)."""
    for transform in transforms:
        image = transform(image)
    return image


@lru_cache(maxsize=2)
def _coin_tosses(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    return np.random.default_rng((seed, epoch)).random(count) < 0.5


class TaskSampler(DistributedSampler[Any]):
    """Yields (epoch, position), so that workers need no random state. It takes the arguments of its base class.

    Each process gets a share. Shares of training (`shuffle`) are padded to equal length, as DDP needs. Shares of
    evaluation are not, so that every image counts once; all processes must evaluate, so one without images gets an
    image that does not count. Lightning sets the epoch of a `DistributedSampler` and does not replace it.
    """

    def __iter__(self) -> Iterator[Any]:
        positions = super().__iter__() if self.shuffle else iter(self._share())
        return ((self.epoch, position) for position in positions)

    def __len__(self) -> int:
        return super().__len__() if self.shuffle else len(self._share())

    def _share(self) -> Sequence[int]:
        return range(self.rank, len(self.dataset), self.num_replicas) or (_NO_IMAGE,)  # type: ignore[arg-type]
