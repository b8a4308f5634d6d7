"""Tasks with rare classes and with wrong labels."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data import sources
from recast_pl.data.imbalance import Imbalance
from recast_pl.data.label_noise import LabelNoise

SPLITS = ("train", "val", "test")


def images_of(task=None, **settings):
    data = SequentialTaskDataModule([task or TaskConfig("digits")], **{"image_size": 8, "cache": "ram"} | settings)
    data.setup("fit")
    return data._images


def counts(images, split="train"):
    return np.bincount(images.source.labels[images.splits[split]], minlength=len(images.source.classes))


def by_name(images, split):
    """The label that each image of a split is used with, by its name."""
    return {images.source.names[i]: int(images.source.labels[i]) for i in images.splits[split].tolist()}


@pytest.mark.parametrize(
    ("kind", "ratio", "wanted"),
    [  # of 500 images in each of 10 classes, as long-tailed CIFAR-10 is printed and `int(500·0.01^(i/9))` gives
        ("exponential", 100, [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]),
        ("exponential", 10, [500, 387, 299, 232, 179, 139, 107, 83, 64, 50]),
        ("step", 100, [500] * 5 + [5] * 5),
        ("step", 10, [500] * 5 + [50] * 5),
    ],
)
def test_the_counts_are_those_of_the_papers(kind, ratio, wanted):
    assert (500 / Imbalance(kind, ratio).divisors(10)).astype(int).tolist() == wanted


def test_half_of_an_odd_number_of_classes_keeps_all_images():
    assert Imbalance("step", 4).divisors(5).tolist() == [1, 1, 1, 4, 4]


def test_imbalance_thins_training_and_validation_but_not_test():
    before, after = images_of(), images_of(imbalance=Imbalance("exponential", 8))
    for split in SPLITS:
        assert by_name(after, split).items() <= by_name(before, split).items()
    assert by_name(after, "test") == by_name(before, "test")
    shares = sorted(counts(after) / counts(before), reverse=True)
    assert np.abs(np.array(shares) - 8.0 ** (-np.arange(10) / 9)).max() < 1 / counts(before).min()
    assert len(after.splits["val"]) < 0.6 * len(before.splits["val"])
    assert counts(after, "val").min() >= 1


def test_a_larger_ratio_leaves_a_part_of_what_a_smaller_one_does():
    small, large = (set(by_name(images_of(imbalance=Imbalance("step", ratio)), "train")) for ratio in (2, 5))
    assert large < small


def test_other_seeds_make_other_classes_rare():
    rare = {int(counts(images_of(seed=seed, imbalance=Imbalance(ratio=50))).argmin()) for seed in range(8)}
    assert len(rare) > 3


def test_wrong_labels_are_as_many_as_asked_for_and_spread_over_the_other_classes():
    right, noisy = images_of(), images_of(label_noise=LabelNoise(0.4))
    for split in ("train", "val"):
        before, after = by_name(right, split), by_name(noisy, split)
        assert before.keys() == after.keys()
        wrong = [(before[name], after[name]) for name in before if before[name] != after[name]]
        deviation = (0.4 * 0.6 / len(before)) ** 0.5
        assert abs(len(wrong) / len(before) - 0.4) < 4 * deviation
        assert noisy.record[split]["wrong_labels"] == len(wrong)
    assert by_name(right, "test") == by_name(noisy, "test")
    assert noisy.record["test"]["wrong_labels"] == 0
    steps = [(after[name] - before[name]) % 10 for name in before if before[name] != after[name]]
    assert set(steps) == set(range(1, 10))  # of the validation images


def test_a_higher_rate_keeps_the_wrong_labels_of_a_lower_one():
    right, low, high = (by_name(images_of(label_noise=n), "train") for n in (None, LabelNoise(0.2), LabelNoise(0.5)))
    wrong = {name: label for name, label in low.items() if label != right[name]}
    assert wrong
    assert wrong.items() <= high.items()


def test_pairs_are_flipped_to_the_next_class():
    before, after = by_name(images_of(), "train"), by_name(images_of(label_noise=LabelNoise(0.3, "pair")), "train")
    assert {(after[name] - before[name]) % 10 for name in before} == {0, 1}


@pytest.mark.parametrize("settings", [{"imbalance": Imbalance(ratio=5)}, {"label_noise": LabelNoise(0.3)}])
def test_the_order_in_which_images_are_listed_does_not_matter(settings, image_folder, monkeypatch):
    task = TaskConfig("colours", str(image_folder("colours", images=40)))
    plain, opened = images_of(task, **settings), sources.open_folder

    def shuffled(*args):
        source = opened(*args)
        order = random.Random(1).sample(range(len(source.names)), len(source.names))
        files = [source.images.paths[i] for i in order]
        names = [source.names[i] for i in order]
        return replace(source, labels=source.labels[order], names=names, images=type(source.images)(files))

    monkeypatch.setattr(sources, "open_folder", shuffled)
    other = images_of(task, **settings)
    assert plain.source.names != other.source.names
    assert all(by_name(plain, split) == by_name(other, split) for split in SPLITS)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data.imbalance.ratio", "1"], "ratio=1.0 must be above 1"),
        (["--data.imbalance.ratio", "7"], "no training image of class"),
        (["--data.label_noise.rate", "0"], "rate=0.0 must be above 0"),
        (
            ["--data.label_noise", "{rate: 0.5}", "--data.tasks", "[{name: a, path: FOLDER}]"],
            "no training image with the",
        ),
    ],
)
def test_what_leaves_nothing_to_learn_is_refused(words, reason, tiny_fit, image_folder, capsys):
    few = image_folder("few", classes=6, images=3)  # one for training
    assert main(tiny_fit(*(word.replace("FOLDER", str(few)) for word in words))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recast_pl: error")]
    assert reason in line


def test_a_run_records_them_and_is_resumed_with_no_others(tiny_fit, tmp_path, capsys):
    words = ["--trainer.max_epochs", "1", "--data.imbalance", "{kind: step, ratio: 2}", "--data.label_noise.rate"]
    assert main(tiny_fit(*words, "0.3")) == 0
    record = json.loads((tmp_path / "run" / "tasks" / "00_first.json").read_text())
    assert 0 < record["images"]["train"]["wrong_labels"] < sum(record["images"]["train"]["classes"].values())
    assert record["images"]["test"]["wrong_labels"] == 0
    assert record["task"]["balanced_accuracy"] >= 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(tiny_fit(*words, "0.4", "--resume", "true")) == 2
    assert "data differs" in capsys.readouterr().err
