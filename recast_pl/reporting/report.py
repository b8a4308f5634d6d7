"""Runs as a report: tables in the form of the paper's 1, 2, 4, 5 and 6, figures in that of its 3 to 10."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recast_pl.errors import RunError
from recast_pl.files import read_json
from recast_pl.reporting.document import Block, Cell, Grid, Heading, Items, Paragraph, Picture, Text
from recast_pl.reporting.measures import MEASURES, TASK_PARAMETERS, measures, sweep_marks, task_mean
from recast_pl.reporting.plots import Mark, plot_marks
from recast_pl.runs.collection import Collection, Run, Summary
from recast_pl.runs.metrics import Spread, spread

ANALYSIS = "analysis/analysis.json"
"""Of a run folder: `groups`, a list of template banks, each with a `name` that ends in `:NUMBER`, and its `frobenius`,
`entropy` and `similarity_mean`, as far as they have been measured."""

_FIGURES = {
    "frobenius": ("Figure 9a: diversity of templates", "mean Frobenius distance of templates"),
    "entropy": ("Figure 9b: versatility of templates", "mean entropy of singular values (nats)"),
    "similarity_mean": ("Figure 10: similarity of coefficients", "mean cosine similarity"),
}


def compose(collections: Sequence[Collection], folders: Sequence[Path], output: Path) -> list[Block]:
    """Says what runs have reached.

    Args:
        collections: The runs.
        folders: Where they were found, and results other than of streams are looked for.
        output: Folder of the report, from which links lead to the runs.

    Returns:
        The report.
    """
    count = sum(len(runs) for collection in collections for runs in collection.runs.values())
    facts = (
        f"{count} finished runs. Accuracies are those of the test images after the last task, in percent: mean and, of "
        "several seeds, sample standard deviation. Each row leads to its runs."
    )
    blocks: list[Block] = [Heading("Report", 1), Paragraph([Text(facts)])]
    unfinished = {run: why for collection in collections for run, why in collection.unfinished.items()}
    if unfinished:
        blocks += [Heading("Not finished"), Paragraph([Text("These runs are in no table and no figure.")])]
        names = {run: _to(run, output, str(run)) if run.is_dir() else Text(str(run)) for run in unfinished}
        blocks.append(Items([[names[run], Text(f": {why}")] for run, why in unfinished.items()]))
    for collection in collections:
        if collection.runs:
            blocks += _collection(collection, output)
    blocks += _by_backbone(collections)
    blocks += _reconstructions(folders, output)
    return blocks


def _collection(collection: Collection, output: Path) -> Iterator[Block]:
    yield Heading(str(collection.folder))
    backbones = dict.fromkeys(run.summary["backbone"] for runs in collection.runs.values() for run in runs)
    for backbone in backbones:
        chosen = {
            name: [run for run in runs if run.summary["backbone"] == backbone] for name, runs in collection.runs.items()
        }
        chosen = {name: runs for name, runs in chosen.items() if runs}
        yield _accuracies(collection, chosen, backbone, output)
        yield from _by_task(chosen, backbone, output)
    name = _file_name(collection.folder)
    if collection.x is not None:
        summaries = {point: [run.summary for run in runs] for point, runs in collection.runs.items()}
        marks = sweep_marks(collection.labels, summaries, collection.x, collection.series)
        if marks:
            sizes = "" if isinstance(marks[0].x, str) else "; larger markers train more numbers"
            caption = f"Accuracy by {collection.x.replace('_', ' ')}{sizes}"
            yield Picture(f"{name}_sweep", caption, plot_marks(marks, collection.x))
    elif len(collection.runs) > 1:
        yield _against_parameters(collection, name)
    yield from _by_reconstruction(collection, name)


def _accuracies(collection: Collection, chosen: Mapping[str, Sequence[Run]], backbone: str, output: Path) -> Grid:
    """In the form of tables 1 and 2: methods whose tasks share weights above, those that keep tasks apart below."""
    keys = list(dict.fromkeys(key for name in chosen for key in collection.labels.get(name, ())))
    shares = {name: any(run.summary.get("shared_bytes") for run in runs) for name, runs in chosen.items()}
    best = max(_accuracy(runs).mean for runs in chosen.values())
    rows: list[list[Cell]] = []
    for name in sorted(chosen, key=lambda name: not shares[name]):
        runs, labels = chosen[name], collection.labels.get(name, {})
        says = dict(zip(MEASURES, measures(_said(runs)), strict=True))
        strong = _accuracy(runs).mean == best
        rows.append(
            [
                [Text(name)],
                *([Text(str(labels.get(key, "")))] for key in keys),
                [Text(runs[0].summary["method"])],
                [Text("shared" if shares[name] else "apart")],
                *([Text(says[heading], None, strong and heading == _AVERAGE)] for heading in _COLUMNS),
                _links(runs, output),
            ]
        )
    header = ["run", *keys, "pieces", "tasks", *_COLUMNS, "seeds"]
    return Grid(f"Tables 1 and 2: accuracy on {short_name(backbone)}", header, rows, 3 + len(keys))


def _by_task(chosen: Mapping[str, Sequence[Run]], backbone: str, output: Path) -> Iterator[Grid]:
    """In the form of table 4; runs with other tasks, as of another order, in one table if only the order differs."""
    alike: dict[frozenset[str], dict[str, Sequence[Run]]] = {}
    for name, runs in chosen.items():
        alike.setdefault(frozenset(task["name"] for task in runs[0].summary["tasks"]), {})[name] = runs
    for points in alike.values():
        tasks = [task["name"] for task in next(iter(points.values()))[0].summary["tasks"]]
        values = {name: {task: _task_accuracy(runs, task) for task in tasks} for name, runs in points.items()}
        best = {task: max(values[name][task].mean for name in points) for task in tasks}
        rows = [
            [
                [Text(name)],
                *([Text(str(values[name][task]), None, values[name][task].mean == best[task])] for task in tasks),
                _links(runs, output),
            ]
            for name, runs in points.items()
        ]
        yield Grid(f"Table 4: accuracy on each task % on {short_name(backbone)}", ["run", *tasks, "seeds"], rows)


def _task_accuracy(runs: Sequence[Run], task: str) -> Spread:
    found = [dict(zip((t["name"] for t in r["tasks"]), r["accuracy_matrix"][-1], strict=True)) for r in _said(runs)]
    return spread([accuracies[task] for accuracies in found if task in accuracies])


def _against_parameters(collection: Collection, name: str) -> Picture:
    """In the form of figure 4, a mark for each method."""
    marks = [
        Mark(_family(runs[0]), _numbers(runs), _accuracy(runs), name=point) for point, runs in collection.runs.items()
    ]
    order = [family for family in _FAMILIES if any(mark.series == family for mark in marks)]
    marks.sort(key=lambda mark: order.index(mark.series))
    return Picture(
        f"{name}_parameters", "Figure 4: accuracy against what a task trains", plot_marks(marks, TASK_PARAMETERS)
    )


_FAMILIES = ("RECAST", "RECAST with an adapter", "others, tasks kept apart", "tasks share weights")


def _family(run: Run) -> str:
    pieces = run.summary["method"].split(" + ")
    if run.summary.get("shared_bytes"):
        return _FAMILIES[3]
    if "Recast" not in pieces:
        return _FAMILIES[2]
    return _FAMILIES[0] if len(pieces) == 1 else _FAMILIES[1]


def _by_reconstruction(collection: Collection, name: str) -> Iterator[Picture]:
    """In the form of figures 5, 6, 9 and 10."""
    fitted = {point: runs for point, runs in collection.runs.items() if _uses_fitted_templates(runs[0].folder)}
    if len(fitted) > 1:
        bars = [Mark("", point, _accuracy(runs)) for point, runs in fitted.items()]
        caption = "Figure 5: accuracy by how templates were made"
        yield Picture(f"{name}_reconstruction", caption, plot_marks(bars, "templates"))
    banks = {point: _analysed(runs[0].folder) for point, runs in collection.runs.items()}
    for key, (caption, y) in _FIGURES.items():
        measured = {point: [g for g in groups if g.get(key) is not None] for point, groups in banks.items()}
        measured = {point: groups for point, groups in measured.items() if groups}
        if measured:
            lines = [mark for point, groups in measured.items() for mark in _group_marks(point, groups, key)]
            yield Picture(f"{name}_{key}", f"{caption} by group", plot_marks(lines, "group", y))
            means = [Mark("", p, Spread(spread([g[key] for g in groups]).mean)) for p, groups in measured.items()]
            overall = f"Figure 6: {caption.partition(': ')[2]}, over all groups"
            yield Picture(f"{name}_{key}_mean", overall, plot_marks(means, "templates", y))


def _group_marks(point: str, banks: Sequence[Mapping[str, Any]], key: str) -> list[Mark]:
    """A mark for each number of group, over the kinds of layers."""
    by_number: dict[int, list[float]] = {}
    for bank in banks:
        by_number.setdefault(int(bank["name"].rpartition(":")[2]), []).append(bank[key])
    return [Mark(point, number, Spread(spread(values).mean)) for number, values in by_number.items()]


def _by_backbone(collections: Sequence[Collection]) -> Iterator[Block]:
    """In the form of figure 3: methods learnt on several backbones, each comparison with one."""
    found: dict[tuple[str, str], list[Run]] = {}
    for collection in collections:
        for name, runs in collection.runs.items() if collection.x is None else ():
            for run in runs:
                found.setdefault((name, short_name(run.summary["backbone"])), []).append(run)
    backbones = list(dict.fromkeys(backbone for _, backbone in found))
    several = {name for name, _ in found if sum(other == name for other, _ in found) > 1}
    if several:
        marks = [Mark(n, b, _accuracy(found[n, b])) for b in backbones for n in several if (n, b) in found]
        marks.sort(key=lambda mark: mark.series)
        yield Heading("Backbones")
        yield Picture("backbones", "Figure 3: accuracy by backbone", plot_marks(marks, "backbone"))


def _reconstructions(folders: Sequence[Path], output: Path) -> Iterator[Block]:
    """In the form of tables 5 and 6."""
    fits, checks = _results(folders, "mimicry.json"), _results(folders, "imagenet.json")
    if fits or checks:
        yield Heading("Reconstruction")
    if fits:
        rows = [[_link(path, output), *_cells(facts, _RESOURCES.values())] for path, facts in fits.items()]
        yield Grid("Table 5: what fitting templates takes", ["run", *_RESOURCES], rows, 2)
    if checks:
        rows = [[_link(path, output), *_cells(facts, _IMAGENET.values())] for path, facts in checks.items()]
        yield Grid("Table 6: the pretrained classifier, dense and decomposed", ["run", *_IMAGENET], rows, 2)


Format = Callable[[Mapping[str, Any]], str]


def _number(key: str, digits: int, factor: float = 1) -> Format:
    """How a number is said; a dash where it was not measured."""
    return lambda facts: "–" if facts.get(key) is None else f"{factor * facts[key]:,.{digits}f}"


_RESOURCES: dict[str, Format] = {
    "backbone": lambda facts: short_name(facts["backbone"]),
    "weights": _number("weights", 0),
    "peak GPU memory (GB)": _number("gpu_gigabytes", 2),
    "cores busy (%)": _number("cpu_percent", 1),
    "ms per epoch": lambda facts: f"{1000 * facts['seconds'] / max(1, facts['epochs']):,.1f}",
    "epochs": _number("epochs", 0),
    "seconds": _number("seconds", 1),
    "similarity (%)": _number("similarity", 2, 100),
}

_IMAGENET: dict[str, Format] = {
    "backbone": lambda facts: short_name(facts["backbone"]),
    "images": _number("images", 0),
    "dense top-1 (%)": _number("dense_accuracy", 2),
    "decomposed top-1 (%)": _number("decomposed_accuracy", 2),
    "equal predictions (%)": _number("agreement", 2),
    "similarity (%)": _number("similarity", 2, 100),
}

_AVERAGE = "average accuracy %"

_COLUMNS = [heading for heading in MEASURES if heading != "seeds"]  # which are named one by one


def _results(folders: Sequence[Path], name: str) -> dict[Path, dict[str, Any]]:
    paths = sorted({path for folder in folders for path in folder.rglob(name)})
    return {path: read_json(path, RunError, backbone=str) for path in paths}


def _cells(facts: Mapping[str, Any], formats: Iterable[Format]) -> list[Cell]:
    return [[Text(say(facts))] for say in formats]


def _uses_fitted_templates(run: Path) -> bool:
    """Whether a run took its templates from a file."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        pieces = config["model"]["init_args"]["pieces"]
        return any((piece.get("init_args") or {}).get("decomposition") for piece in pieces)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False  # a run made from Python has no config.yaml


def _analysed(run: Path) -> list[dict[str, Any]]:
    """Template banks of a run, as far as it has been analysed."""
    path = run / ANALYSIS
    return list(read_json(path, RunError, groups=list)["groups"]) if path.is_file() else []


def short_name(backbone: str) -> str:
    """The name of a backbone, without the module it is made in."""
    return backbone.rpartition(".")[2] if backbone.startswith("recast_pl.") else backbone


def _said(runs: Sequence[Run]) -> list[Summary]:
    return [run.summary for run in runs]


def _accuracy(runs: Sequence[Run]) -> Spread:
    return spread([summary["average_accuracy"] for summary in _said(runs)])


def _numbers(runs: Sequence[Run]) -> float:
    return task_mean("task_parameters")(_said(runs))


def _file_name(folder: Path) -> str:
    return folder.resolve().name or "runs"


def _links(runs: Sequence[Run], output: Path) -> Cell:
    """Each seed, leading to its run."""
    links = [_to(run.folder / "summary.json", output, str(run.summary["seed"])) for run in runs]
    return [part for link in links for part in (Text(" "), link)][1:]


def _link(path: Path, output: Path) -> Cell:
    return [_to(path, output, path.parent.name)]


def _to(path: Path, output: Path, text: str) -> Text:
    return Text(text, Path(os.path.relpath(path.resolve(), output.resolve())).as_posix())
