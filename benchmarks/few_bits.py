r"""Measures what fewer bits for the numbers of LoRA cost, on tasks that are trained already.

    uv run python benchmarks/few_bits.py --output benchmarks/routing --weights dinov2_vits14.safetensors \
      --emoji emoji --size 56

Tasks and their training are those of `benchmarks/routing.py`, whose runs of LoRA in the folder `--output` are used, and
made where they are missing: clip art and emoji. Each part of A and of B is rounded as `recast_pl.RoundedLoRA` does it,
with 3 bits too. A row has the mean test accuracy in percent, and the difference to the task as trained in points, with
a 95 % confidence interval over tasks, whose seeds are averaged before: first with the heads of the patches, of 4 bits,
then with heads in full precision solved again on the training images, for the weights after rounding.
"""

import argparse
import statistics
import warnings
from dataclasses import replace

from paired import interval
from routing import Seed, declare_runs

from recast_pl.learning.heads import solve_head
from recast_pl.methods.rounding import choose_steps, nearest_codes
from recast_pl.runs.evaluation import activate, restore, split_features

BITS = (None, 8, 4, 3, 2, 1)


def rounded(tensor, bits):
    """A or B (parts, …) with a step for each part."""
    rows = tensor.double().flatten(1)
    steps = choose_steps(rows, bits).double()[:, None]
    return (nearest_codes(rows, steps, bits) * steps).view_as(tensor).float()


def accuracies(seed):
    """Test accuracy in percent of each task with its head and with a new one, by bits; None for the task as trained."""
    folder, module, evaluator = seed.train("lora"), seed.module("lora"), seed.trainers.for_evaluation()
    restore(module, folder, seed.options.size)
    module.eval()
    found = {}
    for name in seed.wanted:
        patch = folder.finished()[name].load()[0]
        for bits in BITS:
            pieces = [{n: rounded(t, bits) if bits else t for n, t in state.items()} for state in patch.pieces]
            activate(module, seed.data, seed.order.index(name), replace(patch, pieces=pieces))
            train, test = (split_features(module, seed.data, split, evaluator) for split in ("train", "test"))
            heads = module.current()[1], solve_head(module.head_kind, train, len(patch.classes))
            right = [(head(test.features).argmax(1) == test.labels).double().mean() for head in heads]
            found.setdefault(bits, {})[name] = [100 * float(share) for share in right]
    return found


def mean(seeds, bits, name, head):
    return statistics.mean(seed[bits][name][head] for seed in seeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    declare_runs(parser)
    options = parser.parse_args()
    options.streams = ["both"]
    warnings.filterwarnings("ignore", message=".*more than one split")
    seeds = [accuracies(Seed(options, number)) for number in options.seeds]
    names = list(seeds[0][None])
    print(f"{len(seeds)} seeds, {len(names)} tasks\n")
    print("| bits | accuracy % | difference | lowest | highest | head solved again % | difference |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    trained = {name: mean(seeds, None, name, 0) for name in names}
    for bits in BITS:
        old, new = ({name: mean(seeds, bits, name, head) for name in names} for head in (0, 1))
        gains, others = ([found[name] - trained[name] for name in names] for found in (old, new))
        change = f"{interval(gains)} | {min(gains):+.2f} | {max(gains):+.2f}" if bits else " | | "
        again = f"{statistics.mean(new.values()):.2f} | {interval(others)}"
        print(f"| {bits or 'all'} | {statistics.mean(old.values()):.2f} | {change} | {again} |")


if __name__ == "__main__":
    main()
