"""Merging tasks: formulas against PEFT and by hand, exactness, files; `patch merge`, `split` and `arithmetic`."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft.utils import merge_utils
from test_all_methods import ISOLATED
from test_mixed import trained

from recast_pl import TaskPatch, load
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.errors import PatchError
from recast_pl.learning.merged_tasks import MergedTasks
from recast_pl.learning.merging import MERGERS, Arithmetic, Consensus, Tall, TaskVectors, Ties, flatten, unflatten
from recast_pl.learning.robust_signature import robust_signature
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.patch_merging import _Judge, start_states

SIGNS, PEOPLE = "patches/00_signs.safetensors", "patches/01_people.safetensors"

LINEAR = {
    *("recast", "scale", "spectral", "tinylora", "bias", "norm", "finetune", "headscale", "loraxs", "atlas"),
    *("melo", "lora-r2", "lora-shared", "probe", "dropin"),
}


def patch(*words):
    return main(["patch", *map(str, words)])


def merge(method, *files, run, output, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return patch("merge", "--method", method, *files, "--run_dir", run, "--output", output, *words)


@pytest.fixture
def changed(tiny_run, tmp_path):
    """Patches of the tasks `first` and `second` of `tiny_run`, which change all of their 48 numbers."""
    files, generator = [], torch.Generator().manual_seed(0)
    for source in sorted((tiny_run / "patches").iterdir()):
        found = TaskPatch.load(source)
        (state,) = found.pieces
        state = {
            name: t + 0.1 * t.abs().mean() * torch.randn(t.shape, generator=generator) for name, t in state.items()
        }
        files.append(tmp_path / source.name)
        replace(found, pieces=[state]).save(files[-1])
    return files


def vectors(tasks=3, count=50):
    generator = torch.Generator().manual_seed(0)
    start, tuned = (torch.randn(*shape, count, generator=generator).double() for shape in ((), (tasks,)))
    return TaskVectors(start, tuned)


class Knows:
    """A judge that likes numbers close to known ones."""

    def __init__(self, wanted):
        self.wanted, self.seen = wanted, []

    def score(self, index, numbers):
        self.seen.append((index, numbers))
        return 0.5, -float((numbers - self.wanted[index]).square().sum())


def test_arithmetic_and_ties_are_those_of_peft():
    known = vectors()
    weights, changes = torch.full((3,), 0.4, dtype=torch.float64), list(known.changes)
    found = Arithmetic(0.4).merge(known, Knows([])).numbers
    torch.testing.assert_close(found - known.start, merge_utils.task_arithmetic(changes, weights))
    for keep in (0.2, 0.5):
        found = Ties(0.4, keep).merge(known, Knows([])).numbers
        torch.testing.assert_close(found - known.start, merge_utils.ties(changes, weights, keep))


def test_the_scale_is_the_best_on_validation_images():
    known = vectors(tasks=2)
    wanted = known.start + 0.35 * known.changes.sum(0)
    judge = Knows([wanted, wanted])
    assert Arithmetic().merge(known, judge).settings == {"scale": 0.35}
    assert len(judge.seen) == 2 * 20


def tall_by_hand(known, factors):
    start, tuned = known.start.numpy(), known.tuned.numpy()
    merged = start + sum(each - start for each in tuned)
    masks = [abs(start - each) > f * abs(merged - each) for each, f in zip(tuned, factors, strict=True)]
    return merged, np.array(masks)


def test_tall_masks_by_hand_with_the_best_factor_of_each_task():
    known, factors = vectors(), (0.2, 0.6, 0.4)
    merged, masks = tall_by_hand(known, factors)
    wanted = torch.from_numpy(np.where(masks, merged, known.start))
    found = Tall().merge(known, Knows(wanted))
    assert found.settings == {"factors": list(factors)}
    assert (found.masks.numpy() == masks).all()
    np.testing.assert_allclose(found.numbers, merged, rtol=1e-12)
    np.testing.assert_allclose(found.of_task(1, known.start), wanted[1], rtol=1e-12)


def test_consensus_by_hand_keeps_what_two_tasks_use():
    known, factors = vectors(), (0.3, 0.5, 0.2)
    merged, masks = tall_by_hand(known, factors)
    judge = Knows(torch.from_numpy(np.where(masks, merged, known.start)))
    found = Consensus(scale=0.7).merge(known, judge)
    both = masks.sum(0) >= 2
    assert 0 < both.sum() < len(both)
    wanted = known.start.numpy() + 0.7 * both * (known.tuned - known.start).sum(0).numpy()
    np.testing.assert_allclose(found.numbers, wanted, rtol=1e-12)
    assert found.masks is None


def weights(network):
    """All weights as the network uses them, by name."""
    found = {}
    for path, module in network.named_modules():
        if hasattr(module, "parametrizations"):
            found |= {f"{path}.{name}": getattr(module, name).detach().clone() for name in module.parametrizations}
        if "parametrizations" not in path:
            found |= {f"{path}.{name}": p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    return found


def weights_of(module, state):
    for piece, tensors in zip(module.pieces, state, strict=True):
        piece.load_task_state(tensors)
    return weights(module.backbone.net)


@pytest.mark.parametrize("name", ISOLATED)
@torch.no_grad()
def test_merged_numbers_give_merged_weights(name):
    module, (first, second, _) = trained(name)
    if not all(piece.linear or not state for piece, state in zip(module.pieces, first, strict=True)):
        assert name.rpartition("-")[0] not in LINEAR
        return
    if any(type(piece).__name__ == "LoRA" for piece in module.pieces):
        second = start_states(module.pieces)  # between this and a task, the changes keep their rank
    between = [
        piece.from_numbers({n: (one[n] + two[n]) / 2 for n in one})
        for piece, one, two in zip(
            module.pieces,
            *([p.numbers(s) for p, s in zip(module.pieces, states, strict=True)] for states in (first, second)),
            strict=True,
        )
    ]
    one, two, found = (weights_of(module, state) for state in (first, second, between))
    assert one.keys() == found.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, (one[key] + two[key]) / 2, rtol=1e-4, atol=1e-5)
    assert name.startswith("p") or any((one[key] != two[key]).any() for key in one)


def test_states_become_vectors_and_come_back():
    states = [{"b": torch.rand(2, 3), "a": torch.rand(4)}, {}, {"c": torch.rand(1)}]
    numbers = flatten(states)
    assert numbers.dtype == torch.float64
    assert numbers[:4].float().equal(states[0]["a"])
    for state, back in zip(states, unflatten(numbers, like=states), strict=True):
        assert state.keys() == back.keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in state.items())


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_one_task_gives_its_own_bytes(precision, clipart_run, tmp_path, capsys):
    source, output, run = tmp_path / "signs", tmp_path / "merged", clipart_run
    assert patch("quantize", run / SIGNS, "--patch_precision", precision, "--output", source) == 0
    for method, options in (("arithmetic", {"scale": 1}), ("ties", {"keep": 1})):
        assert merge(method, source, run=run, output=output, **options) == 0
        assert output.read_bytes() == source.read_bytes()
    assert merge("tall", source, run=run, output=output) == 0
    assert patch("split", output, "--run_dir", run, "--output", tmp_path / "split") == 0
    (path,) = (tmp_path / "split").iterdir()
    assert path.read_bytes() == source.read_bytes()
    assert path.name == {"fp32": "signs.safetensors", "int4": "signs.recast"}[precision]


@pytest.mark.parametrize("method", MERGERS)
def test_merged_tasks_are_measured_and_split_into_patches(method, clipart_run, tmp_path, capsys):
    run, output, folder = clipart_run, tmp_path / "merged.safetensors", tmp_path / "split"
    options = {"adamerging": {"steps": 2}}.get(method, {})
    capsys.readouterr()
    assert merge(method, run / SIGNS, run / PEOPLE, run=run, output=output, **options) == 0
    rows = re.findall(r"(signs|people) +([\d.]+) +([\d.]+) +([+-][\d.]+)", capsys.readouterr().out)
    assert [row[0] for row in rows] == ["signs", "people"]
    assert output.stat().st_size < (run / SIGNS).stat().st_size + (run / PEOPLE).stat().st_size
    assert patch("split", output, "--run_dir", run, "--output", folder) == 0
    for (task, alone, together, _), name in zip(rows, (SIGNS, PEOPLE), strict=True):
        before, after = TaskPatch.load(run / name), TaskPatch.load(folder / f"{task}.safetensors")
        assert f"{before.metrics['accuracy']:.2f}" == alone
        assert f"{after.metrics['accuracy']:.2f}" == together
        assert all(torch.equal(after.head[key], value) for key, value in before.head.items())
        labels = tmp_path / f"{task}.csv"
        words = [
            "--patch",
            folder / f"{task}.safetensors",
            "--images",
            ROOT / "data/clipart" / task,
            "--output",
            labels,
        ]
        assert main(["predict", "--run_dir", str(run), *map(str, words)]) == 0
        assert set(np.loadtxt(labels, str, delimiter=",", skiprows=1)[:, 1]) <= set(before.classes)


def test_merged_coefficients_by_hand(changed, tiny_run, tmp_path):
    files, folder = changed, tmp_path / "split"
    (state,) = start_states(load(tiny_run)._module.pieces)
    start, (first, second) = (
        state["coefficients"].double(),
        [TaskPatch.load(file).pieces[0]["coefficients"].double() for file in files],
    )
    assert (first != second).all()
    wanted = {
        "arithmetic": start + 0.4 * (first - start) + 0.4 * (second - start),
        "ties": start + merge_utils.ties([first - start, second - start], torch.ones(2), 0.2),
    }
    for method, options in (("arithmetic", {"scale": 0.4}), ("ties", {})):
        assert merge(method, *files, run=tiny_run, output=tmp_path / "merged", **options) == 0
        assert patch("split", tmp_path / "merged", "--run_dir", tiny_run, "--output", folder) == 0
        for task in ("first", "second"):
            found = TaskPatch.load(folder / f"{task}.safetensors").pieces[0]["coefficients"]
            torch.testing.assert_close(found, wanted[method].float(), rtol=1e-5, atol=1e-6)


def test_adamerging_moves_every_factor_by_its_rate_and_lowers_the_entropy(changed, tiny_run):
    run, init = open_run(str(tiny_run), torch.device("cpu"))
    restore(init.model, RunFolder(run), 32)
    init.data.prepare_data()
    patches = [TaskPatch.load(file) for file in changed]
    judge = _Judge(init.model, init.data, patches, TrainerFactory(init.trainer).for_evaluation())
    start, changes = judge.vectors.start, judge.vectors.changes

    first = judge.refine(steps=1, scale=0.3) - start
    checked = 0
    for part, own in zip(first.split(2), changes.split(2, 1), strict=True):  # two numbers for each weight
        if torch.linalg.cond(own) < 100:
            factors = torch.linalg.solve(own.T, part)
            np.testing.assert_allclose((factors - 0.3).abs(), 1e-3, rtol=0.05)
            checked += 1
    assert checked > 10

    def entropy(numbers):
        found = 0.0
        for index in range(2):
            images = judge._unlabelled(index)
            init.model.activate(judge.patch(index, numbers))
            logits = init.model(images).double()
            found += -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()
        return found

    with torch.no_grad():
        before = entropy(start + 0.3 * changes.sum(0))
    refined = judge.refine(steps=50, scale=0.3)
    with torch.no_grad():
        assert entropy(refined) < before


def test_heads_of_few_bits_stay_so(clipart_run, tmp_path):
    run, files = clipart_run, []
    for name in (SIGNS, PEOPLE):
        files.append(tmp_path / name.removeprefix("patches/"))
        assert patch("quantize", run / name, "--patch_precision", "int4", "--output", files[-1]) == 0
    assert merge("ties", *files, run=run, output=tmp_path / "merged") == 0
    merged = MergedTasks.load(tmp_path / "merged")
    assert merged.bits == 4
    assert patch("split", tmp_path / "merged", "--run_dir", run, "--output", tmp_path / "split") == 0
    for file, task in zip(files, ("signs", "people"), strict=True):
        before, after = TaskPatch.load(file), TaskPatch.load(tmp_path / "split" / f"{task}.recast")
        assert after.rounded.codes.equal(before.rounded.codes)
        assert after.classes == before.classes


def test_without_images_settings_are_given_and_nothing_is_measured(changed, tiny_run, tmp_path, capsys):
    run, files, output = tmp_path / "copy", changed, tmp_path / "merged"
    shutil.copytree(tiny_run, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_run.parent), str(tmp_path / "nowhere")))
    for method in ("arithmetic", "tall", "adamerging"):
        assert merge(method, *files, run=run, output=output) == 2
        assert "no validation images here" in capsys.readouterr().err
        assert not output.exists()
    assert merge("ties", *files, run=run, output=output) == 0
    assert capsys.readouterr().out.count("not measured") == 2
    assert all(task.metrics == {} for task in MergedTasks.load(output).tasks)


REFUSED = {
    "same task": (["--method", "ties", SIGNS, SIGNS], "two patches are of task 'signs'"),
    "keep 0": (["--method", "ties", SIGNS, PEOPLE, "--keep", "0"], "keep=0.0 must be above 0"),
    "other option": (["--method", "tall", SIGNS, "--scale", "1"], "--scale 1.0 has no meaning for --method tall"),
    "one task": (["--method", "consensus", SIGNS], "needs at least two tasks"),
    "no steps": (["--method", "adamerging", SIGNS, PEOPLE, "--steps", "0"], "steps=0 must be at least 1"),
    "unknown": (["--method", "magic", SIGNS], "arithmetic"),
    "missing": (["--method", "ties", "nowhere.safetensors"], "does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line(case, clipart_run, tmp_path, capsys):
    words, error = REFUSED[case]
    words = [str(clipart_run / word) if word.startswith("patches/") else word for word in words]
    assert patch("merge", *words, "--run_dir", clipart_run, "--output", tmp_path / "out") == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_of_other_runs_and_of_methods_that_are_not_linear_are_refused(clipart_run, tiny_fit, tmp_path, capsys):
    other = replace(TaskPatch.load(clipart_run / PEOPLE), base="0" * 64)
    other.save(tmp_path / "other")
    assert merge("ties", clipart_run / SIGNS, tmp_path / "other", run=clipart_run, output=tmp_path / "out") == 2
    assert "belongs to base 0000" in capsys.readouterr().err
    assert main(tiny_fit("--config", "methods/adaptformer.yaml", "--trainer.max_epochs", "1")) == 0
    files = sorted((tmp_path / "run" / "patches").iterdir())
    assert merge("ties", *files, run=tmp_path / "run", output=tmp_path / "out") == 2
    assert "AdaptFormer cannot be merged, because the weights are not linear" in capsys.readouterr().err


def test_lora_is_merged_by_the_closest_factors_but_gets_no_masks(tiny_fit, tmp_path, capsys):
    assert main(tiny_fit("--config", "methods/melo.yaml", "--trainer.max_epochs", "1")) == 0
    run, folder = tmp_path / "run", tmp_path / "split"
    files = sorted((run / "patches").iterdir())
    assert merge("arithmetic", *files, run=run, output=tmp_path / "out", scale=0.5) == 0
    assert patch("split", tmp_path / "out", "--run_dir", run, "--output", folder) == 0
    own = [TaskPatch.load(file).pieces[0] for file in files]
    (first, second), found = own, TaskPatch.load(next(iter(folder.iterdir()))).pieces[0]
    for name in (key.removesuffix(":A") for key in first if key.endswith(":A")):
        changes = [state[f"{name}:B"].double() @ state[f"{name}:A"].double() for state in (first, second, found)]
        for one, two, closest in zip(*changes, strict=True):
            left, values, right = np.linalg.svd((one + two).numpy() / 2)
            np.testing.assert_allclose(closest, values[0] * np.outer(left[:, 0], right[0]), atol=1e-6)
    for method in ("tall", "adamerging"):
        assert merge(method, *files, run=run, output=tmp_path / "none") == 2
        assert f"{method} does not work with LoRA" in capsys.readouterr().err


def test_a_damaged_file_is_refused(clipart_run, tmp_path, capsys):
    path, run = tmp_path / "merged", clipart_run
    assert merge("tall", run / SIGNS, run / PEOPLE, run=run, output=path) == 0
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert patch("split", path, "--run_dir", run, "--output", tmp_path) == 2
    assert "checksum" in capsys.readouterr().err
    assert patch("split", run / SIGNS, "--run_dir", run, "--output", tmp_path) == 2
    assert "not merged tasks" in capsys.readouterr().err
    path.write_bytes(content)
    assert patch("show", path) == 2
    assert "not a patch" in capsys.readouterr().err
    merged = MergedTasks.load(path)
    replace(merged, masks=merged.masks.repeat(1, 2)).save(path)  # of a run with 8 numbers
    with pytest.raises(PatchError, match="masks have 16 bits for 8 numbers"):
        MergedTasks.load(path)


# robust weight signatures


def test_a_signature_is_the_authors_projection_in_the_first_layers():
    generator = torch.Generator().manual_seed(0)
    robust, clean = ([torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    clean[1].zero_()
    first, second, third = robust_signature(robust, clean, 2)
    row = clean[0].reshape(1, -1).numpy()
    projection = row.T @ row / (row @ row.T)
    np.testing.assert_allclose(first.flatten(), (np.eye(6) - projection) @ robust[0].flatten().numpy(), rtol=1e-12)
    assert torch.equal(second, robust[1])
    assert not third.any()


def add(robust, clean, *files, run, output, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    tasks = ("--robust", robust, "--clean", clean, "--run_dir", run)
    return patch("arithmetic", *files, *tasks, "--output", output, *words)


def test_robustness_is_added_to_the_first_layers_of_tasks(changed, tiny_run, tmp_path, capsys):
    first, second = changed
    clean = tiny_run / "patches" / first.name
    for name, options in (("all", {"scale": 0.5, "layers": 24}), ("some", {}), ("none", {"scale": 0})):
        assert add(first, clean, second, run=tiny_run, output=tmp_path / name, **options) == 0
        assert "changed" in capsys.readouterr().out
    module = load(tiny_run)._module
    found = {
        name: weights_of(module, TaskPatch.load(tmp_path / name / "second.safetensors").pieces)
        for name in ("all", "some")
    }
    start, robust, plain, task = (
        weights_of(module, state)
        for state in (start_states(module.pieces), *(TaskPatch.load(file).pieces for file in (first, clean, second)))
    )
    keys = [key for key, weight in robust.items() if not torch.equal(weight, start[key])]
    assert len(keys) == 24
    for place, key in enumerate(keys):
        # weights are linear in two numbers each, which lie in the plane of the changes
        part = found["all"][key] - task[key]
        numbers, *_ = np.linalg.lstsq(
            torch.stack([(robust[key] - start[key]).flatten(), (plain[key] - start[key]).flatten()], 1).numpy(),
            (2 * part).flatten().numpy(),
            rcond=None,
        )
        assert numbers[0] == pytest.approx(1, abs=1e-3)
        assert torch.equal(found["some"][key], task[key]) == (place >= 7)
    before, after = (TaskPatch.load(path) for path in (second, tmp_path / "none" / "second.safetensors"))
    assert torch.equal(before.pieces[0]["coefficients"], after.pieces[0]["coefficients"])
    assert all(torch.equal(before.head[name], after.head[name]) for name in before.head)
    assert add(first, clean, second, run=tiny_run, output=tmp_path / "huge", scale=1e300) == 2
    assert "scale=1e+300 makes numbers that no patch can hold" in capsys.readouterr().err
    assert not (tmp_path / "huge").exists()


def test_what_has_no_layers_to_add_is_refused(clipart_run, tiny_fit, tmp_path, capsys):
    run, out = clipart_run, tmp_path / "out"
    assert add(run / SIGNS, run / SIGNS, run / PEOPLE, run=run, output=out, layers=0) == 2
    assert "layers=0 must be at least 1" in capsys.readouterr().err
    assert add(run / SIGNS, run / SIGNS, run / PEOPLE, run / PEOPLE, run=run, output=out) == 2
    assert "two patches are of task 'people'" in capsys.readouterr().err
    assert main(tiny_fit("--config", "methods/melo.yaml", "--trainer.max_epochs", "1")) == 0
    one, other = sorted((tmp_path / "run" / "patches").iterdir())
    assert add(one, one, other, run=tmp_path / "run", output=out) == 2
    assert (
        "patch arithmetic does not work with LoRA, whose patches keep factors of the weights" in capsys.readouterr().err
    )
    assert not out.exists()
