"""The patch command: show, diff, verify, average and quantize."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, learn
from safetensors.torch import load_file

from recast_pl import TaskPatch, load
from recast_pl.cli import main
from recast_pl.errors import PatchError

SIGNS, PEOPLE = "patches/00_signs.safetensors", "patches/01_people.safetensors"
PICTURES = sorted((ROOT / "data" / "clipart" / "signs").rglob("*.jpg"))[:3]


def patch(*words):
    return main(["patch", *map(str, words)])


@pytest.fixture
def run(clipart_run):
    return clipart_run


def changed(run, path, factor=1.0, name=SIGNS, **facts):
    """Writes a copy of a run's patch with its numbers multiplied by a factor."""
    source = TaskPatch.load(run / name)
    source.with_tensors({n: t * factor for n, t in source.tensors.items()}, **facts).save(path)
    return path


def test_show_prints_what_a_patch_is(run, capsys):
    assert patch("show", run / SIGNS, run / PEOPLE) == 0
    out = " ".join(capsys.readouterr().out.split())
    accuracy = json.loads((run / "summary.json").read_text())["tasks"][0]["accuracy"]
    for told in ("signs", "people", "Recast", f"accuracy {accuracy:.2f}", "5×512", "float32", "and a head of 2,565"):
        assert told in out, told
    size = (run / SIGNS).stat().st_size
    assert f"{size:,}" in out


def test_diff_prints_what_differs_and_by_how_much(run, tmp_path, capsys):
    other = changed(run, tmp_path / "other.safetensors", 1.5, image_size=64)
    assert patch("diff", run / SIGNS, other) == 0
    out = capsys.readouterr().out
    assert "image_size" in out
    row = next(line.split() for line in out.splitlines() if "coefficients" in line)
    largest = load_file(run / SIGNS)["pieces/0/coefficients"].abs().max() / 2
    np.testing.assert_allclose([float(cell) for cell in row[1:]], [largest, 0.5, 1.0], rtol=1e-3)
    assert patch("diff", run / SIGNS, run / SIGNS) == 0
    assert "all facts are equal" in capsys.readouterr().out
    assert patch("diff", run / SIGNS, run / PEOPLE) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("classes", "head/0/weight"))


def test_verify_accepts_intact_patches(run, capsys):
    assert patch("verify", run / SIGNS, run / PEOPLE, "--run_dir", run) == 0
    assert capsys.readouterr().out.count("intact, and fits") == 2


def with_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def with_nan(path):
    source = TaskPatch.load(path)
    source.with_tensors(source.tensors | {"pieces/0/coefficients": torch.full((84,), torch.nan)}).save(path)


DAMAGES = {
    "byte": (with_byte, "checksum", False),
    "nan": (with_nan, "NaN", False),
    "classes": (lambda path: replace(TaskPatch.load(path), classes=["one"]).save(path), "the head", False),
    "base": (lambda path: replace(TaskPatch.load(path), base="0" * 64).save(path), "belongs to base 0000", True),
    "method": (lambda path: replace(TaskPatch.load(path), method=["LoRA"]).save(path), "LoRA", True),
    "shape": (
        lambda path: replace(TaskPatch.load(path), pieces=[{"coefficients": torch.zeros(3)}]).save(path), "(3,)", True
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_refuses_damaged_patches_in_one_line(damage, run, tmp_path, capsys):
    break_it, named, needs_run = DAMAGES[damage]
    path = changed(run, tmp_path / "bad.safetensors")
    break_it(path)
    if needs_run:
        assert patch("verify", path) == 0
    assert patch("verify", path, "--run_dir", run) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert named in error, error


def scaled(patch, factor):
    return patch.with_tensors({name: tensor * factor for name, tensor in patch.tensors.items()})


def typed(patch, dtype):
    return replace(patch, pieces=[{name: tensor.to(dtype) for name, tensor in p.items()} for p in patch.pieces])


def headed(patch, classes, weight, bias):
    return replace(patch, classes=classes, head={"weight": weight, "bias": bias})


INVALID = {
    "climbs out": (lambda p: replace(p, task="../patches/00_signs"), "task is '../patches/00_signs'"),
    "absolute": (lambda p: replace(p, task="/elsewhere"), "task is '/elsewhere'"),
    "hidden": (lambda p: replace(p, task=".signs"), "task is '.signs'"),
    "empty name": (lambda p: replace(p, task=""), "task is ''"),
    "line break": (lambda p: replace(p, task="a\nb"), r"task is 'a\nb'"),
    "escape": (lambda p: replace(p, task="a\x1b[31m"), r"task is 'a\x1b[31m'"),
    "NUL": (lambda p: replace(p, task="a\0b"), r"task is 'a\x00b'"),
    "long name": (lambda p: replace(p, task="x" * 1_000_000), "at most 200 bytes"),
    "no class": (lambda p: headed(p, [], torch.zeros(0, 512), torch.zeros(0)), "classes is []"),
    "same class twice": (lambda p: replace(p, classes=[p.classes[0]] * len(p.classes)), "each once"),
    "empty class": (lambda p: replace(p, classes=["", *p.classes[1:]]), "1 to 1,000 characters"),
    "long class": (lambda p: replace(p, classes=["x" * 1001, *p.classes[1:]]), "1 to 1,000 characters"),
    "class of two lines": (lambda p: replace(p, classes=["a\nb", *p.classes[1:]]), "control characters"),
    "class not UTF-8": (lambda p: replace(p, classes=["caf\udce9", *p.classes[1:]]), "control characters"),
    "classes without head": (lambda p: replace(p, classes=[*p.classes, "more"]), "the head"),
    "image too large": (lambda p: replace(p, image_size=3000), "image_size is 3000"),
    "image size true": (lambda p: replace(p, image_size=True), "image_size is True"),
    "wrong base": (lambda p: replace(p, base="0"), "base is '0'"),
    "mean of a million digits": (lambda p: replace(p, mean=[10**4000] * 3), "mean is"),
    "metric": (lambda p: replace(p, metrics={"accuracy": 10**400}), "metrics is"),
    "metric of two lines": (lambda p: replace(p, metrics={"a\nb": 1}), "metrics is"),
    "huge numbers": (lambda p: scaled(p, 1e30), "beyond 1e+09"),
    "infinity": (lambda p: scaled(p, torch.inf), "NaN, infinity"),
    "complex numbers": (lambda p: typed(p, torch.complex64), "torch.complex64"),
    "8-bit floats": (lambda p: typed(p, torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "tensor of two lines": (lambda p: replace(p, pieces=[{"a\nb": torch.zeros(1)}]), r"'pieces/0/a\nb'"),
    "whole head": (lambda p: headed(p, p.classes, *(p.head[n].long() for n in ("weight", "bias"))), "torch.int64"),
}


def refused(capsys, path, named, *words):
    assert main([str(word) for word in words]) == 2
    out, error = capsys.readouterr()
    assert (named in error, str(path) in error, error.count("\n"), out) == (True, True, 1, ""), error
    assert len(error) < 600


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_patch_is_refused_in_one_line(kind, run, tmp_path, capsys):
    change, named = INVALID[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(change(TaskPatch.load(run / SIGNS)).to_bytes())
    refused(capsys, path, named, "patch", "show", path)


def test_every_command_refuses_an_invalid_patch_and_writes_nothing(run, tmp_path, capsys):
    path, new = tmp_path / "bad.safetensors", tmp_path / "new"
    path.write_bytes(replace(TaskPatch.load(run / SIGNS), task="../patches/00_signs").to_bytes())
    before = {file: file.read_bytes() for folder in (run, tmp_path) for file in folder.rglob("*") if file.is_file()}
    for words in (
        ("patch", "diff", run / SIGNS, path),
        ("patch", "verify", path, "--run_dir", run),
        ("patch", "average", path, path, "--output", new),
        ("patch", "quantize", path, "--output", new),
        ("export", "--run_dir", run, "--patch", path, "--format", "safetensors"),
        ("predict", "--run_dir", run, "--patch", path, "--images", PICTURES[0], "--output", new),
    ):
        refused(capsys, path, "task is '../patches/00_signs'", *words)
    after = {file: file.read_bytes() for folder in (run, tmp_path) for file in folder.rglob("*") if file.is_file()}
    assert after == before


def test_an_invalid_patch_is_not_added_to_a_network(run):
    good, model = TaskPatch.load(run / SIGNS), load(run, tasks=["people"])
    for kind, (change, named) in INVALID.items():
        if kind != "8-bit floats":  # which become 32-bit floats
            with pytest.raises(PatchError, match=re.escape(named)):
                model.add_patch(change(good))
    assert model.tasks == ["people"]


def test_whole_numbers_do_not_fit_a_piece_of_fractions(run, tmp_path, capsys):
    path = tmp_path / "whole.safetensors"
    typed(TaskPatch.load(run / SIGNS), torch.int64).save(path)
    assert patch("verify", path, "--run_dir", run) == 2
    assert "coefficients of Recast as torch.int64" in capsys.readouterr().err


def test_average_is_the_weighted_mean_and_a_patch(run, tmp_path):
    double, output = changed(run, tmp_path / "double.safetensors", 2), tmp_path / "mean.safetensors"
    assert patch("average", run / SIGNS, double, "--weights", "1", "3", "--output", output) == 0
    first, mean = load_file(run / SIGNS), load_file(output)
    for name, tensor in first.items():
        np.testing.assert_allclose(mean[name], 1.75 * tensor.numpy().astype(np.float64), rtol=1e-6)
    assert TaskPatch.load(output).metrics == {}
    assert patch("verify", output, "--run_dir", run) == 0
    assert patch("average", run / SIGNS, run / SIGNS, "--output", output) == 0
    assert all(torch.equal(load_file(output)[name], tensor) for name, tensor in first.items())


def test_average_refuses_patches_that_do_not_belong_together(run, tmp_path, capsys):
    output = tmp_path / "mean.safetensors"
    based = changed(run, tmp_path / "based.safetensors", base="1" * 64)
    for words, named in (
        ([run / SIGNS, run / PEOPLE], ["task", "signs", "people"]),
        ([run / SIGNS, based], ["base", "1111"]),
        ([run / SIGNS, run / SIGNS, "--weights", "1"], ["[1.0]", "2 patches"]),
        ([run / SIGNS, run / SIGNS, "--weights", "0", "0"], ["not all 0"]),
    ):
        assert patch("average", *words, "--output", output) == 2
        error = capsys.readouterr().err
        assert all(name in error for name in named), error
    masks = TaskPatch.load(run / SIGNS).with_tensors(
        TaskPatch.load(run / SIGNS).tensors | {"pieces/0/mask": torch.zeros(4, dtype=torch.uint8)}
    )
    masks.save(tmp_path / "mask.safetensors")
    assert patch("average", tmp_path / "mask.safetensors", "--output", output) == 2
    assert "pieces/0/mask" in capsys.readouterr().err
    assert not output.exists()


def test_quantize_halves_a_patch_and_measures_it(run, tmp_path, capsys):
    output = tmp_path / "half.safetensors"
    assert patch("quantize", run / SIGNS, "--run_dir", run, "--output", output) == 0
    accuracy = json.loads((run / "summary.json").read_text())["tasks"][0]["accuracy"]
    metrics = TaskPatch.load(output).metrics
    assert metrics["accuracy_fp32"] == accuracy
    assert f"{accuracy:.2f} % before, {metrics['accuracy']:.2f} % after" in capsys.readouterr().out
    before, after = load_file(run / SIGNS), load_file(output)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float16
        np.testing.assert_array_equal(tensor, before[name].numpy().astype(np.float16))
    assert patch("verify", output, "--run_dir", run) == 0
    assert patch("quantize", run / SIGNS, "--output", output) == 0
    assert "not measured" in capsys.readouterr().out
    assert "accuracy" not in TaskPatch.load(output).metrics


def test_quantize_writes_compact_patches_and_converts_them_back(run, tmp_path, capsys):
    accuracy = json.loads((run / "summary.json").read_text())["tasks"][0]["accuracy"]
    source, sizes = TaskPatch.load(run / SIGNS), []
    for precision, bits in (("int8", 8), ("int4", 4)):
        small, again, plain = tmp_path / precision, tmp_path / "again", tmp_path / "plain.safetensors"
        assert patch("quantize", run / SIGNS, "--patch_precision", precision, "--output", small) == 0
        read = TaskPatch.load(small)
        assert read.metrics["accuracy_fp32"] == accuracy
        weight = source.head["weight"] - source.head["weight"].mean(0)  # softmax does not see the mean over classes
        half_steps = read.rounded.steps.float()[:, None] / 2
        inside = read.rounded.codes.abs() < 2 ** (bits - 1) - 1
        assert ((read.head["weight"] - weight).abs() <= 1.001 * half_steps)[inside].all()
        for words in (("verify", small, "--run_dir", run), ("diff", run / SIGNS, small), ("show", small)):
            assert patch(*words) == 0
        out = capsys.readouterr().out
        assert f"compact, {bits} bits for each weight of the head" in out
        assert f"{small.stat().st_size:,}" in out
        assert patch("quantize", small, "--patch_precision", precision, "--output", again) == 0
        assert again.read_bytes() == small.read_bytes()
        assert patch("quantize", small, "--patch_precision", "fp32", "--output", plain) == 0
        assert all(tensor.equal(read.tensors[name]) for name, tensor in load_file(plain).items())
        assert patch("average", small, plain, "--output", plain) == 0
        assert load_file(plain)["head/0/weight"].equal(read.head["weight"])
        sizes.append(small.stat().st_size)
    assert sizes[1] < sizes[0] < (run / SIGNS).stat().st_size / 3
    assert patch("quantize", run / SIGNS, "--patch_precision", "int2", "--output", tmp_path / "int2") == 2
    assert "cannot be rounded to int2 without its training images; give the --run_dir" in capsys.readouterr().err
    assert not (tmp_path / "int2").exists()


@pytest.mark.parametrize("precision", ["int8", "int4", "int2"])
def test_quantize_rounds_as_fit_does_where_it_has_the_run(precision, tiny_fit, tmp_path, capsys):
    plain, fitted, small = tmp_path / "plain", tmp_path / "fitted", tmp_path / "small"
    assert main(tiny_fit(run_dir=plain)) == 0
    assert main(tiny_fit("--patch_precision", precision, run_dir=fitted)) == 0
    source = plain / "patches/01_second.safetensors"
    capsys.readouterr()
    words = ("--patch_precision", precision, "--run_dir", plain, "--output", small)
    assert patch("quantize", source, *words) == 0
    wanted, read = TaskPatch.load(fitted / "patches/01_second.recast"), TaskPatch.load(small)
    assert all(tensor.equal(read.stored[name]) for name, tensor in wanted.stored.items())
    before, after = TaskPatch.load(source).metrics["accuracy"], wanted.metrics["accuracy"]
    assert (read.metrics["accuracy_fp32"], read.metrics["accuracy"]) == (before, after)
    assert f"test accuracy {before:.2f} % before, {after:.2f} % after" in capsys.readouterr().out


def test_a_patch_in_half_precision_predicts(run, tmp_path):
    half, labels = tmp_path / "half.safetensors", []
    assert patch("quantize", run / SIGNS, "--output", half) == 0
    for choice in (["--task", "signs"], ["--patch", str(half)]):
        output = tmp_path / "labels.csv"
        images = ["--images", *map(str, PICTURES), "--output", str(output)]
        assert main(["predict", "--run_dir", str(run), *choice, *images]) == 0
        labels.append(np.genfromtxt(output, delimiter=",", skip_header=1, usecols=2))
    np.testing.assert_allclose(labels[0], labels[1], atol=5e-3)
    assert not np.array_equal(*labels)  # the other file was used


def test_quantize_refuses_what_half_precision_cannot_hold(run, tmp_path, capsys):
    large = changed(run, tmp_path / "large.safetensors", 1e7)
    assert patch("quantize", large, "--output", tmp_path / "half.safetensors") == 2
    assert "65,504" in capsys.readouterr().err


def test_predict_needs_a_task_or_a_patch(run, capsys):
    words = ["predict", "--run_dir", str(run), "--images", str(PICTURES[0]), "--output", "labels.csv"]
    assert main(words) == 2
    assert "neither of --task and --patch" in capsys.readouterr().err


@pytest.mark.release
def test_seeds_of_a_real_network_are_averaged_and_measured(tmp_path, capsys):
    files = []
    for seed in ("1", "2"):
        run = learn(["--config", "quickstart.yaml", "--seed_everything", seed], tmp_path / seed, 64)
        files.append(run / SIGNS)
    mean, half = tmp_path / "mean.safetensors", tmp_path / "half.safetensors"
    assert patch("average", *files, "--output", mean) == 0
    assert patch("verify", mean, "--run_dir", run) == 0
    assert patch("quantize", mean, "--run_dir", run, "--output", half) == 0
    assert TaskPatch.load(half).metrics["accuracy"] == pytest.approx(
        TaskPatch.load(half).metrics["accuracy_fp32"], abs=4
    )
