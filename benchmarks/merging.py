r"""Measures merged tasks with the heads of their own: their accuracy against that of separate patches, and the bytes.

    uv run python benchmarks/merging.py --output benchmarks/routing --weights dinov2_vits14.safetensors \
      --emoji emoji --size 56

Tasks and their training are those of `benchmarks/routing.py`, whose runs in the folder `--output` are used, and made
where they are missing. The four tasks of clip art, the eight of emoji, and all twelve are merged in every way that the
method allows, for each seed. Columns:

- own, merged: mean test accuracy in percent of the tasks, from their own patches and merged
- difference: of the two, with its 95 % confidence interval over seeds
- patches, file: bytes of the patches, and of the merged file

It needs no jsonargparse.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

from routing import STREAMS, Seed, declare_runs
from scipy import stats

from recast_pl.files import json_text, write_atomic
from recast_pl.learning.merging import MERGERS
from recast_pl.runs.evaluation import restore
from recast_pl.runs.patch_merging import merge_patches

GROUPS = ("clipart", "emoji", "both")


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    declare_runs(parser)
    parser.add_argument("--methods", nargs="+", choices=["recast", "lora", "full"], default=["recast"])
    parser.add_argument("--ways", nargs="+", choices=MERGERS, default=list(MERGERS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/merging"), help="folder of the results")
    return parser.parse_args()


def measure(seed, method, group, way):
    """Merges the tasks of a group; returns means over its tasks, and bytes."""
    folder, names = seed.train(method), STREAMS[group]
    files = folder.finished()
    patches = [files[name].load()[0] for name in names]
    module, evaluator = seed.module(method), seed.trainers.for_evaluation()
    restore(module, folder, seed.options.size)
    merged, rows = merge_patches(module, seed.data, patches, way, MERGERS[way](), evaluator)
    return {
        "own": statistics.fmean(row.alone for row in rows),
        "merged": statistics.fmean(row.merged for row in rows),
        "patches": sum(files[name].patch.stat().st_size for name in names),
        "file": len(merged.to_bytes()),
        "how": merged.how,
    }


def interval(values):
    """Half of the 95 % confidence interval of a mean; none for a single value."""
    if len(values) < 2:
        return None
    return stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def row(method, group, way, found):
    means = {name: statistics.fmean(each[name] for each in found) for name in ("own", "merged", "patches", "file")}
    differences = [each["merged"] - each["own"] for each in found]
    half = interval(differences)
    spread = "" if half is None else f" ± {half:.1f}"
    return (
        f"| {group} | {method} | {way} | {len(found)} | {means['own']:.1f} | {means['merged']:.1f} "
        f"| {statistics.fmean(differences):+.1f}{spread} | {means['patches']:,.0f} | {means['file']:,.0f} |"
    )


def main():
    options = read_options()
    warnings.filterwarnings("ignore", message=".*more than one split")
    options.streams = options.groups  # which have the same names
    print("| tasks | method | merging | seeds | own | merged | difference | patches | file |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    seeds = {number: Seed(options, number) for number in options.seeds}
    for method in options.methods:
        for group in options.groups:
            for way in options.ways:
                if method == "lora" and MERGERS[way]().exact:
                    continue  # it needs numbers of the weights themselves, and LoRA has factors
                found = []
                for number, seed in seeds.items():
                    path = options.results / f"{group}-{method}-{way}-{number}.json"
                    if not path.exists():
                        write_atomic(path, json_text(measure(seed, method, group, way)))
                    found.append(json.loads(path.read_text()))
                print(row(method, group, way, found), flush=True)


if __name__ == "__main__":
    main()
