"""Rounds the heads of trained tasks to fewer bits, as `patch quantize` does, and measures what whole tasks lose.

    uv run python benchmarks/small_heads.py logs/board/clipart/chosen logs/board/emoji/chosen

Each argument is the folder of one method that a board made on one stream. The runs are those of its best rate, the only
one with several seeds. Accuracies are those of test images, means over tasks. Differences are those to the patches of
the runs, paired by seed, with 95 % confidence intervals over seeds. Bytes are those of whole files.
"""

import argparse
import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import sem, t

from recast_pl import TaskPatch
from recast_pl.cli import main as recast_pl


def runs(method: Path) -> list[Path]:
    """The runs of all seeds at the rate that has most of them."""
    return max((sorted(p.parent for p in rate.glob("*/summary.json")) for rate in method.iterdir()), key=len)


def quantized(run: Path, precision: str) -> list[TaskPatch]:
    """The patches of a run in a precision, with both accuracies."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((run / "patches").iterdir()):
            words = ["--patch_precision", precision, "--run_dir", str(run), "--output", f"{folder}/small"]
            with contextlib.redirect_stdout(io.StringIO()):
                assert recast_pl(["patch", "quantize", str(path), *words]) == 0
            found.append(TaskPatch.load(f"{folder}/small"))
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", type=Path, nargs="+", help="folders of methods")
    parser.add_argument("--patch_precision", default="int2")
    options = parser.parse_args()
    print("| stream and method | seeds | accuracy % | rounded % | difference | bytes | rounded |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in options.methods:
        accuracies, sizes = [], []
        for run in runs(method):
            patches = quantized(run, options.patch_precision)
            pairs = [(patch.metrics["accuracy_fp32"], patch.metrics["accuracy"]) for patch in patches]
            accuracies.append(np.mean(pairs, axis=0))
            before = [path.stat().st_size for path in (run / "patches").iterdir()]
            sizes.append((np.mean(before), np.mean([len(patch.to_bytes()) for patch in patches])))
        changes = np.diff(accuracies)[:, 0]
        wide = t.ppf(0.975, len(changes) - 1) * sem(changes)
        (old, new), (stored, rounded) = np.mean(accuracies, axis=0), np.mean(sizes, axis=0)
        name = f"{method.parent.name}, {method.name}"
        difference = f"{changes.mean():+.2f} [{changes.mean() - wide:+.2f}, {changes.mean() + wide:+.2f}]"
        print(
            f"| {name} | {len(changes)} | {old:.2f} | {new:.2f} | {difference} | {stored:,.0f} | {rounded:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
