"""How the results of a stream are shown."""

from typing import Protocol

from recast_pl.runs.folder import Record, RunFolder, Summary


class Presentation(Protocol):
    """Shows the results of a stream; called on the main process only."""

    def write_task(self, folder: RunFolder, name: str, record: Record) -> None:
        """Writes pictures of the results of one task, when it is trained; NAME is that of its files."""

    def write(self, folder: RunFolder, summary: Summary) -> None:
        """Writes tables and pictures of all results, before `summary.json` is written."""

    def show(self, summary: Summary) -> None:
        """Shows the results once all tasks are trained."""
