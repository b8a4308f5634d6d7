"""Images that are not decoded yet, and how one image is decoded."""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.pixels import fit, to_rgb
from recast_pl.errors import DataError, one_line
from recast_pl.rules import ImageSize

_NOT_READ = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC")  # Pillow passes these on to other programs, or fails

_FREQUENT = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")  # tried first


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it reads by itself, frequent ones first."""
    Image.init()
    return _FREQUENT + tuple(sorted(set(Image.OPEN) - {*_NOT_READ, *_FREQUENT}))


@cache
def readable_suffixes() -> frozenset[str]:
    """The endings of files of these formats, in lower case."""
    formats = set(readable_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


class Images(Protocol):
    """Images in a fixed order, not decoded yet."""

    native: int | None
    """Height and width in pixels if all images have the same and are stored so; None otherwise."""

    max_pixels: int | None
    """Images of more pixels cannot be read; None for Pillow's own limit, 178,956,970."""

    def __len__(self) -> int: ...

    def decode(self, index: int, size: ImageSize) -> Tensor:
        """Decodes one image to uint8 (3, H, W) of a size; raises DataError, which names the image, if that fails."""
        ...

    def fingerprint(self) -> str:
        """A text that changes when an image changes."""
        ...

    def sizes(self) -> Sequence[int]:
        """Bytes of each image file (N,); zeros where images are not in files of their own."""
        ...


class ImageFiles:
    """Images in files, of any sizes."""

    native: int | None = None
    max_pixels: int | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    @cached_property
    def _states(self) -> list[os.stat_result]:
        return _file_states(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: int, size: ImageSize) -> Tensor:
        """Decodes one image to uint8 (3, H, W) of a size."""
        return decode_file(self.paths[index], size, self.max_pixels)

    def fingerprint(self) -> str:
        """Changes with the names, sizes and times of the files."""
        return _digest(self.paths, self._states)

    def sizes(self) -> Sequence[int]:
        """Bytes of each file (N,)."""
        return [state.st_size for state in self._states]


class ImageItems:
    """Images that a data set returns as PIL images.

    Args:
        name: Name of the data set, for messages.
        items: A sequence of (PIL image, anything).
        native: Height and width in pixels if all images have the same; None otherwise.
        fingerprint: Returns a text that changes when an image changes.
    """

    max_pixels: int | None = None

    def __init__(self, name: str, items: Any, native: int | None, fingerprint: Callable[[], str]) -> None:
        self.name, self.items, self.native, self.fingerprint = name, items, native, fingerprint

    def __len__(self) -> int:
        return len(self.items)

    def decode(self, index: int, size: ImageSize) -> Tensor:
        """Decodes one image to uint8 (3, H, W) of a size."""
        try:
            image = self.items[index][0]
            _check_pixels(image, self.max_pixels)
            return _to_pixels(image, size)
        except Exception as cause:
            text = f"cannot read image {index} of {self.name} ({one_line(cause)})"
            raise DataError(f"{text}; remove the data set and prepare it again") from cause

    def sizes(self) -> Sequence[int]:
        """Zeros (N,)."""
        return [0] * len(self)


class FileDataset(Dataset[tuple[Tensor, str]]):
    """Image files as (image (3, H, W) in [0, 1], path); `size` is their height and width in pixels."""

    def __init__(self, paths: Sequence[Path], size: ImageSize) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = decode_file(self.paths[index], self.size)
        return tv.to_dtype(image, torch.float32, scale=True), str(self.paths[index])


_SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information")
)


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor one that operating systems and storage devices add."""
    return not name.startswith(".") and name.casefold() not in _SYSTEM_NAMES


def is_image_file(path: Path) -> bool:
    """Whether a path has the ending of an image and is a file, or a link to a missing one, which is an error later."""
    return path.suffix.lower() in readable_suffixes() and (path.is_file() or not path.exists())


def files_below(folder: Path) -> list[Path]:
    """All visible files in a folder, at any depth, in an order that is the same on every machine.

    Links to folders are followed, except to a folder that they lie in.

    Raises:
        DataError: If a folder cannot be listed.
    """
    return sorted(_walk(folder, frozenset()), key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        state = folder.stat()
        entries = [entry for entry in os.scandir(folder) if is_visible(entry.name)]
    except OSError as cause:
        raise DataError(
            f"cannot list folder {str(folder)!r} ({cause.strerror}); allow reading it, or move it"
        ) from cause
    here = (state.st_dev, state.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(folder / entry.name, above | {here})
        else:
            yield folder / entry.name


def images_below(folder: Path) -> list[Path]:
    """The image files among `files_below`."""
    return [path for path in files_below(folder) if is_image_file(path)]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Lists the image files among paths, and those in the folders among them; raises DataError for an empty folder."""
    found: list[Path] = []
    for path in paths:
        inside = images_below(path) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} has no image in it; name image files, or a folder of them")
        found += inside
    return found


def stat_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the names, sizes and times of last change of files; raises DataError if files are missing."""
    return _digest(paths, _file_states(paths))


def _digest(paths: Sequence[Path], states: Sequence[os.stat_result]) -> str:
    digest = hashlib.sha256()
    for path, stat in zip(paths, states, strict=True):
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_ctime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _file_states(paths: Sequence[Path]) -> list[os.stat_result]:
    states, missing = [], []
    for path in paths:
        try:
            states.append(path.stat())
        except OSError:
            missing.append(path)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(paths):,} image files are missing, the first is {str(missing[0])!r}; "
            "restore them or correct the list that names them"
        )
    return states


def open_image(path: Path) -> Image.Image:
    """Opens one image, upright, as RGB on white; raises DataError if it cannot be read."""
    with _reading(path), _open(path) as image:
        return to_rgb(image)


def decode_file(path: Path, size: ImageSize, max_pixels: int | None = None) -> Tensor:
    """Decodes one image upright, as RGB on white, its centre cropped to the shape and resized.

    Args:
        path: The file.
        size: Height and width of the result in pixels, as one number if they are equal.
        max_pixels: The largest image to read, by its header; None for Pillow's own limit, 178,956,970.

    Returns:
        uint8 (3, H, W).

    Raises:
        DataError: If the file cannot be read as an image, or has more pixels.
    """
    with _reading(path), _open(path, max_pixels) as image:
        _check_pixels(image, max_pixels)
        return _to_pixels(image, size)


def decode_any(image: Any, size: ImageSize) -> Tensor:
    """Converts an image to uint8 (3, H, W) as `decode_file` does.

    Args:
        image: A path, the bytes of an image file, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or
            (H, W). Arrays and tensors are uint8 or floating point in [0, 1]; those without channels are grey.
        size: Height and width of the result in pixels, as one number if they are equal.

    Raises:
        DataError: If it has another type, shape or range, or cannot be read.
    """
    if isinstance(image, str | Path):
        return decode_file(Path(image), size)
    if isinstance(image, bytes | bytearray | memoryview):
        with _reading(f"{len(image):,} bytes"), _open(io.BytesIO(image)) as opened:
            return _to_pixels(opened, size)
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
        image = _from_array(_channels_last(values.numpy(), 0, "a tensor (3, H, W) or, if grey, (H, W)"))
    elif isinstance(image, np.ndarray):
        image = _from_array(_channels_last(image, 2, "an array (H, W, 3) or, if grey, (H, W)"))
    elif not isinstance(image, Image.Image):
        raise DataError(
            f"an image cannot be a {type(image).__name__}; give a path, the bytes of an image file, a PIL image, an "
            "array (H, W, 3) or a tensor (3, H, W)"
        )
    with _reading(image):
        return _to_pixels(image, size)


def _channels_last(values: NDArray[Any], axis: int, wanted: str) -> NDArray[Any]:
    """An image with its channels, 3 or for grey ones 1 or none, on an axis, as (H, W, 3) or (H, W)."""
    if 0 not in values.shape:
        if values.ndim == 2:
            return values
        if values.ndim == 3 and values.shape[axis] in (1, 3):
            values = np.moveaxis(values, axis, 2)
            return values[..., 0] if values.shape[2] == 1 else values
    raise DataError(f"an image of shape {values.shape} was given where {wanted} is needed; convert it")


def _from_array(values: NDArray[Any]) -> Image.Image:
    """An array (H, W, 3) or (H, W) as an image; numbers in [0, 1] are rounded to 256 levels."""
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):  # also true of NaN
            raise DataError(f"an image has values from {values.min():g} to {values.max():g}; bring them into [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise DataError(f"an image of {values.dtype} was given where uint8, or floating point in [0, 1], is needed")
    return Image.fromarray(np.ascontiguousarray(values))


@contextmanager
def _reading(image: object) -> Iterator[None]:
    """Converts any error into a DataError that names the image and the cause."""
    try:
        yield
    except Exception as cause:  # decoders raise many types of errors on damaged files
        raise DataError(f"cannot read image {str(image)!r} ({one_line(cause)}); repair or remove it") from cause


_opening = threading.Lock()


def _open(path: Path | io.BytesIO, max_pixels: int | None = None) -> Image.Image:
    """Reads the header of an image file, in a format that Pillow reads by itself."""
    if max_pixels is None:
        return Image.open(path, formats=readable_formats())
    with _opening:  # Pillow's own limit, which may be lower, is a global variable
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=readable_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(image: Image.Image, max_pixels: int | None) -> None:
    """Raises ValueError if an image has more pixels than allowed; None allows any."""
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}×{image.height} pixels are more than data.max_pixels={max_pixels:,}")


def _to_pixels(image: Image.Image, size: ImageSize) -> Tensor:
    return torch.from_numpy(np.array(fit(image, size))).permute(2, 0, 1)  # (3, H, W)
