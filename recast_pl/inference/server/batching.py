"""Images of concurrent requests, classified together."""

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

from recast_pl.data.images import decode_any
from recast_pl.errors import DataError
from recast_pl.inference.predictor import Prediction, Predictor
from recast_pl.inference.server.limits import Limits

# no other formats: Pillow passes some (PostScript) on to other programs, and rare ones are little tested
_FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]


def decode(content: bytes, size: int, max_pixels: int) -> Tensor:
    """Decodes an image file from an untrusted source into uint8 (3, size, size), as `Predictor.predict` would.

    Raises:
        HTTPException: 413 if it has more pixels; 422 if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:  # reads only the header
            pixels = image.width * image.height
            if pixels <= max_pixels:
                return decode_any(image, size)
    except Image.DecompressionBombError:
        pixels = 0
    except Exception as cause:  # decoders raise nearly anything on damaged files
        reason = cause.__cause__ if isinstance(cause, DataError) else "it is damaged or of an unknown format"
        raise HTTPException(422, f"the image cannot be read ({reason}); send a {', '.join(_FORMATS)} file") from cause
    count = pixels or "far too many"
    raise HTTPException(413, f"the image has {count} pixels, more than the {max_pixels} allowed; send a smaller one")


class _Request(NamedTuple):
    """A decoded image (3, S, S) that waits to be classified, and the future of its prediction."""

    pixels: Tensor
    task: str
    prediction: asyncio.Future[Prediction]


class Batcher:
    """Classifies the images of concurrent requests together, whatever their tasks.

    While one batch is computed, other threads decode images, which wait; all that wait form the next batch. So no
    request waits for a batch to fill, and batches grow with the load.

    Args:
        predictor: The tasks.
        limits: How many images a batch may have and how many may wait.
        observe: Called with the size of each batch.
    """

    def __init__(self, predictor: Predictor, limits: Limits, observe: Callable[[int], object]) -> None:
        self.waiting = 0
        self._predictor, self._limits, self._observe = predictor, limits, observe
        self._jobs: asyncio.Queue[_Request] = asyncio.Queue()  # bounded by `waiting`

    async def classify(self, content: bytes, task: str) -> Prediction:
        """Decodes an image file and waits for its prediction.

        Raises:
            RunError: If there is no such task.
            HTTPException: 503 if too many images wait; 413 or 422 if the image cannot be used.
        """
        size = self._predictor.image_size(task)
        if self.waiting >= self._limits.queue_size:
            raise HTTPException(503, f"{self.waiting} images are waiting; try again later", {"Retry-After": "1"})
        self.waiting += 1
        try:
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(self._decoders, decode, content, size, self._limits.max_pixels)
            job = _Request(pixels, task, loop.create_future())
            self._jobs.put_nowait(job)
            return await job.prediction
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A context in which `classify` works."""
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
            batch = [job for job in batch if not job.prediction.done()]  # the others have timed out
            if batch:
                await self._compute(batch)

    async def _compute(self, batch: list[_Request]) -> None:
        self._observe(len(batch))
        images, tasks = [job.pixels for job in batch], [job.task for job in batch]
        run = asyncio.get_running_loop().run_in_executor
        try:
            predictions = await run(self._computer, self._predictor.predict_tensors, images, tasks)
        except Exception as error:  # of any kind; the next batch may succeed
            for job in batch:
                if not job.prediction.done():
                    job.prediction.set_exception(error)
            return
        for job, prediction in zip(batch, predictions, strict=True):
            if not job.prediction.done():
                job.prediction.set_result(prediction)
