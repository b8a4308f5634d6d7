"""Compares accuracy on training images with that on test images, for runs of several methods.

    uv run python benchmarks/limits.py logs/board/digits/*/*/42

A method that knows its training images and not the test images lacks data. One that does not know its training images
lacks numbers, or steps.
"""

import argparse
import statistics

import torch

from recast_pl.config.run import open_run
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder


@torch.no_grad()
def accuracy(module, data, split):
    """Accuracy in percent on a split of the current task."""
    right = []
    for batch in data.plain_dataloader(split):
        images, labels = data.on_after_batch_transfer(batch, 0)
        right += (module(images).argmax(1) == labels).tolist()
    return 100 * statistics.mean(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    print("| run | numbers | training % | validation % | test % |\n|---|---:|---:|---:|---:|")
    for run in parser.parse_args().runs:
        folder, (_, init) = RunFolder(run), open_run(run)
        init.data.prepare_data()
        rows = []
        for index, patch in enumerate(folder.load_patches().values()):
            init.data.select(index)
            restore(init.model, folder, patch.image_size)
            init.model.activate(patch)
            rows.append([accuracy(init.model, init.data, split) for split in ("train", "val", "test")])
        means = " | ".join(f"{statistics.mean(column):.2f}" for column in zip(*rows, strict=True))
        print(f"| {run} | {init.model.task_parameters:,} | {means} |", flush=True)


if __name__ == "__main__":
    main()
