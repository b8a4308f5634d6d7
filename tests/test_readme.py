"""Runs every command and every example of the README and of docs/, and checks what the pages say of the code."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT, fork_server, reaches_npm
from nbclient import NotebookClient

from recast_pl.cli import main


def site_pages(entries):
    """The files of a navigation, in its order."""
    for entry in entries:
        if isinstance(entry, str):
            yield ROOT / "docs" / entry
        else:
            for part in entry.values():
                yield from site_pages([part] if isinstance(part, str) else part)


NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
PAGES = [ROOT / "README.md", *site_pages(NAVIGATION)]
TEXT = "".join(path.read_text() for path in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
# in the order of the pages; a command that stands on two pages runs once
COMMANDS = list(
    dict.fromkeys(
        line.partition("uv run python ")[2]
        for language, block in BLOCKS
        if language == "bash"
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if "uv run python " in line
    )
)
FILES = {name: text for _, text in BLOCKS for name in re.findall(r"\A# (\w+\.(?:py|yaml))", text)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def run(words, folder):
    process = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def python_blocks(part):
    """Python examples that contain a text, each once."""
    return list(dict.fromkeys(text for language, text in BLOCKS if language == "python" and part in text))


def quickly(words):
    """A command that trains tasks for as many epochs as its configuration says, with one epoch, to save CI minutes."""
    own = {"--trainer.max_epochs", "--budget.seconds", "--extend", "--resume"}
    return words if words[0] not in ("fit", "add") or own & set(words) else [*words, "--trainer.max_epochs", "1"]


@pytest.mark.slow
def test_all_commands_run_in_the_order_of_the_pages(folder):
    for name in ("targets.yaml", "mine.yaml"):
        (folder / name).write_text(FILES[name])
    first, *others = (shlex.split(command) for command in COMMANDS)
    run(first, folder)
    with fork_server(folder=folder) as (ask, _):  # so that the library is imported once for all of them
        for m, package, *words in others:
            assert (m, package) == ("-m", "recast_pl")
            if "web" in words and not reaches_npm():
                continue
            assert ask(words=quickly(words), log=str(folder / "log")) == 0, (folder / "log").read_text()
    (run_dir,) = (folder / "logs" / "quickstart").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == ["food", "people", "recreation", "signs", "digits"]
    assert summary["forgetting"] == 0
    assert summary["average_accuracy"] > 75  # 85.56 on the machine of the README
    short, full, old, routed = python_blocks("recast_pl.load(")
    assert run(["-c", short], folder).startswith("flags ")
    assert run(["-c", routed], folder).startswith("signs ")
    assert len(ast.literal_eval(run(["-c", old], folder))) == 4  # before classes were added to the task
    tasks, label, labels = run(["-c", full], folder).splitlines()
    assert "['signs', 'people']" in tasks
    assert "flags" in label  # the probability of each class, by name
    assert len(ast.literal_eval(labels)) == 2


@pytest.mark.slow
def test_the_example_of_training_from_python_runs(folder):
    (code,) = python_blocks("import lightning")
    run(["-c", code], folder)
    assert (folder / "signs.safetensors").stat().st_size > 0


PARAMETERS = {
    "biases": 12 * (2 * 32 + 96 + 32 + 128 + 32) + 32 + 32,  # blocks, norm, patches
    "offset": 32,
    "tiny": 2 * 2 * 2,  # two blocks, two weights in each, two templates
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_examples_of_own_pieces_and_backbones_run(name, tiny_fit, tmp_path, monkeypatch):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = tiny_fit("--config", tmp_path / f"{name}.yaml", "--trainer.max_epochs", "1")
    if name == "tiny":  # its own backbone replaces the one of the fixture
        words = [*words, "--model.backbone.name", "tiny.tiny", "--model.backbone.args", "{}"]
    assert main(words) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run"), "--trust"]) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]
    assert first["task_parameters"] == PARAMETERS[name]


@pytest.mark.slow
def test_the_notebook_runs(folder):
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    computed = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert [pictures(outputs) for outputs in computed] == [pictures(outputs) for outputs in stored]


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_is_small_enough_for_the_repository():
    assert (ROOT / "examples" / "quickstart.ipynb").stat().st_size < 300_000


def test_the_configuration_reference_is_up_to_date():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "reference" / "configuration.md").read_text() == generate["reference"]()
    assert (ROOT / "docs" / "reproducing.md").read_text() == generate["reproducing"]()


def test_the_pages_name_files_of_the_code_that_exist():
    equations = (ROOT / "docs" / "reference" / "equations.md").read_text()
    methods = "".join(path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md"))
    inside = re.findall(r"`((?:decomposition|methods|learning|runs|inference)/\w+\.py)`", equations)
    paths = [f"recast_pl/{path}" for path in inside] + re.findall(r"`(recast_pl/\w+/\w+\.py)`", methods)
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_the_documentation_names_every_config():
    assert len(COMMANDS) == 43
    for folder in (".", "methods", "options", "sweeps", "board"):
        for config in (ROOT / "configs" / folder).glob("*.yaml"):
            assert f"`{config.name}`" in TEXT


def test_every_method_has_a_page_with_its_configuration():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md"))
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    for config in (ROOT / "configs" / "methods").glob("*.yaml"):
        assert f"`{config.name}`" in index
        if not config.name.startswith("recast_"):  # these are on the page of combinations
            assert f'--8<-- "configs/methods/{config.name}"' in pages


def test_all_links_of_the_pages_lead_to_files():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())]
    assert len(links) > 80
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
