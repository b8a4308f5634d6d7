"""A learnt task in the hands of other programs: timm, torchvision, ONNX Runtime, torch.export."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import timm
import torch
import torchvision
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from recast_pl import TILModule
from recast_pl.cli import main
from recast_pl.commands.configs import open_run
from recast_pl.data.images import FileDataset
from recast_pl.runs import open_task

PICTURES = sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[:5]


def learn(words, run):
    """A run on real images, by hardly any training."""
    tasks = [{"name": name, "path": f"data/clipart/{name}"} for name in ("signs", "people")]
    few = ["--data.tasks", json.dumps(tasks), "--data.image_size", "32", "--trainer.max_epochs", "1"]
    quick = ["--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    assert main(["fit", *words, "--run_dir", str(run), *few, *quick, "--trainer.accelerator", "cpu"]) == 0
    return run


def export(run, *words):
    return main(["export", "--run_dir", str(run), *words])


def expected(run, task, size=32):
    """Real images (5, 3, S, S), and what the run itself makes of them."""
    files = FileDataset(PICTURES, size)
    images = torch.stack([files[index][0] for index in range(len(files))])
    module = open_run(str(run))[1].model
    open_task(module, run, task)
    with torch.no_grad():
        return images, module.eval()(images)


def facts_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["recast_pl"])


def normalised(images, facts):
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return learn(["--config", "quickstart.yaml"], tmp_path_factory.mktemp("export") / "run")


def test_timm_loads_the_weights_strictly(run, capsys):
    assert export(run, "--task", "people", "--format", "safetensors") == 0
    file = run / "export" / "people.safetensors"
    facts = facts_of(file)
    assert facts["classes"] == sorted(path.name for path in (ROOT / "data/clipart/people").iterdir() if path.is_dir())
    assert (facts["task"], facts["image_size"], facts["constructor"]) == ("people", 32, "timm.create_model")
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    plain.load_state_dict(load_file(file), strict=True)
    images, logits = expected(run, "people")
    with torch.no_grad():
        torch.testing.assert_close(plain(normalised(images, facts)), logits, atol=1e-5, rtol=1e-5)
    assert "timm.create_model(model_name='tf_efficientnet_lite0', num_classes=4)" in capsys.readouterr().out


def test_a_torch_export_takes_any_number_of_images(run):
    assert export(run, "--task", "people", "--format", "torch_export") == 0
    file = run / "export" / "people.pt2"
    told = {"recast_pl.json": ""}
    program = torch.export.load(file, extra_files=told)
    images, logits = expected(run, "people")
    for count in (1, 5):
        torch.testing.assert_close(program.module()(images[:count]), logits[:count], atol=1e-5, rtol=1e-5)
    assert json.loads(told["recast_pl.json"])["task"] == "people"
    dense = sum(tensor.numel() for tensor in timm.create_model("tf_efficientnet_lite0").state_dict().values())
    assert file.stat().st_size < 4.2 * dense  # neither templates nor coefficients are in it


def test_onnx_runtime_says_what_pytorch_does(run, tmp_path):
    file = tmp_path / "signs.onnx"
    assert export(run, "--task", "signs", "--format", "onnx", "--output", str(file)) == 0
    session = onnxruntime.InferenceSession(file)
    images, logits = expected(run, "signs")
    for count in (1, 5):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        np.testing.assert_allclose(found, logits[:count], atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert len(json.loads(told["classes"])) == 5
    assert told["task"] == "signs"
    onnx.checker.check_model(onnx.load(file), full_check=True)


def test_tasks_are_swapped_in_one_onnx_file(run, tmp_path):
    file = tmp_path / "all.onnx"
    assert export(run, "--format", "onnx_bank", "--output", str(file)) == 0
    session = onnxruntime.InferenceSession(file)
    for task, classes in (("signs", 5), ("people", 4)):
        feed = safetensors.numpy.load_file(tmp_path / f"all.{task}.safetensors")
        assert feed["coefficients"].nbytes == 4 * 69
        images, logits = expected(run, task)
        (found,) = session.run(None, {"images": images.numpy(), **feed})
        assert found.shape == (5, classes)
        np.testing.assert_allclose(found, logits, atol=1e-4)
        assert len(facts_of(tmp_path / f"all.{task}.safetensors")["classes"]) == classes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "onnx"], ["--task is missing", "signs, people"]),
        (["--task", "dogs", "--format", "onnx"], ["'dogs'", "signs, people"]),
        (["--task", "signs", "--format", "gguf"], ["gguf"]),
    ],
)
def test_what_cannot_be_exported_is_one_line(words, named, run, capsys):
    assert export(run, *words) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named), error


def test_what_changes_activations_has_no_plain_model(tmp_path, capsys):
    run = learn(["--config", "quickstart.yaml", "--config", "methods/clr.yaml"], tmp_path / "run")
    assert export(run, "--task", "signs", "--format", "safetensors") == 2
    assert "changes more than weights" in capsys.readouterr().err
    assert export(run, "--task", "signs", "--format", "onnx_bank") == 2
    assert "those of CLR are not" in capsys.readouterr().err
    assert not (run / "export").exists()
    assert export(run, "--task", "signs", "--format", "torch_export") == 0
    images, logits = expected(run, "signs")
    found = torch.export.load(run / "export" / "signs.pt2").module()(images)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_a_hook_of_ones_own_is_found_by_what_it_does(run, monkeypatch, capsys):
    build = TILModule.build

    def hooked(module, size):
        backbone = build(module, size)
        backbone.net.conv_stem.register_forward_hook(lambda _, __, output: output + 1)
        return backbone

    monkeypatch.setattr(TILModule, "build", hooked)
    assert export(run, "--task", "signs", "--format", "safetensors") == 2
    assert "logits differ by" in capsys.readouterr().err


@pytest.mark.slow
def test_real_vit_weights_go_through_every_format(vit_weights, tmp_path):
    vit = ["--model.backbone.name", "vit_small_patch14_dinov2", "--model.backbone.weights", vit_weights]
    run = learn(["--config", "vit.yaml", *vit, "--data.image_size", "70", "--seed_everything", "1"], tmp_path / "run")
    for format_name in ("safetensors", "onnx", "onnx_bank"):
        assert export(run, "--task", "signs", "--format", format_name) == 0
    images, logits = expected(run, "signs", 32)
    facts = facts_of(run / "export" / "signs.safetensors")
    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=5, img_size=32).eval()
    plain.load_state_dict(load_file(run / "export" / "signs.safetensors"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(normalised(images, facts)), logits, atol=1e-4, rtol=1e-4)
