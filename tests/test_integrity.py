"""Damaged and made-up files are refused with the project's own errors; they are never used and never crash."""

import functools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from recast_pl import BackboneConfig, BankLayout, Decomposition, LinearProbe, SharedState, TaskPatch, TILModule
from recast_pl.data.manifests import open_manifest
from recast_pl.decomposition.bank import decompose
from recast_pl.errors import DataError, DecompositionError, PatchError
from recast_pl.files import pack_tensors

MANY = settings(
    max_examples=5_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def a_patch():
    head = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    state = [{"coefficients": torch.randn(5)}]
    return TaskPatch("t", ["a", "b"], head, state, ["Recast"], 32, [0.5] * 3, [0.5] * 3, "0" * 64, {"accuracy": 50.0})


def a_decomposition():
    return decompose(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), BankLayout(["weight"]))


def a_shared_state():
    return SharedState(["t"], [{"weight": torch.randn(2, 3)}], [{"w": torch.randn(4)}], ["FineTune"], "0" * 64)


KINDS = {
    "patch": (a_patch, TaskPatch, PatchError),
    "compact": (lambda: a_patch().compacted(4), TaskPatch, PatchError),
    "decomposition": (a_decomposition, Decomposition, DecompositionError),
    "shared": (a_shared_state, SharedState, PatchError),
}


@pytest.fixture(params=KINDS)
def file(request, tmp_path):
    make, kind, error = KINDS[request.param]
    path = tmp_path / "file.safetensors"
    make().save(path)
    kind.load(path)
    return path, kind, error


def test_no_byte_can_change_unnoticed(file):
    path, kind, error = file
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0x01, 0x20, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(error, match=r"file\.safetensors"):
                kind.load(path)


def test_no_byte_can_be_missing_or_too_many(file):
    path, kind, error = file
    content = path.read_bytes()
    for damaged in (*(content[:n] for n in range(len(content))), content + b"\0", b"\0" + content):
        path.write_bytes(damaged)
        with pytest.raises(error, match=r"file\.safetensors"):
            kind.load(path)


def test_a_newer_format_and_more_or_less_than_expected_are_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    facts = {"format": 1, "kind": "patch", "task": "t", "classes": ["a"], "method": [], "image_size": 8}
    facts |= {"mean": [0, 0, 0], "std": [1, 1, 1], "base": "0" * 64, "metrics": {}}
    head = {"head/0/weight": torch.zeros(1, 2), "head/0/bias": torch.zeros(1)}
    path.write_bytes(pack_tensors(head, facts))
    TaskPatch.load(path)
    for tensors, changed, message in (
        (head, {"format": 2}, "format 2"),
        (head | {"more": torch.zeros(1)}, {}, "incomplete"),
        (head | {"pieces/0/c": torch.zeros(1)}, {}, "incomplete"),
        (head | {"head/-1/more": torch.zeros(1)}, {}, "unknown"),
        (head | {"head/00/more": torch.zeros(1)}, {}, "unknown"),
        (head, {"more": 1}, "states"),
        (head, {"classes": "ab"}, "classes is 'ab'"),
        (head, {"image_size": 0}, "image_size is 0"),
        (head, {"std": [1, 0, 1]}, "std is"),
        (head, {"metrics": {"accuracy": "high"}}, "metrics is"),
    ):
        path.write_bytes(pack_tensors(tensors, facts | changed))
        with pytest.raises(PatchError, match=message):
            TaskPatch.load(path)


def test_nan_is_refused(tmp_path):
    bank = a_decomposition()
    bank.banks[0].templates[0, 0, 0] = math.nan
    bank.save(tmp_path / "decomposition.safetensors")
    with pytest.raises(DecompositionError, match="NaN"):
        Decomposition.load(tmp_path / "decomposition.safetensors")
    module = TILModule(BackboneConfig("vit_tiny_patch16_224", "random", TINY_VIT), [LinearProbe()])
    module.build(32)
    module.begin_task("t", ["a", "b"])
    with torch.no_grad():
        module.head.bias[0] = math.nan
    with pytest.raises(PatchError, match="NaN"):
        module.activate(module.patch({}))


def read(load, path, error):
    """Reads a file; returns None if it is refused with an error that names it."""
    try:
        return load(path)
    except error as refused:
        if str(path) not in str(refused):
            raise
        return None


@functools.cache
def content_of(kind):
    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "file.safetensors"
    KINDS[kind][0]().save(path)
    return path.read_bytes()


NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
GENUINE = {
    "format": 1,
    "task": "t",
    "tasks": ["t"],
    "classes": ["a", "b"],
    "method": ["Recast"],
    "image_size": 32,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "base": "0" * 64,
    "metrics": {},
    "groups": [{"name": "g", "targets": ["a"], "shape": [1], "templates": 1}],
}
NAMES = st.sampled_from(["head/0/weight", "head/0/bias", "pieces/0/c", "heads/0/weight", "head", "pieces/x/y", "/", ""])
KIND = st.sampled_from(sorted(KINDS))


@pytest.mark.slow
@settings(MANY, max_examples=1_000)  # each example takes as long as five of the others
@given(
    facts=st.dictionaries(st.sampled_from(sorted(GENUINE)), JSON),
    real=st.sets(st.sampled_from(sorted(GENUINE))),
    names=st.lists(NAMES | st.text(max_size=8), unique=True, max_size=4),
    kind=KIND,
)
def test_a_made_up_file_with_a_right_checksum_is_read_or_refused(facts, real, names, kind, tmp_path_factory):
    _, cls, error = KINDS[kind]
    path = tmp_path_factory.getbasetemp() / "made_up.safetensors"
    tensors = {name: torch.zeros(1, 1) for name in names}
    path.write_bytes(pack_tensors(tensors, facts | {name: GENUINE[name] for name in real} | {"kind": kind}))
    found = read(cls.load, path, error)
    assert found is None or isinstance(found, cls)


@pytest.mark.slow
@MANY
@given(data=st.data(), kind=KIND)
def test_a_mutilated_file_is_refused(data, kind, tmp_path_factory):
    _, cls, error = KINDS[kind]
    content = content_of(kind)
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    mutilated = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    path = tmp_path_factory.getbasetemp() / "mutilated.safetensors"
    path.write_bytes(mutilated)
    assert (read(cls.load, path, error) is not None) == (mutilated == content)


@pytest.mark.slow
@MANY
@given(
    rows=st.lists(st.lists(st.text(max_size=12), max_size=4), max_size=6),
    raw=st.binary(max_size=80),
    which=st.integers(0, 2),
)
def test_a_made_up_manifest_is_read_or_refused(rows, raw, which, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "made_up.csv"
    lines = "\n".join(",".join(row) for row in rows)
    header = b"path,label,split\n"
    path.write_bytes((raw, header + raw, header + lines.encode())[which])
    source = read(open_manifest, path, DataError)
    if source is not None:
        assert len(source.labels) == len(source.splits)
        assert source.labels.max() < len(source.classes)
