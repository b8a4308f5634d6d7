"""The command `predict`: which images it finds, what it writes, and images that cannot be read."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import pytest
from PIL import Image
from test_predictor import FOOD, SIGNS, model, run  # noqa: F401

from recast_pl.cli import main
from recast_pl.inference.files import classify_files


@pytest.fixture
def photos(tmp_path):
    """Three images in a folder and its subfolders, beside files that are no images."""
    folder = tmp_path / "photos"
    (folder / "a b" / "deep").mkdir(parents=True)
    for source, name in zip(FOOD, ("one.jpg", "a b/two.JPG", "a b/deep/three.jpeg"), strict=False):
        shutil.copy(source, folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def predict(run, capfd):  # noqa: F811
    """Runs the command for a task; returns its exit status, the rows that it prints, and its messages."""

    def ask(*words, task="food"):
        status = main(["predict", "--run_dir", str(run), "--task", task, *map(str, words)])
        said = capfd.readouterr()
        return status, said.out, said.err

    return ask


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def paths(text):
    return [row["path"] for row in rows(text)]


def test_folders_patterns_and_lists_of_images_are_classified(predict, photos, tmp_path, model):  # noqa: F811
    one, two, three = (str(photos / name) for name in ("one.jpg", "a b/two.JPG", "a b/deep/three.jpeg"))
    status, text, said = predict("--images", photos)
    assert (status, sorted(paths(text))) == (0, sorted([one, two, three]))
    assert said == "1 other files in the folders have no ending of an image and were left out\n"
    wanted = {row["path"]: row for row in rows(text)}
    for prediction, path in zip(model.predict([one, two, three], "food"), (one, two, three), strict=True):
        assert (wanted[path]["label"], wanted[path]["probability"]) == (
            prediction.label,
            f"{prediction.probability:.6f}",
        )
    assert paths(predict("--images", photos / "**" / "*.jp*g")[1]) == [three, one]
    assert paths(predict("--images", photos / "a*")[1]) == [three, two]
    assert paths(predict("--images", one, photos / "a b")[1]) == [one, three, two]
    (tmp_path / "list.txt").write_bytes(f"\ufeff{two}\r\n\n{photos / 'a b' / 'deep'}\n".encode())
    assert paths(predict("--list", tmp_path / "list.txt")[1]) == [two, three]
    assert paths(predict("--list", tmp_path / "list.txt", "--images", one)[1]) == [one, two, three]


def test_names_with_brackets_and_of_any_bytes_are_files(predict, photos, tmp_path):
    odd = [photos / "x[1].jpg", photos / os.fsdecode(b"caf\xe9.jpg"), photos / "line\x0bbreak.jpg"]
    for path in odd:
        shutil.copy(FOOD[0], path)
    (tmp_path / "list.txt").write_bytes(b"\n".join(map(os.fsencode, odd)))
    output = tmp_path / "labels.csv"
    for words in (["--images", *odd], ["--list", tmp_path / "list.txt"]):
        assert predict(*words, "--output", output)[0] == 0
        assert os.fsencode(odd[1]) in output.read_bytes()
        assert paths(output.read_bytes().decode(errors="surrogateescape")) == list(map(str, odd))


def test_images_that_cannot_be_read_are_skipped_counted_and_do_not_lose_the_others(predict, photos):
    (photos / "torn.jpg").write_bytes(FOOD[0].read_bytes()[:1000])
    (photos / "empty.png").write_bytes(b"")
    (photos / "folder.jpg").mkdir()
    status, text, said = predict("--images", photos / "one.jpg", photos, photos / "missing.jpg", photos / "notes.txt")
    assert status == 3
    assert len(rows(text)) == 4
    for name in ("torn.jpg", "empty.png", "missing.jpg", "notes.txt"):
        assert f"skipped: cannot read image '{photos / name}'" in said
    assert "4 of 8 images cannot be read and were skipped" in said
    output = photos.parent / "labels.csv"
    status, _, said = predict("--images", photos, "--on_bad_image", "error", "--output", output)
    assert (status, output.exists()) == (2, False)
    assert "empty.png" in said


def test_many_bad_images_are_counted_but_not_all_named(predict, photos):
    for number in range(70):
        (photos / f"bad[red]{number}.png").write_bytes(b"")
    status, text, said = predict("--images", photos)
    assert (status, len(rows(text)), said.count("skipped: ")) == (3, 3, 20)
    assert "70 of 73 images" in said
    assert "bad[red]0.png" in said


def test_nothing_to_classify_is_an_error(predict, tmp_path, photos):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.png").write_text("")
    output = tmp_path / "labels.csv"
    for words, message in (
        ([], "no image is named; add --images"),
        (["--images", tmp_path / "empty"], "no image found in"),
        (["--images", photos, tmp_path / "empty"], "no image found in"),
        (["--images", tmp_path / "*.tif"], "no image found in"),
        (["--list", tmp_path / "empty.txt"], "is empty; write one image file"),
        (["--list", tmp_path / "nowhere.txt"], "cannot read the list"),
        (["--images", tmp_path / "bad.png"], "none of the 1 images can be read"),
        (["--images", photos, "--top_k", "-1"], "top_k"),
        (["--images", photos, "--format", "xml"], "format"),
    ):
        status, _, said = predict(*words, "--output", output)
        assert (status, message in said, output.exists()) == (2, True, False), said
        assert "Traceback" not in said


def test_the_most_probable_classes_as_csv_and_as_json_lines(predict, photos, tmp_path, model):  # noqa: F811
    image = photos / "one.jpg"
    (wanted,) = model.predict(image, "food")
    ranked = sorted(wanted.probabilities.items(), key=lambda item: -item[1])
    for count in (2, 0, 1000):
        found = rows(predict("--images", image, "--top_k", count)[1])
        assert {row["path"] for row in found} == {str(image)}
        cut = ranked[: count or None]
        assert [(row["label"], row["probability"]) for row in found] == [(label, f"{p:.6f}") for label, p in cut]
        lines = predict("--images", image, image, "--top_k", count, "--format", "jsonl")[1].splitlines()
        assert len(lines) == 2
        content = json.loads(lines[0])
        assert content == {
            "path": str(image),
            "task": "food",
            "label": wanted.label,
            "probability": pytest.approx(wanted.probability),
            "probabilities": pytest.approx(dict(cut)),
        }
        assert list(content["probabilities"]) == [label for label, _ in cut]
    output = tmp_path / "labels.jsonl"
    assert predict("--images", image, "--output", output) == (0, "", "")
    assert json.loads(output.read_text())["label"] == wanted.label


def test_standard_output_has_nothing_but_rows(predict, photos):
    status, printed, said = predict("--images", photos, "--output", "-")
    assert (status, "left out" in said) == (0, True)
    assert len(rows(printed)) == 3
    assert not os.path.lexists("-")


def test_memory_does_not_grow_with_the_number_of_images(model, tmp_path):  # noqa: F811
    Image.new("RGB", (300, 300), "red").save(tmp_path / "image.png")
    peaks = []
    for count in (64, 640):
        files = [tmp_path / f"{number}.png" for number in range(count)]
        for file in files:
            if not file.exists():
                os.link(tmp_path / "image.png", file)
        tracemalloc.start()
        assert sum(found is not None for _, found in classify_files(model, "food", files, print)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_progress_bar_is_on_standard_error(run, photos, tmp_path):  # noqa: F811
    words = ["predict", "--run_dir", str(run), "--task", "signs", "--images", *map(str, SIGNS)]
    script = tmp_path / "typed"
    command = f"{sys.executable} -m recast_pl {' '.join(words)} > {tmp_path / 'rows.csv'}"
    done = subprocess.run(["script", "-qec", command, str(script)], capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b"classifying" in script.read_bytes()
    assert len(rows((tmp_path / "rows.csv").read_text())) == len(SIGNS)


def test_an_interrupted_command_is_one_line(predict, photos, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("recast_pl.cli.predict.classify_files", interrupted)
    output = tmp_path / "labels.csv"
    assert predict("--images", photos, "--output", output) == (130, "", "recast_pl: interrupted\n")
    assert not output.exists()
