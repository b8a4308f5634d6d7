"""Runs that are killed, whose disk is full or whose files are damaged keep finished tasks and resume."""

import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork_server
from test_stream import patches, read_summary, without_times

from recast_pl.cli import main
from recast_pl.errors import StorageError
from recast_pl.files import is_whole_checkpoint
from recast_pl.learning.trainer import AtomicCheckpoints
from recast_pl.runs.folder import RunFolder


def resuming(run, words):
    """The command that a user gives after a kill."""
    known = (run / "config.yaml").is_file()
    return ["fit", "--run_dir", str(run), "--resume", "true"] if known else [*words, "--resume", "true"]


def everything(run):
    """The final content of a run except times, places and TensorBoard events; a config may have several spellings."""
    files = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    timed = {"config.yaml", "start.json"} | {
        name for name in files if name.startswith("tasks/")
    }  # the summary holds all of a record
    content = {name: None if name in timed else path.read_bytes() for name, path in files.items()}
    return content | {"summary.json": without_times(read_summary(run))}


@pytest.mark.release
def test_a_run_that_is_killed_at_random_moments_ends_like_an_uninterrupted_one(tiny_fit, tmp_path):
    kills, generator, log, killed = 12, random.Random(0), tmp_path / "log", tmp_path / "killed"
    words = tiny_fit(run_dir=killed)
    with fork_server() as (ask, _):
        for run in (tmp_path / "before", tmp_path / "whole"):  # the first run fills the image cache for the second
            started = time.monotonic()
            assert ask(words=tiny_fit(run_dir=run), log=str(log)) == 0
            seconds = time.monotonic() - started
        wanted = everything(tmp_path / "whole")
        while kills:
            status = ask(words=resuming(killed, words), log=str(log), seconds=generator.uniform(0, seconds))
            assert status in (0, -signal.SIGKILL), log.read_text()
            kills -= status != 0
            if status == 0:  # start again until enough kills have happened
                assert everything(killed) == wanted
                shutil.rmtree(killed)
        assert ask(words=resuming(killed, words), log=str(log)) == 0, log.read_text()
    assert everything(killed) == wanted


def started(words, log):
    """Starts a command in its own session."""
    command = [sys.executable, "-m", "recast_pl", *words]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stderr=file, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_until(condition, *args):
    end = time.monotonic() + 600
    while not condition(*args):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_written(path, since=0):
    return path.exists() and path.stat().st_mtime_ns > since


def is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.release
def test_two_processes_that_are_ended_at_random_moments_end_like_uninterrupted_ones(tiny_fit, tmp_path):
    generator, log, ended, whole = random.Random(0), tmp_path / "log", tmp_path / "ended", tmp_path / "whole"
    more = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "6")
    process = started(tiny_fit(*more, run_dir=whole), log)
    wait_until(is_written, whole / "config.yaml")  # the second process is started after that
    begun = time.monotonic()
    assert process.wait(600) == 0, log.read_text()
    seconds = time.monotonic() - begun
    words = tiny_fit(*more, run_dir=ended)
    for number in (signal.SIGTERM, signal.SIGKILL):
        since = time.time_ns()
        process = started(resuming(ended, words), log)
        wait_until(is_written, ended / RunFolder.LOCK, since)
        time.sleep(generator.uniform(0.4 * seconds, seconds))  # starting the second process takes half of the time
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        assert process.wait(600) in (0, -number, 128 + number), log.read_text()
        wait_until(is_gone, process.pid)
    assert started(resuming(ended, words), log).wait(600) == 0, log.read_text()
    assert everything(ended) == everything(whole)


# disks


@pytest.fixture
def disk(tmp_path):
    """A small disk: a function that runs commands there, its path for the commands, and its path for this process."""
    mine = tmp_path / "disk"
    mine.mkdir()
    # may mount, but may not write where file permissions forbid it
    with fork_server("unshare", "-rm", "setpriv", "--bounding-set", "-dac_override") as (ask, process):
        try:
            refused = ask(shell=f"mount -t tmpfs -o size=384k none {mine}")
        except (OSError, ValueError):
            refused = True
        if refused:
            pytest.skip("this system lets no test mount a disk")
        yield ask, mine, Path(f"/proc/{process.pid}/root{mine}")


SAID_BY_COMPARE = ("failed with status 2", "the same command goes on from there")


def the_error(log):
    text = log.read_text()
    (line,) = (line for line in text.splitlines() if not line.endswith(SAID_BY_COMPARE))
    assert line.startswith("recast_pl: error: "), text
    return line


@pytest.mark.release
def test_a_run_whose_disk_is_full_again_and_again_ends_like_an_uninterrupted_one(tiny_fit, disk, tmp_path):
    (ask, place, seen), log = disk, tmp_path / "log"
    words, whole, run = tiny_fit(run_dir=place / "run"), tmp_path / "whole", seen / "run"
    assert ask(words=tiny_fit(run_dir=whole), log=str(log)) == 0
    errors, kept = [], {}
    while status := ask(words=[*words, "--resume", "true"], log=str(log)):
        errors.append(the_error(log))
        assert (status, str(place / "run") in errors[-1], "No space left" in errors[-1]) == (2, True, True), errors[-1]
        now = patches(run) if (run / "patches").exists() else {}
        assert kept.items() <= now.items()
        kept = now
        assert all(is_whole_checkpoint(path) for path in run.rglob("*.ckpt"))
        assert not list(run.rglob(".*"))
        assert ask(shell=f"mount -o remount,size={384 + 32 * len(errors)}k {place}") == 0
    assert everything(run) == everything(whole)
    assert len(errors) > 2  # otherwise the disk was rarely full


MIMICRY = ("fit", "--config", "mimicry_resnet34.yaml", "--trainer.max_epochs", "1", "--model.image_size", "32")
MIMICRY += ("--model.backbone.name", "torchvision/resnet18", "--model.backbone.weights", "random")
COMPARE = ("compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "--seeds", "1")


@pytest.mark.slow
def test_every_command_that_cannot_write_names_the_path_and_the_cause(tiny_fit, disk, tmp_path):
    (ask, place, _), log, run = disk, tmp_path / "log", tmp_path / "run"
    assert ask(words=tiny_fit(), log=str(log)) == 0
    image = str(next((tmp_path / "first").rglob("*.png")))
    compared = shlex.join(tiny_fit("--trainer.max_epochs", "1")[5:])
    commands = [
        tiny_fit(run_dir=place / "new"),
        tiny_fit("--resume", "true", run_dir=place / "new"),
        [*MIMICRY, "--run_dir", str(place / "mimicry")],
        ["predict", "--run_dir", str(run), "--task", "first", "--images", image, "--output", str(place / "labels.csv")],
        [*COMPARE, "--output", str(place / "compared"), "--options", compared],
        ["data", "prepare", "digits", "--root", str(place / "data")],
    ]
    for condition, reason in (
        (f"head -c 1M /dev/zero > {place}/filler; mkdir {place}/empty", "No space left"),
        (f"mount -o remount,ro {place}", "Read-only file system"),
        (f"mount -o remount,rw {place} && rm -r {place}/* && chmod 555 {place}", "Permission denied"),
    ):
        ask(shell=condition)
        for words in commands:
            assert ask(words=words, log=str(log)) == 2, (reason, words, log.read_text())
            error = the_error(log)
            assert str(place) in error, error
            assert reason in error, error


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(tmp_path):
    path, (soft, hard) = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(1000)}, path)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))  # no file may become larger
    try:
        with pytest.raises(StorageError, match=r"last\.ckpt .*File too large"):
            AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(2000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.ckpt", before)]


# damage


RECORD = "tasks/00_first.json"


def from_another_run(run):
    """A patch of the same task, base and method that the record does not describe."""
    return patches(run.parent / "other")["00_first.safetensors"]


DAMAGES = {  # the file, its damaged content, and the commands that refuse it
    "record-empty": (RECORD, lambda run: "", "fit test predict"),
    "record-null": (RECORD, lambda run: "null", "fit test predict"),
    "record-list": (RECORD, lambda run: "[]", "fit test predict"),
    "record-half": (RECORD, lambda run: (run / RECORD).read_text()[:300], "fit test predict"),
    "record-number": (RECORD, lambda run: (run / RECORD).read_text().replace("100.0", "99.0"), "fit test predict"),
    "record-other": (RECORD, lambda run: (run / "tasks" / "01_second.json").read_text(), "fit test predict"),
    "patch-other-run": ("patches/00_first.safetensors", from_another_run, "fit test predict"),
    "config-empty": ("config.yaml", lambda run: "", "fit test predict"),
    "config-text": ("config.yaml", lambda run: "hello", "fit test predict"),
    "config-half": ("config.yaml", lambda run: (run / "config.yaml").read_text()[:500], "fit test predict"),
    "config-code": ("config.yaml", lambda run: b"\xff\xfe\0", "fit test predict"),
    "patch-empty": ("patches/00_first.safetensors", lambda run: b"", "fit test predict"),
    "patch-other": (
        "patches/00_first.safetensors",
        lambda run: patches(run)["01_second.safetensors"],
        "fit test predict",
    ),
    "base-empty": ("decomposition.safetensors", lambda run: b"", "fit test predict"),
}


def test_a_damaged_run_is_refused_with_the_name_of_the_file_and_works_once_that_is_restored(tiny_fit, tmp_path, capsys):
    run, image = tmp_path / "run", str(next((tmp_path / "first").rglob("*.png")))
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    assert main(tiny_fit("--model.head", "ridge", run_dir=tmp_path / "other")) == 0  # other patches on the same base
    commands = {
        "fit": ["fit", "--run_dir", str(run), "--resume", "true"],
        "test": ["test", "--run_dir", str(run)],
        "predict": ["predict", "--run_dir", str(run), "--task", "first", "--images", image, "--output", f"{run}.csv"],
    }
    assert main(commands["fit"]) == 0  # resuming writes the config in its own spelling
    for name, content, refusing in DAMAGES.values():
        path, before = run / name, (run / name).read_bytes()
        damaged = content(run)
        assert damaged not in (before, before.decode(errors="replace"))
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for command in refusing.split():
            capsys.readouterr()
            assert main(commands[command]) == 2, (name, damaged)
            error = capsys.readouterr().err
            assert str(path) in error or (path.parent.name == "tasks" and f"tasks/{path.name}" in error)
            assert error.count("\n") == 1
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == kept
        path.write_bytes(before)
    assert [main(words) for words in commands.values()] == [0, 0, 0]


def test_a_task_with_a_removed_patch_is_trained_again_to_the_same_files(tiny_fit, tmp_path):
    run = tmp_path / "run"
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    wanted = everything(run)
    (run / "patches" / "00_first.safetensors").unlink()
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert everything(run) == wanted
