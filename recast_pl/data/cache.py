"""Images decoded once: to a memory-mapped file, to memory, or, each time anew, not at all."""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from recast_pl.data.datasets import ImageSource
from recast_pl.data.images import Images
from recast_pl.errors import DataError
from recast_pl.files import exclusive

CacheMode = Literal["disk", "ram", "off"]

_VERSION = 1  # of decoding: a change of pixels makes older caches stale

_CHUNK = 64  # images decoded by a thread at once


class Pixels(Protocol):
    """Images (N, 3, S, S) of which some can be read as uint8 (B, 3, S, S)."""

    def __getitem__(self, which: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DecodedImages:
    """A source's images as pixels.

    Args:
        pixels: All images; those that are bad are black.
        bad: What is wrong with each image that cannot be read.
    """

    pixels: Pixels
    bad: dict[int, str]


class MappedPixels:
    """Images in a `.npy` file; processes share its pages, and it is sent to workers by name.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array = np.load(path, mmap_mode="c")  # private: torch wants memory that it might write

    def __getitem__(self, which: Tensor) -> Tensor:
        return torch.from_numpy(self.array)[which]  # (B, 3, S, S)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPixels, (self.path,)


class UndecodedPixels:
    """Images that are decoded each time they are read.

    Args:
        images: The images.
        side: Height and width in pixels.
    """

    def __init__(self, images: Images, side: int) -> None:
        self.images, self.side = images, side

    def __getitem__(self, which: Tensor) -> Tensor:
        return torch.stack([self.images.decode(int(index), self.side) for index in which])  # (B, 3, S, S)


def decode_images(source: ImageSource, size: int, mode: CacheMode, folder: Path) -> DecodedImages:
    """Decodes all images of a source, or finds them decoded.

    Args:
        source: The images.
        size: Height and width in pixels at which they will be shown; they are stored smaller if they are smaller.
        mode: `disk` for a mapped file in the folder, `ram` for memory; `off` decodes them once to find what is
            bad, keeps that in the folder, and decodes them again each time they are read.
        folder: Where caches are. An entry is built anew when its source has changed.

    Raises:
        DataError: If images are missing, or the cache cannot be written.
    """
    side = source.images.side(size)
    if mode == "ram":
        pixels = torch.empty(len(source.images), 3, side, side, dtype=torch.uint8)
        bad = _decode_all(source, side, lambda start, part: pixels[start : start + len(part)].copy_(part))
        return DecodedImages(pixels, bad)
    entry = _Entry(folder, source, side, with_pixels=mode == "disk")
    index = entry.read() or entry.build()
    bad = {int(position): reason for position, reason in index["bad"].items()}
    return DecodedImages(MappedPixels(entry.pixels) if mode == "disk" else UndecodedPixels(source.images, side), bad)


def find_bad_images(source: ImageSource) -> dict[int, str]:
    """Decodes every image, and keeps nothing but what is wrong with those that cannot be read.

    Args:
        source: The images.
    """
    return _decode_all(source, source.images.side(32), lambda start, part: None)


def bad_images_message(name: str, bad: dict[int, str], count: int) -> str:
    """One summary of the images of a task that cannot be read.

    Args:
        name: Of the task.
        bad: What is wrong with each.
        count: How many images there are in all.
    """
    shown = "; ".join(reason for _, reason in sorted(bad.items())[:20])
    more = f"; and {len(bad) - 20:,} more" if len(bad) > 20 else ""
    return f"{len(bad):,} of {count:,} images of {name!r} cannot be used: {shown}{more}"


class _Entry:
    """A folder with `images.npy` and `index.json`, which is in place when both are whole."""

    def __init__(self, folder: Path, source: ImageSource, side: int, with_pixels: bool) -> None:
        self.source, self.side, self.with_pixels = source, side, with_pixels
        kind = f"{side}px" if with_pixels else "scan"
        label = re.sub(r"[^\w.-]+", "_", Path(source.location).name)[:40]
        self.path = (
            folder / f"{label}-{kind}-{sha256(source.location.encode(errors='surrogateescape')).hexdigest()[:12]}"
        )
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        self.pixels = self.path / "images.npy"
        self.state: dict[str, Any] = {
            "version": _VERSION,
            "fingerprint": source.images.fingerprint(),
            "shape": [len(source.images), 3, side, side],
        }

    def read(self) -> dict[str, Any] | None:
        """The index; None if the entry is missing, damaged or of another state of the source."""
        try:
            index = json.loads((self.path / "index.json").read_text())
            if self.with_pixels and list(np.load(self.pixels, mmap_mode="r").shape) != self.state["shape"]:
                return None
            return index if {key: index[key] for key in self.state} == self.state else None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None

    def build(self) -> dict[str, Any]:
        """Writes the entry, unless another process has done so meanwhile.

        Raises:
            DataError: If it cannot be written.
        """
        try:
            with exclusive(self.path.with_name(f".{self.path.name}.lock"), f"decoding {self.source.location}"):
                return self.read() or self._write()
        except OSError as cause:
            raise DataError(
                f"cannot write decoded images to {self.path.parent} ({cause.strerror or cause}); make room there, "
                "or set data.root to another folder, or data.cache to ram"
            ) from cause

    def _write(self) -> dict[str, Any]:
        shutil.rmtree(self.temporary, ignore_errors=True)
        try:
            self.temporary.mkdir()
            index = self.state | {"bad": self._write_pixels()}
            text = json.dumps(index, indent=1)
            (self.temporary / "index.json").write_text(text)
            shutil.rmtree(self.path, ignore_errors=True)
            self.temporary.replace(self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
        content: dict[str, Any] = json.loads(text)
        return content

    def _write_pixels(self) -> dict[int, str]:
        if not self.with_pixels:
            return _decode_all(self.source, self.side, lambda start, part: None)
        shape = tuple(self.state["shape"])
        with (self.temporary / "images.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.flush()
            begin, each = file.tell(), 3 * self.side * self.side

            # written rather than mapped: a full disk is then an error, where a mapping would kill the process
            def keep(start: int, part: Tensor) -> None:
                _write_at(file.fileno(), part.numpy(), begin + start * each)

            bad = _decode_all(self.source, self.side, keep)
            os.fsync(file.fileno())
        return bad


def _decode_all(source: ImageSource, side: int, keep: Callable[[int, Tensor], Any]) -> dict[int, str]:
    """Decodes in parallel, hands over chunks (n, 3, side, side) as they come, and returns what is bad."""
    images, bad = source.images, {}

    def decode(start: int) -> int:
        indices = range(start, min(start + _CHUNK, len(images)))
        part = torch.zeros(len(indices), 3, side, side, dtype=torch.uint8)
        for index in indices:
            try:
                part[index - start] = images.decode(index, side)
            except DataError as error:
                bad[index] = str(error)
        keep(start, part)
        return len(indices)

    columns = (TextColumn("decoding {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = ThreadPoolExecutor()  # Pillow releases the lock while it decodes and resizes
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(Path(source.location).name, total=len(images))
        try:
            for count in pool.map(decode, range(0, len(images), _CHUNK)):
                progress.advance(task, count)
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(sorted(bad.items()))


def _write_at(descriptor: int, data: NDArray[np.uint8], offset: int) -> None:
    rest = memoryview(data.data).cast("B")
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count
