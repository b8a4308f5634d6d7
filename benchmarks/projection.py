"""Measures what heads lose that read few directions of the features (`Projection`), with converged logistic heads.

    uv run python benchmarks/projection.py --backbone recast_pl.backbones.efficientnet_lite0 --weights hub --size 96 \
        --manifests emoji/*.csv

Directions are those of the last layer, as `Projection` takes them; the principal directions of the first task's
training features, as far as its images give them; and random ones. Differences to the head on all
features in single precision are in percentage points, averaged over seeds, with an interval over tasks, without and
with 4 bits for each weight. The last column is the file of a task of five classes with 69 coefficients and 4 bits.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import sem, t
from small_patches import Split, read_features, read_options, size_of
from torch import Tensor, nn

from recast_pl import BackboneConfig
from recast_pl.learning.features import Features
from recast_pl.learning.heads import solve_head
from recast_pl.learning.quantization import Moments, round_head
from recast_pl.methods.projection import leading_directions

WIDTHS = (64, 128, 256, 320)


def choices(network: nn.Module, first: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Ways to choose directions, from a network and the first task's features (N, D): name, width, rows (width, D)."""
    centred = first.double() - first.double().mean(0)
    principal = torch.linalg.svd(centred, full_matrices=False)[2][: len(first) - 1]
    generator = torch.Generator().manual_seed(0)
    for width in (each for each in WIDTHS if each < first.shape[1]):
        random = torch.linalg.qr(torch.randn(first.shape[1], width, generator=generator))[0].T
        yield "last layer", width, leading_directions(network, first.shape[1], width)
        if width <= len(principal):
            yield "first task", width, principal[:width].float()
        yield "random", width, random


def accuracies(splits: dict[str, Split], rows: Tensor | None) -> list[float]:
    """Test accuracy in percent of a head on projected features: in single precision, and with 4 bits."""
    train, test = (Features(x if rows is None else x @ rows.T, y) for x, y in (splits["train"], splits["test"]))
    head = solve_head("logistic", train, int(train.labels.max()) + 1)
    exact = 100 * test.score(head)[0]
    head.load_state_dict(round_head(head.weight, head.bias, 4, Moments.of(train.features)).state)
    return [exact, 100 * test.score(head)[0]]


def main() -> None:
    options = read_options(__doc__)
    found = read_features(options)
    network = BackboneConfig(options.backbone, options.weights).build(options.size).net
    features = next(iter(found.values()))["train"][0].shape[1]
    changes: dict[tuple[int, str], dict[str, list[list[float]]]] = {}
    for name, splits in found.items():
        task, _, seed = name.rpartition(" ")
        first = next(found[each] for each in found if each.endswith(f" {seed}"))["train"][0]
        exact, four = accuracies(splits, None)
        changes.setdefault((features, "all"), {}).setdefault(task, []).append([0, four - exact])
        for way, width, rows in choices(network, first):
            pair = [accuracy - exact for accuracy in accuracies(splits, rows)]
            changes.setdefault((width, way), {}).setdefault(task, []).append(pair)
    print("| features | directions | points | with 4 bits | bytes |\n|---:|---|---:|---:|---:|")
    for (width, way), tasks in changes.items():
        means = np.array([np.mean(pairs, 0) for pairs in tasks.values()])  # (tasks, 2)
        wide = t.ppf(0.975, len(means) - 1) * sem(means)
        cells = [f"{mean:+.2f} ± {half:.2f}" for mean, half in zip(means.mean(0), wide, strict=True)]
        size = size_of(4, width, 69, ("Recast",) if way == "all" else ("Recast", "Projection"))
        print(f"| {width:,} | {way} | {' | '.join(cells)} | {size:,} |")


if __name__ == "__main__":
    main()
