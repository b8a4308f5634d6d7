"""Long streams of tasks that have a few random classes of one source."""

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import TINY_VIT
from test_stream import kill_and_resume, patches, read_summary, without_times

from recast_pl import ClassSubset, SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data.class_streams import choose_classes, drawn_tasks
from recast_pl.errors import DataError

SPLITS = ("train", "val", "test")
NAMES = ["owl", "wren", "rook", "crow", "swan"]


def frequencies(subset, seed, draws=4000):
    """Share of draws in which each class is drawn, the most frequent first."""
    drawn = Counter()
    for draw in range(draws):
        drawn.update(choose_classes(ClassSubset(subset.classes, ratio=subset.ratio, draw=draw), NAMES, seed).tolist())
    return sorted((drawn[label] / draws for label in range(len(NAMES))), reverse=True)


def by_hand(ratio, count):
    """The same for classes drawn one after another, over all orders of draws, in float64."""
    weights = ratio ** (-np.arange(len(NAMES)) / (len(NAMES) - 1))
    shares = np.zeros(len(NAMES))
    for order in itertools.permutations(range(len(NAMES)), count):
        probability, left = 1.0, weights.sum()
        for label in order:
            probability *= weights[label] / left
            left -= weights[label]
        shares[list(order)] += probability
    return shares


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 2), (9.0, 2), (9.0, 3)])
def test_classes_are_drawn_as_often_as_their_weights_say(ratio, count):
    found, wanted = frequencies(ClassSubset(count, ratio=ratio), seed=3), by_hand(ratio, count)
    assert np.isclose(wanted.sum(), count)
    assert np.abs(np.array(found) - wanted).max() < 4 * (0.25 / 4000) ** 0.5


def test_a_draw_depends_on_names_and_seed_and_not_on_their_order():
    subset = ClassSubset(2, draw=7)
    forward = {NAMES[i] for i in choose_classes(subset, NAMES, 1)}
    assert forward == {NAMES[::-1][i] for i in choose_classes(subset, NAMES[::-1], 1)}
    seeds = {tuple(choose_classes(subset, NAMES, seed)) for seed in range(20)}
    assert len(seeds) > 4


def images_by_name(images, split):
    """Class and pixels of each image of a split."""
    indices = images.splits[split].tolist()
    source, pixels = images.source, images.decoded.pixels
    return {source.names[i]: (source.classes[source.labels[i]], pixels.pixels[i].sum().item()) for i in indices}


def test_each_task_has_the_images_of_its_classes_in_the_splits_of_the_source(image_folder):
    path = str(image_folder("four", classes=4, size=8))
    whole = SequentialTaskDataModule([TaskConfig("scole", path)], image_size=8)
    tasks = [TaskConfig("scole", path, subset=ClassSubset(2, tasks=6))]
    data = SequentialTaskDataModule(tasks, image_size=8)
    assert [task.name for task in data.tasks] == [f"scole_{draw:03}" for draw in range(6)]
    data.prepare_data()
    pairs = set()
    for index in range(6):
        data.select(index)
        assert data.classes == sorted(data.classes)
        pairs.add(tuple(data.classes))
        for split in SPLITS:
            of_source = images_by_name(whole._images, split)
            assert images_by_name(data._images, split) == {n: v for n, v in of_source.items() if v[0] in data.classes}
    assert len(pairs) > 1
    assert len(data._wholes) == 1  # decoded once


def test_one_draw_and_many_are_the_same_tasks():
    many = drawn_tasks(TaskConfig("digits", subset=ClassSubset(3, tasks=2, ratio=5, draw=4)))
    assert many == [
        TaskConfig(f"digits_{d:03}", dataset="digits", split_as="digits", subset=ClassSubset(3, ratio=5, draw=d))
        for d in (4, 5)
    ]
    assert drawn_tasks(many[0]) == [many[0]]


@pytest.fixture
def scole(tiny_fit, image_folder):
    """Makes the command line of `fit` for tasks of two of four classes."""
    folder = image_folder("four", classes=4)

    def words(*more, tasks=6, classes=2, ratio=1.0, run_dir=None):
        subset = {"classes": classes, "tasks": tasks, "ratio": ratio}
        entry = [{"name": "scole", "path": str(folder), "subset": subset}]
        quick = ("--config", "methods/scale.yaml", "--model.backbone.args", json.dumps(TINY_VIT | {"depth": 2}))
        return tiny_fit(*quick, "--trainer.max_epochs", "1", "--data.tasks", json.dumps(entry), *more, run_dir=run_dir)

    return words


def test_a_stream_resumes_to_the_same_bytes_and_goes_on(scole, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(scole(run_dir=whole)) == 0
    tasks = read_summary(whole)["tasks"]
    assert [task["name"] for task in tasks] == [f"scole_{draw:03}" for draw in range(6)]
    records = [json.loads(path.read_text()) for path in sorted((whole / "tasks").iterdir())]
    classes = [tuple(record["images"]["train"]["classes"]) for record in records]
    assert {len(each) for each in classes} == {2}
    counts = Counter(itertools.chain(*classes))
    assert set(counts) <= {f"class{label}" for label in range(4)}
    assert max(counts.values()) > 2  # classes come back
    callback = {
        "class_path": "crash_callbacks.KillAt",
        "init_args": {"hook": "on_validation_end", "task": "scole_002", "epoch": 0},
    }
    kill_and_resume(scole("--trainer.callbacks", json.dumps([callback]), run_dir=killed), killed)
    assert len(list((killed / "patches").iterdir())) == 2
    assert main(["fit", "--run_dir", str(killed), "--resume", "true", "--trainer.callbacks", "null"]) == 0
    assert patches(killed) == patches(whole)
    assert without_times(read_summary(killed)) == without_times(read_summary(whole))
    assert main(scole("--resume", "true", tasks=7, run_dir=whole)) == 0
    assert patches(whole).items() > patches(killed).items()


def error_of(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recast_pl: error")]
    return line


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"classes": 5}, "'scole_000' has subset.classes=5, but"),
        ({"classes": 1}, "data.tasks.subset.classes=1 must be at least 2"),
        ({"tasks": 0}, "data.tasks.subset.tasks=0 must be at least 1"),
        ({"ratio": 0.5}, "data.tasks.subset.ratio=0.5 must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, reason, scole, capsys):
    assert main(scole(**settings)) == 2
    line = error_of(capsys)
    assert reason in line
    assert "classes=5" not in reason or line.endswith("choose 2 to 4")


def test_a_drawn_task_takes_no_more_images_and_keeps_its_classes_when_it_is_renamed(
    scole, image_folder, tmp_path, capsys
):
    run, more = tmp_path / "run", image_folder("more", classes=2)
    assert main(scole(tasks=2)) == 0
    before = patches(run)
    assert main(["fit", "--run_dir", str(run), "--extend", "scole_001", "--path", str(more)]) == 2
    assert "'scole_001' has drawn classes of a source" in error_of(capsys)
    assert patches(run) == before
    shutil.copytree(run, tmp_path / "renamed")
    assert main(["rename", "--run_dir", str(tmp_path / "renamed"), "--task", "scole_001", "--name", "other"]) == 0
    capsys.readouterr()
    assert main(["test", "--run_dir", str(tmp_path / "renamed")]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_task_of_python_with_a_subset_takes_no_more_images():
    data = SequentialTaskDataModule([TaskConfig("digits", subset=ClassSubset(2))])
    with pytest.raises(DataError, match="takes no more images; add another task"):
        data.add_images("digits", ["folder"])
