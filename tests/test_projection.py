"""Heads on projected features: the matrix against its definition, and a run with every command that meets it."""

import copy
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import RANDOM, ROOT, TINY_VIT, learn
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import check_bank, check_onnx, check_plain, check_program, expected, export
from test_recast import check_one_batch
from test_stream import patches, read_summary
from torch import nn

import recast_pl
from recast_pl import BackboneConfig, Projection, Recast, TaskPatch, TILModule
from recast_pl.cli import main
from recast_pl.errors import MethodError
from recast_pl.files import pack_tensors
from recast_pl.methods.projection import leading_directions

NARROW = "mobilenetv2_050"  # 160 channels are expanded to 1280 features
WORDS = ["--config", "quickstart.yaml", "--config", "methods/recast_projection.yaml", "--model.backbone.name", NARROW]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tasks `signs` and `people`, with heads on 128 directions."""
    folder = tmp_path_factory.mktemp("projection") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return learn([*WORDS, *RANDOM], folder)


def test_the_rows_are_the_leading_directions_by_their_definition():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 3), nn.Linear(12, 7))
    found = leading_directions(network, 12, 5).double().numpy()
    matrix = network[2].weight.detach().double().numpy().reshape(12, -1)  # the last one with 12 outputs
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    np.testing.assert_allclose(np.abs(np.sum(found * vectors[:, ::-1][:, :5].T, 1)), 1, rtol=1e-5)
    np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(np.sum((found @ matrix) ** 2, 1), values[::-1][:5], rtol=1e-5)
    assert (found[np.arange(5), np.abs(found).argmax(1)] > 0).all()


def test_features_are_those_of_the_plain_network_times_the_matrix():
    torch.manual_seed(0)
    module = TILModule(BackboneConfig(NARROW, "random"), [Projection(20)])
    backbone = module.build(32)
    images = torch.rand(2, 3, 32, 32)
    plain = backbone.net((images - backbone.mean) / backbone.std)
    assert (plain.shape, backbone.num_features) == ((2, 1280), 20)
    conv = backbone.net.conv_head.weight.detach().flatten(1).double()
    directions = torch.linalg.svd(conv)[0][:, :20].T
    assert torch.allclose(backbone(images).abs(), (plain.double() @ directions.T).abs().float(), atol=1e-5)
    assert torch.equal(copy.deepcopy(backbone)(images), backbone(images))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == []
    module.begin_task("a", ["x", "y"])
    assert module.head.weight.shape == (2, 20)


def test_the_matrix_belongs_to_the_base():
    def base(*pieces):
        torch.manual_seed(0)
        module = TILModule(BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT), pieces)
        module.build(32)
        return module.base

    assert len({base(), base(Projection(8)), base(Projection(9))}) == 3


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Projection(0), "width=0 must be at least 1"),
        (lambda: leading_directions(nn.Linear(9, 6), 6, 6), "width=6 must be from 1 to 5"),
        (lambda: leading_directions(nn.Linear(3, 6), 6, 4), "width=4 must be from 1 to 3, for 6 features behind a la"),
        (lambda: leading_directions(nn.Linear(3, 6), 7, 4), "no layer has 7 outputs"),
        (lambda: TILModule(BackboneConfig(NARROW), [Projection(), Projection(8)]), "twice"),
    ],
)
def test_an_impossible_projection_is_refused_in_one_line(make, named):
    with pytest.raises(MethodError, match=named):
        make()


def test_a_width_that_the_backbone_does_not_have_ends_with_2(tiny_fit, capsys):
    assert main(tiny_fit("--model.pieces", json.dumps([{"class_path": "Projection"}]))) == 2
    assert "width=128 must be from 1 to 31" in capsys.readouterr().err


def test_the_matrix_is_stored_once_and_heads_are_smaller(run):
    with safe_open(run / "projection.safetensors", framework="pt") as file:
        assert file.get_slice("matrix").get_shape() == [128, 1280]
    patch = TaskPatch.load(run / "patches" / "00_signs.safetensors")
    assert patch.method == ["Recast", "Projection"]
    assert patch.head["weight"].shape == (5, 128)
    assert patch.pieces[1] == {}
    for task, content in zip(read_summary(run)["tasks"], patches(run).values(), strict=True):
        assert task["patch_bytes"] == len(content) < 128 * 5 * 4 + 2000
    assert len(patch.compacted(4).to_bytes()) < 1000


def test_an_exported_plain_model_reads_all_features_and_predicts_the_same(run):
    assert export(run, "--task", "signs", "--format", "safetensors") == 0
    assert load_file(run / "export" / "signs.safetensors")["classifier.weight"].shape == (5, 1280)
    check_plain(run, "signs", timm.create_model(NARROW, num_classes=5))


@pytest.mark.release
def test_graphs_and_programs_predict_the_same(run):
    for name in ("onnx", "torch_export"):
        assert export(run, "--task", "signs", "--format", name) == 0
    check_onnx(run, run / "export" / "signs.onnx", "signs")
    check_program(run, run / "export" / "signs.pt2", "signs")
    assert export(run, "--format", "onnx_bank") == 0
    check_bank(run, run / "export" / "bank.onnx")


def test_tasks_predict_alone_and_in_one_batch(run):
    model = recast_pl.load(run)
    images = check_one_batch(model)
    plain = expected(run, "signs")[1].softmax(1).max(1).values[:2]
    assert [f.probability for f in model.predict(images, "signs")] == pytest.approx(plain.tolist(), abs=1e-5)


def test_every_command_works_on_the_run_and_its_matrix_stays(run, tmp_path, capsys):
    before = (run / "projection.safetensors").read_bytes()
    for words in (
        ["test", "--run_dir", run],
        ["patch", "verify", run / "patches" / "00_signs.safetensors", "--run_dir", run],
        ["fit", "--run_dir", run, "--resume", "true"],
    ):
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
    assert (run / "projection.safetensors").read_bytes() == before


def test_a_patch_on_another_matrix_is_refused(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    matrix = load_file(other / "projection.safetensors")["matrix"]
    (other / "projection.safetensors").write_bytes(pack_tensors({"matrix": matrix.flip(0)}, {}))
    assert main(["test", "--run_dir", str(other)]) == 2
    assert "belongs to base" in capsys.readouterr().err
    (other / "projection.safetensors").write_bytes(pack_tensors({"matrix": matrix[:64]}, {}))
    assert main(["test", "--run_dir", str(other)]) == 2
    assert "is (64, 1280), not (128, 1280)" in capsys.readouterr().err
    (other / "projection.safetensors").write_bytes(b"damaged")
    assert main(["test", "--run_dir", str(other)]) == 2
    assert "projection.safetensors is damaged" in capsys.readouterr().err


def test_the_last_layer_may_have_generated_weights():
    """Directions are those of the pretrained weight, wherever the piece stands in the list."""
    layout = recast_pl.BankLayout([r"mlp\.fc2\.weight"], templates=2)  # which does not represent the weights exactly
    matrices = []
    for order in (1, -1):
        torch.manual_seed(0)
        pieces = [Recast(layout), Projection(8)][::order]
        module = TILModule(BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT), pieces)
        matrices.append(module.build(32).projection)
    assert torch.equal(*matrices)
