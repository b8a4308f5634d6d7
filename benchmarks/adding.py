"""Measures what `add` of one more task costs in a run of few tasks and in one of many.

    uv run python benchmarks/adding.py --counts 10 1000

All tasks that are there before are copies of one: synthetic images of random colours, learnt by a tiny random network.
The runs take turns in one process, so that other work on the machine disturbs them alike; the first turn does not
count. The table has seconds of the processor, the median, and the difference to the first run in milliseconds, the mean
of pairs with its 95 % confidence interval.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from arrivals import NETWORK, Images, Worker
from many_tasks import multiply
from paired import interval

from recast_pl.runs.folder import RunFolder


def measure(folder, counts, turns):
    """Seconds of the processor that each turn took, by number of tasks."""
    images, worker = Images(folder / "images"), Worker(folder / "log")
    task = json.dumps([{"name": "t0", "path": str(images.write("t0"))}])
    words = [*NETWORK, "--trainer.max_epochs", "2", "--data.root", folder / "data", "--data.tasks", task]
    worker.run("fit", *words, "--run_dir", folder / "first")
    runs = {count: multiply(RunFolder(folder / "first"), folder / f"run{count}", count) for count in counts}
    found = {count: [] for count in counts}
    for turn in range(turns + 1):
        task = f"t{max(counts) + turn}"
        path = images.write(task)
        for count, run in runs.items():
            _, busy = worker.run("add", "--task", task, "--path", path, "--run_dir", run.path)
            found[count].append(busy)
    return {count: times[1:] for count, times in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 1000], help="numbers of tasks")
    parser.add_argument("--turns", type=int, default=20, help="tasks that are added to each run, and count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder).resolve(), options.counts, options.turns)
    first = found[options.counts[0]]
    print("| tasks before | of the processor s | more than in the first row ms |\n|---:|---:|---:|")
    for count, times in found.items():
        more = [1000 * (time - other) for time, other in zip(times, first, strict=True)]
        print(f"| {count:,} | {statistics.median(times):.2f} | {interval(more) if times is not first else ''} |")


if __name__ == "__main__":
    main()
