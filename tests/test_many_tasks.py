"""Streams of many tasks: the work, the memory and the open files of a task do not grow with the number of tasks."""

import collections
import cProfile
import io
import json
import os
import pstats
import struct
import sys

import pytest
from rich.console import Console
from test_stream import read_summary

from recast_pl import BackboneConfig, LinearProbe, SequentialTaskDataModule, TaskConfig, TILModule
from recast_pl.cli import main
from recast_pl.errors import RecastError
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting import plots, stream_results
from recast_pl.reporting.plots import plot_accuracy_matrix, to_png
from recast_pl.reporting.stream_results import StreamResults
from recast_pl.runs.pace import Pace
from recast_pl.runs.stream import Stream


@pytest.fixture
def stream(image_folder, tmp_path):
    """Makes a stream of some tasks that read the same images."""

    def make(count):
        images = str(image_folder("images", 2, images=4))
        data = SequentialTaskDataModule([TaskConfig(f"t{i}", images) for i in range(count)], image_size=32)
        module = TILModule(BackboneConfig("resnet10t", "random"), [LinearProbe()])
        settings = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainers, console = TrainerFactory(settings), Console(file=io.StringIO())
        results = StreamResults(console, trainers)
        return Stream(module, data, tmp_path / "run", trainers, console=console, presentation=results)

    return make


def test_the_work_of_a_task_does_not_grow(stream, tmp_path, monkeypatch):
    """Counts calls of functions, because times vary: they grow if anything is done once for each earlier task."""
    count, calls, drawn = 16, [], collections.Counter()
    train, draw = Stream._train, stream_results.plot_accuracy_matrix

    def counted_train(self, index):
        profile = cProfile.Profile()
        profile.runcall(train, self, index)
        calls.append(pstats.Stats(profile).total_calls)

    def counted_draw(*args):
        drawn["matrix"] += 1
        return draw(*args)

    monkeypatch.setattr(Stream, "_train", counted_train)
    monkeypatch.setattr(stream_results, "plot_accuracy_matrix", counted_draw)
    summary = stream(count).run()
    assert len(calls) == count == len(summary["tasks"])
    assert calls[-1] < 1.02 * calls[2], calls  # the first tasks fill caches
    assert drawn["matrix"] < count / 2  # at the end, and so often that it takes a twentieth of the time
    assert read_summary(tmp_path / "run") == summary
    lines = (tmp_path / "run" / "summary.json").read_text().splitlines()
    rows = lines[lines.index('  "accuracy_matrix": [') + 1 :][:count]
    assert [json.loads(row.strip(" ,")) for row in rows] == summary["accuracy_matrix"]  # a line each
    records = sorted((tmp_path / "run" / "tasks").iterdir(), key=lambda path: path.name)
    assert [list(json.loads(path.read_text())["accuracies"]) for path in records[:2]] == [["t0"], ["t1"]]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the entries of /proc/self/fd")
def test_a_task_keeps_no_file_open(stream):
    prepared = stream(40)
    before = len(os.listdir("/proc/self/fd"))
    prepared.begin()
    assert len(os.listdir("/proc/self/fd")) < before + 10  # many systems allow 1,024


def test_results_take_a_bounded_share_of_the_time(monkeypatch):
    clock, written, pace = [100.0], [], Pace()
    monkeypatch.setattr("recast_pl.runs.pace.time.monotonic", lambda: clock[0])

    def write():
        written.append(clock[0])
        clock[0] += 2  # seconds that it takes

    for _ in range(200):
        pace.run(write)
        clock[0] += 1  # seconds that a task takes
    assert written[0] == 100
    assert 0.04 < 2 * len(written) / (clock[0] - 100) < 0.06


def test_results_are_written_when_a_later_task_fails(tiny_fit, tmp_path, monkeypatch):
    monkeypatch.setattr(Pace, "run", lambda self, action: None)  # as if there had been no time before
    train = Stream._train

    def failing(self, index):
        if index == 1:
            raise RecastError("out of luck")
        train(self, index)

    monkeypatch.setattr(Stream, "_train", failing)
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 2
    summary = read_summary(tmp_path / "run")
    assert [task["name"] for task in summary["tasks"]] == ["first"]
    assert summary["unlearnt"] == ["second"]
    assert (tmp_path / "run" / "accuracy_matrix.png").is_file()


@pytest.mark.parametrize("count", [1, 20, 21, 1000])
def test_the_picture_of_the_matrix_has_a_bounded_size(count):
    matrix = [[50.0 if column <= row else None for column in range(count)] for row in range(count)]
    picture = to_png(plot_accuracy_matrix(matrix, [f"task {index} $" + "x" * 90 for index in range(count)]))
    assert max(struct.unpack(">II", picture[16:24])) < 3000  # width and height in the header of a PNG file
    matrix[-1][0] = 70.0
    drawn = plots.plot_accuracy_matrix(matrix, ["t"] * count).axes[0].get_images()[0].get_array()
    assert drawn.shape == (min(count, 250),) * 2
    assert (drawn[0, 0], drawn[-1, 0]) == (
        70.0 if count == 1 else 50.0,
        70.0,
    )  # the latest is among them
