"""Exported tasks in other programs: timm, torchvision, ONNX Runtime, torch.export."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import timm
import torch
import torchvision
from conftest import RANDOM, RESNET, ROOT, TINY_VIT, learn
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from test_mixed import trained
from torch import nn

from recast_pl import TILModule
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.data.images import FileDataset
from recast_pl.errors import ExportError
from recast_pl.inference.export.bank import export_bank
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder

PICTURES = sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[:5]


def export(run, *words):
    return main(["export", "--run_dir", str(run), *words])


def expected(run, task, size=32):
    """Real images (5, 3, S, S), and the run's own logits for them."""
    files = FileDataset(PICTURES, size)
    images = torch.stack([files[index][0] for index in range(len(files))])
    module = open_run(str(run))[1].model
    patch = RunFolder(run).load_patches()[task]
    restore(module, RunFolder(run), patch.image_size)
    module.activate(patch)
    with torch.no_grad():
        return images, module.eval()(images)


def facts_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["recast_pl"])


def check_preprocessing(facts, size=32):
    told = facts["preprocessing"]
    assert told["colour"] == "RGB"
    assert told["crop"] == "the largest centred square"
    assert told["resize"] == {"height": size, "width": size}
    assert told["interpolation"] == "bicubic, antialiased, rounded to 8 bits"
    assert told["range"] == [0, 1]
    assert told["layout"] == ["batch", "channel", "height", "width"]


@pytest.mark.parametrize(("width", "height"), [(50, 37), (37, 50), (200, 101), (24, 31)])
def test_what_the_metadata_says_gives_the_pixels_of_the_program(width, height, tmp_path):
    """Whoever follows `check_preprocessing` with Pillow alone gets the program's own pixels."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in (height, width))
    square = (left, top, left + side, top + side)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "image.png")).convert("RGB")
    pixels = np.array(upright.resize((32, 32), Image.Resampling.BICUBIC, square)).transpose(2, 0, 1)
    found, _ = FileDataset([tmp_path / "image.png"], 32)[0]
    np.testing.assert_allclose(found, pixels / np.float32(255), atol=1.1 / 255)


def check_graph(facts, size=32):
    """A graph normalises images itself, so its metadata must not say that the caller should."""
    facts = {name: json.loads(facts[name]) if name in ("preprocessing", "format") else facts[name] for name in facts}
    assert facts["preprocessing"]["normalisation"] == "none: it is inside the graph"
    assert not {"mean", "std"} & facts.keys()
    check_preprocessing(facts, size)


def normalised(images, facts):
    assert facts["preprocessing"]["normalisation"] == "(image - mean) / std for each channel"
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


def check_plain(run, task, plain, size=32):
    """A plain model loads a file strictly, and computes the same logits as the run."""
    file = run / "export" / f"{task}.safetensors"
    facts = facts_of(file)
    assert facts["classes"] == sorted(path.name for path in (ROOT / "data/clipart" / task).iterdir() if path.is_dir())
    assert (facts["task"], facts["image_size"]) == (task, size)
    check_preprocessing(facts, size)
    plain.load_state_dict(load_file(file), strict=True)
    images, logits = expected(run, task, size)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(normalised(images, facts)), logits, atol=1e-4, rtol=1e-5)


def check_onnx(run, file, task, size=32, **feed):
    """ONNX Runtime computes the same logits as the run, for any number of images."""
    session = onnxruntime.InferenceSession(file)
    images, logits = expected(run, task, size)
    for count in (1, 5):
        (found,) = session.run(["logits"], {"images": images[:count].numpy(), **feed})
        np.testing.assert_allclose(found, logits[:count], atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    check_graph(told, size)
    return told


def check_program(run, file, task, size=32):
    """An exported program computes the same logits as the run, for any number of images."""
    told = {"recast_pl.json": ""}
    program = torch.export.load(file, extra_files=told)
    images, logits = expected(run, task, size)
    for count in (1, 5):
        torch.testing.assert_close(program.module()(images[:count]), logits[:count], atol=1e-4, rtol=1e-5)
    facts = json.loads(told["recast_pl.json"])
    assert facts["task"] == task
    assert "mean" not in facts
    assert facts["preprocessing"]["normalisation"] == "none: it is inside the graph"


def check_bank(run, file, size=32):
    """One file serves two tasks."""
    sizes = []
    for task, classes in (("signs", 5), ("people", 4)):
        feed = file.with_suffix(f".{task}.safetensors")
        tensors = safetensors.numpy.load_file(feed)
        check_onnx(run, file, task, size, **tensors)
        sizes.append(tensors["numbers"].nbytes)
        assert len(facts_of(feed)["classes"]) == len(tensors["bias"]) == classes
    return sizes


@pytest.fixture
def run(clipart_run):
    return clipart_run


def test_torchvision_loads_the_weights_strictly(run, capsys):
    assert export(run, "--task", "people", "--format", "safetensors") == 0
    check_plain(run, "people", torchvision.models.resnet18(num_classes=4))
    assert "torchvision.models.get_model(name='resnet18', num_classes=4)" in capsys.readouterr().out


def test_timm_loads_weights_that_several_pieces_have_changed(tmp_path):
    tiny = json.dumps(TINY_VIT)
    vit = ["--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.args", tiny, *RANDOM]
    run = learn(["--config", "vit.yaml", "--config", "methods/recast_dora.yaml", *vit], tmp_path / "run")
    assert export(run, "--task", "signs", "--format", "safetensors") == 0
    check_plain(run, "signs", timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, **TINY_VIT))


@pytest.mark.slow
def test_an_exported_program_takes_any_number_of_images(run):
    assert export(run, "--task", "people", "--format", "torch_export") == 0
    file = run / "export" / "people.pt2"
    check_program(run, file, "people")
    dense = sum(tensor.numel() for tensor in torchvision.models.resnet18().state_dict().values())
    assert file.stat().st_size < 4.1 * dense  # neither templates nor coefficients are in it


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_as_pytorch(run, tmp_path):
    file = tmp_path / "signs.onnx"
    assert export(run, "--task", "signs", "--format", "onnx", "--output", str(file)) == 0
    told = check_onnx(run, file, "signs")
    assert len(json.loads(told["classes"])) == 5
    assert told["task"] == "signs"
    onnx.checker.check_model(onnx.load(file), full_check=True)


def test_one_onnx_file_serves_all_tasks(run, tmp_path, capsys):
    file = tmp_path / "all.onnx"
    assert export(run, "--format", "onnx_bank", "--output", str(file)) == 0
    measured = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fp32"])
    assert measured[1] == f"{file.stat().st_size:,}"
    tasks = json.loads((run / "summary.json").read_text())["tasks"]
    assert float(measured[3]) == pytest.approx(sum(task["accuracy"] for task in tasks) / 2, abs=0.01)
    assert facts_of(tmp_path / "all_router.safetensors")["tasks"] == ["signs", "people"]
    trained = json.loads((run / "summary.json").read_text())["tasks"][0]["task_parameters"]
    assert check_bank(run, file) == [4 * trained / 2] * 2  # two sets are trained; the graph takes their mean


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "onnx"], ["neither of --task", "signs, people"]),
        (["--task", "dogs", "--format", "onnx"], ["'dogs'", "signs, people"]),
        (["--task", "signs", "--format", "gguf"], ["gguf"]),
        (["--task", "signs", "--format", "onnx_bank"], ["leave out --task and --patch, or choose onnx"]),
        (["--patch", "p.safetensors", "--format", "onnx_bank"], ["leave out --task and --patch, or choose onnx"]),
        (["--task", "signs", "--format", "safetensors", "--precision", "int8"], ["no --precision", "choose onnx"]),
        (["--format", "onnx_bank", "--opset", "9"], ["--opset 9", "18 to 23"]),
    ],
)
def test_an_impossible_export_is_refused_in_one_line(words, named, run, capsys):
    assert export(run, *words) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named), error


def test_a_method_that_changes_activations_has_no_plain_model(tmp_path, capsys):
    run = learn([*RESNET, "--config", "methods/clr.yaml"], tmp_path / "run")
    assert export(run, "--task", "signs", "--format", "safetensors") == 2
    assert "changes more than weights" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_a_custom_hook_is_found_by_comparing_logits(run, monkeypatch, capsys):
    build = TILModule.build

    def hooked(module, size):
        backbone = build(module, size)
        backbone.net.conv1.register_forward_hook(lambda _, __, output: output + 1)
        return backbone

    monkeypatch.setattr(TILModule, "build", hooked)
    assert export(run, "--task", "signs", "--format", "safetensors") == 2
    assert "logits differ by" in capsys.readouterr().err


@pytest.mark.release
def test_a_real_vit_in_every_format(vit_weights, tmp_path):
    vit = ["--model.backbone.name", "vit_small_patch14_dinov2", "--model.backbone.weights", vit_weights]
    run = learn(["--config", "vit.yaml", *vit], tmp_path / "run", 70)
    for name in ("safetensors", "onnx", "torch_export", "onnx_bank"):
        task = () if name == "onnx_bank" else ("--task", "signs")
        assert export(run, *task, "--format", name) == 0
    folder = run / "export"
    check_plain(run, "signs", timm.create_model("vit_small_patch14_dinov2", num_classes=5, img_size=70), 70)
    check_onnx(run, folder / "signs.onnx", "signs", 70)
    check_program(run, folder / "signs.pt2", "signs", 70)
    assert check_bank(run, folder / "bank.onnx", 70) == [4 * 48] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hat", "recast_adaptformer"])
def test_a_method_that_changes_activations_is_exported_as_a_graph(method, tiny_fit, tmp_path):
    run = tmp_path / "run"
    assert main(tiny_fit("--config", f"methods/{method}.yaml", "--trainer.max_epochs", "1")) == 0
    assert export(run, "--task", "second", "--format", "safetensors") == 2
    assert export(run, "--task", "second", "--format", "onnx") == 0
    check_onnx(run, run / "export" / "second.onnx", "second")


def test_methods_that_share_numbers_or_scale_weights_are_exported_as_a_plain_network(tmp_path):
    pieces = [
        {"class_path": "RoSA", "init_args": {"density": 0.1, "warm_up": 1, "relative": True}},
        {"class_path": "LoRA", "init_args": {"shared": True, "targets": ["mlp"]}},
        {"class_path": "DoRA", "init_args": {"train_magnitude": False}},
        {"class_path": "Chosen", "init_args": {"count": 9, "rank": 4, "diagonal": False}},
        {"class_path": "TinyLoRA", "init_args": {"count": 3, "tied": 2}},
        {"class_path": "UniLoRA"},
        {"class_path": "HeadScale"},
        {"class_path": "PartialFineTune"},
    ]
    backbone = ["--model.backbone.name", "vit_tiny_patch16_224", "--model.backbone.args", json.dumps(TINY_VIT), *RANDOM]
    method = ["--model.pieces", json.dumps(pieces), "--model.optimizer.init_args.lr", "0.05"]
    run = learn(["--config", "vit.yaml", *backbone, *method], tmp_path / "run")
    assert export(run, "--task", "signs", "--format", "safetensors") == 0
    check_plain(run, "signs", timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, **TINY_VIT))


BANKED = [
    "recast-resnet",
    "spectral-resnet",
    "chosen-resnet",
    "scale-resnet",
    "melo-resnet",
    "rounded-lora-vit",
    "rounded-bias-vit",
    "one-bit-lora-vit",
    "loraxs-vit",
]


def bank_of(name, bits=None):
    """A bank of two tasks that differ in all that is trained, its module and its patches."""
    module, states = trained(name, 2)
    patches = []
    for state, classes in zip(states, (["a", "b"], ["a", "b", "c"]), strict=True):
        head = nn.Linear(module.backbone.num_features, len(classes)).state_dict()
        patch = replace(module.patch({}), task=f"task{len(classes)}", classes=classes, head=head, pieces=state)
        patches.append(patch if bits is None else patch.compacted(bits))
    return export_bank(module, patches), module, patches


@pytest.mark.slow
@pytest.mark.parametrize("name", BANKED)
def test_a_bank_holds_every_method_of_few_numbers(name):
    check_bank_of(*bank_of(name))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "in_a_byte"), [(2, 5), (4, 2), (8, 1)])
def test_a_bank_unpacks_heads_of_few_bits(bits, in_a_byte):
    bank, module, patches = bank_of("scale-resnet", bits)
    check_bank_of(bank, module, patches)
    features = module.backbone.num_features
    assert bank.tasks["task3"]["codes"].shape == (3, -(-features // in_a_byte))


@torch.no_grad()
def check_bank_of(bank, module, patches):
    session, images = onnxruntime.InferenceSession(bank.model.content), torch.rand(3, 3, 32, 32)
    found = []
    for patch in patches:
        inputs = {name: tensor.numpy() for name, tensor in bank.tasks[patch.task].items()}
        logits, features = session.run(["logits", "features"], {"images": images.numpy(), **inputs})
        module.activate(patch)
        np.testing.assert_allclose(logits, module(images), atol=1e-4)
        found.append(features)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "fault"), [("finetune-vit", "nearly as many as the network"), ("piggyback-vit", "sets more than numbers")]
)
def test_a_bank_that_is_impossible_is_refused(name, fault):
    with pytest.raises(ExportError, match=f"{fault}.*choose onnx"):
        bank_of(name)
