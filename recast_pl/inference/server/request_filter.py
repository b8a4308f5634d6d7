"""Requests that the server accepts: to known hosts, from its own pages, of bounded size, in bounded time."""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recast_pl.inference.server.limits import Limits

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Host names by which programs on the same machine reach a server."""

PAGE_NAME = "recast_pl"
"""What the server's own page sends as `X-Requested-With`."""

_BODIES = 16  # all requests together may hold this many bodies of the largest size

_DROPPING = 2.0  # seconds in which the body of a refused request may arrive


def error_response(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """An error as JSON: `reason` tells the problem and the remedy, `headers` are added to the usual ones."""
    return JSONResponse({"error": reason}, status, headers)


class RequestFilter:
    """ASGI middleware that refuses requests before they are read, or while they are read.

    Starlette's TrustedHostMiddleware would check the hosts, too. But its answer names no remedy, only its recent
    versions understand IPv6 addresses, and the check of the origin needs the host anyway.

    Args:
        app: The application that answers the other requests.
        limits: Bytes and seconds that a request may take.
        hosts: Host names that requests may be addressed to; `*` allows all. They keep web pages of other sites from
            reaching a local server through a host name of their own (DNS rebinding).
        origins: Origins of other sites whose pages may send requests; `*` allows all.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Collection[str], origins: Collection[str] = ()) -> None:
        self._app, self._limits, self._hosts, self._origins = app, limits, hosts, origins
        self._held = 0  # bytes of all requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(headers):
            if "expect" not in headers:  # a client that sends this waits for the answer
                await _drop_body(receive, _BODIES * self._limits.max_body)
            await refusal(scope, receive, send)
            return
        size, complete, deadline = 0, False, asyncio.get_running_loop().time() + self._limits.timeout

        async def receive_bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()  # which tells when the client leaves
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as cause:
                reason = f"the request did not arrive in {self._limits.timeout:g} seconds; send it faster"
                raise HTTPException(408, reason) from cause
            complete = not message.get("more_body", False)
            count = len(message.get("body", b""))
            size += count
            self._held += count
            if size > self._limits.max_body:
                raise HTTPException(413, _too_large(self._limits))
            if self._held > _BODIES * self._limits.max_body:
                reason = "the server receives too many large requests at once; try again later"
                raise HTTPException(503, reason, {"Retry-After": "1"})
            return message

        try:
            await self._app(scope, receive_bounded, send)
        finally:
            self._held -= size

    def _refusal(self, headers: Headers) -> Response | None:
        """The answer to a request that its headers alone give reason to refuse; None for other requests."""
        host, origin, length = headers.get("host", ""), headers.get("origin"), headers.get("content-length", "0")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            reason = f"host {host[:80]!r} is not allowed; allow it by --allowed_hosts (or hosts= of create_app)"
            return error_response(403, reason)
        if not (origin is None or self._allows(origin) or origin.partition("://")[2] == host or _is_own_page(headers)):
            reason = (
                f"requests from pages of {origin[:80]!r} are refused; use the server's own page, or allow theirs by "
                "--allowed_origins (or origins= of create_app)"
            )
            return error_response(403, reason)
        if length.isdecimal() and int(length) > self._limits.max_body:
            return error_response(413, _too_large(self._limits))
        return None

    def _allows(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins


async def _drop_body(receive: Receive, most: int) -> None:
    """Reads the rest of a body, up to `most` bytes and for a short time.

    A proxy that is still sending when the server answers and closes reports a fault of the server, not the answer.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _is_own_page(headers: Headers) -> bool:
    """Whether a page of the server's own site sent a request, also if a proxy has replaced the host.

    No page can set the first header; browsers leave it out where the connection is not secure. Before a page of another
    site can send the second one, the browser asks the server, which does not allow it.
    """
    return headers.get("sec-fetch-site") == "same-origin" or headers.get("x-requested-with") == PAGE_NAME


def _too_large(limits: Limits) -> str:
    return f"the request is larger than {limits.max_body} bytes; send a smaller file"


def _host_name(host: str) -> str | None:
    """The name in a `Host` header, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
