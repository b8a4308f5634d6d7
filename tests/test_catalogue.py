"""Data sets known by name: prepared, read, split and verified."""

import json
import math
import os
import re
from collections import Counter

import pytest
from fixtures_catalogue import check_source, numbers, prepare, put, split_numbers, stream, tree_of, verify
from fixtures_sets import SPECIES, aircraft_level, dtd_split, jpeg, make

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data.catalogue import CATALOGUE, PAPER
from recast_pl.data.sources import open_source
from recast_pl.errors import DataError

pytest_plugins = ["fixtures_catalogue"]

SETS = ("flowers", "aircraft", "scenes", "cifar100", "cifar10", "birds", "cars", "pets", "food101", "dtd", "svhn")
DOWNLOADABLE = tuple(name for name in SETS if name != "cars")
DIGESTS = {  # of the official splits, and of those by ratio, with seed 42
    "flowers": ("940f47dd45413ec6", "ff48d938531a2590"),
    "aircraft": ("53c9d4f957b668e6", "1b3a8f0e20b0abb1"),
    "scenes": ("7b4fce5b892c1914", "8308d497b178c48e"),
    "cifar100": ("48473cab86e5733a", "53881cec826b9da3"),
    "cifar10": ("c983d94292bee42e", "1992e22e524f4a83"),
    "birds": ("fffdc6f42c427c70", "be169a2f65fe9f2f"),
    "cars": ("2bc4f568d14e5884", "17a266d978ee6465"),
    "pets": ("ce0ce332c99b0fd4", "e2bd7f2f9cac3f00"),
    "food101": ("15cd551e6938dabd", "b85cb326f7e79b08"),
    "dtd": ("d63be644d23abdef", "cec1d44874ec42e8"),
    "svhn": ("3bac2df3b4f03196", "3537d0ac0279a15f"),
}

# every data set


@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_a_set_is_downloaded_once_and_read(name, server, publish, tmp_path, capsys):
    made, paths = make(name), publish(name)
    assert prepare(tmp_path, name) == 0
    assert f"{name}: {len(made.classes)} classes" in capsys.readouterr().out
    assert tree_of(tmp_path) == made.tree  # no archive, no part, nothing else
    assert server.requests == [(path, None) for path in paths]
    check_source(open_source(TaskConfig(name), tmp_path), made)
    assert prepare(tmp_path, name) == 0
    assert verify(tmp_path, name) == 0
    assert f"{name}: intact" in capsys.readouterr().out
    assert len(server.requests) == len(paths)


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_torchvision_left_is_used_without_network(name, server, publish, tmp_path, capsys):
    publish(name)
    put(tmp_path, make(name).tree)
    assert prepare(tmp_path, name) == 0
    assert verify(tmp_path) == 0  # of those on disk
    assert {f"{name}: intact", "digits: intact"} <= set(capsys.readouterr().out.splitlines())
    check_source(open_source(TaskConfig(name), tmp_path), make(name))
    assert server.requests == []


def test_without_names_the_six_of_the_paper_are_prepared(publish, tmp_path, capsys):
    for name in PAPER:
        publish(name)
    assert main(["data", "prepare", "--image_size", "8", "--root", str(tmp_path)]) == 0
    output = [line for line in capsys.readouterr().out.splitlines() if " classes, {" in line]
    assert [line.partition(":")[0] for line in output] == list(PAPER)
    assert tree_of(tmp_path) == {k: v for name in PAPER for k, v in make(name).tree.items()}


def test_a_set_can_lie_elsewhere_under_another_name(server, publish, tmp_path):
    publish("birds")
    task = TaskConfig("feathers", path=str(tmp_path / "far" / "away"), dataset="birds")
    data = SequentialTaskDataModule((task,), 16, root=str(tmp_path / "root"))
    data.prepare_data()
    assert tree_of(tmp_path / "far" / "away") == make("birds").tree
    assert data.classes == make("birds").classes
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cache"]


def test_cars_cannot_be_downloaded(tmp_path, refused):
    message = refused("data", "prepare", "cars", "--root", tmp_path)
    assert "'cars' cannot be downloaded" in message
    assert str(tmp_path / "stanford_cars") in message
    assert tree_of(tmp_path) == {}


def test_a_list_shows_all_sets_and_which_are_on_disk(tmp_path, capsys):
    for name in ("birds", "cars"):
        put(tmp_path, make(name).tree)
    flowers = make("flowers").tree
    put(tmp_path, {name: content for name, content in flowers.items() if not name.endswith("setid.mat")})
    assert main(["data", "list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if " yes " in line or " no " in line}
    assert set(CATALOGUE) <= set(rows)
    on_disk = {name for name in CATALOGUE if re.search(r" yes  ", rows[name])}
    assert on_disk == {"birds", "cars", "digits"}  # flowers lacks a file
    assert rows["birds"].split()[-4:] == ["yes", "200", "11,788", "various"]
    assert rows["cifar10"].split()[-4:] == ["no", "10", "60,000", "32×32"]


@pytest.mark.parametrize("action", ["prepare", "verify"])
def test_an_unknown_name_is_refused_with_a_list_of_known_names(action, tmp_path, refused):
    message = refused("data", action, "bird", "--root", tmp_path)
    assert "'bird'" in message
    assert all(name in message for name in CATALOGUE)


# arguments


@pytest.mark.parametrize("level", ["variant", "family", "manufacturer"])
def test_aircraft_have_three_levels_of_classes(level, server, publish, tmp_path):
    publish("aircraft")
    task = TaskConfig("planes", dataset="aircraft", args={"annotation_level": level})
    data = SequentialTaskDataModule((task,), 16, root=str(tmp_path))
    data.prepare_data()
    classes, label_of = aircraft_level(level)
    assert data.classes == classes
    source = open_source(task, tmp_path)
    made, shown = make("aircraft"), numbers(source)
    assert sorted(shown) == list(range(len(made.labels)))
    assert source.labels.tolist() == [label_of[made.labels[number]] for number in shown]
    assert list(source.splits) == [made.splits[number] for number in shown]


def test_pets_can_be_classified_by_species(publish, tmp_path):
    publish("pets")
    made = make("pets")
    put(tmp_path, made.tree)
    task = TaskConfig("pets", args={"target_types": "binary-category"})
    source = open_source(task, tmp_path)
    shown = numbers(source)
    assert source.labels.tolist() == [SPECIES[made.labels[number]] for number in shown]
    assert list(source.splits) == [made.splits[number] for number in shown]
    assert len(source.classes) == 2


def test_textures_have_ten_partitions(publish, tmp_path):
    publish("dtd")
    put(tmp_path, make("dtd").tree)
    source = open_source(TaskConfig("dtd", args={"partition": 2}), tmp_path)
    assert list(source.splits) == [dtd_split(number, 2) for number in numbers(source)]


@pytest.mark.parametrize(
    ("name", "args", "named"),
    [
        ("aircraft", {"annotation_level": "wing"}, "'wing'"),
        ("aircraft", {"level": "family"}, "'level'"),
        ("aircraft", {"split": "tets"}, "'tets'"),
        ("pets", {"target_types": "species"}, "'species'"),
        ("birds", {"annotation_level": "family"}, "annotation_level"),
        ("digits", {"train": True}, "train"),
    ],
)
def test_wrong_arguments_are_named(name, args, named, publish, tmp_path):
    if name != "digits":
        publish(name)
        put(tmp_path, make(name).tree)
    data = SequentialTaskDataModule((TaskConfig(name, args=args),), 16, root=str(tmp_path))
    with pytest.raises(DataError, match=re.escape(named)):
        data.prepare_data()


@pytest.mark.parametrize(("name", "args"), [("aircraft", {"level": "family"}), ("birds", {"level": "family"})])
def test_unknown_arguments_are_refused_before_anything_is_downloaded(name, args, server, publish, tmp_path):
    publish(name)
    with pytest.raises(DataError, match="level"):
        SequentialTaskDataModule((TaskConfig(name, args=args),), 16, root=str(tmp_path)).prepare_data()
    assert server.requests == []


# splits


def is_share(held_out, count):
    """Whether a number of images may be 15 % of a count by chance; tails of four standard deviations are cut."""
    return abs(held_out - 0.15 * count) <= 1 + 4 * math.sqrt(0.15 * 0.85 * count)


@pytest.mark.parametrize("name", SETS)
def test_official_splits_are_those_of_the_authors(name, publish, tmp_path):
    publish(name)
    made = make(name)
    put(tmp_path, made.tree)
    found = split_numbers(name, tmp_path)
    assert sorted(found["test"]) == made.numbers("test")
    assert not set(found["train"]) & set(found["val"])
    assert sorted(found["train"] + found["val"]) == made.numbers("train", "val")
    if "val" in made.splits:
        assert sorted(found["val"]) == made.numbers("val")
    else:
        training = Counter(made.labels[number] for number in made.numbers("train"))
        held_out = Counter(made.labels[number] for number in found["val"])
        assert all(is_share(held_out[label], count) for label, count in training.items())
        assert set(held_out) == set(training)


@pytest.mark.parametrize("name", SETS)
def test_a_ratio_divides_every_class(name, publish, tmp_path):
    publish(name)
    made = make(name)
    put(tmp_path, made.tree)
    found = split_numbers(name, tmp_path, split="ratio")
    assert sorted(found["train"] + found["val"] + found["test"]) == list(range(len(made.labels)))
    for held_out in ("val", "test"):
        shares = Counter(made.labels[number] for number in found[held_out])
        assert all(is_share(shares[label], count) for label, count in Counter(made.labels).items())
        assert set(shares) == set(made.labels)


def test_images_in_neither_list_of_scenes_are_used_only_by_ratio(publish, tmp_path):
    publish("scenes")
    put(tmp_path, make("scenes").tree)
    unlisted = set(make("scenes").numbers(""))
    assert len(unlisted) == 9
    official, ratio = (split_numbers("scenes", tmp_path, split=policy) for policy in ("official", "ratio"))
    assert not unlisted & {number for split in official.values() for number in split}
    assert unlisted <= {number for split in ratio.values() for number in split}


@pytest.mark.parametrize("policy", ["official", "ratio"])
@pytest.mark.parametrize("name", SETS)
def test_splits_are_the_same_on_every_machine(name, policy, publish, tmp_path):
    publish(name)
    put(tmp_path, make(name).tree)
    digests = [stream(name, tmp_path, seed, split=policy).split_digest for seed in (42, 42, 43)]
    assert digests[0] == DIGESTS[name][policy == "ratio"]
    assert digests[0] == digests[1]
    decided = policy == "official" and "val" in make(name).splits  # by the authors, so that the seed changes nothing
    assert (digests[0] == digests[2]) == decided


# verification


def file_of(name, number):
    """The file that shows a picture."""
    return next(file for file, content in make(name).tree.items() if content == jpeg(number))


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("cifar10", "cifar100", "svhn")])
@pytest.mark.parametrize("how", ["truncated", "empty", "gone"])
def test_a_bad_image_is_named_and_can_be_skipped(name, how, publish, tmp_path, capsys, refused):
    publish(name)
    put(tmp_path, make(name).tree)
    first = numbers(open_source(TaskConfig(name), tmp_path))[0]
    bad = file_of(name, first)
    if how == "gone":
        (tmp_path / bad).unlink()
    else:
        os.truncate(tmp_path / bad, 400 if how == "truncated" else 0)
    if (name, how) != ("scenes", "gone"):  # its list is checked instead
        assert verify(tmp_path, name) == 1
        output = capsys.readouterr().out
        assert f"1 of {len(make(name).labels)} images of '{name}'" in output
        assert bad in output
    words = ["data", "prepare", name, "--image_size", "16", "--root", tmp_path]
    assert bad.rpartition("/")[2] in refused(*words)
    if how != "gone":
        with pytest.warns(UserWarning, match=re.escape(bad)):
            assert main([*map(str, words), "--on_bad_image", "skip"]) == 0


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("birds", "CUB_200_2011/images/002.Laysan_Albatross"),
        ("food101", "food-101/images/baklava"),
        ("dtd", "dtd/dtd/images/zigzagged"),
        ("scenes", "indoor-67/Images/bakery"),
    ],
)
def test_a_missing_class_is_named(name, folder, publish, tmp_path, capsys):
    publish(name)
    put(tmp_path, {file: content for file, content in make(name).tree.items() if not file.startswith(f"{folder}/")})
    assert verify(tmp_path, name) == 1
    assert folder.rpartition("/")[2] in capsys.readouterr().out


READ = {  # the files of each set that are read besides images
    "flowers": r"\.mat$",
    "aircraft": r"data/(variants|images_variant_(train|val|test))\.txt$",
    "scenes": r"Images\.txt$",
    "cifar100": r"/(train|test|meta)$",
    "cifar10": r"/(data_batch_\d|test_batch|batches\.meta)$",
    "birds": r"CUB_200_2011/(images|image_class_labels|train_test_split|classes)\.txt$",
    "cars": r"\.mat$",
    "pets": r"annotations/(trainval|test)\.txt$",
    "food101": r"meta/(train|test)\.json$",
    "dtd": r"labels/(train|val|test)1\.txt$",
    "svhn": r"\.mat$",
}


@pytest.mark.parametrize("name", SETS)
def test_every_damaged_list_is_found_without_a_crash(name, publish, tmp_path, capsys):
    publish(name)
    put(tmp_path, make(name).tree)
    files = {file: content for file, content in make(name).tree.items() if re.search(READ[name], file)}
    assert len(files) > 1
    missed = []
    for file, content in files.items():
        for damaged in (b"", content[: len(content) // 2], b"\xff" * 64):
            (tmp_path / file).write_bytes(damaged)
            try:
                status = verify(tmp_path, name)
            except Exception as crash:
                status = repr(crash)
            if status not in (1, 2):
                missed.append((file, damaged[:4], len(damaged), status))
        (tmp_path / file).write_bytes(content)
    assert not missed
    assert verify(tmp_path, name) == 0


@pytest.mark.parametrize(
    ("name", "file", "damage"),
    [
        ("pets", "oxford-iiit-pet/annotations/test.txt", lambda text: text[:-3]),
        ("food101", "food-101/meta/test.json", lambda text: b""),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt", lambda text: text + b"0034309\n"),
        ("dtd", "dtd/dtd/labels/test1.txt", lambda text: text + b"\n"),
    ],
    ids=["pets", "food101", "aircraft", "dtd"],
)
def test_a_damaged_split_is_an_error_and_not_ignored(name, file, damage, publish, tmp_path, refused):
    publish(name)
    tree = make(name).tree
    put(tmp_path, tree | {file: damage(tree[file])})
    assert str(tmp_path) in refused("data", "prepare", name, "--image_size", "16", "--root", tmp_path)


def test_lists_that_lack_images_are_found(publish, tmp_path, capsys):
    publish("dtd")
    tree = make("dtd").tree
    shorter = tree["dtd/dtd/labels/test1.txt"].partition(b"\n")[2]
    put(tmp_path, tree | {"dtd/dtd/labels/test1.txt": shorter})
    assert verify(tmp_path, "dtd") == 1
    assert "dtd: 8 test images rather than 9" in capsys.readouterr().out


def test_a_set_that_cannot_be_opened_does_not_hide_the_others(publish, tmp_path, capsys):
    for name in ("cifar10", "birds"):
        publish(name)
        put(tmp_path, make(name).tree)
    os.truncate(tmp_path / "cifar-10-batches-py" / "test_batch", 1000)
    os.truncate(tmp_path / file_of("birds", 5), 400)
    assert verify(tmp_path, "cifar10", "birds") == 1
    output = capsys.readouterr()
    assert "cifar10" in output.out + output.err
    assert file_of("birds", 5) in output.out


def test_the_error_about_a_damaged_set_has_a_remedy(server, publish, tmp_path, refused):
    publish("cifar10")
    put(tmp_path, make("cifar10").tree)
    os.truncate(tmp_path / "cifar-10-batches-py" / "test_batch", 1000)
    message = refused("data", "prepare", "cifar10", "--image_size", "16", "--root", tmp_path)
    assert str(tmp_path) in message
    assert "remove" in message  # preparing it again would not help while it is there


def test_a_missing_set_cannot_be_verified(publish, tmp_path, refused):
    publish("birds")
    message = refused("data", "verify", "birds", "--root", tmp_path)
    assert "'birds' is not in" in message
    assert "data prepare birds" in message


# the first command of a user


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_command_downloads_and_trains_the_six(server, publish, tmp_path, tiny_fit):
    for name in PAPER:
        publish(name)
    words = tiny_fit("--trainer.max_epochs", "1", "--data.root", tmp_path)
    at = words.index("--data.tasks")
    assert main([*words[:at], *words[at + 2 :]]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [task["name"] for task in summary["tasks"]] == list(PAPER)
    assert [task["classes"] for task in summary["tasks"]] == [len(make(name).classes) for name in PAPER]
    assert [task["split"] for task in summary["tasks"]] == [DIGESTS[name][1] for name in PAPER]
    asked = len(server.requests)
    assert main(["test", "--run_dir", str(tmp_path / "run")]) == 0
    assert len(server.requests) == asked
