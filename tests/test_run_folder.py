"""Run folders: the names and the order of their files, and how often patches are read."""

import collections
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime

import pytest
import torch
import yaml
from conftest import ROOT
from test_stream import read_summary

from recast_pl import BackboneConfig, LinearProbe, TaskPatch, TILModule
from recast_pl.cli import main
from recast_pl.errors import RunError
from recast_pl.files import read_sealed_json, sealed_json, sha256
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.runs.folder import RunFolder, write_once
from recast_pl.runs.metrics import accuracy_matrix
from recast_pl.runs.reservation import make_folder
from recast_pl.runs.stream import Stream

PICTURE = str(next((ROOT / "data" / "clipart" / "signs").rglob("*.jpg")))


def a_patch(name):
    head = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    return TaskPatch(name, ["a", "b"], head, [], [], 32, [0.5] * 3, [0.5] * 3, "0" * 64)


def store(files, patch, record):
    """Writes a finished task as `fit` does."""
    content = patch.to_bytes()
    files.record.parent.mkdir(parents=True, exist_ok=True)
    files.patch.parent.mkdir(parents=True, exist_ok=True)
    files.record.write_text(sealed_json(record | {"patch": sha256(content)}))
    files.patch.write_bytes(content)


def test_tasks_are_in_numeric_order_beyond_a_hundred(tmp_path):
    folder, names = RunFolder(tmp_path), [f"t{index}" for index in range(103)]
    for index, name in enumerate(names):
        record = {"task": {"name": name, "accuracy": 50.0 + index}, "accuracies": {name: 50.0 + index}}
        store(folder.files(index, name), a_patch(name), record)
    assert folder.files(7, "t7").patch.name == "07_t7.safetensors"
    assert folder.files(100, "t100").record.name == "100_t100.json"
    assert list(folder.finished()) == list(folder.load_patches()) == names
    last = accuracy_matrix([files.load_record() for files in folder.finished().values()])[-1]
    assert last == [50.0 + index for index in range(103)]


def test_a_file_that_is_not_named_as_a_patch_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match="holds no trained task"):
        folder.finished()
    store(folder.files(0, "t"), a_patch("t"), {"task": {"name": "t"}})
    a_patch("t").save(tmp_path / "patches" / "mean.safetensors")
    with pytest.raises(RunError, match=r"mean\.safetensors is not named POSITION_TASK"):
        folder.load_patches(["t"])


def test_a_task_name_may_look_like_a_position(tmp_path):
    folder = RunFolder(tmp_path)
    for index, name in enumerate(["9_9", "_a", "10"]):
        store(folder.files(index, name), a_patch(name), {"task": {"name": name}})
    assert list(folder.load_patches()) == ["9_9", "_a", "10"]
    with pytest.raises(RunError, match=r"task '9' is not trained in .*; trained are 9_9, _a, 10"):
        folder.load_patches(["9"])


@pytest.fixture
def reads(monkeypatch):
    """How often each patch was read, by name of the file."""
    counts, load = collections.Counter(), TaskPatch.load

    def counted(path):
        counts[path.name] += 1
        return load(path)

    monkeypatch.setattr(TaskPatch, "load", counted)
    return counts


SIGNS, PEOPLE = "00_signs.safetensors", "01_people.safetensors"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["test"], {SIGNS: 1, PEOPLE: 1}),
        (["predict", "--task", "signs", "--images", PICTURE, "--output", "OUTPUT"], {SIGNS: 1}),
        (["export", "--task", "people", "--format", "safetensors", "--output", "OUTPUT"], {PEOPLE: 1}),
        (["analyze", "--output", "OUTPUT"], {SIGNS: 1, PEOPLE: 1}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_reads_only_the_patches_that_it_needs_and_each_once(words, expected, clipart_run, reads, tmp_path):
    output = str(tmp_path / "output")
    command = [word.replace("OUTPUT", output) for word in words]
    assert main([command[0], "--run_dir", str(clipart_run), *command[1:]]) == 0
    assert reads == expected


def test_resume_reads_each_patch_once(tiny_fit, tmp_path, reads):
    assert main(tiny_fit("--trainer.max_epochs", "1")) == 0
    assert not reads
    assert main(["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true"]) == 0
    assert reads == {"00_first.safetensors": 1, "01_second.safetensors": 1}


def test_a_method_with_shared_weights_passes_a_hundred_tasks(tiny_fit, image_folder, tmp_path):
    # 100 finished tasks are made of one; the 101st is trained
    for split in ("train", "val", "test"):  # a split of the program's own would depend on the name of the task
        image_folder(f"given/{split}", classes=2, images=4)
    run, images = tmp_path / "run", str(tmp_path / "given")
    names = [f"t{index}" for index in range(101)]
    quick = ["--config", "methods/finetune.yaml", "--trainer.max_epochs", "1", "--data.split", "official"]
    assert main(tiny_fit(*quick, "--data.tasks", json.dumps([{"name": "t0", "path": images}]))) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    (task,) = config["data"]["tasks"]
    config["data"]["tasks"] = [task | {"name": name} for name in names]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    folder = RunFolder(run)
    patch, record = (
        TaskPatch.load(folder.files(0, "t0").patch),
        read_sealed_json(folder.files(0, "t0").record, RunError),
    )
    for index, name in enumerate(names[:100]):
        accuracies = dict.fromkeys(names[: index + 1], record["task"]["accuracy"])
        named = record | {"task": record["task"] | {"name": name}, "accuracies": accuracies}
        store(folder.files(index, name), TaskPatch(**{**vars(patch), "task": name}), named)
    folder.files(0, "t0").shared.rename(folder.files(99, "t99").shared)
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert [task["name"] for task in read_summary(run)["tasks"]] == names
    assert [path.name for path in (run / "shared").iterdir()] == ["100_t100.safetensors"]
    image = str(next((tmp_path / "second").rglob("*.png")))
    words = ["predict", "--run_dir", str(run), "--task", "t99", "--images", image]
    assert main([*words, "--output", str(tmp_path / "labels.csv")]) == 0


# several processes on one folder


@contextmanager
def another_process(code, *args):
    """Runs code in another process until it prints a line; ends it after the block."""
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


HOLD = """
import sys
from pathlib import Path
from recast_pl.runs.reservation import reserved
with reserved(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_works(tiny_fit, tmp_path, capsys):
    run, quick = tmp_path / "run", tiny_fit("--trainer.max_epochs", "1")
    with another_process(HOLD, run):
        for words in (quick, [*quick, "--resume", "true"]):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert f"another process is working in run folder {run}; wait until it ends, or name another" in error
        assert [path.name for path in run.iterdir()] == [".lock"]
        assert main([*quick, "--only", "second"]) == 0  # such processes share the folder on purpose
    assert main(tiny_fit("--trainer.max_epochs", "1", "--resume", "true")) == 0
    assert [task["name"] for task in read_summary(run)["tasks"]] == ["first", "second"]
    assert not list(run.glob(".*"))
    assert main(quick) == 2
    assert "add --resume true" in capsys.readouterr().err


def test_a_fit_of_templates_is_refused_in_a_folder_in_use(tmp_path, capsys):
    with another_process(HOLD, tmp_path / "run"):
        words = ["fit", "--config", "mimicry_resnet34.yaml", "--run_dir", str(tmp_path / "run")]
        assert main([*words, "--model.backbone.weights", "random", "--trainer.max_epochs", "1"]) == 2
    assert "another process is working" in capsys.readouterr().err


def test_a_process_that_is_killed_frees_its_folder(tiny_fit, tmp_path):
    with another_process(HOLD, tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert (tmp_path / "run" / ".lock").exists()
        assert main(tiny_fit("--trainer.max_epochs", "1")) == 0  # nothing but the lock file was there


def test_a_stream_from_python_is_refused_in_a_folder_in_use(data, tmp_path):
    module = TILModule(BackboneConfig("resnet10t", "random"), [LinearProbe()])
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    stream = Stream(module, data, tmp_path / "run", TrainerFactory(settings))
    with another_process(HOLD, tmp_path / "run"):
        with pytest.raises(RunError, match="another process is working"):
            stream.run()
    assert [task["name"] for task in stream.run()["tasks"]] == ["first", "second"]


def test_runs_without_a_folder_that_start_in_one_second_get_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: make_folder(tmp_path / "logs" / "run", "2026-01-01_12-00-00"), range(8)))
    names = {"2026-01-01_12-00-00", *(f"2026-01-01_12-00-00_{number}" for number in range(2, 9))}
    assert {folder.name for folder in folders} == names == {path.name for path in (tmp_path / "logs" / "run").iterdir()}


def test_a_start_without_a_folder_makes_one_and_a_failed_start_leaves_none(tiny_fit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECAST_PL_RUN_DIR", raising=False)
    words = tiny_fit("--trainer.max_epochs", "1")
    where = words.index("--run_dir")
    del words[where : where + 2]
    assert main([*words, "--data.batch_size", "0"]) == 2
    assert not list(tmp_path.glob("logs/vit/*"))
    fixed = type("Fixed", (), {"now": staticmethod(lambda: datetime(2026, 1, 1))})
    monkeypatch.setattr("recast_pl.cli.fit.datetime", fixed)
    assert main(words) == main(words) == 0
    assert sorted(p.name for p in tmp_path.glob("logs/vit/*")) == ["2026-01-01_00-00-00", "2026-01-01_00-00-00_2"]
    assert all(read_summary(folder)["unlearnt"] == [] for folder in tmp_path.glob("logs/vit/*"))


def test_a_file_is_written_once(tmp_path):
    path = tmp_path / "folder" / "file"
    assert write_once(path, b"first")
    assert write_once(path, b"first")  # the same content
    assert not write_once(path, b"second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_process_takes_the_base_that_another_has_written_first(tiny_fit, tmp_path, monkeypatch):
    # on another kind of machine, the same decomposition is solved to other bits
    from recast_pl.methods import templates

    solve, build, other, run = templates.decompose, TILModule.build, tmp_path / "other", tmp_path / "run"

    def solve_to_other_bits(*args):
        decomposition = solve(*args)
        for bank in decomposition.banks:
            bank.templates.mul_(1 + 1e-6)
        return decomposition

    def build_while_another_process_finishes(module, image_size):
        backbone = build(module, image_size)
        if not run.exists():
            shutil.copytree(other, run)
        return backbone

    quick = ["--config", "methods/recast_dora.yaml", "--trainer.max_epochs", "1", "--only"]
    with monkeypatch.context() as patched:
        patched.setattr(templates, "decompose", solve_to_other_bits)
        assert main(tiny_fit(*quick, "second", run_dir=other)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(TILModule, "build", build_while_another_process_finishes)
        assert main(tiny_fit(*quick, "first", "--data.num_workers", "0")) == 0
    for name in ("decomposition.safetensors", "config.yaml", "patches/01_second.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert main(["test", "--run_dir", str(run)]) == 0  # both patches belong to the base in the folder
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert main(tiny_fit(*quick, "first", run_dir=tmp_path / "alone")) == 0
    alone = tmp_path / "alone" / "decomposition.safetensors"
    assert alone.read_bytes() != (run / "decomposition.safetensors").read_bytes()
