"""Sources of labelled images: folders, and data sets known by name."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from recast_pl.data.tasks import SPLITS, TaskConfig
from recast_pl.errors import DataError

_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not yet decoded.

    Args:
        classes: Class names, in order of label.
        labels: Class index of each image (N,).
        splits: `train`, `val` or `test` for each image, or an empty string where the source has no splits.
        decode: Turns (images, size) into uint8 (len(images), 3, S, S); S may be smaller than size, where the
            source's own resolution is.
    """

    classes: list[str]
    labels: NDArray[np.int64]
    splits: list[str]
    decode: Callable[[NDArray[np.int64], int], Tensor]


def open_source(task: TaskConfig) -> ImageSource:
    """Finds the images of a task without decoding them.

    Raises:
        DataError: If the task, a folder or a class has no images.
    """
    if task.path is not None:
        return open_folder(Path(task.path).expanduser())
    if task.name not in CATALOGUE:
        known = ", ".join(sorted(CATALOGUE))
        raise DataError(
            f"unknown task {task.name!r}; known by name: {known}. For images of your own give a path: "
            f"{{name: {task.name}, path: FOLDER}} with FOLDER/CLASS/IMAGE"
        )
    return CATALOGUE[task.name]()


def open_folder(root: Path) -> ImageSource:
    """Images in `CLASS/IMAGE`, or in `train|val|test/CLASS/IMAGE`.

    Raises:
        DataError: If the folder is missing or no folder of classes, or a class has no images.
    """
    if not root.is_dir():
        raise DataError(f"folder {str(root)!r} does not exist (from {Path.cwd()}); correct the task's path")
    top = _subfolders(root)
    split_roots = {name: root / name for name in SPLITS if name in top}
    if "train" not in split_roots:
        split_roots = {"": root}
    classes = sorted({name for folder in split_roots.values() for name in _subfolders(folder)})
    if len(classes) < 2:
        raise DataError(
            f"folder {str(root)!r} has {len(classes)} class folders and needs at least 2; "
            "arrange images as CLASS/IMAGE or train|val|test/CLASS/IMAGE"
        )
    files: list[Path] = []
    labels: list[int] = []
    splits: list[str] = []
    for label, name in enumerate(classes):
        found = [(split, file) for split, folder in split_roots.items() for file in _images(folder / name)]
        if not any(split in ("", "train") for split, _ in found):
            raise DataError(f"class folder {str(root)!r}/{name} holds no training image; add images or remove it")
        splits += [split for split, _ in found]
        files += [file for _, file in found]
        labels += [label] * len(found)
    return ImageSource(classes, np.array(labels), splits, lambda which, size: _decode_files(files, which, size))


def open_digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits (UCI ML, 1998), at their own 8×8 pixels.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("task 'digits' is scikit-learn's data set: pip install scikit-learn") from cause
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8)
    labels = bunch.target.astype(np.int64)
    return ImageSource(
        [str(name) for name in bunch.target_names],
        labels,
        [""] * len(labels),
        lambda which, size: images[which][:, None].expand(-1, 3, -1, -1),  # (n, 3, 8, 8)
    )


CATALOGUE: dict[str, Callable[[], ImageSource]] = {"digits": open_digits}
"""Data sets known by name."""


def decode_file(path: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size): upright, RGB, its shorter side resized, its centre cropped.

    Raises:
        DataError: If the file is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as cause:
        raise DataError(f"cannot read image {str(path)!r} ({cause}); repair or remove it") from cause
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


class ImageFiles(Dataset[tuple[Tensor, str]]):
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


def _decode_files(files: Sequence[Path], which: NDArray[np.int64], size: int) -> Tensor:
    images = torch.empty(len(which), 3, size, size, dtype=torch.uint8)

    def fill(position: int) -> None:
        images[position] = decode_file(files[which[position]], size)

    with ThreadPoolExecutor() as pool:  # Pillow releases the lock while it decodes and resizes
        list(pool.map(fill, range(len(which))))
    return images


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit image scaled to 8 bits, where Pillow's own conversion would clip it; others as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))


def _subfolders(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []


def _images(folder: Path) -> list[Path]:
    """Image files below a class folder, in an order that does not depend on the machine."""
    inside = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    shown = (p for p in inside if not any(part.startswith(".") for part in p.parts))
    return [folder / p for p in sorted(shown, key=Path.as_posix)]
