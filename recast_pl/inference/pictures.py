"""What callers may give as images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Picture = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor
"""A path, the bytes of an image file, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W).

Arrays and tensors are uint8, or floating point in [0, 1]; those without channels are grey.
"""


def as_list(images: Any) -> list[Any]:
    """The images of a sequence or batch, or the one image."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    single = str | bytes | bytearray | memoryview
    return list(images) if isinstance(images, Sequence) and not isinstance(images, single) else [images]
