"""Tasks that come later: learnt into a run that is finished, taken out, renamed, and put together from copies."""

import json
import shutil

import pytest
from conftest import write_images
from test_stream import patches, read_summary, without_times

from recast_pl.cli import main

QUIET = ("--trainer.enable_progress_bar", "false")


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
    from conftest import tiny_words

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
