"""Runs in repositories of the Hugging Face Hub, by the real client, against a hub on this machine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import ROOT
from loopback_hub import TOKEN, loopback_hub
from test_stream import patches, read_summary

import recast_pl
from recast_pl import TaskPatch
from recast_pl.cli import main
from recast_pl.files import sealed_json, sha256
from recast_pl.reporting.card import find_base_model, interval
from recast_pl.runs.folder import RunFolder

REPO = "someone/tasks"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and a user of it who has a token and an empty cache."""
    with loopback_hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
        yield hub


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


@pytest.fixture
def other(tmp_path):
    """The folder of a run on another machine."""
    return tmp_path / "other" / "run"


def push(run, *more):
    return main(["push", "--run_dir", str(run), "--repo", REPO, *map(str, more)])


def pull(run, *more):
    return main(["pull", "--repo", REPO, "--run_dir", str(run), *map(str, more)])


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def names(run):
    return RunFolder(run).finished_names()


def refused(capsys, status):
    """The only line of an error, which shows no token."""
    shown = capsys.readouterr()
    assert status == 2
    assert "hf_right" not in shown.out + shown.err
    assert shown.err.count("\n") == 1, shown.err
    return shown.err


def change(run, task, **facts):
    """Changes facts of a patch, and its record with them."""
    (files,) = RunFolder(run).trained([task])
    patch, record = files.load()
    content = replace(patch, **facts).to_bytes()
    files.patch.write_bytes(content)
    files.record.write_text(sealed_json({**record, "patch": sha256(content)}))


def test_tasks_predict_on_another_machine_as_before(hub, run, other, tiny_run, tmp_path, monkeypatch, capsys):
    assert push(run, "--license", "apache-2.0") == 0
    assert hub.url in capsys.readouterr().out
    files = hub.files(REPO)
    tasks = {f"{kind}/{task}" for kind in ("patches", "signatures") for task in ("00_first", "01_second")}
    assert set(files) == {
        *(f"{task}.safetensors" for task in tasks),
        *("tasks/00_first.json", "tasks/01_second.json", "decomposition.safetensors"),
        *("config.yaml", "summary.json", "README.md", ".gitattributes"),
    }
    for path, content in files.items():
        if not path.endswith(".safetensors"):
            assert str(tiny_run.parent).encode() not in content, path
            assert str(ROOT).encode() not in content, path
    machine = json.loads(files["tasks/00_first.json"])["origin"]["machine"]
    assert not machine.startswith(os.uname().nodename)
    image = tiny_run.parent / "first" / "class1" / "000.png"
    before = recast_pl.load(run).predict([image], "first") + recast_pl.load(run).predict([image])
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)
    assert pull(other) == 0
    assert "first, second" in capsys.readouterr().out
    assert patches(other) == patches(run)
    assert read_summary(other) == read_summary(run)
    assert recast_pl.load(other).predict([image], "first") + recast_pl.load(other).predict([image]) == before
    assert [path.name for path in other.parent.iterdir()] == ["run"]
    assert main(["patch", "verify", "--run_dir", str(other)]) == 0
    moved = ["--data_root", str(tiny_run.parent)]
    assert main(["test", "--run_dir", str(other), *moved]) == 0
    assert "equal" in capsys.readouterr().out


def test_the_card_says_what_the_tasks_are(hub, run):
    assert push(run) == 0
    card = hub.files(REPO)["README.md"].decode()
    facts = huggingface_hub.ModelCard(card).data.to_dict()
    assert facts["library_name"] == "recast_pl"
    assert "license" not in facts
    assert "base_model" not in facts
    assert "have stated no licence" in card
    assert "class0, class1, class2" in card
    record = RunFolder(run).finished()["first"].load_record()["task"]
    share, n, z = record["accuracy"] / 100, record["test_images"], 1.959964
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((100 * (middle + sign * half) / (1 + z * z / n)) for sign in (-1, 1))
    assert f"| first | 3 | {100 * share:.1f} | {low:.1f}–{high:.1f} | {n} | {record['patch_bytes']:,} |" in card
    assert RunFolder(run).finished()["first"].load()[0].base in card
    commands = re.findall(r"^python -m recast_pl (.*)$", card, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["pull", "predict"]
    assert push(run, "--license", "cc-by-4.0") == 0
    assert huggingface_hub.ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "cc-by-4.0"


def test_intervals_and_base_models_of_cards():
    low, high = interval(100 * 8 / 10, 10)
    assert (low, high) == pytest.approx((49.02, 94.33), abs=0.01)  # Brown, Cai and DasGupta (2001), by hand
    assert interval(100.0, 8)[1] == 100
    assert find_base_model({"name": "vit_small_patch16_224"}).startswith("timm/vit_small_patch16_224.")
    assert find_base_model({"name": "hf-hub:someone/vit", "weights": "hub"}) == "someone/vit"
    for backbone in ({"name": "vit_small_patch16_224", "weights": "random"}, {"name": "torchvision/resnet18"}):
        assert find_base_model(backbone) is None


def test_pull_adds_the_tasks_that_a_run_lacks(hub, run, other, capsys):
    assert push(run) == 0
    shutil.copytree(run, other)
    assert main(["remove", "--run_dir", str(other), "--task", "first"]) == 0
    capsys.readouterr()
    assert pull(other) == 0
    assert capsys.readouterr().out.endswith("run has taken first\n")
    assert names(other) == ["second", "first"]
    first = RunFolder(other).finished()["first"]
    assert first.patch.read_bytes() == RunFolder(run).finished()["first"].patch.read_bytes()
    assert [task["name"] for task in read_summary(other)["tasks"]] == ["second", "first"]
    before = contents(other)
    assert pull(other) == 0
    assert "no task that is new" in capsys.readouterr().out
    assert contents(other) == before


def test_pull_takes_the_tasks_that_are_named(hub, run, other):
    assert push(run) == 0
    assert recast_pl.pull(REPO, other, ["second"]) == ["second"]
    assert [task["name"] for task in read_summary(other)["tasks"]] == ["second"]
    assert recast_pl.load(other).tasks == ["second"]
    assert recast_pl.pull(REPO, other) == ["first"]
    assert recast_pl.load(other).tasks == ["second", "first"]


def test_conflicts_and_other_bases_change_nothing(hub, run, other, capsys):
    assert push(run) == 0
    shutil.copytree(run, other)
    change(other, "second", metrics={"accuracy": 1.0})
    before = contents(other)
    assert "'second'" in refused(capsys, pull(other))
    assert contents(other) == before
    shutil.rmtree(other)
    shutil.copytree(run, other)
    assert main(["remove", "--run_dir", str(other), "--task", "second"]) == 0
    change(other, "first", base="0" * 64)
    before = contents(other)
    capsys.readouterr()
    assert f"{REPO}/patches/01_second.safetensors is of base" in refused(capsys, pull(other, "--tasks", "second"))
    assert contents(other) == before
    shutil.rmtree(other)
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert "has files but holds no run" in refused(capsys, pull(other))


@pytest.mark.parametrize(
    "path",
    [
        "patches/00_first.safetensors",
        "tasks/01_second.json",
        "signatures/00_first.safetensors",
        "decomposition.safetensors",
    ],
)
def test_damaged_files_are_named_and_leave_nothing(hub, run, other, capsys, path):
    assert push(run) == 0
    capsys.readouterr()
    whole = hub.files(REPO)[path]
    hub.commit(REPO, "main", {path: whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]})
    assert f"{REPO}/{path}" in refused(capsys, pull(other))
    assert list(other.parent.iterdir()) == []
    hub.commit(REPO, "main", {path: whole})
    assert pull(other) == 0
    assert recast_pl.load(other).tasks == ["first", "second"]


def test_a_file_that_is_damaged_in_the_cache_alone_comes_again(hub, run, other, tmp_path):
    assert push(run) == 0
    assert pull(other) == 0
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/patches/00_first.safetensors")
    whole = cached.read_bytes()
    cached.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert pull(other.parent / "again") == 0
    assert patches(other.parent / "again") == patches(run)


def test_an_interrupted_pull_is_repeated(hub, run, other, capsys):
    assert push(run) == 0
    hub.broken = {"decomposition.safetensors"}
    capsys.readouterr()
    assert REPO in refused(capsys, pull(other))
    assert list(other.parent.iterdir()) == []
    hub.broken = set()
    hub.requests.clear()
    assert pull(other) == 0
    fetched = [path for command, path in hub.requests if command == "GET" and "/resolve/" in path]
    assert "config.yaml" not in [path.rpartition("/")[2] for path in fetched]  # it has come before
    assert names(other) == ["first", "second"]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("missing", "there is no repository someone/tasks"),
        ("wrong token", "the token is not accepted; log in with"),
        ("revision", "there is no revision 'v9' of someone/tasks; check --revision"),
        ("network", "someone/tasks cannot be reached"),
        ("gated", "someone/tasks is gated: ask for access at"),
        ("task", "task 'third' is not in someone/tasks, which has first, second; check --tasks"),
        ("empty", "holds no run"),
    ],
)
def test_what_pull_refuses(hub, run, other, capsys, monkeypatch, case, named):
    more = {"revision": ["--revision", "v9"], "task": ["--tasks", "third"]}.get(case, [])
    if case == "empty":
        hub.make(REPO)
    elif case != "missing":
        assert push(run) == 0
    hub.gated = case == "gated"
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", TOKEN + "Not")
    if case == "network":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    capsys.readouterr()
    assert named in refused(capsys, pull(other, *more))
    assert not other.exists()


def test_what_push_refuses(hub, run, capsys, monkeypatch):
    assert "'third'" in refused(capsys, push(run, "--tasks", "third"))
    assert "is not a run folder" in refused(capsys, push(run.parent / "none"))
    assert hub.repos == {}
    hub.forbidden = True
    assert "may not do this to someone/tasks" in refused(capsys, push(run))
    hub.forbidden = False
    hub.make(REPO)
    assert "is there and public" in refused(capsys, push(run, "--private"))
    hub.on_commit = lambda: hub.commit(REPO, "main", {"other.txt": b"of somebody else"})
    assert "was changed meanwhile" in refused(capsys, push(run))
    assert "patches/00_first.safetensors" not in hub.files(REPO)
    assert "cannot be the name of a repository" in refused(
        capsys, main(["push", "--run_dir", str(run), "--repo", "a/b/c"])
    )
    for token, named in (("", "there is no token"), (TOKEN + "Not", "the token is not accepted")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert named in refused(capsys, push(run))
    (run / "shared").mkdir()
    (run / "shared" / "01_second.safetensors").touch()
    assert "share weights" in refused(capsys, push(run))


def test_push_adds_to_the_tasks_of_a_repository(hub, run, other, capsys):
    assert push(run, "--tasks", "first", "--private") == 0
    assert hub.private[REPO]
    assert main(["remove", "--run_dir", str(run), "--task", "first"]) == 0
    assert push(run) == 0
    assert [line.split("_", 1)[1] for line in sorted(hub.files(REPO)) if line.startswith("tasks/")] == [
        "second.json",
        "first.json",
    ]
    listed = yaml.safe_load(hub.files(REPO)["config.yaml"])["data"]["tasks"]
    assert [task["name"] for task in listed] == ["second", "first"]
    assert push(run) == 0
    change(run, "second", metrics={"accuracy": 2.0})
    assert push(run) == 0  # it takes the place of the one that was there
    assert pull(other) == 0
    assert RunFolder(other).load_patches()["second"].metrics == {"accuracy": 2.0}
    assert names(other) == ["second", "first"]
    change(run, "second", base="0" * 64)
    capsys.readouterr()
    assert "is of base" in refused(capsys, push(run))


def test_branches_and_large_files(hub, run, other):
    hub.lfs = True
    assert push(run, "--revision", "try") == 0
    assert len(hub.objects) == 5
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert pull(other, "--revision", "try") == 0
    assert patches(other) == patches(run)


def test_a_configuration_with_other_code_is_refused(hub, run, other, capsys):
    assert push(run) == 0
    content = yaml.safe_load(hub.files(REPO)["config.yaml"])
    content["trainer"]["callbacks"] = [{"class_path": "crash_callbacks.KillAt", "init_args": {"hook": "setup"}}]
    hub.files(REPO)["config.yaml"] = yaml.safe_dump(content).encode()
    sys.modules.pop("crash_callbacks", None)
    capsys.readouterr()
    assert "crash_callbacks.KillAt" in refused(capsys, pull(other))
    assert "crash_callbacks" not in sys.modules
    assert not other.exists()
    assert pull(other, "--trust") == 0


def test_weights_are_uploaded_when_asked_for_and_found_in_the_folder(hub, run, other, tmp_path):
    weights = tmp_path / "elsewhere" / "tiny.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"numbers")
    config = (run / "config.yaml").read_text().replace("weights: random", f"weights: {weights}")
    (run / "config.yaml").write_text(config)
    assert push(run) == 0
    assert "tiny.safetensors" not in hub.files(REPO)
    assert yaml.safe_load(hub.files(REPO)["config.yaml"])["model"]["init_args"]["backbone"]["weights"] == weights.name
    assert push(run, "--weights") == 0
    assert hub.files(REPO)["tiny.safetensors"] == b"numbers"
    assert pull(other) == 0
    assert (other / "tiny.safetensors").read_bytes() == b"numbers"


@pytest.mark.slow
def test_a_process_reads_the_address_and_the_token_from_its_environment(hub, run, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "recast_pl", "push", "--run_dir", str(run), "--repo", REPO]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    assert process.stdout.startswith(f"pushed: {hub.url}/{REPO}/commit/")
    assert TaskPatch.load(run / "patches" / "00_first.safetensors")
    assert "patches/00_first.safetensors" in hub.files(REPO)
