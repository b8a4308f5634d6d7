"""Decodes images once: into a memory-mapped file, into memory, or only to find those that cannot be read."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from recast_pl.data.datasets import ImageSource
from recast_pl.data.images import Images
from recast_pl.errors import DataError
from recast_pl.files import exclusive
from recast_pl.rules import ImageSize, height_and_width

CacheMode = Literal["disk", "ram", "off"]

_VERSION = 2  # of decoding; raise it when pixels change, and older caches are built again

_CHUNK = 64  # images that a thread decodes at once


class Pixels(Protocol):
    """Images (N, 3, S, S), of which some can be read as uint8 (B, 3, S, S) by their positions (B,)."""

    def __getitem__(self, which: Tensor) -> Tensor: ...


class DecodedImages(NamedTuple):
    """All images of a source, black where they cannot be read.

    Args:
        pixels: The images.
        bad: Why an image cannot be read, by position.
        equal: Positions of images with equal pixels, in groups of at least two.
    """

    pixels: Pixels
    bad: dict[int, str]
    equal: list[list[int]]


class MappedPixels:
    """Images in a `.npy` file. Processes share its memory, and workers receive only its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
        # unlike NumPy, torch keeps no file open for a mapping: a thousand tasks would exceed the limit of open files
        content = torch.from_file(str(path), shared=False, size=begin + math.prod(shape), dtype=torch.uint8)
        self.pixels = content[begin:].view(shape)

    def __getitem__(self, which: Tensor) -> Tensor:
        return self.pixels[which]  # (B, 3, S, S)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPixels, (self.path,)


class LazyPixels:
    """Images that are decoded each time they are read, to a height and width in pixels."""

    def __init__(self, images: Images, size: ImageSize) -> None:
        self.images, self.size = images, size

    def __getitem__(self, which: Tensor) -> Tensor:
        return torch.stack([self.images.decode(int(index), self.size) for index in which])  # (B, 3, H, W)


def decode_images(source: ImageSource, size: ImageSize, mode: CacheMode, folder: Path) -> DecodedImages:
    """Decodes all images of a source, unless the cache has them.

    Args:
        source: The images.
        size: Height and width in pixels at which images will be shown; smaller images are stored smaller.
        mode: `disk` stores the pixels in a file in the folder, `ram` in memory. `off` decodes all images once to find
            those that cannot be read, stores these in the folder, and decodes again at each reading.
        folder: Folder of caches. An entry is built again when its source has changed.

    Raises:
        DataError: If images are missing, or the cache cannot be written.
    """
    size = _stored_size(source.images, size)
    if mode == "ram":
        pixels = torch.empty(len(source.images), 3, *height_and_width(size), dtype=torch.uint8)
        bad, equal = _decode_all(source, size, lambda start, part: pixels[start : start + len(part)].copy_(part))
        return DecodedImages(pixels, bad, equal)
    entry = _Entry(folder, source, size, with_pixels=mode == "disk")
    index = entry.read() or entry.build()
    bad = {int(position): reason for position, reason in index["bad"].items()}
    stored = MappedPixels(entry.pixels) if mode == "disk" else LazyPixels(source.images, size)
    return DecodedImages(stored, bad, index["equal"])


def find_bad_images(source: ImageSource) -> dict[int, str]:
    """Decodes every image of a source and returns why an image cannot be read, by position."""
    bad, _ = _decode_all(source, _stored_size(source.images, 32))
    return bad


def _stored_size(images: Images, size: ImageSize) -> ImageSize:
    """The native size if it is a smaller square: the device enlarges images faster than a disk delivers large ones."""
    return size if images.native is None or not isinstance(size, int) else min(size, images.native)


def bad_images_message(name: str, bad: dict[int, str], count: int) -> str:
    """Lists the images of a task that cannot be read, of `count` images; `bad` is as in `DecodedImages`."""
    shown = "; ".join(reason for _, reason in sorted(bad.items())[:20])
    more = f"; and {len(bad) - 20:,} more" if len(bad) > 20 else ""
    return f"{len(bad):,} of {count:,} images of {name!r} cannot be used: {shown}{more}"


class _Entry:
    """A folder of the cache with `index.json` and, optionally, `images.npy`; it exists only when both are complete."""

    def __init__(self, folder: Path, source: ImageSource, size: ImageSize, with_pixels: bool) -> None:
        self.source, self.size, self.with_pixels = source, size, with_pixels
        kind = f"{'x'.join(map(str, dict.fromkeys(height_and_width(size))))}px" if with_pixels else "scan"
        label = re.sub(r"[^\w.-]+", "_", Path(source.location).name)[:40]
        digest = sha256(source.location.encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = folder / f"{label}-{kind}-{digest}"
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        self.pixels = self.path / "images.npy"
        self.state = {
            "version": _VERSION,
            "fingerprint": source.images.fingerprint(),
            "shape": [len(source.images), 3, *height_and_width(size)],
            "max_pixels": source.images.max_pixels,
        }

    def read(self) -> dict[str, Any] | None:
        """The index; None if the entry is missing, damaged or of an earlier state of the source."""
        try:
            index = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
            if self.with_pixels and list(np.load(self.pixels, mmap_mode="r").shape) != self.state["shape"]:
                return None
            return index if "equal" in index and {key: index[key] for key in self.state} == self.state else None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None

    def build(self) -> dict[str, Any]:
        """Writes the entry, unless another process has done so in the meantime, and returns its index."""
        try:
            with exclusive(self.path.with_name(f".{self.path.name}.lock"), f"decoding {self.source.location}"):
                return self.read() or self._write()
        except OSError as cause:
            raise DataError(
                f"cannot write decoded images to {self.path.parent} ({cause.strerror or cause}); free some space "
                "there, or set data.root to another folder, or data.cache to ram"
            ) from cause

    def _write(self) -> dict[str, Any]:
        shutil.rmtree(self.temporary, ignore_errors=True)
        try:
            self.temporary.mkdir()
            bad, equal = self._write_pixels() if self.with_pixels else _decode_all(self.source, self.size)
            index = self.state | {"bad": bad, "equal": equal}
            (self.temporary / "index.json").write_text(json.dumps(index, indent=1))
            shutil.rmtree(self.path, ignore_errors=True)
            self.temporary.replace(self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
        return index

    def _write_pixels(self) -> tuple[dict[int, str], list[list[int]]]:
        path, shape = self.temporary / "images.npy", (len(self.source.images), 3, *height_and_width(self.size))
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            begin = file.tell()

        # written rather than mapped: a full disk is then an error, but would kill a process that maps the file
        def store(start: int, part: Tensor) -> None:
            with path.open("r+b") as file:
                file.seek(begin + start * part[0].numel())
                file.write(part.numpy().data)

        found = _decode_all(self.source, self.size, store)
        with path.open("rb") as complete:
            os.fsync(complete.fileno())
        return found


def _decode_all(
    source: ImageSource, size: ImageSize, store: Callable[[int, Tensor], Any] | None = None
) -> tuple[dict[int, str], list[list[int]]]:
    """Decodes all images in parallel and returns `bad` and `equal` of `DecodedImages`.

    It calls `store` from several threads, with the position of an image and a chunk (n, 3, H, W) from there on.
    """
    images, bad, digests = source.images, {}, np.zeros(len(source.images), np.uint64)

    def decode(start: int) -> int:
        indices = range(start, min(start + _CHUNK, len(images)))
        part = torch.zeros(len(indices), 3, *height_and_width(size), dtype=torch.uint8)
        for index in indices:
            try:
                part[index - start] = images.decode(index, size)
                digests[index] = int.from_bytes(blake2b(part[index - start].numpy().data, digest_size=8).digest())
            except DataError as error:
                bad[index] = str(error)
        if store is not None:
            store(start, part)
        return len(indices)

    name = TextColumn("decoding {task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # threads, because Pillow releases Python's lock while it decodes and resizes
    with Progress(*columns, transient=True) as progress, ThreadPoolExecutor() as pool:
        task = progress.add_task(Path(source.location).name, total=len(images))
        for count in pool.map(decode, range(0, len(images), _CHUNK)):  # an error cancels what has not started
            progress.advance(task, count)
    return dict(sorted(bad.items())), _equal_images(digests, bad)


def _equal_images(digests: NDArray[np.uint64], bad: Mapping[int, str]) -> list[list[int]]:
    """Positions of readable images with equal digests, in groups of at least two."""
    order = np.setdiff1d(np.arange(len(digests)), list(bad))
    order = order[np.argsort(digests[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1)
