"""Image files from untrusted sources: checked by their headers, then decoded."""

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from starlette.exceptions import HTTPException
from torch import Tensor

from recast_pl.data.images import decode_any
from recast_pl.errors import DataError
from recast_pl.rules import ImageSize

# no other formats: Pillow passes some (PostScript) on to other programs, and rare ones are little tested
_FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]

_MAX_SCANS = 100
"""Scans that a JPEG file may have, as in libtiff. Encoders write about ten; a small file may have thousands, and each
takes a pass over all pixels."""

_MAX_SECONDS = 5.0
"""Processor time that reading a file may take. 50 million pixels take one or two seconds; files of millions of tiny
parts take minutes."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # none of those that stand alone, within a scan


class _SlowError(Exception):
    """An image takes too long to read."""


class _Content(io.BytesIO):
    """A file in memory that cannot be read any more after `_MAX_SECONDS` of the thread's processor time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._end = time.thread_time() + _MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise _SlowError(f"it takes more than {_MAX_SECONDS:g} seconds")
        return super().read(size)


def check_image(content: bytes, max_pixels: int) -> int:
    """Reads the header of an image file, and the number of its pixels.

    Raises:
        HTTPException: 413 if it has more than `max_pixels`; 422 if it cannot be read, or has too many scans.
    """
    try:
        with _open(content) as image:
            pixels = image.width * image.height
            if image.format in ("JPEG", "MPO") and count_scans(content) > _MAX_SCANS:
                raise HTTPException(422, f"the image has more than {_MAX_SCANS} scans; save it again with fewer")
    except Image.DecompressionBombError:
        pixels = 0
    if not 0 < pixels <= max_pixels:
        count = pixels or "far too many"
        raise HTTPException(
            413, f"the image has {count} pixels, more than the {max_pixels} allowed; send a smaller one"
        )
    return pixels


def decode(content: bytes, size: ImageSize) -> Tensor:
    """Decodes an image file that `check_image` has passed to uint8 (3, H, W), as `Predictor.predict` would.

    Raises:
        HTTPException: 422 if it cannot be read.
    """
    with _open(content) as image:
        return decode_any(image, size)


def count_scans(content: bytes) -> int:
    """Counts the scans of a JPEG file, at most one more than `_MAX_SCANS`."""
    scans, position = 0, 2
    while scans <= _MAX_SCANS and (found := _MARKER.search(content, position)):
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        position += int.from_bytes(content[position : position + 2])  # the segment's length, which counts itself
    return scans


@contextmanager
def _open(content: bytes) -> Iterator[Image.Image]:
    """Opens an image file, and converts errors; the pixels are not read before they are needed."""
    try:
        with Image.open(_Content(content), formats=_FORMATS) as image:
            yield image
    except (HTTPException, Image.DecompressionBombError):
        raise
    except Exception as cause:  # decoders raise nearly anything on damaged files
        known = cause.__cause__ if isinstance(cause, DataError) else cause if isinstance(cause, _SlowError) else None
        reason = known or "it is damaged or of an unknown format"  # other texts show addresses in memory
        raise HTTPException(422, f"the image cannot be read ({reason}); send a {', '.join(_FORMATS)} file") from cause
