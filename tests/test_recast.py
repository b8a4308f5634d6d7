"""Methods with several `Recast` pieces: each keeps its decomposition, and every command works on such a run."""

import json
import re

import pytest
import torch
from conftest import ROOT, TINY_VIT, clipart_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recast_pl
from recast_pl.cli import main
from recast_pl.decomposition.bank import Decomposition
from recast_pl.files import sha256

MLP = {"layout": {"targets": [r"mlp\.fc[12]\.weight"], "groups": 3}, "learning_rate": 2.5e-3}
ATTENTION = {"layout": {"targets": [r"attn\.qkv\.weight"], "groups": 6}, "learning_rate": 1e-2}
FILES = ("decomposition.safetensors", "decomposition_1.safetensors")


def words(run, *more, growth=False):
    """The command line of `fit` for two small tasks: attention with 6 groups, MLP with 3."""
    pieces = [{"class_path": "Recast", "init_args": init} for init in (ATTENTION, MLP)]
    pieces += [{"class_path": "Growth"}] if growth else []
    model = ["--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.weights", "random"]
    model += ["--model.backbone.args", json.dumps(TINY_VIT), "--model.pieces", json.dumps(pieces)]
    return [*clipart_words(["--config", "vit.yaml", *model, "--data.batch_size", "64"], run), *map(str, more)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recast") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(words(folder, "--trainer.logger", "true")) == 0
    return folder


def test_each_piece_keeps_its_own_decomposition(run):
    groups = [Decomposition.load(run / name).banks for name in FILES]
    assert [len(banks) for banks in groups] == [6, 6]  # fc1 and fc2 have three groups each
    assert {re.search(r"attn|mlp", target)[0] for bank in groups[1] for target in bank.group.targets} == {"mlp"}


def test_every_command_works_on_the_run(run, tmp_path, capsys):
    before = [sha256((run / name).read_bytes()) for name in FILES]
    for command in (
        ["test", "--run_dir", run],
        ["patch", "verify", run / "patches" / "00_signs.safetensors", "--run_dir", run],
        ["analyze", "--run_dir", run, "--output", tmp_path / "analysis"],
        ["export", "--run_dir", run, "--task", "signs", "--format", "torch_export", "--output", tmp_path / "signs.pt2"],
        words(run, "--trainer.logger", "true", "--resume", "true"),
    ):
        assert main([*map(str, command)]) == 0, capsys.readouterr().err
    assert [sha256((run / name).read_bytes()) for name in FILES] == before
    analysis = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert len(analysis["groups"]) == 12
    assert main(["export", "--run_dir", str(run), "--format", "onnx_bank", "--output", str(tmp_path / "bank")]) == 0
    *_, difference = re.findall(r"largest difference from the run's logits: (\S+)", capsys.readouterr().out)
    assert float(difference) < 1e-4


def check_one_batch(model):
    """Images predict the same alone and in a batch of both tasks."""
    images = sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[:2]
    alone = [model.predict(image, task)[0] for image, task in zip(images, ("signs", "people"), strict=True)]
    together = model.predict(images, tasks=["signs", "people"])
    assert [f.probabilities for f in together] == [pytest.approx(f.probabilities, abs=1e-5) for f in alone]
    return images


def test_tasks_predict_alone_and_in_one_batch(run):
    check_one_batch(recast_pl.load(run))


def test_curves_and_histograms_tell_the_pieces_apart(run):
    events = EventAccumulator(str(run / "tensorboard" / "00_signs"), size_guidance={"histograms": 0})
    events.Reload()
    assert {tag for tag in events.Tags()["histograms"] if tag.startswith("coefficients/")} == {
        "coefficients/Recast",
        "coefficients/Recast_1",
    }
    rates = {tag.rpartition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("lr-")}
    assert {"Recast", "Recast_1"} <= rates


def test_a_bank_grows_over_two_pieces(tmp_path, capsys):
    assert main(words(tmp_path / "run", growth=True)) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    patches = [recast_pl.TaskPatch.load(path) for path in sorted((tmp_path / "run" / "patches").iterdir())]
    assert [len(patch.pieces) for patch in patches] == [3, 3]
    assert all(torch.isfinite(patch.pieces[2]["coefficients"]).all() for patch in patches)
