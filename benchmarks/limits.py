"""Compares accuracy on training images with that on test images, for runs of several methods.

    uv run python benchmarks/limits.py logs/board/digits/*/*/42

A method that knows its training images and not the test images lacks data. One that does not know its training images
lacks numbers, or steps.
"""

import argparse
import statistics

import recast_pl
from recast_pl.config.run import open_run


def accuracy(model, data, task, split):
    """Accuracy in percent on a split of a task."""
    right = []
    for images, labels, *_ in data.plain_dataloader(split):
        found = model.predict_tensors(images, [task] * len(images))
        right += [data.classes[label] == each.label for label, each in zip(labels.tolist(), found, strict=True)]
    return 100 * statistics.mean(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    print("| run | numbers | training % | validation % | test % |\n|---|---:|---:|---:|---:|")
    for run in parser.parse_args().runs:
        model, (_, init) = recast_pl.load(run), open_run(run)
        init.data.prepare_data()
        rows = []
        for index, task in enumerate(init.data.tasks):
            init.data.select(index)
            rows.append([accuracy(model, init.data, task.name, split) for split in ("train", "val", "test")])
        means = " | ".join(f"{statistics.mean(column):.2f}" for column in zip(*rows, strict=True))
        print(f"| {run} | {init.model.task_parameters:,} | {means} |", flush=True)


if __name__ == "__main__":
    main()
