"""Tables and figures about robustness: accuracy on worse images and under attack, and calibration."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from recast_pl.data.corruptions import CORRUPTIONS, JPEG, QUALITIES, RESOLUTION, RESOLUTIONS, SEVERITIES
from recast_pl.errors import RunError
from recast_pl.files import read_json
from recast_pl.reporting.board import Difference
from recast_pl.reporting.document import Block, Chart, DataTable, Paragraph, Text
from recast_pl.reporting.plots import Mark, Panel, plot_marks, plot_series
from recast_pl.reporting.tables import Cells, table_csv
from recast_pl.runs.metrics import Spread, spread
from recast_pl.runs.origin import Origin
from recast_pl.runs.robustness import CLEAN, FGSM, MEASURES, PGD


class TaskScores(TypedDict):
    """What was measured for one task; accuracies and calibration errors are in percent.

    `accuracy` is by kind of condition and level. `calibration` is before and after temperature scaling.
    """

    images: int
    temperature: float
    accuracy: dict[str, dict[str, float]]
    calibration: list[float]


class RunScores(TypedDict):
    """What was measured for one run.

    `calibration` is over the images of all tasks together, by severity, of which 0 is for images as they are, and for
    all severities.
    """

    folder: str
    task_parameters: int
    tasks: dict[str, TaskScores]
    calibration: dict[str, list[float]]


class Robustness(TypedDict):
    """The content of `robustness.json`: scores by run and seed, and differences to the baseline by run and measure.

    `images` is the limit for each task; None for none. `epsilons` are of 255 levels, `steps` are those of PGD. A
    difference has its `mean` and `interval`, in points.
    """

    baseline: str
    images: int | None
    epsilons: list[float]
    steps: int
    runs: dict[str, dict[str, RunScores]]
    differences: dict[str, dict[str, dict[str, Any]]]
    origin: Origin


def read_robustness(path: Path) -> Robustness:
    """Reads `robustness.json`; raises RunError if it is damaged."""
    return cast(Robustness, read_json(path, RunError, baseline=str, epsilons=list, runs=dict, differences=dict))


def task_accuracy(task: TaskScores, kinds: Iterable[str], level: str | None = None) -> float:
    """The mean accuracy of a task in percent under some kinds of conditions, at one level or at all."""
    scores = task["accuracy"]
    return statistics.fmean(v for kind in kinds for key, v in scores[kind].items() if level in (None, key))


def accuracy(run: RunScores, kinds: Sequence[str], level: str | None = None) -> float:
    """The mean over tasks of `task_accuracy`."""
    return statistics.fmean(task_accuracy(task, kinds, level) for task in run["tasks"].values())


_ERRORS = {  # key and position in `calibration`
    "ECE %": ("0", 0),
    "ECE with T %": ("0", 1),
    "ECE corrupted %": ("corrupted", 0),
    "ECE corrupted with T %": ("corrupted", 1),
}


def run_measures(run: RunScores) -> dict[str, float]:
    """The measures of one run in percent, by heading."""
    clean, corrupted, *others = ((f"{name} %", accuracy(run, kinds)) for name, kinds in MEASURES.items())
    kept = ("of clean %", 100 * corrupted[1] / clean[1] if clean[1] else 0.0)
    errors = ((heading, run["calibration"][key][place]) for heading, (key, place) in _ERRORS.items())
    return dict((clean, corrupted, kept, *others, *errors))


def corruption_error(content: Robustness, name: str) -> float | None:
    """The mean corruption error (mCE) of Hendrycks and Dietterich, 2019, section 4.1, in percent of the baseline.

    The error on each corruption, over all severities, is divided by that of the baseline; mCE is the mean of these
    fifteen ratios. None if the baseline makes no error on a corruption.
    """

    def error(name: str, kind: str) -> float:
        return 100 - statistics.fmean(accuracy(run, [kind]) for run in content["runs"][name].values())

    errors = [(error(name, kind), error(content["baseline"], kind)) for kind in CORRUPTIONS]
    return statistics.fmean(100 * ours / theirs for ours, theirs in errors) if all(t for _, t in errors) else None


def overview_cells(content: Robustness) -> Cells:
    """Makes the table of all runs."""
    rows, header = [], list[str]()
    for name, runs in content["runs"].items():
        found = [run_measures(run) for run in runs.values()]
        error = corruption_error(content, name)
        cells = {"mCE %": "–" if error is None else f"{error:.1f}"}
        cells |= {heading: str(spread([values[heading] for values in found])) for heading in found[0]}
        numbers = max(run["task_parameters"] for run in runs.values())
        header = list(cells)
        rows.append([name, str(len(runs)), f"{numbers:,}", *cells.values()])
    return ["run", "seeds", "numbers", *header], rows


def difference_cells(content: Robustness) -> Cells:
    """Makes the table of differences to the baseline."""
    rows = [
        [name, measure, str(Difference(**difference))]
        for name, differences in content["differences"].items()
        for measure, difference in differences.items()
    ]
    return ["run", "accuracy", f"minus {content['baseline']}, points"], rows


def corruption_cells(content: Robustness) -> Cells:
    """Makes the table of corruptions: the accuracy over all severities."""
    runs = content["runs"]
    rows = [[_spoken(kind), *(str(_spread(runs[name], [kind])) for name in runs)] for kind in CORRUPTIONS]
    return ["corruption", *runs], rows


def task_cells(content: Robustness) -> Cells:
    """Makes the table of tasks, with a row for each task and run."""
    rows = []
    for task in dict.fromkeys(
        task for runs in content["runs"].values() for run in runs.values() for task in run["tasks"]
    ):
        for name, runs in content["runs"].items():
            if found := [run for run in runs.values() if task in run["tasks"]]:
                rows.append([task, name, *_task_row([run["tasks"][task] for run in found])])
    return ["task", "run", "images", *(f"{measure} %" for measure in MEASURES), "T", "ECE %", "ECE with T %"], rows


def _task_row(found: Sequence[TaskScores]) -> list[str]:
    """Images, accuracies, temperature and calibration errors of a task; one entry for each seed."""
    accuracies = [spread([task_accuracy(task, kinds) for task in found]) for kinds in MEASURES.values()]
    errors = [spread([task["calibration"][place] for task in found]) for place in (0, 1)]
    images = f"{statistics.fmean(task['images'] for task in found):.0f}"
    return [images, *map(str, (*accuracies, spread([task["temperature"] for task in found]), *errors))]


def robustness_csv(content: Robustness) -> str:
    """Writes the accuracy of every run, seed and task under each condition as CSV."""
    rows = [
        [name, seed, task, kind, level, scores["images"], value]
        for name, runs in content["runs"].items()
        for seed, run in runs.items()
        for task, scores in run["tasks"].items()
        for kind, levels in scores["accuracy"].items()
        for level, value in levels.items()
    ]
    return table_csv(["run", "seed", "task", "condition", "level", "images", "accuracy"], rows)


def robustness_blocks(content: Robustness, file: str) -> Iterator[Block]:
    """Composes the tables and figures.

    Args:
        content: What was measured.
        file: Beginning of the file names of figures.
    """
    limit = "" if content["images"] is None else f", at most {content['images']} of each task"
    yield Paragraph([Text(_EXPLANATION.format(limit=limit, steps=content["steps"]))])
    yield _table(
        "Robustness of each run: means over tasks, calibration over the images of all tasks", overview_cells(content)
    )
    if content["differences"]:
        yield _table(f"Differences to {content['baseline']}, paired by image", difference_cells(content), 3)
    caption = "Accuracy on worse images and under attack, and calibration by severity of corruptions"
    yield Chart(file, caption, plot_series(_panels(content)))
    caption = "Accuracy by corruption, over all severities"
    marks = [
        Mark(name, _spoken(kind), _spread(runs, [kind]))
        for kind in CORRUPTIONS
        for name, runs in content["runs"].items()
    ]
    yield Chart(f"{file}_corruptions", caption, plot_marks(marks, "corruption", title=caption))
    yield _table("Accuracy by corruption in %, over all severities", corruption_cells(content))
    yield _table("Accuracy and calibration of each task", task_cells(content), 2)


_EXPLANATION = (
    "Accuracies are in percent, on the test images{limit}. Corrupted: the mean over the 15 common corruptions at five "
    "severities (Hendrycks and Dietterich, 2019). Of clean: its share of the accuracy on images as they are. mCE: the "
    "error on corruptions relative to that of the baseline. FGSM and PGD (steps: {steps}) change each channel of a "
    "pixel by at most ε/255; the columns are means over all ε. ECE: the expected calibration error in 15 bins, before "
    "and after temperature scaling (T) on validation images. Differences are paired by image, with 95 % confidence "
    "intervals over images; a run is better or worse only if the interval excludes 0."
)


def _table(caption: str, cells: Cells, text_columns: int = 1) -> DataTable:
    header, rows = cells
    return DataTable(caption, header, [[[Text(cell)] for cell in row] for row in rows], text_columns)


def _panels(content: Robustness) -> Iterator[Panel]:
    """Yields a panel for each way to make images worse, beside images as they are, and one for calibration."""
    runs, epsilons = content["runs"], content["epsilons"]
    ways: tuple[tuple[str, str, Sequence[str], Sequence[float], float], ...] = (
        ("corruptions", "severity", CORRUPTIONS, SEVERITIES, 0),
        ("FGSM", "ε × 255", (FGSM,), epsilons, 0),
        ("PGD", "ε × 255", (PGD,), epsilons, 0),
        ("low resolution", "share of the pixels on a side", (RESOLUTION,), RESOLUTIONS, 1),
        ("JPEG", "quality; 100: not compressed", (JPEG,), QUALITIES, 100),
    )
    for title, x, kinds, levels, unchanged in ways:
        marks = []
        for name, of_seeds in runs.items():
            marks.append(Mark(name, unchanged, _spread(of_seeds, (CLEAN.kind,))))
            marks += [Mark(name, level, _spread(of_seeds, kinds, f"{level:g}")) for level in levels]
        yield Panel(title, x, "accuracy (%)", marks)
    errors = [
        Mark(name, severity, spread([run["calibration"][str(severity)][0] for run in of_seeds.values()]))
        for name, of_seeds in runs.items()
        for severity in (0, *SEVERITIES)
    ]
    yield Panel("calibration", "severity of corruptions", "expected calibration error (%)", errors)


def _spread(runs: Mapping[str, RunScores], kinds: Sequence[str], level: str | None = None) -> Spread:
    return spread([accuracy(run, kinds, level) for run in runs.values()])


def _spoken(kind: str) -> str:
    return kind.replace("_", " ")
