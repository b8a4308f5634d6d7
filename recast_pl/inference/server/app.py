"""The server as an ASGI application."""

from collections.abc import Collection
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.docs_page import add_docs
from recast_pl.inference.server.limits import Limits
from recast_pl.inference.server.request_filter import LOCAL_HOSTS, RequestFilter, error_response
from recast_pl.inference.server.request_log import REQUEST_ID, RequestLog
from recast_pl.inference.server.schema import IMAGE, OPTIONS, PATCH, TOKEN, body, failures
from recast_pl.inference.server.service import Service
from recast_pl.inference.server.task_changes import Forget, Keep, TaskChanges

_PATHS = ("/", "/predict", "/tasks", "/drift", "/health", "/ready", "/metrics", "/docs")


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] = LOCAL_HOSTS,
    keep: Keep | None = None,
    forget: Forget | None = None,
    origins: Collection[str] = (),
    root_path: str = "",
) -> FastAPI:
    """Makes the ASGI application, for any ASGI server that uses a single process.

    Args:
        predictor: The tasks.
        limits: Limits of the load; None for the defaults of `Limits`.
        token: Clients that add or delete tasks must send it as `Authorization: Bearer TOKEN`; None if none may.
        hosts: Host names that requests may be addressed to; `*` allows all.
        keep: Stores a task that a client has added, from its patch, the patch's file and that of the signature (None if
            there is none); None to keep it in memory only.
        forget: Deletes what `keep` has stored of a task, by its name; returns False if it has stored no such task. None
            if nothing is stored.
        origins: Origins whose pages may use the server, such as `https://www.example.org`; `*` allows all.
        root_path: The path under which a proxy shows the server, such as `/recast`; empty if it is the root. The proxy
            may pass it on or remove it. Where the application is mounted in another one, leave it empty.

    Returns:
        The application: `POST /predict`, `GET` and `POST /tasks`, `DELETE /tasks/NAME`, `GET /drift`, `/health`,
        `/ready`, `/metrics` and `/docs`, and a web page at `/`.
    """
    limits = limits or Limits()
    service = Service(predictor, limits, TaskChanges(predictor, token, keep, forget))
    app = FastAPI(
        title="recast_pl",
        lifespan=lambda _: service.running(),
        root_path=root_path.rstrip("/"),
        docs_url=None,  # this page and the next would fetch scripts from other servers; see add_docs
        redoc_url=None,
        exception_handlers={HTTPException: _on_http_error, ClientDisconnect: _on_disconnect},
    )
    _add_routes(app, service)
    add_docs(app)
    app.add_middleware(RequestFilter, limits=limits, hosts=hosts, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(RequestLog, metrics=service.counts, paths=_PATHS)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    gets = {"/": service.page, "/tasks": service.tasks, "/drift": service.drift, "/health": service.health}
    gets |= {"/ready": service.ready, "/metrics": service.metrics}
    for path, handler in gets.items():
        statuses = (503,) if path == "/ready" else ()
        app.add_api_route(path, handler, include_in_schema=path != "/", responses=failures(*statuses))
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        responses=failures(400, 404, 408, 413, 415, 422, 500, 503, 504),
        openapi_extra=body(IMAGE) | {"parameters": OPTIONS},
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
    app.add_api_route(
        "/tasks/{name}",
        service.remove,
        methods=["DELETE"],
        dependencies=[TOKEN],
        responses=failures(401, 404, 409, 422, 500),
    )


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    reason = error.detail
    if reason == HTTPStatus(error.status_code).phrase:  # raised by the router
        request_line = f"{request.method} {request.url.path[:80]}"
        reason = f"{reason}: {request_line}; docs/howto/serving.md describes {', '.join(_PATHS)}"
    return error_response(error.status_code, reason, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this answer; the metrics count its status, which other servers use, too."""
    return Response(status_code=499)
