"""Saved work changes no result: unread tokens, sampled gradients, merged weights."""

import copy
import json
import threading

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from recast_pl import BackboneConfig, BankLayout, Recast, TILModule
from recast_pl.cli import main
from recast_pl.compat.torch import has_forward_hooks
from recast_pl.decomposition.bank import TemplateBank
from recast_pl.errors import MethodError
from recast_pl.learning.acceleration import skip_unread_tokens
from recast_pl.methods.gradient_sampling import sample_gradients

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}


def torchvision_vit():
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    net.heads = nn.Identity()
    return net


NETWORKS = {  # and how many of the 17 to 21 tokens the MLP of the last block must see
    "class-token": (lambda: timm.create_model("vit_tiny_patch16_224", **SMALL), 1),
    "registers": (lambda: timm.create_model("vit_tiny_patch16_224", reg_tokens=4, **SMALL), 1),
    "average": (lambda: timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL), 17),
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), 2),
    "layer-scale": (lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.1, **SMALL), 1),
    "torchvision": (torchvision_vit, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_unread_tokens_are_skipped_without_changing_features_or_gradients(name):
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


def test_no_token_is_skipped_if_a_piece_has_a_hook():
    network = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    outputs = []
    network.blocks[1].register_forward_hook(lambda _, __, output: outputs.append(output))
    expected = network.blocks[1].mlp(torch.ones(1, 17, 32))
    skip_unread_tokens(network, 32)
    assert torch.equal(network.blocks[1].mlp(torch.ones(1, 17, 32)), expected)


def test_networks_without_such_blocks_do_not_change():
    network = timm.create_model("resnet10t", num_classes=0).eval()
    skip_unread_tokens(network, 32)
    assert not any(map(has_forward_hooks, network.modules()))


class Unusual(nn.Module):
    """Features that are another function of images and of the parts of a vision transformer."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = timm.create_model("vit_tiny_patch16_224", **SMALL), function

    def forward(self, images):
        return self.function(self.net, images)


def before_last_block(net, images):
    tokens = net.blocks[0](net.patch_embed(images))
    net.blocks[1](tokens)
    return tokens.mean(1)


def before_last_block_network():
    return Unusual(before_last_block)


def without_gradients(net, images):
    with torch.no_grad():
        return net(images)


def in_inference_mode(net, images):
    with torch.inference_mode():
        return net(images)


def scaled_by_zero(net, images):
    tokens = net.patch_embed(images)
    return (tokens + 0 * net.blocks[1].mlp(tokens))[:, 0]


def called_twice(net, images):
    tokens = net.blocks[1].mlp(net.patch_embed(images))
    return net.blocks[1].mlp(tokens)[:, 0]


def maximum_that_few_images_find_in_the_last_token(net, images):
    tokens = net.blocks[1].mlp(net.patch_embed(images))
    shift = 100 * (images.mean() - 0.7)
    return torch.cat([tokens[:, :-1], tokens[:, -1:] + shift], 1).amax(1)


def added_in_place(net, images):
    tokens = net.patch_embed(images)
    return net.blocks[1].mlp(tokens).add_(tokens)[:, 0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("function", "skips"),
    [
        (before_last_block, False),
        (without_gradients, False),
        (in_inference_mode, False),
        (scaled_by_zero, False),
        (called_twice, False),
        (maximum_that_few_images_find_in_the_last_token, False),
        (added_in_place, True),
    ],
)
def test_features_of_unusual_networks_do_not_change(function, skips, trained):
    torch.manual_seed(0)
    plain = Unusual(function).eval().requires_grad_(trained)
    network = copy.deepcopy(plain)
    skip_unread_tokens(network, 32)
    assert any(map(has_forward_hooks, network.modules())) == skips
    for images in (torch.rand(2, 3, 32, 32), 0.8 + 0.2 * torch.rand(2, 3, 32, 32)):
        torch.testing.assert_close(network(images), plain(images))


def test_an_mlp_that_returns_a_tuple_does_not_change():
    network = Unusual(lambda net, images: net.blocks[1].mlp(net.patch_embed(images))[0][:, 0])
    mlp = network.net.blocks[1].mlp.forward
    network.net.blocks[1].mlp.forward = lambda tokens: (mlp(tokens), tokens)
    skip_unread_tokens(network, 32)
    assert not any(map(has_forward_hooks, network.modules()))


def test_an_error_of_the_network_leaves_no_hook_behind():
    def fail(net, images):
        net(images)
        raise ZeroDivisionError

    network = Unusual(fail)
    with pytest.raises(ZeroDivisionError):
        skip_unread_tokens(network, 32)
    assert not any(map(has_forward_hooks, network.modules()))


def test_a_backbone_whose_features_do_not_depend_on_its_last_block_can_be_trained(tiny_fit):
    backbone = ("--model.backbone.name", f"{__name__}.before_last_block_network", "--model.backbone.args", "{}")
    assert main(tiny_fit(*backbone, "--model.pieces", '[{"class_path": "LinearProbe"}]')) == 0


@pytest.mark.parametrize("fraction", [0.25, 0.01])
def test_a_sampled_gradient_is_unbiased_and_the_others_are_exact(fraction):
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
def test_trains_with_sampled_gradients(tiny_fit, precision, tmp_path):
    piece = {
        "class_path": "recast_pl.Recast",
        "init_args": {"layout": {"targets": ["mlp"]}, "learning_rate": 2.5e-3, "gradient_tokens": 0.25},
    }
    words = ("--model.pieces", json.dumps([piece]), "--trainer.precision", precision)
    for name in ("a", "b"):
        assert main(tiny_fit(*words, run_dir=tmp_path / name)) == 0
    a, b = (sorted((tmp_path / name / "patches").iterdir()) for name in ("a", "b"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]  # the seed of the run decides the sample


@pytest.mark.parametrize("fraction", [0, 1.5])
def test_refuses_a_fraction_of_tokens_outside_of_0_to_1(fraction):
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
    # 5, 3 or 6 batches of training; 1 or 2 to evaluate
    assert main(tiny_fit("--model.head", "sgd", "--trainer.max_epochs", "2")) == 0
    # for each task features, a batch that predicts the cost, 2 epochs, test, and how sure it is of validation images
    evaluations = 2 * (1 + 1 + 2 + 1 + 1)
    assert counts["evaluation"] == 12 * evaluations  # 12 groups; all layers of a group are generated together
    assert counts["train"] % 24 == 0
    assert counts["train"] >= 24 * 2 * 2 * 2


def recast_module():
    module = TILModule(BackboneConfig("vit_tiny_patch16_224", "random", SMALL), (Recast(BankLayout(["mlp"])),))
    module.build(32)
    module.begin_task("any", ["a", "b"])
    return module.eval()


@torch.no_grad()
def change_coefficients(module):
    for parameter in module.pieces[0].parameters.values():
        parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("same", [False, True])
def test_an_evaluation_in_another_thread_does_not_freeze_the_weights_of_training(same):
    torch.manual_seed(0)
    trained, images = recast_module(), torch.rand(2, 3, 32, 32)
    evaluated = trained if same else recast_module()
    before = evaluated(images)
    entered, changed = threading.Event(), threading.Event()
    found = []

    def evaluate():
        with evaluated.merged():
            found.append(evaluated(images))
            entered.set()
            assert changed.wait(60)
            found.append(evaluated(images))

    thread = threading.Thread(target=evaluate)
    thread.start()
    assert entered.wait(60)
    losses = []
    for _ in range(2):
        change_coefficients(trained)
        losses.append(trained(images).square().sum())
        gradients = torch.autograd.grad(losses[-1], list(trained.pieces[0].parameters.values()))
        assert all(gradient.any() for gradient in gradients)
    changed.set()
    thread.join()
    assert losses[0] != losses[1]
    assert torch.equal(losses[1], trained(images).square().sum())
    for output in found:
        torch.testing.assert_close(output, before)


def test_merged_weights_follow_a_change_of_precision():
    module = recast_module()
    for kind in (torch.float32, torch.float64, torch.float32):
        module.to(kind)
        images = torch.rand(2, 3, 32, 32, dtype=kind)
        expected = module(images)
        with module.merged():
            assert torch.equal(module(images), expected)


def test_an_error_in_an_evaluation_leaves_no_merged_weights_behind(tiny_fit, monkeypatch):
    module, images = recast_module(), torch.rand(2, 3, 32, 32)
    with pytest.raises(ZeroDivisionError), module.merged():
        raise ZeroDivisionError
    before = module(images)
    change_coefficients(module)
    assert not torch.equal(module(images), before)
    seen = []

    def fail(self, batch, batch_idx):
        seen.append(self)
        raise ZeroDivisionError

    monkeypatch.setattr(TILModule, "validation_step", fail)
    with pytest.raises(ZeroDivisionError):
        main(tiny_fit())
    images = torch.rand(2, 3, 32, 32)
    before = seen[0](images)
    change_coefficients(seen[0])
    assert not torch.equal(seen[0](images), before)
