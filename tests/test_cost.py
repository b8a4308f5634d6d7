"""What tasks cost: predicted, kept within a budget, and recorded."""

import json

import pytest

from recast_pl import Signature, TaskPatch, TILModule
from recast_pl.backbones.backbone import Backbone
from recast_pl.cli import main
from recast_pl.learning import cost

HEADS = ["logistic", "sgd"]
WORDS = ["--trainer.max_epochs", "12", "--trainer.logger", "false"]


class Clock:
    """A clock that only the network moves: 10 ms for each image, and 20 ms more for one that is trained on."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        self.rates = {}  # of the head, by task and epoch
        forward, step = Backbone.forward, TILModule.training_step

        def timed_forward(network, images):
            self.now += 0.01 * len(images)
            return forward(network, images)

        def timed_step(module, batch, batch_idx):
            self.now += 0.02 * len(batch[1])
            rates = self.rates.setdefault(module.task_name, {})
            rates[module.current_epoch] = module.trainer.optimizers[0].param_groups[0]["lr"]
            return step(module, batch, batch_idx)

        monkeypatch.setattr(Backbone, "forward", timed_forward)
        monkeypatch.setattr(TILModule, "training_step", timed_step)
        monkeypatch.setattr(cost, "time", self)

    def monotonic(self):
        return self.now


def records(tmp_path, run="run"):
    return [json.loads(path.read_text()) for path in sorted((tmp_path / run / "tasks").glob("*.json"))]


@pytest.mark.parametrize("head", HEADS)
def test_the_first_steps_predict_the_cost(head, tiny_fit, tmp_path, monkeypatch, capsys):
    Clock(monkeypatch)
    assert main(tiny_fit(*WORDS, "--model.head", head)) == 0
    for record in records(tmp_path):
        assert record["cost"]["predicted_seconds"] == pytest.approx(record["cost"]["seconds"], rel=0.1)
        assert record["cost"]["memory_bytes"] > 1e8
    lines = [line for line in capsys.readouterr().out.splitlines() if "for this task" in line]
    assert len(lines) == 1
    assert "for all 2" in lines[0]


@pytest.mark.parametrize("head", HEADS)
def test_half_of_the_seconds_are_kept_and_the_best_state_so_far_is_saved(head, tiny_fit, tmp_path, monkeypatch):
    Clock(monkeypatch)
    words = [*WORDS, "--model.head", head]
    assert main(tiny_fit(*words, run_dir=tmp_path / "all")) == 0
    whole = [json.loads(path.read_text())["cost"]["seconds"] for path in sorted((tmp_path / "all/tasks").glob("*"))]
    budget = min(whole) / 2
    assert main(tiny_fit(*words, "--budget.seconds", budget)) == 0
    for record in records(tmp_path):
        assert 0.9 * budget <= record["cost"]["seconds"] <= 1.1 * budget
        assert 1 <= record["task"]["epochs"] < 12
        assert record["task"]["validation_accuracy"] >= 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    # the same run goes on with another budget, which does not make it another run
    assert main(tiny_fit("--resume", "true", *words, "--budget.seconds", budget)) == 0


def test_the_schedule_ends_with_the_epochs_that_fit(tiny_fit, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 4, "gamma": 0.1}}
    words = [*WORDS, "--model.head", "sgd", "--model.lr_scheduler", json.dumps(schedule)]
    assert main(tiny_fit(*words, "--budget.seconds", 1000)) == 0  # enough
    assert list(clock.rates["first"].values()) == pytest.approx([2e-3] * 4 + [2e-4] * 4 + [2e-5] * 4)
    whole = [record["cost"] for record in records(tmp_path)]
    assert [cost["chosen"]["epochs"] for cost in whole] == [12, 12]
    assert main(tiny_fit(*words, "--budget.seconds", whole[0]["seconds"] / 2, run_dir=tmp_path / "less" / "run")) == 0
    record, _ = records(tmp_path / "less")
    rates = list(clock.rates["first"].values())[: record["task"]["epochs"]]
    assert abs(len(rates) - record["cost"]["chosen"]["epochs"]) <= 1
    for rate in (2e-3, 2e-4, 2e-5):  # each for a third of the epochs, as before
        assert abs(rates.count(pytest.approx(rate)) - len(rates) / 3) < 1


def test_a_patch_that_would_be_too_large_is_stored_with_fewer_bits(tiny_fit, tiny_run, tmp_path, capsys):
    plain = next((tiny_run / "patches").glob("00*")).stat().st_size
    assert main(tiny_fit("--budget.bytes", plain - 1)) == 0
    record, _ = records(tmp_path)
    (patch,) = (tmp_path / "run" / "patches").glob("00*")
    assert record["cost"]["chosen"]["precision"] == "int8"
    assert patch.suffix == ".recast"
    assert patch.stat().st_size == record["task"]["patch_bytes"] < plain
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert "equal" in capsys.readouterr().out
    of_four_bits = len(TaskPatch.load(patch).compacted(4).to_bytes())
    assert main(tiny_fit("--budget.bytes", of_four_bits - 8, run_dir=tmp_path / "smallest")) == 0
    assert records(tmp_path, "smallest")[0]["cost"]["chosen"]["precision"] == "int2"
    assert main(tiny_fit("--budget.bytes", 300, run_dir=tmp_path / "none")) == 2
    error = capsys.readouterr().err
    assert "budget.bytes=300 is too small for task 'first': its patch takes" in error
    assert not list((tmp_path / "none").rglob("*.ckpt"))


def test_training_images_are_limited_evenly_and_no_others_are_used(tiny_fit, tmp_path, capsys):
    assert main(tiny_fit("--budget.images", 5)) == 0
    first, second = records(tmp_path)
    assert [record["task"]["train_images"] for record in (first, second)] == [5, 5]
    counts = [sorted(Signature.load(path).counts.tolist()) for path in sorted((tmp_path / "run/signatures").iterdir())]
    assert counts == [[1, 2, 2], [2, 3]]
    # the splits are those of all images, so that the run can be measured and continued without the limit
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true"]) == 0
    assert main(tiny_fit("--budget.images", 2, run_dir=tmp_path / "none")) == 2
    assert "budget.images=2 is too small for task 'first', which has 3 classes" in capsys.readouterr().err


def test_a_solved_head_is_kept_where_no_step_fits(tiny_fit, tmp_path, monkeypatch, capsys):
    Clock(monkeypatch)
    assert main(tiny_fit("--budget.seconds", "0.5")) == 0  # 0.4 are spent on features and the test of task `first`
    assert "the head that was solved on the features of the base is kept" in " ".join(capsys.readouterr().out.split())
    assert [record["cost"]["seconds"] for record in records(tmp_path)] == pytest.approx([0.5, 0.5], abs=0.06)
    first = records(tmp_path)[0]["task"]
    assert first["epochs"] == 0
    assert first["accuracy"] == first["probe_accuracy"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--budget.seconds", "0"], "budget.seconds=0.0 must be above 0"),
        (["--budget.seconds", "0.45", "--model.head", "sgd"], "are spent before its first step"),
        (["--budget.seconds", "0.01"], "to read its 24 images before the first step, and to test, takes about"),
        (["--budget.memory", "2e6"], "budget.memory=2e+06 is too small for task 'first'"),
    ],
)
def test_a_budget_that_nothing_can_be_learnt_with_is_refused(words, reason, tiny_fit, capsys, monkeypatch):
    Clock(monkeypatch)
    assert main(tiny_fit(*words)) == 2
    assert reason in capsys.readouterr().err
