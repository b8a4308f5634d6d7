"""Images of many requests, classified together."""

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from PIL import Image
from starlette.exceptions import HTTPException
from torch import Tensor

from recast_pl.data.images import SUFFIXES, decode_any
from recast_pl.errors import DataError
from recast_pl.inference.predictor import Prediction, Predictor
from recast_pl.inference.server.limits import Limits

# no others, because Pillow hands some (PostScript) to other programs
_FORMATS = sorted({name for suffix, name in Image.registered_extensions().items() if suffix in SUFFIXES})


def decode(content: bytes, size: int, max_pixels: int) -> Tensor:
    """An image that came from somewhere, as `predict` would decode it.

    Args:
        content: The image file.
        size: Height and width in pixels of the result.
        max_pixels: Of the image as it is.

    Returns:
        uint8 (3, size, size).

    Raises:
        HTTPException: 413 if it has more pixels; 422 if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:  # which reads no more than the header
            pixels = image.width * image.height
            if pixels <= max_pixels:
                return decode_any(image, size)
    except Image.DecompressionBombError:
        pixels = 0
    except Exception as cause:  # on damaged files decoders raise nearly anything
        reason = cause.__cause__ if isinstance(cause, DataError) else "it is damaged, or of no known format"
        raise HTTPException(422, f"the image cannot be read ({reason}); send a {', '.join(_FORMATS)} file") from cause
    raise HTTPException(
        413, f"the image has {pixels or 'far too many'} pixels, of at most {max_pixels}; send a smaller one"
    )


class _Job(NamedTuple):
    """An image (3, S, S) that waits for its turn, and where its prediction goes."""

    pixels: Tensor
    task: str
    found: asyncio.Future[Prediction]


class Batcher:
    """Classifies images of concurrent requests together, by whichever tasks they ask for.

    While one batch is computed, images are decoded by other threads and wait; what has gathered is the next batch. So
    nobody waits for a batch to fill, and batches are the larger, the busier the server is.

    Args:
        predictor: The tasks.
        limits: How many images a batch has and how many may wait.
        observe: Is told the size of each batch.
    """

    def __init__(self, predictor: Predictor, limits: Limits, observe: Callable[[int], object]) -> None:
        self.waiting = 0
        self._predictor, self._limits, self._observe = predictor, limits, observe
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()  # bounded by `waiting`

    async def classify(self, content: bytes, task: str) -> Prediction:
        """Decodes an image and waits for its prediction.

        Args:
            content: The image file.
            task: Name of a learnt task.

        Raises:
            RunError: If there is no such task.
            HTTPException: 503 if too many images wait; 413 or 422 if the image cannot be used.
        """
        size = self._predictor.image_size(task)
        if self.waiting >= self._limits.queue_size:
            raise HTTPException(503, f"{self.waiting} images are waiting; come back", {"Retry-After": "1"})
        self.waiting += 1
        try:
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(self._decoders, decode, content, size, self._limits.max_pixels)
            job = _Job(pixels, task, loop.create_future())
            self._jobs.put_nowait(job)
            return await job.found
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Classifies what is asked for within."""
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode") as self._decoders,
            ThreadPoolExecutor(1, "classify") as self._computer,
        ):
            worker = asyncio.create_task(self._work())
            try:
                yield
            finally:
                worker.cancel()
                with suppress(asyncio.CancelledError):
                    await worker

    async def _work(self) -> None:
        while True:
            batch = [await self._jobs.get()]
            while len(batch) < self._limits.batch_size and not self._jobs.empty():
                batch.append(self._jobs.get_nowait())
            batch = [job for job in batch if not job.found.done()]  # the others have been given up
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[_Job]) -> None:
        self._observe(len(batch))
        images, tasks = [job.pixels for job in batch], [job.task for job in batch]
        compute = asyncio.get_running_loop().run_in_executor
        try:
            found = await compute(self._computer, self._predictor.predict, images, None, tasks)
        except Exception as error:  # whatever it is, the next batch may do better
            for job in batch:
                if not job.found.done():
                    job.found.set_exception(error)
            return
        for job, prediction in zip(batch, found, strict=True):
            if not job.found.done():
                job.found.set_result(prediction)
