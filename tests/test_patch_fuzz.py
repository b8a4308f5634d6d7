"""Patches of any content are used or refused: no other error, no number that is not finite, no file elsewhere."""

import functools
import hashlib
import io
import json
import math
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recast_pl import (
    LIFT,
    BackboneConfig,
    BankLayout,
    Chosen,
    LoRA,
    Piggyback,
    Predictor,
    Recast,
    RoSA,
    TaskPatch,
    TILModule,
)
from recast_pl.cli import main
from recast_pl.errors import PatchError, RecastError
from recast_pl.files import pack_tensors
from recast_pl.inference.export.models import export_safetensors
from recast_pl.reporting.tables import difference_tables, patch_tables
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.patch_tools import average_patches, compare_patches, quantize_patch
from recast_pl.terminal import open_console

FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
MANY = settings(FEW, max_examples=200)

VIT = BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT)
METHODS = {
    "recast": lambda: Recast(BankLayout([r"mlp\.fc[12]\.weight"], groups=6, templates=2)),
    "lora": LoRA,
    "rosa": lambda: RoSA(density=1e-3, targets=(r"mlp\.fc1\.weight",)),
    "lift": lambda: LIFT(targets=(r"mlp\.fc1\.weight",)),
    "piggyback": Piggyback,
    "chosen": lambda: Chosen(count=9, rank=2),
}


@functools.cache
def network(method):
    """A network that only answers, another one that is exported, and a valid patch of both."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(TILModule(VIT, (METHODS[method](),)))
        modules[-1].build(32)
        modules[-1].begin_task("good", ["a", "b"])
    return Predictor(modules[0]), modules[1], modules[1].patch({"accuracy": 50.0})


ODD = [
    "",
    ".",
    "..",
    "../up",
    "/abs",
    "a/b",
    "a\\b",
    "a\nb",
    "a\0b",
    "\udce9",
    "x" * 300,
    "[/]",
    "[red]a",
    ":cat:",
    "é",
]
TEXTS = st.text(max_size=20) | st.sampled_from(ODD)
NUMBERS = st.sampled_from([0, 1, -1, 0.5, True, 2**31, 10**400, 1e300, None, "1"]) | st.floats(
    allow_nan=False, allow_infinity=False
)
FACTS = {
    "task": TEXTS,
    "classes": st.lists(TEXTS, max_size=3) | st.just(["a", "b"]),
    "method": st.lists(TEXTS, max_size=2),
    "image_size": NUMBERS | st.sampled_from([32, 16, 33, 48, 2048, 3000, [32, 32], [32, 48]]),
    "mean": st.lists(NUMBERS, max_size=4),
    "std": st.lists(NUMBERS, max_size=4),
    "base": TEXTS | st.just("0" * 64),
    "metrics": st.dictionaries(TEXTS, NUMBERS, max_size=3),
}
NAMES = "float16 bfloat16 float32 float64 complex64 float8_e4m3fn bool uint8 int8 int16 int32 int64 uint16"
TYPES = st.sampled_from([getattr(torch, name) for name in NAMES.split()])
VALUES = st.sampled_from([0, 1, -1, 100, 1e-30, 7e4, 9e8, 1.1e9, 1e30, math.inf, -math.inf, math.nan, 2**31, -(2**31)])
CHANGES = st.sampled_from(["type", "value", "shape", "more", "less", "name"])


def changed(tensors, data):
    """The tensors with one of them changed."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor, others = tensors[name].clone(), {key: value for key, value in tensors.items() if key != name}
    match data.draw(CHANGES):
        case "type":
            return {**others, name: tensor.to(data.draw(TYPES))}
        case "value":
            filled = tensor.double() if data.draw(st.booleans()) else tensor
            value = data.draw(VALUES)
            if not filled.is_floating_point():
                value = int(value) if math.isfinite(value) and 0 <= value < 256 else 0
            filled.view(-1)[data.draw(st.integers(0, filled.numel() - 1))] = value
            return {**others, name: filled}
        case "shape":
            shape = data.draw(st.lists(st.integers(0, 3), max_size=4) | st.just(list(tensor.shape[::-1])))
            return {**others, name: torch.zeros(shape, dtype=tensor.dtype)}
        case "more":
            path = data.draw(st.sampled_from(["head/0/", "pieces/0/", "pieces/1/", "pieces/-1/", "/", ""])) + "more"
            return {**tensors, path: tensor}
        case "less":
            return others
        case _:
            return {**others, data.draw(st.sampled_from(["head/0/", "pieces/0/", "pieces/00/", ""]) | TEXTS): tensor}


def made_up(good, data):
    """The bytes of a patch in which one to three things are changed."""
    tensors, facts = dict(good.tensors), {"format": 1, "kind": "patch"} | good.facts
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()) and tensors:
            tensors = changed(tensors, data)
        else:
            name = data.draw(st.sampled_from(sorted(FACTS)))
            facts[name] = data.draw(FACTS[name])
    return pack_tensors({name.encode(errors="replace").decode(): t for name, t in tensors.items()}, facts)


LISTED = ["task", "classes", "method", "image_size", "metrics"]
ANYTHING = st.recursive(
    NUMBERS | TEXTS | st.sampled_from(["f2", "u1", "i4", "coefficients", 2**39]),
    lambda inner: st.lists(inner, max_size=4),
)


def made_up_compact(good, data):
    """The bytes of a compact patch with the right checksum in which one to three things are changed."""
    content = good.compacted(data.draw(st.sampled_from([4, 8]))).to_bytes()
    header = list(struct.unpack_from("<4sBBI32s6f", content))
    listed, tail = json.loads(zlib.decompress(content[66 : 66 + header[3]], -15)), content[66 + header[3] : -32]
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["fact", "list", "bits", "colours", "tail", "length"])):
            case "fact":
                place = data.draw(st.integers(0, len(LISTED) - 1))
                listed[place] = data.draw(FACTS[LISTED[place]])
            case "list":
                part = data.draw(st.sampled_from([listed, listed[-1], *listed[-1]]))
                if isinstance(part, list) and part:
                    part[data.draw(st.integers(0, len(part) - 1))] = data.draw(ANYTHING)
            case "bits":
                header[2] = data.draw(st.sampled_from([0, 1, 4, 8, 255]))
            case "colours":
                header[data.draw(st.integers(5, 10))] = data.draw(VALUES.filter(lambda value: not abs(value) > 1e38))
            case "tail":
                place = data.draw(st.integers(0, len(tail)))
                tail = tail[:place] + data.draw(st.binary(max_size=4)) + tail[place + data.draw(st.integers(0, 4)) :]
            case _:
                tail += bytes(data.draw(st.integers(0, 9)))
    metadata = zlib.compress(json.dumps(listed).encode(), 9, -15)
    header[3] = len(metadata)
    made = struct.pack("<4sBBI32s6f", *header) + metadata + tail
    return made + hashlib.sha256(made).digest()


def use(path, method, patch):
    """Uses an accepted patch as commands and the server do; every step may refuse it with an error of its own."""
    model, module, good = network(method)
    folder = RunFolder(path.parent / "run")
    assert (folder.export / f"{patch.task}.onnx").resolve().parent == folder.export.resolve()
    assert folder.files(0, patch.task).patch.resolve().parent == (folder.path / "patches").resolve()
    console = open_console()
    console.file = io.StringIO()
    console.print(*patch_tables(patch, path), *difference_tables(compare_patches(patch, good)))
    for step in (
        lambda: average_patches([patch, patch]).to_bytes(),
        *(lambda p=p: quantize_patch(patch, p).to_bytes() for p in ("fp16", "int8", "int4", "fp32")),
        lambda: same_bytes(patch, path),
        lambda: answers(model, patch),
        lambda: exported(module, patch),
    ):
        with suppress(RecastError):
            step()


def same_bytes(patch, path):
    patch.to_bytes()
    again = path.with_name("again")
    try:
        patch.save(again)
        assert TaskPatch.load(again).to_bytes() == again.read_bytes()
    finally:
        again.unlink(missing_ok=True)


def answers(model, patch):
    task = model.add_patch(patch)
    try:
        for probability in model.predict(torch.zeros(3, 8, 8), task)[0].probabilities.values():
            assert math.isfinite(probability) or max(map(largest, patch.tensors.values())) > 1e6
    finally:
        model.remove(task)


def largest(tensor):
    return float(tensor.double().abs().max())


def exported(module, patch):
    module.activate(patch)
    assert export_safetensors(module, patch).content


def check(method, data, folder):
    path = folder / "made_up.safetensors"
    path.write_bytes(data.draw(st.sampled_from([made_up, made_up_compact]))(network(method)[2], data))
    before = sorted(folder.rglob("*"))
    try:
        patch = TaskPatch.load(path)
    except PatchError as refused:
        message = str(refused)
        assert message.startswith(str(path))
        assert message.isprintable()
        assert len(message) < len(str(path)) + 600
    else:
        use(path, method, patch)
    assert sorted(folder.rglob("*")) == before


@FEW
@given(data=st.data(), method=st.sampled_from(sorted(METHODS)))
def test_a_changed_patch_is_used_or_refused(data, method, tmp_path_factory):
    check(method, data, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@MANY
@given(data=st.data(), method=st.sampled_from(sorted(METHODS)))
def test_many_changed_patches_are_used_or_refused(data, method, tmp_path_factory):
    check(method, data, tmp_path_factory.getbasetemp())


@settings(FEW, max_examples=30)
@given(task=TEXTS)
def test_export_writes_only_below_its_folder(task, clipart_run, tmp_path_factory, capsys):
    """Whatever the task of a patch is called, `export` writes one file into `export/`, or none."""
    folder = tmp_path_factory.getbasetemp() / "exported"
    folder.mkdir(exist_ok=True)
    good = TaskPatch.load(clipart_run / "patches" / "00_signs.safetensors")
    (folder / "patch").write_bytes(replace(good, task=task).to_bytes())
    before = {path: path.stat().st_mtime_ns for path in Path(clipart_run.parent).rglob("*") if path.is_file()}
    status = main(
        ["export", "--run_dir", str(clipart_run), "--patch", str(folder / "patch"), "--format", "safetensors"]
    )
    after = {path: path.stat().st_mtime_ns for path in Path(clipart_run.parent).rglob("*") if path.is_file()}
    new = {path for path in after if before.get(path) != after[path]}
    assert status in (0, 2)
    assert {path.parent for path in new} <= {clipart_run / "export"}
    assert len(new) == (status == 0)
    for path in new:
        path.unlink()
    capsys.readouterr()
