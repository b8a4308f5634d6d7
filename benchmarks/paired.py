"""Prints paired differences between the methods of a sweep or comparison, with 95 % confidence intervals over tasks.

    uv run python benchmarks/paired.py logs/domain --baseline probe

Each task has one value: the difference of its last test accuracies, in points, averaged over seeds and over the other
labels of the sweep, such as `data.held_out`. Both methods must have the same runs. The second table has each of these
labels by itself.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from scipy import stats

from recast_pl.runs.collection import PLAN, is_complete
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.metrics import final_accuracies


def is_finished(run):
    return run.summary.is_file() and is_complete(run.read_summary())


def read(folder):
    """Accuracies by method, then by (task, seed, other labels)."""
    found = defaultdict(dict)
    for name, labels in json.loads((folder / PLAN).read_text())["points"].items():
        method, others = labels.get("method", name), tuple(v for k, v in labels.items() if k != "method")
        for run in filter(is_finished, RunFolder.find(folder / name)):
            summary = run.read_summary()
            accuracies = final_accuracies(summary).items()
            found[method] |= {(task, summary["seed"], others): value for task, value in accuracies}
    return found


def interval(values):
    """Formats the mean of the tasks with its interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def difference(ours, theirs, others=None):
    """The interval of a difference; of all labels, or of some."""
    by_task = defaultdict(list)
    for key in ours.keys() & theirs.keys():
        if others in (None, key[2]):
            by_task[key[0]].append(ours[key] - theirs[key])
    return interval([statistics.mean(values) for values in by_task.values()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", required=True, help="the method that others are compared with")
    options = parser.parse_args()
    found = read(options.folder)
    baseline = found.pop(options.baseline)
    print(f"| method | against {options.baseline} |\n|---|---:|")
    for method, values in found.items():
        if values.keys() != baseline.keys():
            print(f"| {method} | has other runs |")
            continue
        print(f"| {method} | {difference(values, baseline)} |")
    if len(labels := sorted({others for *_, others in baseline})) > 1:
        print("\n| method |", " | ".join(" ".join(map(str, each)) for each in labels), "|")
        print("|---|" + "---:|" * len(labels))
        for method, values in found.items():
            print(f"| {method} |", " | ".join(difference(values, baseline, each) for each in labels), "|")


if __name__ == "__main__":
    main()
