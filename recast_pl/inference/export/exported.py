"""What all formats of an export share: what the metadata says, the images to try, and how errors read."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast_pl.errors import ExportError
from recast_pl.learning.patch import TaskPatch
from recast_pl.rules import height_and_width

FORMAT = 3
"""Of the metadata."""

_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that rounding may cause."""


@dataclass(frozen=True)
class Exported:
    """A file to be written.

    Args:
        content: Its bytes.
        difference: Largest difference between its logits and those of the run's own network, on two images of noise.
        usage: How to use it, in one line.
    """

    content: bytes
    difference: float
    usage: str


def preprocessing(patch: TaskPatch, normalisation: str = "none: it is inside the graph") -> dict[str, Any]:
    """All that `decode_file` and the caller do to an image before the model."""
    height, width = height_and_width(patch.image_size)
    shape = "square" if height == width else f"part of which height : width is {height} : {width}"
    return {
        "file": "upright, as its EXIF orientation says; transparent parts on white; 16-bit grey scaled to 8 bits",
        "colour": "RGB",
        "crop": f"the largest centred {shape}",
        "resize": {"height": height, "width": width},
        "interpolation": "bicubic, antialiased, rounded to 8 bits",
        "range": [0, 1],
        "normalisation": normalisation,
        "layout": ["batch", "channel", "height", "width"],
    }


def facts(patch: TaskPatch, **changed: Any) -> dict[str, Any]:
    """What the metadata says: the task, and the preprocessing of its images.

    Args:
        patch: The task.
        changed: Facts in place of others.
    """
    names = ("task", "classes", "image_size", "method", "base")
    values = {name: getattr(patch, name) for name in names}
    return {"format": FORMAT, "kind": "model", **values, "preprocessing": preprocessing(patch)} | changed


def noise(patch: TaskPatch) -> Tensor:
    """Two images (2, 3, S, S), because tracing would take a batch of one as a constant."""
    return torch.rand(2, 3, *height_and_width(patch.image_size), generator=torch.Generator().manual_seed(0))


def check_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits; raises ExportError if rounding cannot explain it."""
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(f"its logits differ by {difference:.2g} from those of the run; choose another format")
    return difference


@contextmanager
def tracing() -> Iterator[None]:
    """A context in which any error of tracing is an ExportError, and warnings about folded constants are hidden."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except Exception as cause:  # tracing calls any code, which may raise anything
        text = " ".join(str(cause).split())[:300]
        raise ExportError(f"the network cannot be traced ({text}); choose --format safetensors") from cause
