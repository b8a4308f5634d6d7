"""What is recorded of each request: its identifier, a line in the log, and metrics."""

import logging
import re
import time
from collections.abc import Collection
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recast_pl.inference.server.metrics import Metrics
from recast_pl.inference.server.request_filter import error_response

REQUEST_ID = "X-Request-ID"
"""The header with the identifier of a request, which the answer has, too."""

ACCESS_LOG = "recast_pl.access"
"""Name of the logger that gets a line for each request."""

_IDENTIFIER = re.compile(r"[\w.:+/=-]{1,100}", re.ASCII)

_log = logging.getLogger(ACCESS_LOG)


class RequestLog:
    """ASGI middleware that names, logs, counts and times requests, and answers where the program fails.

    A client or proxy may name a request itself, by `X-Request-ID`.

    Args:
        app: The application.
        metrics: The metrics to update.
        paths: Paths that are counted one by one; all others are counted together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and records its status and time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        identifier = given if _IDENTIFIER.fullmatch(given) else uuid4().hex
        status, start = 0, time.perf_counter()

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = identifier
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception:  # its traceback goes to the log of the ASGI server
            if not status:
                answer = error_response(500, "the server failed at this request; see its log")
                await answer(scope, receive, send_observed)
            raise
        finally:
            self._record(scope, status or 500, time.perf_counter() - start, identifier)

    def _record(self, scope: Scope, status: int, seconds: float, identifier: str) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of an application that is mounted in another
        kind = path if path in self._paths else "/tasks/{name}" if path.startswith("/tasks/") else "other"
        self._metrics.requests.labels(kind, status).inc()
        self._metrics.seconds.labels(kind).observe(seconds)
        shown = scope["path"].encode("unicode_escape").decode()[:200]  # on one line, whatever the client sends
        _log.info("%s %s %d %.0f ms %s", scope["method"], shown, status, 1000 * seconds, identifier)
