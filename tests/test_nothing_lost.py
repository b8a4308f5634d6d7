"""Runs that are killed, whose disk is full, and whose files are damaged: what was finished stays, and goes on."""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_stream import patches, read_summary, without_times

from recast_pl.errors import StorageError
from recast_pl.files import is_whole_checkpoint
from recast_pl.training import WholeCheckpoints

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}


@contextmanager
def zygote(*prefix):
    """A function that hands requests to `zygote.py`, and its process."""
    command = [*prefix, sys.executable, str(ROOT / "tests" / "zygote.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            yield ask, process
        finally:
            process.stdin.close()


def going_on(run, words):
    """The command that a user gives after a kill."""
    known = (run / "config.yaml").is_file()
    return ["fit", "--run_dir", str(run), "--resume", "true"] if known else [*words, "--resume", "true"]


def everything(run):
    """All that a run ends with, less times and events; a config spells the same things in one way or another."""
    files = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    content = {name: None if name == "config.yaml" else path.read_bytes() for name, path in files.items()}
    return content | {"summary.json": without_times(read_summary(run))}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kills"), [(None, 36), ("derpp", 12)])
def test_a_run_killed_again_and_again_at_any_moment_ends_as_if_it_had_not_been(method, kills, tiny_fit, tmp_path):
    more = () if method is None else ("--config", f"methods/{method}.yaml")
    generator, log, killed = random.Random(0), tmp_path / "log", tmp_path / "killed"
    words = tiny_fit(*more, run_dir=killed)
    with zygote() as (ask, _):
        for run in (tmp_path / "before", tmp_path / "whole"):  # whose images have been read by the one before
            started = time.monotonic()
            assert ask(words=tiny_fit(*more, run_dir=run), log=str(log)) == 0
            seconds = time.monotonic() - started
        wanted = everything(tmp_path / "whole")
        while kills:
            status = ask(words=going_on(killed, words), log=str(log), seconds=generator.uniform(0, seconds))
            assert status in (0, -signal.SIGKILL), log.read_text()
            kills -= status != 0
            if status == 0:  # and once more from the start
                assert everything(killed) == wanted
                shutil.rmtree(killed)
        assert ask(words=going_on(killed, words), log=str(log)) == 0, log.read_text()
    assert everything(killed) == wanted


# disks


@pytest.fixture
def disk(tmp_path):
    """A small disk: how to run commands there, where the commands see it, and where this process does."""
    mine = tmp_path / "disk"
    mine.mkdir()
    # root of its own mounts, and yet without the right to write where it is not allowed
    with zygote("unshare", "-rm", "setpriv", "--bounding-set", "-dac_override") as (ask, process):
        try:
            refused = ask(shell=f"mount -t tmpfs -o size=384k none {mine}")
        except (OSError, ValueError):
            refused = True
        if refused:
            pytest.skip("this system lets no test mount a disk")
        yield ask, mine, Path(f"/proc/{process.pid}/root{mine}")


def the_error(log):
    (line,) = log.read_text().splitlines()
    assert line.startswith("recast_pl: error: ")
    return line


@pytest.mark.slow
def test_a_run_whose_disk_is_too_small_again_and_again_ends_as_if_it_had_not_been(tiny_fit, disk, tmp_path):
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
    assert len({error.partition("cannot write ")[2].split()[0] for error in errors}) > 4  # many files were refused


MIMICRY = ("fit", "--config", "mimicry_resnet34.yaml", "--trainer.max_epochs", "1", "--model.image_size", "32")
MIMICRY += ("--model.backbone.name", "torchvision/resnet18", "--model.backbone.weights", "random")
COMPARE = ("compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "--seeds", "1")


@pytest.mark.slow
def test_every_command_that_cannot_write_says_where_and_why(tiny_fit, disk, tmp_path):
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


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path, (soft, hard) = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    WholeCheckpoints().save_checkpoint({"weights": torch.zeros(1000)}, path)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))  # no file may grow beyond
    try:
        with pytest.raises(StorageError, match=r"last\.ckpt .*File too large"):
            WholeCheckpoints().save_checkpoint({"weights": torch.zeros(2000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.ckpt", before)]
