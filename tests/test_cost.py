"""What tasks cost: predicted, kept within a budget, and recorded."""

import json

import pytest

from recast_pl import TILModule
from recast_pl.backbones.backbone import Backbone
from recast_pl.cli import main
from recast_pl.learning import cost

HEADS = ["logistic", "sgd"]
WORDS = ["--trainer.max_epochs", "12", "--trainer.logger", "false"]


class Clock:
    """A clock that only the network moves: 10 ms for each image, and 20 ms more for one that is trained on."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        forward, step = Backbone.forward, TILModule.training_step

        def timed_forward(network, images):
            self.now += 0.01 * len(images)
            return forward(network, images)

        def timed_step(module, batch, batch_idx):
            self.now += 0.02 * len(batch[1])
            return step(module, batch, batch_idx)

        monkeypatch.setattr(Backbone, "forward", timed_forward)
        monkeypatch.setattr(TILModule, "training_step", timed_step)
        monkeypatch.setattr(cost, "time", self)

    def monotonic(self):
        return self.now


def records(tmp_path):
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "tasks").glob("*.json"))]


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


def test_a_solved_head_is_kept_where_no_step_fits(tiny_fit, tmp_path, monkeypatch):
    Clock(monkeypatch)
    assert main(tiny_fit("--budget.seconds", "0.01")) == 0
    assert [record["task"]["epochs"] for record in records(tmp_path)] == [0, 0]
    assert all(record["task"]["accuracy"] == record["task"]["probe_accuracy"] for record in records(tmp_path))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--budget.seconds", "0"], "budget.seconds=0.0 must be above 0"),
        (["--budget.seconds", "0.01", "--model.head", "sgd"], "are spent before its first step"),
    ],
)
def test_a_budget_that_nothing_can_be_learnt_with_is_refused(words, reason, tiny_fit, capsys):
    assert main(tiny_fit(*words)) == 2
    assert reason in capsys.readouterr().err
