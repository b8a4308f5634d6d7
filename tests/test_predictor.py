"""Predictions: every kind of image, many threads, tasks that are added and removed."""

import copy
import csv
import dataclasses
import io
import json
import pickle
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VIT
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

import recast_pl
from recast_pl import BackboneConfig, BankLayout, LoRA, Predictor, Recast, TaskPatch, TILModule
from recast_pl.cli import main
from recast_pl.data.images import decode_any
from recast_pl.errors import DataError, PatchError, RecastError, RunError

VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT)
RESNET = BackboneConfig("torchvision/resnet18", "random")
LAYOUT = BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2, coefficient_sets=2)
FOOD = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))[::40]
SIGNS = sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[::40]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks of real images, each trained for one epoch by a tiny network."""
    folder = tmp_path_factory.mktemp("predictor") / "run"
    tasks = [{"name": name, "path": str(ROOT / "data" / "clipart" / name)} for name in ("food", "signs")]
    words = [
        *("fit", "--config", "vit.yaml", "--run_dir", str(folder), "--data.tasks", json.dumps(tasks)),
        *("--model.backbone.name", VIT.name, "--model.backbone.weights", "random"),
        *("--model.backbone.args", json.dumps(TINY_VIT), "--data.image_size", "32", "--data.cache", "off"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
    ]
    assert main(words) == 0
    return folder


@pytest.fixture
def model(run):
    return recast_pl.load(run)


def patches(run):
    return {path.stem[3:]: TaskPatch.load(path) for path in sorted((run / "patches").iterdir())}


def tuned(patch, task, seed):
    """The patch of another task, with other coefficients."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = patch.pieces[0]["coefficients"]
    moved = coefficients + 0.3 * coefficients.abs().mean() * torch.randn(coefficients.shape, generator=generator)
    return dataclasses.replace(patch, task=task, pieces=[{"coefficients": moved}])


def test_predictions_are_those_of_the_module_on_images_resized_by_pillow(run, model, tmp_path):
    torch.manual_seed(42)  # the seed of the run, which gives its random weights again
    module = TILModule(VIT, (Recast(LAYOUT),))
    module.build(32)
    assert model.tasks == ["food", "signs"]
    for patch in patches(run).values():
        module.activate(patch)
        images = [pil_to_tensor(ImageOps.fit(Image.open(p).convert("RGB"), (32, 32), Image.BICUBIC)) for p in FOOD]
        with torch.no_grad():
            wanted = module(torch.stack(images) / 255).softmax(1)  # (B, classes)
        found = model.predict(FOOD, task=patch.task)
        assert model.classes(patch.task) == patch.classes == list(found[0].probabilities)
        torch.testing.assert_close(torch.tensor([list(f.probabilities.values()) for f in found]), wanted)
        assert [f.label for f in found] == [patch.classes[i] for i in wanted.argmax(1)]
        assert all(f.task == patch.task and f.probability == f.probabilities[f.label] for f in found)
        output = tmp_path / "labels.csv"
        words = ["predict", "--run_dir", str(run), "--task", patch.task, "--output", str(output)]
        assert main([*words, "--images", *map(str, FOOD)]) == 0
        rows = list(csv.DictReader(output.read_text().splitlines()))
        assert [(row["label"], row["probability"]) for row in rows] == [
            (f.label, f"{f.probability:.6f}") for f in found
        ]


def test_an_image_is_the_same_however_it_is_given(model):
    path = FOOD[1]
    wanted = model.predict(path, "food")
    image = Image.open(path).convert("RGB")
    array, tensor = np.array(image), pil_to_tensor(image)
    for given in (
        *(str(path), image, array, array / 255, (array / 255).astype(np.float32), array[None], tensor, tensor / 255),
        *((tensor / 255).double(), tensor[None], [path], (array,), [image], tensor.float().requires_grad_() / 255),
    ):
        assert model.predict(given, "food") == wanted
    mixed = [FOOD[0], image, array, tensor[:, 3:40]]
    assert len(model.predict(mixed, "food")) == 4
    assert model.predict([], "food") == model.predict([], tasks=[]) == []


def test_the_bytes_of_a_file_are_an_image(model):
    content, wanted = FOOD[1].read_bytes(), model.predict(FOOD[1], "food")
    for given in (content, bytearray(content), memoryview(content), [content]):
        assert model.predict(given, "food") == wanted
    for found in model.predict([content, FOOD[1]], "food"):  # larger products may round otherwise
        assert found.probabilities == pytest.approx(wanted[0].probabilities, abs=1e-6)


def test_arrays_without_channels_are_grey(model):
    grey = Image.open(FOOD[1]).convert("L")
    (wanted,) = model.predict(grey, "food")
    array, tensor = np.array(grey), pil_to_tensor(grey)
    for given in (array, array / 255, array[..., None], tensor, tensor[0], tensor / 255, tensor[0].bfloat16() / 255):
        (found,) = model.predict(given, "food")
        same = 0.1 if getattr(given, "dtype", None) == torch.bfloat16 else 1e-6
        assert found.probabilities == pytest.approx(wanted.probabilities, abs=same)
    for batch in (array[None, ..., None], tensor[None], [array, tensor[0]]):
        assert {p.label for p in model.predict(batch, "food")} == {wanted.label}


def test_what_cannot_be_sent_to_another_process_says_what_to_do(run, model):
    (prediction,) = model.predict(FOOD[0], "food")
    patch = patches(run)["food"]
    assert pickle.loads(pickle.dumps(prediction)) == prediction
    assert pickle.loads(pickle.dumps(patch)).to_bytes() == patch.to_bytes()
    assert str(pickle.loads(pickle.dumps(PatchError("text")))) == "text"
    for send in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(RunError, match=r"cannot be copied or sent to another process; call recast_pl\.load there"):
            send(model)


def test_probabilities_that_are_not_finite_are_an_error_of_their_task(run, model):
    model.add_patch(tuned(patches(run)["food"], "bad", 1))
    bad = model._tasks["bad"]
    for value in (torch.inf, torch.nan):
        model._tasks["bad"] = dataclasses.replace(bad, weight=torch.full_like(bad.weight, value))
        for words in ({"task": "bad"}, {"tasks": ["bad", "food"]}):
            with pytest.raises(PatchError, match="task 'bad' gives probabilities that are not finite; train it again"):
                model.predict(FOOD[:2], **words)
    assert model.predict(FOOD[:2], "food")


def test_each_image_gets_its_own_task_in_the_order_given(model):
    tasks = ["signs", "food", "signs", "food", "signs"]
    found = model.predict(SIGNS[:5], tasks=tasks)
    for image, task, prediction in zip(SIGNS, tasks, found, strict=False):
        (alone,) = model.predict(image, task)
        assert prediction.task == task
        assert prediction.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_decoded_images_of_any_tasks_and_sizes_keep_their_order(model):
    tasks = ["signs", "food"] * 40  # more than one batch
    images = torch.stack([decode_any((FOOD + SIGNS)[i % 6], 32) for i in range(80)])
    found = model.predict_tensors(images, tasks)
    for image, task, prediction in zip(images, tasks, found, strict=True):
        assert prediction.task == task
        assert prediction.probabilities == pytest.approx(model.predict(image, task)[0].probabilities, abs=1e-5)
    assert model.predict_tensors([], []) == []


def test_decoded_images_of_another_type_or_shape_are_refused(model):
    for image in (torch.zeros(3, 32, 32), torch.zeros(3, 33, 32, dtype=torch.uint8)):
        with pytest.raises(DataError, match=r"task 'food' needs uint8 \(3, 32, 32\)"):
            model.predict_tensors([image], ["food"])
    with pytest.raises(DataError, match="1 images and 2 tasks"):
        model.predict_tensors(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["food", "food"])


def test_tasks_of_several_image_sizes_share_a_predictor():
    torch.manual_seed(0)
    module = TILModule(RESNET, (LoRA(),))
    module.build(32)
    module.begin_task("small", ["a", "b"])
    small, model = module.patch({}), Predictor(module)
    model.add_patch(small)
    model.add_patch(dataclasses.replace(small, task="large", image_size=48))
    tasks = ["small", "large"] * 3
    found = model.predict(FOOD[:6], tasks=tasks)
    alone = [model.predict(image, task)[0] for image, task in zip(FOOD[:6], tasks, strict=True)]
    for mixed, single in zip(found, alone, strict=True):
        assert mixed.task == single.task
        assert mixed.probabilities == pytest.approx(single.probabilities, abs=1e-5)
    assert alone[0].probabilities != model.predict(FOOD[0], "large")[0].probabilities


WRONG = {
    "None": (lambda: None, "an image cannot be a NoneType"),
    "missing": (lambda: "nowhere.jpg", "'nowhere.jpg'"),
    "four channels": (lambda: np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\) was given where an array \(H, W, 3\)"),
    "two channels": (lambda: torch.zeros(2, 8, 8), r"a tensor \(3, H, W\) or, if grey, \(H, W\) is needed; convert it"),
    "line": (lambda: np.zeros(8), r"shape \(8,\)"),
    "empty grey": (lambda: np.zeros((0, 8)), r"shape \(0, 8\)"),
    "bytes": (lambda: b"text", "cannot read image '4 bytes'"),
    "no bytes": (lambda: b"", "cannot read image '0 bytes'"),
    "stream": (io.BytesIO, "cannot be a BytesIO; give a path, the bytes of an image file"),
    "channels-last": (lambda: torch.zeros(8, 9, 3), r"shape \(8, 9, 3\) was given where a tensor \(3, H, W\)"),
    "channels-first": (lambda: np.zeros((3, 8, 9)), r"shape \(3, 8, 9\) was given where an array \(H, W, 3\)"),
    "empty": (lambda: np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
    "range": (lambda: torch.full((3, 8, 8), 255.0), r"values from 255 to 255; bring them into \[0, 1\]"),
    "nan": (lambda: torch.full((3, 8, 8), torch.nan), "values from nan"),
    "integers": (lambda: np.zeros((8, 8, 3), np.int64), "an image of int64 was given where uint8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_for_a_wrong_image_says_what_it_is(model, name):
    make, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        model.predict([FOOD[0], make()], "food")


def test_tasks_that_do_not_fit_are_refused(model):
    with pytest.raises(RunError, match="no task is named 'fool'; the tasks are food, signs"):
        model.predict("nowhere.jpg", "fool")
    with pytest.raises(DataError, match="either task=NAME"):
        model.predict(FOOD[0], task="food", tasks=["food"])
    for tasks in (["food"], "fo"):
        with pytest.raises(DataError, match="for 2 images"):
            model.predict(FOOD[:2], tasks=tasks)


def test_a_patch_is_added_and_removed(run, model, tmp_path):
    food = patches(run)["food"]
    before = model.predict(FOOD, "food")
    first, second = (tuned(food, f"food{seed}", seed) for seed in (1, 2))
    first.save(tmp_path / "any.safetensors")
    assert model.add_patch(tmp_path / "any.safetensors") == "food1"
    assert model.add_patch(second) == "food2"
    assert model.tasks == ["food", "signs", "food1", "food2"]
    of_first, of_second = model.predict(FOOD, "food1"), model.predict(FOOD, "food2")
    assert of_first[0].probabilities != of_second[0].probabilities != before[0].probabilities
    model.remove("food1")
    assert model.tasks == ["food", "signs", "food2"]
    with pytest.raises(RunError, match="no task is named 'food1'"):
        model.remove("food1")
    model.add_patch(tuned(food, "food3", 3))  # after one was removed
    model.add_patch(first)
    assert model.predict(FOOD, "food") == before
    assert model.predict(FOOD, "food1") == of_first
    assert model.predict(FOOD, "food2") == of_second


REFUSED = {
    "name": (lambda p: {"task": "signs"}, "there is a task 'signs' already"),
    "base": (lambda p: {"base": "0" * 64}, "belongs to base 000000000000"),
    "method": (lambda p: {"method": ["LoRA"]}, r"is of method \['LoRA'\], not \['Recast'\]"),
    "head": (lambda p: {"classes": p.classes[1:]}, "the head has"),
    "shape": (lambda p: {"pieces": [{"coefficients": torch.zeros(7)}]}, r"coefficients': \(7,\)"),
    "nan": (lambda p: {"pieces": [{"coefficients": torch.full((48,), torch.nan)}]}, "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_patch_that_does_not_belong_is_refused_and_nothing_changes(run, model, name):
    change, message = REFUSED[name]
    food = dataclasses.replace(patches(run)["food"], task="more")
    before = [model.predict(SIGNS, task) for task in model.tasks]
    with pytest.raises(PatchError, match=message):
        model.add_patch(dataclasses.replace(food, **change(food)))
    assert model.tasks == ["food", "signs"]
    assert [model.predict(SIGNS, task) for task in model.tasks] == before
    assert model.add_patch(food) == "more"


def test_a_patch_in_double_precision_gives_the_same_predictions(run, model):
    food = patches(run)["food"]
    double = {name: tensor.double() for name, tensor in food.tensors.items()}
    for name in ("one", "two"):
        model.add_patch(dataclasses.replace(food.with_tensors(double), task=name))
    found = model.predict(FOOD, tasks=[("one", "two", "food")[i % 3] for i in range(len(FOOD))])
    assert [f.probabilities for f in found] == [
        pytest.approx(f.probabilities, abs=1e-5) for f in model.predict(FOOD, "food")
    ]


def test_threads_predict_while_tasks_come_and_go(run, model):
    other, food = recast_pl.load(run), patches(run)["food"]
    jobs = [(task, image) for task in model.tasks for image in (*FOOD, *SIGNS)]
    wanted = [model.predict(image, task) for task, image in jobs]
    done = threading.Event()

    def churn():
        count = 0
        while not done.is_set():
            model.add_patch(tuned(food, f"extra{count}", count))
            if count > 2:
                model.remove(f"extra{count - 2}")
            count += 1
        return count

    with ThreadPoolExecutor(9) as pool:
        churning = pool.submit(churn)
        try:
            for which in (model, other, model):  # two predictors of one process share torch's cache of weights
                found = list(pool.map(lambda job, which=which: which.predict(job[1], job[0]), jobs))
                assert found == wanted
        finally:
            done.set()
        assert churning.result() > 3


def test_two_thousand_tasks_take_less_than_two_megabytes(run, model):
    food = patches(run)["food"]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(2_000):
        model.add_patch(dataclasses.replace(food, task=f"food{number}"))  # with the head and classes of `food`
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 2_000 * 48 * 4 < grown < 2e6
    assert len(model.tasks) == 2_002
    first, last = model.predict(SIGNS[0], "food0"), model.predict(SIGNS[0], "food1999")
    assert first[0].probabilities == last[0].probabilities == model.predict(SIGNS[0], "food")[0].probabilities


def test_weights_that_tasks_share_are_restored(tiny_fit, tmp_path):
    words = ("--config", "methods/derpp.yaml", "--trainer.max_epochs", "1")
    assert main(tiny_fit(*words)) == 0
    model = recast_pl.load(tmp_path / "run")
    images = sorted((tmp_path / "first").rglob("*.png"))
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    trained = patches(tmp_path / "run")
    module = model._module
    for name, patch in trained.items():
        module.activate(patch)
        with torch.no_grad():
            batch = torch.stack([pil_to_tensor(Image.open(path)) for path in images]) / 255
            wanted = module(batch).softmax(1)
        found = model.predict(images, name)
        torch.testing.assert_close(torch.tensor([list(f.probabilities.values()) for f in found]), wanted)
    with pytest.raises(PatchError, match=r"FineTune.* share weights, which the patch of 'more' does not hold"):
        model.add_patch(dataclasses.replace(trained["first"], task="more"))


def test_without_jsonargparse_the_module_is_given(run, model, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("recast_pl.config.run")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(RunError, match=r"needs jsonargparse; install it .* or call load with module=TILModule"):
        recast_pl.load(run)
    torch.manual_seed(42)
    given = recast_pl.load(run, module=TILModule(VIT, (Recast(LAYOUT),)), device="cpu")
    assert given.predict(FOOD, "signs") == model.predict(FOOD, "signs")
    torch.manual_seed(42)
    with pytest.raises(RecastError, match="belongs to base"):
        recast_pl.load(run, module=TILModule(VIT, (LoRA(),)))


def test_loading_leaves_the_callers_random_numbers_alone(run):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    recast_pl.load(run)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_a_folder_without_tasks_and_a_module_without_a_backbone_are_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        recast_pl.load(tmp_path)
    with pytest.raises(RunError, match="holds no trained task"):
        recast_pl.load(tmp_path, module=TILModule(VIT, (Recast(LAYOUT),)))
    with pytest.raises(RunError, match="no backbone yet"):
        Predictor(TILModule(VIT, (Recast(LAYOUT),)))
