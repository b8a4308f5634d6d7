"""Compact patches: how heads are rounded, what the file holds byte by byte, and runs that store their tasks so."""

import hashlib
import itertools
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RANDOM, ROOT, clipart_words, learn
from test_stream import kill_and_resume, patches, read_summary, without_times

from recast_pl import TaskPatch, load
from recast_pl.cli import main
from recast_pl.errors import PatchError
from recast_pl.learning.quantization import Moments, round_head
from recast_pl.methods.rounding import choose_steps, pack_codes, unpack_codes

SIGNS, NAMES = "patches/00_signs.recast", ["clocks", "flags", "led", "map_symbols", "weather"]
TEN = [f"class number {i} of ten" for i in range(10)]


def a_task(classes, features, numbers, dtype=torch.float32):
    """A task of some shape with random numbers, and facts as long as those of a run."""
    torch.manual_seed(0)
    head = {"weight": torch.randn(len(classes), features), "bias": torch.randn(len(classes))}
    colours = [0.48500001430511475, 0.4560000002384186, 0.4059999883174896], [0.2290000021457672, 0.224, 0.225]
    metrics = {"accuracy": 88.1356, "probe_accuracy": 87.7119}
    state = [{"coefficients": torch.randn(numbers).to(dtype)}]
    return TaskPatch("signs", classes, head, state, ["Recast"], 98, *colours, hashlib.sha256(b"").hexdigest(), metrics)


# rounding


def compensated_by_least_squares(w, second_moment, step, limit):
    """The codes of one row: after each code, the entries still to come are solved for exactly."""
    h = second_moment + 0.1 * np.trace(second_moment) / len(w) * np.eye(len(w)) + 1e-12 * np.eye(len(w))
    order, values, codes = np.argsort(-np.diag(second_moment), kind="stable"), w.copy(), np.zeros(len(w))
    for done in range(len(order)):
        here, later = order[: done + 1], order[done + 1 :]
        codes[order[done]] = np.clip(np.round(values[order[done]] / step), -limit, limit)
        error = w[here] - step * codes[here]
        # minimise over the rest r of the error: (e, r)ᵀ h (e, r)
        values[later] = w[later] + np.linalg.solve(h[np.ix_(later, later)], h[np.ix_(later, here)] @ error)
    return codes


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_compensates_errors_by_the_formula(bits):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 12)) @ generator.normal(size=(12, 12)) + 3
    weight, bias = generator.normal(size=(3, 12)), generator.normal(size=3)
    moments = Moments.of(torch.from_numpy(features))
    np.testing.assert_allclose(moments.covariance, np.cov(features.T, bias=True), rtol=1e-9)
    head = round_head(torch.from_numpy(weight), torch.from_numpy(bias), bits, moments)
    limit, centred = 2 ** (bits - 1) - 1, weight - weight.mean(0)
    steps = head.steps.double().numpy()
    for row in range(3):
        wanted = compensated_by_least_squares(centred[row], np.cov(features.T, bias=True), steps[row], limit)
        np.testing.assert_array_equal(head.codes[row].numpy(), wanted)
    value = head.state["weight"].double().numpy()
    np.testing.assert_array_equal(value, head.codes.double().numpy() * steps[:, None])
    logits = features @ value.T + head.state["bias"].double().numpy()
    exact = features @ centred.T + bias - bias.mean()
    np.testing.assert_allclose((logits - exact).mean(0), 0, atol=1e-5)  # what the bias is solved for


def test_two_bits_end_where_no_single_code_can_be_better():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 12)) @ generator.normal(size=(12, 12)) + 3
    weight, bias = generator.normal(size=(5, 12)), generator.normal(size=5)
    weight[4] = weight[:4].mean(0)  # less the mean over classes, it is 0
    second_moment, centred = np.cov(features.T, bias=True), weight - weight.mean(0)
    h = second_moment + (0.1 * np.trace(second_moment) / 12 + 1e-12) * np.eye(12)
    moments = Moments.of(torch.from_numpy(features))
    head = round_head(torch.from_numpy(weight), torch.from_numpy(bias), 2, moments)
    plain_steps = choose_steps(torch.from_numpy(centred), 2).double().numpy()

    def error(w, step, codes):
        return (w - step * codes) @ h @ (w - step * codes)

    for w, step, codes, plain_step in zip(
        centred, head.steps.double().numpy(), head.codes.double().numpy(), plain_steps, strict=True
    ):
        assert set(codes) <= {-1, 0, 1}
        reached = error(w, step, codes)
        assert reached <= error(w, plain_step, compensated_by_least_squares(w, second_moment, plain_step, 1)) + 1e-12
        for j in range(12):
            for other in (-1, 0, 1):
                changed = codes.copy()
                changed[j] = other
                assert reached <= error(w, step, changed) + 1e-12
        for factor in (0.98, 1.02):  # a step has eight bits
            assert reached <= error(w, factor * step, codes) + 1e-12
    exact = features @ centred.T + bias - bias.mean()
    logits = features @ head.state["weight"].double().numpy().T + head.state["bias"].double().numpy()
    np.testing.assert_allclose((logits - exact).mean(0), 0, atol=1e-5)


def test_rounding_with_features_beats_plain_rounding_on_them():
    torch.manual_seed(0)
    features = torch.randn(500, 64) @ torch.randn(64, 64) / 8 + 1
    weight, bias = torch.randn(5, 64), torch.zeros(5)
    exact = features @ (weight - weight.mean(0)).T

    def error(bits, moments):
        state = round_head(weight, bias, bits, moments).state
        return float((features @ state["weight"].T + state["bias"] - exact).square().mean())

    for bits in (4, 2):
        assert error(bits, Moments.of(features)) < 0.5 * error(bits, None)


def test_no_other_step_gives_a_smaller_error():
    torch.manual_seed(1)
    weight = torch.randn(3, 50, dtype=torch.float64)
    weight -= weight.mean(0)
    steps = round_head(weight, torch.zeros(3), 4, None).steps.double()

    def errors(steps):
        codes = (weight / steps[:, None]).round().clamp(-7, 7)
        return (weight - codes * steps[:, None]).square().sum(1)

    for factor in torch.linspace(0.5, 2, 301):
        assert (errors(steps) <= 1.02 * errors(factor * steps)).all()  # the steps that are tried are 1 % apart


def test_heads_of_odd_kinds_can_be_rounded():
    moments = Moments.of(torch.zeros(1, 3))  # features that never change
    for weight in (torch.zeros(2, 3), torch.full((1, 3), 7.0), torch.full((2, 3), 1e9), torch.full((2, 3), 1e-40)):
        for bits, given in itertools.product((4, 2), (None, moments)):
            state = round_head(weight, torch.zeros(len(weight)), bits, given).state
            assert all(value.isfinite().all() for value in state.values())
            assert torch.allclose(state["weight"], weight - weight.mean(0))


@pytest.mark.parametrize("width", [1, 2, 7, 384])
def test_codes_are_packed_and_unpacked(width):
    generator = torch.Generator().manual_seed(0)
    for bits, limit, in_a_byte in ((8, 127, 1), (4, 7, 2), (2, 1, 5), (1, 1, 8)):
        codes = torch.randint(-limit, limit + 1, (3, width), dtype=torch.int8, generator=generator)
        codes = codes.where(codes != 0, 1) if bits == 1 else codes
        packed = pack_codes(codes, bits)
        assert packed.shape == (3, -(-width // in_a_byte))
        assert torch.equal(unpack_codes(packed, width, bits), codes.float())


def test_five_codes_of_two_bits_are_the_digits_of_a_byte():
    codes = list(itertools.product((-1, 0, 1), repeat=5))
    packed = pack_codes(torch.tensor(codes, dtype=torch.int8), 2)
    assert packed[:, 0].tolist() == [sum(code % 3 * 3**i for i, code in enumerate(five)) for five in codes]
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]  # also those that no codes have
    assert set(unpack_codes(every_byte, 5, 2).flatten().tolist()) == {-1, 0, 1}


# the file


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_file_is_laid_out_as_documented(bits):
    patch = a_task(NAMES, 7, 3).compacted(bits)
    content = patch.to_bytes()
    magic, version, width, length, base = struct.unpack_from("<4sBBI32s", content)
    assert (magic, version, width, base.hex()) == (b"RCST", 1, bits, patch.base)
    assert list(struct.unpack_from("<6f", content, 42)) == patch.mean + patch.std
    listed = json.loads(zlib.decompress(content[66 : 66 + length], -15))
    assert listed == ["signs", NAMES, ["Recast"], 98, patch.metrics, 7, [[["coefficients", "f2", 3]]]]
    rest, row = content[66 + length : -32], {2: 2, 4: 4, 8: 7}[bits]
    codes = np.frombuffer(rest[: 5 * row], np.uint8).reshape(5, row)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], 2).reshape(5, 8)[:, :7].astype(int)
        codes = codes - 16 * (codes > 7)
    elif bits == 2:
        codes = np.stack([codes // 3**i % 3 for i in range(5)], 2).reshape(5, 10)[:, :7].astype(int)
        codes = codes - 3 * (codes > 1)
    else:
        codes = codes.view(np.int8).astype(int)
    steps = np.frombuffer(rest[5 * row : 5 * row + 10], "<u2").astype("<u4") << 16  # bfloat16 is the upper half
    weight = codes * steps.view("<f4")[:, None]
    np.testing.assert_array_equal(patch.head["weight"], weight)
    np.testing.assert_array_equal(patch.head["bias"], np.frombuffer(rest[5 * row + 10 : 5 * row + 30], "<f4"))
    np.testing.assert_array_equal(patch.pieces[0]["coefficients"], np.frombuffer(rest[5 * row + 30 :], "<f2"))
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_file_reads_back_and_writes_the_same_bytes(bits, tmp_path):
    patch = a_task(NAMES, 9, 3).compacted(bits)
    patch.save(tmp_path / "patch")
    read = TaskPatch.load(tmp_path / "patch")
    assert read.facts == patch.facts
    assert {t.dtype for t in read.tensors.values()} == {torch.float32}
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in patch.tensors.items())
    assert read.to_bytes() == (tmp_path / "patch").read_bytes()
    assert read.compacted(bits).to_bytes() == read.to_bytes()
    with pytest.raises(PatchError, match="changed after rounding"):
        replace(read, head=read.head | {"bias": read.head["bias"] + 1}).to_bytes()


def test_states_keep_their_values_where_half_precision_does_not_hold_them(tmp_path):
    pieces = [
        {"indices": torch.arange(5, dtype=torch.int32), "values": torch.full((5,), 1 / 3)},
        {"mask": torch.tensor([1, 255], dtype=torch.uint8), "large": torch.tensor([1e6]), "tiny": torch.tensor([1e-9])},
        {},
    ]
    source = a_task(NAMES, 4, 1)
    patch = TaskPatch(**source.facts | {"method": ["A", "B", "C"]}, head=source.head, pieces=pieces)
    patch.compacted(4).save(tmp_path / "patch")
    read = TaskPatch.load(tmp_path / "patch").pieces
    assert [list(piece) for piece in read] == [["indices", "values"], ["large", "mask", "tiny"], []]
    assert read[0]["indices"].equal(pieces[0]["indices"])
    assert read[0]["values"].equal(torch.full((5,), 1 / 3).half().float())
    assert all(read[1][name].equal(pieces[1][name]) for name in pieces[1])


# bytes of whole files: ViT-S has 384 features, EfficientNet-Lite0 1280
@pytest.mark.parametrize(
    ("classes", "features", "numbers", "limit"),
    [(NAMES, 384, 48, 1400), (TEN, 384, 48, 2500), (NAMES, 1280, 69, 4500), (TEN[:5], 384, 48, 1400)],
)
def test_a_task_of_real_size_fits_its_limit(classes, features, numbers, limit):
    for bits, row in ((2, -(-features // 5)), (4, features // 2), (8, features)):
        content = a_task(classes, features, numbers).compacted(bits).to_bytes()
        (metadata,) = struct.unpack_from("<I", content, 6)
        assert len(content) == 66 + metadata + len(classes) * (row + 2 + 4) + 2 * numbers + 32
        assert bits == 8 or len(content) <= limit


def sealed(content):
    return content + hashlib.sha256(content).digest()


def forged(listed, tail=b"", bits=4, version=1):
    metadata = zlib.compress(json.dumps(listed).encode(), 9, -15)
    header = struct.pack("<4sBBI32s6f", b"RCST", version, bits, len(metadata), bytes(32), *[0.5] * 6)
    return sealed(header + metadata + tail)


def listing(**changes):
    facts = {"task": "t", "classes": ["a", "b"], "method": ["A"], "size": 8, "metrics": {}, "features": 2}
    return list((facts | {"states": [[["c", "f2", 1]]]} | changes).values())


TAIL = bytes(2 * 1 + 2 * 2 + 2 * 4 + 2)
BOMB = zlib.compress(b" " * 2**28, 9, -15)
FORGED = {
    "newer": (forged(listing(), TAIL, version=2), "format 2"),
    "bits": (forged(listing(), TAIL, bits=5), "5 bits"),
    "too long": (forged(listing(), TAIL + b"\0"), "17 bytes of tensors, not 16"),
    "too short": (forged(listing(), TAIL[1:]), "15 bytes of tensors, not 16"),
    "huge head": (forged(listing(features=2**60), TAIL), "shape"),
    "huge state": (forged(listing(states=[[["c", "f2", 2**39]]]), TAIL), "bytes of tensors, not"),
    "endless": (forged(listing(states=[[["c", "f2", 0, 2**62, 2**62]]]), TAIL[:-2]), "shape"),
    "negative": (forged(listing(states=[[["c", "f2", -1]]]), TAIL), "shape"),
    "dimensions": (forged(listing(states=[[["c", "f2", *[1] * 70]]]), TAIL), "shape"),
    "type": (forged(listing(states=[[["c", "f8", 1]]]), TAIL), "damaged"),
    "same name": (forged(listing(states=[[["c", "f2", 1], ["c", "f2", 1]]]), TAIL + b"\0\0"), "name"),
    "no name": (forged(listing(states=[[[1, "f2", 1]]]), TAIL), "name"),
    "more facts": (forged([1, *listing()], TAIL), "damaged"),
    "classes": (forged(listing(classes="ab"), TAIL), "classes is 'ab'"),
    "path": (forged(listing(task="../t"), TAIL), "task is '../t'"),
    "NaN": (forged(listing(), TAIL[:-2] + b"\xff\xff"), "NaN"),
    "NaN step": (forged(listing(), b"\x11\x11\xff\xff" + TAIL[4:]), "NaN"),
    "bomb": (sealed(struct.pack("<4sBBI32s6f", b"RCST", 1, 4, len(BOMB), bytes(32), *[0.5] * 6) + BOMB), "too long"),
    "nested": (forged([json.loads("[" * 500 + "]" * 500)]), "damaged"),
    "cut": (b"RCST", "damaged"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_refused_before_memory_is_taken(kind, tmp_path, capsys):
    content, named = FORGED[kind]
    path = tmp_path / "forged.recast"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(PatchError) as refused:
        TaskPatch.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26
    assert named in str(refused.value)
    assert str(path) in str(refused.value)
    assert main(["patch", "show", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_forged_files_are_wrong_in_one_place_only(tmp_path):
    (tmp_path / "good").write_bytes(forged(listing(), TAIL))
    assert TaskPatch.load(tmp_path / "good").classes == ["a", "b"]


# runs


@pytest.fixture
def run(tiny_fit, tmp_path):
    assert main(tiny_fit("--patch_precision", "int4")) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(("precision", "values"), [("int4", 15), ("int2", 3)])
def test_a_run_stores_and_measures_compact_patches(precision, values, tiny_fit, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(tiny_fit("--patch_precision", precision)) == 0
    assert list(patches(run)) == ["00_first.recast", "01_second.recast"]
    assert f"patch_precision: {precision}" in (run / "config.yaml").read_text()
    for task, content in zip(read_summary(run)["tasks"], patches(run).values(), strict=True):
        assert task["patch_bytes"] == len(content)
    capsys.readouterr()
    assert main(["test", "--run_dir", str(run)]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out
    patch = TaskPatch.load(run / "patches" / "00_first.recast")
    assert patch.to_bytes() == patches(run)["00_first.recast"]
    assert (patch.head["weight"] / patch.rounded.steps.float()[:, None]).unique().numel() <= values
    assert patch.metrics["accuracy"] == read_summary(run)["tasks"][0]["accuracy"]
    assert main(["patch", "verify", str(run / "patches" / "00_first.recast"), "--run_dir", str(run)]) == 0


def test_predictions_stay_the_same_bits_after_later_tasks(tiny_fit, tmp_path):
    words = ("--patch_precision", "int4", "--only", "first")
    assert main(tiny_fit(*words)) == 0
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    before = load(tmp_path / "run").predict(images, "first")
    content = patches(tmp_path / "run")["00_first.recast"]
    assert main(tiny_fit("--resume", "true", "--patch_precision", "int4")) == 0
    assert load(tmp_path / "run").predict(images, "first") == before
    assert patches(tmp_path / "run")["00_first.recast"] == content


def test_precisions_share_all_but_the_file_and_fp32_is_the_default(run, tiny_fit, tmp_path):
    for name, words in (("plain", ()), ("fp32", ("--patch_precision", "fp32"))):
        assert main(tiny_fit(*words, run_dir=tmp_path / name)) == 0
    assert patches(tmp_path / "plain") == patches(tmp_path / "fp32")
    plain = TaskPatch.load(tmp_path / "plain" / "patches" / "00_first.safetensors")
    small = TaskPatch.load(run / "patches" / "00_first.recast")
    assert small.base == plain.base
    assert small.pieces[0]["coefficients"].equal(plain.pieces[0]["coefficients"].half().float())
    assert not torch.equal(small.head["weight"], plain.compacted(4).head["weight"])  # features decided


def test_a_run_is_not_resumed_with_another_precision(tiny_fit, tmp_path, capsys):
    assert main(tiny_fit("--only", "first", "--patch_precision", "int8")) == 0
    assert main(tiny_fit("--resume", "true")) == 2
    assert "patch_precision differs" in capsys.readouterr().err
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true"]) == 0
    assert list(patches(tmp_path / "run")) == ["00_first.recast", "01_second.recast"]


@pytest.mark.release
def test_a_killed_run_resumes_to_the_same_bytes(run, tiny_fit, tmp_path):
    killed = tmp_path / "killed"
    callback = {"class_path": "crash_callbacks.KillAt"}
    callback["init_args"] = {"hook": "on_train_end", "task": "second", "epoch": 3}
    words = tiny_fit("--patch_precision", "int4", "--trainer.callbacks", json.dumps([callback]), run_dir=killed)
    kill_and_resume(words, killed)
    assert main(tiny_fit("--patch_precision", "int4", "--resume", "true", run_dir=killed)) == 0
    assert patches(killed) == patches(run)
    assert without_times(read_summary(killed)) == without_times(read_summary(run))


@pytest.mark.slow
def test_two_processes_measure_the_patch_that_one_of_them_writes(tiny_fit, tmp_path):
    words = tiny_fit("--patch_precision", "int4", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    process = subprocess.run([sys.executable, "-m", "recast_pl", *words], cwd=ROOT, capture_output=True, timeout=600)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    assert list(patches(tmp_path / "run")) == ["00_first.recast", "01_second.recast"]
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "limit"), [pytest.param(("signs",), 1400, marks=pytest.mark.release), (("food", "people"), 1400)]
)
def test_tasks_of_a_real_vit_fit_in_a_packet(names, limit, vit_weights, tmp_path):
    backbone = ("--model.backbone.name", "vit_small_patch14_dinov2", "--model.backbone.weights", vit_weights)
    words = ["--config", "vit.yaml", *backbone, "--patch_precision", "int4"]
    run = learn(words, tmp_path / "run", 70, names)
    for task, content in zip(read_summary(run)["tasks"], patches(run).values(), strict=True):
        assert task["task_parameters"] == 96
        assert task["patch_bytes"] == len(content) <= limit
    assert main(["test", "--run_dir", str(run)]) == 0


@pytest.mark.slow
def test_a_task_of_the_quickstart_is_small(tmp_path):
    run = learn(["--config", "quickstart.yaml", "--patch_precision", "int4"], tmp_path / "run", 64, ["signs"])
    assert read_summary(run)["tasks"][0]["patch_bytes"] == len(patches(run)["00_signs.recast"]) <= 4500


def test_a_run_of_any_method_takes_compact_patches(tmp_path):
    words = ["--config", "resnet34.yaml", "--model.backbone.name", "torchvision/resnet18", *RANDOM]
    words = clipart_words([*words, "--config", "methods/piggyback.yaml"], tmp_path / "run", names=("signs",))
    assert main([*words, "--patch_precision", "int8"]) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("method", "bits"), [("melo_int4", 4), ("norm_int4", 4), ("melo_1bit", 1), ("norm_1bit", 1)])
def test_a_task_of_rounded_numbers_takes_their_bits(method, bits, tiny_fit, tmp_path, capsys):
    words = ["--config", f"methods/{method}.yaml", "--patch_precision", "int4", "--trainer.max_epochs", "1"]
    assert main(tiny_fit(*words)) == 0
    (path, *_), summary = sorted((tmp_path / "run" / "patches").iterdir()), read_summary(tmp_path / "run")
    numbers, patch = summary["tasks"][0]["task_parameters"], TaskPatch.load(path)
    (state,), head = patch.pieces, patch.head["weight"]
    assert state["codes"].numel() == numbers * bits / 8
    left = path.stat().st_size - numbers * bits / 8 - 2 * state["steps"].numel() - head.numel() / 2 - 6 * len(head)
    assert 66 + 32 < left < 400  # header, checksum and names
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert main(["patch", "show", str(path)]) == 0
    told = (
        f"{state['steps'].numel()}, {state['codes'].numel():,} bytes of codes and a head of {head.numel() + len(head)}"
    )
    assert told in capsys.readouterr().out
