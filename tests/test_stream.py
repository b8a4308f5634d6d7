"""A stream from the command line: what it writes, how it resumes, and how it is evaluated again."""

import csv
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, forks
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from recast_pl import BackboneConfig, LinearProbe, SequentialTaskDataModule, TaskConfig, TaskPatch, TILModule
from recast_pl.cli import main
from recast_pl.errors import RunError
from recast_pl.files import is_whole_checkpoint, read_sealed_json, sealed_json
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.tables import classes_markdown, matrix_csv
from recast_pl.runs.class_results import class_measures, class_results, confusion_matrix
from recast_pl.runs.folder import config_name
from recast_pl.runs.metrics import (
    average_accuracy,
    average_anytime_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    matrix_lines,
)
from recast_pl.runs.stream import Stream

# methods of each kind of state that resuming needs
ISOLATED = ("rosa", "lift", "chosen", "recast_dora", "recast_l2sp", "adaptformer")
SHARED = ("ewc", "classp", "gdumb", "derpp", "hat", "inflora", "hypernetwork", "napa_vq", "ider")
# shared methods whose training depends on the images of all processes
GATHERING = ("derpp", "inflora", "napa_vq", "ider")
TIMES = ("seconds", "wall_seconds")


def read_summary(run):
    return json.loads((run / "summary.json").read_text())


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def patches(run):
    return {path.name: path.read_bytes() for path in sorted((run / "patches").iterdir())}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run that `tiny_fit()` makes."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_run_folder_holds_the_documented_files(run):
    assert {"config.yaml", "decomposition.safetensors", "summary.json", "accuracy_matrix.csv"} <= {
        path.name for path in run.iterdir()
    }
    assert list(patches(run)) == ["00_first.safetensors", "01_second.safetensors"]
    summary = read_summary(run)
    assert set(summary) == {
        *("method", "backbone", "seed", "tasks", "accuracy_matrix", "average_accuracy", "average_anytime_accuracy"),
        *("backward_transfer", "forgetting", "shared_bytes", "unlearnt", "wall_seconds"),
    }
    assert summary["shared_bytes"] == 0
    assert not (run / "shared").exists()
    first, second = summary["tasks"]
    assert set(first) == {
        *("name", "classes", "accuracy", "balanced_accuracy", "probe_accuracy", "task_parameters", "head_parameters"),
        *("patch_bytes", "train_images", "test_images", "split", "epochs", "seconds"),
        *("validation_accuracy", "validation_loss"),
    }
    assert (first["name"], first["classes"], second["classes"]) == ("first", 3, 2)
    assert first["task_parameters"] == 96  # vit.yaml: 24 weights, n 2, K 2
    assert first["head_parameters"] == 3 * (32 + 1)
    assert (first["train_images"], first["test_images"]) == (16, 4)  # 15 % of 24 images are 3.6
    assert first["epochs"] == 3
    assert first["patch_bytes"] == len(patches(run)["00_first.safetensors"])
    patch = TaskPatch.load(run / "patches" / "00_first.safetensors")
    assert patch.classes == ["class0", "class1", "class2"]
    assert patch.metrics["accuracy"] == first["accuracy"]
    assert (patch.image_size, patch.mean) == (32, [0.5, 0.5, 0.5])


def test_the_accuracy_matrix_and_its_measures(run):
    summary = read_summary(run)
    matrix = summary["accuracy_matrix"]
    assert matrix[0][1] is None
    assert matrix[1][0] == matrix[0][0]  # RECAST forgets nothing
    assert summary["forgetting"] == summary["backward_transfer"] == 0
    assert summary["average_accuracy"] == (matrix[1][0] + matrix[1][1]) / 2
    rows = list(csv.reader(io.StringIO((run / "accuracy_matrix.csv").read_text())))
    assert rows[0] == ["after", "first", "second"]
    assert rows[1] == ["first", str(matrix[0][0]), ""]


def test_measures_by_hand():
    matrix = [[90.0, None, None], [70.0, 80.0, None], [75.0, 60.0, 50.0]]
    assert average_accuracy(matrix) == pytest.approx((75 + 60 + 50) / 3)
    assert backward_transfer(matrix) == pytest.approx(((75 - 90) + (60 - 80)) / 2)
    assert forgetting(matrix) == pytest.approx(((90 - 75) + (80 - 60)) / 2)
    assert forgetting([[70.0, None], [80.0, 60.0]]) == -10
    assert average_anytime_accuracy(matrix) == pytest.approx((90 + (70 + 80) / 2 + (75 + 60 + 50) / 3) / 3)
    assert forward_transfer(matrix, [99, 70, 55]) == pytest.approx(((80 - 70) + (50 - 55)) / 2)
    assert (forgetting([[50.0]]), backward_transfer([[50.0]]), average_accuracy([[50.0]])) == (0, 0, 50)
    assert (average_anytime_accuracy([[50.0]]), forward_transfer([[50.0]], [40])) == (50, 0)


@pytest.mark.parametrize("kept_apart", [True, False])
def test_the_text_of_the_matrix_is_that_of_the_json_and_csv_modules(kept_apart):
    generator = np.random.default_rng(0)
    own = generator.random(12) * 100
    rows = [own if kept_apart else generator.choice([*own, 100.0], 12) for _ in own]
    matrix = [[float(v) if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(rows)]
    assert [f"[{line}]" for line in matrix_lines(matrix, ", ", "null")] == [json.dumps(row) for row in matrix]
    names, text = [f'a "task", {i}' for i in range(12)], io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["after", *names], *map(lambda n, r: [n, *r], names, matrix)])
    assert matrix_csv(matrix, names) == text.getvalue()


def test_tensorboard_shows_each_task_and_the_stream(run):
    def events(name):
        return EventAccumulator(str(run / "tensorboard" / name)).Reload()

    task = events("00_first")
    assert {"train/loss_epoch", "train/accuracy", "val/accuracy", "val/loss", "lr-AdamW/head"} <= set(
        task.Tags()["scalars"]
    )
    assert len(task.Scalars("val/accuracy")) == 3
    assert task.Tags()["histograms"] == ["coefficients/Recast"]
    stream = events("stream")
    assert {"stream/average_accuracy", "stream/forgetting", "accuracy/first"} <= set(stream.Tags()["scalars"])
    assert stream.Tags()["images"] == ["accuracy_matrix"]
    assert task.Tags()["images"] == ["confusion_matrix"]


def test_every_accuracy_in_tensorboard_is_in_percent(run):
    images = read_summary(run)["tasks"][0]["train_images"]
    validated = [
        e.value for e in EventAccumulator(str(run / "tensorboard" / "00_first")).Reload().Scalars("val/accuracy")
    ]
    trained = EventAccumulator(str(run / "tensorboard" / "00_first")).Reload().Scalars("train/accuracy")
    for value, count in [(value, 4) for value in validated] + [(event.value, images) for event in trained]:
        assert value * count / 100 == pytest.approx(round(value * count / 100), abs=1e-4)
    assert max(event.value for event in trained) > 20


def test_the_hyperparameters_tab_has_the_method_the_rate_and_the_streams_measures(run):
    content = EventAccumulator(str(run / "tensorboard" / "stream")).Reload().PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    shown = {name: value.string_value or value.number_value for name, value in start.items()}
    assert (shown["method"], shown["backbone"], shown["seed"]) == ("Recast", "vit_tiny_patch16_224", 42)
    assert shown["pieces.Recast.layout.coefficient_sets"] == 2
    assert (shown["optimizer"], shown["optimizer.lr"]) == ("AdamW", 0.002)
    assert (shown["trainer.max_epochs"], shown["data.batch_size"]) == (3, 4)
    assert not [name for name in shown if "root" in name or "tasks" in name]
    measures = {metric.name.tag for metric in experiment.metric_infos}
    assert {"stream/average_accuracy", "stream/forgetting"} <= measures
    stream = EventAccumulator(str(run / "tensorboard" / "stream")).Reload()
    assert stream.Scalars("stream/average_accuracy")[-1].value == pytest.approx(read_summary(run)["average_accuracy"])


def test_a_record_holds_the_results_by_class(run):
    for path, task in zip(sorted((run / "tasks").iterdir()), read_summary(run)["tasks"], strict=True):
        classes = read_sealed_json(path, RunError)["classes"]
        assert classes["names"] == [f"class{index}" for index in range(task["classes"])]
        assert sum(classes["images"]) == sum(classes["predicted"]) == task["test_images"]
        assert 100 * sum(classes["right"]) / task["test_images"] == pytest.approx(task["accuracy"], abs=1e-3)
        assert confusion_matrix(classes).sum() == task["test_images"]
    texts = EventAccumulator(str(run / "tensorboard" / "01_second")).Reload().Tags()["tensors"]
    assert "classes/text_summary" in texts


def test_measures_of_classes_by_hand():
    pairs = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 0], [1, 0], [1, 0]])
    results = class_results(["cat", "dog", "eel"], pairs)
    cat, dog, eel = class_measures(results)
    assert cat == ("cat", 3, pytest.approx(200 / 3), pytest.approx(40), pytest.approx(50))
    assert dog == ("dog", 4, 25, 50, pytest.approx(100 / 3))
    assert eel == ("eel", 0, None, None, None)
    assert results["confused"] == [[1, 0, 3], [0, 1, 1]]  # the most frequent first
    assert confusion_matrix(results).tolist() == [[2, 1, 0], [3, 1, 0], [0, 0, 0]]


def test_many_classes_keep_the_most_frequent_confusions_only():
    generator = np.random.default_rng(0)
    pairs = np.concatenate([generator.integers(0, 1000, (5000, 2)), [[7, 8]] * 9])
    results = class_results([f"class {index}" for index in range(1000)], pairs)
    assert (results["confused"][0], len(results["confused"])) == ([7, 8, 9], 400)
    assert (sum(results["images"]), confusion_matrix(results)) == (5009, None)
    assert classes_markdown(results).count("\n") < 1100


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run, tiny_fit, tmp_path):
    assert main(tiny_fit(run_dir=tmp_path / "again")) == 0
    assert patches(tmp_path / "again") == patches(run)
    assert main(tiny_fit("--seed_everything", "1", run_dir=tmp_path / "other")) == 0
    assert patches(tmp_path / "other") != patches(run)


def test_test_measures_again_and_finds_a_difference(run, capsys):
    assert main(["test", "--run_dir", str(run)]) == 0
    assert capsys.readouterr().out.count("equal") == 2
    path = run / "tasks" / "01_second.json"
    record = read_sealed_json(path, RunError)
    record["accuracies"]["second"] += 1
    path.write_text(sealed_json(record))
    assert main(["test", "--run_dir", str(run)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_test_uses_the_stored_templates(run):
    # another machine may decompose the same network to other bits, so only the file counts
    path = run / "decomposition.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert main(["test", "--run_dir", str(run)]) == 2


def test_predict_writes_a_label_and_a_probability_for_each_image(run, tiny_fit, tmp_path):
    images = sorted((tmp_path / "second").rglob("*.png"))
    output = tmp_path / "out" / "predictions.csv"
    words = ["predict", "--run_dir", str(run), "--task", "second", "--output", str(output)]
    assert main([*words, "--images", *map(str, images)]) == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["path"] for row in rows] == list(map(str, images))
    assert {row["label"] for row in rows} <= {"class0", "class1"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_resuming_a_finished_run_changes_nothing(run, capsys):
    before = (run / "summary.json").read_bytes(), patches(run)
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert ((run / "summary.json").read_bytes(), patches(run)) == before
    assert "second" in capsys.readouterr().out


CHANGED = ("--resume", "true", "--trainer.max_epochs", "7", "--model.optimizer.init_args.lr", "0.5")


def test_a_finished_run_is_not_resumed_with_other_options(run, tiny_fit, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(tiny_fit(*CHANGED, run_dir=run)) == 2
    assert "all tasks" in (error := capsys.readouterr().err)
    assert "name another --run_dir" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_each_task_records_the_configuration_it_was_trained_with(run, tiny_fit, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    first, before = (changed / "tasks" / "00_first.json").read_bytes(), (changed / "config.yaml").read_bytes()
    (changed / "patches" / "01_second.safetensors").unlink()
    assert main(tiny_fit(*CHANGED, run_dir=changed)) == 0
    assert (changed / "tasks" / "00_first.json").read_bytes() == first
    configs = [json.loads((changed / "tasks" / f"{n}.json").read_text())["configs"] for n in ("00_first", "01_second")]
    assert configs == [[config_name(before)], [config_name((changed / "config.yaml").read_bytes())]]
    assert (changed / f"config.{configs[0][0]}.yaml").read_bytes() == before
    assert read_summary(changed)["tasks"][1]["epochs"] == 7


def test_a_task_that_was_resumed_with_another_rate_records_both_configurations(tiny_fit, tmp_path):
    poison = {"class_path": "crash_callbacks.Poison", "init_args": {"task": "first", "epoch": 1}}
    assert main(tiny_fit("--trainer.callbacks", json.dumps([poison]))) == 2
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert main(tiny_fit("--trainer.callbacks", "[]", *CHANGED)) == 0
    after = (tmp_path / "run" / "config.yaml").read_bytes()
    names = [config_name(before), config_name(after)]
    first, second = (
        json.loads((tmp_path / "run" / "tasks" / f"{n}.json").read_text())["configs"] for n in ("00_first", "01_second")
    )
    assert (first, second) == (names, names[1:])
    assert (tmp_path / "run" / f"config.{names[0]}.yaml").read_bytes() == before


def test_tasks_trained_apart_with_other_options_keep_their_configuration(tiny_fit, tmp_path):
    run = tmp_path / "run"
    assert main(tiny_fit("--only", "first")) == 0
    before = (run / "config.yaml").read_bytes()
    assert main(tiny_fit("--only", "second", *CHANGED)) == 0
    assert (run / "config.yaml").read_bytes() == before
    (name,) = json.loads((run / "tasks" / "01_second.json").read_text())["configs"]
    assert config_name((run / f"config.{name}.yaml").read_bytes()) == name
    assert "max_epochs: 7" in (run / f"config.{name}.yaml").read_text()


def test_a_fast_dev_run_keeps_nothing(tiny_fit, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(tiny_fit("--trainer.fast_dev_run", "true")) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert not run.exists()
    assert main(tiny_fit("--trainer.fast_dev_run", "true", "--engine", "Processes")) == 2
    assert "leave out one" in capsys.readouterr().err
    assert main(tiny_fit()) == 0  # the folder is still free


def test_a_task_whose_patch_is_missing_is_trained_again(run):
    # a run is in this state if it is killed after it writes the record and before it writes the patch
    before = without_times(read_summary(run)), patches(run)
    (run / "patches" / "01_second.safetensors").unlink()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert (without_times(read_summary(run)), patches(run)) == before


@pytest.fixture
def sharing_run(tiny_fit, tmp_path):
    run = tmp_path / "sharing"
    assert main(tiny_fit("--config", "methods/derpp.yaml", "--trainer.max_epochs", "2", run_dir=run)) == 0
    return run


def test_shared_state_is_stored_beside_the_patches_as_it_was_after_the_last_task(sharing_run, tmp_path, capsys):
    run, summary = sharing_run, read_summary(sharing_run)
    (shared,) = (run / "shared").iterdir()
    assert shared.name == "01_second.safetensors"
    assert 0 < summary["shared_bytes"] <= shared.stat().st_size
    assert main(["test", "--run_dir", str(run)]) == 0  # the accuracies are those of the last row of the matrix
    assert capsys.readouterr().out.count("equal") == 2
    image = str(next((tmp_path / "first").rglob("*.png")))
    words = ["predict", "--run_dir", str(run), "--task", "first", "--images", image]
    assert main([*words, "--output", str(tmp_path / "labels.csv")]) == 0
    before = (run / "summary.json").read_bytes(), patches(run), shared.read_bytes()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert ((run / "summary.json").read_bytes(), patches(run), shared.read_bytes()) == before
    assert f"{summary['shared_bytes'] / 1e6:.1f} MB shared by all tasks" in capsys.readouterr().out
    shared.unlink()
    assert main(["test", "--run_dir", str(run)]) == 2
    assert "01_second.safetensors does not exist" in capsys.readouterr().err


def test_a_task_without_a_patch_is_trained_again_from_the_shared_state_before_it(sharing_run, tiny_fit, tmp_path):
    # a run is in this state if it is killed after it writes the shared state and before it writes the patch
    run = sharing_run
    first = tmp_path / "first_only"
    more = ("--config", "methods/derpp.yaml", "--trainer.max_epochs", "2")
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_train_start", "task": "second", "epoch": 0},
    }
    kill_and_resume(tiny_fit(*more, "--trainer.callbacks", json.dumps([callback]), run_dir=first), first)
    before = without_times(read_summary(run)), patches(run), (run / "shared" / "01_second.safetensors").read_bytes()
    (run / "patches" / "01_second.safetensors").unlink()
    shutil.copy(first / "shared" / "00_first.safetensors", run / "shared")
    (run / "shared" / "01_second.safetensors").write_bytes(b"whatever")
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    after = without_times(read_summary(run)), patches(run), (run / "shared" / "01_second.safetensors").read_bytes()
    assert after == before
    assert len(list((run / "shared").iterdir())) == 1


def kill_and_resume(words, run):
    """Trains in a process that a callback kills."""
    log = run.parent / "log"
    assert forks()(words=words, log=str(log)) == -signal.SIGKILL, log.read_text()


def test_a_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(run, tiny_fit, tmp_path):
    killed = tmp_path / "killed"
    moments = [
        ("on_train_batch_start", "first", 1),  # within an epoch, with one checkpoint written
        ("on_validation_end", "second", 1),  # the best epoch is chosen, its checkpoint is not written
        ("on_train_end", "second", 3),  # all epochs done, the patch not written
    ]
    resume = []
    for hook, task, epoch in moments:
        callback = {"class_path": "crash_callbacks.KillAt", "init_args": {"hook": hook, "task": task, "epoch": epoch}}
        kill_and_resume(tiny_fit("--trainer.callbacks", json.dumps([callback]), *resume, run_dir=killed), killed)
        resume = ["--resume", "true"]
    assert main(tiny_fit("--resume", "true", run_dir=killed)) == 0
    assert patches(killed) == patches(run)
    for signature in (run / "signatures").iterdir():
        assert (killed / "signatures" / signature.name).read_bytes() == signature.read_bytes()
    assert without_times(read_summary(killed)) == without_times(read_summary(run))
    assert not list((killed / "checkpoints").iterdir())


def test_warm_starts_schedules_accumulation_and_clipping_survive_a_kill(tiny_fit, tmp_path):
    more = ("--model.warm_start", "true", "--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR")
    more += ("--model.lr_scheduler.step_size", "1", "--model.lr_scheduler.gamma", "0.5")
    more += ("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.1")
    assert main(tiny_fit(*more, run_dir=tmp_path / "whole")) == 0
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_validation_end", "task": "first", "epoch": 2},
    }
    killed = tmp_path / "killed"
    kill_and_resume(tiny_fit(*more, "--trainer.callbacks", json.dumps([callback]), run_dir=killed), killed)
    assert main(tiny_fit(*more, "--resume", "true", run_dir=killed)) == 0
    assert patches(killed) == patches(tmp_path / "whole")


@pytest.mark.release
@pytest.mark.parametrize("method", ISOLATED + SHARED)
def test_every_kind_of_method_survives_a_kill(method, tiny_fit, tmp_path):
    # tasks have 5 and 3 steps per epoch, so RoSA is killed during its warm-up
    more, task = ("--config", f"methods/{method}.yaml"), "first" if method in ISOLATED else "second"
    assert main(tiny_fit(*more, run_dir=tmp_path / "whole")) == 0
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_train_batch_start", "task": task, "epoch": 1},
    }
    killed = tmp_path / "killed"
    kill_and_resume(tiny_fit(*more, "--trainer.callbacks", json.dumps([callback]), run_dir=killed), killed)
    assert main(tiny_fit(*more, "--resume", "true", run_dir=killed)) == 0
    assert patches(killed) == patches(tmp_path / "whole")
    if method in SHARED:
        shared = [run / "shared" / "01_second.safetensors" for run in (killed, tmp_path / "whole")]
        assert shared[0].read_bytes() == shared[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, *GATHERING])
def test_two_processes_train_the_stream_together(method, tiny_fit, tmp_path):
    run = tmp_path / "ddp"
    more = () if method is None else ("--config", f"methods/{method}.yaml")
    words = tiny_fit(*more, "--trainer.devices", "2", "--trainer.strategy", "ddp", run_dir=run)
    process = subprocess.run([sys.executable, "-m", "recast_pl", *words], cwd=ROOT, capture_output=True, timeout=600)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    assert list(patches(run)) == ["00_first.safetensors", "01_second.safetensors"]
    assert main(["test", "--run_dir", str(run)]) == 0  # one process measures what two have measured
    assert process.stdout.decode().count("average") == 1


def distributed(words, processes):
    more = ("--trainer.devices", str(processes), "--trainer.strategy", "ddp")
    command = [sys.executable, "-m", "recast_pl", *words, *more]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize(
    ("images", "batch", "head"),
    [
        pytest.param(8, 4, "sgd", marks=pytest.mark.slow),  # the last batch is small
        pytest.param(9, 6, "logistic", marks=pytest.mark.slow),  # one process has more images of it
        (7, 7, "sgd"),  # one process has none
        pytest.param(7, 7, "ridge", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_trains_with_the_same_global_batch(
    images, batch, head, image_folder, tiny_fit, tmp_path
):
    tasks = [{"name": name, "path": str(image_folder(f"images_{name}", images=images, seed=4))} for name in "ab"]
    more = ["--data.tasks", json.dumps(tasks), "--model.head", head, "--trainer.max_epochs", "2"]
    more += ["--trainer.precision", "64-true"]  # a solved head amplifies rounding
    printed = distributed(tiny_fit(*more, "--data.batch_size", str(batch), run_dir=tmp_path / "two"), 2)
    assert printed.count("average") == 1
    assert main(["test", "--run_dir", str(tmp_path / "two")]) == 0  # one process measures what two have measured
    assert main(tiny_fit(*more, "--data.batch_size", str(2 * batch), run_dir=tmp_path / "one")) == 0
    for name in ("00_a.safetensors", "01_b.safetensors"):
        one, two = (TaskPatch.load(tmp_path / run / "patches" / name) for run in ("one", "two"))
        assert one.metrics == two.metrics
        for part, tensor in one.tensors.items():
            assert torch.allclose(tensor, two.tensors[part], atol=1e-6, rtol=0), part


@pytest.mark.release
def test_two_processes_train_the_quickstart_as_one_does(tmp_path):
    # in double precision: single precision differs where rounding moves an activation across a kink of ReLU6
    words = ["fit", "--config", "quickstart.yaml", "--only", "people", "--trainer.max_epochs", "2"]
    words += ["--trainer.precision", "64-true", "--model.head", "sgd", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.accelerator", "cpu"]
    distributed([*words, "--data.batch_size", "16", "--run_dir", str(tmp_path / "two")], 2)
    assert main([*words, "--run_dir", str(tmp_path / "one")]) == 0
    one, two = (TaskPatch.load(tmp_path / run / "patches" / "01_people.safetensors") for run in ("one", "two"))
    assert one.metrics == two.metrics
    for name, tensor in one.tensors.items():
        assert torch.allclose(tensor, two.tensors[name], atol=1e-9, rtol=0), name


@pytest.mark.release
def test_torchrun_starts_the_processes_as_well(tiny_fit, tmp_path):
    run = tmp_path / "run"
    words = tiny_fit("--trainer.devices", "2", "--trainer.strategy", "ddp", run_dir=run)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recast_pl"]
    process = subprocess.run([*launch, *words], cwd=ROOT, capture_output=True, timeout=600)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    assert process.stdout.decode().count("average") == 1
    distributed(tiny_fit(run_dir=tmp_path / "other"), 2)
    assert patches(run) == patches(tmp_path / "other")


@pytest.mark.slow
def test_a_task_may_have_fewer_images_than_there_are_processes(image_folder, tiny_fit, tmp_path):
    task = {
        "name": "few",
        "path": str(image_folder("few", 2, images=3)),
    }  # 2 images each for training, validation and test
    run = tmp_path / "run"
    distributed(tiny_fit("--data.tasks", json.dumps([task]), "--trainer.max_epochs", "2"), 3)
    assert read_summary(run)["tasks"][0]["accuracy"] in (0, 50, 100)
    assert main(["test", "--run_dir", str(run)]) == 0


def test_early_stopping_and_user_callbacks_start_afresh_for_each_task(tiny_fit, tmp_path):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stopping["init_args"] = {"monitor": "val/accuracy", "mode": "max", "patience": 1, "min_delta": 200}
    run = tmp_path / "stopped"
    assert main(tiny_fit("--trainer.callbacks", json.dumps([stopping]), "--trainer.max_epochs", "9", run_dir=run)) == 0
    assert [task["epochs"] for task in read_summary(run)["tasks"]] == [2, 2]


def test_a_notebook_needs_no_command_line(image_folder, tmp_path):
    tasks = [TaskConfig("first", str(image_folder("first"))), TaskConfig("digits", flip=False)]
    data = SequentialTaskDataModule(tasks, image_size=32, batch_size=64)
    module = TILModule(BackboneConfig("resnet10t", "random"), [LinearProbe()])
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    text = io.StringIO()
    summary = Stream(module, data, tmp_path / "run", TrainerFactory(settings), console=Console(file=text)).run()
    assert [task["task_parameters"] for task in summary["tasks"]] == [0, 0]
    assert "digits" in text.getvalue()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert read_summary(tmp_path / "run") == summary
    assert not list((tmp_path / "run").glob("accuracy_matrix.*"))  # only a presentation writes tables and pictures


def test_loggers_of_the_user_write_each_task_into_a_folder_of_its_name(tiny_fit, tmp_path):
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": str(tmp_path / kind)}}
        for kind in ("CSVLogger", "TensorBoardLogger")
    ]
    for run in (0, 1):
        more = ("--trainer.logger", json.dumps(loggers), "--trainer.max_epochs", "2")
        assert main(tiny_fit(*more, run_dir=tmp_path / str(run))) == 0
        for task in ("00_first", "01_second"):
            csv, tensorboard = (
                tmp_path / kind / "lightning_logs" / f"version_{run}" / task
                for kind in ("CSVLogger", "TensorBoardLogger")
            )
            lines = (csv / "metrics.csv").read_text().splitlines()
            column = lines[0].split(",").index("step")
            steps = [int(line.split(",")[column]) for line in lines[1:]]
            assert steps == sorted(steps)
            assert len(EventAccumulator(str(tensorboard)).Reload().Scalars("val/loss")) == 2


@pytest.mark.parametrize(("prefix", "expected"), [("", "00_first"), ("mine", "mine-00_first")])
def test_a_logger_without_folders_gets_the_task_as_a_prefix_of_its_metrics(prefix, expected):
    class Remote(DummyLogger):
        _prefix = prefix

    factory = TrainerFactory({"logger": Remote(), "accelerator": "cpu"})
    trainer = factory.for_training(Path("run"), "00_first", [])
    assert trainer.logger._prefix == expected
    assert factory.settings["logger"]._prefix == prefix


def test_checkpoints_hold_nothing_of_the_frozen_network(tiny_fit, tmp_path):
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_train_end", "task": "first", "epoch": 3},
    }
    run = tmp_path / "run"
    kill_and_resume(tiny_fit("--trainer.callbacks", json.dumps([callback])), run)
    checkpoint = torch.load(run / "checkpoints" / "00_first" / "last.ckpt", weights_only=True)
    assert sum(t.numel() for t in checkpoint["state_dict"].values()) == 96 + 3 * 33
    shutil.rmtree(run)


def test_checkpoints_can_be_left_out(tiny_fit, tmp_path):
    assert main(tiny_fit("--trainer.enable_checkpointing", "false", "--trainer.logger", "false")) == 0
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_run_of_another_method_is_not_resumed(run, tiny_fit, capsys):
    words = tiny_fit("--resume", "true", "--model.pieces", '[{"class_path": "LinearProbe"}]')
    assert main(words) == 2
    assert "model differs" in capsys.readouterr().err
    assert Path(run / "summary.json").exists()


# runs that are stopped


def test_a_loss_that_becomes_nan_stops_the_task_and_a_lower_rate_resumes_it(tiny_fit, tmp_path, capsys):
    callback = {"class_path": "crash_callbacks.Poison", "init_args": {"task": "second", "epoch": 1}}
    run = tmp_path / "run"
    words = tiny_fit("--trainer.callbacks", json.dumps([callback]))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "loss of task 'second' has become NaN or infinite in epoch 2; its state as it was after epoch 1" in error
    checkpoint = torch.load(run / "checkpoints" / "01_second" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert list(patches(run)) == ["00_first.safetensors"]
    lower = ("--trainer.callbacks", "[]", "--model.optimizer.init_args.lr", "1e-4", "--resume", "true")
    lower += ("--trainer.logger", "true")
    assert main(tiny_fit(*lower)) == 0
    assert list(patches(run)) == ["00_first.safetensors", "01_second.safetensors"]
    rates = EventAccumulator(str(run / "tensorboard" / "01_second")).Reload().Scalars("lr-AdamW/head")
    assert rates[-1].value == pytest.approx(1e-4)
    assert main(tiny_fit("--resume", "true", "--model.warm_start", "true")) == 2  # other changes are refused


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_a_run_and_prints_the_command_that_resumes_it(number, run, tiny_fit, tmp_path):
    stopped = tmp_path / "stopped"
    callback = {
        "class_path": "crash_callbacks.SignalAt",
        "init_args": {"number": int(number), "task": "second", "epoch": 1},
    }
    words = tiny_fit("--trainer.callbacks", json.dumps([callback]), run_dir=stopped)
    log = tmp_path / "log"
    assert forks()(words=words, log=str(log)) == 128 + number
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith(
        f"recast_pl: interrupted by {number.name}; everything trained so far is kept. To continue: python -m"
    )
    assert "Traceback" not in log.read_text()
    resume = shlex.split(line.partition("-m recast_pl ")[2])
    assert main([*resume, "--trainer.callbacks", "[]"]) == 0
    assert patches(stopped) == patches(run)


def test_a_damaged_checkpoint_is_named_and_the_task_trained_from_its_start(run, tiny_fit, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_train_end", "task": "first", "epoch": 3},
    }
    kill_and_resume(tiny_fit("--trainer.callbacks", json.dumps([callback]), run_dir=damaged), damaged)
    last = damaged / "checkpoints" / "00_first" / "last.ckpt"
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + 200] ^= 1
    last.write_bytes(content)
    assert main(tiny_fit("--resume", "true", run_dir=damaged)) == 0
    assert f"{last} is damaged; the task is trained again from its start" in capsys.readouterr().out.replace("\n", "")
    assert patches(damaged) == patches(run)


def test_no_damage_to_a_checkpoint_goes_unnoticed(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.arange(2000.0), "epoch": 3}, path)
    content = path.read_bytes()
    assert is_whole_checkpoint(path)
    expected = torch.load(path, weights_only=True)
    directory = content.index(b"PK\1\2")
    for position in [*range(0, directory, 7), *range(directory, len(content))]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        if is_whole_checkpoint(path):  # a byte that does not matter, such as one of a time
            found = torch.load(path, weights_only=True)
            assert found["epoch"] == 3
            assert torch.equal(found["weights"], expected["weights"])
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        assert not is_whole_checkpoint(path)


def test_without_validation_the_last_epoch_is_kept_and_no_validation_is_recorded(tiny_fit, tmp_path):
    assert main(tiny_fit("--trainer.limit_val_batches", "0", run_dir=tmp_path / "run")) == 0
    first, *_ = read_summary(tmp_path / "run")["tasks"]
    assert first["epochs"] == 3
    assert not [name for name in first if "validation" in name]
    assert main(tiny_fit("--config", "methods/probe.yaml", run_dir=tmp_path / "probe")) == 0
    first, *_ = read_summary(tmp_path / "probe")["tasks"]
    assert (first["epochs"], 0 <= first["validation_accuracy"] <= 100) == (0, True)
