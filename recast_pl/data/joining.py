"""A task whose images come from several places: the ones that it began with, and those that were added later."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from torch import Tensor

from recast_pl.data.datasets import ImageSource
from recast_pl.data.images import Images
from recast_pl.data.tasks import SPLITS, Splits
from recast_pl.rules import ImageSize


class JoinedImages:
    """The images of several parts, one part after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts, self.max_pixels = parts, parts[0].max_pixels
        sizes = {part.native for part in parts}
        self.native = sizes.pop() if len(sizes) == 1 else None
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def decode(self, index: int, size: ImageSize) -> Tensor:
        """Decodes one image to uint8 (3, H, W) of a size."""
        part = bisect_right(self._starts, index) - 1
        return self.parts[part].decode(index - self._starts[part], size)

    def fingerprint(self) -> str:
        """Changes when an image of a part changes."""
        return sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def sizes(self) -> Sequence[int]:
        """Bytes of each image file (N,); zeros where images are not in files of their own."""
        return [size for part in self.parts for size in part.sizes()]


def join_sources(sources: Sequence[ImageSource]) -> ImageSource:
    """All images of some sources as one; a class keeps the label of the first source that has it, new ones follow."""
    first, *others = sources
    if not others:
        return first
    classes = list(dict.fromkeys(name for source in sources for name in source.classes))
    labels = [np.array([classes.index(name) for name in source.classes])[source.labels] for source in sources]
    return ImageSource(
        classes,
        np.concatenate(labels),
        [split for source in sources for split in source.splits],
        JoinedImages([source.images for source in sources]),
        " + ".join(source.location for source in sources),
        [name for source in sources for name in source.names],
        [note for source in sources for note in source.notes],
    )


def join_splits(parts: Sequence[Splits], sizes: Sequence[int]) -> Splits:
    """The splits of joined sources, from those of each and its number of images; no image changes its split."""
    starts = list(itertools.accumulate(sizes, initial=0))
    return {
        name: np.concatenate([part[name] + start for part, start in zip(parts, starts[:-1], strict=True)])
        for name in SPLITS
    }
