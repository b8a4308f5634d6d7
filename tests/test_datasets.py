"""The user's own images: folders and manifests, and layouts that are refused."""

import csv
import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data.folders import open_folder
from recast_pl.data.images import decode_file
from recast_pl.data.manifests import open_manifest
from recast_pl.errors import DataError

SPLITS = ("train", "val", "test")
OTHER = ("Train", "valid", "TEST", "training", "Validation", " testing")  # the same, twice


def stream(path, name="colours"):
    data = SequentialTaskDataModule((TaskConfig(name, str(path)),), 16, 4, num_workers=0)
    data.prepare_data()
    return data


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (200, 30, 90)).save(path)


def images_of(data):
    """Images and labels of each split."""
    return {
        split: [torch.cat(parts) for parts in zip(*data.plain_dataloader(split), strict=True)][:2] for split in SPLITS
    }


def equal(first, second):
    return all(torch.equal(a, b) for split in SPLITS for a, b in zip(first[split], second[split], strict=True))


# folders


def test_a_folder_of_classes(image_folder):
    source = open_folder(image_folder("colours", classes=3, images=4))
    assert source.classes == ["class0", "class1", "class2"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert set(source.splits) == {""}


def test_a_folder_of_splits_of_classes(image_folder):
    folders = [image_folder(f"given/{split}", images=i + 1, seed=i) for i, split in enumerate(SPLITS)]
    data = stream(folders[0].parent)
    assert data.sizes == {"train": 3, "val": 6, "test": 9}
    for split, folder in zip(SPLITS, folders, strict=True):
        pixels, labels, _ = (torch.cat(parts) for parts in zip(*data.plain_dataloader(split), strict=True))
        wanted = [decode_file(file, 16) for file in sorted(folder.rglob("*.png"))]
        assert torch.equal(pixels, torch.stack(wanted))
        assert labels.tolist() == [int(file.parent.name[-1]) for file in sorted(folder.rglob("*.png"))]


def test_nested_folders_and_suffixes_in_capitals_count_and_hidden_files_do_not(image_folder):
    folder = image_folder("colours", classes=2, images=1)
    write(folder / "class0" / "deep" / "er" / "A.PNG")
    write(folder / "class0" / "B.JPEG")
    write(folder / "class0" / "._000.png")
    (folder / "class0" / ".DS_Store").touch()
    (folder / "class0" / "notes.txt").touch()
    (folder / ".git").mkdir()
    (folder / "readme.md").touch()
    source = open_folder(folder)
    assert source.classes == ["class0", "class1"]
    assert source.labels.tolist() == [0, 0, 0, 1]


def test_hidden_folders_do_not_count(image_folder):
    folder = image_folder("colours", classes=2, images=1)
    write(folder / "class0" / ".ipynb_checkpoints" / "000-checkpoint.png")
    assert open_folder(folder).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "does not exist"),
        (lambda folder: [c.rename(folder.parent / c.name) for c in list(folder.iterdir())], "has 0 classes"),
        (lambda folder: (folder / "class0").rename(folder.parent / "class0"), "has 1 classes"),
        (lambda folder: (folder / "void").mkdir(), "void"),
        (lambda folder: (folder / "class1" / "009.jpg").write_text("text"), "009.jpg"),
        (lambda folder: os.truncate(folder / "class1" / "001.png", 100), "001.png"),
    ],
    ids=["missing", "no-class", "one-class", "empty-class", "text", "truncated"],
)
def test_a_folder_that_cannot_be_used_is_named(image_folder, spoil, named):
    folder = image_folder("spoilt", classes=2)
    spoil(folder)
    with pytest.raises(DataError, match=re.escape(named)) as error:
        stream(folder)
    assert str(folder) in str(error.value)


@pytest.fixture
def split_folders(image_folder):
    """Writes folders of splits with the names given, each with the same classes."""

    def make(name, *splits, classes=2):
        for seed, split in enumerate(splits):
            folder = image_folder(f"{name}/{split}", classes, images=seed + 2, seed=seed)
        return folder.parent

    return make


@pytest.mark.parametrize(
    "names",
    [("Train", "Val", "Test"), ("TRAIN", "VALID", "TEST"), ("training", "Validation", "testing")],
)
def test_split_folders_are_recognised_in_any_case_and_by_other_names(split_folders, names):
    usual, other = stream(split_folders("usual", *SPLITS), "a"), stream(split_folders("other", *names), "b")
    assert other.classes == ["class0", "class1"]
    assert other.sizes == {"train": 4, "val": 6, "test": 8}
    assert equal(images_of(usual), images_of(other))


def test_fit_trains_on_capital_split_folders(split_folders, tmp_path, tiny_fit):
    tasks = json.dumps([{"name": "capital", "path": str(split_folders("capital", "Test", "Train"))}])
    assert main(tiny_fit("--data.tasks", tasks, "--data.split", "official", "--trainer.max_epochs", 1)) == 0
    (task,) = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"]
    assert (task["classes"], task["test_images"]) == (2, 4)
    assert 2 <= task["train_images"] <= 4  # the rest of six is for validation


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["val", "test"], "(test, val) but no folder 'train'"),
        (["Test"], "(Test) but no folder 'train'"),
        (["train", "test", "apples"], "(test, train) beside other folders of images, such as 'apples'"),
        (["Test", "Control"], "(Test) beside other folders of images, such as 'Control'"),
        (["training", "train", "test"], "(test, train, training) and two of them name the same split"),
    ],
)
def test_unclear_split_folders_are_refused(split_folders, folders, named, tiny_fit, capsys):
    folder = split_folders("unclear", *folders)
    assert main(tiny_fit("--data.tasks", json.dumps([{"name": "unclear", "path": str(folder)}]))) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"folder {str(folder)!r} has split folders {named}" in message
    assert "rename their folders or list the images in a CSV file" in message


def test_folders_without_images_may_stand_beside_split_folders(split_folders):
    folder = split_folders("given", "train", "test")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "notes.txt").touch()
    assert stream(folder).classes == ["class0", "class1"]


def test_split_folders_inside_class_folders_are_refused(split_folders):
    folder = split_folders("bottles", "train", "Test")
    split_folders("cables", "train", "Test")
    with pytest.raises(DataError, match=r"class folder '.*bottles' has split folders \(Test, train\) inside") as error:
        open_folder(folder.parent)
    assert "give its path" in str(error.value)
    (folder / "Test").rename(folder / "broken")
    shutil.rmtree(folder.parent / "cables" / "Test")
    assert open_folder(folder.parent).classes == ["bottles", "cables"]  # a single such name may be a kind of object


def test_class_folders_that_differ_in_case_between_splits_are_named(split_folders):
    folder = split_folders("given", "train", "test")
    (folder / "test" / "class1").rename(folder / "test" / "Class1")
    with pytest.raises(DataError, match="classes 'class1' and 'Class1' differ only in case"):
        open_folder(folder)


def test_classes_that_differ_in_case_are_two_if_both_have_training_images(tmp_path):
    for name in ("a", "A"):
        for split in ("train", "test"):
            write(tmp_path / "letters" / split / name / f"{name}.png")
    if len(list((tmp_path / "letters" / "train").iterdir())) == 1:
        pytest.skip("the file system ignores case")
    assert open_folder(tmp_path / "letters").classes == ["A", "a"]


def test_a_class_without_training_images_is_named(image_folder):
    folder = image_folder("given/train", classes=2)
    write(folder.parent / "test" / "novel" / "0.png")
    with pytest.raises(DataError, match="novel"):
        open_folder(folder.parent)


def test_a_task_too_small_for_three_splits_is_named(image_folder):
    with pytest.raises(DataError, match=r"'scarce' has no val image"):
        stream(image_folder("scarce", images=2), "scarce")


# manifests


def write_manifest(path, rows, header=("path", "label", "split")):
    if path.suffix == ".parquet":
        import pyarrow.parquet

        columns = list(zip(*rows, strict=True)) if rows else [[] for _ in header]
        table = pyarrow.table({name: list(column) for name, column in zip(header, columns, strict=True)})
        pyarrow.parquet.write_table(table, path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_manifest_names_images_labels_and_splits(image_folder, suffix, tmp_path, tiny_fit):
    folder = image_folder("pictures", classes=2, images=9)
    kinds = ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    rows = [
        (f"pictures/class{label}/{i:03d}.png", ("weiß, blau", "7")[label], kinds[i])
        for label in range(2)
        for i in range(9)
    ]
    rows[0] = (str(tmp_path / rows[0][0]), *rows[0][1:])  # an absolute path
    manifest = write_manifest(folder.parent / f"list.{suffix}", rows[::-1])
    data = stream(manifest)
    assert data.classes == ["7", "weiß, blau"]
    assert data.sizes == {"train": 8, "val": 4, "test": 6}
    pixels, labels, _ = (torch.cat(parts) for parts in zip(*data.plain_dataloader("test"), strict=True))
    wanted = [
        (decode_file(folder.parent / p, 16), int(label != "7")) for p, label, kind in rows[::-1] if kind == "test"
    ]
    assert torch.equal(pixels, torch.stack([image for image, _ in wanted]))
    assert labels.tolist() == [label for _, label in wanted]
    tasks = json.dumps([{"name": "listed", "path": str(manifest)}])
    assert main(tiny_fit("--data.tasks", tasks, "--trainer.max_epochs", 1)) == 0


def test_a_manifest_without_splits_is_divided(image_folder):
    folder = image_folder("pictures", classes=2, images=20)
    rows = [(str(path), path.parent.name) for path in sorted(folder.rglob("*.png"))]
    data = stream(write_manifest(folder / "list.csv", rows, ("path", "label")))
    assert sum(data.sizes.values()) == 40
    for split in SPLITS:
        labels = torch.cat([batch[1] for batch in data.plain_dataloader(split)])
        assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("rows", "header", "named"),
    [
        ([("a.png", "x", "train")], ("file", "label", "split"), "needs one column 'path' and has 0"),
        ([("a.png", "x", "train")], ("path", "class", "split"), "needs one column 'label' and has 0"),
        ([], ("path", "label", "split"), "has 0 classes"),
        ([("a.png", "x", ""), ("b.png", "x", "")], ("path", "label", "split"), "has 1 classes"),
        ([("a.png", "x", "train"), ("b.png", "", "test")], ("path", "label", "split"), "row 2: .*label ''"),
        ([("a.png", "x", "train"), ("", "y", "test")], ("path", "label", "split"), "row 2: path ''"),
        ([("a.png", "x", "train"), ("b.png", "y", "new")], ("path", "label", "split"), "row 2: .*split 'new'"),
        ([("a.png", "x", "train"), ("b.png", "y", "")], ("path", "label", "split"), "row 2 has no split"),
        ([("a.png", "x", "train"), ("a.png", "x", "test")], ("path", "label", "split"), "a.png' more than once"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_wrong_manifest_names_the_row(tmp_path, rows, header, named, suffix):
    with pytest.raises(DataError, match=named):
        open_manifest(write_manifest(tmp_path / f"list.{suffix}", rows, header))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_and_splits_of_a_manifest_are_recognised_in_any_case(image_folder, suffix):
    folder = image_folder("pictures", classes=2, images=6)
    files = sorted(folder.rglob("*.png"))
    usual, other = (
        write_manifest(folder / f"{name}.{suffix}", rows, header)
        for name, header, rows in (
            ("a", ("path", "label", "split"), [(str(f), f.parent.name, SPLITS[i % 3]) for i, f in enumerate(files)]),
            ("b", ("Label", "SPLIT", "Path"), [(f.parent.name, OTHER[i % 6], str(f)) for i, f in enumerate(files)]),
        )
    )
    assert equal(images_of(stream(usual, "a")), images_of(stream(other, "b")))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_of_two_columns_that_differ_in_case_the_usual_name_is_used(tmp_path, suffix):
    rows = [("a.png", "x", "1"), ("b.png", "y", "2")]
    path = write_manifest(tmp_path / f"list.{suffix}", rows, ("path", "label", "Label"))
    assert open_manifest(path).classes == ["x", "y"]
    path = write_manifest(tmp_path / f"list.{suffix}", rows, ("path", "LABEL", "Label"))
    with pytest.raises(DataError, match="needs one column 'label' and has 2"):
        open_manifest(path)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (("cat", "dog", "Cat"), "classes 'cat' and 'Cat' differ only in case"),
        (("cat", "dog", "cow"), "class 'cow' has no training image"),
    ],
)
def test_a_class_of_a_manifest_without_training_images_is_named(tmp_path, labels, named):
    rows = [(f"{i}.png", label, ("train", "train", "test")[i]) for i, label in enumerate(labels)]
    with pytest.raises(DataError, match=rf"manifest '.*list\.csv': {named}"):
        open_manifest(write_manifest(tmp_path / "list.csv", rows))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path, suffix):
    path = tmp_path / f"list.{suffix}"
    with pytest.raises(DataError, match="does not exist"):
        open_manifest(path)
    path.write_bytes(b"\xff\xfe\x00path,label\n\x80")
    with pytest.raises(DataError, match=f"list.{suffix}"):
        open_manifest(path)


def test_missing_files_of_a_manifest_are_counted(tmp_path):
    rows = [(f"{i}.png", "xy"[i % 2], "") for i in range(12)]
    with pytest.raises(DataError, match=r"12 of 12 image files are missing, the first is .*0\.png"):
        stream(write_manifest(tmp_path / "list.csv", rows))
