"""Mixed batches: by every strategy, each image gets the features that its task alone gives it."""

from dataclasses import replace

import pytest
import timm
import torch
from conftest import ROOT
from test_all_methods import ISOLATED, RESNET, VIT
from timm.layers import StdConv2d
from torch import nn
from torchvision.models import VisionTransformer

from recast_pl import BackboneConfig, BankLayout, Chosen, Piece, Predictor, Recast, RoSA, Scale, TILModule
from recast_pl.inference.mixed_batch import MixedBatch

COUNTS = [2, 1, 3]
APART = {
    *("piggyback-vit", "piggyback-resnet", "recast+piggyback-resnet", "finetune-vit", "finetune-resnet"),
    *("projection+finetune-vit", "projection+finetune-resnet"),
    *("lift-vit", "lift-resnet", "recast+lift-vit"),
    "atlas-vit",  # the network itself owns the class token
}
"""Methods whose tasks need too much memory, or more than new values of parameters."""


class TokenOffset(Piece):
    """A parameter of the network itself, which a hook reads."""

    def attach(self, network):
        self.parameters = {"offset": nn.Parameter(torch.zeros(32))}
        network.register_parameter("offset", self.parameters["offset"])
        network.blocks[0].register_forward_pre_hook(lambda _, args: (args[0] + self.parameters["offset"],))


class Doubled(TokenOffset):
    """Loads its state in a way of its own, which nothing but itself knows."""

    @torch.no_grad()
    def load_task_state(self, state):
        self.parameters["offset"].copy_(2 * state["offset"])


def torchvision_vit(image_size):
    net = VisionTransformer(image_size, 8, 2, 2, 32, 64)
    net.heads = nn.Identity()
    return net


def same_padded():
    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


def weight_standardised():
    layers = [StdConv2d(3, 8, 3, stride=2), nn.ReLU(), StdConv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def windowed():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, num_classes=0)


def function(make):
    return BackboneConfig(f"{__name__}.{make.__name__}", "hub")


UNTRAINED = {"probe-vit", "probe-resnet", "projection-vit", "projection-resnet"}
"""Methods that change nothing of the network."""

FURTHER = {
    "offset": lambda: (VIT, [TokenOffset()]),
    "own-loading": lambda: (VIT, [Doubled()]),
    "attention-of-torchvision": lambda: (
        function(torchvision_vit),
        [Recast(BankLayout([r"in_proj_weight|mlp\.\d\.weight"])), Scale()],
    ),
    "same-padding": lambda: (function(same_padded), [Recast(BankLayout([r"conv_(stem|pw)\.weight"]))]),
    "standardised": lambda: (function(weight_standardised), [Recast(BankLayout([r"weight"]))]),
    "windows": lambda: (function(windowed), [Recast(BankLayout([r"attn\.qkv"], templates=1))]),
    "more-entries-than-directions": lambda: (VIT, [Chosen(count=40, rank=4, diagonal=False)]),
    "strided": lambda: (RESNET, [Recast(BankLayout([r"layer\d\.0\.conv1\.weight"])), RoSA(0.003, 1)]),
}
METHODS = {**ISOLATED, **FURTHER}
QUICK = {
    *("recast-vit", "recast-resnet", "rosa-vit", "adaptformer-vit", "clr-resnet", "piggyback-vit"),
    *("chosen-vit", "chosen-resnet", "lora-shared-vit", "rounded-lora-vit", "rounded-bias-vit"),
    *("one-bit-lora-vit", "one-bit-norm-vit"),
    *FURTHER.keys() - {"same-padding", "strided"},
}
NO_PRODUCTS = {  # at any layer
    *UNTRAINED,
    *("atlas-resnet", "recast+atlas-vit"),
    *("bias-vit", "bias-resnet", "norm-vit", "norm-resnet", "headscale-vit"),
    *("rounded-bias-vit", "rounded-bias-resnet", "one-bit-norm-vit", "one-bit-norm-resnet"),
    *("kappa-vit", "kappa-resnet"),
    *("dora-vit", "dora-resnet", "clr-vit", "clr-resnet", "offset"),
    *("recast+dora-mlp-vit", "standardised", "adaptformer-vit", "adaptformer-resnet", "dropout-vit", "dropout-resnet"),
    *("dora-norms-vit", "dora-norms-resnet", "recast+dora-norms-vit"),
    *("rosa-relative-vit", "rosa-relative-resnet", "recast+rosa-relative-vit"),
}


def trained(name, count=3):
    """A module, and the states of some tasks that differ in all that is trained."""
    torch.manual_seed(0)
    module = TILModule(*METHODS[name]())
    module.build(32)
    module.begin_task("any", ["a", "b"])
    states = []
    for _ in range(count):
        with torch.no_grad():
            for piece in module.pieces:
                for parameter in piece.parameters.values():
                    parameter.add_(0.3 * parameter.abs().mean().clamp_min(0.03) * torch.randn_like(parameter))
                for sparse in piece.adaptations.values() if isinstance(piece, RoSA) else ():
                    sparse.indices = torch.randperm(sparse.shape.numel())[: len(sparse.indices)].sort().values
                    sparse.chosen = True
                if isinstance(piece, Chosen):
                    piece.load_training_state({"indices": torch.randperm(piece.total)[: piece.count].sort().values})
        states.append([piece.task_state() for piece in module.pieces])
    return module.eval(), states


def alone(module, states, images):
    """Features by the network's own forward pass, task after task, with nothing merged."""
    parts = []
    for state, part in zip(states, images.split(COUNTS), strict=True):
        for piece, tensors in zip(module.pieces, state, strict=True):
            piece.load_task_state(tensors)
        parts.append(module.backbone(part))
    return torch.cat(parts)


def marked(names):
    """All methods; those that QUICK does not name only in slow runs."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(METHODS))
@torch.no_grad()
def test_every_strategy_gives_each_image_the_features_of_its_task(name):
    module, states = trained(name)
    images = torch.rand(sum(COUNTS), 3, 32, 32)
    wanted = alone(module, states, images)
    if name not in UNTRAINED:
        other = alone(module, states, images.roll(1, 0)).roll(-1, 0)  # some images by another task
        assert (other - wanted).abs().max() > 1e-3
    mixed = MixedBatch(module.backbone, module.pieces)
    tasks = [mixed.pack(state) for state in states]
    torch.testing.assert_close(mixed.one_by_one(images, tasks, COUNTS), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.features(images, tasks, COUNTS), wanted, atol=1e-5, rtol=1e-5)
    layers = mixed.layers(images, tasks)
    assert (layers is None) == (name in APART | {"own-loading", "windows"})
    if layers is None:
        return
    for products in (False, True):
        found = mixed.together(images, tasks, COUNTS, layers, products)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert any(layer.has_products for layer in layers) == (name not in NO_PRODUCTS)


@pytest.mark.parametrize("name", marked(ISOLATED))
def test_patches_in_half_and_full_precision_share_a_batch(name, tmp_path):
    module, states = trained(name)
    tasks = ["full", "half", "brain"]
    full = [replace(module.patch({}), task=task, pieces=state) for task, state in zip(tasks, states, strict=True)]
    model, wanted = Predictor(module), []
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    for patch, dtype in zip(full, (torch.float, torch.half, torch.bfloat16), strict=True):
        narrow = {n: t.to(dtype) if t.is_floating_point() else t for n, t in patch.tensors.items()}
        patch.with_tensors(narrow).save(tmp_path / "patch.safetensors")
        model.add_patch(tmp_path / "patch.safetensors")
        wanted += model.predict_tensors(images, [patch.task] * len(images))
    mixed = [task for task in tasks for _ in images]
    found = model.predict_tensors(images.repeat(len(tasks), 1, 1, 1), mixed)
    assert [f.task for f in found] == mixed
    for prediction, alone in zip(found, wanted, strict=True):
        assert prediction.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@torch.no_grad()
def test_after_a_mixed_batch_the_network_is_an_ordinary_one_again():
    module, states = trained("recast-vit")
    images, mixed = torch.rand(sum(COUNTS), 3, 32, 32), MixedBatch(module.backbone, module.pieces)
    wanted = alone(module, states, images)
    mixed.features(images, [mixed.pack(state) for state in states], COUNTS)
    assert torch.equal(alone(module, states, images), wanted)
    with torch.enable_grad():
        (module.backbone(images) * torch.rand_like(wanted)).sum().backward()  # a normalised sum would be constant
    assert all(parameter.grad.any() for parameter in module.pieces[0].parameters.values())


@torch.no_grad()
def test_the_rule_counts_operations():
    module, states = trained("recast-vit")
    mixed = MixedBatch(module.backbone, module.pieces)
    layer, *_ = mixed.layers(torch.rand(2, 3, 32, 32), [mixed.pack(state) for state in states])

    assert layer.size == (4 * 4 + 1) * len(layer.module.bias)  # patches of 8×8 and the class token

    def products(tokens, counts):
        layer.size = tokens * len(layer.module.bias)
        return layer.products_are_cheaper(counts)

    assert products(5, [1, 1, 1])  # 5 tokens by one more template, beside a weight of two templates
    assert not products(197, [1, 1, 1])
    assert not products(5, [1, 100, 100])


@pytest.mark.slow
@torch.no_grad()
def test_real_images_by_real_weights(vit_weights):
    backbone = BackboneConfig("vit_small_patch14_dinov2", vit_weights)
    module = TILModule(backbone, [Recast(BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2))])
    module.build(98)
    module.begin_task("task", ["a", "b", "c"])
    patch = module.patch({})
    model = Predictor(module)
    for number in range(4):
        numbers = patch.pieces[0]["coefficients"]
        moved = numbers + 0.1 * numbers.abs().mean() * torch.randn_like(numbers)
        model.add_patch(replace(patch, task=f"task{number}", pieces=[{"coefficients": moved}]))
    images = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))[:8]
    tasks = [f"task{number % 4}" for number in range(8)]
    together = model.predict(images, tasks=tasks)
    for image, task, found in zip(images, tasks, together, strict=True):
        (alone,) = model.predict(image, task)
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    assert len({found.probability for found in model.predict([images[0]] * 4, tasks=tasks[:4])}) == 4


def test_states_without_a_number_are_packed():
    """As of a task of LIFT that has changed nothing."""
    module, _ = trained("recast-vit", 0)
    network = MixedBatch(module.backbone, module.pieces)
    states = [{"indices": torch.zeros(0, dtype=torch.int32), "values": torch.zeros(0, dtype=torch.float16)}]
    (found,) = network._unpack([network.pack(states)] * 2)
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        "indices": ((2, 0), torch.int32),
        "values": ((2, 0), torch.float16),
    }
