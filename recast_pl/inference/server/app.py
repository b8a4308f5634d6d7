"""The server as an ASGI application."""

import asyncio
import dataclasses
import hmac
import os
import tempfile
from collections.abc import Callable, Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse

from recast_pl.errors import DataError, PatchError, RunError, StorageError
from recast_pl.inference.prediction import Prediction, RoutedPrediction
from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.batching import Batcher
from recast_pl.inference.server.decoding import Decoders
from recast_pl.inference.server.drift import Drift, DriftMonitor
from recast_pl.inference.server.limits import Limits
from recast_pl.inference.server.metrics import CONTENT_TYPE, Metrics, RequestMetrics
from recast_pl.inference.server.request_filter import LOCAL_HOSTS, RequestFilter, error_response
from recast_pl.inference.server.schema import FILE, FORM, IMAGE, PATCH, TOKEN, TOKEN_VARIABLE, body, failures
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.signature import Signature
from recast_pl.rules import ANY_TASK, NO_TASK

Keep = Callable[[TaskPatch, bytes, bytes | None], object]

Field = TypeVar("Field", str, UploadFile)

_PATHS = ("/", "/predict", "/tasks", "/drift", "/health", "/metrics")

_PAGE = Path(__file__).with_name("page.html")

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that is served, with its class names in order of label."""

    name: str
    classes: list[str]


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] = LOCAL_HOSTS,
    keep: Keep | None = None,
) -> FastAPI:
    """Makes the ASGI application, for any ASGI server that uses a single process.

    Args:
        predictor: The tasks.
        limits: Limits of the load; None for the defaults of `Limits`.
        token: Clients that add tasks must send it as `Authorization: Bearer TOKEN`; None if none may add tasks.
        hosts: Host names that requests may be addressed to; `*` allows all.
        keep: Stores a task that a client has added, from its patch, the patch's file and that of the signature (None if
            there is none); None to keep it in memory only.

    Returns:
        The application: `POST /predict`, `GET` and `POST /tasks`, `GET /drift`, `/health` and `/metrics`, and a web
        page at `/`.
    """
    service = _Service(predictor, limits or Limits(), token, keep)
    app = FastAPI(
        title="recast_pl",
        lifespan=lambda _: service.batcher.running(),
        docs_url=None,  # this page and the next would fetch scripts from other servers
        redoc_url=None,
        exception_handlers={
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_failure,
        },
    )
    _add_routes(app, service)
    app.add_middleware(RequestFilter, limits=service.limits, hosts=hosts)
    app.add_middleware(RequestMetrics, metrics=service.counts, paths=_PATHS)
    return app


class _Service:
    """The handlers of all paths; arguments are those of `create_app`."""

    def __init__(self, predictor: Predictor, limits: Limits, token: str | None, keep: Keep | None) -> None:
        self.limits, self.counts = limits, Metrics()
        self._predictor, self._token, self._keep = predictor, token, keep
        self.decoders = Decoders(limits, lambda reason: self.counts.lost.labels(reason).inc())
        self.batcher = Batcher(predictor, self.decoders, limits, self.counts.batches.observe)
        self.counts.decoding.set_function(lambda: self.decoders.longest)
        self.counts.waiting.set_function(lambda: self.batcher.waiting)
        self.counts.tasks.set_function(lambda: len(predictor.tasks))
        self._drift = DriftMonitor(predictor)
        self.counts.add(self._drift)

    async def page(self) -> Response:
        """The web page."""
        return HTMLResponse(_PAGE.read_bytes(), headers=_PAGE_HEADERS)

    async def predict(self, request: Request) -> RoutedPrediction | Prediction:
        """Classifies an image (a file) by a task (a name), or by the task that is found if none is named.

        If a task is found, the answer also has its probability, the second choice, and how familiar the image is. If an
        image is unlike those of all tasks, its task is `none`.
        """
        _check_type(request, FORM)
        async with request.form(max_files=4, max_fields=4, max_part_size=4096) as form:  # file names are not used
            task = _single_field(form, "task", str) if "task" in form else ANY_TASK
            content = await _single_field(form, "image", UploadFile).read()
        try:
            async with asyncio.timeout(self.limits.timeout):
                prediction = await self.batcher.classify(content, task)
        except RunError as error:
            raise HTTPException(404, str(error)) from error
        except (PatchError, DataError) as error:  # the second if a task of another image size took its place
            raise HTTPException(500, str(error)) from error
        except TimeoutError as cause:
            reason = f"there was no answer in {self.limits.timeout:g} seconds; try again when the server is less busy"
            raise HTTPException(504, reason) from cause
        if isinstance(prediction, RoutedPrediction):
            self.counts.routed.labels("refused" if prediction.task == NO_TASK else "found").inc()
        self._drift.observe(prediction)
        return prediction

    async def tasks(self) -> list[Task]:
        """The tasks and their classes."""
        return [Task(name, self._predictor.classes(name)) for name in self._predictor.tasks]

    async def add(self, request: Request) -> Task:
        """Adds a task. The body is a file of `patches/`, or a form with `patch` and `signature`.

        The signature is the file of the same name in `signatures/`. Without it, the server cannot find the tasks of
        images any more.
        """
        self._check_token(request)
        if _check_type(request, FILE, FORM) == FILE:
            return await run_in_threadpool(self._add, await request.body(), None)
        async with request.form(max_files=2, max_fields=0) as form:
            patch = await _single_field(form, "patch", UploadFile).read()
            signature = await _single_field(form, "signature", UploadFile).read() if "signature" in form else None
        return await run_in_threadpool(self._add, patch, signature)

    async def health(self) -> dict[str, Any]:
        """Shows that the server answers, how many images wait, and how long the slowest one is being decoded."""
        waiting, slowest = self.batcher.waiting, round(self.decoders.longest, 3)
        return {"status": "ok", "tasks": len(self._predictor.tasks), "waiting": waiting, "decoding_seconds": slowest}

    async def metrics(self) -> Response:
        """The metrics."""
        return Response(await run_in_threadpool(self.counts.text), media_type=CONTENT_TYPE)

    async def drift(self) -> list[Drift]:
        """How far the recent images of each task are from its validation images, once there were 50."""
        return await run_in_threadpool(self._drift.measure)

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            raise HTTPException(403, f"adding tasks is off; start the server with {TOKEN_VARIABLE} set to allow it")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        valid = hmac.compare_digest(given.encode("latin-1"), self._token.encode())
        if not (valid and scheme.lower() == "bearer"):
            reason = f"adding tasks needs the header Authorization: Bearer TOKEN with the server's {TOKEN_VARIABLE}"
            raise HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})

    def _add(self, patch_content: bytes, signature_content: bytes | None) -> Task:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                (folder / "patch").write_bytes(patch_content)
                patch, signature = TaskPatch.load(folder / "patch"), None
                if patch.task in self._predictor.tasks:
                    raise HTTPException(409, f"there is a task {patch.task!r} already; rename the new one")
                if signature_content is not None:
                    (folder / "signature").write_bytes(signature_content)
                    signature = Signature.load(folder / "signature")
                self._predictor.add_patch(patch, signature)
                self._drift.forget(patch.task)
            except PatchError as error:
                raise HTTPException(422, str(error).replace(f"{folder}{os.sep}", "the ")) from error
        self._store(patch, patch_content, signature_content)
        return Task(patch.task, patch.classes)

    def _store(self, patch: TaskPatch, content: bytes, signature: bytes | None) -> None:
        """Keeps an added task for later, or does not add it."""
        if self._keep is None:
            return
        try:
            self._keep(patch, content, signature)
        except StorageError as error:
            self._predictor.remove(patch.task)
            raise HTTPException(500, "the task cannot be stored, so it was not added; see the server's disk") from error


def _add_routes(app: FastAPI, service: _Service) -> None:
    gets = {"/": service.page, "/tasks": service.tasks, "/drift": service.drift}
    gets |= {"/health": service.health, "/metrics": service.metrics}
    for path, handler in gets.items():
        app.add_api_route(path, handler, include_in_schema=path != "/", responses=failures())
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        responses=failures(400, 404, 408, 413, 415, 422, 500, 503, 504),
        openapi_extra=body(IMAGE),
    )
    app.add_api_route(
        "/tasks",
        service.add,
        methods=["POST"],
        status_code=201,
        dependencies=[TOKEN],
        responses=failures(400, 401, 408, 409, 413, 415, 422, 500, 503),
        openapi_extra=body(PATCH),
    )


def _check_type(request: Request, *wanted: str) -> str:
    """The content type of a body, which must be one of those that are wanted."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in wanted:
        either = " or ".join(wanted)
        raise HTTPException(415, f"the body has {given[:80] or 'no content type'}; send it with Content-Type: {either}")
    return given


def _single_field(form: FormData, name: str, kind: type[Field]) -> Field:
    """The value of a field that a form must have exactly once."""
    values = form.getlist(name)
    if len(values) != 1 or not isinstance(values[0], kind):
        wanted = "text" if kind is str else "a file"
        raise HTTPException(422, f"the form has {len(values)} fields {name!r}; send one, with {wanted}")
    return values[0]


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    reason = error.detail
    if reason == HTTPStatus(error.status_code).phrase:  # raised by the router
        request_line = f"{request.method} {request.url.path[:80]}"
        reason = f"{reason}: {request_line}; docs/howto/serving.md describes {', '.join(_PATHS)}"
    return error_response(error.status_code, reason, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this answer; the metrics count its status, which other servers use, too."""
    return Response(status_code=499)


async def _on_failure(request: Request, error: Exception) -> Response:
    """The answer where the program fails; the traceback goes to the log."""
    return error_response(500, "the server failed at this request; see its log")
