"""What is left out changes no result: unread tokens, sampled gradients, merged weights."""

import copy
import json

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from recast_pl import BackboneConfig, BankLayout, Recast, TILModule
from recast_pl.cli import main
from recast_pl.decomposition.bank import TemplateBank
from recast_pl.errors import MethodError
from recast_pl.learning.acceleration import skip_unread_tokens
from recast_pl.methods.gradient_sampling import sample_gradients

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}


def torchvision_vit():
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    net.heads = nn.Identity()
    return net


NETWORKS = {  # and how many of 17 to 21 tokens the last block's MLP is to see
    "class-token": (lambda: timm.create_model("vit_tiny_patch16_224", **SMALL), 1),
    "registers": (lambda: timm.create_model("vit_tiny_patch16_224", reg_tokens=4, **SMALL), 1),
    "average": (lambda: timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL), 17),
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), 2),
    "layer-scale": (lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.1, **SMALL), 1),
    "torchvision": (torchvision_vit, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_that_no_feature_reads_are_skipped_and_nothing_changes(name):
    make, read = NETWORKS[name]
    torch.manual_seed(0)
    plain = make().eval().double()
    network = copy.deepcopy(plain)
    skip_unread_tokens(network, 32)
    for more in range(2):  # a copy computes with its own weights
        seen = []
        mlp = [m for n, m in network.named_modules() if n.endswith(".mlp")][-1]
        first = mlp.fc1 if hasattr(mlp, "fc1") else mlp[0]
        handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))  # noqa: B023
        images, upstream = torch.rand(3, 3, 32, 32).double(), torch.randn(3, 32).double()
        torch.testing.assert_close(network(images), plain(images))
        assert seen == [read]
        gradients = [torch.autograd.grad((net(images) * upstream).sum(), net.parameters()) for net in (network, plain)]
        torch.testing.assert_close(*gradients)
        handle.remove()
        plain, network = (copy.deepcopy(net) for net in (plain, network))
        with torch.no_grad():
            for a, b in zip(plain.parameters(), network.parameters(), strict=True):
                a.add_(0.01 * (more + 1)), b.copy_(a)


def test_no_token_is_skipped_where_a_piece_listens_in():
    network = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    heard = []
    network.blocks[1].register_forward_hook(lambda _, __, output: heard.append(output))
    expected = network.blocks[1].mlp(torch.ones(1, 17, 32))
    skip_unread_tokens(network, 32)
    assert torch.equal(network.blocks[1].mlp(torch.ones(1, 17, 32)), expected)


def test_networks_without_such_blocks_are_left_alone():
    network = timm.create_model("resnet10t", num_classes=0).eval()
    skip_unread_tokens(network, 32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("fraction", [0.25, 0.01])
def test_a_sampled_gradient_is_right_in_the_mean_and_exact_for_all_else(fraction):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    x = torch.randn(2, 40, 6, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(2, 40, 5, dtype=torch.double) * torch.rand(2, 40, 1)
    parameters = [x, layer.bias, layer.parametrizations.weight.original]
    exact = torch.autograd.grad((layer(x) * upstream).sum(), parameters)
    sample_gradients(layer, fraction)
    draws = [torch.autograd.grad((layer(x) * upstream).sum(), parameters) for _ in range(4000)]
    for _, (of_x, of_bias, _) in zip(range(2), draws, strict=False):
        torch.testing.assert_close(of_x, exact[0])
        torch.testing.assert_close(of_bias, exact[1])
    estimates = torch.stack([weight for *_, weight in draws])  # (R, 5, 6)
    error = estimates.std(0) / len(draws) ** 0.5
    z = (estimates.mean(0) - exact[2]) / error
    assert estimates.std(0).min() > 0
    assert z.abs().max() < 4.5  # of 30 normal numbers
    assert z.square().mean().sqrt() < 1.6


def test_an_overflow_reaches_a_sampled_gradient():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    sample_gradients(layer, 0.25)
    upstream = torch.ones(64, 2)
    for bad in (float("inf"), float("nan")):
        upstream[17, 1] = bad
        (gradient,) = torch.autograd.grad(
            (layer(torch.ones(64, 3)) * upstream).sum(), layer.parametrizations.parameters()
        )
        assert not gradient.isfinite().all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns_with_sampled_gradients(tiny_fit, precision, tmp_path):
    piece = {
        "class_path": "recast_pl.Recast",
        "init_args": {"layout": {"targets": ["mlp"]}, "learning_rate": 2e-2, "gradient_tokens": 0.25},
    }
    words = ("--model.pieces", json.dumps([piece]), "--trainer.precision", precision)
    for name in ("a", "b"):
        assert main(tiny_fit(*words, run_dir=tmp_path / name)) == 0
    a, b = (sorted((tmp_path / name / "patches").iterdir()) for name in ("a", "b"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]  # the sample is drawn from the run's seed


@pytest.mark.parametrize("fraction", [0, 1.5])
def test_refuses_a_part_of_tokens_that_is_none(fraction):
    with pytest.raises(MethodError, match=f"gradient_tokens={fraction} must be above 0"):
        Recast(BankLayout(["mlp"]), gradient_tokens=fraction)


def test_refuses_to_sample_tokens_of_convolutions():
    module = TILModule(BackboneConfig("resnet10t", "random"), (Recast(BankLayout(["conv"]), gradient_tokens=0.5),))
    with pytest.raises(MethodError, match=r"needs weights of nn\.Linear, which conv1.* is not"):
        module.build(32)


def test_evaluation_generates_each_weight_once(tiny_fit, monkeypatch):
    counts = {"train": 0, "evaluation": 0}
    mix = TemplateBank.mix

    def counted(self, *arguments, **keywords):
        counts["train" if torch.is_grad_enabled() else "evaluation"] += 1
        return mix(self, *arguments, **keywords)

    monkeypatch.setattr(TemplateBank, "mix", counted)
    assert main(tiny_fit("--trainer.max_epochs", "2")) == 0  # 5, 3 or 6 batches of training; 1 or 2 to evaluate
    evaluations = 2 * (1 + 2) + 3  # for each task features and 2 epochs; test of task 1, then of both
    assert counts["evaluation"] == 12 * evaluations  # groups, whose layers are mixed together
    assert counts["train"] % 24 == 0
    assert counts["train"] >= 24 * 2 * 2 * 2


def test_an_error_in_an_evaluation_leaves_no_merged_weights_behind(tiny_fit, monkeypatch):
    def fail(self, batch, batch_idx):
        raise ZeroDivisionError

    monkeypatch.setattr(TILModule, "validation_step", fail)
    with pytest.raises(ZeroDivisionError):
        main(tiny_fit())
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}
