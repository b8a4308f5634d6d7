"""Signals that end a run, heard so that what is learnt is kept."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interruption:
    """By which signal learning was interrupted; None if it was not."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ends what is within at Ctrl-C, SIGTERM and SIGHUP; the state after the last epoch has been kept by then."""
    interruption = Interruption()

    def interrupt(number: int, frame: object) -> None:
        interruption.signal = interruption.signal or number
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in numbers if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield interruption
    except BaseException:  # such as SystemExit, which the trainer makes of it, or that another process has gone
        if interruption.signal is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_main_process() -> bool:
    """Whether this process is the first, by what torchrun (which sets all of them) or Lightning and srun say."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)
