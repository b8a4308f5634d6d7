"""Decides when results that cost time are made again."""

import time
from collections.abc import Callable

_SHARE = 20  # results take at most one part in so many of the time between two of them


class Pace:
    """Runs an action often, but so that it takes a bounded share of the time, however long it takes."""

    def __init__(self) -> None:
        self._next = 0.0

    def run(self, action: Callable[[], None]) -> None:
        """Runs the action, unless too little time has passed since it was run before."""
        started = time.monotonic()
        if started < self._next:
            return
        action()
        ended = time.monotonic()
        self._next = ended + (_SHARE - 1) * (ended - started)
