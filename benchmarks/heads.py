"""Compares ways to find a head on frozen features: solved heads, scikit-learn's, and heads trained by AdamW.

    uv run python benchmarks/heads.py --weights dinov2_vits14.safetensors --manifests emoji/*.csv

Heads of AdamW have the paper's rate of 2e-3 and batches of 16; their best epoch is chosen on validation images.
Accuracies and differences are in percentage points, averaged over seeds, with an interval over tasks.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.stats import sem, t
from sklearn.linear_model import LogisticRegressionCV
from small_patches import Split, read_features, read_options
from torch import nn

from recast_pl.learning.features import Features
from recast_pl.learning.heads import solve_head
from recast_pl.learning.probe import fit_probe

Splits = dict[str, Split]


def solved(kind: Any) -> Callable[[Splits], nn.Linear]:
    """Solves a head as `fit` does."""
    return lambda splits: solve_head(kind, Features(*splits["train"]), int(splits["train"][1].max()) + 1)


def trained(epochs: int) -> Callable[[Splits], nn.Linear]:
    """Trains a head as `fit --model.head sgd` does for the probe of a task."""

    def configure(parameters: Iterable[Any]) -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-6), None

    def fit(splits: Splits) -> nn.Linear:
        torch.manual_seed(0)
        features, labels = splits["train"]
        head = nn.Linear(features.shape[1], int(labels.max()) + 1)
        fit_probe(head, Features(*splits["train"]), Features(*splits["val"]), epochs, 16, configure)
        return head

    return fit


def reference(splits: Splits) -> nn.Linear:
    """scikit-learn's logistic regression, regularised by 3-fold cross-validation."""
    features, labels = (part.numpy() for part in splits["train"])
    scale = np.sqrt(features.var(0).mean())
    model = LogisticRegressionCV(Cs=np.logspace(-3, 2, 6), cv=3, max_iter=2000, scoring="neg_log_loss")
    model.fit(features / scale, labels)
    weight, bias = model.coef_ / scale, model.intercept_
    if len(weight) == 1:  # two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    head = nn.Linear(features.shape[1], len(weight))
    head.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return head


WAYS: dict[str, Callable[[Splits], nn.Linear]] = {
    "`logistic`": solved("logistic"),
    "`lda`": solved("lda"),
    "`ridge`": solved("ridge"),
    "scikit-learn, logistic": reference,
    "AdamW, 5 epochs": trained(5),
    "AdamW, 100 epochs": trained(100),
}


def main() -> None:
    warnings.filterwarnings("ignore")
    found = read_features(read_options(__doc__))
    results: dict[str, dict[str, list[tuple[float, float]]]] = {way: {} for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for name, splits in found.items():
        for way, fit in WAYS.items():
            start = time.process_time()
            head = fit(splits)
            seconds[way] += (time.process_time() - start) / len(found)
            accuracy, loss = Features(*splits["test"]).score(head)
            results[way].setdefault(name.rpartition(" ")[0], []).append((100 * accuracy, loss))
    means = {way: np.array([np.mean(pairs, 0) for pairs in tasks.values()]) for way, tasks in results.items()}
    first = means[next(iter(WAYS))]
    print("| head | accuracy % | difference | 95 % interval | cross-entropy | processor seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, values in means.items():
        gains = values[:, 0] - first[:, 0]
        wide = t.ppf(0.975, len(gains) - 1) * sem(gains)
        accuracy, loss = values.mean(0)
        print(f"| {way} | {accuracy:.2f} | {gains.mean():+.2f} | ±{wide:.2f} | {loss:.3f} | {seconds[way]:.2f} |")


if __name__ == "__main__":
    main()
