"""Compares RECAST with a linear probe on the clip-art tasks, with a real ViT-S/14 at 98×98 and three seeds.

    uv run python benchmarks/clipart.py --weights dinov2_vits14.safetensors

Both have the same optimizer, schedule, epochs and batches. The probe is trained on cached features, without warm start.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
from rich.console import Console
from torch.optim.lr_scheduler import StepLR

from recast_pl import BackboneConfig, BankLayout, Recast, SequentialTaskDataModule, TaskConfig, TILModule
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.stream import Stream

CLIPART = Path(__file__).parents[1] / "data" / "clipart"
TASKS = ("food", "people", "recreation", "signs")
MLP = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)  # as in configs/vit.yaml


def run(weights, seed, epochs, run_dir):
    tasks = [TaskConfig(name, str(CLIPART / name)) for name in TASKS]
    data = SequentialTaskDataModule(tasks, image_size=98, batch_size=16, seed=seed)
    module = TILModule(
        BackboneConfig("vit_small_patch14_dinov2", weights),
        [Recast(MLP)],
        lr_scheduler=lambda o: StepLR(o, step_size=max(1, epochs // 3), gamma=0.1),
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Stream(
        module, data, run_dir, TrainerFactory({"max_epochs": epochs, **quiet}), seed, console=Console(quiet=True)
    ).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="safetensors of timm's vit_small_patch14_dinov2")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1998, 3142592])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    print("| seed |", " | ".join(f"{t} probe | {t} RECAST" for t in TASKS), "| probe | RECAST |")
    print("|---" * (2 * len(TASKS) + 3) + "|")
    averages = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            summary = run(options.weights, seed, options.epochs, Path(folder))
        pairs = [(task["probe_accuracy"], task["accuracy"]) for task in summary["tasks"]]
        averages.append(np.mean(pairs, axis=0))
        cells = [f"{value:.2f}" for pair in [*pairs, averages[-1]] for value in pair]
        print(f"| {seed} |", " | ".join(cells), "|", flush=True)
    mean, deviation = np.mean(averages, axis=0), np.std(averages, axis=0)
    print(f"\nprobe {mean[0]:.2f} ± {deviation[0]:.2f}, RECAST {mean[1]:.2f} ± {deviation[1]:.2f}")


if __name__ == "__main__":
    main()
