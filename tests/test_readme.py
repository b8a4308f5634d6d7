"""Every command and every example of the README and of docs/ does what it says, in a folder of its own."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, fork_server

from recast_pl.cli import main

README = (ROOT / "README.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCS, re.DOTALL)
COMMANDS = [
    line.partition("uv run python ")[2]
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if "uv run python " in line
]
FILES = {name: text for _, text in BLOCKS for name in re.findall(r"\A# (\w+\.(?:py|yaml))", text)}


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
    (folder / "targets.yaml").write_text(FILES["targets.yaml"])
    first, *others = (shlex.split(command) for command in COMMANDS)
    run(first, folder)
    with fork_server(folder=folder) as (ask, _):  # which need not import everything anew
        for m, package, *words in others:
            assert (m, package) == ("-m", "recast_pl")
            assert ask(words=words, log=str(folder / "log")) == 0, (folder / "log").read_text()
    (run_dir,) = (folder / "logs" / "quickstart").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == ["food", "people", "recreation", "signs", "digits"]
    assert summary["forgetting"] == 0
    assert summary["average_accuracy"] > 75  # 82.35 on the machine of the README
    (code,) = (text for language, text in BLOCKS if language == "python" and "recast_pl.load(" in text)
    tasks, label, labels = run(["-c", code], folder).splitlines()
    assert "['signs', 'people']" in tasks
    assert "flags" in label  # a probability for each class, by name
    assert len(ast.literal_eval(labels)) == 2


@pytest.mark.slow
def test_the_python_example(folder):
    (code,) = (text for language, text in BLOCKS if language == "python" and text.startswith("import lightning"))
    run(["-c", code], folder)
    assert (folder / "signs.safetensors").stat().st_size > 0


PARAMETERS = {
    "biases": 12 * (2 * 32 + 96 + 32 + 128 + 32) + 32 + 32,  # blocks, norm, patches
    "offset": 32,
    "tiny": 2 * 2 * 2,  # in each of two blocks two weights, of two templates
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_of_ones_own(name, tiny_fit, tmp_path, monkeypatch):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = tiny_fit("--config", tmp_path / f"{name}.yaml", "--trainer.max_epochs", "1")
    if name == "tiny":  # a backbone of its own takes the place of the fixture's
        words = [*words, "--model.backbone.name", "tiny.tiny", "--model.backbone.args", "{}"]
    assert main(words) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]
    assert first["task_parameters"] == PARAMETERS[name]


def test_the_configuration_reference_is_that_of_the_code():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "configuration.md").read_text() == generate["reference"]()


def test_the_tables_of_the_mathematics_name_what_there_is():
    text = (ROOT / "docs" / "maths.md").read_text()
    paths = re.findall(r"`((?:decomposition|til)/\w+\.py|metrics\.py)`", text)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / "recast_pl" / path).is_file()


def test_the_documentation_names_every_config():
    assert len(COMMANDS) == 22
    for folder, text in ((".", DOCS), ("methods", README), ("sweeps", DOCS)):
        for config in (ROOT / "configs" / folder).glob("*.yaml"):
            assert f"`{config.name}`" in text


def test_links_of_the_documentation_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())]
    assert len(links) > 8
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
