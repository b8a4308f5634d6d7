"""Images that are not square: from the options of `fit` to predictions, the server and exported models."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import RESNET, ROOT, TINY_VIT, clipart_words
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from starlette.testclient import TestClient

import recast_pl
from recast_pl import SequentialTaskDataModule, TaskConfig, TaskPatch
from recast_pl.cli import main
from recast_pl.data.images import decode_file
from recast_pl.errors import DataError
from recast_pl.inference.server.app import create_app

PICTURES = [str(path) for path in sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[:3]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny ViT that is trained on images of 32×48 pixels."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    words = [
        *("--config", "vit.yaml", "--model.backbone.name", "vit_tiny_patch16_224"),
        *("--model.backbone.weights", "random", "--model.backbone.args", json.dumps(TINY_VIT)),
    ]
    assert main([*clipart_words(words, folder, names=("signs",)), "--data.image_size", "[32, 48]"]) == 0
    return folder


def pixels(path, height, width):
    """An image (3, height, width) in [0, 1], whose largest centred part of that shape is resized."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_an_image_is_cropped_to_the_shape(tmp_path):
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40] = 255  # a white bar across, of which a crop to 1:3 has nothing but white
    Image.fromarray(image).save(tmp_path / "bar.png")
    wide = decode_file(tmp_path / "bar.png", (10, 30))
    assert wide.shape == (3, 10, 30)
    assert wide.min() > 200
    tall = decode_file(tmp_path / "bar.png", (30, 10))
    assert tall.shape == (3, 30, 10)
    assert tall[:, 0].max() < 50


def test_a_run_tests_and_predicts_what_it_was_trained_on(run, capsys, tmp_path):
    assert main(["test", "--run_dir", str(run)]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out
    patch = run / "patches" / "00_signs.safetensors"
    assert TaskPatch.load(patch).image_size == (32, 48)
    assert main(["patch", "show", str(patch)]) == 0
    assert "32×48" in capsys.readouterr().out
    assert main(["patch", "verify", str(patch), "--run_dir", str(run)]) == 0
    assert main(["patch", "average", str(patch), str(patch), "--output", str(tmp_path / "mean")]) == 0
    assert TaskPatch.load(tmp_path / "mean").image_size == (32, 48)


def test_the_library_the_server_and_an_exported_model_agree(run, capsys):
    model = recast_pl.load(run)
    found = model.predict(PICTURES, "signs")
    assert model.image_size("signs") == (32, 48)
    with TestClient(create_app(model, hosts=["*"])) as client:
        for path, prediction in zip(PICTURES, found, strict=True):
            with open(path, "rb") as file:
                answer = client.post("/predict", data={"task": "signs"}, files={"image": file}).json()
            assert answer["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
    assert main(["export", "--run_dir", str(run), "--task", "signs", "--format", "safetensors"]) == 0
    assert "img_size=(32, 48)" in capsys.readouterr().out
    file = run / "export" / "signs.safetensors"
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["recast_pl"])
    assert facts["preprocessing"]["resize"] == {"height": 32, "width": 48}
    assert facts["arguments"]["img_size"] == [32, 48]
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(32, 48), **TINY_VIT).eval()
    plain.load_state_dict(load_file(file))
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    images = torch.stack([pixels(path, 32, 48) for path in PICTURES])
    with torch.no_grad():
        probabilities = plain((images - mean) / std).softmax(1)
    expected = [list(prediction.probabilities.values()) for prediction in found]
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_a_patch_of_another_shape_is_refused_by_a_network_that_does_not_take_it(run):
    patch = TaskPatch.load(run / "patches" / "00_signs.safetensors")
    model = recast_pl.load(run)
    other = type(patch)(**{**vars(patch), "task": "tall", "image_size": (48, 32)})
    with pytest.raises(recast_pl.errors.PatchError, match="does not take 48×32 images"):
        model.add_patch(other)


def test_a_convolutional_network_takes_any_shape(tmp_path):
    words = clipart_words(RESNET, tmp_path / "run", names=("signs",))
    assert main([*words, "--data.image_size", "[64, 32]", "--data.cache", "off"]) == 0
    assert main(["predict", "--run_dir", str(tmp_path / "run"), "--task", "signs", "--images", *PICTURES]) == 0


@pytest.mark.parametrize("mode", ["disk", "ram", "off"])
def test_all_caches_hold_the_same_images(mode, image_folder):
    tasks = [TaskConfig("colours", str(image_folder("colours")))]
    data = SequentialTaskDataModule(tasks, image_size=(16, 24), batch_size=4, num_workers=0, cache=mode)
    data.prepare_data()
    data.select(0)
    images, _ = data.on_after_batch_transfer(next(iter(data.plain_dataloader("test"))), 0)
    assert images.shape[1:] == (3, 16, 24)
    tall = SequentialTaskDataModule(tasks, image_size=(24, 16), batch_size=4, num_workers=0, cache=mode)
    tall.prepare_data()
    tall.select(0)
    assert next(iter(tall.plain_dataloader("test")))[0].shape[1:] == (3, 24, 16)


def test_equal_sides_are_one_number():
    assert SequentialTaskDataModule(image_size=(32, 32)).image_size == 32
    assert SequentialTaskDataModule(image_size=[32, 48]).image_size == (32, 48)


@pytest.mark.parametrize("size", [(32,), (32, 0), (32, 3000), (1, 2, 3), 3000, True, "32"])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(DataError, match="must be 1 to 2048 pixels: one number, or height and width"):
        SequentialTaskDataModule(image_size=size)


@pytest.mark.parametrize("size", ["[32]", "[32, 0]", "32x48", "[a, b]"])
def test_impossible_sizes_are_refused_by_fit(size, tiny_fit, capsys):
    assert main(tiny_fit("--data.image_size", size)) == 2
    assert "image_size" in capsys.readouterr().err
