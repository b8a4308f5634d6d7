"""Options of the trainer: each works, or is refused in one line that says what to do."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_VIT
from lightning import Callback, Trainer
from test_stream import distributed, kill_and_resume, patches, read_summary
from torch.optim.lr_scheduler import CosineAnnealingLR

from recast_pl import AverageEpochs, BackboneConfig, LoRA, QuarterCosine, TaskPatch, TILModule, WarmUp
from recast_pl.cli import main
from recast_pl.learning.checkpoint import load_trainable_state, trainable_state
from recast_pl.learning.features import Features
from recast_pl.learning.heads import solve_head
from recast_pl.learning.trainer import BestEpoch, SeedEpochs

CALLBACKS, SCHEDULES = "lightning.pytorch.callbacks", "torch.optim.lr_scheduler"
TRANSFORMS = "torchvision.transforms.v2"


def a_class(path, **arguments):
    return json.dumps({"class_path": path, "init_args": arguments})


def callback(name, **arguments):
    return ["--trainer.callbacks", f"[{a_class(f'{CALLBACKS}.{name}', **arguments)}]"]


def average(epochs=2):
    return ["--trainer.callbacks", f"[{a_class('recast_pl.AverageEpochs', epochs=epochs)}]"]


def schedule(path, **arguments):
    return ["--model.lr_scheduler", a_class(path, **arguments)]


COSINE = {"class_path": f"{SCHEDULES}.CosineAnnealingLR", "init_args": {"T_max": 2}}

WORKING = {
    "overfit_batches": ["--trainer.overfit_batches", "1"],
    "bf16-mixed": ["--trainer.precision", "bf16-mixed"],
    "64-true": ["--trainer.precision", "64-true"],
    "augmentation": ["--config", "options/augment.yaml"],
    "random crops": ["--data.transforms", f"[{a_class(f'{TRANSFORMS}.RandomResizedCrop', size=32, scale=[0.5, 1])}]"],
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
    "early stopping by accuracy": callback("EarlyStopping", monitor="val/accuracy", mode="max", patience=1),
    "average of epochs": average(),
    "rates": [*callback("LearningRateMonitor"), "--trainer.logger", "true"],
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
    "averaging": (callback("StochasticWeightAveraging", swa_lrs=0.01), "use recast_pl.AverageEpochs"),
    "average of weights": (callback("EMAWeightAveraging"), "use recast_pl.AverageEpochs"),
    "average of no epoch": (average(0), "epochs=0 must be at least 1"),
    "average without validation": ([*average(), "--trainer.limit_val_batches", "0"], "leave out one of them"),
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
        ("RandomResizedCrop", {"size": 224}, "at most the size of data.image_size, 32×32"),
    ],
)
def test_transforms_that_do_not_fit_are_refused_before_training(
    name, arguments, remedy, image_folder, tiny_fit, capsys, tmp_path
):
    transform = {"class_path": f"torchvision.transforms.v2.{name}", "init_args": arguments}
    task = {"name": "changed", "path": str(image_folder("changed")), "transforms": [transform]}
    assert main(tiny_fit("--data.tasks", json.dumps([task]))) == 2
    error = capsys.readouterr().err
    assert "task 'changed': " in error
    assert f"transform {name} " in error or name == "RandomResizedCrop"  # the last one may not be to blame for the size
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
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warming = WarmUp(optimizer, 2, lambda o: CosineAnnealingLR(o, 2))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warming.step()
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])


def test_a_quarter_of_a_cosine_is_the_schedule_of_inflora():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    schedule, rates = QuarterCosine(optimizer, 10), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    authors = [5e-4 * math.cos(99 * math.pi * epoch / (200 * (10 - 1))) for epoch in range(10)]
    assert rates == pytest.approx([*authors, authors[-1], authors[-1]])


# the average over epochs


class States(Callback):
    """Keeps what is trained at the end of each epoch, and what its validation has evaluated."""

    def __init__(self):
        self.trained, self.evaluated, self.losses = [], [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.evaluated.append(trainable_state(pl_module))
            self.losses.append(float(trainer.callback_metrics["val/loss"]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.trained.append(trainable_state(pl_module))


def states(data, head, epochs, *callbacks, **settings):
    """The states of a short training, and the module as it ends."""
    torch.manual_seed(0)
    module = TILModule(
        BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT), [LoRA(learning_rate=0.05)], head=head
    )
    kept, quiet = States(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [*callbacks, kept, BestEpoch(), SeedEpochs(0, "first")]
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet, **settings)
    trainer.fit(module, datamodule=data)
    return kept, module


def test_each_validation_evaluates_the_average_and_training_goes_on_without_it(data):
    plain, _ = states(data, "sgd", 4)
    kept, module = states(data, "sgd", 4, AverageEpochs(3))
    for mine, other in zip(kept.trained, plain.trained, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)
    for epoch, evaluated in enumerate(kept.evaluated):
        last = kept.trained[max(0, epoch - 2) : epoch + 1]
        for name, value in evaluated.items():
            mean = np.mean([state[name].double().numpy() for state in last], 0)
            assert np.allclose(value, mean, rtol=1e-6, atol=1e-8), name
    assert kept.losses[0] == plain.losses[0]
    assert kept.losses[1] != plain.losses[1]
    final = trainable_state(module)
    assert any(all(torch.equal(final[name], state[name]) for name in final) for state in kept.evaluated)


def test_an_average_in_the_middle_of_an_epoch_leaves_training_as_it_is(data):
    plain, _ = states(data, "sgd", 2, val_check_interval=0.5)
    kept, _ = states(data, "sgd", 2, AverageEpochs(2), val_check_interval=0.5)
    assert len(kept.evaluated) == 4
    assert all(torch.equal(kept.trained[-1][name], value) for name, value in plain.trained[-1].items())


def test_a_head_is_solved_on_the_features_of_the_average(data):
    kept, module = states(data, "ridge", 3, AverageEpochs(2))
    load_trainable_state(module, kept.evaluated[-1])
    batches = [(data.on_after_batch_transfer(batch, 0)[0], batch[1]) for batch in data.plain_dataloader("train")]
    with torch.no_grad():
        features = torch.cat([module.backbone(images) for images, _ in batches])
    solved = solve_head("ridge", Features(features, torch.cat([labels for _, labels in batches])), 3)
    assert torch.allclose(module.head.weight, solved.weight, atol=1e-4)
    assert torch.equal(kept.trained[-1]["head.weight"], kept.evaluated[-1]["head.weight"])


def test_an_average_survives_a_kill(tiny_fit, tmp_path):
    more = ("--trainer.max_epochs", "4", *average(3))
    assert main(tiny_fit(*more, run_dir=tmp_path / "whole")) == 0
    assert main(tiny_fit("--trainer.max_epochs", "4", run_dir=tmp_path / "plain")) == 0
    assert patches(tmp_path / "plain") != patches(tmp_path / "whole")
    killed, resume = tmp_path / "killed", []
    for hook, epoch in (("on_train_batch_start", 2), ("on_validation_end", 3)):
        kill = a_class("crash_callbacks.KillAt", hook=hook, task="first", epoch=epoch)
        both = ["--trainer.callbacks", f"[{a_class('recast_pl.AverageEpochs', epochs=3)}, {kill}]"]
        kill_and_resume(tiny_fit("--trainer.max_epochs", "4", *both, *resume, run_dir=killed), killed)
        resume = ["--resume", "true"]
    assert main(tiny_fit(*more, *resume, run_dir=killed)) == 0
    assert patches(killed) == patches(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_average_to_the_same_numbers_as_one(tiny_fit, tmp_path):
    more = ("--model.head", "sgd", *average())
    distributed(tiny_fit(*more, "--data.batch_size", "2", run_dir=tmp_path / "two"), 2)
    assert main(tiny_fit(*more, run_dir=tmp_path / "one")) == 0
    for name in ("00_first.safetensors", "01_second.safetensors"):
        one, two = (TaskPatch.load(tmp_path / run / "patches" / name) for run in ("one", "two"))
        for key, tensor in one.tensors.items():
            assert torch.allclose(tensor, two.tensors[key], atol=1e-5, rtol=0), key
