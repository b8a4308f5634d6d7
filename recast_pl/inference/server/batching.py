"""Images of concurrent requests, classified together."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from torch import Tensor

from recast_pl.errors import PatchError, RunError
from recast_pl.inference.prediction import Prediction
from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.decoding import Decoders
from recast_pl.inference.server.limits import Limits
from recast_pl.rules import ANY_TASK, ImageSize

_CANNOT_FIND = (
    "this server cannot find the task of an image, because its tasks share weights, or a signature is missing or does "
    "not fit; name the task, or make the signatures with 'patch sign' and start the server again"
)

_BATCH_PIXELS = 8_000_000  # of a batch, which bounds its memory; 159 images of 224×224


class _Request(NamedTuple):
    """A decoded image (3, S, S) that waits to be classified, and the future of its prediction."""

    pixels: Tensor
    task: str
    prediction: asyncio.Future[Prediction]


class Batcher:
    """Classifies the images of concurrent requests together, whatever their tasks.

    While one batch is computed, other processes decode images, which wait; all that wait form the next batch. So no
    request waits for a batch to fill, and batches grow with the load.

    Args:
        predictor: The tasks.
        decoders: Decode the images.
        limits: How many images a batch may have and how many may wait.
        observe: Called with the size of each batch.
    """

    def __init__(
        self, predictor: Predictor, decoders: Decoders, limits: Limits, observe: Callable[[int], object]
    ) -> None:
        self.waiting = 0
        self._predictor, self._decoders, self._limits, self._observe = predictor, decoders, limits, observe
        self._jobs: deque[_Request] = deque()  # bounded by `waiting`
        self._worker: asyncio.Task[None] | None = None
        self._computer = ThreadPoolExecutor(1, "classify")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A context after which nothing is computed any more. An application that is mounted in another has none."""
        try:
            yield
        finally:
            if self._worker:
                self._worker.cancel()
            self._decoders.close()
            self._computer.shutdown(wait=False, cancel_futures=True)
            self._computer = ThreadPoolExecutor(1, "classify")

    async def classify(self, contents: Sequence[bytes], task: str) -> list[Prediction]:
        """Decodes image files and waits for their predictions.

        Args:
            contents: The files.
            task: Name of the task; `auto` if that of each image is to be found.

        Raises:
            RunError: If there is no such task.
            PatchError: If the task cannot classify an image.
            HTTPException: 503 if too many images wait; 413 or 422 if an image cannot be used, or no task be found.
        """
        if self.waiting + len(contents) > self._limits.queue_size:
            raise HTTPException(503, f"{self.waiting} images are waiting; try again later", {"Retry-After": "1"})
        self.waiting += len(contents)
        jobs = [asyncio.ensure_future(self._classify(content, task)) for content in contents]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION)
            for place, job in enumerate(jobs, 1):
                if job.done() and isinstance(error := job.exception(), HTTPException) and len(jobs) > 1:
                    raise HTTPException(error.status_code, f"image {place}: {error.detail}", error.headers) from error
            return await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            self.waiting -= len(contents)

    async def _classify(self, content: bytes, task: str) -> Prediction:
        loop = asyncio.get_running_loop()
        size = await self._size(task)
        job = _Request(await self._decoders.decode(content, size), task, loop.create_future())
        self._jobs.append(job)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await job.prediction

    async def _size(self, task: str) -> ImageSize:
        """The image size of a task. The first time that a task is to be found, this takes as long as a router does."""
        if task != ANY_TASK:
            return self._predictor.image_size(task)
        try:
            return await run_in_threadpool(lambda: self._predictor.any_size)
        except (RunError, PatchError) as cause:  # whose texts name files of the server
            raise HTTPException(422, _CANNOT_FIND) from cause

    async def _work(self) -> None:
        """Computes batches until no image waits."""
        while self._jobs:
            batch = [job for job in self._take() if not job.prediction.done()]  # the others have timed out
            if batch:
                self._observe(len(batch))
                await self._compute(batch)

    def _take(self) -> list[_Request]:
        """The images of the next batch: at most `batch_size`, and `_BATCH_PIXELS` in all unless one image has more."""
        batch: list[_Request] = []
        pixels = 0
        while self._jobs and len(batch) < self._limits.batch_size:
            pixels += self._jobs[0].pixels[0].numel()
            if batch and pixels > _BATCH_PIXELS:
                break
            batch.append(self._jobs.popleft())
        return batch

    async def _compute(self, batch: list[_Request]) -> None:
        """Answers a batch. If it fails, its parts are tried alone, so that only the requests of bad tasks fail."""
        run = asyncio.get_running_loop().run_in_executor
        try:
            predictions = await run(self._computer, self._predict, batch)
        except Exception as error:  # of any kind; the next batch may succeed
            parts = _parts(batch)
            if len(parts) > 1:
                for part in parts:
                    await self._compute(part)
                return
            for job in batch:
                if not job.prediction.done():
                    job.prediction.set_exception(error)
            return
        for job, prediction in zip(batch, predictions, strict=True):
            if not job.prediction.done():
                job.prediction.set_result(prediction)

    def _predict(self, batch: list[_Request]) -> list[Prediction]:
        """Predictions of a batch, in order; the images whose tasks are to be found are classified after the others."""
        named = [job for job in batch if job.task != ANY_TASK]
        others = [job.pixels for job in batch if job.task == ANY_TASK]
        known: list[Prediction] = []
        if named:
            known = self._predictor.predict_tensors([job.pixels for job in named], [job.task for job in named])
        answers = iter(known), iter(self._predictor.route_tensors(others) if others else ())
        return [next(answers[job.task == ANY_TASK]) for job in batch]


def _parts(batch: list[_Request]) -> list[list[_Request]]:
    """The requests of each task, and each request alone whose task is to be found."""
    parts: dict[str | int, list[_Request]] = {}
    for place, job in enumerate(batch):
        parts.setdefault(place if job.task == ANY_TASK else job.task, []).append(job)
    return list(parts.values())
