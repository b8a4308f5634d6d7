"""Growth: later tasks mix the templates that the first have left, and no earlier task changes."""

import json
import os

import pytest
import torch
from conftest import RANDOM, ROOT, TINY_VIT, clipart_words
from safetensors.torch import load_file
from test_stream import kill_and_resume, patches

import recast_pl
from recast_pl import TaskPatch
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.data.images import decode_file
from recast_pl.errors import PatchError
from recast_pl.files import read_tensors
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder

RATES = {"learning_rate": 2e-2, "growing_rate": 5e-3}
TARGETS, TEMPLATE = 24, 32 + 128  # weights of the MLP, and the numbers of one template of rank 1


RECAST = {"layout": {"targets": [r"mlp\.fc[12]\.weight"], "groups": 6}, "learning_rate": 2.5e-3}


def words(run, *more, **settings):
    """The command line of `fit` for three small tasks, of which the first two leave templates."""
    growth = {"class_path": "Growth", "init_args": {"tasks": 2, **RATES, **settings}}
    pieces = json.dumps([{"class_path": "Recast", "init_args": RECAST}, growth])
    vit = ["--config", "vit.yaml", "--model.head", "sgd", "--model.backbone.name", "vit_tiny_patch16_224", *RANDOM]
    method = ["--model.backbone.args", json.dumps(TINY_VIT), "--model.pieces", pieces, "--data.batch_size", "64"]
    return [*clipart_words([*vit, *method], run, names=("signs", "people", "food")), *map(str, more)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("grow") / "run"
    assert main(words(folder)) == 0
    return folder


def test_later_tasks_mix_the_templates_of_the_first(run):
    summary = json.loads((run / "summary.json").read_text())
    mixed = TARGETS * 2
    grown = [TARGETS * TEMPLATE, TARGETS * (TEMPLATE + 1), TARGETS * 2]
    assert [task["task_parameters"] for task in summary["tasks"]] == [mixed + count for count in grown]
    assert summary["forgetting"] == 0
    (shared,) = (run / "shared").iterdir()
    assert shared.name == "02_food.safetensors"
    templates = {name: tensor for name, tensor in load_file(shared).items() if "template" in name}
    assert {len(t) for t in templates.values()} == {TARGETS * TEMPLATE}
    assert len(templates) == 2
    states = [patch.pieces[1] for patch in RunFolder(run).load_patches().values()]
    assert [len(state["coefficients"]) // TARGETS for state in states] == [1, 2, 2]
    assert states[0]["coefficients"].eq(1).all()
    assert states[1]["coefficients"].view(TARGETS, 2)[:, 1].eq(1).all()
    assert states[2]["coefficients"].abs().gt(0).all()
    assert main(["test", "--run_dir", str(run)]) == 0


def test_a_weight_is_what_the_formula_says(run):
    module, learnt = open_run(str(run))[1].model, RunFolder(run).load_patches()
    restore(module, RunFolder(run), 32)
    module.activate(learnt["food"])
    tensors, facts = read_tensors(run / "decomposition.safetensors", PatchError)
    shared = load_file(run / "shared" / "02_food.safetensors")
    mixing, scales = learnt["food"].pieces[0]["coefficients"].view(TARGETS, 2), learnt["food"].pieces[1]["coefficients"]
    names = [name for name, _ in module.pieces[1].adaptations.items()]
    order = [name for group in facts["groups"] for name in group["targets"]]
    for group in facts["groups"]:
        for name in group["targets"]:
            weight = torch.einsum("n,nij->ij", mixing[order.index(name)], tensors[f"{group['name']}/templates"])
            for index, scale in enumerate(scales.view(TARGETS, 2)[names.index(name)]):
                at = names.index(name) * TEMPLATE
                left, right = shared[f"pieces/1/template{index}"][at : at + TEMPLATE].split(list(weight.shape))
                weight = weight + scale * torch.outer(left, right)
            path = name.rpartition(".")[0]
            torch.testing.assert_close(module.backbone.net.get_submodule(path).weight, weight, atol=1e-6, rtol=1e-5)


def test_logits_of_old_tasks_stay_the_same_bit_by_bit_as_the_bank_grows(run):
    images = torch.rand(3, 3, 32, 32)
    module, first = open_run(str(run))[1].model, RunFolder(run).load_patches()["signs"]
    restore(module, RunFolder(run), 32)
    whole = module.pieces[1].templates
    logits = []
    for count in (2, 1):
        module.pieces[1].templates = whole[:count]
        module.activate(first)
        with torch.no_grad():
            logits.append(module.eval()(images))
    assert torch.equal(*logits)
    module.pieces[1].templates = []
    with pytest.raises(PatchError, match=r"needs 1 grown templates .* here are 0"):
        module.activate(first)


def test_grown_tasks_predict_each_and_together(run):
    model, learnt = recast_pl.load(run), RunFolder(run).load_patches()
    images = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))[::60]
    module = open_run(str(run))[1].model
    restore(module, RunFolder(run), 32)
    for task, patch in learnt.items():  # which have 1, 2 and 2 coefficients for each weight
        module.activate(patch)
        with torch.no_grad():
            wanted = module(torch.stack([decode_file(path, 32) for path in images]) / 255).softmax(1)  # (B, classes)
        found = model.predict(images, task)
        torch.testing.assert_close(torch.tensor([list(f.probabilities.values()) for f in found]), wanted)
    alone = [model.predict(images[0], task)[0] for task in learnt]
    together = model.predict([images[0]] * 3, tasks=list(learnt))
    assert [f.probabilities for f in together] == [pytest.approx(f.probabilities, abs=1e-5) for f in alone]


def test_a_patch_of_another_run_is_refused(run, tmp_path, capsys):
    assert main(words(tmp_path / "other", "--model.optimizer.init_args.lr", "1e-3")) == 0
    patch = tmp_path / "other" / "patches" / "00_signs.safetensors"
    assert main(["patch", "verify", str(patch), "--run_dir", str(tmp_path / "other")]) == 0
    assert TaskPatch.load(patch).base == RunFolder(run).load_patches()["signs"].base
    assert main(["patch", "verify", str(patch), "--run_dir", str(run)]) == 2
    assert "needs 1 grown templates" in capsys.readouterr().err


def test_tasks_of_a_growing_bank_are_trained_in_order(tmp_path, capsys):
    assert main(words(tmp_path / "run", "--only", "food")) == 2
    assert "they share what Growth trains; train them in order" in capsys.readouterr().err
    assert main(words(tmp_path / "run", "--engine", "Processes")) == 2
    assert "they share what Growth trains; train them in order" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("tasks", 0), ("rank", 0)])
def test_an_invalid_setting_is_one_line(key, value, tmp_path, capsys):
    assert main(words(tmp_path / "run", **{key: value})) == 2
    error = capsys.readouterr().err
    assert f"{key}={value}" in error
    assert "Namespace" not in error


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path):
    assert main(words(tmp_path / "whole", "--trainer.max_epochs", 2)) == 0
    killed, resume = tmp_path / "killed", []
    moments = (("on_train_end", "people", 2), ("on_train_batch_start", "food", 1))
    for hook, task, epoch in moments:
        callback = {"class_path": "crash_callbacks.KillAt", "init_args": {"hook": hook, "task": task, "epoch": epoch}}
        callbacks = ["--trainer.callbacks", json.dumps([callback])]
        kill_and_resume(words(killed, "--trainer.max_epochs", 2, *callbacks, *resume), killed)
        resume = ["--resume", "true"]
    assert main(words(killed, "--trainer.max_epochs", 2, *resume)) == 0
    assert patches(killed) == patches(tmp_path / "whole")
    shared = [(folder / "shared" / "02_food.safetensors").read_bytes() for folder in (killed, tmp_path / "whole")]
    assert shared[0] == shared[1]
