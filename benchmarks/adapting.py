r"""Measures CoTTA where it has a long stream to adapt to: 1,000 degraded images of one task, in batches of four.

    uv run python benchmarks/adapting.py --output logs/long_stream

The task is Fashion-MNIST at 64×64 on EfficientNet-Lite0, trained by RECAST on 600 images. Its test images are degraded
and classified in order: by the task as trained, by the average over views alone (its teacher stays where it is), by a
teacher that adapts alone, and by both, which is CoTTA. A row has the accuracy in percent on the whole stream and on its
last quarter, and the difference to the task as trained on these, with 95 % confidence intervals over images.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats

from recast_pl import SequentialTaskDataModule
from recast_pl.cli import main as recast
from recast_pl.config.run import open_run
from recast_pl.data.corruptions import Condition, degradations, degrade
from recast_pl.runs.evaluation import activate, restore
from recast_pl.runs.folder import RunFolder

BASE = ["--config", "quickstart.yaml", "--config", str(Path(__file__).parent / "robustness" / "cotta.yaml")]
IMAGES = {"train": 600, "val": 200, "test": 200}
TASK = {"name": "fashion", "dataset": "torchvision/FashionMNIST", "images": IMAGES}
SIZE = 64

WAYS = {
    "as trained": None,
    "views alone": {"smoothing": 1.0},
    "adapts, without views": {"views": 0},
    "CoTTA": {},
}
"""What differs from the paper's values of CoTTA; None for the task without it."""


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--kinds", nargs="+", default=["gaussian_noise"])
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="length of the stream")
    parser.add_argument("--batch", type=int, default=4)
    return parser.parse_args()


def open_task(options):
    """Trains the task, unless that is done; returns the module with it, and data with all images of the stream."""
    settings = ["--data.image_size", str(SIZE), "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    words = ["fit", *BASE, *settings, "--data.tasks", json.dumps([TASK]), "--run_dir", str(options.output)]
    if status := recast([*words, "--resume", "true"]):
        raise SystemExit(status)
    _, init = open_run(options.output)
    module, folder = init.model, RunFolder(options.output)
    task = replace(init.data.tasks[0], images=IMAGES | {"test": options.images})
    data = SequentialTaskDataModule((task,), SIZE, seed=init.data.seed, root=init.data.root)
    data.prepare_data()
    restore(module, folder, SIZE)
    module.eval()
    activate(module, data, 0, folder.load_patches()["fashion"])
    return module, data


def stream(data, condition, size):
    """Yields batches of degraded test images (B, 3, S, S) in [0, 1], and their labels (B,)."""
    split, change = data.plain_dataloader("test").dataset, degradations()[condition]
    for start in range(0, len(split), size):
        chosen = list(range(start, min(start + size, len(split))))
        images, labels = data.on_after_batch_transfer(split.__getitems__(chosen), 0)
        yield degrade(images, condition, change, "fashion", split.indices[chosen].tolist()), labels


def classify(module, settings, batches):
    """Whether each image is classified correctly, 1 or 0."""
    classifier = module
    if settings is not None:
        vars(module.pieces[-1]).update(settings)
        classifier = module.pieces[-1].adapting(module)
    with torch.inference_mode():
        return torch.cat([classifier(images).argmax(1) == labels for images, labels in batches]).int().tolist()


def difference(values, before):
    """Formats the mean of paired differences in points, with its 95 % confidence interval over images."""
    gains = [100 * (a - b) for a, b in zip(values, before, strict=True)]
    mean, half = statistics.mean(gains), stats.norm.ppf(0.975) * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def print_row(kind, way, right, before, seconds):
    last = slice(len(right) * 3 // 4, None)
    parts = [(right, before), (right[last], before[last])]
    cells = [f"{100 * statistics.mean(values):.2f}" for values, _ in parts]
    cells += ["" if right is before else difference(*part) for part in parts]
    print(f"| {kind} | {way} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def main():
    options = read_options()
    module, data = open_task(options)
    paper = {name: getattr(module.pieces[-1], name) for name in ("smoothing", "views")}
    print("| images | | accuracy % | last quarter % | difference | of the last quarter | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for kind in options.kinds:
        condition, found = Condition(kind, options.severity), {}
        for way, changes in WAYS.items():
            began = time.perf_counter()
            settings = None if changes is None else paper | changes
            found[way] = classify(module, settings, stream(data, condition, options.batch))
            print_row(kind, way, found[way], found["as trained"], time.perf_counter() - began)


if __name__ == "__main__":
    main()
