r"""Measures `patch arithmetic`: how much robustness a task gets from another one that was trained on degraded images.

    uv run python benchmarks/robust_signature.py --output logs/signature

The tasks are the four of clip art at 64×64 on EfficientNet-Lite0. All are trained on the images as they are, and
again on images of each kind of corruption. What that changed in one task is added to each of the other three. A table
has the test accuracy in percent of the tasks that were changed, on images as they are and on degraded ones, means over
all twelve pairs of tasks and the seeds: as trained, with a factor of what is added, and trained on degraded images
themselves. Differences to the task as trained have 95 % confidence intervals over tasks and seeds.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
from paired import interval

from recast_pl.cli import main as recast
from recast_pl.config.run import open_run
from recast_pl.data.corruptions import Condition, degradations, degrade
from recast_pl.files import json_text, write_atomic
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.evaluation import activate, restore
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.patch_arithmetic import add_robustness

BASE = ["--config", "quickstart.yaml", "--config", str(Path(__file__).parent / "robustness" / "clipart.yaml")]
METHODS = {"recast": [], "full": ["--config", "methods/finetune_each.yaml"]}


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", default=["gaussian_noise", "defocus_blur"])
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    return parser.parse_args()


def train(folder, method, seed, *more):
    """Trains all tasks, unless that is done."""
    words = ["fit", *BASE, *METHODS[method], "--seed_everything", str(seed), "--run_dir", str(folder), *more]
    if status := recast([*words, "--resume", "true"]):
        raise SystemExit(status)


class Clean:
    """A run on images as they are, whose tasks are measured and changed."""

    def __init__(self, folder):
        _, init = open_run(folder)
        self.module, self.data = init.model, init.data
        self.evaluator = TrainerFactory(init.trainer).for_evaluation()
        self.data.prepare_data()
        self.patches = RunFolder(folder).load_patches()
        restore(self.module, RunFolder(folder), self.data.image_size)
        self.module.eval()

    @torch.no_grad()
    def accuracy(self, patch, condition=None):
        """Accuracy in percent on the test images of a task, degraded if there is a condition."""
        activate(self.module, self.data, list(self.patches).index(patch.task), patch)
        split, right = self.data.plain_dataloader("test").dataset, []
        for start in range(0, len(split), 32):
            chosen = list(range(start, min(start + 32, len(split))))
            images, labels = self.data.on_after_batch_transfer(split.__getitems__(chosen), 0)
            if condition:
                positions = split.indices[chosen].tolist()
                images = degrade(images, condition, degradations()[condition], patch.task, positions)
            right += (self.module(images).argmax(1) == labels).tolist()
        return 100 * statistics.mean(right)

    def changed(self, patch, robust, scale):
        """The task with what made each of the others robust."""
        others = [(robust[name], clean) for name, clean in self.patches.items() if name != patch.task]
        return [
            add_robustness(self.module, self.data, *pair, [patch], 7, scale, self.evaluator)[0][0] for pair in others
        ]

    def measure(self, robust, condition, scales):
        """Means over patches of the accuracy on images as they are and on degraded ones, by task and way."""
        found = {}
        for task, patch in self.patches.items():
            ways = {"as trained": [patch]}
            ways |= {f"changed, factor {scale:g}": self.changed(patch, robust, scale) for scale in scales}
            ways["trained on degraded images"] = [robust[task]]
            found[task] = {
                way: [statistics.mean(self.accuracy(each, c) for each in patches) for c in (None, condition)]
                for way, patches in ways.items()
            }
        return found


def print_rows(method, kind, tasks):
    """Prints a row for each way; `tasks` are the results of each task and seed."""
    for name in tasks[0]:
        clean, degraded = ([each[name][place] for each in tasks] for place in (0, 1))
        cells = [f"{statistics.mean(clean):.2f}", f"{statistics.mean(degraded):.2f}"]
        for place, values in enumerate((clean, degraded)):
            before = [each["as trained"][place] for each in tasks]
            gains = [a - b for a, b in zip(values, before, strict=True)]
            cells.append("" if name == "as trained" else interval(gains))
        print(f"| {method} | {kind} | {name} | {' | '.join(cells)} |", flush=True)


def main():
    options = read_options()
    warnings.filterwarnings("ignore", message=".*more than one split")
    rows = []
    for method in options.methods:
        for kind in options.kinds:
            condition, tasks = Condition(kind, options.severity), []
            for seed in options.seeds:
                folder = options.output / method / str(seed)
                result = folder / f"{kind}-{options.severity}.json"
                if not result.exists():
                    change = {"class_path": "recast_pl.Corruption", "init_args": dict(condition._asdict())}
                    train(folder / "clean", method, seed)
                    train(folder / kind, method, seed, "--data.transforms", json.dumps([change]))
                    robust = RunFolder(folder / kind).load_patches()
                    found = Clean(folder / "clean").measure(robust, condition, options.scales)
                    write_atomic(result, json_text(found))
                tasks += json.loads(result.read_text()).values()
            rows.append((method, kind, tasks))
    print("| method | images | task | clean % | degraded % | difference of clean | difference of degraded |")
    print("|---|---|---|---:|---:|---:|---:|")
    for row in rows:
        print_rows(*row)


if __name__ == "__main__":
    main()
