"""Measures what fewer bits for the weights of a head cost, on frozen features and a converged head.

    uv run python benchmarks/small_patches.py --weights dinov2_vits14.safetensors --manifests emoji/*.csv

The head is scikit-learn's logistic regression, whose regularization is chosen on validation images. It is rounded to
the nearest, then with a bias that is solved for again, and then as `fit --patch_precision` does (GPTQ). Differences to
the head in single precision are in percentage points, averaged over seeds, with an interval over tasks; the same
predictions in percent of the test images. The last column is the file of a task of five classes with 48 coefficients.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import sem, t
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from recast_pl import BackboneConfig, SequentialTaskDataModule, TaskConfig, TaskPatch
from recast_pl.learning.patch import BITS
from recast_pl.learning.quantization import Moments, RoundedHead, round_head

CLIPART = Path(__file__).parents[1] / "data" / "clipart"
REGULARIZATION = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse strengths to choose from
SPLITS = ("train", "val", "test")

Split = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


@torch.no_grad()
def extract(
    options: argparse.Namespace, change: Callable[[nn.Module], object] = lambda network: None
) -> dict[str, dict[str, Split]]:
    """The splits of each task and seed; each image passes the network once, whose time is printed.

    Args:
        options: Those of `read_options`.
        change: Changes the network beforehand.
    """
    tasks = [TaskConfig(name, str(CLIPART / name)) for name in ("food", "people", "recreation", "signs")]
    tasks += [
        TaskConfig("digits", flip=False),
        *(TaskConfig(f"{p.parent.name}_{p.stem}", str(p)) for p in options.manifests),
    ]
    network = BackboneConfig(options.backbone, options.weights).build(options.size).eval()
    change(network.net)
    found: dict[str, dict[str, Split]] = {}
    seconds = 0.0
    known: dict[tuple[int, int], Tensor] = {}
    for seed in options.seeds:
        data = SequentialTaskDataModule(tasks, image_size=options.size, batch_size=32, seed=seed)
        data.prepare_data()
        for index, task in enumerate(tasks):
            data.select(index)
            for split in SPLITS:
                loader: Any = data.plain_dataloader(split)
                images = loader.dataset
                keys = [(index, image) for image in images.indices.tolist()]
                new = [position for position, key in enumerate(keys) if key not in known]
                for positions in (new[start : start + 32] for start in range(0, len(new), 32)):
                    batch, _ = data.on_after_batch_transfer(images.__getitems__(positions), 0)
                    began = time.process_time()
                    features = network(batch)
                    seconds += time.process_time() - began
                    known |= zip((keys[position] for position in positions), features, strict=True)
                features = torch.stack([known[key] for key in keys])
                found.setdefault(f"{task.name} {seed}", {})[split] = features, images.labels[images.indices]
    print(f"features: {1000 * seconds / len(known):.1f} ms of processor time an image\n")
    return found


def fit(splits: dict[str, Split]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the logistic regression that is best on validation images."""
    arrays = {name: [part.numpy() for part in split] for name, split in splits.items()}
    heads = [LogisticRegression(C=strength, max_iter=200).fit(*arrays["train"]) for strength in REGULARIZATION]
    best = max(heads, key=lambda head: head.score(*arrays["val"]))
    return torch.from_numpy(best.coef_).float(), torch.from_numpy(best.intercept_).float()


def rounded(weight: Tensor, bias: Tensor, bits: int, moments: Moments) -> dict[str, RoundedHead]:
    """The head by each way to round it."""
    plain = round_head(weight, bias, bits, None)
    lost = weight - weight.mean(0) - plain.state["weight"]
    solved = replace(plain, bias=(plain.bias + lost.double() @ moments.mean).float())
    return {"nearest": plain, "nearest, bias": solved, "as `fit`": round_head(weight, bias, bits, moments)}


def read_options(description: str | None) -> argparse.Namespace:
    """What a command line says about the backbone, the images, and the file that keeps the features."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2", help="as model.backbone.name")
    parser.add_argument("--weights", required=True, help="as model.backbone.weights")
    parser.add_argument("--manifests", type=Path, nargs="*", default=[], help="CSV files of more tasks")
    parser.add_argument("--size", type=int, default=98)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1998, 3142592])
    parser.add_argument("--features", type=Path, help="file that keeps the features for the next time")
    return parser.parse_args()


def read_features(options: argparse.Namespace) -> dict[str, dict[str, Split]]:
    """The features that a command line asks for: from its file, or else extracted, and kept in the file."""
    if options.features and options.features.exists():
        kept: dict[str, dict[str, Split]] = torch.load(options.features)
        return kept
    found = extract(options)
    if options.features:
        torch.save(found, options.features)
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    found = read_features(read_options(__doc__))
    results: dict[tuple[int, str], dict[str, list[tuple[float, float]]]] = {}
    accuracies = []
    for name, splits in found.items():
        task = name.rpartition(" ")[0]
        (weight, bias), moments, (features, labels) = fit(splits), Moments.of(splits["train"][0]), splits["test"]
        exact = (features @ weight.T + bias).argmax(1)
        right = 100 * float((exact == labels).double().mean())
        accuracies.append(right)
        for bits in (8, 4, 3, 2, 1):
            for way, head in rounded(weight, bias, bits, moments).items():
                predicted = (features @ head.state["weight"].T + head.bias).argmax(1)
                change = 100 * float((predicted == labels).double().mean()) - right
                same = 100 * float((predicted == exact).double().mean())
                results.setdefault((bits, way), {}).setdefault(task, []).append((change, same))
    print(f"single precision: {np.mean(accuracies):.2f} % over {len(found)} tasks and seeds\n")
    print("| bits | rounding | points | 95 % interval | same % | bytes |\n|---:|---|---:|---:|---:|---:|")
    for (bits, way), tasks in results.items():
        means = np.array([np.mean(pairs, axis=0) for pairs in tasks.values()])  # (tasks, 2)
        change, same = means.mean(0)
        wide = t.ppf(0.975, len(means) - 1) * sem(means[:, 0])
        size = f"{size_of(bits):,}" if bits in BITS.values() else ""
        print(f"| {bits} | {way} | {change:+.2f} | ±{wide:.2f} | {same:.1f} | {size} |")


def size_of(bits: int, features: int = 384, coefficients: int = 48, method: Sequence[str] = ("Recast",)) -> int:
    """Bytes of the file of a task of five classes."""
    classes, metrics = (
        ["clocks", "flags", "led", "map_symbols", "weather"],
        {"accuracy": 88.1356, "probe_accuracy": 87.7119},
    )
    head = {"weight": torch.randn(5, features), "bias": torch.randn(5)}
    states = [{"coefficients": torch.randn(coefficients)}, *({} for _ in method[1:])]
    colours = [0.5, 0.5, 0.5]
    patch = TaskPatch("signs", classes, head, states, list(method), 98, colours, colours, "0" * 64, metrics)
    return len(patch.compacted(bits).to_bytes())


if __name__ == "__main__":
    main()
