"""The command `imagenet` on real images, and on a real network with its own ImageNet head."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from conftest import ROOT
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

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
    assert facts["similarity"] == pytest.approx(1, abs=1e-6)
    assert "dense_accuracy" in capsys.readouterr().out


def test_a_lossy_decomposition_lowers_agreement_and_similarity(predicted, tmp_path):
    for number, path in enumerate(predicted):
        (tmp_path / "in" / "food").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "in" / "food" / f"{number}.jpg")
    facts = compare(tmp_path / "in", tmp_path / "out", "--layout.templates", "1")
    assert facts["dense_accuracy"] is None  # one class instead of the network's thousand
    assert facts["agreement"] < 50
    assert facts["similarity"] < 0.9


def test_missing_images_and_conflicting_options_are_one_line(tmp_path, capsys):
    words = ["imagenet", *LITE0, "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "holds no image" in capsys.readouterr().err
    assert main([*words, "--decomposition", "there.safetensors"]) == 2
    assert "both of --layout and --decomposition" in capsys.readouterr().err


def test_the_shipped_config_parses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["imagenet", "--config", "imagenet.yaml", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["layout"]["groups"] == 6
    assert printed["backbone"]["name"] == "vit_small_patch16_224"


@pytest.mark.parametrize("name", ["torchvision/resnet18", "vit_tiny_patch16_224"])
def test_other_classifiers_use_their_own_head_and_preprocessing(name, predicted, tmp_path):
    (tmp_path / "in" / "food").mkdir(parents=True)
    shutil.copy(next(iter(predicted)), tmp_path / "in" / "food" / "0.jpg")
    words = ["imagenet", "--backbone.name", name, "--backbone.weights", "random", "--images", str(tmp_path / "in")]
    targets = r'["mlp\\.fc1\\.weight"]' if "vit" in name else r'["layer1\\.\\d\\.conv[12]\\.weight"]'
    assert main([*words, "--layout.targets", targets, "--output", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "imagenet.json").read_text())
    assert (facts["images"], facts["agreement"]) == (1, 100)
    assert facts["similarity"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_predictions_are_equal_on_all_clip_art(tmp_path):
    images = ROOT / "data" / "clipart"
    facts = compare(images, tmp_path / "out", "--batch_size", "8")  # larger batches need too much memory
    assert facts["images"] == len(list(images.rglob("*.jpg")))
    assert facts["agreement"] == 100
