"""What commands write and print: links, pipes, devices, standard output, permissions, and names of every kind."""

import csv
import errno
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from recast_pl import TaskPatch
from recast_pl.cli import main
from recast_pl.errors import StorageError
from recast_pl.files import write_atomic
from recast_pl.reporting.tables import evaluation_table, markdown_table
from recast_pl.runs.folder import RunFolder, write_once
from recast_pl.terminal import open_console

PICTURE = str(next((ROOT / "data" / "clipart" / "signs").rglob("*.jpg")))
SIGNS = "patches/00_signs.safetensors"


@pytest.fixture
def run(clipart_run):
    return clipart_run


def average(run, output):
    return main(["patch", "average", str(run / SIGNS), "--output", str(output)])


def mean(run):
    return TaskPatch.load(run / SIGNS).with_tensors(TaskPatch.load(run / SIGNS).tensors, metrics={}).to_bytes()


# files that are not plain


def test_a_link_is_followed(run, tmp_path):
    target, link, chain = tmp_path / "far" / "real.safetensors", tmp_path / "link", tmp_path / "chain"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("far/real.safetensors")
    chain.symlink_to("link")
    assert average(run, chain) == 0
    assert (link.is_symlink(), chain.is_symlink(), target.read_bytes()) == (True, True, mean(run))
    assert os.listdir(target.parent) == ["real.safetensors"]


def test_a_link_to_a_file_that_does_not_exist_yet_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("later/file")
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later" / "file").read_text() == "text"


def test_a_patch_of_a_run_may_be_a_link(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.move(copy / SIGNS, tmp_path / "elsewhere")
    (copy / SIGNS).symlink_to(tmp_path / "elsewhere")
    patch = TaskPatch.load(copy / SIGNS)
    patch.save(copy / SIGNS)
    assert (copy / SIGNS).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == patch.to_bytes()


def test_a_pipe_is_written_directly(run, tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert average(run, pipe) == 0
    reader.join(20)
    assert read == [mean(run)]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_pipe_of_the_shell_is_written_directly(run):
    reading, writing = os.pipe()
    try:
        assert average(run, f"/dev/fd/{writing}") == 0
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == mean(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can replace a device")
def test_a_device_is_not_replaced(run, tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.write_bytes(b"x")
    except OSError:
        pytest.skip("devices cannot be made here")
    assert average(run, null) == 0
    assert stat.S_ISCHR(null.lstat().st_mode)


def test_dev_null_takes_everything(run):
    assert average(run, "/dev/null") == 0
    assert not os.path.isfile("/dev/null")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_device_that_is_full_is_an_error_of_one_line(run, capsys):
    assert average(run, "/dev/full") == 2
    assert "cannot write /dev/full" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_gets_the_file_and_standard_error_the_message(name, run, capfdbinary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert average(run, name) == 0
    out, err = capfdbinary.readouterr()
    assert out == mean(run)
    assert b"written: " in err
    assert os.listdir(tmp_path) == []


def test_standard_output_may_be_a_file_that_the_shell_has_opened(tmp_path):
    """A redirected `/dev/stdout` leads to a plain file, which must not be replaced while the shell writes to it."""
    code = "from recast_pl.files import write_atomic\nprint('a')\nwrite_atomic('/dev/stdout', 'b')\nprint('c')"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=ROOT)
    assert (tmp_path / "out").read_text() == "a\nbc\n"


LONG = "from recast_pl.files import write_atomic; write_atomic('-', 'x' * 3_000_000)"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(unbuffered):
    words = f"set -o pipefail; {sys.executable} -c {json.dumps(LONG)} | head -c 1"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", words], capture_output=True, cwd=ROOT, text=True, env=environment)
    assert (done.stdout, done.stderr, done.returncode) == ("x", "", 1)


def test_a_slow_reader_gets_everything():
    words = f"{sys.executable} -c {json.dumps(LONG)} | (head -c 1; sleep 0.5; wc -c)"
    done = subprocess.run(
        ["bash", "-c", words], capture_output=True, cwd=ROOT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert done.stdout.split() == ["x2999999"]


def test_standard_output_of_a_notebook_gets_text(monkeypatch):
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    write_atomic("-", b"caf\xe9")
    assert notebook.getvalue() == "caf\ufffd"


def test_a_bank_of_several_files_needs_a_file_name(run, tmp_path, capsys):
    for output in ("-", "/dev/null", tmp_path):
        assert main(["export", "--run_dir", str(run), "--format", "onnx_bank", "--output", str(output)]) == 2
        assert f"--output {output}, which must be the name of a file" in capsys.readouterr().err
    assert not os.path.exists("/dev/null.signs.safetensors")


# permissions and faults


def test_a_file_keeps_its_permissions_and_a_new_one_follows_the_umask(run, tmp_path):
    private, new, before = tmp_path / "private", tmp_path / "new", os.umask(0o027)
    try:
        private.write_bytes(b"old")
        private.chmod(0o600)
        assert average(run, private) == average(run, new) == 0
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (private, new)] == [0o600, 0o640]


def test_names_as_long_as_the_system_allows(run, tmp_path, capsys):
    assert average(run, tmp_path / ("x" * 255)) == 0
    assert write_once(tmp_path / ("y" * 255), b"content")
    assert average(run, tmp_path / ("x" * 256)) == 2
    assert os.strerror(errno.ENAMETOOLONG) in capsys.readouterr().err
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["x", "y"]


def test_places_that_cannot_be_written_are_errors_of_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path, tmp_path / "file" / "below", "/proc/nowhere/file"):
        assert average(run, output) == 2
        error = capsys.readouterr().err
        assert (f"cannot write {output}" in error, error.count("\n")) == (True, 1), error
    assert (tmp_path / "file").read_text() == "kept"


def test_parts_that_fail_leave_the_old_file(tmp_path):
    def parts():
        yield "new"
        raise StorageError("stop")

    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match="stop"):
        write_atomic(tmp_path / "file", parts())
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# names


ODD = ("[red]a", "[/]", "a [bold]b[/bold]", ":cat:", "[", "a]b[c", "\\[x]", "[link=https://example.org]x[/link]")


def renamed(run, path):
    """A copy of a patch whose classes have odd names."""
    patch = TaskPatch.load(run / SIGNS)
    changed = type(patch)(**{**vars(patch), "classes": list(ODD[: len(patch.classes)])})
    path.parent.mkdir(parents=True, exist_ok=True)
    changed.save(path)
    return path


@pytest.mark.parametrize("folder", ["plain", "[red]", "[/]", ":cat:"])
def test_names_are_printed_as_they_are(folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = renamed(run, Path(folder) / "p.safetensors")
    assert main(["patch", "show", str(path)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for name in (*ODD[:5], str(path)):
        assert "".join(name.split()) in shown, name
    assert main(["patch", "diff", str(path), str(run / SIGNS)]) == 0
    assert "[/]" in capsys.readouterr().out
    assert main(["patch", "verify", str(path)]) == 0
    assert f"{path}: intact" in capsys.readouterr().out
    output = f"{folder}/mean"
    assert average(run, output) == 0
    assert f"written: {output} (" in capsys.readouterr().out


def test_commands_on_a_run_print_its_folder_as_it_is(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "[bold]run[/bold] :cat: [/]")
    assert main(["report", "--runs", str(folder), "--output", str(folder / "[/report]")]) == 0
    assert f"report: {folder}/[/report]/report.html" in capsys.readouterr().out
    assert main(["analyze", "--run_dir", str(folder)]) == 0
    assert f"analysis: {folder}/analysis" in capsys.readouterr().out
    assert main(["export", "--run_dir", str(folder), "--task", "signs", "--format", "safetensors"]) == 0
    assert f"written: {folder}/export/signs.safetensors" in capsys.readouterr().out
    assert main(["patch", "verify", str(folder / SIGNS), "--run_dir", str(folder)]) == 0
    assert f"fits {folder}" in capsys.readouterr().out


def test_a_run_folder_with_brackets_is_trained(tiny_fit, tmp_path, capsys):
    words = tiny_fit("--trainer.max_epochs", "1", run_dir=tmp_path / "[/] [red]run")
    assert main(words) == 0
    assert f"run folder: {tmp_path}/[/] [red]run\n" in capsys.readouterr().out


def test_a_difference_is_printed_in_red(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = open_console()
    with console.capture() as capture:
        console.print(evaluation_table([("[/]", 1.0, 2.0)]))
    printed = capture.get()
    assert "[/]" in printed
    assert "\x1b[1;31mDIFFERENT" in printed


def test_a_bar_in_a_cell_is_no_border_of_a_markdown_table():
    assert markdown_table((["a|b"], [["c|d"]])) == "| a\\|b |\n| --- |\n| c\\|d |\n"


def test_hidden_files_of_other_systems_are_no_patches(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("._00_signs.safetensors", ".DS_Store", "Thumbs.db", ".00_signs.safetensors", "desktop.ini"):
        (copy / "patches" / name).write_bytes(b"\0\5\26\7")
    assert list(RunFolder(copy).load_patches()) == ["signs", "people"]
    assert main(["test", "--run_dir", str(copy)]) == 0
    (copy / "patches" / "00_signs.safetensors").unlink()
    (copy / "patches" / "01_people.safetensors").unlink()
    assert not RunFolder(copy).is_trained


@pytest.fixture
def cafe(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    return folder


def test_names_that_are_not_utf8_are_printed_and_written(run, cafe, capsys):
    picture = shutil.copy(PICTURE, cafe / os.fsdecode(b"\xff.jpg"))
    output = cafe / os.fsdecode(b"\xe9.csv")
    words = ["predict", "--run_dir", str(run), "--task", "signs", "--images", str(picture)]
    assert main([*words, "--output", str(output)]) == 0
    with open(output, encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.DictReader(file))["path"] == str(picture)
    assert average(run, cafe / "mean") == 0
    assert r"caf\udce9/mean" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mean", "missing"])
def test_a_patch_whose_name_is_not_utf8_is_refused_in_one_line(name, run, cafe, capsys):
    TaskPatch.load(run / SIGNS).save(cafe / "mean")
    assert main(["patch", "show", str(cafe / name)]) == 2
    error = capsys.readouterr().err
    assert rf"caf\udce9/{name}" in error
    assert ("rename it" in error) == (name == "mean")
