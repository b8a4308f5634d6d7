"""Uses of uvicorn beyond its documented interface; needs the extra `serve`."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_FULL = b'{"error":"too many connections are open; try again later"}'

_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes the connections of clients that send nothing or read nothing, and those above a number.

    uvicorn itself waits for both without a limit. Each connection is looked at every `timeout_keep_alive` seconds.
    uvicorn's `limit_concurrency` refuses requests, but keeps the connections open; here it refuses connections.

    `H11Protocol` of uvicorn 0.38 to 0.54 keeps the current request in `cycle` (None before the first), the state of
    the output buffer in `flow.write_paused`, and has `loop`, `transport`, `connections`, `limit_concurrency` and
    `timeout_keep_alive`.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer of the connection."""
        super().connection_made(transport)
        most, self.limit_concurrency = self.limit_concurrency, None
        if most is not None and len(self.connections) > most:
            transport.write(_REFUSAL)
            transport.close()
        self._start_timer(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def _start_timer(self, last: RequestResponseCycle | None) -> None:
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._check, last)

    def _check(self, last: RequestResponseCycle | None) -> None:
        """Aborts the connection if, since the timer started, no request came or no part of the answer was read."""
        idle = last is None or last.response_complete or self.flow.write_paused
        if self.cycle is last and idle:
            self.transport.abort()  # `close` would wait until the client has read the answer
        else:
            self._start_timer(self.cycle)
