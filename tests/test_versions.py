"""New versions of a task: learnt again, or with more images and classes; the old ones stay."""

import csv
import io
import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fork_server, write_images
from test_stream import read_summary, without_times

from recast_pl import TaskPatch, load
from recast_pl.cli import main
from recast_pl.config.run import open_run
from recast_pl.files import read_sealed_json
from recast_pl.learning.heads import solve_head
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs import versions
from recast_pl.runs.evaluation import restore, split_features
from recast_pl.runs.folder import RunFolder

FIRST, SECOND = "00_first.safetensors", "01_second.safetensors"


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run that `tiny_fit()` makes."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def more(tmp_path):
    """Images of the classes 1, 2 (as in task `first`) and 3, 4 (which are new)."""
    folder = write_images(tmp_path / "more", 5, images=9, seed=3)
    shutil.rmtree(folder / "class0")
    return folder


def relearn(run, *more):
    return main(["relearn", "--run_dir", str(run), "--task", "second", *map(str, more)])


def extend(run, path, *more):
    return main(["fit", "--run_dir", str(run), "--extend", "first", "--path", str(path), *map(str, more)])


def predicted(run, images, *more):
    """Rows that `predict` writes for task `first`."""
    output = run.parent / "found.csv"
    words = ["predict", "--run_dir", str(run), "--task", "first", "--images", str(images), "--output", str(output)]
    assert main([*words, *more]) == 0
    return list(csv.DictReader(io.StringIO(output.read_text())))


def record(run, name):
    return read_sealed_json(run / "tasks" / f"{name}.json", Exception)


def refused(capsys, *named):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert all(name in line for name in named), line


# more images and classes


def test_new_classes_come_after_the_old_ones_and_the_coefficients_stay(run, more, capsys):
    before = TaskPatch.load(run / "patches" / FIRST)
    assert extend(run, more) == 0
    after = TaskPatch.load(run / "patches" / FIRST)
    assert before.classes == ["class0", "class1", "class2"]
    assert after.classes == ["class0", "class1", "class2", "class3", "class4"]
    torch.testing.assert_close(after.pieces, before.pieces, rtol=0, atol=0)
    assert TaskPatch.load(run / "versions" / "1" / "patches" / FIRST).to_bytes() == before.to_bytes()
    old, new = read_sealed_json(run / "versions" / "1" / "tasks" / "00_first.json", Exception), record(run, "00_first")
    assert new["version"] == 2
    assert new["added"] == [str(more)]
    assert new["task"]["classes"] == 5
    assert new["task"]["task_parameters"] == old["task"]["task_parameters"]
    assert new["images"]["train"]["classes"]["class0"] == old["images"]["train"]["classes"]["class0"]
    assert sum(sum(split["classes"].values()) for split in new["images"].values()) == 3 * 8 + 4 * 9
    assert read_summary(run)["tasks"][0]["classes"] == 5
    assert main(["test", "--run_dir", str(run)]) == 0
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert main(["patch", "verify", "--run_dir", str(run)]) == 0
    assert capsys.readouterr().out.count("intact") == 3


def test_an_old_version_predicts_as_before_and_the_new_one_knows_the_new_classes(run, more):
    images = more / "class4"
    before = predicted(run, images)
    assert extend(run, more) == 0
    assert predicted(run, images, "--at", "1") == before
    assert predicted(run, images, "--at", "2") == predicted(run, images)
    assert {row["label"] for row in predicted(run, images)} == {"class4"}
    old, new = load(run, at={"first": 1}), load(run)
    assert (len(old.classes("first")), len(new.classes("first"))) == (3, 5)
    assert old.predict(images / "000.png", task="first")[0].label == before[0]["label"]
    assert new.predict(images / "000.png")[0].label == "class4"  # the signature has the new classes, too


def test_images_of_old_classes_alone_may_be_added_and_those_of_one_new_class(run, more):
    folder = more.parent / "one"
    shutil.copytree(more / "class3", folder / "class3")
    for name in ("class3", "class4", "class1"):
        shutil.rmtree(more / name)
    images = record(run, "00_first")["images"]["train"]["classes"]
    assert extend(run, more) == 0
    assert TaskPatch.load(run / "patches" / FIRST).classes == ["class0", "class1", "class2"]
    now = record(run, "00_first")["images"]["train"]["classes"]
    assert {name: now[name] - count for name, count in images.items()} == {"class0": 0, "class1": 0, "class2": 7}
    assert extend(run, folder) == 0
    assert TaskPatch.load(run / "patches" / FIRST).classes == ["class0", "class1", "class2", "class3"]
    assert record(run, "00_first")["added"] == [str(more), str(folder)]
    assert len(RunFolder(run).versions(RunFolder(run).finished()["first"])) == 3
    assert main(["test", "--run_dir", str(run)]) == 0


def test_what_cannot_be_extended_is_refused_in_one_line(run, more, capsys):
    assert extend(run, more / "nothing") == 2
    refused(capsys, "nothing", "does not exist")
    assert main(["fit", "--run_dir", str(run), "--extend", "first"]) == 2
    refused(capsys, "--path")
    assert main(["fit", "--extend", "first", "--path", str(more)]) == 2
    refused(capsys, "--run_dir")
    assert main(["fit", "--run_dir", str(run), "--extend", "third", "--path", str(more)]) == 2
    refused(capsys, "third", "first, second")
    assert extend(run, more, "--data.image_size", "64") == 2
    refused(capsys, "data.image_size", "32", "64")
    assert not (run / "versions").exists()
    assert extend(run, more) == 0
    assert extend(run, more) == 2
    refused(capsys, str(more), "already")


def test_extending_needs_the_old_images_as_they_were(run, more, tiny_run, capsys):
    place, elsewhere = tiny_run.parent / "first", more.parent / "first"
    shutil.copytree(place, elsewhere)
    words = ("--data.tasks.first.path", str(elsewhere))
    (elsewhere / "class0" / "000.png").unlink()
    assert extend(run, more, *words) == 2
    refused(capsys, "have changed", "'class0' from")
    shutil.rmtree(elsewhere)
    assert extend(run, more, *words) == 2
    refused(capsys, str(elsewhere), "--data.tasks.first.path")
    assert not (run / "versions").exists()


@pytest.mark.parametrize("head", ["lda", "ridge", "logistic"])
def test_a_head_that_is_extended_is_that_of_all_images_together(head, tiny_fit, tmp_path, more):
    run = tmp_path / "run"
    words = ("--config", "methods/probe.yaml", "--model.head", head)
    assert main(tiny_fit(*words, run_dir=run)) == 0
    assert extend(run, more) == 0
    _, init = open_run(run)
    init.data.prepare_data()
    init.data.select(0)
    restore(init.model, RunFolder(run), init.data.image_size)
    patch = TaskPatch.load(run / "patches" / FIRST)
    init.model.activate(patch)
    evaluator = TrainerFactory(init.trainer).for_evaluation()
    train = split_features(init.model, init.data, "train", evaluator)
    wanted = solve_head(head, train, 5)
    torch.testing.assert_close(patch.head["weight"], wanted.weight.detach(), rtol=1e-5, atol=1e-6)
    assert len(train.labels) == sum(record(run, "00_first")["images"]["train"]["classes"].values())


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("rosa", "recast_l2sp")]


@pytest.mark.parametrize("method", [None, "chosen", *SLOWLY])
def test_what_a_task_has_learnt_can_be_refined(method, tiny_fit, tmp_path, more):
    run = tmp_path / "run"
    words = () if method is None else ("--config", f"methods/{method}.yaml")
    assert main(tiny_fit(*words, run_dir=run)) == 0
    before = TaskPatch.load(run / "patches" / FIRST)
    assert extend(run, more, "--refine", "--model.optimizer.lr", "0.01", "--model.head", "sgd") == 0
    after = TaskPatch.load(run / "patches" / FIRST)
    changes = [
        not torch.equal(old[name], state[name])
        for old, state in zip(before.pieces, after.pieces, strict=True)
        for name in state
        if name != "indices"
    ]
    assert any(changes)
    kept = [(old, new) for old, new in zip(before.pieces, after.pieces, strict=True) if "indices" in old]
    assert all(torch.equal(old["indices"], new["indices"]) for old, new in kept)  # the chosen entries stay
    assert main(["test", "--run_dir", str(run)]) == 0


# learnt again


def test_the_better_version_by_validation_is_the_present_one(run, capsys):
    before, results = TaskPatch.load(run / "patches" / SECOND).to_bytes(), (run / "summary.json").read_bytes()
    bad = ("--model.head", "sgd", "--model.optimizer.lr", "0", "--trainer.max_epochs", "1")
    assert relearn(run, *bad) == 0
    out = capsys.readouterr().out
    assert "version 2 is made, version 1 is the present one" in out
    assert (run / "patches" / SECOND).read_bytes() == before
    assert (run / "summary.json").read_bytes() == results
    assert relearn(run, *bad, "--keep", "new") == 0
    assert (run / "patches" / SECOND).read_bytes() != before
    assert (run / "versions" / "1" / "patches" / SECOND).read_bytes() == before
    assert read_summary(run)["tasks"][1]["epochs"] == 1
    capsys.readouterr()
    assert relearn(run) == 0
    assert "version 4 is made, version 4 is the present one" in capsys.readouterr().out
    assert (run / "patches" / SECOND).read_bytes() == before  # the same settings and seed as at first
    assert main(["patch", "verify", "--run_dir", str(run)]) == 0
    assert "5" not in {path.name for path in (run / "versions").iterdir()}


def test_the_same_command_again_learns_nothing_unless_images_have_changed(run, tiny_run, capsys):
    words = ("--keep", "new", "--trainer.max_epochs", "1")
    assert relearn(run, *words) == 0
    before = files(run)
    assert relearn(run, *words) == 0
    assert "version 2 was learnt with the same options from the same images" in " ".join(
        capsys.readouterr().out.split()
    )
    assert files(run) == before
    images = shutil.copytree(tiny_run.parent / "second", run.parent / "fewer")
    next(images.rglob("*.png")).unlink()
    moved = (*words, "--data.tasks.second.path", str(images))
    assert relearn(run, *moved) == 0
    next(images.rglob("*.png")).unlink()
    assert relearn(run, *moved) == 0  # the options are the same
    assert list(RunFolder(run).versions(RunFolder(run).finished()["second"])) == [1, 2, 3, 4]
    assert relearn(run, *moved, "--seed_everything", "7") == 0
    assert list(RunFolder(run).versions(RunFolder(run).finished()["second"])) == [1, 2, 3, 4, 5]


def test_a_version_records_its_settings_and_the_run_keeps_its_own(run):
    config = (run / "config.yaml").read_bytes()
    assert relearn(run, "--trainer.max_epochs", "1", "--seed_everything", "7", "--keep", "new") == 0
    (name,) = record(run, "01_second")["configs"]
    text = (run / f"config.{name}.yaml").read_text()
    assert "max_epochs: 1\n" in text
    assert "seed_everything: 7\n" in text
    assert (run / "config.yaml").read_bytes() == config
    before = read_sealed_json(run / "versions" / "1" / "tasks" / "01_second.json", Exception)
    assert record(run, "01_second")["images"] == before["images"]  # another seed moves no image to another split
    assert main(["test", "--run_dir", str(run)]) == 0


@pytest.mark.parametrize(
    ("command", "read"),
    [
        (["relearn", "--task", "second"], ["second"]),
        (["fit", "--extend", "first", "--path", "more"], ["first"]),
        (["relearn", "--task", "second", "--data.tasks.0.flip", "false"], ["first", "second"]),  # counted among all
    ],
)
def test_the_settings_of_other_tasks_take_no_time(command, read, run, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--run_dir", str(run), "--print_config"])
    assert [task["name"] for task in yaml.safe_load(capsys.readouterr().out)["data"]["tasks"]] == read


def test_tasks_in_another_order_get_versions(tiny_fit, tmp_path):
    assert main(tiny_fit("--data.order_seed", "3")) == 0
    before = read_summary(tmp_path / "run")
    assert relearn(tmp_path / "run", "--keep", "new") == 0
    assert [task["name"] for task in before["tasks"]] == ["second", "first"]
    assert [task["name"] for task in read_summary(tmp_path / "run")["tasks"]] == ["second", "first"]
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0


def test_a_version_of_other_classes_is_not_compared(run, tiny_run, capsys):
    folder = write_images(run.parent / "second", 3, seed=2)
    words = ("--data.tasks.second.path", folder)
    assert relearn(run, *words) == 2
    refused(capsys, "classes", "--keep new")
    assert not (run / "versions").exists()
    assert relearn(run, *words, "--keep", "old") == 0
    assert TaskPatch.load(run / "versions" / "2" / "patches" / SECOND).classes == ["class0", "class1", "class2"]
    assert len(TaskPatch.load(run / "patches" / SECOND).classes) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("--model.backbone.args", '{"patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 2}'),
            ("backbone", "64"),
        ),
        (("--data.split", "official"), ("data.split", "'official'", "'ratio'")),
        (("--data.order_seed", "1"), ("data.order_seed", "None", "1")),
        (("--patch_precision", "int8"), ("patch_precision", "fp32", "int8")),
        (("--trainer.limit_val_batches", "0"), ("--keep new",)),
        (("--trainer.fast_dev_run", "true"), ("fast_dev_run",)),
    ],
)
def test_what_would_not_fit_the_run_is_refused(words, named, run, capsys):
    assert relearn(run, *words) == 2
    refused(capsys, *named)
    assert not (run / "versions").exists()


def test_methods_that_share_weights_keep_one_version(tiny_fit, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(tiny_fit("--config", "methods/ewc.yaml", "--trainer.max_epochs", "1", run_dir=run)) == 0
    assert relearn(run) == 2
    refused(capsys, "EWC")


# interruptions


class Killed(BaseException):
    """Ends a command where it stands."""


def dying(change, steps, number):
    """A function that changes a file, but ends the process before the step of this number."""

    def step(*args, **settings):
        if next(steps) == number:
            raise Killed
        return change(*args, **settings)

    return step


def make_version(folder):
    """Makes a version as `relearn` does, of files that were trained before."""
    new = versions.NewVersion(folder, "second", {"a": 1})
    if not new.taken:
        new.begin()
        shutil.copytree(folder.path.parent / "trained", new.files.run, dirs_exist_ok=True)
    new.take()
    new.close()


@pytest.fixture(scope="module")
def two_versions(tiny_run, tmp_path_factory):
    """A run, and beside it the files of another version of its task `second`."""
    home = tmp_path_factory.mktemp("versions")
    run = shutil.copytree(tiny_run, home / "run")
    assert relearn(run, "--trainer.max_epochs", "1", "--seed_everything", "7", "--keep", "old") == 0
    shutil.move(run / "versions" / "2", home / "trained")
    (run / "versions").rmdir()
    return home


def files(run):
    """The content of a run, without what is left of a version that has taken its place, and without events."""
    inside = {path.relative_to(run): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in inside.items() if not {"tensorboard", "2"} & set(name.parts)}


def test_at_every_moment_one_of_the_versions_is_whole(two_versions, tmp_path, monkeypatch):
    whole = shutil.copytree(two_versions, tmp_path / "whole")
    make_version(RunFolder(whole / "run"))
    old, new = ((path / "patches" / SECOND).read_bytes() for path in (two_versions / "run", two_versions / "trained"))
    seen, number = [], 0
    while not seen or seen[-1] != "ended":
        home = shutil.copytree(two_versions, tmp_path / str(number))
        folder, steps = RunFolder(home / "run"), itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(versions, "write_atomic", dying(versions.write_atomic, steps, number))
            patch.setattr(Path, "unlink", dying(Path.unlink, steps, number))
            try:
                make_version(folder)
                seen.append("ended")
            except Killed:
                seen.append("killed")
        (present,) = folder.trained(["second"])
        patch, record = present.load()
        assert (patch.to_bytes(), record.get("version", 1)) in ((old, 1), (new, 2))
        present.load_signature().check_task("second", patch.classes)
        if (folder.path / "versions" / "01_second.json").exists() or record.get("version", 1) == 1:
            make_version(folder)  # the same command again
        assert files(folder.path) == files(whole / "run")
        number += 1
    assert number > 10


def test_another_request_gives_up_what_was_begun(two_versions, tmp_path):
    folder = RunFolder(shutil.copytree(two_versions, tmp_path / "home") / "run")
    begun = versions.NewVersion(folder, "second", {"a": 1})
    begun.begin()
    shutil.copytree(two_versions / "trained", begun.files.run, dirs_exist_ok=True)
    assert list(folder.versions(folder.finished()["second"])) == [1]  # one that is being made does not count
    other = versions.NewVersion(folder, "second", {"a": 2})
    other.begin()
    assert other.number == 2
    assert not other.files.patch.exists()


def is_made(run, task):
    """Whether a command has ended its work, even if it was killed then."""
    (present,) = RunFolder(run).trained([task])
    return present.load_record().get("version", 1) == 2 and not (run / "versions" / f"{present.name}.json").exists()


@pytest.mark.release
@pytest.mark.parametrize("command", ["relearn", "extend"])
def test_a_command_that_is_killed_at_random_moments_ends_like_an_uninterrupted_one(command, tiny_run, tmp_path, more):
    options = {
        "relearn": ["relearn", "--task", "second", "--keep", "new", "--trainer.max_epochs", "6"],
        "extend": ["fit", "--extend", "first", "--path", str(more), "--refine", "--model.head", "sgd"],
    }[command]
    generator, log, kills = random.Random(0), tmp_path / "log", 4
    with fork_server() as (ask, _):
        for name in ("before", "whole"):  # the first one fills the image cache
            whole, started = shutil.copytree(tiny_run, tmp_path / name), time.monotonic()
            assert ask(words=[*options, "--run_dir", str(whole)], log=str(log)) == 0, log.read_text()
            seconds = time.monotonic() - started
        killed = shutil.copytree(tiny_run, tmp_path / "killed")
        words = [*options, "--run_dir", str(killed)]
        while not is_made(killed, options[2]):
            limit = {"seconds": generator.uniform(0.1, 0.9) * seconds} if kills else {}
            status = ask(words=words, log=str(log), **limit)
            assert status in (0, -signal.SIGKILL), log.read_text()
            assert len(load(killed, device="cpu").tasks) == 2  # at any moment
            kills -= 1
    timed = ("tasks", "config.yaml", "start.json", "summary.json")
    one, two = ({n: c for n, c in files(run).items() if not set(n.parts) & set(timed)} for run in (killed, whole))
    assert one == two
    assert without_times(read_summary(killed)) == without_times(read_summary(whole))
