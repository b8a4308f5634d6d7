"""What the server does at each address."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from recast_pl.errors import DataError, PatchError, RunError
from recast_pl.inference.prediction import Prediction, RoutedPrediction
from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.batching import Batcher
from recast_pl.inference.server.decoding import Decoders
from recast_pl.inference.server.departure import while_connected
from recast_pl.inference.server.drift import Drift, DriftMonitor
from recast_pl.inference.server.limits import Limits
from recast_pl.inference.server.metrics import CONTENT_TYPE, Metrics
from recast_pl.inference.server.reading import MOST_IMAGES, check_type, read_question, single_field
from recast_pl.inference.server.schema import FILE, FORM, Task
from recast_pl.inference.server.task_changes import TaskChanges
from recast_pl.inference.server.warm_up import WarmUp
from recast_pl.rules import NO_TASK

_PAGE = Path(__file__).with_name("page.html")

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Answer = RoutedPrediction | Prediction


class Service:
    """The handlers of all addresses.

    Args:
        predictor: The tasks.
        limits: Limits of the load.
        changes: Adds and removes tasks.
    """

    def __init__(self, predictor: Predictor, limits: Limits, changes: TaskChanges) -> None:
        self.counts = Metrics()
        self._predictor, self._limits, self._changes = predictor, limits, changes
        self._decoders = Decoders(limits, lambda reason: self.counts.lost.labels(reason).inc())
        self._batcher = Batcher(predictor, self._decoders, limits, self.counts.batches.observe)
        self._warm_up, self._drift = WarmUp(predictor, self._decoders), DriftMonitor(predictor)
        self.counts.decoding.set_function(lambda: self._decoders.longest)
        self.counts.waiting.set_function(lambda: self._batcher.waiting)
        self.counts.tasks.set_function(lambda: len(predictor.tasks))
        self.counts.add(self._drift)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A context after which nothing is computed any more. An application that is mounted in another has none."""
        self._warm_up.begin()
        async with self._batcher.running():
            try:
                yield
            finally:
                self._warm_up.end()

    async def page(self) -> Response:
        """The web page."""
        return HTMLResponse(_PAGE.read_bytes(), headers=_PAGE_HEADERS)

    async def predict(self, request: Request) -> Answer | list[Answer]:
        """Classifies an image by a task (a name), or by the task that is found if none is named.

        The body is the image, a form with the field `image`, or JSON with `image` in base64. Several fields `image`, or
        `images`, are answered by a list in the same order, or by an error if one of the images cannot be used.

        If a task is found, the answer also has its probability, the second choice, and how familiar the image is. If an
        image is unlike those of all tasks, its task is `none`. With `top_k`, `probabilities` are those of the most
        probable classes alone, in descending order.
        """
        question = await read_question(request)
        if len(question.images) > min(MOST_IMAGES, self._limits.queue_size):
            raise HTTPException(413, f"the request has {len(question.images)} images; send fewer in one request")
        try:
            async with asyncio.timeout(self._limits.timeout):
                found = await while_connected(request, self._batcher.classify(question.images, question.task))
        except RunError as error:
            raise HTTPException(404, str(error)) from error
        except (PatchError, DataError) as error:  # the second if a task of another image size took its place
            raise HTTPException(500, str(error)) from error
        except TimeoutError as cause:
            reason = f"there was no answer in {self._limits.timeout:g} seconds; try again when the server is less busy"
            raise HTTPException(504, reason) from cause
        answers = [self._answer(prediction, question.top_k) for prediction in found]
        return answers if question.several else answers[0]

    def _answer(self, prediction: Prediction, top_k: int | None) -> Prediction:
        """Counts a prediction, and keeps the probabilities that are wanted."""
        if isinstance(prediction, RoutedPrediction):
            self.counts.routed.labels("refused" if prediction.task == NO_TASK else "found").inc()
        self._drift.observe(prediction)
        return prediction if top_k is None else dataclasses.replace(prediction, probabilities=prediction.ranked(top_k))

    async def tasks(self) -> list[Task]:
        """The tasks and their classes."""
        return [Task(name, self._predictor.classes(name)) for name in self._predictor.tasks]

    async def add(self, request: Request) -> Task:
        """Adds a task. The body is a file of `patches/`, or a form with `patch` and `signature`.

        The signature is the file of the same name in `signatures/`. Without it, the server cannot find the tasks of
        images any more.
        """
        self._changes.check_token(request)
        signature = None
        if check_type(request, FILE, FORM) == FILE:
            patch = await request.body()
        else:
            async with request.form(max_files=2, max_fields=0) as form:
                patch = await single_field(form, "patch", UploadFile).read()
                if "signature" in form:
                    signature = await single_field(form, "signature", UploadFile).read()
        task = await run_in_threadpool(self._changes.add, patch, signature)
        self._drift.forget(task.name)
        return task

    async def remove(self, request: Request, name: str) -> Task:
        """Removes a task that was added here, also from the disk. The tasks of the run stay."""
        self._changes.check_token(request)
        task = await run_in_threadpool(self._changes.remove, name)
        self._drift.forget(name)
        return task

    async def health(self) -> dict[str, Any]:
        """Shows that the server answers, how many images wait, and how long the slowest one is being decoded."""
        waiting, slowest = self._batcher.waiting, round(self._decoders.longest, 3)
        return {"status": "ok", "tasks": len(self._predictor.tasks), "waiting": waiting, "decoding_seconds": slowest}

    async def ready(self) -> dict[str, str]:
        """Shows that the server has warmed up: the first image does not take longer than others."""
        fault = self._warm_up.fault
        self._warm_up.begin()  # an application that is mounted in another has not begun
        if fault:
            raise HTTPException(503, fault, {"Retry-After": "1"})
        return {"status": "ready"}

    async def metrics(self) -> Response:
        """The metrics."""
        return Response(await run_in_threadpool(self.counts.text), media_type=CONTENT_TYPE)

    async def drift(self) -> list[Drift]:
        """How far the recent images of each task are from its validation images, once there were 50."""
        return await run_in_threadpool(self._drift.measure)
