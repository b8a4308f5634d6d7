"""The command `imagenet` on real images, and on a real network with its own ImageNet head."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from conftest import ROOT, TINY_VIT
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from recast_pl import BackboneConfig, BankLayout, decompose
from recast_pl.backbones.lite0 import _lite0_weights
from recast_pl.cli import main

LITE0 = ["--backbone.name", "recast_pl.backbones.efficientnet_lite0", "--layout.targets", r'["conv_pwl?\\.weight"]']


def compare(images, output, *words):
    assert main(["imagenet", *LITE0, "--images", str(images), "--output", str(output), *words]) == 0
    return json.loads((output / "imagenet.json").read_text())


@pytest.fixture(scope="module")
def predicted():
    """The class that timm's own network and preprocessing predict for each of some clip-art images."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    net.load_state_dict(_lite0_weights(net))
    net.eval()
    transform = create_transform(**resolve_model_data_config(net))
    paths = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))[::23]
    with torch.inference_mode():
        return {path: int(net(transform(Image.open(path).convert("RGB"))[None]).argmax()) for path in paths}


def test_accuracies_equal_those_of_timms_own_network(predicted, tmp_path, capsys):
    folder = tmp_path / "in" / "val"
    for label in range(1000):
        (folder / f"n{label:08d}").mkdir(parents=True)
    for number, (path, label) in enumerate(predicted.items()):
        given = label if number else (label + 1) % 1000  # the first image has a wrong label
        shutil.copy(path, folder / f"n{given:08d}" / f"{number}.jpg")
    facts = compare(tmp_path / "in", tmp_path / "out", "--batch_size", "4")
    right = 100 * (len(predicted) - 1) / len(predicted)
    assert facts["images"] == len(predicted) > 5
    assert facts["dense_accuracy"] == facts["decomposed_accuracy"] == pytest.approx(right)
    assert facts["agreement"] == 100
    assert facts["weight_cosine"] == pytest.approx(1, abs=1e-6)
    assert facts["feature_similarity"] == pytest.approx(1, abs=1e-6)
    assert "dense_accuracy" in capsys.readouterr().out


def test_a_lossy_decomposition_lowers_agreement_and_similarity(predicted, tmp_path):
    for number, path in enumerate(predicted):
        (tmp_path / "in" / "food").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "in" / "food" / f"{number}.jpg")
    facts = compare(tmp_path / "in", tmp_path / "out", "--layout.templates", "1")
    assert facts["dense_accuracy"] is None  # one class instead of the network's thousand
    assert facts["agreement"] < 50
    assert 0.1 < facts["weight_cosine"] < 0.9
    assert facts["feature_similarity"] < 0.9
    assert facts["feature_similarity"] != facts["weight_cosine"]


def test_missing_images_and_conflicting_options_are_one_line(tmp_path, capsys):
    words = ["imagenet", *LITE0, "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "holds no image" in capsys.readouterr().err
    assert main([*words, "--decomposition", "there.safetensors"]) == 2
    assert "both of --layout and --decomposition" in capsys.readouterr().err


TABLE_6 = {path.stem: path for path in sorted((ROOT / "configs" / "paper" / "table6").glob("*.yaml"))}


@pytest.mark.parametrize("name", TABLE_6)
def test_every_row_of_table_6_runs_on_a_small_network(name, predicted, tmp_path):
    (tmp_path / "in" / "val" / "food").mkdir(parents=True)
    for number, path in enumerate(list(predicted)[:2]):
        shutil.copy(path, tmp_path / "in" / "val" / "food" / f"{number}.jpg")
    config = yaml.safe_load(TABLE_6[name].read_text())
    depth = 24 if "large" in name else 12
    options = {"backbone.weights": "random", "images": tmp_path / "in", "output": tmp_path / "out"}
    if name != "resnet34":
        options["backbone.args"] = json.dumps(TINY_VIT | {"depth": depth})
    if "decomposition" in config:
        layout = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=1, coefficient_sets=2)
        network = BackboneConfig(config["backbone"]["name"], "random", json.loads(options["backbone.args"])).build(32)
        decompose(network.net, layout).save(tmp_path / "d.safetensors")
        options["decomposition"] = tmp_path / "d.safetensors"
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    assert main(["imagenet", "--config", f"paper/table6/{name}.yaml", *words]) == 0
    facts = json.loads((tmp_path / "out" / "imagenet.json").read_text())
    assert facts["images"] == 2
    assert facts["dense_accuracy"] is None  # one class
    exact = "vae" not in name
    assert (facts["agreement"] is None) == (name == "dino_small")  # its weights have no classifier
    assert facts["agreement"] in (None, 100) or not exact
    assert (facts["weight_cosine"] > 0.99999) == (facts["feature_similarity"] > 0.99999) == exact


def test_the_rows_of_table_6_have_the_papers_layouts():
    layouts = {name: yaml.safe_load(path.read_text()).get("layout") for name, path in TABLE_6.items()}
    assert len(layouts) == 9
    groups = {name: layout.get("groups") for name, layout in layouts.items() if layout}
    six = dict.fromkeys(["vit_small", "vit_small_attention", "vit_small_mlp", "vit_base", "dino_small"], 6)
    assert groups == six | {"vit_large": 12, "resnet34": None}
    assert {layout["coefficient_sets"] for layout in layouts.values() if layout} == {2}


def test_the_feature_similarity_is_that_of_blocks_in_both_networks(predicted, tmp_path):
    (tmp_path / "in" / "food").mkdir(parents=True)
    shutil.copy(next(iter(predicted)), tmp_path / "in" / "food" / "0.jpg")
    network = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT)
    torch.manual_seed(1)
    timm_net = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **TINY_VIT).eval()
    torch.save(timm_net.state_dict(), tmp_path / "vit.pth")
    words = ["imagenet", "--backbone.name", network.name, "--backbone.weights", str(tmp_path / "vit.pth")]
    words += ["--backbone.args", json.dumps(TINY_VIT), "--images", str(tmp_path / "in"), "--output", str(tmp_path)]
    assert main([*words, "--layout.targets", r'["mlp\\.fc1\\.weight"]', "--layout.templates", "1"]) == 0
    facts = json.loads((tmp_path / "imagenet.json").read_text())
    image = create_transform(**resolve_model_data_config(timm_net))(Image.open(next(iter(predicted))).convert("RGB"))
    layout = BankLayout([r"mlp\.fc1\.weight"], templates=1)
    generated = decompose(timm_net, layout).reconstruct()
    dense = blocks_of(timm_net, image)
    kept = timm_net.state_dict()
    weights = [cosine_of(weight, kept[name]) for name, weight in generated.items()]
    timm_net.load_state_dict(kept | generated)
    features = [cosine_of(a, b) for a, b in zip(dense, blocks_of(timm_net, image), strict=True)]
    assert len(features) == TINY_VIT.get("depth", 12)
    assert facts["feature_similarity"] == pytest.approx(sum(features) / len(features), abs=1e-5)
    assert facts["weight_cosine"] == pytest.approx(sum(weights) / len(weights), abs=1e-5)


@torch.no_grad()
def blocks_of(net, image):
    """The output of each block of a vision transformer of timm, computed without hooks."""
    x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(image[None]))))
    return [x := block(x) for block in net.blocks]


def cosine_of(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("name", ["torchvision/resnet18", "vit_tiny_patch16_224"])
def test_other_classifiers_use_their_own_head_and_preprocessing(name, predicted, tmp_path):
    (tmp_path / "in" / "food").mkdir(parents=True)
    shutil.copy(next(iter(predicted)), tmp_path / "in" / "food" / "0.jpg")
    words = ["imagenet", "--backbone.name", name, "--backbone.weights", "random", "--images", str(tmp_path / "in")]
    targets = r'["mlp\\.fc1\\.weight"]' if "vit" in name else r'["layer1\\.\\d\\.conv[12]\\.weight"]'
    assert main([*words, "--layout.targets", targets, "--output", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "imagenet.json").read_text())
    assert (facts["images"], facts["agreement"]) == (1, 100)
    assert facts["feature_similarity"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_predictions_are_equal_on_all_clip_art(tmp_path):
    images = ROOT / "data" / "clipart"
    facts = compare(images, tmp_path / "out", "--batch_size", "8")  # larger batches need too much memory
    assert facts["images"] == len(list(images.rglob("*.jpg")))
    assert facts["agreement"] == 100


def test_images_have_the_size_that_the_network_is_built_for(predicted, tmp_path):
    (tmp_path / "in" / "food").mkdir(parents=True)
    for number, path in enumerate(predicted):
        shutil.copy(path, tmp_path / "in" / "food" / f"{number}.jpg")
    tiny = ["--backbone.name", "vit_tiny_patch16_224", "--backbone.weights", "random"]
    size = ["--backbone.args", json.dumps({**TINY_VIT, "img_size": 32})]
    words = [*tiny, *size, "--layout.targets", '["fc1"]', "--images", str(tmp_path / "in"), "--output", str(tmp_path)]
    assert main(["imagenet", *words]) == 0
    assert json.loads((tmp_path / "imagenet.json").read_text())["agreement"] == 100
