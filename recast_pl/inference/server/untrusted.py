"""Image files from untrusted sources: checked by their headers, then decoded. Needs no torch, so it starts fast."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from recast_pl.data.pixels import fit
from recast_pl.errors import one_line
from recast_pl.rules import ImageSize

# no other formats: Pillow passes some (PostScript) on to other programs, and rare ones are little tested
_FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]

_MAX_SCANS = 100
"""Scans that a JPEG file may have, as in libtiff. Encoders write about ten; a small file may have thousands, and each
takes a pass over all pixels."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # none of those that stand alone, within a scan


class BadImageError(Exception):
    """An image that is not classified, with the status of the answer and its text."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def decode(content: bytes, size: ImageSize, max_pixels: int, now: int) -> bytes | None:
    """Decodes an image file as `Predictor.predict` would.

    Args:
        content: The file.
        size: Height and width of the result.
        max_pixels: Pixels that an image may have.
        now: Pixels up to which it is decoded now.

    Returns:
        The pixels, uint8 (H, W, 3); None for an image of more pixels than `now`.

    Raises:
        BadImageError: 413 if it has more than `max_pixels` or needs too much memory; 422 if it cannot be read, or has
            too many scans.
    """
    try:
        with _open(content) as image:
            if _count_pixels(image, content, max_pixels) > now:
                return None
            try:
                return fit(image, size).tobytes()
            except MemoryError:
                raise
            except Exception as cause:
                raise _unreadable(one_line(cause)) from cause
    except Image.DecompressionBombError as cause:
        raise _too_many("far too many", max_pixels) from cause
    except MemoryError as cause:
        raise BadImageError(413, "decoding the image takes too much memory; send a smaller one") from cause


def _count_pixels(image: Image.Image, content: bytes, max_pixels: int) -> int:
    """The pixels of an image by its header, which must not be too many."""
    if image.format in ("JPEG", "MPO") and count_scans(content) > _MAX_SCANS:
        raise BadImageError(422, f"the image has more than {_MAX_SCANS} scans; save it again with fewer")
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        raise _too_many(pixels, max_pixels)
    return pixels


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
    """Opens an image file; the pixels are not read before they are needed."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception as cause:  # decoders raise nearly anything on damaged files; texts show addresses in memory
        raise _unreadable("it is damaged or of an unknown format") from cause
    with image:
        yield image


def _unreadable(reason: str) -> BadImageError:
    return BadImageError(422, f"the image cannot be read ({reason}); send a {', '.join(_FORMATS)} file")


def _too_many(count: object, limit: int) -> BadImageError:
    return BadImageError(413, f"the image has {count} pixels, more than the {limit} allowed; send a smaller one")
