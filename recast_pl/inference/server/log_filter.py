"""A log that stays short, however often something fails."""

import errno
import logging
import time

_PAUSE = 10.0  # seconds

_KINDS = 100  # of messages that are remembered


class LogFilter(logging.Filter):
    """Passes on one message of each kind every ten seconds, so that a failure that repeats does not fill the log.

    Messages are of the same kind if their first lines and the types of their exceptions are equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[tuple[str, object], float] = {}
        self._hidden: dict[tuple[str, object], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Decides about a message; says how many were left out since the last one of its kind."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            record.msg = f"too many connections are open ({error.strerror}); new ones wait; raise the limit, ulimit -n"
            record.args = record.exc_info = None
        kind = str(record.msg).partition("\n")[0], type(error)
        now = time.monotonic()
        if now - self._shown.get(kind, -_PAUSE) < _PAUSE:
            self._hidden[kind] = self._hidden.get(kind, 0) + 1
            return False
        if len(self._shown) >= _KINDS:
            self._shown.clear()
            self._hidden.clear()
        self._shown[kind] = now
        if hidden := self._hidden.pop(kind, 0):
            record.msg = f"{record.msg}\n({hidden:,} more such messages were left out)"
        return True


class RateFilter(logging.Filter):
    """Passes on at most so many messages in a second, and says how many were left out.

    Args:
        most: Messages in a second.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._second, self._count = most, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Decides about a message."""
        second = int(time.monotonic())
        if second != self._second:
            if (hidden := self._count - self._most) > 0:
                record.msg = f"({hidden:,} more were left out)\n{record.msg}"
            self._second, self._count = second, 0
        self._count += 1
        return self._count <= self._most
