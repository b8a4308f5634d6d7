"""A process that decodes image files, one after the other, with limits of time and memory.

The server writes requests to its standard input and reads answers from its standard output; see `decoding`. Whatever a
file makes the decoder do, it takes no longer than the time given, no more memory than its pixels need, and cannot
write files. The process ends when its input does.
"""

import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, Image

from recast_pl.inference.server.untrusted import BadImageError, decode

REQUEST = struct.Struct("!QIIdQ")
"""Before a file: the pixels up to which it is decoded now, height, width, seconds of processor time, and its bytes."""

ANSWER = struct.Struct("!HQ")
"""Before an answer: its status, and its bytes. They are pixels for status 200, otherwise a text."""

LATER = 202
"""The status of an image that has too many pixels to be decoded now; its text is empty."""

_BYTES_PER_PIXEL = 32  # decoding takes up to 26

_SPARE = 128 << 20  # bytes


def _limit(max_pixels: int) -> None:
    """Limits the memory of this process, and lets the server alone decide when it ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # a terminal sends the first one to all processes
        signal.signal(name, signal.SIG_IGN)
    with suppress(ImportError, OSError, ValueError):  # of systems without these limits
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + _BYTES_PER_PIXEL * max_pixels + _SPARE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _stop_after(seconds: float) -> None:
    """Ends this process when it has computed for so long, by SIGPROF; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(content: bytes, now: int, height: int, width: int, max_pixels: int) -> tuple[int, bytes]:
    try:
        pixels = decode(content, (height, width), max_pixels, now)
    except BadImageError as error:
        return error.status, error.reason.encode()
    return (LATER, b"") if pixels is None else (200, pixels)


def serve(requests: BinaryIO, answers: BinaryIO, max_pixels: int) -> None:
    """Answers requests until there are no more."""
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        now, height, width, seconds, length = REQUEST.unpack(head)
        content = requests.read(length)
        _stop_after(seconds)
        status, answer = _answer(content, now, height, width, max_pixels)
        _stop_after(0)
        answers.write(ANSWER.pack(status, len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    Image.init()
    Image.MAX_IMAGE_PIXELS = int(sys.argv[1])
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread would reserve memory
    _limit(Image.MAX_IMAGE_PIXELS)
    serve(sys.stdin.buffer, sys.stdout.buffer, Image.MAX_IMAGE_PIXELS)
