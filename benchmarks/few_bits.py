r"""Measures what fewer bits for the numbers of LoRA cost, on tasks that are trained already.

    uv run python benchmarks/few_bits.py --output benchmarks/routing --weights dinov2_vits14.safetensors \
      --emoji emoji --size 56

Tasks and their training are those of `benchmarks/routing.py`, whose runs of LoRA in the folder `--output` are used, and
made where they are missing: clip art and emoji. Each part of A and of B is rounded as `recast_pl.RoundedLoRA` does it;
heads stay as they are, although `fit` would round them for the new features. A row has the mean test accuracy in
percent, and the difference to the task as trained in points, with a 95 % confidence interval over tasks, whose seeds
are averaged before.
"""

import argparse
import statistics
import warnings
from dataclasses import replace

import torch
from paired import interval
from routing import Seed, declare_runs

from recast_pl.methods.rounding import choose_steps, nearest_codes
from recast_pl.runs.evaluation import activate, restore, split_features

BITS = (None, 8, 4, 3, 2)


def rounded(tensor, bits):
    """A or B (parts, …) with a step for each part."""
    rows = tensor.double().flatten(1)
    steps = choose_steps(rows, bits).double()[:, None]
    return (nearest_codes(rows, steps, bits) * steps).view_as(tensor).float()


@torch.no_grad()
def accuracies(seed):
    """Test accuracy in percent of each task, by bits; None for the task as trained."""
    folder, module, evaluator = seed.train("lora"), seed.module("lora"), seed.trainers.for_evaluation()
    restore(module, folder, seed.options.size)
    module.eval()
    found = {}
    for name in seed.wanted:
        patch = folder.finished()[name].load()[0]
        for bits in BITS:
            pieces = [{n: rounded(t, bits) if bits else t for n, t in state.items()} for state in patch.pieces]
            activate(module, seed.data, seed.order.index(name), replace(patch, pieces=pieces))
            test = split_features(module, seed.data, "test", evaluator)
            right = module.current()[1](test.features).argmax(1) == test.labels
            found.setdefault(bits, {})[name] = 100 * float(right.double().mean())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    declare_runs(parser)
    options = parser.parse_args()
    options.streams = ["both"]
    warnings.filterwarnings("ignore", message=".*more than one split")
    seeds = [accuracies(Seed(options, number)) for number in options.seeds]
    means = {bits: {n: statistics.mean(s[bits][n] for s in seeds) for n in seeds[0][bits]} for bits in BITS}
    print(f"{len(seeds)} seeds, {len(means[None])} tasks\n")
    print("| bits | accuracy % | difference | lowest | highest |\n|---:|---:|---:|---:|---:|")
    for bits, tasks in means.items():
        gains = [accuracy - means[None][name] for name, accuracy in tasks.items()]
        change = f"{interval(gains)} | {min(gains):+.2f} | {max(gains):+.2f}"
        print(f"| {bits or 'all'} | {statistics.mean(tasks.values()):.2f} | {change if bits else ' | | '} |")


if __name__ == "__main__":
    main()
