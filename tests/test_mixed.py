"""Batches of many tasks: whichever way is taken, each image gets what its task alone would say of it."""

from dataclasses import replace

import pytest
import timm
import torch
from conftest import ROOT
from test_all_methods import ISOLATED, RESNET, VIT
from timm.layers import StdConv2d
from torch import nn
from torchvision.models import VisionTransformer

from recast_pl import BackboneConfig, BankLayout, Piece, Predictor, Recast, RoSA, Scale, TILModule
from recast_pl.inference.mixed import Cost, MixedTasks, Survey
from recast_pl.inference.states import TaskStates

COUNTS = [2, 1, 3]
APART = {"piggyback-vit", "piggyback-resnet", "recast+piggyback-resnet", "finetune-vit", "finetune-resnet"}
"""Methods of which a task is more than a few numbers for each layer."""


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
    "strided": lambda: (RESNET, [Recast(BankLayout([r"layer\d\.0\.conv1\.weight"])), RoSA(0.003, 1)]),
}
METHODS = {**ISOLATED, **FURTHER}
QUICK = {
    *("recast-vit", "recast-resnet", "rosa-vit", "adaptformer-vit", "clr-resnet", "piggyback-vit"),
    *FURTHER.keys() - {"same-padding", "strided"},
}
NO_PRODUCTS = {  # at any layer
    *("probe-vit", "probe-resnet", "dora-vit", "dora-resnet", "clr-vit", "clr-resnet", "offset"),
    *("recast+dora-mlp-vit", "standardised"),
}


def learnt(name, tasks=3):
    """A module, and states of some tasks that differ in all that is trained."""
    torch.manual_seed(0)
    module = TILModule(*METHODS[name]())
    module.build(32)
    states = TaskStates(len(module.pieces))
    module.begin_task("any", ["a", "b"])
    for _ in range(tasks):
        with torch.no_grad():
            for piece in module.pieces:
                for parameter in piece.parameters.values():
                    parameter.add_(0.3 * parameter.abs().mean().clamp_min(0.03) * torch.randn_like(parameter))
                for sparse in piece.adaptations.values() if isinstance(piece, RoSA) else ():
                    sparse.indices = torch.randperm(sparse.size)[: len(sparse.indices)].sort().values
                    sparse.chosen = True
        states.add([piece.task_state() for piece in module.pieces])
    return module.eval(), states


def alone(module, states, images):
    """Features by the network's own forward pass, task after task, with nothing merged."""
    parts = []
    for row, part in enumerate(images.split(COUNTS)):
        for piece, state in zip(module.pieces, states.of(row), strict=True):
            piece.load_task_state(state)
        parts.append(module.backbone(part))
    return torch.cat(parts)


def marked(names):
    """All are tried, those that say something new without being asked."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(METHODS))
@torch.no_grad()
def test_every_way_gives_each_image_what_its_task_alone_would(name):
    module, states = learnt(name)
    images, rows = torch.rand(sum(COUNTS), 3, 32, 32), range(len(COUNTS))
    wanted = alone(module, states, images)
    if name not in ("probe-vit", "probe-resnet"):
        other = alone(module, states, images.roll(1, 0)).roll(-1, 0)  # images of which some are by another task
        assert (other - wanted).abs().max() > 1e-3
    mixed = MixedTasks(module.backbone, module.pieces, states)
    torch.testing.assert_close(mixed.apart(images, rows, COUNTS), wanted, atol=1e-5, rtol=1e-5)
    ways = mixed.choose(images, rows)
    survey = next(iter(mixed._surveys.values()), None)
    assert survey is not None or ways is None
    torch.testing.assert_close(mixed.features(images, rows, COUNTS), wanted, atol=1e-5, rtol=1e-5)
    assert (survey is None) == (name in APART | {"own-loading", "windows"})
    if survey is None:
        return
    before, products = {key: value.clone() for key, value in module.state_dict().items()}, 0
    for wish in ("weights", "products"):
        ways = {site: wish if wish in costs else "weights" for site, costs in survey.layers.items()}
        products += list(ways.values()).count("products")
        found = mixed.together(images, rows, COUNTS, ways)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (products == 0) == (name in NO_PRODUCTS)
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any("forward" in vars(part) for part in module.backbone.modules())


def test_the_least_cost_is_chosen():
    layers = {
        "cheap to generate": {"weights": Cost(1, 1), "products": Cost(0, 2)},
        "generated only": {"weights": Cost(1, 1)},
    }
    survey = Survey(layers, rest=Cost(each=3, image=1), apart=Cost(each=10, image=2.5))
    few = survey.choose(tasks=2, images=8)  # 11 + (2 + 8) + (2 + 8), beside 20 + 20
    assert few == {"cheap to generate": "weights", "generated only": "weights"}
    assert survey.choose(tasks=12, images=8)["cheap to generate"] == "products"  # 16, beside 12 + 8
    assert survey.choose(tasks=1, images=200) is None  # 203 + 201 + 201, beside 10 + 500


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
