r"""Compares later tasks with a growing bank (experimental) and with a plain one, from `configs/sweeps/grow.yaml`.

    uv run python -m recast_pl sweep --config sweeps/grow.yaml --base benchmarks/digits.yaml --output logs/grow \
      --options '--model.backbone.weights dinov2_vits14.safetensors --data.image_size 70'
    uv run python benchmarks/grow.py logs/grow

It takes the tasks from the third on, which are the same for all methods of one order and seed. The gain is the
difference, run by run, to the plain bank that trains as many numbers; its deviation is over runs.
"""

import argparse
import json
import statistics
from pathlib import Path

from recast_pl.runs.metrics import spread
from recast_pl.studies.sweep_file import read_sweep

SWEEP = Path(__file__).parents[1] / "configs" / "sweeps" / "grow.yaml"
EARLIER = 2  # tasks that may add templates


def later_tasks(folder: Path) -> dict[str, dict[tuple[str, str], tuple[float, int]]]:
    """For each method, by order and seed: the mean accuracy of later tasks (%), and how many numbers they train."""
    found: dict[str, dict[tuple[str, str], tuple[float, int]]] = {}
    for name, plan in read_sweep(SWEEP).points.items():
        for path in (folder / name).glob("*/summary.json"):
            tasks = json.loads(path.read_text())["tasks"][EARLIER:]
            if tasks:
                run = (str(plan.labels["data.order_seed"]), path.parent.name)
                accuracy = statistics.mean(task["accuracy"] for task in tasks)
                found.setdefault(str(plan.labels["pieces"]), {})[run] = (accuracy, tasks[-1]["task_parameters"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of the sweep")
    found = later_tasks(parser.parse_args().folder)
    print("| method | numbers per later task | runs | accuracy of later tasks (%) | gain over the plain bank |")
    print("|---|---:|---:|---:|---:|")
    for method, runs in found.items():
        plain = found.get(f"plain-{method.rpartition('-')[2]}", {})
        gains = [accuracy - plain[run][0] for run, (accuracy, _) in runs.items() if run in plain]
        gain = str(spread(gains)) if gains and plain is not runs else ""
        numbers = max(count for _, count in runs.values())
        print(f"| {method} | {numbers} | {len(runs)} | {spread([a for a, _ in runs.values()])} | {gain} |")


if __name__ == "__main__":
    main()
