"""Worse images: the 15 common corruptions at five severities, lower resolution, and stronger JPEG compression.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019
(arXiv:1903.12261), as the package imagecorruptions-imaug computes them for images of any size.

Deviations: the paper corrupts ImageNet at 224×224 and stores the result as JPEG of quality 85. Here the images are
corrupted as the network sees them, at the size of its input, and are not compressed again. Lengths in pixels, such as
the radius of a blur, are those of the paper, so they are larger parts of smaller images.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.tasks import derive_seed
from recast_pl.errors import DataError
from recast_pl.optional_imports import extra
from recast_pl.rules import ImageSize, height_and_width, size_text

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The corruptions of ImageNet-C: noise, blur, weather, and of digital processing."""

SEVERITIES = (1, 2, 3, 4, 5)

RESOLUTION, JPEG = "resolution", "jpeg"
"""Kinds of conditions beside the corruptions: the share of the pixels on a side that is left, and the quality."""

RESOLUTIONS, QUALITIES = (0.5, 0.25, 0.125), (75, 50, 25, 10)

_OWN_GENERATOR = ("impulse_noise", "glass_blur")  # they take a seed; the others draw from NumPy's global generator

_SMALLEST = 32  # pixels on a side that the package takes


class Condition(NamedTuple):
    """What happens to images: the kind, such as `fog`, and how strong it is; 0 for images as they are."""

    kind: str
    level: float = 0


Degradation = Callable[[Tensor, int], Tensor]
"""Changes an image uint8 (3, H, W); the same image and seed give the same result."""


def degradations() -> dict[Condition, Degradation]:
    """All conditions that change images without a network.

    Raises:
        RunError: If the package of corruptions is not installed.
    """
    package = extra("imagecorruptions", "robustness")
    found: dict[Condition, Degradation] = {
        Condition(name, severity): partial(_corrupt, package, name, severity)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }
    found |= {Condition(RESOLUTION, share): partial(_lower_resolution, share) for share in RESOLUTIONS}
    return found | {Condition(JPEG, quality): partial(_compress, quality) for quality in QUALITIES}


class Corruption(nn.Module):
    """Degrades training images in the same way as `robustness` degrades test images: one of a task's `transforms`.

    Args:
        kind: One of `CORRUPTIONS`, `resolution` or `jpeg`.
        level: How strong it is: the severity of a corruption, from 1 to 5; the share of the pixels on a side that is
            left, for `resolution`; or the quality, for `jpeg`. Only levels that `robustness` measures.

    Raises:
        DataError: If there is no such kind, or not with this level.
        RunError: If the package of corruptions is not installed.
    """

    def __init__(self, kind: str, level: float = 3) -> None:
        super().__init__()
        known = degradations()
        levels = [f"{condition.level:g}" for condition in known if condition.kind == kind]
        if not levels:
            raise DataError(f"there is no corruption {kind!r}; choose {', '.join((*CORRUPTIONS, RESOLUTION, JPEG))}")
        if (condition := Condition(kind, level)) not in known:
            raise DataError(f"corruption {kind} has no level {level:g}; choose one of {', '.join(levels)}")
        self.condition = condition

    def forward(self, image: Tensor) -> Tensor:
        """Degrades an image uint8 (3, H, W), with a seed from torch's generator."""
        return degradations()[self.condition](image, int(torch.randint(2**31, ())))


def check_size(size: ImageSize) -> None:
    """Raises DataError if images of a size in pixels are too small for the corruptions."""
    if min(height_and_width(size)) < _SMALLEST:
        raise DataError(
            f"the corruptions need images of at least {_SMALLEST} pixels on a side, and the run has "
            f"{size_text(size)}; train it with a larger --data.image_size"
        )


def degrade(images: Tensor, condition: Condition, change: Degradation, task: str, positions: list[int]) -> Tensor:
    """Changes images, each with random numbers of its own: the result depends neither on batches nor on other images.

    Args:
        images: (B, 3, H, W) in [0, 1]; they are rounded to 256 levels.
        condition: The condition.
        change: What it does.
        task: Name of the task of the images.
        positions: Positions of the images in the task's data (B).

    Returns:
        The changed images, of the same shape, type and device.
    """
    pixels = (images * 255).round().to(torch.uint8).cpu()
    changed = [
        change(image, derive_seed(task, condition.kind, f"{condition.level:g}", position))
        for image, position in zip(pixels, positions, strict=True)
    ]
    return torch.stack(changed).to(images.device).to(images.dtype) / 255


def _corrupt(package: Any, name: str, severity: int, image: Tensor, seed: int) -> Tensor:
    own = {"seed": seed} if name in _OWN_GENERATOR else {}
    with _numpy_seed(seed):
        changed = package.corrupt(image.permute(1, 2, 0).numpy(), severity, name, **own)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """A context in which NumPy's global generator starts from a seed; afterwards it goes on as before."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _lower_resolution(share: float, image: Tensor, seed: int) -> Tensor:
    """Shrinks an image to a share of its height and width, and enlarges it again."""
    size = list(image.shape[1:])
    small = tv.resize(image, [max(1, round(share * side)) for side in size], antialias=True)
    return tv.resize(small, size)


def _compress(quality: int, image: Tensor, seed: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
