"""Measures how long runs of few and of many tasks take to open and to list.

    uv run python benchmarks/many_tasks.py logs/mine --counts 10 1000

All tasks are copies of the first task of a run, under other names. Times are seconds of the processor, without the
start of Python and its imports. Memory is what a new process has after it has loaded all tasks, and with the router;
that of states and heads is counted from their tensors.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import yaml

import recast_pl
from recast_pl.config.changing import refresh
from recast_pl.files import sealed_json, sha256
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.listing import list_tasks


def multiply(source, path, count):
    """Writes a run folder with copies of the first task of another run."""
    shutil.copytree(source.path, path, ignore=shutil.ignore_patterns("patches", "tasks", "signatures", "tensorboard"))
    (files, *_), run = source.finished().values(), RunFolder(path)
    (patch, record), signature = files.load(), files.load_signature()
    names = [f"t{index}" for index in range(count)]
    for copy in run.files_of(names):
        content = replace(patch, task=copy.task).to_bytes()
        record["task"]["name"], record["patch"] = copy.task, sha256(content)
        record["accuracies"] = {copy.task: record["task"]["accuracy"]}
        for file, data in ((copy.plain, content), (copy.record, sealed_json(record).encode())):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        replace(signature, task=copy.task).save(copy.signature)
    config = yaml.safe_load(run.config.read_text())
    config["data"]["tasks"] = [config["data"]["tasks"][0] | {"name": name} for name in names]
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    return run


def seconds(action):
    """Seconds of the processor that an action takes, the least of two times."""
    found = []
    for _ in range(2):
        started = time.process_time()
        action()
        found.append(time.process_time() - started)
    return min(found)


def resident():
    """Megabytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure_memory(path):
    """Prints the megabytes of memory with all tasks of a run, with the router, and those of states and heads."""
    model = recast_pl.load(path, device="cpu")
    loaded = resident()
    _ = model.router
    sizes = [patch.tensors.values() for patch in RunFolder(path).load_patches().values()]
    print(json.dumps([loaded, resident(), sum(tensor.nbytes for tensors in sizes for tensor in tensors) / 1e6]))


def megabytes(path):
    """What `measure_memory` prints, in a process of its own."""
    command = [sys.executable, __file__, str(path), "--memory"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--memory", action="store_true", help="measure the memory of this run alone")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 1000], help="numbers of tasks")
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.run)
        return
    names = "list | predict by one task | all tasks | find tasks | results | MB loaded | MB with router | MB of patches"
    print(f"| tasks | {names} |\n{'|---:' * 9}|")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            run = multiply(RunFolder(options.run), Path(folder) / "run", count)
            actions = (
                lambda path=run.path: list_tasks(path),
                lambda path=run.path: recast_pl.load(path, device="cpu", tasks=["t3"]),
                lambda path=run.path: recast_pl.load(path, device="cpu"),
                lambda path=run.path: recast_pl.load(path, device="cpu", on_demand=True).router,
                lambda run=run: refresh(run),
            )
            cells = [
                *(f"{seconds(action):.2f}" for action in actions),
                *(f"{size:.1f}" for size in megabytes(run.path)),
            ]
            print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
