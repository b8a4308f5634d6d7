"""Signals that end a run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interruption:
    """The signal that ended a block; None if no signal did."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ends the block quietly at Ctrl-C, SIGTERM or SIGHUP; the state after the last epoch has been saved by then."""
    interruption = Interruption()

    def interrupt(number: int, frame: object) -> None:
        interruption.signal = interruption.signal or number
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows does not have it
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(hangup)
    in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    before = {number: signal.signal(number, interrupt) for number in numbers if in_main_thread}
    try:
        yield interruption
    except BaseException:  # Lightning converts the interrupt to SystemExit, and DDP processes fail when one ends
        if interruption.signal is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_main_process() -> bool:
    """Returns whether this is the first process of a run, by the variables of torchrun, srun and Lightning.

    Lightning's `rank_zero_only.rank` cannot tell before a trainer exists: it ignores NODE_RANK, so that the first
    process of every node counts as the first of all.
    """
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)
