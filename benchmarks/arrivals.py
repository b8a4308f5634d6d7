"""Simulates a deployment: tasks arrive at random times and are learnt one after another, while requests are served.

    uv run python benchmarks/arrivals.py --tasks 60
    uv run python benchmarks/arrivals.py --tasks 1000 --output logs/arrivals

One process learns, by the commands `add` and, when a task comes back with more images, `fit --extend`. This process
serves: a `Predictor` follows the run folder, and a client asks it for images of random tasks without a pause but for
`--pause`. Tasks are synthetic images of random colours with a tiny random network, so only times, memory and the state
of the run mean something; accuracy shows that no task is lost.

Arrivals are simulated, times of work are measured: time goes on by as many seconds as the learning of a task took, or
to the next arrival. Arrivals are a Poisson process whose rate is `--load` divided by the seconds of the first task. One
in ten brings a burst of up to five tasks at once, and a share of `--repeats` of the others is a task that was there
before, as in streams with repetitions ("SCoLe": Lesort et al., "Challenging Common Assumptions about Catastrophic
Forgetting and Knowledge Accumulation", CoLLAs 2023).
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import recast_pl
from recast_pl.cli import main as recast
from recast_pl.inference.following import Follower
from recast_pl.runs.folder import RunFolder

NETWORK = [
    *("--config", "vit.yaml", "--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"),
    *("--model.backbone.args", '{"patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2}'),
    *("--data.image_size", "32", "--data.batch_size", "8", "--trainer.logger", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]
CLASSES, ROWS = 3, 10  # of a task, and of the table


@dataclass
class Arrival:
    """A task that arrives, perhaps not for the first time, and what became of it, in seconds."""

    time: float
    task: str
    repeated: bool
    waited: float = 0.0
    learnt: float = 0.0
    processor: float = 0.0
    published: float = 0.0
    queue: int = 0


class Images:
    """Writes and draws images of tasks; each class has its own colour, and images differ by noise."""

    def __init__(self, root):
        self.root, self.generator, self.parts = root, np.random.default_rng(0), Counter()

    def draw(self, task, label):
        colour = np.random.default_rng([int(task[1:]), label]).integers(0, 256, 3)
        noise = self.generator.normal(0, 60, (32, 32, 3)) + self.generator.normal(0, 25, 3)
        return np.clip(colour + noise, 0, 255).astype(np.uint8)

    def write(self, task, images=10):
        self.parts[task] += 1
        folder = self.root / f"{task}_{self.parts[task]}"
        for label in range(CLASSES):
            (folder / f"class{label}").mkdir(parents=True)
            for index in range(images):
                image = Image.fromarray(self.draw(task, label))
                image.save(folder / f"class{label}" / f"{self.parts[task]}_{index}.png")
        return folder


def memory():
    """Bytes of memory that this process has now; where there is no /proc, the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(pipe, log):
    """The process that learns: runs command lines, and answers with status, seconds and memory."""
    torch.set_num_threads(1)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    while (words := pipe.recv()) is not None:
        started, busy = time.monotonic(), time.process_time()
        status = recast(words)
        pipe.send((status, time.monotonic() - started, time.process_time() - busy, memory()))


class Worker:
    """Runs command lines in another process."""

    def __init__(self, log):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.log, self.memory = log, 0
        self.process = context.Process(target=work, args=(other, str(log)), daemon=True)
        self.process.start()

    def run(self, *words):
        """Returns the seconds that a command line took, and those of the processor."""
        self.pipe.send(list(map(str, words)))
        status, seconds, busy, self.memory = self.pipe.recv()
        if status:
            raise SystemExit(f"{' '.join(map(str, words))} failed:\n{self.log.read_text()[-2000:]}")
        return seconds, busy


@contextmanager
def client(predictor, images, pause, latencies):
    """Asks for four images of a random task again and again in a thread; notes how long each answer takes."""
    end, choose = threading.Event(), random.Random(1)

    def ask():
        while not end.wait(choose.expovariate(1 / pause)):
            task = choose.choice(predictor.tasks)
            batch = [Image.fromarray(images.draw(task, label % CLASSES)) for label in range(4)]
            started = time.monotonic()
            predictor.predict(batch, task)
            latencies.append(time.monotonic() - started)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def arrivals(count, rate, repeats, choose):
    """Yields the times and tasks of `count` new tasks, and of old ones in between."""
    now, new = 0.0, 1  # t0 is there already
    while new <= count:
        now += choose.expovariate(rate)
        if choose.random() < repeats:
            yield Arrival(now, f"t{choose.randrange(new)}", repeated=True)
            continue
        burst = choose.randint(2, 5) if choose.random() < 0.1 else 1
        for index in range(new, min(new + burst, count + 1)):
            yield Arrival(now, f"t{index}", repeated=False)
        new += burst


def accuracy(predictor, images, most=100):
    """Accuracy in percent on new images, three of each class, of up to `most` tasks that are evenly spaced."""
    right = []
    for task in predictor.tasks[:: max(1, len(predictor.tasks) // most)]:
        labels = [label for label in range(CLASSES) for _ in range(3)]
        found = predictor.predict([Image.fromarray(images.draw(task, label)) for label in labels], task)
        right += [each.label == f"class{label}" for each, label in zip(found, labels, strict=True)]
    return 100 * statistics.mean(right)


def folder_bytes(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def percentile(values, percent):
    return float(np.percentile(values, percent))


class Deployment:
    """A run folder, the process that learns into it, and the predictor that follows it."""

    def __init__(self, folder, options):
        self.images, self.options = Images(folder / "images"), options
        self.run, self.worker = folder / "run", Worker(folder / "log")
        task = json.dumps([{"name": "t0", "path": str(self.images.write("t0"))}])
        self.limits = options.options.split()
        words = [*NETWORK, "--trainer.max_epochs", "2", "--data.root", folder / "data", "--data.tasks", task]
        self.worker.run("fit", *words, "--run_dir", self.run)
        self.predictor = recast_pl.load(self.run, device="cpu")
        self.follower = Follower(self.predictor, RunFolder(self.run), lambda line: None)

    def learn(self, arrival):
        """Learns a task that has arrived, until the predictor answers for it; notes how long that took."""
        path = self.images.write(arrival.task, 3 if arrival.repeated else 10)
        named = ("--run_dir", self.run, "--path", path)
        command = ("fit", "--extend", arrival.task) if arrival.repeated else ("add", "--task", arrival.task)
        arrival.learnt, arrival.processor = self.worker.run(*command, *named, *self.limits)
        started = time.monotonic()
        self.follower.look()
        self.predictor.predict(Image.fromarray(self.images.draw(arrival.task, 0)), arrival.task)
        arrival.published = time.monotonic() - started


def row(deployment, log, latencies, tasks):
    """A row of the table, about the latest arrivals."""
    first = [a.waited + a.learnt + a.published for a in log]
    learnt = [a.learnt for a in log if not a.repeated]
    again = [a.learnt for a in log if a.repeated]
    cells = [
        f"{tasks:,}",
        f"{len(again)}",
        f"{max(a.queue for a in log)}",
        f"{statistics.median(learnt):.2f}" if learnt else "",
        f"{statistics.median(a.processor for a in log if not a.repeated):.2f}" if learnt else "",
        f"{statistics.median(again):.2f}" if again else "",
        f"{1000 * statistics.median(a.published for a in log):.0f}",
        f"{statistics.median(first):.1f} / {percentile(first, 95):.1f}",
        f"{1000 * percentile(latencies, 50):.0f} / {1000 * percentile(latencies, 95):.0f}" if latencies else "",
        f"{accuracy(deployment.predictor, deployment.images):.1f}",
        f"{deployment.worker.memory / 1e6:,.0f}",
        f"{memory() / 1e6:,.0f}",
        f"{folder_bytes(deployment.run) / tasks / 1e3:.1f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def simulate(deployment, options):
    """Learns all tasks that arrive; prints a row after each tenth, and how the time to learn a task has changed."""
    warm = Arrival(0.0, "t1", repeated=False)
    deployment.learn(warm)
    rate, now = options.load / warm.learnt, 0.0
    waiting = list(arrivals(options.tasks, rate, options.repeats, random.Random(options.seed)))
    waiting = [a for a in waiting if a.repeated or a.task != "t1"]
    log, shown, size = list[Arrival](), 0, -(-len(waiting) // ROWS)
    latencies = list[float]()
    for index, arrival in enumerate(waiting):
        now = max(now, arrival.time)
        arrival.waited = now - arrival.time
        arrival.queue = sum(a.time <= now for a in waiting[index:])
        with client(deployment.predictor, deployment.images, options.pause, latencies):
            deployment.learn(arrival)
        now += arrival.learnt + arrival.published
        log.append(arrival)
        if len(log) % size == 0 or index == len(waiting) - 1:
            row(deployment, log[shown:], latencies, len(deployment.predictor.tasks))
            latencies.clear()
            shown = len(log)
    busy = [a.processor for a in log if not a.repeated]
    part = max(1, len(busy) // 4)
    first, last = statistics.median(busy[:part]), statistics.median(busy[-part:])
    slope = np.polyfit(range(len(busy)), busy, 1)[0]
    print(
        f"\nto learn a task took {first:.2f} s of the processor in the first quarter and {last:.2f} s in the last "
        f"(medians), {1000 * slope:+.1f} ms for each task that was there before"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=60, help="new tasks that arrive")
    parser.add_argument("--load", type=float, default=0.8, help="arrivals in the time that one task takes")
    parser.add_argument("--repeats", type=float, default=0.2, help="share of arrivals that bring an old task again")
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between two requests")
    parser.add_argument("--options", default="--budget.seconds 30 --budget.bytes 4000 --budget.images 24")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for run and images; removed at the end if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        deployment = Deployment((options.output or Path(scratch)).resolve(), options)
        print(
            "| tasks | repeats | longest queue | add s | of the processor | extend s | publish ms | answer after s, "
            "median / 95 % | request ms, median / 95 % | accuracy % | MB learning | MB serving | kB on disk a task |"
        )
        print("|" + "---:|" * 13)
        simulate(deployment, options)


if __name__ == "__main__":
    main()
