"""Decodes images in processes of their own, which are ended when an image takes too long, and then replaced."""

import asyncio
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from recast_pl.inference.server.decoder import ANSWER, LATER, REQUEST
from recast_pl.inference.server.limits import Limits
from recast_pl.rules import ImageSize, height_and_width

_PROGRAM = "recast_pl.inference.server.decoder"

_QUICK_SECONDS, _QUICK_PIXELS = 1.0, 16_000_000
"""Seconds of processor time, and pixels, up to which images are decoded by the first processes, so that no image waits
long for another. 16 million pixels take half a second."""

_SECONDS = 5.0
"""Processor time that any image may take. 50 million pixels take one or two seconds; some small files take minutes."""

_START = 60.0
"""Seconds that a new process may take for its first image, because it has to start."""

_MOST_TEXT = 2000  # bytes of an answer that is not pixels


class _LostError(Exception):
    """A process ended before it has answered; the text is why: `time`, `stuck` or `crash`."""


class Decoders:
    """Decodes images in other processes, for any number of requests.

    An image is tried by a quick process first. If it is large or takes long, one of the slow processes tries it, so
    that slow images wait for each other only. The processes start when they are needed.

    Args:
        limits: The pixels that an image may have, and the seconds after which a process counts as stuck.
        lost: Called with the reason whenever a process was lost: `time` if an image took too much processor time,
            `stuck` if it took too long otherwise, `crash` if the process ended by itself.
    """

    def __init__(self, limits: Limits, lost: Callable[[str], object]) -> None:
        self._limits, self._lost = limits, lost
        self._open()

    def _open(self) -> None:
        count = min(4, os.cpu_count() or 1)
        self._quick = _Lane(
            count, min(_QUICK_PIXELS, self._limits.max_pixels), _QUICK_SECONDS, self._limits, self._lost
        )
        self._slow = _Lane(max(1, count // 2), self._limits.max_pixels, _SECONDS, self._limits, self._lost)

    @property
    def longest(self) -> float:
        """Seconds for which the image that takes longest has been decoded so far; 0 if none is."""
        return max(self._quick.longest, self._slow.longest)

    def start(self) -> None:
        """Starts the quick processes, so that the first images do not wait for them."""
        self._quick.start()

    def close(self) -> None:
        """Ends all processes. Later images start new ones."""
        self._quick.close()
        self._slow.close()
        self._open()

    async def decode(self, content: bytes, size: ImageSize) -> Tensor:
        """Decodes an image file to uint8 (3, H, W), as `Predictor.predict` would.

        Args:
            content: The file.
            size: Height and width of the result in pixels.

        Raises:
            HTTPException: 413 if it has too many pixels; 422 if it cannot be read, or takes too long; 503 if the
                process did not answer, such as on a machine that is far too busy.
        """
        reason = "time"
        for lane in (self._quick, self._slow):
            try:
                status, answer = await asyncio.get_running_loop().run_in_executor(lane.pool, lane.ask, content, size)
            except _LostError as error:  # also of a process that was ended from outside before
                reason = str(error)
                if reason == "stuck":
                    break
                continue
            except OSError as error:
                raise HTTPException(
                    503, "images cannot be decoded now; try again later", {"Retry-After": "1"}
                ) from error
            if status == 200:
                return torch.frombuffer(answer, dtype=torch.uint8).reshape(*height_and_width(size), 3).permute(2, 0, 1)
            if status != LATER:
                raise HTTPException(status, answer.decode())
        raise _refusal(reason, self._limits)


class _Lane:
    """Some processes with the same limits, and as many threads that wait for their answers."""

    def __init__(self, count: int, pixels: int, seconds: float, limits: Limits, lost: Callable[[str], object]) -> None:
        self.pool = ThreadPoolExecutor(count, "decode")
        self._pixels, self._seconds, self._limits, self._lost = pixels, seconds, limits, lost
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()  # None stands for one that is not started
        self._all: set[_Process] = set()
        self._closed = False
        for _ in range(count):
            self._idle.put(None)

    @property
    def longest(self) -> float:
        times = [process.since for process in list(self._all)]
        return max((time.monotonic() - since for since in times if since is not None), default=0.0)

    def start(self) -> None:
        for process in [self._idle.get() for _ in range(self._idle.qsize())]:
            self._idle.put(process or self._new_if_possible())

    def close(self) -> None:
        self._closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._all):
            process.end()

    def ask(self, content: bytes, size: ImageSize) -> tuple[int, bytearray]:
        """The answer for an image; raises OSError if no process can be started, and _LostError if it is lost."""
        process, alive = self._idle.get(), False  # there are as many as threads, so that no thread waits for one
        try:
            process = process or self._new()
            answer = process.ask(content, size, self._pixels, self._seconds, self._limits.timeout)
            alive = True
        except _LostError as error:
            if not self._closed:
                self._lost(str(error))
            raise
        finally:
            if process and not alive:
                process.end()
                self._all.discard(process)
            self._idle.put(process if alive or self._closed else self._new_if_possible())
        return answer

    def _new_if_possible(self) -> "_Process | None":
        with suppress(OSError):  # such as too many open files; the next image tries again
            return self._new()
        return None

    def _new(self) -> "_Process":
        process = _Process(self._limits.max_pixels)
        self._all.add(process)
        if self._closed:  # meanwhile
            process.end()
        return process


class _Process:
    """A running `decoder`."""

    def __init__(self, max_pixels: int) -> None:
        self.since: float | None = None  # when it got the image that it decodes
        self._started = False
        pipe, path = subprocess.PIPE, os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", _PROGRAM, str(max_pixels)],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,  # damaged files must not fill the log
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )

    def ask(
        self, content: bytes, size: ImageSize, pixels: int, seconds: float, patience: float
    ) -> tuple[int, bytearray]:
        """Sends an image, and waits for the answer: its status and bytes.

        Raises:
            _LostError: If the process ends, because the image takes more than `seconds` of processor time or `patience`
                seconds in all, or because the decoder fails.
        """
        self.since = time.monotonic()
        stuck = threading.Event()

        def give_up() -> None:
            stuck.set()
            self._process.kill()

        timer = threading.Timer(patience if self._started else max(patience, _START), give_up)
        timer.start()
        try:
            answer = self._exchange(REQUEST.pack(pixels, *height_and_width(size), seconds, len(content)), content)
        except (OSError, EOFError, struct.error) as cause:
            slow = self._process.wait() == -getattr(signal, "SIGPROF", 0)
            raise _LostError("stuck" if stuck.is_set() else "time" if slow else "crash") from cause
        finally:
            timer.cancel()
            self.since = None
        self._started = True
        return answer

    def _exchange(self, head: bytes, content: bytes) -> tuple[int, bytearray]:
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise EOFError
        requests.write(head)
        requests.write(content)
        requests.flush()
        status, length = ANSWER.unpack(answers.read(ANSWER.size))
        answer = bytearray(answers.read(length))  # which torch may write to, as to any tensor
        if len(answer) < length or (status != 200 and length > _MOST_TEXT):
            raise EOFError
        return status, answer

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent to it
                if stream:
                    stream.close()


def _refusal(reason: str, limits: Limits) -> HTTPException:
    """The answer for an image whose process was lost."""
    if reason == "time":
        return HTTPException(422, f"the image takes more than {_SECONDS:g} seconds to read; save it again")
    if reason == "stuck":
        text = f"the image was not read in {limits.timeout:g} seconds; try again when the server is less busy"
        return HTTPException(503, text, {"Retry-After": "1"})
    return HTTPException(422, "the image makes the decoder fail; save it again")
