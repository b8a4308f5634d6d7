"""What is let in: requests to known hosts from the server's own pages, of bounded size and in bounded time."""

import asyncio
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recast_pl.inference.server.limits import Limits

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""What a server is called by programs of its own machine."""

_BODIES = 16  # of the greatest size; so many bytes of requests are held at a time


def failure(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """Tells what is wrong, as JSON.

    Args:
        status: Of HTTP.
        reason: What is wrong, and what to do.
        headers: More headers; None for no more.
    """
    return JSONResponse({"error": reason}, status, headers)


class Gate:
    """Refuses requests before they are read, or while they are.

    Args:
        app: What is behind the gate.
        limits: Bytes and seconds that a request may take.
        hosts: Names that requests may be addressed to, which keeps pages of other sites from reaching a local server
            by a name of their own; with `*`, any.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Collection[str]) -> None:
        self._app, self._limits, self._hosts = app, limits, hosts
        self._held = 0  # bytes of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or says why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal:
            await refusal(scope, receive, send)
            return
        size, deadline = 0, asyncio.get_running_loop().time() + self._limits.timeout

        async def bounded() -> Message:
            nonlocal size
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as cause:
                raise HTTPException(
                    408, f"the request did not arrive in {self._limits.timeout:g} seconds; send it faster"
                ) from cause
            count = len(message.get("body", b""))
            size += count
            self._held += count
            if size > self._limits.max_body:
                raise HTTPException(413, _too_large(self._limits))
            if self._held > _BODIES * self._limits.max_body:
                raise HTTPException(503, "too many large requests arrive at once; come back", {"Retry-After": "1"})
            return message

        try:
            await self._app(scope, bounded, send)
        finally:
            self._held -= size

    def _refusal(self, headers: Headers) -> Response | None:
        """What headers alone are refused for."""
        host = headers.get("host", "")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            return failure(403, f"host {host[:80]!r} is not served; start the server with --allowed_hosts to allow it")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return failure(403, f"requests of pages of {origin[:80]!r} are refused; use the server's own page")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body:
            return failure(413, _too_large(self._limits))
        return None


def _too_large(limits: Limits) -> str:
    return f"the request is larger than {limits.max_body} bytes; send a smaller file"


def _host_name(host: str) -> str | None:
    """The name in a `Host` header, without the port; None if there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
