"""Fits of templates side by side: their diversity, their entropy and the similarity of coefficients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import RenderableType

from recast_pl.decomposition.analysis import analyze
from recast_pl.decomposition.bank import Decomposition
from recast_pl.files import write_atomic
from recast_pl.reporting.bank_figures import BANK_FIGURES, Banks, group_marks, mean_marks
from recast_pl.reporting.plots import plot_marks, write_figure
from recast_pl.reporting.published import MISSING
from recast_pl.reporting.tables import Cells, markdown_table, table_csv, terminal_table
from recast_pl.runs.folder import RunFolder
from recast_pl.studies.comparison import config_words
from recast_pl.studies.engines import Engine, run_unfinished


@dataclass(frozen=True)
class Fits:
    """Fits of templates by gradient in one folder, as FOLDER/NAME.

    Args:
        folder: Output folder.
        fits: The configs of each, by name.
        options: Further options of `fit`, for all fits.
    """

    folder: Path
    fits: Mapping[str, Sequence[str]]
    options: Sequence[str] = ()

    FILE: ClassVar[str] = "fits"
    """Name of the output files, without suffix."""

    def units(self) -> dict[str, list[str]]:
        """Returns the command line of each fit, by name; a fit that was interrupted starts over."""
        return {
            name: [
                "fit",
                *config_words(configs),
                *self.options,
                "--run_dir",
                str(self.folder / name),
                "--resume",
                "true",
            ]
            for name, configs in self.fits.items()
        }

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Fits what is not fitted, and writes table and figures; arguments as in `Study`."""
        status = run_unfinished(engine, self.units(), is_finished, lambda name: None)
        banks, cells = self._banks(), self._cells()
        write_atomic(self.folder / f"{self.FILE}.csv", table_csv(*cells))
        write_atomic(self.folder / f"{self.FILE}.md", markdown_table(cells))
        for key, (what, y, _) in BANK_FIGURES.items():
            for suffix, marks, x in (("", group_marks(banks, key), "group"), ("_mean", mean_marks(banks, key), "fit")):
                if marks:
                    write_figure(plot_marks(marks, x, y, what), self.folder / f"{self.FILE}_{key}{suffix}")
        return status

    @property
    def has_results(self) -> bool:
        """Returns whether any fit is finished."""
        return bool(self._banks())

    def table(self) -> RenderableType:
        """Returns the same table for the terminal: means over the groups of each fit."""
        return terminal_table(self._cells())

    def _banks(self) -> Banks:
        """Measures the groups of each finished fit."""
        files = {name: RunFolder(self.folder / name).decomposition for name in self.fits}
        return {
            name: analyze(Decomposition.load(file)).content()["groups"]
            for name, file in files.items()
            if file.is_file()
        }

    def _cells(self) -> Cells:
        banks = self._banks()
        means = {key: {mark.x: f"{mark.y.mean:.4f}" for mark in mean_marks(banks, key)} for key in BANK_FIGURES}
        rows = [
            [name, *(values.get(name, "–" if name in banks else MISSING) for values in means.values())]
            for name in self.fits
        ]
        return ["fit", *(y for _, y, _ in BANK_FIGURES.values())], rows
