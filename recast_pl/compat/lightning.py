"""Uses of Lightning beyond its documented interface."""

from lightning import Trainer


def ignore_signals(trainer: Trainer) -> None:
    """Keeps a trainer from handling signals and from requeueing SLURM jobs.

    At SIGTERM, Lightning's handler would broadcast to the other processes in the middle of other communication, which
    can hang all of them. Under SLURM, it would write a checkpoint that every later task would be resumed from.

    A run of Lightning 2.6 calls `trainer._signal_connector.register_signal_handlers()` and registers nothing elsewhere.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
