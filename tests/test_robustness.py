"""The command `robustness`: its numbers, and corruptions, attacks and calibration against numbers from elsewhere."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_words
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from recast_pl import Corruption, TaskPatch
from recast_pl.cli import main
from recast_pl.data.corruptions import CORRUPTIONS, Condition, check_size, degradations, degrade
from recast_pl.data.images import decode_file
from recast_pl.errors import DataError
from recast_pl.learning.attacks import pgd
from recast_pl.learning.calibration import calibration_error, fit_temperature
from recast_pl.runs.metrics import final_accuracies
from recast_pl.studies.robustness import paired_difference

TASKS = ("signs", "people")
FEW = ["--epsilons", "1", "8", "--pgd_steps", "3"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Runs of a probe with two seeds, and of RECAST with one of them, and the output of `robustness`."""
    folder = tmp_path_factory.mktemp("robustness")
    tasks = [{"name": name, "path": f"data/clipart/{name}", "images": 40} for name in TASKS]
    words, probe = tiny_words(folder), ["--config", "methods/probe.yaml"]
    runs = {"probe/7": probe, "probe/8": probe, "recast/7": ["--model.optimizer.init_args.lr", "0.05"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, more in runs.items():
            run = folder / "runs" / name
            shared = ["--data.tasks", json.dumps(tasks), "--trainer.max_epochs", "1", "--seed_everything", name[-1]]
            assert main(words(*more, *shared, run_dir=run)) == 0
        output = folder / "runs" / "robustness"
        assert main(["robustness", "--run_dir", str(folder / "runs"), "--output", str(output), *FEW]) == 0
    return folder / "runs"


@pytest.fixture(scope="module")
def content(compared):
    return json.loads((compared / "robustness" / "robustness.json").read_text())


@pytest.fixture(scope="module")
def rows(compared):
    with (compared / "robustness" / "robustness.csv").open() as file:
        return list(csv.DictReader(file))


def mean_of(rows, run, seed, *conditions):
    """The mean over tasks of the mean over conditions, from the CSV."""
    chosen = [r for r in rows if (r["run"], r["seed"]) == (run, seed) and r["condition"] in conditions]
    tasks = {row["task"] for row in chosen}
    return np.mean([np.mean([float(r["accuracy"]) for r in chosen if r["task"] == task]) for task in tasks])


def test_every_task_meets_every_condition(content, rows):
    levels = {}
    for row in rows:
        if (row["run"], row["seed"], row["task"]) == ("recast", "7", "people"):
            levels.setdefault(row["condition"], []).append(row["level"])
    assert levels.pop("clean") == ["0"]
    assert levels.pop("resolution") == ["0.5", "0.25", "0.125"]
    assert levels.pop("jpeg") == ["75", "50", "25", "10"]
    assert levels.pop("fgsm") == levels.pop("pgd") == ["1", "8"]
    assert len(levels) == 15
    assert all(values == ["1", "2", "3", "4", "5"] for values in levels.values())
    assert {name: list(runs) for name, runs in content["runs"].items()} == {"probe": ["7", "8"], "recast": ["7"]}


@pytest.mark.parametrize(("name", "seed"), [("probe", "7"), ("probe", "8"), ("recast", "7")])
def test_accuracy_on_images_as_they_are_is_that_of_the_run(name, seed, content, compared):
    summary = json.loads((compared / name / seed / "summary.json").read_text())
    tasks = content["runs"][name][seed]["tasks"]
    assert {task: scores["accuracy"]["clean"]["0"] for task, scores in tasks.items()} == final_accuracies(summary)
    assert [scores["images"] for scores in tasks.values()] == [task["test_images"] for task in summary["tasks"]]


def test_differences_and_mce_follow_from_the_accuracies(content, rows):
    found = content["differences"]["recast"]
    assert list(content["differences"]) == ["recast"]  # the probe is the first, and so the baseline
    lost = {}
    for measure, kinds in {"clean": ["clean"], "corrupted": CORRUPTIONS, "PGD": ["pgd"]}.items():
        lost[measure] = mean_of(rows, "recast", "7", *kinds) - mean_of(rows, "probe", "7", *kinds)  # the common seed
        assert found[measure]["mean"] == pytest.approx(lost[measure], abs=1e-3)
    assert found["corrupted − clean"]["mean"] == pytest.approx(lost["corrupted"] - lost["clean"], abs=2e-3)
    for difference in found.values():
        low, high = difference["interval"]
        assert low <= difference["mean"] <= high
        assert low + high == pytest.approx(2 * difference["mean"], abs=1e-3)


def test_the_page_has_mce_relative_to_the_baseline(compared, rows):
    ratios = []
    for kind in CORRUPTIONS:
        theirs = np.mean([100 - mean_of(rows, "probe", seed, kind) for seed in "78"])
        ratios.append(100 * (100 - mean_of(rows, "recast", "7", kind)) / theirs)
    text = (compared / "robustness" / "robustness.md").read_text()
    header, _, probe, recast = text[text.index("| run | seeds") :].splitlines()[:4]
    column = header.split("|").index(" mCE % ")
    assert probe.split("|")[column].strip() == "100.0"
    assert float(recast.split("|")[column]) == pytest.approx(np.mean(ratios), abs=0.06)
    assert (compared / "robustness" / "figures" / "robustness.png").stat().st_size > 10_000


def test_other_batches_give_the_same_numbers(compared, content, tmp_path):
    shutil.copytree(compared / "recast" / "7", run := tmp_path / "recast")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("batch_size: 4", "batch_size: 3"))
    assert main(["robustness", "--run_dir", str(run), "--output", str(tmp_path / "out"), *FEW]) == 0
    again = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert again["differences"] == {}
    assert again["runs"]["recast"]["7"]["tasks"] == content["runs"]["recast"]["7"]["tasks"]


def test_images_are_a_limit_for_each_task(compared, tmp_path):
    words = ["--run_dir", str(compared / "recast" / "7"), "--output", str(tmp_path), "--images", "2", *FEW]
    assert main(["robustness", *words]) == 0
    found = json.loads((tmp_path / "robustness.json").read_text())
    tasks = found["runs"]["recast"]["7"]["tasks"].values()
    assert [task["images"] for task in tasks] == [2, 2]
    assert "at most 2 of each task" in (tmp_path / "robustness.md").read_text()


def test_the_report_of_the_runs_has_a_part_about_it(compared, tmp_path):
    assert main(["report", "--runs", str(compared), "--output", str(tmp_path)]) == 0
    page, alone = (p.read_text() for p in (tmp_path / "report.md", compared / "robustness" / "robustness.md"))
    table = alone[alone.index("| run | seeds") :].split("\n\n")[0]
    assert "## Robustness, " in page
    assert table in page
    assert (tmp_path / "figures" / "robustness_0.png").is_file()


def test_mistakes_are_named_before_anything_is_measured(compared, tmp_path, capsys, monkeypatch):
    def refused(*more):
        words = ["robustness", "--run_dir", str(compared), "--output", str(tmp_path / "none"), *more]
        assert main(words) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "--images 0 must be at least 1" in refused("--images", "0")
    assert "--pgd_steps 0 must be at least 1" in refused("--pgd_steps", "0")
    assert "--epsilons -1 must be above 0" in refused("--epsilons", "-1")
    assert "--baseline 'lora' is not one of the runs; choose from probe, recast" in refused("--baseline", "lora")
    shutil.copytree(compared / "probe" / "7", tmp_path / "probe")
    assert "two runs are named 'probe'" in refused("--run_dir", str(compared / "probe" / "7"), str(tmp_path / "probe"))
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert 'pip install "recast-pl[robustness]"' in refused()


def test_runs_on_other_images_cannot_be_paired(compared, tmp_path, capsys):
    run, tasks = tmp_path / "other", json.dumps([{"name": "signs", "path": "data/clipart/signs", "images": 50}])
    few = ["--config", "methods/probe.yaml", "--seed_everything", "7", "--data.tasks", tasks]
    assert main(tiny_words(tmp_path)(*few, run_dir=run)) == 0
    runs = ["--run_dir", str(compared / "probe" / "7"), str(run), "--images", "1", "--epsilons", "1"]
    assert main(["robustness", *runs, "--output", str(tmp_path / "out"), "--pgd_steps", "1"]) == 2
    assert "has other test images of task 'signs' than probe" in capsys.readouterr().err


# -- corruptions --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Three images of clip art (3, 3, 48, 48) in [0, 1]."""
    paths = sorted((ROOT / "data" / "clipart" / "food").rglob("*.jpg"))[::40][:3]
    return torch.stack([decode_file(path, 48) for path in paths]) / 255


def test_corruptions_grow_with_severity_and_depend_on_no_other_image(pictures):
    changes = degradations()
    assert len(changes) == 75 + 3 + 4
    np.random.seed(3)
    expected = np.random.RandomState(3).rand()
    changed = {c: degrade(pictures, c, change, "food", [5, 6, 7]) for c, change in changes.items()}
    assert np.random.rand() == expected  # NumPy's global generator goes on as before
    for condition, change in changes.items():
        images = changed[condition]
        assert images.shape == pictures.shape
        assert images.min() >= 0
        assert images.max() <= 1
        assert torch.equal(degrade(pictures[1:2], condition, change, "food", [6]), images[1:2])
    for kind in CORRUPTIONS:
        weak, strong = (float((changed[Condition(kind, s)] - pictures).abs().mean()) for s in (1, 5))
        assert 0 < weak < strong, kind
    noise = Condition("gaussian_noise", 3)
    assert not torch.equal(degrade(pictures[:1], noise, changes[noise], "food", [6]), changed[noise][:1])


def test_gaussian_noise_and_contrast_have_the_published_strength():
    """From the paper's code: a standard deviation of 0.08 to 0.38, and a contrast of 0.4 to 0.05."""
    changes, grey = degradations(), torch.full((1, 3, 96, 96), 128 / 255)
    for severity, deviation in enumerate((0.08, 0.12, 0.18), 1):
        condition = Condition("gaussian_noise", severity)
        assert float(degrade(grey, condition, changes[condition], "t", [0]).std()) == pytest.approx(deviation, rel=0.03)
    halves = torch.cat([torch.full((1, 3, 64, 32), 0.2), torch.full((1, 3, 64, 32), 0.8)], 3)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        condition = Condition("contrast", severity)
        flat = degrade(halves, condition, changes[condition], "t", [0])
        assert float(flat.max() - flat.min()) == pytest.approx(0.6 * factor, abs=0.005)


def test_training_images_are_corrupted_as_test_images_are(pictures, tiny_fit, tmp_path, capsys):
    image = (pictures[0] * 255).round().to(torch.uint8)
    for kind, level in (("fog", 2), ("resolution", 0.25), ("jpeg", 10)):
        torch.manual_seed(4)
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(4)
        assert torch.equal(Corruption(kind, level)(image), degradations()[Condition(kind, level)](image, seed))
    for settings, error in (
        ({"kind": "fog", "level": 6}, "corruption fog has no level 6; choose one of 1, 2, 3, 4, 5"),
        ({"kind": "rain"}, "there is no corruption 'rain'; choose gaussian_noise"),
    ):
        words = json.dumps([{"class_path": "recast_pl.Corruption", "init_args": settings}])
        assert main(tiny_fit("--data.transforms", words)) == 2
        found = capsys.readouterr().err
        assert error in found
        assert found.count("\n") == 1
    few = ("--trainer.max_epochs", "1", "--data.num_workers", "1", "--model.head", "sgd")
    fog = json.dumps([{"class_path": "recast_pl.Corruption", "init_args": {"kind": "fog"}}])
    assert main(tiny_fit(*few)) == 0
    assert main(tiny_fit(*few, "--data.transforms", fog, run_dir=tmp_path / "foggy")) == 0
    patches = [TaskPatch.load(tmp_path / run / "patches" / "00_first.safetensors") for run in ("run", "foggy")]
    assert not torch.equal(*(patch.head["weight"] for patch in patches))


def test_small_images_are_refused():
    check_size((32, 64))
    with pytest.raises(DataError, match="at least 32 pixels on a side, and the run has 24×24"):
        check_size(24)


# -- attacks ------------------------------------------------------------------------------------------------


@pytest.fixture
def attacked():
    """A small network, images and labels; two channels of one image are at the borders of [0, 1]."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    images = torch.rand(6, 3, 12, 12)
    images[0, 0], images[0, 1] = 0.0, 1.0
    return network, images, torch.tensor([0, 1, 2, 3, 0, 1])


def losses(network, images, labels):
    with torch.no_grad():
        return F.cross_entropy(network(images), labels, reduction="none")


def test_one_step_is_fgsm_by_hand(attacked):
    network, images, labels = attacked
    leaf = images.clone().requires_grad_()
    F.cross_entropy(network(leaf), labels, reduction="sum").backward()
    expected = (images + 2 / 255 * leaf.grad.sign()).clamp(0, 1)
    assert torch.allclose(pgd(network, images, labels, 2 / 255, 1), expected, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.25 / 255, 4 / 255, 40 / 255])
def test_pgd_stays_within_epsilon_and_is_never_weaker_than_fgsm(steps, epsilon, attacked):
    network, images, labels = attacked
    fast, slow = (pgd(network, images, labels, epsilon, count) for count in (1, steps))
    assert (slow - images).abs().max() <= epsilon + 1e-7
    assert slow.min() >= 0
    assert slow.max() <= 1
    assert (losses(network, slow, labels) >= losses(network, fast, labels) - 1e-6).all()
    assert (losses(network, fast, labels) > losses(network, images, labels)).all()
    assert not slow.requires_grad


def test_pgd_finds_what_one_large_step_misses():
    """The loss rises towards x = 0.53, and falls beyond; FGSM of 0.1 jumps over it."""

    def network(images):
        distance = (images - 0.53).square().flatten(1).sum(1)
        return torch.stack([100 * distance, torch.zeros_like(distance)], 1)

    image, label = torch.full((1, 3, 1, 1), 0.5), torch.tensor([0])
    fast, slow = (pgd(network, image, label, 0.1, steps) for steps in (1, 20))
    assert torch.allclose(fast, torch.full_like(image, 0.6))
    assert (slow - 0.53).abs().max() < 0.013  # the length of a step is 0.0125
    assert losses(network, slow, label) > losses(network, fast, label) + 0.1


def test_an_attack_of_a_batch_attacks_each_image_alone(attacked):
    network, images, labels = attacked
    together = pgd(network, images, labels, 4 / 255, 4)
    alone = torch.cat([pgd(network, images[i : i + 1], labels[i : i + 1], 4 / 255, 4) for i in range(len(images))])
    assert torch.allclose(together, alone, atol=1e-6)


# -- calibration and intervals ------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.97, 0.35, 0.38, 0.39])
    correct = torch.tensor([True, False, True, True, False])
    # bins of 1/15: the first two are in (14/15, 1], the others in (5/15, 6/15]
    by_hand = 2 / 5 * abs(0.96 - 1 / 2) + 3 / 5 * abs((0.35 + 0.38 + 0.39) / 3 - 2 / 3)
    assert calibration_error(confidence, correct) == pytest.approx(100 * by_hand, abs=1e-4)


def test_calibration_error_is_that_of_all_classes():
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(2))
    confidence, predicted = logits.softmax(1).max(1)
    whole = 100 * float(multiclass_calibration_error(logits, labels, num_classes=5, n_bins=15))
    assert calibration_error(confidence, predicted == labels) == pytest.approx(whole, abs=1e-4)


def test_the_temperature_undoes_a_factor_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    one, three = fit_temperature(logits, labels), fit_temperature(3 * logits, labels)
    assert one == pytest.approx(1, abs=0.08)
    assert three == pytest.approx(3 * one, rel=1e-3)
    grid = np.linspace(0.8, 1.2, 401)
    assert one == pytest.approx(min(grid, key=lambda t: float(F.cross_entropy(logits / t, labels))), abs=2e-3)


def test_a_task_without_errors_keeps_a_finite_temperature():
    assert 0.05 <= fit_temperature(torch.eye(3) * 5, torch.arange(3)) < 0.2  # from there on the loss is 0


def test_the_interval_of_one_seed_is_that_of_means_over_images():
    first, second = np.array([1.0, 0.0, 0.5, -1.0]), np.array([0.0, 1.0, 1.0])
    mean, (low, high) = paired_difference(
        [("a", range(4), torch.from_numpy(first)), ("b", range(3), torch.from_numpy(second))]
    )
    error = math.sqrt((first.var(ddof=1) / 4 + second.var(ddof=1) / 3) / 4)
    assert mean == pytest.approx(100 * (first.mean() + second.mean()) / 2, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(100 * 1.959964 * error, abs=1e-3)


def test_images_that_two_seeds_share_count_once():
    values = torch.tensor([1.0, 0.0, 0.5, -1.0]).double()
    once, (low, high) = paired_difference([("a", range(4), values)])
    twice, same = paired_difference([("a", range(4), values), ("a", range(4), values)])
    _, (left, right) = paired_difference([("a", range(4), values), ("a", range(4, 8), values)])
    assert once == twice
    assert same == (low, high)
    assert right - left == pytest.approx((high - low) / math.sqrt(2), abs=1e-3)
