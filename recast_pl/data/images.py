"""Images before they are pixels: files and items of a data set, decoded one by one."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from recast_pl.errors import DataError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)


class Images(Protocol):
    """Images in a fixed order, none of them decoded yet."""

    def __len__(self) -> int:
        """Their number."""
        ...

    def side(self, size: int) -> int:
        """Height and width in pixels with which an image is best stored to be shown at `size`."""
        ...

    def decode(self, index: int, side: int) -> Tensor:
        """One image as uint8 (3, side, side).

        Raises:
            DataError: Naming the image, if it cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when an image does."""
        ...


class ImageFiles:
    """Images in files, of any sizes.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def side(self, size: int) -> int:
        """The size asked for."""
        return size

    def decode(self, index: int, side: int) -> Tensor:
        """One image as uint8 (3, side, side)."""
        return decode_file(self.paths[index], side)

    def fingerprint(self) -> str:
        """SHA-256 over names, lengths and times of last change (of content or of rights).

        Raises:
            DataError: If files are missing.
        """
        return stat_digest(self.paths)


class ImageItems:
    """Images that a data set hands out as PIL images.

    Args:
        name: Of the data set, for messages.
        items: What yields (PIL image, anything).
        native: Height and width in pixels of all of them; None if they differ.
        fingerprint: Of their source.
    """

    def __init__(self, name: str, items: Any, native: int | None, fingerprint: Callable[[], str]) -> None:
        self.name, self.items, self.native, self._fingerprint = name, items, native, fingerprint

    def __len__(self) -> int:
        return len(self.items)

    def side(self, size: int) -> int:
        """The native size where it is smaller: a GPU resizes faster than a disk delivers."""
        return size if self.native is None else min(size, self.native)

    def decode(self, index: int, side: int) -> Tensor:
        """One image as uint8 (3, side, side)."""
        try:
            return _pixels(self.items[index][0], side)
        except Exception as cause:
            raise DataError(f"cannot read image {index} of {self.name} ({_reason(cause)}); prepare it anew") from cause

    def fingerprint(self) -> str:
        """As given."""
        return self._fingerprint()


class FileDataset(Dataset[tuple[Tensor, str]]):
    """Image files as (image (3, size, size) in [0, 1], path).

    Args:
        paths: The files.
        size: Height and width in pixels.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = decode_file(self.paths[index], self.size)
        return tv.to_dtype(image, torch.float32, scale=True), str(self.paths[index])


def images_below(folder: Path) -> list[Path]:
    """Image files of a folder, at any depth and not hidden, in an order that does not depend on the machine."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    shown = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(shown, key=Path.as_posix)]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files, those given and those in folders given, at any depth, in order of name.

    Args:
        paths: Files and folders.

    Raises:
        DataError: Naming a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        inside = images_below(path) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} has no image in it; name image files, or a folder of them")
        found += inside
    return found


def open_image(path: Path) -> Image.Image:
    """One image, upright, RGB on white.

    Raises:
        DataError: If the file is no image that can be read.
    """
    with _reading(path), Image.open(path) as image:
        return _upright(image)


def decode_file(path: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size): upright, RGB on white, its shorter side resized, its centre cropped.

    Raises:
        DataError: If the file is no image that can be read.
    """
    with _reading(path), Image.open(path) as image:
        return _pixels(image, size)


def decode_any(image: Any, size: int) -> Tensor:
    """One image, however it is given, as uint8 (3, size, size), made as `decode_file` makes it.

    Args:
        image: A path, a PIL image, an array (H, W, 3) or a tensor (3, H, W), uint8 or floating point in [0, 1].
        size: Height and width in pixels.

    Raises:
        DataError: If it is none of these, or cannot be read.
    """
    if isinstance(image, str | Path):
        return decode_file(Path(image), size)
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        numbers = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
        image = _from_array((numbers.movedim(0, -1) if image.ndim == 3 else numbers).numpy(), "a tensor (3, H, W)")
    elif isinstance(image, np.ndarray):
        image = _from_array(image, "an array (H, W, 3)")
    elif not isinstance(image, Image.Image):
        raise DataError(
            f"an image cannot be a {type(image).__name__}; give a path, a PIL image, an array (H, W, 3) or a tensor "
            "(3, H, W)"
        )
    with _reading(image):
        return _pixels(image, size)


def _from_array(values: NDArray[Any], wanted: str) -> Image.Image:
    """Numbers (H, W, 3) as an image, those in [0, 1] rounded to 256 levels."""
    if values.ndim != 3 or values.shape[-1] != 3 or not values.size:
        shape = values.shape if values.ndim != 3 or wanted.startswith("an") else np.moveaxis(values, -1, 0).shape
        raise DataError(f"an image of shape {tuple(shape)} was given where {wanted} is needed")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):  # which NaN does not satisfy either
            raise DataError(f"an image has values from {values.min():g} to {values.max():g}; bring them into [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise DataError(f"an image of {values.dtype} was given where uint8, or floating point in [0, 1], is needed")
    return Image.fromarray(np.ascontiguousarray(values))


@contextmanager
def _reading(image: object) -> Iterator[None]:
    try:
        yield
    except Exception as cause:  # on damaged files decoders raise nearly anything
        raise DataError(f"cannot read image {str(image)!r} ({_reason(cause)}); repair or remove it") from cause


def stat_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over names, lengths and times of last change of files.

    Raises:
        DataError: If files are missing.
    """
    digest = hashlib.sha256()
    missing = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            missing.append(path)
            continue
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_ctime_ns}\n".encode(errors="surrogateescape"))
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(paths):,} image files are missing, the first is {str(missing[0])!r}; "
            "restore them or correct the list that names them"
        )
    return digest.hexdigest()


def _pixels(image: Image.Image, size: int) -> Tensor:
    upright = _upright(image)
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)  # (3, size, size)


def _upright(image: Image.Image) -> Image.Image:
    return _rgb(_eight_bits(ImageOps.exif_transpose(image)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit image scaled to 8 bits, where Pillow's own conversion would clip it; others as they are."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.array(image, dtype=np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    values += 128  # and a floor: values / 257 rounded, which is never halfway, in place, as images may be large
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as a page would show it, rather than whatever colour it hides."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    return text or type(cause).__name__
