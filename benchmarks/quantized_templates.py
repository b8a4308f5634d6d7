"""Measures what templates of 8 bits cost: errors of weights, bytes of the file, and accuracy of converged heads.

    uv run python benchmarks/quantized_templates.py --weights dinov2_vits14.safetensors --size 56

The network's attention and MLP weights are generated from templates of each precision, and a linear discriminant is
solved on its features for every task. Differences to full precision are in percentage points, averaged over seeds, with
a 95 % interval over tasks.
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import sem, t
from small_patches import extract, read_options
from torch import nn

from recast_pl import BankLayout, Decomposition, decompose, install
from recast_pl.decomposition.similarity import weight_similarity
from recast_pl.learning.features import Features
from recast_pl.learning.heads import solve_head

TARGETS = [r"(attn\.qkv|attn\.proj|mlp\.fc[12])\.weight"]
PRECISIONS = ("full", "int8", "int8_power")


def decomposed(network: nn.Module, precision: str, folder: Path) -> tuple[str, Decomposition]:
    """A row of the table, without accuracies, and the decomposition."""
    layout = BankLayout(TARGETS, groups=6, templates=2, precision=precision)  # type: ignore[arg-type]
    decomposition = decompose(network, layout)
    errors = [target.relative_error for target in weight_similarity(decomposition, network)]
    decomposition.save(folder / precision)
    size = (folder / precision).stat().st_size / 1e6
    exponents = [float(b.quantized.exponent) for b in decomposition.banks if b.quantized is not None]
    spread = f"{min(exponents):.2f} to {max(exponents):.2f}" if exponents else ""
    return f"{size:.1f} | {100 * np.mean(errors):.3f} | {100 * max(errors):.3f} | {spread}", decomposition


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")
    options, rows, right = read_options(__doc__), dict[str, str](), dict[str, np.ndarray]()
    for precision in PRECISIONS:

        def change(network: nn.Module, precision: str = precision) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rows[precision], decomposition = decomposed(network, precision, Path(folder))
            install(network, decomposition)

        found: dict[str, list[float]] = {}
        for name, splits in extract(options, change).items():
            head = solve_head("lda", Features(*splits["train"]), int(splits["train"][1].max()) + 1)
            found.setdefault(name.rpartition(" ")[0], []).append(100 * Features(*splits["test"]).score(head)[0])
        right[precision] = np.array([np.mean(values) for values in found.values()])  # (tasks,)
    print("| templates | MB | error %, mean | largest | exponents | accuracy % | points | 95 % interval |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for precision, row in rows.items():
        gains = right[precision] - right["full"]
        wide = t.ppf(0.975, len(gains) - 1) * sem(gains)
        cells = f"{gains.mean():+.2f} | ±{wide:.2f}" if precision != "full" else " | "
        print(f"| `{precision}` | {row} | {right[precision].mean():.2f} | {cells} |")


if __name__ == "__main__":
    main()
