"""The report on runs: tables 1, 2, 4, 5 and 6 and figures 3 to 10 in the form of the paper's, and results by class."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from recast_pl.errors import RunError
from recast_pl.files import read_json
from recast_pl.reporting.bank_figures import BANK_FIGURES, group_marks, mean_marks
from recast_pl.reporting.class_blocks import class_blocks
from recast_pl.reporting.document import Block, Bullets, Chart, DataTable, Heading, Line, Paragraph, Text
from recast_pl.reporting.measures import AVERAGE, TASK_PARAMETERS, known_measures, measures, sweep_marks, task_mean
from recast_pl.reporting.plots import Mark, plot_marks
from recast_pl.reporting.published import published_tables
from recast_pl.reporting.robustness import read_robustness, robustness_blocks
from recast_pl.runs.collection import Collection, Run
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.layout import parse_yaml
from recast_pl.runs.metrics import Spread, final_accuracies, spread
from recast_pl.runs.origin import Origin, origin

_FAMILIES = ("RECAST", "RECAST with an adapter", "others, tasks kept apart", "tasks share weights")


def compose(collections: Sequence[Collection], folders: Sequence[Path], output: Path) -> list[Block]:
    """Composes the report.

    Args:
        collections: The runs.
        folders: Folders to search for results of template fits and of the ImageNet check.
        output: Folder of the report; links to the runs are relative to it.
    """
    count = sum(len(runs) for collection in collections for runs in collection.runs.values())
    facts = (
        f"{count} finished {'run' if count == 1 else 'runs'}. Accuracies are measured on the test images after the "
        "last task, in percent: the mean and, for several seeds, the sample standard deviation. "
        "Each row links to its runs."
    )
    now = origin()
    written = f"Written on {_date(now)} with {_versions(now)}, on {now['machine']}."
    title = f"Report on {', '.join(folder.resolve().name for folder in folders)}"
    blocks: list[Block] = [Heading(title, 1), Paragraph([Text(facts)]), Paragraph([Text(written)])]
    unfinished = {run: why for collection in collections for run, why in collection.unfinished.items()}
    if unfinished:
        blocks += [Heading("Not finished"), Paragraph([Text("No table and no figure includes these runs.")])]
        names = {run: _link(run, output, str(run)) if run.is_dir() else Text(str(run)) for run in unfinished}
        blocks.append(Bullets([[names[run], Text(f": {why}")] for run, why in unfinished.items()]))
    for collection, file in zip(collections, _file_names(collections), strict=True):
        if collection.runs:
            blocks += _collection(collection, file, output)
    return [*blocks, *_by_backbone(collections), *_reconstructions(folders, output), *_robustness(folders)]


def _collection(collection: Collection, file: str, output: Path) -> Iterator[Block]:
    """Yields the blocks of a collection, whose figures have file names that begin with `file`."""
    name = collection.folder.resolve().name or "runs"
    yield Heading(str(collection.folder))
    by_backbone: dict[str, dict[str, list[Run]]] = {}
    for point, runs in collection.runs.items():
        for run in runs:
            by_backbone.setdefault(run.summary["backbone"], {}).setdefault(point, []).append(run)
    for backbone, chosen in by_backbone.items():
        yield _accuracies(collection, chosen, f"{name} on {_short_name(backbone)}", output)
        yield from _by_task(chosen, f"{name} on {_short_name(backbone)}", output)
        yield from _one_label_space(chosen, f"{name} on {_short_name(backbone)}")
    yield from _beside_published(collection, name)
    if collection.x is not None:
        summaries = {point: [run.summary for run in runs] for point, runs in collection.runs.items()}
        marks = sweep_marks(collection.labels, summaries, collection.x, collection.series)
        if marks:
            sizes = "" if isinstance(marks[0].x, str) else "; larger markers train more numbers"
            caption = f"{name}: average accuracy by {collection.x.replace('_', ' ')}{sizes}"
            yield _chart(f"{file}_sweep", caption, marks, collection.x)
    elif len(collection.runs) > 1:
        yield _against_parameters(collection, name, file)
    yield from _by_reconstruction(collection, name, file)
    for index, (backbone, chosen) in enumerate(by_backbone.items()):
        yield from class_blocks(chosen, f"{name} on {_short_name(backbone)}", f"{file}_{index}")
    yield from _origins(collection, name, output)


def _file_names(collections: Sequence[Collection]) -> list[str]:
    """Names each collection by its folder, for files; no two are equal, and none needs quotes."""
    names: list[str] = []
    for collection in collections:
        plain = re.sub(r"\W+", "_", collection.folder.resolve().name, flags=re.ASCII).strip("_") or "runs"
        candidates = (plain if count == 1 else f"{plain}_{count}" for count in range(1, len(names) + 2))
        names.append(next(name for name in candidates if name.casefold() not in map(str.casefold, names)))
    return names


def _chart(file: str, caption: str, marks: Sequence[Mark], x: str, y: str = "average accuracy (%)") -> Chart:
    return Chart(file, caption, plot_marks(marks, x, y, caption))


def _origins(collection: Collection, name: str, output: Path) -> Iterator[DataTable]:
    """When, where and with what each run was trained, as its latest record says."""
    rows: list[list[Line]] = []
    for point, runs in collection.runs.items():
        for run in runs:
            records = [files.load_record() for files in run.folder.finished().values()] if run.folder.is_trained else []
            if made := [record["origin"] for record in records if "origin" in record]:
                last = max(made, key=lambda facts: facts["date"])
                facts = [_date(last), _versions(last), last["machine"]]
                rows.append([[Text(point)], _seed_links([run], output), *([Text(fact)] for fact in facts)])
    if rows:
        yield DataTable(f"{name}: origin of the runs", ["run", "seed", "trained", "versions", "machine"], rows, 5)


def _date(made: Origin) -> str:
    return made["date"].replace("T", " ")[:16]


def _versions(made: Origin) -> str:
    return ", ".join(f"{package} {version}" for package, version in made["versions"].items())


def _accuracies(collection: Collection, chosen: Mapping[str, Sequence[Run]], what: str, output: Path) -> DataTable:
    """Tables 1 and 2: methods whose tasks share weights come first, then methods that keep tasks apart."""
    keys = list(dict.fromkeys(key for name in chosen for key in collection.labels.get(name, ())))
    shares = {name: any(run.summary.get("shared_bytes") for run in runs) for name, runs in chosen.items()}
    best = max(_accuracy(runs).mean for runs in chosen.values())
    values = {name: measures([run.summary for run in runs]) for name, runs in chosen.items()}
    columns = [heading for heading in known_measures(values.values()) if heading != "seeds"]  # which the last one lists
    rows: list[list[Line]] = []
    for name in sorted(chosen, key=lambda name: not shares[name]):
        runs, labels = chosen[name], collection.labels.get(name, {})
        strong = _accuracy(runs).mean == best
        texts = [name, *(str(labels.get(key, "")) for key in keys), runs[0].summary["method"]]
        rows.append(
            [
                *([Text(text)] for text in (*texts, "shared" if shares[name] else "apart")),
                *([Text(values[name][heading], None, strong and heading == AVERAGE)] for heading in columns),
                _seed_links(runs, output),
            ]
        )
    header = ["run", *keys, "pieces", "tasks", *columns, "seeds"]
    caption = f"{what}: accuracy and size of each run (tables 1 and 2 of the paper)"
    return DataTable(caption, header, rows, 3 + len(keys))


def _by_task(chosen: Mapping[str, Sequence[Run]], what: str, output: Path) -> Iterator[DataTable]:
    """Table 4: one table for each set of tasks; the order of tasks may differ within a table."""
    by_tasks: dict[frozenset[str], dict[str, Sequence[Run]]] = {}
    for name, runs in chosen.items():
        by_tasks.setdefault(frozenset(task["name"] for task in runs[0].summary["tasks"]), {})[name] = runs
    for points in by_tasks.values():
        tasks = [task["name"] for task in next(iter(points.values()))[0].summary["tasks"]]
        values = {name: {task: _task_accuracy(runs, task) for task in tasks} for name, runs in points.items()}
        best = {task: max(values[name][task].mean for name in points) for task in tasks}
        rows = [
            [
                [Text(name)],
                *([Text(str(values[name][task]), None, values[name][task].mean == best[task])] for task in tasks),
                _seed_links(runs, output),
            ]
            for name, runs in points.items()
        ]
        caption = f"{what}: accuracy on each task in % (table 4 of the paper)"
        yield DataTable(caption, ["run", *tasks, "seeds"], rows)


def _one_label_space(chosen: Mapping[str, Sequence[Run]], what: str) -> Iterator[DataTable]:
    """Accuracy among the classes of all tasks at the end, of runs that measured it, by `evaluation: class`."""
    found = {
        name: [run.summary["class_accuracies"] for run in runs if "class_accuracies" in run.summary]
        for name, runs in chosen.items()
    }
    found = {name: curves for name, curves in found.items() if curves}
    if found:
        header = list(dict.fromkeys(key for curves in found.values() for curve in curves for key in curve))
        values = {n: {key: [c[key][-1] for c in curves if key in c] for key in header} for n, curves in found.items()}
        rows = [
            [[Text(cell)] for cell in (name, *(str(spread(of_key)) if of_key else "" for of_key in row.values()))]
            for name, row in values.items()
        ]
        yield DataTable(f"{what}: accuracy over the classes of all tasks in %", ["run", *header], rows)


def _beside_published(collection: Collection, name: str) -> Iterator[DataTable]:
    """Tables 1, 2 and 4 beside what the paper prints; rows without runs say that they are missing."""
    points = {point: (labels, collection.published.get(point, {})) for point, labels in collection.labels.items()}
    summaries = {point: [run.summary for run in runs] for point, runs in collection.runs.items()}
    captions = {"published": "average accuracy", "tasks": "accuracy on each task"}
    for what, (header, rows) in published_tables(points, summaries, collection.seeds).items():
        cells: list[list[Line]] = [[[Text(cell)] for cell in row] for row in rows]
        yield DataTable(f"{name}: {captions[what]} beside the published values", list(header), cells)


def _task_accuracy(runs: Sequence[Run], task: str) -> Spread:
    finals = [final_accuracies(run.summary) for run in runs]
    return spread([final[task] for final in finals if task in final])


def _against_parameters(collection: Collection, name: str, file: str) -> Chart:
    """Figure 4: a point for each method."""
    marks = []
    for point, runs in collection.runs.items():
        numbers = task_mean([run.summary for run in runs], TASK_PARAMETERS)
        marks.append(Mark(_family(runs[0]), numbers, _accuracy(runs), name=point))
    marks.sort(key=lambda mark: _FAMILIES.index(mark.series))
    caption = f"{name}: average accuracy against the count of numbers that a task trains (figure 4 of the paper)"
    return _chart(f"{file}_parameters", caption, marks, TASK_PARAMETERS)


def _family(run: Run) -> str:
    pieces = run.summary["method"].split(" + ")
    if run.summary.get("shared_bytes"):
        return _FAMILIES[3]
    if "Recast" not in pieces:
        return _FAMILIES[2]
    return _FAMILIES[0] if len(pieces) == 1 else _FAMILIES[1]


def _by_reconstruction(collection: Collection, name: str, file: str) -> Iterator[Chart]:
    """Figures 5, 6, 9 and 10."""
    fitted = {point: runs for point, runs in collection.runs.items() if _uses_fitted_templates(runs[0].folder)}
    if len(fitted) > 1:
        bars = [Mark("", point, _accuracy(runs)) for point, runs in fitted.items()]
        caption = f"{name}: average accuracy by how templates were made (figure 5 of the paper)"
        yield _chart(f"{file}_reconstruction", caption, bars, "templates")
    banks = {point: _analysed_groups(runs[0].folder) for point, runs in collection.runs.items()}
    for key, (what, y, number) in BANK_FIGURES.items():
        if lines := group_marks(banks, key):
            caption = f"{name}: {what} by group (figure {number} of the paper)"
            yield _chart(f"{file}_{key}", caption, lines, "group", y)
            overall = f"{name}: {what}, mean over all groups (figure 6 of the paper)"
            yield _chart(f"{file}_{key}_mean", overall, mean_marks(banks, key), "templates", y)


def _by_backbone(collections: Sequence[Collection]) -> Iterator[Block]:
    """Figure 3: methods that were trained on several backbones, each in its own comparison."""
    found: dict[tuple[str, str], list[Run]] = {}
    for collection in collections:
        for name, runs in collection.runs.items() if collection.x is None else ():
            for run in runs:
                found.setdefault((name, _short_name(run.summary["backbone"])), []).append(run)
    backbones = list(dict.fromkeys(backbone for _, backbone in found))
    several = {name for name, _ in found if sum(other == name for other, _ in found) > 1}
    if several:
        marks = [Mark(n, b, _accuracy(found[n, b])) for b in backbones for n in several if (n, b) in found]
        marks.sort(key=lambda mark: mark.series)
        yield Heading("Backbones")
        yield _chart("backbones", "Average accuracy by backbone (figure 3 of the paper)", marks, "backbone")


def _reconstructions(folders: Sequence[Path], output: Path) -> list[Block]:
    """Tables 5 and 6."""
    tables = (
        (RunFolder.MIMICRY, "Cost of fitting templates (table 5 of the paper)", _FIT_COLUMNS),
        (
            RunFolder.IMAGENET,
            "The pretrained classifier, dense and decomposed (table 6 of the paper)",
            _IMAGENET_COLUMNS,
        ),
    )
    blocks: list[Block] = []
    for file, caption, columns in tables:
        rows: list[list[Line]] = []
        for path in sorted({path for folder in folders for path in folder.rglob(file)}):
            facts = read_json(path, RunError, backbone=str)
            rows.append([[_link(path, output, path.parent.name)], *([Text(show(facts))] for show in columns.values())])
        if rows:
            blocks.append(DataTable(caption, ["run", *columns], rows, 2))
    return [Heading("Reconstruction"), *blocks] if blocks else []


def _robustness(folders: Sequence[Path]) -> Iterator[Block]:
    """What `robustness` has measured and written somewhere in the folders."""
    for index, path in enumerate(sorted({path for folder in folders for path in folder.rglob(RunFolder.ROBUSTNESS)})):
        yield Heading(f"Robustness, {path.parent}")
        yield from robustness_blocks(read_robustness(path), f"robustness_{index}")


def _number(key: str, digits: int, factor: float = 1, older: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Returns a formatter of one entry, which shows a dash if the entry was not measured.

    Args:
        key: Name of the entry.
        digits: Decimals.
        factor: What to multiply the number by.
        older: Name of the entry in files of earlier versions.
    """

    def show(facts: Mapping[str, Any]) -> str:
        value = facts.get(key, facts.get(older))
        return "–" if value is None else f"{factor * value:,.{digits}f}"

    return show


_FIT_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "backbone": lambda facts: _short_name(facts["backbone"]),
    "weights": _number("weights", 0),
    "peak GPU memory (GB)": _number("gpu_gigabytes", 2),
    "cores busy (%)": _number("cpu_percent", 1),
    "ms per epoch": lambda facts: f"{1000 * facts['seconds'] / max(1, facts['epochs']):,.1f}",
    "epochs": _number("epochs", 0),
    "seconds": _number("seconds", 1),
    "weight cosine (%)": _number("weight_cosine", 2, 100, older="similarity"),
}

_IMAGENET_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "backbone": lambda facts: _short_name(facts["backbone"]),
    "images": _number("images", 0),
    "dense top-1 (%)": _number("dense_accuracy", 2),
    "decomposed top-1 (%)": _number("decomposed_accuracy", 2),
    "equal predictions (%)": _number("agreement", 2),
    "weight cosine (%)": _number("weight_cosine", 2, 100),
    "feature similarity (%)": _number("feature_similarity", 2, 100),
}


def _uses_fitted_templates(run: RunFolder) -> bool:
    """Returns whether a run took its templates from a file."""
    try:
        config = parse_yaml(run.config.read_bytes())
        pieces = config["model"]["init_args"]["pieces"]
        return any((piece.get("init_args") or {}).get("decomposition") for piece in pieces)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False  # runs made from Python have no config.yaml


def _analysed_groups(run: RunFolder) -> list[dict[str, Any]]:
    """Reads the groups that `analyze` measured in a run; their names end in `:NUMBER`."""
    path = run.analysis / RunFolder.ANALYSIS
    return list(read_json(path, RunError, groups=list)["groups"]) if path.is_file() else []


def _short_name(backbone: str) -> str:
    """Drops the module from the dotted path of a backbone of this package."""
    return backbone.rpartition(".")[2] if backbone.startswith("recast_pl.") else backbone


def _accuracy(runs: Sequence[Run]) -> Spread:
    return spread([run.summary["average_accuracy"] for run in runs])


def _seed_links(runs: Sequence[Run], output: Path) -> Line:
    """Lists the seeds, each linked to its run."""
    links = [_link(run.folder.summary, output, str(run.summary["seed"])) for run in runs]
    return [part for link in links for part in (Text(" "), link)][1:]


def _link(path: Path, output: Path, text: str) -> Text:
    relative = Path(os.path.relpath(path.resolve(), output.resolve())).as_posix()
    return Text(text, quote(os.fsencode(relative)))  # also quotes `:`, so that no name is read as a scheme
