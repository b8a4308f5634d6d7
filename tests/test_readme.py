"""Every command of the README does what it says, in a folder of its own."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from recast_pl.cli import main

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("uv run python ")[2]
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if "uv run python " in line
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def run(words, folder):
    process = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.slow
def test_commands_in_their_order(folder):
    (folder / "targets.yaml").write_text(_blocks("yaml")[0])
    for command in COMMANDS:
        run(shlex.split(command), folder)
    (run_dir,) = (folder / "logs" / "quickstart").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == ["food", "people", "recreation", "signs", "digits"]
    assert summary["forgetting"] == 0
    assert summary["average_accuracy"] > 75  # 82.65 on the machine of the README


@pytest.mark.slow
def test_the_python_example(folder):
    code = _blocks("python")[-1]
    run(["-c", code], folder)
    assert (folder / "signs.safetensors").stat().st_size > 0


def test_the_piece_of_ones_own(tiny_fit, tmp_path, monkeypatch):
    (tmp_path / "my_pieces.py").write_text(_blocks("python")[0])
    (tmp_path / "biases.yaml").write_text(_blocks("yaml")[1])
    monkeypatch.syspath_prepend(tmp_path)
    assert main(tiny_fit("--config", tmp_path / "biases.yaml", "--trainer.max_epochs", "1")) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]
    assert first["task_parameters"] == 12 * (2 * 32 + 96 + 32 + 128 + 32) + 32 + 32  # blocks, norm, patches


def test_the_readme_names_every_method():
    for config in (ROOT / "configs" / "methods").glob("*.yaml"):
        assert f"`{config.name}`" in README


def _blocks(wanted):
    return [block for language, block in BLOCKS if language == wanted]


def test_the_readme_names_every_config():
    assert len(COMMANDS) == 14
    for config in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "sweeps").glob("*.yaml")]:
        assert f"`{config.name}`" in README
