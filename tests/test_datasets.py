"""The user's own images: folders and manifests, and layouts that are refused."""

import csv
import json
import os
import re
import shutil
import unicodedata

import numpy as np
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


def stream(path, name="colours", **settings):
    data = SequentialTaskDataModule((TaskConfig(name, str(path)),), 16, 4, num_workers=0, **settings)
    data.prepare_data()
    return data


def write(path, colour=(200, 30, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


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
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALID", "TEST"),
        ("training", "Validation", "testing"),
        ("train", "valid", "test"),  # as labelling services export
        ("train", "dev", "Eval"),
    ],
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
        (["train", "eval", "test"], "(eval, test, train) and two of them name the same split"),
        (["bus", "car", "train"], "(train) beside other folders of images, such as 'bus'"),
    ],
)
def test_unclear_split_folders_are_refused(split_folders, folders, named, tiny_fit, capsys):
    folder = split_folders("unclear", *folders)
    assert main(tiny_fit("--data.tasks", json.dumps([{"name": "unclear", "path": str(folder)}]))) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"folder {str(folder)!r} has split folders {named}" in message
    assert "rename their folders or list the images in a CSV file" in message


@pytest.mark.parametrize("names", [("bus", "car", "train"), ("Test", "control"), ("a", "b", "train", "val")])
def test_a_folder_of_images_called_train_is_a_class_beside_others(tmp_path, names):
    for name in names:
        for index in range(8):
            write(tmp_path / "vehicles" / name / f"{index}.png")
    with pytest.warns(UserWarning, match="is read as a class, because no folders of images are inside") as warned:
        data = stream(tmp_path / "vehicles", "vehicles")
    assert data.classes == sorted(names)
    assert sum(data.sizes.values()) == 8 * len(names)
    assert len(warned) == 1 + sum("equal pixels" in str(w.message) for w in warned)


def test_images_directly_in_split_folders_have_no_class(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "loose" / split / "0.png")
    with pytest.raises(DataError, match="but no folders of classes inside of the one for training"):
        open_folder(tmp_path / "loose")


def left_out(folder):
    """What the notes say about files that are left out, and the number of images."""
    source = open_folder(folder)
    return [note for note in source.notes if "left out" in note], len(source.labels)


def test_test_images_without_classes_are_left_out_and_named(split_folders):
    folder = split_folders("given", "train")
    for index in range(12):
        write(folder / "test" / f"{index:02d}.png")
    write(folder / "cover.png")
    note = f"13 files of {str(folder)!r} are left out: 13 images outside of class folders, such as 'cover.png'"
    assert left_out(folder) == ([note], 4)
    assert open_folder(folder).splits == ["train"] * 4


def test_files_that_are_no_images_are_counted_and_named(image_folder, tmp_path, tiny_fit):
    folder = image_folder("colours", classes=2, images=9)
    (folder / "README.md").touch()  # outside of class folders, so that nobody expects an image
    for name in ("class0/b.txt", "class0/a.txt", "class0/deep/c.HEIC", "class1/IMG_1", "class1/movie.mpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "class1" / "pipe.png")  # opening it would wait forever
    (note,), count = left_out(folder)
    assert count == 18
    assert note.startswith(f"6 files of {str(folder)!r} are left out: 2 .txt files, such as 'class0/a.txt'; 1 ")
    for named in ("1 .heic files, such as 'class0/deep/c.HEIC'", "1 files without an ending, such as 'class1/IMG_1'"):
        assert named in note
    (folder / "class1" / "x.psp").touch()
    (folder / "class1" / "y.xcf").touch()
    assert left_out(folder)[0][0].endswith("and 2 more kinds")
    tasks = json.dumps([{"name": "colours", "path": str(folder)}])
    with pytest.warns(UserWarning, match="task 'colours': 8 files of .* are left out"):
        assert main(tiny_fit("--data.tasks", tasks, "--trainer.max_epochs", 1)) == 0


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("jfif", "JPEG"),
        ("jpe", "JPEG"),
        ("JPX", "JPEG2000"),
        ("apng", "PNG"),
        ("tga", "TGA"),
        ("ico", "ICO"),
        ("pbm", "PPM"),
    ],
)
def test_what_pillow_reads_is_an_image(image_folder, suffix, kind):
    folder = image_folder("colours", classes=2, images=3)
    for index in range(8):
        image = Image.new("RGB", (16, 16), (20 * index, 90, 3))
        image.save(folder / "class0" / f"{index}x.{suffix}", kind)
    data = stream(folder)
    assert sum(data.sizes.values()) == 14
    assert left_out(folder) == ([], 14)


@pytest.mark.parametrize("suffix", ["eps", "jpg"])
def test_formats_that_need_other_programs_are_not_read(image_folder, suffix):
    folder = image_folder("colours", classes=2)
    Image.new("RGB", (16, 16)).save(folder / "class0" / f"x.{suffix}", "EPS")
    if suffix == "eps":
        assert left_out(folder)[0][0].endswith("1 .eps files, such as 'class0/x.eps'")
    else:
        with pytest.raises(DataError, match=r"x\.jpg' \(cannot identify image file"):
            stream(folder)


def test_linked_folders_are_followed(image_folder, tmp_path):
    folder, other = image_folder("colours", classes=2, images=4), image_folder("other", classes=2, images=5, seed=1)
    (folder / "class0" / "more").symlink_to(other / "class0")
    (folder / "class2").symlink_to(other / "class1")
    (folder / "class0" / "deep").mkdir()
    (folder / "class0" / "deep" / "loop").symlink_to(folder)  # would never end
    (folder / "class0" / "itself").symlink_to(folder / "class0")
    source = open_folder(folder)
    assert np.bincount(source.labels).tolist()[1:] == [4, 5]
    assert "class0/more/000.png" in source.names
    assert len(set(source.names)) == len(source.names) < 40


def test_files_of_operating_systems_do_not_count(image_folder):
    folder = image_folder("colours", classes=2, images=3)
    for name in ("Thumbs.db", "._000.png", ".DS_Store", "desktop.ini", "@eaDir/000.png", "__MACOSX/class0/._1.png"):
        for place in (folder, folder / "class0"):
            write(place / "x.png")
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(place / "x.png", place / name) if place != folder or "/" in name else (place / name).touch()
    (folder / "__MACOSX" / "class0" / "1.png").write_bytes(b"no image")
    assert left_out(folder) == ([], 6)
    assert open_folder(folder).classes == ["class0", "class1"]


def test_names_that_are_not_utf8_can_be_used(image_folder, tiny_fit, capsys):
    folder = image_folder("colours", classes=2, images=12)
    odd = os.fsdecode(b"caf\xe9 \xff.png")
    (folder / "class0" / "000.png").rename(folder / "class0" / odd)
    deep = folder / "class1" / os.fsdecode(b"d\xe9ep")
    deep.mkdir()
    (folder / "class1" / "000.png").rename(deep / "0.png")
    tasks = json.dumps([{"name": "colours", "path": str(folder)}])
    words = tiny_fit("--data.tasks", tasks, "--trainer.max_epochs", 1)
    assert main(words) == 0
    assert main(["test", "--run_dir", words[words.index("--run_dir") + 1]]) == 0
    (folder / "class0" / odd).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"caf\\udce9 \\udcff\.png"):
        stream(folder, on_bad_image="skip")
    (folder / "class0" / os.fsdecode(b"x\xe9.txt")).touch()
    left_out(folder)[0][0].encode()
    capsys.readouterr()
    assert main(tiny_fit("--data.tasks", tasks, "--trainer.max_epochs", 1, run_dir=folder.parent / "other")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_spellings_of_a_class_folder_are_one_class(split_folders):
    folder = split_folders("given", "train", "test")
    (folder / "train" / "class0").rename(folder / "train" / unicodedata.normalize("NFC", "café"))
    (folder / "test" / "class0").rename(folder / "test" / unicodedata.normalize("NFD", "café"))
    source = open_folder(folder)
    assert source.classes == ["café", "class1"]
    assert len(source.labels) == 10
    assert source.notes == [
        "labels that differ only in spaces or in Unicode are read as one class: 'cafe\\u0301' and 'caf\\xe9'"
    ]


# folders in folders


def leaves(path, **settings):
    data = SequentialTaskDataModule((TaskConfig("animals", str(path), classes="leaf"),), 16, 4, **settings)
    data.prepare_data()
    return data


@pytest.mark.parametrize("splits", [("",), ("train", "valid", "test")])
def test_innermost_folders_can_be_classes(tmp_path, splits):
    for split in splits:
        for name in ("birds/owls", "birds/ducks/mallards", "fish", "birds/geese"):
            for index in range(12):
                write(tmp_path / "animals" / split / name / f"{index}.png", (index, len(name), 7 * len(split)))
    data = leaves(tmp_path / "animals")
    assert data.classes == ["birds/ducks/mallards", "birds/geese", "birds/owls", "fish"]
    assert sum(data.sizes.values()) == 48 * len(splits)
    assert stream(tmp_path / "animals").classes == ["birds", "fish"]


def test_fit_takes_innermost_folders_as_classes(tmp_path, tiny_fit):
    for name in ("birds/owls", "birds/ducks", "fish/carps"):
        for index in range(12):
            write(tmp_path / "animals" / name / f"{index}.png", (index, len(name), 9))
    task = {"name": "animals", "path": str(tmp_path / "animals"), "classes": "leaf"}
    assert main(tiny_fit("--data.tasks", json.dumps([task]), "--trainer.max_epochs", 1)) == 0
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]["classes"] == 3


def test_images_beside_folders_of_images_are_in_no_innermost_folder(tmp_path):
    for name in ("birds/owls/0.png", "birds/1.png", "fish/2.png"):
        write(tmp_path / "animals" / name)
    with pytest.raises(DataError, match=r"animals/birds' has images beside folders of images such as 'owls'"):
        leaves(tmp_path / "animals")


def test_splits_in_innermost_folders_are_refused(tmp_path):
    for name in ("birds/train", "birds/test", "fish/train", "fish/test"):
        write(tmp_path / "animals" / name / "0.png")
    with pytest.raises(DataError, match=r"birds' has split folders \(test, train\) inside"):
        leaves(tmp_path / "animals")


@pytest.mark.parametrize("task", [{"name": "digits"}, {"name": "x", "path": "list.csv"}])
def test_only_folders_have_innermost_folders(task):
    with pytest.raises(DataError, match="classes: leaf, which only a folder of images takes"):
        SequentialTaskDataModule((TaskConfig(**task, classes="leaf"),)).prepare_data()


# copies


def test_equal_images_in_different_splits_are_reported(split_folders):
    folder = split_folders("given", *SPLITS)
    Image.open(folder / "train" / "class0" / "000.png").save(folder / "test" / "class1" / "copy.bmp")
    shutil.copy(folder / "train" / "class1" / "001.png", folder / "train" / "class1" / "same.png")  # in one split
    for cache in ("disk", "disk", "ram", "off"):  # the second reads the cache
        with pytest.warns(UserWarning, match="more than one split") as warned:
            stream(folder, cache=cache)
        (message,) = (str(w.message) for w in warned if "more than one split" in str(w.message))
        assert message == (
            "1 images of task 'colours' are in more than one split, as files with equal pixels: train/class0/000.png "
            "(train) = test/class1/copy.bmp (test); remove the copies, or measured accuracies are too high"
        )


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
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
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
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
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


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
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


@pytest.fixture
def listed(image_folder):
    """Rows of 24 images in three splits, and the folder that their paths are relative to."""
    folder = image_folder("pictures", classes=2, images=12)
    files = sorted(folder.rglob("*.png"))
    return folder, [[str(f.relative_to(folder)), f.parent.name, SPLITS[i % 3]] for i, f in enumerate(files)]


@pytest.mark.parametrize(
    "header", ["path,label, split", "Path,Label,Split", " PATH , label,split ", '"path", "label", "split"']
)
@pytest.mark.parametrize("separator", [",", ", "])
def test_spaces_and_capitals_in_a_header_change_nothing(listed, header, separator):
    folder, rows = listed
    text = "\n".join([header, *(separator.join(row) for row in rows)])
    (folder / "list.csv").write_text(text + "\n")
    data = stream(folder / "list.csv")
    assert data.classes == ["class0", "class1"]
    assert data.sizes == {"train": 8, "val": 8, "test": 8}


@pytest.mark.parametrize("name", ["set", "Splits", "partition"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_column_of_splits_by_another_name_is_refused(listed, name, suffix):
    folder, rows = listed
    manifest = write_manifest(folder / f"list.{suffix}", rows, ("path", "label", name))
    with pytest.raises(DataError, match=f"no column 'split', but '{name}' holds splits; name it split"):
        open_manifest(manifest)
    for row in rows:
        row[2] = "summer"
    assert set(open_manifest(write_manifest(manifest, rows, ("path", "label", "season"))).splits) == {""}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_labels_that_differ_in_spaces_or_unicode_are_one_class(listed, suffix):
    folder, rows = listed
    spellings = [unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café"), "café ", " café"]
    for i, row in enumerate(rows):
        row[1] = spellings[i % 4] if row[1] == "class0" else "tea"
    manifest = write_manifest(folder / f"list.{suffix}", rows)
    with pytest.warns(UserWarning, match="labels that differ only in spaces or in Unicode are read as one class"):
        data = stream(manifest)
    assert data.classes == ["café", "tea"]
    assert [len(labels.unique()) for _, labels in images_of(data).values()] == [2, 2, 2]


@pytest.mark.parametrize(
    "spell", [lambda p: f"./{p}", lambda p: f"x/../{p}", lambda p: f"../pictures/{p}", os.path.abspath]
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_an_image_in_two_splits_is_refused_however_its_path_is_spelled(listed, spell, suffix, monkeypatch):
    folder, rows = listed
    (folder / "x").mkdir()
    monkeypatch.chdir(folder)
    rows.append([spell(rows[3][0]), rows[3][1], "test"])
    with pytest.raises(DataError, match=r"class0/003.png' more than once, in row 4.* and in row 25"):
        open_manifest(write_manifest(folder / f"list.{suffix}", rows))


def test_an_image_that_is_listed_by_a_link_is_reported(listed):
    folder, rows = listed
    (folder / "linked").symlink_to(folder / "class0")
    rows.append(["linked/000.png", "class0", "test"])
    with pytest.raises(DataError, match=r"linked/000.png' more than once, in row 1, as .*class0/000.png"):
        open_manifest(write_manifest(folder / "list.csv", rows))
    (folder / "link.png").symlink_to(folder / "class0" / "000.png")
    rows[-1][0] = "link.png"
    with pytest.warns(UserWarning, match=r"class0/000.png \(train\) = link.png \(test\)"):
        stream(write_manifest(folder / "list.csv", rows))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("path,label\na,b.png,cat\n", "row 1 has more values than the header has columns; put values"),
        ('path,label\na.png,"cat\nb.png,dog\n', "unexpected end of data"),
        ("path,label\na\0.png,cat\n", "NUL|row 1: path"),
        ("path;label\na.png;cat\n", "needs one column 'path' and has 0"),
        ("path,path,label\na.png,b.png,cat\n", "needs one column 'path' and has 2"),
        ("path,label,split\na.png,cat\n", "has 1 classes"),
        ("path,label,split\na.png,  ,train\n", "row 1: path 'a.png', label ''"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, named):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=named) as error:
        open_manifest(tmp_path / "list.csv")
    assert "list.csv" in str(error.value)


def test_a_missing_number_in_a_parquet_manifest_is_no_label(tmp_path):
    rows = [("a.png", 1.0, "train"), ("b.png", 2.0, "train"), ("c.png", float("nan"), "test")]
    with pytest.raises(DataError, match=r"row 3: path 'c\.png', label ''"):
        open_manifest(write_manifest(tmp_path / "list.parquet", rows))


def test_a_task_that_is_a_file_of_another_kind_says_what_is_read(tmp_path):
    (tmp_path / "list.txt").write_text("path label")
    with pytest.raises(
        DataError, match=r"list.txt' is not a folder; correct .* to a folder or a .csv, .tsv or .parquet"
    ):
        stream(tmp_path / "list.txt")
