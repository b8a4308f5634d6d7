"""The page of a board: methods on several streams, compared with a converged probe and with LoRA at equal seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from scipy.special import stdtrit

from recast_pl.errors import RunError
from recast_pl.files import read_json
from recast_pl.reporting.document import Block, Chart, DataTable, Heading, Paragraph, Text, write_document
from recast_pl.reporting.plots import Mark, plot_marks, plot_panels
from recast_pl.reporting.tables import Cells
from recast_pl.runs.metrics import Spread, spread

PAGE = "board"
"""Name of the page, without suffix."""

PROBE, LORA = "probe", "lora"
"""The methods that others are compared with: a converged head on frozen features, and LoRA of rank 1."""

_AIM, _AIM_BYTES = 70, 1400  # per cent of that gain, and bytes of a whole task

_CONFIDENCE = 0.95

_DIGITS = 4


class Measured(TypedDict):
    """How the runs of some seeds were made."""

    command: str
    date: str
    machine: str
    seeds: list[int]
    versions: dict[str, str]


class Results(TypedDict):
    """The content of STREAM/METHOD.json; `rate` is None if the method trains no numbers, `settings` a digest.

    `rates` holds the means over tasks of `validation_accuracy` and `validation_loss`, by rate. `runs` holds numbers of
    each task by seed and task: `accuracy`, `probe_accuracy`, `task_parameters`, `patch_bytes`, `seconds`,
    `train_images` and `test_images`.
    """

    stream: str
    method: str
    settings: NotRequired[str]
    rate: float | None
    rates: dict[str, dict[str, float]]
    runs: dict[str, dict[str, dict[str, float]]]
    measured: list[Measured]


Streams = dict[str, dict[str, Results]]
"""Results by stream and method."""


def results_text(results: Results) -> str:
    """Returns results as JSON with one line for each run, so that differences of two versions can be read."""
    entries = cast(dict[str, Any], _rounded(results))
    runs = sorted(entries["runs"].items(), key=lambda item: int(item[0]))
    blocks = {
        "measured": ("[", [_line(entry) for entry in entries["measured"]], "]"),
        "runs": ("{", [f"{json.dumps(seed)}: {_line(run)}" for seed, run in runs], "}"),
    }
    lines = []
    for key, value in sorted(entries.items()):
        first, parts, last = blocks.get(key, ("", [], ""))
        text = first + "\n  " + ",\n  ".join(parts) + "\n " + last if parts else _line(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    if isinstance(value, dict):  # a rate may need more digits
        return {key: entry if key == "rate" else _rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry, digits) for entry in value]
    return round(value, digits) if isinstance(value, float) else value


def results_file(folder: Path, stream: str, method: str) -> Path:
    """Where the results of a method on a stream are in the folder of a board."""
    return folder / stream / f"{method}.json"


def has_results(folder: Path, stream: str, method: str, seeds: Sequence[int], settings: str) -> bool:
    """Whether a method has results on a stream for all seeds.

    Raises:
        RunError: If the file is damaged, or some results were measured with other settings.
    """
    path = results_file(folder, stream, method)
    if not path.is_file():
        return False
    found = _read(path)
    if found.get("settings", settings) != settings:  # older results do not name theirs
        raise RunError(f"{path} was measured with other settings; move it away, or give another --output")
    return {str(seed) for seed in seeds} <= found["runs"].keys()


def _read(path: Path) -> Results:
    return cast(Results, read_json(path, RunError, stream=str, method=str, rates=dict, runs=dict, measured=list))


def read_results(folder: Path) -> Streams:
    """Reads all results of a board.

    Raises:
        RunError: If there are none, a file is damaged, or methods on a stream were tested on different images.
    """
    streams: Streams = {}
    for path in sorted(folder.glob("*/*.json")):
        found = _read(path)
        streams.setdefault(found["stream"], {})[found["method"]] = found
        first = next(iter(streams[found["stream"]].values()))
        for seed in found["runs"].keys() & first["runs"].keys():
            one, other = ({t: v["test_images"] for t, v in r["runs"][seed].items()} for r in (first, found))
            if one != other:
                raise RunError(f"{path} has other test images than {first['method']}: {other}, not {one}; delete one")
    if not streams:
        raise RunError(f"{folder} has no results; give --config to train, or the folder of a board")
    return streams


class Difference(NamedTuple):
    """Mean of paired differences, and its 95 % confidence interval by Student's t; None for a single pair."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """`better` or `worse` only if the interval excludes 0."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"

    def __str__(self) -> str:
        bounds = "" if self.interval is None else " [{:+.2f}, {:+.2f}]".format(*self.interval)
        return f"{self.mean:+.2f}{bounds} {self.verdict}"


def difference(values: Sequence[float]) -> Difference:
    """Summarises at least one paired difference."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Difference(mean, None)
    quantile = float(stdtrit(count - 1, (1 + _CONFIDENCE) / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Difference(mean, (mean - half, mean + half))


def seed_means(results: Results, key: str) -> dict[str, float]:
    """Means over tasks of an entry, by seed."""
    return {seed: statistics.fmean(task[key] for task in run.values()) for seed, run in results["runs"].items()}


def _mean(results: Results, key: str) -> float:
    return statistics.fmean(seed_means(results, key).values())


def _gains(name: str, baseline: str, methods: Mapping[str, Results]) -> list[float]:
    """Accuracy of a method minus that of another one, for each seed that both have."""
    return list(_gains_by_seed(name, baseline, methods).values())


def _gains_by_seed(name: str, baseline: str, methods: Mapping[str, Results]) -> dict[str, float]:
    if name == baseline or not {name, baseline} <= methods.keys():
        return {}
    ours, theirs = (seed_means(methods[key], "accuracy") for key in (name, baseline))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys(), key=int)}


def stream_cells(methods: Mapping[str, Results]) -> Cells:
    """Makes the table of a stream, with a row for each method, in order of bytes."""
    rows = []
    for name, results in _by_bytes(methods):
        sizes = [f"{_mean(results, key):,.0f}" for key in ("task_parameters", "patch_bytes")]
        accuracy = str(spread(list(seed_means(results, "accuracy").values())))
        gains = [_gains(name, baseline, methods) for baseline in (PROBE, LORA)]
        differences = [str(difference(values)) if values else "–" for values in gains]
        rate = "–" if results["rate"] is None else f"{results['rate']:g}"
        seconds = f"{_mean(results, 'seconds'):.1f}"
        rows.append([name, str(len(results["runs"])), *sizes, accuracy, *differences, seconds, rate])
    sizes = ["numbers", "bytes of a whole task"]
    return ["method", "seeds", *sizes, "accuracy %", "against the probe", "against LoRA r 1", "seconds", "rate"], rows


def _by_bytes(methods: Mapping[str, Results]) -> list[tuple[str, Results]]:
    return sorted(methods.items(), key=lambda item: (_mean(item[1], "patch_bytes"), item[0]))


def summary_cells(streams: Streams) -> Cells:
    """Makes the table of all streams: gains over the probe, their mean, and its share of LoRA's on the same streams."""
    rows = []
    for name in dict.fromkeys(name for methods in streams.values() for name, _ in _by_bytes(methods)):
        gains = [_gains(name, PROBE, methods) for methods in streams.values()]
        means = [f"{statistics.fmean(values):+.2f}" if values else "–" for values in gains]
        size = statistics.fmean(_mean(methods[name], "patch_bytes") for methods in streams.values() if name in methods)
        overall = gain_everywhere(name, streams)
        rows.append([name, f"{size:,.0f}", *means, str(overall) if overall else "–", *_share(name, streams)])
    return ["method", "bytes", *streams, "mean of all streams", "streams shared", "share of LoRA's gain"], rows


def gain_everywhere(name: str, streams: Streams) -> Difference | None:
    """The mean over streams of a method's gain over the probe, paired by seed; None if it lacks a stream."""
    by_stream = [_gains_by_seed(name, PROBE, methods) for methods in streams.values()]
    seeds = set.intersection(*(set(gains) for gains in by_stream))
    return (
        difference([statistics.fmean(gains[seed] for gains in by_stream) for seed in sorted(seeds)]) if seeds else None
    )


def _share(name: str, streams: Streams) -> list[str]:
    """The number of streams that have a method, the probe and LoRA, and the ratio of the two mean gains."""
    gains = []
    for methods in streams.values():
        if {name, PROBE, LORA} <= methods.keys():
            ours, probe, lora = (seed_means(methods[key], "accuracy") for key in (name, PROBE, LORA))
            seeds = ours.keys() & probe.keys() & lora.keys()
            gains += [np.mean([(ours[s] - probe[s], lora[s] - probe[s]) for s in seeds], axis=0)] if seeds else []
    own, reference = np.sum(gains, axis=0) if gains else (0.0, 0.0)
    return [str(len(gains)), f"{100 * own / reference:.0f} %" if reference > 0 else "–"]


def write_board(folder: Path) -> None:
    """Writes board.md, board.html and the figures board_mean and board_accuracy from the results in a folder.

    Raises:
        RunError: If there are no results, or a file is damaged.
    """
    streams = read_results(folder)
    blocks: list[Block] = [
        Heading("Board", 1),
        Paragraph([Text(_EXPLANATION)]),
        Heading("All streams"),
        _table(_SUMMARY, summary_cells(streams)),
        Chart("board_mean", _FIGURE.format("all streams"), plot_marks(_means(streams), _BYTES)),
        Chart("board_accuracy", _FIGURE.format("each stream"), plot_panels(_panels(streams), _BYTES)),
    ]
    for stream, methods in streams.items():
        blocks += [Heading(stream), _table(_describe(methods), stream_cells(methods))]
    write_document(blocks, folder, PAGE)


_EXPLANATION = (
    "Written by recast_pl board from the JSON files beside it, which hold the commands. Accuracies and differences are "
    "means over tasks. Differences are paired by seed, with 95 % confidence intervals over seeds; a method is better "
    "or worse only if the interval excludes 0. The probe is the same head, converged, on frozen features, and stored "
    "in the same precision. Bytes are those of the whole file of a task: numbers, head and names."
)

_SUMMARY = (
    "Mean gain over the probe in points on each stream, and over the streams as a share of that of LoRA r 1 with the "
    f"same seeds. The aim is {_AIM} % with at most {_AIM_BYTES:,} bytes."
)

_FIGURE = (
    "Accuracy against bytes of a whole task on {}; error bars are 95 % confidence intervals of the difference to the "
    "probe, paired by seed."
)

_BYTES = "bytes of a whole task, head included"


def _means(streams: Streams) -> list[Mark]:
    """The mean over streams of each method that has all of them."""
    marks = []
    for name in dict.fromkeys(name for methods in streams.values() for name in methods):
        runs = [methods[name] for methods in streams.values() if name in methods]
        if len(runs) == len(streams):
            size, accuracy = (
                statistics.fmean(_mean(each, key) for each in runs) for key in ("patch_bytes", "accuracy")
            )
            marks.append(Mark(name, size, Spread(accuracy, _half(gain_everywhere(name, streams))), name=name))
    return marks


def _panels(streams: Streams) -> dict[str, list[Mark]]:
    panels: dict[str, list[Mark]] = {}
    for stream, methods in streams.items():
        for name, results in _by_bytes(methods):
            gains = _gains(name, PROBE, methods)
            accuracy = Spread(_mean(results, "accuracy"), _half(difference(gains) if gains else None))
            panels.setdefault(stream, []).append(Mark(name, _mean(results, "patch_bytes"), accuracy))
    return panels


def _half(difference: Difference | None) -> float | None:
    """Half the width of an interval."""
    if difference is None or difference.interval is None:
        return None
    low, high = difference.interval
    return (high - low) / 2


def _table(caption: str, cells: Cells) -> DataTable:
    header, rows = cells
    return DataTable(caption, header, [[[Text(cell)] for cell in row] for row in rows])


def _describe(methods: Mapping[str, Results]) -> str:
    """Says how many tasks and images a stream has, and where it was measured."""
    run = next(iter(next(iter(methods.values()))["runs"].values()))
    train, test = (sum(task[key] for task in run.values()) for key in ("train_images", "test_images"))
    machines = sorted({entry["machine"] for results in methods.values() for entry in results["measured"]})
    tasks = f"{len(run)} task{'s' if len(run) > 1 else ''}"
    return f"{tasks}, {train:,} training and {test:,} test images; seconds are per task, on {'; '.join(machines)}"
