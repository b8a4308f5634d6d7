"""Options of the trainer: each works, or is refused in one line that says what to do."""

import json
import logging
import math

import pytest
import yaml
from test_stream import read_summary
from torch.optim.lr_scheduler import CosineAnnealingLR

from recast_pl import QuarterCosine, TaskPatch, WarmUp
from recast_pl.cli import main

CALLBACKS, SCHEDULES = "lightning.pytorch.callbacks", "torch.optim.lr_scheduler"


def a_class(path, **arguments):
    return json.dumps({"class_path": path, "init_args": arguments})


def callback(name, **arguments):
    return ["--trainer.callbacks", f"[{a_class(f'{CALLBACKS}.{name}', **arguments)}]"]


def schedule(path, **arguments):
    return ["--model.lr_scheduler", a_class(path, **arguments)]


COSINE = {"class_path": f"{SCHEDULES}.CosineAnnealingLR", "init_args": {"T_max": 2}}

WORKING = {
    "overfit_batches": ["--trainer.overfit_batches", "1"],
    "bf16-mixed": ["--trainer.precision", "bf16-mixed"],
    "64-true": ["--trainer.precision", "64-true"],
    "no schedule": ["--model.lr_scheduler", "null"],
    "plateau": schedule(f"{SCHEDULES}.ReduceLROnPlateau"),
    "plateau of accuracy": schedule(f"{SCHEDULES}.ReduceLROnPlateau", mode="max"),
    "plateau of a metric": schedule("lightning.pytorch.cli.ReduceLROnPlateau", monitor="val/accuracy", mode="max"),
    "warm-up": schedule("recast_pl.WarmUp", epochs=1, then=COSINE),
    "quarter of a cosine": schedule("recast_pl.QuarterCosine", epochs=2),
    "one cycle": schedule(f"{SCHEDULES}.OneCycleLR", max_lr=0.1, total_steps=4),
    "best checkpoint": callback("ModelCheckpoint", monitor="val/accuracy", mode="max"),
    "last checkpoint": callback("ModelCheckpoint", save_on_train_epoch_end=True),
    "early stopping": callback("EarlyStopping", monitor="val/loss"),
    "rates": callback("LearningRateMonitor"),
    "accumulation": callback("GradientAccumulationScheduler", scheduling={0: 2}),
    "checkpoint writer": ["--trainer.plugins", a_class("lightning.pytorch.plugins.io.AsyncCheckpointIO")],
    "max_steps": ["--trainer.max_epochs", "null", "--trainer.max_steps", "3"],
    "limit_test_batches": ["--trainer.limit_test_batches", "1"],
    "limit_val_batches": ["--trainer.limit_val_batches", "0"],
    "val_check_interval": ["--trainer.val_check_interval", "0.5"],
    "sanity check": ["--trainer.num_sanity_val_steps", "1"],
}

REFUSED = {
    "bf16-true": (["--trainer.precision", "bf16-true"], "use --trainer.precision bf16-mixed"),
    "16-true": (["--trainer.precision", "16-true"], "use --trainer.precision 16-mixed"),
    "overfit half a batch": (["--trainer.overfit_batches", "0.5"], "Try at least"),
    "SequentialLR": (
        schedule(f"{SCHEDULES}.SequentialLR", schedulers=[COSINE], milestones=[1]),
        "for a warm-up use recast_pl.WarmUp",
    ),
    "no warm-up": (schedule("recast_pl.WarmUp", epochs=0, then=COSINE), "epochs=0 must be at least 1"),
    "no epoch": (schedule("recast_pl.QuarterCosine", epochs=0), "epochs=0 must be at least 1"),
    "short cycle": (schedule(f"{SCHEDULES}.OneCycleLR", max_lr=0.1, total_steps=1), "--trainer.max_epochs steps"),
    "wrong schedule": (schedule(f"{SCHEDULES}.LinearLR", start_factor=2), "--model.lr_scheduler"),
    "schedule without length": (schedule(f"{SCHEDULES}.StepLR", step_size=0), "StepLR cannot make another step"),
    "LBFGS": (["--model.optimizer", a_class("torch.optim.LBFGS")], "--model.optimizer"),
    "SparseAdam": (["--model.optimizer", a_class("torch.optim.SparseAdam")], "--model.optimizer torch.optim.AdamW"),
    "unknown metric": (callback("EarlyStopping", monitor="val_loss"), "`val/loss`"),
    "unknown metric of checkpoints": (callback("ModelCheckpoint", monitor="val_loss"), "'val/loss'"),
    "missing metric": (
        callback("EarlyStopping"),
        "error: lightning.pytorch.callbacks.EarlyStopping: the following arguments are required: monitor",
    ),
    "rate finder": (callback("LearningRateFinder"), "compare rates with 'sweep'"),
    "batch size finder": (callback("BatchSizeFinder"), "set --data.batch_size"),
    "pruning": (callback("ModelPruning", pruning_fn="l1_unstructured"), "leave it out"),
    "averaging": (callback("StochasticWeightAveraging", swa_lrs=0.01), "leave it out"),
    "fine-tuning": (callback("BackboneFinetuning"), "list the piece FineTune"),
    "two timers": (
        [*callback("Timer", duration="00:00:00:09", interval="step"), "--trainer.max_time", "00:00:00:09"],
        "leave out one",
    ),
    "unwritable argument": (callback("Timer", duration="00:00:00:09"), "step'; give that argument as text"),
    "limit_test_batches": (["--trainer.limit_test_batches", "0"], "use at least 1"),
    "barebones": (["--trainer.barebones", "true"], "leave it out"),
    "ddp_spawn": (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "use --trainer.strategy ddp,"),
    "ddp_fork": (["--trainer.strategy", "ddp_fork", "--trainer.devices", "2"], "use --trainer.strategy ddp,"),
    "fsdp": (["--trainer.strategy", "fsdp"], "accelerator"),
    "unknown strategy": (["--trainer.strategy", "bogus"], "ddp"),
    "unknown accelerator": (["--trainer.accelerator", "bogus"], "cpu"),
    "missing accelerator": (["--trainer.accelerator", "tpu"], "pip install"),
    "missing logger": (["--trainer.logger", a_class("lightning.pytorch.loggers.CometLogger")], "pip install"),
    "rare validation": (["--trainer.val_check_interval", "100"], "less than or equal to"),
    "log_every_n_steps": (["--trainer.log_every_n_steps", "0"], "at least 1"),
}


@pytest.mark.parametrize("words", WORKING.values(), ids=WORKING)
def test_an_option_works(words, tiny_fit, tmp_path):
    assert main(tiny_fit("--trainer.max_epochs", "2", *words)) == 0
    assert len(read_summary(tmp_path / "run")["tasks"]) == 2


@pytest.mark.parametrize(("words", "remedy"), REFUSED.values(), ids=REFUSED)
def test_an_option_that_cannot_work_is_refused_in_one_line(words, remedy, tiny_fit, capsys, tmp_path):
    assert main(tiny_fit("--trainer.max_epochs", "2", *words)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recast_pl: error: ")]
    assert len(error) == 1
    assert remedy in error[0]
    assert not list((tmp_path / "run").glob("patches/*"))


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("Normalize", {"mean": [0.5], "std": [0.5]}, "leave it out"),
        ("ToDtype", {"dtype": "torch.float32"}, "must return a uint8 image"),
        ("MixUp", {"num_classes": 3}, "leave it out"),
        ("RandomCrop", {"size": 64}, "larger than input image size"),
    ],
)
def test_transforms_that_do_not_fit_are_refused_before_training(
    name, arguments, remedy, image_folder, tiny_fit, capsys, tmp_path
):
    transform = {"class_path": f"torchvision.transforms.v2.{name}", "init_args": arguments}
    task = {"name": "changed", "path": str(image_folder("changed")), "transforms": [transform]}
    assert main(tiny_fit("--data.tasks", json.dumps([task]))) == 2
    error = capsys.readouterr().err
    assert f"task 'changed': transform {name} " in error
    assert remedy in error
    assert error.count("\n") == 1


def test_the_seed_of_a_run_counts_and_not_that_of_the_environment(tiny_fit, tmp_path, monkeypatch):
    for name, seed in (("own", "7"), ("other", "not a number")):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        assert main(tiny_fit("--trainer.max_epochs", "1", run_dir=tmp_path / name)) == 0
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["seed_everything"] == 42
    for first in sorted((tmp_path / "own" / "patches").glob("*.safetensors")):
        assert first.read_bytes() == (tmp_path / "other" / "patches" / first.name).read_bytes()


def test_a_run_uses_nothing_that_jsonargparse_will_remove(tiny_fit, monkeypatch, recwarn):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    assert not [str(found.message) for found in recwarn if "Jsonargparse" in found.category.__name__]


def test_a_rate_of_a_probe_is_refused_but_not_the_null_of_an_older_config(tiny_fit, tmp_path, capsys):
    probe = ["--model.pieces", '[{"class_path": "LinearProbe", "init_args": {"learning_rate": %s}}]']
    assert main(tiny_fit(probe[0], probe[1] % "0.1")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "learning_rate=0.1 would do nothing; leave it out" in error
    assert not (tmp_path / "run").exists()
    assert main(tiny_fit(probe[0], probe[1] % "null")) == 0
    assert "learning_rate: null" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


@pytest.fixture
def log():
    """What Lightning logs where its own handler would print it."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("lightning.pytorch").addHandler(handler)
    yield records
    logging.getLogger("lightning.pytorch").removeHandler(handler)


def test_a_profiler_prints_a_report_of_each_task(log, tiny_fit):
    assert main(tiny_fit("--trainer.profiler", "simple", "--trainer.max_epochs", "1")) == 0
    assert sum("FIT Profiler Report" in line for line in log) == 2
    assert not any("TEST Profiler Report" in line for line in log)


def test_verbose_callbacks_print_what_they_decide(log, tiny_fit):
    stopping = callback("EarlyStopping", monitor="val/loss", verbose=True)
    assert main(tiny_fit(*stopping, "--trainer.max_epochs", "2")) == 0
    assert any("Metric val/loss improved" in line for line in log)


def test_max_time_ends_each_task(tiny_fit, tmp_path):
    assert main(tiny_fit("--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01")) == 0
    for task in read_summary(tmp_path / "run")["tasks"]:
        assert task["epochs"] >= 1
        assert 0.9 <= task["seconds"] < 5


def test_a_warm_start_is_trained_further_also_without_validation(tiny_fit, tmp_path):
    more = ("--model.warm_start", "true", "--trainer.limit_val_batches", "0")
    for epochs in (1, 3):
        assert main(tiny_fit(*more, "--trainer.max_epochs", epochs, run_dir=tmp_path / str(epochs))) == 0
    one, three = (TaskPatch.load(tmp_path / n / "patches" / "00_first.safetensors") for n in ("1", "3"))
    assert not one.pieces[0]["coefficients"].equal(three.pieces[0]["coefficients"])


# the probe


def test_the_probe_gets_the_steps_of_the_method(tiny_fit, tmp_path):
    limits = {
        "epochs": ["--trainer.max_epochs", "6"],
        "steps": ["--trainer.max_epochs", "null", "--trainer.max_steps", "28"],  # 5 steps in each epoch of `first`
        "time": ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"],
    }
    probes = {}
    for name, words in limits.items():
        words += ["--model.head", "sgd", "--model.optimizer.init_args.lr", "0.05"]
        assert main(tiny_fit(*words, run_dir=tmp_path / name)) == 0
        probes[name] = read_summary(tmp_path / name)["tasks"][0]["sgd_probe_accuracy"]
    assert probes["steps"] == probes["epochs"]
    assert probes["time"] > 50  # of three classes


def test_early_stopping_stops_the_probe_as_it_stops_the_method(tiny_fit, tmp_path, monkeypatch):
    made = []
    import recast_pl.learning.probe as probe

    step = probe._set_gradients
    monkeypatch.setattr(probe, "_set_gradients", lambda *args: (made.append(1), step(*args)))
    stopping = callback("EarlyStopping", monitor="val/accuracy", mode="max", patience=1, min_delta=200)
    assert main(tiny_fit(*stopping, "--trainer.max_epochs", "9", "--model.head", "sgd")) == 0
    assert [task["epochs"] for task in read_summary(tmp_path / "run")["tasks"]] == [2, 2]
    assert len(made) == 2 * 4 + 2 * 3  # two epochs of each task


def test_a_warm_up_raises_the_rate_and_then_follows_the_next_schedule():
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warming = WarmUp(optimizer, 2, lambda o: CosineAnnealingLR(o, 2))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warming.step()
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])


def test_a_quarter_of_a_cosine_is_the_schedule_of_inflora():
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    schedule, rates = QuarterCosine(optimizer, 10), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    authors = [5e-4 * math.cos(99 * math.pi * epoch / (200 * (10 - 1))) for epoch in range(10)]
    assert rates == pytest.approx([*authors, authors[-1], authors[-1]])
