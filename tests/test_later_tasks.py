"""Tasks that come later: learnt into a run that is finished, taken out, renamed, and put together from copies."""

import json
import random
import shutil
import signal
import time
from functools import lru_cache

import pytest
import torch
from conftest import forks, tiny_words, write_images
from filelock import FileLock
from test_run_folder import HOLD, another_process
from test_stream import patches, read_summary, without_times

from recast_pl import load
from recast_pl.cli import main
from recast_pl.inference.following import Follower, keep_received
from recast_pl.learning.router import Router
from recast_pl.runs import layout
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.listing import list_tasks
from recast_pl.runs.stream import Stream

QUICK = ("--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def third(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("later") / "third", 2, seed=9)


@pytest.fixture(scope="module")
def images(tiny_run):
    return {name: str(tiny_run.parent / name) for name in ("first", "second")}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run of two tasks, on another machine, as it were: the images are elsewhere."""
    copy = shutil.copytree(tiny_run, tmp_path / "copy" / "run")
    config = (copy / "config.yaml").read_text().replace(str(tiny_run.parent), str(tmp_path / "lost"))
    (copy / "config.yaml").write_text(config)
    return copy


def add(run, images, *more, name="third"):
    return ["add", "--run_dir", str(run), "--task", name, "--path", str(images), *map(str, more)]


@pytest.fixture(scope="module")
def whole(tiny_run, third, images, tmp_path_factory):
    """A run of three tasks from the start."""
    folder = tmp_path_factory.mktemp("whole")
    tasks = [{"name": n, "path": p} for n, p in images.items()] + [{"name": "third", "path": str(third)}]
    assert main(tiny_words(folder)("--data.tasks", json.dumps(tasks))) == 0
    return folder / "run"


def same_results(run, whole):
    assert patches(run) == patches(whole)
    assert without_times(read_summary(run)) == without_times(read_summary(whole))
    assert (run / "accuracy_matrix.csv").read_bytes() == (whole / "accuracy_matrix.csv").read_bytes()
    for path in (whole / "signatures").iterdir():
        assert (run / "signatures" / path.name).read_bytes() == path.read_bytes()


def test_a_task_that_is_added_without_the_old_images_ends_as_in_a_run_from_the_start(run, whole, third, capsys):
    assert main(add(run, third)) == 0
    same_results(run, whole)
    assert [path.name for path in run.glob("config*.yaml")] == ["config.yaml"]  # no other settings were used
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(add(run, third)) == 0  # it is there
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0  # nothing is left, and no image is needed
    capsys.readouterr()
    assert main(["test", "--run_dir", str(run)]) == 0
    shown = capsys.readouterr()
    assert "not measured" in shown.out
    assert "third" in shown.out
    assert "equal" in shown.out


def test_the_list_of_tasks_is_parsed_twice_to_add_one(run, third, monkeypatch):
    """As it is, and as it becomes: the time grows with the number of tasks."""
    contents, parse = [], layout._pickled.__wrapped__
    monkeypatch.setattr(layout, "_pickled", lru_cache(4)(lambda content: contents.append(content) or parse(content)))
    assert main(add(run, third, *QUICK)) == 0
    lists = [content for content in contents if b"name: second" in content]
    assert len(lists) == len(set(lists)) == 2, lists


def test_fit_trains_the_tasks_that_are_appended_to_the_list(run, whole, third, images, tmp_path):
    lost = [{"name": n, "path": str(tmp_path / "lost" / n)} for n in images]
    tasks = [*lost, {"name": "third", "path": str(third)}]
    assert main(["fit", "--run_dir", str(run), "--resume", "true", "--data.tasks", json.dumps(tasks)]) == 0
    same_results(run, whole)


@pytest.mark.release
def test_a_task_that_is_killed_again_and_again_and_repeated_ends_as_if_never(run, whole, third, tmp_path):
    hooks = ("on_train_batch_start", "on_train_epoch_end", "on_validation_epoch_end", "on_test_batch_start")
    for epoch, hook in enumerate(hooks):
        kill = {
            "class_path": "crash_callbacks.KillAt",
            "init_args": {"hook": hook, "task": "third", "epoch": epoch % 3},
        }
        words = add(run, third, "--trainer.callbacks", json.dumps([kill]))
        assert forks()(words=words, log=str(tmp_path / "log")) in (0, -9), (tmp_path / "log").read_text()
    assert main(add(run, third)) == 0
    same_results(run, whole)


@pytest.mark.release
@pytest.mark.parametrize("command", ["add", "watch"])
def test_a_command_that_is_killed_at_random_moments_ends_as_if_never(command, run, whole, third, tmp_path):
    inbox, log, generator, kills = tmp_path / "inbox", tmp_path / "log", random.Random(0), 0
    shutil.copytree(third, inbox / "third")
    watch = ["watch", "--run_dir", str(run), "--inbox", str(inbox), "--every", "0", "--once", "true"]
    words = add(run, third) if command == "add" else watch
    forks()(shell="true")  # is ready to fork from here on
    started = time.monotonic()
    assert forks()(words=words, log=str(log)) == 0, log.read_text()
    seconds, status = time.monotonic() - started, 0
    for _ in range(20):
        if status == 0:  # it came to its end: begin again
            same_results(run, whole)
            assert not list(inbox.glob("*.txt"))
            assert main(["remove", "--run_dir", str(run), "--task", "third"]) == 0
        status = forks()(words=words, log=str(log), seconds=generator.uniform(0, seconds))
        assert status in (0, -signal.SIGKILL), log.read_text()
        kills += status != 0
    assert kills > 10
    assert main(words) == 0
    same_results(run, whole)


def test_settings_of_a_task_may_differ_and_are_recorded(run, whole, third):
    before = (run / "config.yaml").read_text()
    options = ("--trainer.max_epochs", 1, "--data.batch_size", 3, "--model.optimizer.init_args.lr", 0.01)
    assert main(add(run, third, *options, "--data.tasks.third.flip", "false")) == 0
    config = (run / "config.yaml").read_text()
    assert config.startswith(before[: before.index("image_size")])  # only the list of tasks has grown
    assert "max_epochs: 3" in config
    record = json.loads((run / "tasks" / "02_third.json").read_text())
    assert record["task"]["epochs"] == 1
    (name,) = record["configs"]
    used = (run / f"config.{name}.yaml").read_text()
    assert all(text in used for text in ("max_epochs: 1", "batch_size: 3", "flip: false"))
    assert patches(run).keys() == patches(whole).keys()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data.image_size", "64"], ["data.image_size is 32 there and 64 now"]),
        (["--seed_everything", "7"], ["seed_everything is 42 there and 7 now"]),
        (["--model.pieces.layout.groups", "3"], ["groups is 6 there and 3 now"]),
        (
            ["--model.backbone.name", "vit_small_patch16_224"],
            ["'vit_tiny_patch16_224' there", "'vit_small_patch16_224'"],
        ),
        (["--task", "first"], ["images of task 'first' have changed"]),
        (["--task", "../x"], ["cannot name a file"]),
        (["--task", "FIRST"], ["listed twice"]),
        (["--path", "nowhere"], ["nowhere"]),
        (["--trainer.fast_dev_run", "true"], ["leave it out"]),
    ],
)
def test_what_cannot_be_added_is_one_line_and_changes_nothing(options, named, run, third, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".tasks.lock"}
    given = dict(zip(options[::2], options[1::2], strict=True))
    words = ["add", "--run_dir", str(run), "--task", "third", "--path", str(third)]
    for option in ("--task", "--path"):
        if option in given:
            words[words.index(option) + 1] = given.pop(option)
    assert main([*words, *[word for pair in given.items() for word in pair]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in named), line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".tasks.lock"} == before


def test_two_processes_add_tasks_at_the_same_time(run, third, image_folder, monkeypatch):
    fourth, train = image_folder("fourth", 2, seed=4), Stream.run

    def run_beside(self, only=()):
        if list(only) == ["third"]:  # both are listed before the first one is trained
            assert main(add(run, fourth, *QUICK, name="fourth")) == 0
            assert [task["name"] for task in read_summary(run)["tasks"]] == ["first", "second", "fourth"]
        return train(self, only)

    monkeypatch.setattr(Stream, "run", run_beside)
    assert main(add(run, third, *QUICK)) == 0
    assert list(RunFolder(run).load_patches()) == ["first", "second", "third", "fourth"]
    assert [task["name"] for task in read_summary(run)["tasks"]] == ["first", "second", "third", "fourth"]
    assert read_summary(run)["unlearnt"] == []


def test_nothing_is_added_while_all_tasks_are_trained(run, third, capsys):
    with another_process(HOLD, run):
        assert main(add(run, third)) == 2
    assert "another process is working" in capsys.readouterr().err
    assert "third" not in (run / "config.yaml").read_text()


def router_bits(run):
    router = Router(files.load_signature() for files in RunFolder(run).finished().values())
    return [router._means, router._bias, router._precision, router._centre]


def test_a_task_that_is_removed_leaves_nothing(run, tiny_run, third, capsys):
    assert main(add(run, third, *QUICK)) == 0
    assert main(["remove", "--run_dir", str(run), "--task", "first"]) == 0
    assert list(patches(run)) == ["01_second.safetensors", "02_third.safetensors"]  # they keep their numbers
    assert not list(run.rglob("*first*"))
    summary = read_summary(run)
    assert [task["name"] for task in summary["tasks"]] == ["second", "third"]
    assert summary["accuracy_matrix"][1] == [task["accuracy"] for task in summary["tasks"]]
    assert (run / "accuracy_matrix.csv").read_text().splitlines()[0].split(",")[1:] == ["second", "third"]
    capsys.readouterr()
    assert main(["list", "--run_dir", str(run)]) == 0
    assert "first" not in capsys.readouterr().out
    assert main(["remove", "--run_dir", str(run), "--task", "third"]) == 0
    assert main(add(run, third, *QUICK, name="fourth")) == 0
    assert list(patches(run)) == ["01_second.safetensors", "02_fourth.safetensors"]
    assert main(["remove", "--run_dir", str(run), "--task", "first"]) == 2
    assert "'first'; the tasks are second, fourth" in capsys.readouterr().err


def test_the_router_of_the_tasks_that_are_left_has_the_same_bits(run, tiny_run, third):
    before = router_bits(run)
    assert main(add(run, third, *QUICK)) == 0
    assert not torch.equal(router_bits(run)[2], before[2])
    assert main(["remove", "--run_dir", str(run), "--task", "third"]) == 0
    assert all(torch.equal(one, other) for one, other in zip(router_bits(run), before, strict=True))
    assert patches(run) == patches(tiny_run)
    assert without_times(read_summary(run)) == without_times(read_summary(tiny_run))


def test_a_task_gets_another_name(run, tiny_run, capsys):
    assert main(["rename", "--run_dir", str(run), "--task", "first", "--name", "one"]) == 0
    assert list(patches(run)) == ["00_one.safetensors", "01_second.safetensors"]
    assert list(RunFolder(run).load_patches()) == ["one", "second"]
    words = ["test", "--run_dir", str(run), "--data_root", str(tiny_run.parent)]
    assert main(words) == 0  # on the same images as before
    assert [task["name"] for task in read_summary(run)["tasks"]] == ["one", "second"]
    image = next((tiny_run.parent / "first").rglob("*.png"))
    capsys.readouterr()
    for path, task in ((tiny_run, "first"), (run, "one")):
        assert main(["predict", "--run_dir", str(path), "--task", task, "--images", str(image)]) == 0
        assert main(["predict", "--run_dir", str(path), "--task", "auto", "--images", str(image)]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines() if str(image) in line]
    assert rows[0] == rows[2]
    assert (rows[1][1], rows[3][1]) == ("first", "one")
    assert rows[1][2:] == rows[3][2:]
    assert main(["rename", "--run_dir", str(run), "--task", "one", "--name", "SECOND"]) == 2
    assert "name of another task" in capsys.readouterr().err


def test_tasks_of_a_run_are_listed(run, third, capsys):
    assert main(["list", "--run_dir", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "first", "second"]
    record = json.loads((run / "tasks" / "00_first.json").read_text())
    size = (run / "patches" / "00_first.safetensors").stat().st_size
    assert lines[1].split()[1:] == ["1", "3", "100.00", f"{size:,}", record["origin"]["date"]]
    (run / "patches" / "01_second.safetensors").unlink()
    assert list_tasks(run)[1] == ("second", None, None, None, None, None)
    assert main(["list", "--run_dir", str(run / "nowhere")]) == 2
    assert main(["list"]) == 2


def test_copies_of_a_run_are_merged_and_conflicts_named(run, whole, third, image_folder, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert main(add(run, third, *QUICK)) == 0
    fourth = image_folder("fourth", 2, seed=4)
    assert main(add(other, fourth, *QUICK, name="fourth")) == 0
    assert main(["merge", "--run_dir", str(run), "--copies", str(other)]) == 0
    assert list(RunFolder(run).load_patches()) == ["first", "second", "third", "fourth"]
    assert patches(run)["03_fourth.safetensors"] == patches(other)["02_fourth.safetensors"]
    assert [task["name"] for task in read_summary(run)["tasks"]][3] == "fourth"
    assert main(["merge", "--run_dir", str(run), "--copies", str(other)]) == 0  # nothing is new
    assert main(["remove", "--run_dir", str(other), "--task", "fourth"]) == 0
    assert main(add(other, third, *QUICK, name="fourth")) == 0
    capsys.readouterr()
    assert main(["merge", "--run_dir", str(run), "--copies", str(other)]) == 2
    assert "different tasks have one name: 'fourth' (" in capsys.readouterr().err


def test_an_inbox_becomes_tasks_and_what_cannot_be_learnt_is_rejected_with_the_reason(run, third, tmp_path, capsys):
    inbox = tmp_path / "inbox"
    shutil.copytree(third, inbox / "third")
    (inbox / "bad").mkdir()
    words = ["watch", "--run_dir", str(run), "--inbox", str(inbox), "--every", "0", "--once", "true"]
    assert main([*words, "--options", "--trainer.max_epochs 1"]) == 0
    assert list(RunFolder(run).load_patches()) == ["first", "second", "third"]
    assert (run / "signatures" / "02_third.safetensors").is_file()
    reason = (inbox / "bad.rejected.txt").read_text()
    assert "bad" in reason.splitlines()[0]
    assert "name: bad" not in (run / "config.yaml").read_text()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(words) == 0  # nothing is new, and what was rejected has not changed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    shutil.copytree(third, inbox / "bad", dirs_exist_ok=True)
    assert main([*words, "--options", "--trainer.max_epochs 1"]) == 0
    assert list(RunFolder(run).load_patches())[3] == "bad"
    assert not list(inbox.glob("*.txt"))
    capsys.readouterr()
    assert main([*words, "--options", "--trainer.epochs 1"]) == 2  # a wrong option rejects no folder
    assert "epochs" in capsys.readouterr().err
    assert not list(inbox.glob("*.txt"))


def test_fit_leaves_what_another_process_is_writing(run):
    part = run / "patches" / ".0.part"
    part.write_text("half of a patch")
    task = run / "checkpoints" / "02_third"
    task.mkdir(parents=True)
    with FileLock(task / RunFolder.LOCK):  # as `add` holds it
        assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
        assert part.exists()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert not part.exists()


def test_a_folder_that_still_grows_is_left_alone(third, tmp_path):
    from recast_pl.runs.inbox import Inbox

    shutil.copytree(third, tmp_path / "inbox" / "third")
    inbox = Inbox(tmp_path / "inbox")
    assert inbox.complete([]) == []
    (tmp_path / "inbox" / "third" / "class0" / "more.png").write_bytes(b"half of an image")
    assert inbox.complete([]) == []
    assert inbox.complete([]) == [tmp_path / "inbox" / "third"]
    assert inbox.complete(["third"]) == []


def test_a_predictor_follows_its_run(run, whole, third):
    predictor, lines = load(run), []
    follower = Follower(predictor, RunFolder(run), lines.append)
    follower.look()
    assert lines == []
    image = next(third.rglob("*.png"))
    second = [predictor.predict(image, "second")[0].probabilities]
    for source in whole.rglob("*02_third*"):
        if source.is_file():
            target = run / source.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    follower.look()
    assert lines == ["task third is added"]
    assert predictor.predict(image, "third") == load(whole).predict(image, "third")
    assert predictor.predict(image) == load(whole).predict(image)  # its signature counts, too
    assert main(["remove", "--run_dir", str(run), "--task", "first"]) == 0
    follower.look()
    assert predictor.tasks == ["second", "third"]
    (run / "patches" / "02_third.safetensors").write_bytes(b"damaged")
    follower.look()
    follower.look()
    assert [line.partition(":")[0] for line in lines[1:]] == ["task first is removed", "task third cannot be used"]
    assert predictor.predict(image, "third")  # the last version that could be used
    second.append(predictor.predict(image, "second")[0].probabilities)
    assert second[0] == second[1]


def test_a_task_that_a_server_has_received_outlives_it(run, whole, third, capsys):
    files = RunFolder(whole).finished()["third"]
    patch, _ = files.load()
    keep_received(RunFolder(run), patch, files.patch.read_bytes(), files.signature.read_bytes())
    predictor = load(run)
    Follower(predictor, RunFolder(run), print).look()
    image = next(third.rglob("*.png"))
    assert predictor.tasks == ["first", "second", "third"]
    assert predictor.predict(image) == load(whole).predict(image)
    capsys.readouterr()
    assert main(["list", "--run_dir", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["third", f"{files.patch.stat().st_size:,}", "received"]
    assert read_summary(run)["unlearnt"] == []  # results are those of the tasks that the run has trained
    assert main(["remove", "--run_dir", str(run), "--task", "third"]) == 0
    Follower(predictor, RunFolder(run), print).look()
    assert not list(run.rglob("*third*"))
