"""Data sets known by name: fetched from a server that fails, checked, unpacked, read and split."""

import gzip
import io
import json
import multiprocessing
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torchvision.datasets
from fixtures_sets import (
    SPECIES,
    Fault,
    Server,
    aircraft_level,
    archive,
    dtd_split,
    encoded,
    jpeg,
    make,
    md5,
    number_of,
)

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data import download, sources
from recast_pl.data.catalogue import CATALOGUE, PAPER
from recast_pl.data.download import extract
from recast_pl.data.sources import open_source, prepare_source
from recast_pl.errors import DataError

SETS = ("flowers", "aircraft", "scenes", "cifar100", "cifar10", "birds", "cars", "pets", "food101", "dtd", "svhn")
DOWNLOADABLE = tuple(name for name in SETS if name != "cars")
SPLITS = ("train", "val", "test")
DIGESTS = {  # of the official splits and of those by ratio, with seed 42
    "flowers": ("940f47dd45413ec6", "c5527a81f7039d48"),
    "aircraft": ("53c9d4f957b668e6", "5d14347cc707ca9e"),
    "scenes": ("5a38bc64dbe04d60", "0c1205e9bfc6837f"),
    "cifar100": ("b0ded1f44b3306ac", "16853e91bef42633"),
    "cifar10": ("b270f48c064cd247", "e242754c292e4a54"),
    "birds": ("e91d7baf68850886", "52ac43bfc6bd6cb5"),
    "cars": ("3fd86b6eb6fc1482", "634bf04e94fbc84c"),
    "pets": ("51ea1ca650eb39b8", "fb20cdfc7098b36c"),
    "food101": ("f85efa0fb4e95c72", "0881bfcff7a886d5"),
    "dtd": ("d63be644d23abdef", "26d44877af3bb8e0"),
    "svhn": ("aa0f5f536a6fd89f", "0dc9c5118ff188ca"),
}


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def publish(server, monkeypatch):
    """Has the catalogue tell of a tiny data set that the server has; returns the paths of its files there."""

    def to_server(name, **contents):
        made, row, files = make(name), CATALOGUE[name], []
        for file in row.files:
            url = urlsplit(file.url)
            base = url.path.rpartition("/")[2]
            content = contents.get(base.partition(".")[0], made.downloads[base])
            server.files[url.path] = content
            address = server.url + url.path + (f"?{url.query}" if url.query else "")
            files.append(replace(file, url=address, md5=file.md5 and md5(content)))
        counts = dict(Counter(made.splits))
        row = replace(row, files=tuple(files), classes=len(made.classes), images=counts)
        monkeypatch.setitem(CATALOGUE, name, row)
        for attribute, value in (made.checks or {}).items():
            monkeypatch.setattr(getattr(torchvision.datasets, row.reader), attribute, value)
        return [urlsplit(file.url).path for file in files]

    return to_server


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns the one line that it says."""

    def run(*words):
        capsys.readouterr()
        assert main(list(map(str, words))) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("recast_pl: error: ")
        return lines[0]

    return run


def prepare(root, *names):
    return main(["data", "prepare", *names, "--image_size", "16", "--root", str(root)])


def verify(root, *names):
    return main(["data", "verify", *names, "--root", str(root)])


def put(root, tree):
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def tree_of(root):
    """All files below a folder, but for locks and decoded images."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if not path.is_dir()}
    return {name: p.read_bytes() for name, p in files.items() if not re.match(r"cache/|\.\w+\.lock$", name)}


def stream(name, root, seed=42, **settings):
    return SequentialTaskDataModule((TaskConfig(name),), 16, 4, seed=seed, root=str(root), **settings)


def numbers(source):
    """Which picture each image of a source is."""
    return [number_of(source.images.decode(index, 32)) for index in range(len(source.labels))]


def split_numbers(name, root, **settings):
    """Which pictures the splits of a task have."""
    data = stream(name, root, **settings)
    data.setup("fit")
    shown = np.array(numbers(open_source(TaskConfig(name), root)))
    return {split: shown[data.plain_dataloader(split).dataset.indices].tolist() for split in SPLITS}


def check_source(source, made):
    shown = numbers(source)
    assert sorted(shown) == list(range(len(made.labels)))  # every picture once
    assert source.labels.tolist() == [made.labels[number] for number in shown]
    assert list(source.splits) == [made.splits[number] for number in shown]
    assert list(source.classes) == made.classes


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
    assert f"{name}: whole" in capsys.readouterr().out
    assert len(server.requests) == len(paths)


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_torchvision_left_is_used_without_network(name, server, publish, tmp_path, capsys):
    publish(name)
    put(tmp_path, make(name).tree)
    assert prepare(tmp_path, name) == 0
    assert verify(tmp_path) == 0  # of those on disk
    assert {f"{name}: whole", "digits: whole"} <= set(capsys.readouterr().out.splitlines())
    check_source(open_source(TaskConfig(name), tmp_path), make(name))
    assert server.requests == []


def test_without_names_the_six_of_the_paper_are_prepared(publish, tmp_path, capsys):
    for name in PAPER:
        publish(name)
    assert main(["data", "prepare", "--image_size", "8", "--root", str(tmp_path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if " classes, {" in line]
    assert [line.partition(":")[0] for line in told] == list(PAPER)
    assert tree_of(tmp_path) == {k: v for name in PAPER for k, v in make(name).tree.items()}


def test_a_set_may_lie_elsewhere_under_another_name(server, publish, tmp_path):
    publish("birds")
    task = TaskConfig("feathers", path=str(tmp_path / "far" / "away"), dataset="birds")
    data = SequentialTaskDataModule((task,), 16, root=str(tmp_path / "root"))
    data.prepare_data()
    assert tree_of(tmp_path / "far" / "away") == make("birds").tree
    assert data.classes == make("birds").classes
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cache"]


def test_cars_that_are_absent_are_asked_for(tmp_path, refused):
    message = refused("data", "prepare", "cars", "--root", tmp_path)
    assert "'cars' cannot be downloaded" in message
    assert str(tmp_path / "stanford_cars") in message
    assert tree_of(tmp_path) == {}


def test_the_catalogue_agrees_with_torchvision():
    tv = torchvision.datasets
    prefix = tv.Flowers102._download_url_prefix
    known = {
        "flowers": [(prefix + file, check) for file, check in tv.Flowers102._file_dict.values()],
        "aircraft": [(tv.FGVCAircraft._URL, CATALOGUE["aircraft"].files[0].md5)],  # torchvision has no checksum
        "cifar10": [(tv.CIFAR10.url, tv.CIFAR10.tgz_md5)],
        "cifar100": [(tv.CIFAR100.url, tv.CIFAR100.tgz_md5)],
        "pets": list(tv.OxfordIIITPet._RESOURCES),
        "food101": [(tv.Food101._URL, tv.Food101._MD5)],
        "dtd": [(tv.DTD._URL, tv.DTD._MD5)],
        "svhn": [(url, check) for url, _, check in map(tv.SVHN.split_list.get, ("train", "test"))],
    }
    for name, files in known.items():
        assert [(file.url, file.md5) for file in CATALOGUE[name].files] == files


def test_a_list_says_what_there_is_and_what_is_on_disk(tmp_path, capsys):
    for name in ("birds", "cars"):
        put(tmp_path, make(name).tree)
    flowers = make("flowers").tree
    put(tmp_path, {name: content for name, content in flowers.items() if not name.endswith("setid.mat")})
    assert main(["data", "list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if " yes " in line or " no " in line}
    assert set(CATALOGUE) <= set(rows)
    on_disk = {name for name in CATALOGUE if re.search(r" yes  ", rows[name])}
    assert on_disk == {"birds", "cars", "digits"}  # of flowers a file is missing
    assert rows["birds"].split()[:5] == ["birds", "200", "11,788", "various", "yes"]
    assert rows["cifar10"].split()[:5] == ["cifar10", "10", "60,000", "32×32", "no"]


@pytest.mark.parametrize("action", ["prepare", "verify"])
def test_an_unknown_name_is_refused_and_the_known_are_told(action, tmp_path, refused):
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


def test_pets_may_be_told_apart_by_species(publish, tmp_path):
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
        assert all(abs(held_out[label] - 0.15 * count) <= 1 for label, count in training.items())
        assert set(held_out) == set(training)


@pytest.mark.parametrize("name", SETS)
def test_a_ratio_divides_every_class_anew(name, publish, tmp_path):
    publish(name)
    made = make(name)
    put(tmp_path, made.tree)
    found = split_numbers(name, tmp_path, split="ratio")
    assert sorted(found["train"] + found["val"] + found["test"]) == list(range(len(made.labels)))
    for held_out in ("val", "test"):
        shares = Counter(made.labels[number] for number in found[held_out])
        assert all(abs(shares[label] - 0.15 * count) <= 1 for label, count in Counter(made.labels).items())
        assert set(shares) == set(made.labels)


def test_images_in_neither_list_of_scenes_are_used_by_ratio_alone(publish, tmp_path):
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
    decided = policy == "official" and "val" in make(name).splits  # by the authors alone
    assert (digests[0] == digests[2]) == decided


# downloads that break


def test_a_cut_download_goes_on_where_it_stopped(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=1, cut=20_000))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None), (path, "bytes=20000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_file_that_is_no_archive_is_whole_after_a_cut(server, publish, tmp_path):
    paths = publish("svhn")
    server.fail(paths[0], Fault(times=1, cut=100_000))
    assert prepare(tmp_path, "svhn") == 0
    assert server.requests == [(paths[0], None), (paths[0], "bytes=100000-"), (paths[1], None)]
    assert tree_of(tmp_path) == make("svhn").tree


def test_a_download_survives_as_many_cuts_as_there_are_attempts_but_one(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=download.ATTEMPTS - 1, cut=1_000))
    assert prepare(tmp_path, "birds") == 0
    assert [wanted for _, wanted in server.requests] == [None, *(f"bytes={i}000-" for i in range(1, download.ATTEMPTS))]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_connection_that_is_reset_is_tried_again(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=2, cut=20_000, reset=True))
    assert prepare(tmp_path, "birds") == 0
    assert len(server.requests) == 3
    assert tree_of(tmp_path) == make("birds").tree


def test_what_has_arrived_is_kept_for_the_next_command(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(cut=2_000))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    part = tmp_path / "CUB_200_2011.tgz.part"
    assert server.url + path in message
    assert f"10,000 bytes are kept in {part}" in message
    assert tree_of(tmp_path) == {part.name: server.files[path][:10_000]}
    server.fail(path)
    server.requests.clear()
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, "bytes=10000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_server_that_knows_no_ranges_sends_all_again(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=1, cut=20_000), Fault(ranges=False))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None), (path, "bytes=20000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_part_of_another_file_is_fetched_anew(server, publish, tmp_path):
    (path,) = publish("birds")
    put(tmp_path, {"CUB_200_2011.tgz.part": b"of another file"})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, "bytes=15-"), (path, None)]
    assert tree_of(tmp_path) == make("birds").tree


@pytest.mark.parametrize("extra", [0, 7])
def test_a_part_with_nothing_left_to_fetch_is_no_obstacle(extra, server, publish, tmp_path):
    (path,) = publish("birds")
    content = server.files[path]
    put(tmp_path, {"CUB_200_2011.tgz.part": content + b"x" * extra})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests[0] == (path, f"bytes={len(content) + extra}-")
    assert len(server.requests) <= 2
    assert tree_of(tmp_path) == make("birds").tree


def test_a_length_that_is_not_told_is_not_needed(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(length=False))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_cut_of_a_file_of_untold_length_is_seen_by_its_checksum(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(length=False, cut=20_000))
    assert "CUB_200_2011.tgz has checksum" in refused("data", "prepare", "birds", "--root", tmp_path)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-100], lambda content: content[::-1]], ids=["short", "other"]
)
def test_a_wrong_checksum_is_refused(spoil, server, publish, tmp_path, refused):
    (path,) = publish("birds")
    wanted = md5(server.files[path])
    server.files[path] = spoil(server.files[path])
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"CUB_200_2011.tgz has checksum {md5(server.files[path])} rather than the published {wanted}" in message
    assert "try again" in message
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_gone_is_not_asked_for_twice(status, server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=status))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"cannot download {server.url}{path}" in message
    assert f"HTTP {status}" in message
    assert f"put the file at {tmp_path / 'CUB_200_2011.tgz'} yourself" in message
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status, server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=download.ATTEMPTS - 1, status=status))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None)] * download.ATTEMPTS
    assert tree_of(tmp_path) == make("birds").tree


def test_a_server_that_stays_busy_is_given_up(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=503))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert server.url + path in message
    assert "503" in message
    assert "run the command again" in message
    assert len(server.requests) == download.ATTEMPTS
    assert tree_of(tmp_path) == {}


def test_attempts_are_further_and_further_apart(server, publish, tmp_path, monkeypatch, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=503))
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 1.0)
    monkeypatch.setattr(download, "time", type("clock", (), {"sleep": pauses.append}))
    refused("data", "prepare", "birds", "--root", tmp_path)
    assert [pause for pause in pauses if pause] == [1.0, 2.0, 4.0, 8.0]


def test_a_server_that_is_gone_is_named(publish, tmp_path, refused):
    gone = Server()
    gone.close()
    (path,) = publish("birds")
    row = CATALOGUE["birds"]
    CATALOGUE["birds"] = replace(row, files=(replace(row.files[0], url=gone.url + path),))  # publish restores it
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert gone.url + path in message
    assert "refused" in message
    assert tree_of(tmp_path) == {}


def test_of_several_files_those_that_came_are_kept(server, publish, tmp_path, refused):
    paths = publish("flowers")
    server.fail(paths[1], Fault(status=404))
    assert server.url + paths[1] in refused("data", "prepare", "flowers", "--root", tmp_path)
    tree = make("flowers").tree
    assert tree_of(tmp_path) == {name: content for name, content in tree.items() if "/jpg/" in name}
    server.fail(paths[1])
    server.requests.clear()
    assert prepare(tmp_path, "flowers") == 0
    assert server.requests == [(path, None) for path in paths[1:]]
    assert tree_of(tmp_path) == tree


def test_a_root_that_is_no_folder_is_named(server, publish, tmp_path, refused):
    publish("birds")
    (tmp_path / "root").touch()
    message = refused("data", "prepare", "birds", "--root", tmp_path / "root")
    assert f"cannot write to {tmp_path / 'root'}" in message
    assert server.requests == []


# archives that are damaged or others


def members_end(tar, count):
    """Where the first members of a plain tar file end."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return file.getmembers()[count].offset


@pytest.mark.parametrize("cut", ["gzip", "tar"])
def test_a_truncated_archive_is_refused(cut, publish, tmp_path, refused):
    if cut == "gzip":
        name, file = "aircraft", "fgvc-aircraft-2013b.tar.gz"
        publish(name, **{"fgvc-aircraft-2013b": make(name).downloads[file][:-1000]})
    else:
        name, file = "scenes", "indoor-67/indoorCVPR_09.tar"
        whole = make(name).downloads["indoorCVPR_09.tar"]
        publish(name, indoorCVPR_09=whole[: members_end(whole, 20) + 700])  # inside of a member
    assert f"cannot unpack {tmp_path / file}" in refused("data", "prepare", name, "--root", tmp_path)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("more", [0, 300], ids=["between two members", "inside of a header"])
def test_an_archive_cut_where_it_does_not_show_is_refused_and_leaves_nothing(more, publish, tmp_path, refused, server):
    whole = make("scenes").downloads["indoorCVPR_09.tar"]
    paths = publish("scenes", indoorCVPR_09=whole[: members_end(whole, 20) + more])
    assert "indoor-67" in refused("data", "prepare", "scenes", "--root", tmp_path)
    assert tree_of(tmp_path) == {}
    server.files[paths[0]] = whole
    assert prepare(tmp_path, "scenes") == 0
    assert tree_of(tmp_path) == make("scenes").tree


def test_what_the_user_put_there_stays_when_the_rest_does_not_fit(publish, tmp_path, refused):
    publish("scenes", TestImages=b"bakery/none.jpg")
    images = {name: content for name, content in make("scenes").tree.items() if "/Images/" in name}
    put(tmp_path, images)
    assert "none.jpg" in refused("data", "prepare", "scenes", "--root", tmp_path)
    assert images.items() <= tree_of(tmp_path).items()


def test_a_page_in_place_of_a_list_is_refused_and_leaves_nothing(publish, tmp_path, refused, server):
    paths = publish("scenes", TestImages=b"<html>\n<body>Please log in.</body>\n</html>\n")
    assert "TestImages.txt" in refused("data", "prepare", "scenes", "--root", tmp_path)
    server.files[paths[2]] = make("scenes").downloads["TestImages.txt"]
    assert prepare(tmp_path, "scenes") == 0
    assert tree_of(tmp_path) == make("scenes").tree


def test_an_archive_without_the_folder_expected_is_refused_and_leaves_nothing(publish, tmp_path, refused):
    other = archive({"CUB_200_2010/README": b"of the year before"})
    publish("birds", CUB_200_2011=other)
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert CATALOGUE["birds"].files[0].url in message
    assert str(tmp_path / "CUB_200_2011") in message
    assert tree_of(tmp_path) == {}
    publish("birds")
    assert prepare(tmp_path, "birds") == 0


@pytest.mark.parametrize("name", ["birds", "dtd", "svhn"])
def test_a_set_with_other_counts_is_refused_each_time(name, publish, tmp_path, refused):
    publish(name)
    row = CATALOGUE[name]
    CATALOGUE[name] = replace(row, images=row.images | {"test": row.images["test"] + 1}, classes=row.classes + 1)
    for _ in range(2):
        message = refused("data", "prepare", name, "--image_size", "16", "--root", tmp_path)
        assert f"{row.classes} classes rather than {row.classes + 1}" in message
        assert f"{row.images['test']} test images rather than {row.images['test'] + 1}" in message
    assert tree_of(tmp_path) == {}


def test_an_archive_that_the_user_put_there_is_used_and_stays(server, publish, tmp_path):
    publish("birds")
    content = make("birds").downloads["CUB_200_2011.tgz"]
    put(tmp_path, {"CUB_200_2011.tgz": content})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == []
    assert tree_of(tmp_path) == make("birds").tree | {"CUB_200_2011.tgz": content}


def test_a_wrong_archive_that_the_user_put_there_is_refused_and_stays(server, publish, tmp_path, refused):
    publish("birds")
    put(tmp_path, {"CUB_200_2011.tgz": b"of another kind"})
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"remove {tmp_path / 'CUB_200_2011.tgz'}, or replace it" in message
    assert server.requests == []
    assert tree_of(tmp_path) == {"CUB_200_2011.tgz": b"of another kind"}


def test_what_an_unpacking_that_was_killed_left_does_not_count(publish, tmp_path):
    publish("birds")
    put(tmp_path, {".CUB_200_2011.tgz.unpacked/CUB_200_2011/half.txt": b"of another archive"})
    assert prepare(tmp_path, "birds") == 0
    assert tree_of(tmp_path) == make("birds").tree


# archives are not trusted


def tar_with(**member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for attributes in ({"name": "good.txt"}, member):
            info = tarfile.TarInfo()
            info.size = 4 if attributes.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"data"))
    return buffer.getvalue()


def zip_with(name, mode=stat.S_IFREG | 0o644):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("good.txt", "data")
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, 3
        file.writestr(info, "data")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        {"name": "../x"},
        {"name": "a/../../x"},
        {"name": "/ABSOLUTE/x"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "good.txt"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc"},
        {"name": "hard", "type": tarfile.LNKTYPE, "linkname": "good.txt"},
        {"name": "pipe", "type": tarfile.FIFOTYPE},
        {"name": "device", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"name": "disk", "type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
    ],
    ids=["up", "up-later", "absolute", "symlink", "symlink-out", "hard-link", "fifo", "device", "disk"],
)
def test_a_tar_file_may_only_hold_files_inside_of_its_folder(member, tmp_path):
    member = {
        key: value.replace("/ABSOLUTE", str(tmp_path)) if key == "name" else value for key, value in member.items()
    }
    check_refused(tmp_path, "spoilt.tar", tar_with(**member), member["name"])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../x", stat.S_IFREG),
        ("a/../../x", stat.S_IFREG),
        ("/ABSOLUTE/x", stat.S_IFREG),
        ("..\\x", stat.S_IFREG),
        ("\\x", stat.S_IFREG),
        ("link", stat.S_IFLNK),
        ("pipe", stat.S_IFIFO),
        ("device", stat.S_IFCHR),
    ],
    ids=["up", "up-later", "absolute", "backslash-up", "backslash", "symlink", "fifo", "device"],
)
def test_a_zip_file_may_only_hold_files_inside_of_its_folder(name, mode, tmp_path):
    name = name.replace("/ABSOLUTE", str(tmp_path))
    check_refused(tmp_path, "spoilt.zip", zip_with(name, mode | 0o644), name)


def check_refused(tmp_path, file, content, named):
    put(tmp_path, {f"in/{file}": content})
    with pytest.raises(DataError, match=re.escape(repr(named))) as error:
        extract(tmp_path / "in" / file, tmp_path / "in" / "out")
    assert file in str(error.value)
    assert tree_of(tmp_path) == {f"in/{file}": content}


@pytest.mark.parametrize("file", ["a.tar", "a.tar.gz", "a.tgz", "a.zip"])
def test_an_archive_without_fault_is_unpacked_and_stays(file, tmp_path):
    tree = {"a/b.txt": b"first", "a/deep/c.txt": b"second", "d.txt": b"third"}
    if file.endswith("zip"):
        with zipfile.ZipFile(tmp_path / file, "w") as packed:
            for name, content in tree.items():
                packed.writestr(name, content)
    else:
        (tmp_path / file).write_bytes(archive(tree, compress=file.endswith("gz")))
    extract(tmp_path / file, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree
    assert (tmp_path / file).exists()


@pytest.mark.parametrize("file", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<html>moved</html>", bytes(100), gzip.compress(b"no tar inside")],
    ids=["empty", "page", "zeros", "gzip"],
)
def test_what_is_no_archive_is_refused(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot unpack {re.escape(str(tmp_path / file))}"):
        extract(tmp_path / file, tmp_path / "out")
    assert tree_of(tmp_path) == {file: content}


def test_a_spoilt_archive_of_a_set_is_refused_in_one_line_and_leaves_nothing(publish, tmp_path, refused):
    publish("birds", CUB_200_2011=gzip.compress(tar_with(name="../x")))
    assert "'../x'" in refused("data", "prepare", "birds", "--root", tmp_path / "root")
    assert tree_of(tmp_path / "root") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


# verification


def file_of(name, number):
    """The file of a picture."""
    return next(file for file, content in make(name).tree.items() if content == jpeg(number))


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("cifar10", "cifar100", "svhn")])
@pytest.mark.parametrize("how", ["truncated", "empty", "gone"])
def test_a_bad_image_is_found_and_named_and_can_be_skipped(name, how, publish, tmp_path, capsys, refused):
    publish(name)
    put(tmp_path, make(name).tree)
    first = numbers(open_source(TaskConfig(name), tmp_path))[0]
    bad = file_of(name, first)
    if how == "gone":
        (tmp_path / bad).unlink()
    else:
        os.truncate(tmp_path / bad, 400 if how == "truncated" else 0)
    if (name, how) != ("scenes", "gone"):  # there its list tells of it
        assert verify(tmp_path, name) == 1
        told = capsys.readouterr().out
        assert f"1 of {len(make(name).labels)} images of '{name}'" in told
        assert bad in told
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
def test_a_missing_class_is_found_and_named(name, folder, publish, tmp_path, capsys):
    publish(name)
    put(tmp_path, {file: content for file, content in make(name).tree.items() if not file.startswith(f"{folder}/")})
    assert verify(tmp_path, name) == 1
    assert folder.rpartition("/")[2] in capsys.readouterr().out


READ = {  # what is read of each set besides images
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
def test_whatever_list_is_damaged_it_is_found_and_is_no_crash(name, publish, tmp_path, capsys):
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
def test_a_split_that_cannot_be_read_is_not_taken_for_one_that_is_not_published(
    name, file, damage, publish, tmp_path, refused
):
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
    told = capsys.readouterr()
    assert "cifar10" in told.out + told.err
    assert file_of("birds", 5) in told.out


def test_the_way_out_of_a_damaged_set_is_told(server, publish, tmp_path, refused):
    publish("cifar10")
    put(tmp_path, make("cifar10").tree)
    os.truncate(tmp_path / "cifar-10-batches-py" / "test_batch", 1000)
    message = refused("data", "prepare", "cifar10", "--image_size", "16", "--root", tmp_path)
    assert str(tmp_path) in message
    assert "remove" in message  # to prepare it again would not help while it is there


def test_a_set_that_is_absent_cannot_be_verified(publish, tmp_path, refused):
    publish("birds")
    message = refused("data", "verify", "birds", "--root", tmp_path)
    assert "'birds' is not in" in message
    assert "data prepare birds" in message


# processes


def prepare_twice_at_once(name, root):
    """Prepares a data set in two processes, and returns their exit codes."""
    context = multiprocessing.get_context("fork")  # with the catalogue as it is here
    start = context.Barrier(2)

    def work():
        start.wait()
        prepare_source(TaskConfig("task", dataset=name), root)

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("name", ["birds", "flowers"])
def test_of_two_processes_that_start_at_once_one_downloads(name, server, publish, tmp_path, capfd):
    paths = publish(name)
    for path in paths:
        server.fail(path, Fault(delay=0.5))
    assert prepare_twice_at_once(name, tmp_path) == [0, 0]
    assert server.requests == [(path, None) for path in paths]
    assert tree_of(tmp_path) == make(name).tree
    assert capfd.readouterr().err.count(f"waiting for another process: preparing {name}") == 1


# data sets of torchvision


def idx(array):
    """An array in the format of MNIST."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def digits(count, first):
    """Grey images (N, 28, 28) of one value each, and labels."""
    values = np.arange(first, first + count)
    images = np.broadcast_to(values[:, None, None], (count, 28, 28)).copy()
    images[:, :14] = 0  # the upper half is black
    return images, values % 10


def mnist():
    files = {}
    for part, (images, labels) in (("train", digits(80, 100)), ("t10k", digits(20, 200))):
        files |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    return files


def check_mnist(root):
    source = open_source(TaskConfig("torchvision/MNIST"), root)
    assert list(source.splits) == ["train"] * 80 + ["test"] * 20
    assert source.labels.tolist() == [*np.arange(100, 180) % 10, *np.arange(200, 220) % 10]
    assert source.classes[:2] == ["0 - zero", "1 - one"]
    assert source.images.side(224) == 28
    for index, value in ((0, 100), (79, 179), (80, 200), (99, 219)):
        image = source.images.decode(index, 28).numpy()
        assert image.shape == (3, 28, 28)
        assert (image[:, :14] == 0).all()
        assert (image[:, 14:] == value).all()


def test_a_set_of_arrays_with_a_train_flag(server, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}/"])
    put(tmp_path, {f"MNIST/MNIST/raw/{name}": content for name, content in mnist().items()})
    assert prepare(tmp_path, "torchvision/MNIST") == 0
    assert verify(tmp_path, "torchvision/MNIST") == 0
    assert server.requests == []
    check_mnist(tmp_path)


@pytest.fixture
def mnist_server(server, monkeypatch):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist().items()}
    server.files |= {f"/{name}": content for name, content in packed.items()}
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server.url}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(n, md5(c)) for n, c in packed.items()])
    return server


def test_torchvision_downloads_its_own_sets_once(mnist_server, tmp_path):
    server = mnist_server
    assert prepare(tmp_path, "torchvision/MNIST") == 0
    assert {path for path, _ in server.requests} == set(server.files)
    check_mnist(tmp_path)
    server.requests.clear()
    assert prepare(tmp_path, "torchvision/MNIST") == 0
    assert server.requests == []


def test_of_two_processes_that_start_at_once_one_has_torchvision_download(mnist_server, tmp_path):
    assert prepare(tmp_path / "alone", "torchvision/MNIST") == 0
    needed = sorted(mnist_server.requests)
    mnist_server.requests.clear()
    for path in mnist_server.files:
        mnist_server.fail(path, Fault(delay=0.1))
    assert prepare_twice_at_once("torchvision/MNIST", tmp_path) == [0, 0]
    assert sorted(mnist_server.requests) == needed
    check_mnist(tmp_path)


def test_a_set_of_torchvision_that_cannot_be_had_is_named(server, monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torchvision.datasets.Country211, "_URL", f"{server.url}/country211.tgz")
    message = refused("data", "prepare", "torchvision/Country211", "--root", tmp_path)
    assert "torchvision's Country211" in message
    assert "404" in message
    assert str(tmp_path / "Country211") in message
    assert set(tree_of(tmp_path)) <= {".Country211.lock"}


def test_half_of_an_interrupted_set_of_torchvision_is_not_taken_for_the_whole(monkeypatch, tmp_path):
    tree, wanted = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    half = [name for name in tree if not name.endswith(("6.jpg", "7.jpg"))]

    def unpack(url, download_root, **rest):
        put(Path(download_root) / "country211", {name: tree[name] for name in (half if interrupted else tree)})
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.country211, "download_and_extract_archive", unpack)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, "torchvision/Country211")
    interrupted = False
    assert prepare(tmp_path, "torchvision/Country211") == 0
    check_pictures(open_source(TaskConfig("torchvision/Country211"), tmp_path), wanted, {"valid": "val"})


def in_classes(names, splits, suffix, kind, each=8):
    """SPLIT/CLASS/IMAGE, with picture numbers that run on, and what must be found: (label, split) by number."""
    tree, wanted = {}, []
    for split in splits:
        for label, name in enumerate(names):
            for i in range(each):
                tree[f"{split}/{name}/{i}{suffix}"] = encoded(len(wanted), kind)
                wanted.append((label, split))
    return tree, wanted


def check_pictures(source, wanted, renamed=None):
    shown = numbers(source)
    assert sorted(shown) == list(range(len(wanted)))
    assert source.labels.tolist() == [wanted[number][0] for number in shown]
    assert list(source.splits) == [(renamed or {}).get(wanted[n][1], wanted[n][1]) for n in shown]


def test_a_set_of_torchvision_without_splits_is_divided(tmp_path, capsys):
    tree, wanted = in_classes(["AnnualCrop", "Forest", "River"], ["2750"], ".jpg", "JPEG")
    put(tmp_path / "EuroSAT" / "eurosat", tree)
    assert prepare(tmp_path, "torchvision/EuroSAT") == 0
    source = open_source(TaskConfig("torchvision/EuroSAT"), tmp_path)
    check_pictures(source, wanted, {"2750": ""})
    assert source.classes == ["AnnualCrop", "Forest", "River"]
    assert "{'train': 18, 'val': 3, 'test': 3}" in capsys.readouterr().out
    assert verify(tmp_path, "torchvision/EuroSAT") == 0
    os.truncate(tmp_path / "EuroSAT" / "eurosat" / "2750" / "Forest" / "3.jpg", 400)
    assert verify(tmp_path, "torchvision/EuroSAT") == 1
    assert "Forest/3.jpg" in capsys.readouterr().out


def test_a_set_of_torchvision_without_test_images_is_tested_on_its_validation_images(tmp_path):
    names = ["n01440764", "n02102040", "n03888257"]
    tree, wanted = in_classes(names, ["train", "val"], ".JPEG", "JPEG")
    put(tmp_path / "Imagenette" / "imagenette2", tree)
    assert prepare(tmp_path, "torchvision/Imagenette") == 0
    source = open_source(TaskConfig("torchvision/Imagenette"), tmp_path)
    check_pictures(source, wanted, {"val": "test"})


def test_classes_with_several_names_are_called_by_the_first(tmp_path):
    tree, _ = in_classes(["n01440764", "n02102040", "n03888257"], ["train", "val"], ".JPEG", "JPEG", each=1)
    put(tmp_path / "Imagenette" / "imagenette2", tree)
    source = open_source(TaskConfig("torchvision/Imagenette"), tmp_path)
    assert list(source.classes) == ["tench", "English springer", "parachute"]


def test_a_set_of_torchvision_may_be_chosen_by_its_arguments(tmp_path):
    for size, each in (("-160", 9), ("", 8)):
        tree, wanted = in_classes(["n01440764", "n02102040"], ["train", "val"], ".JPEG", "JPEG", each)
        put(tmp_path / "Imagenette" / f"imagenette2{size}", tree)
    full, small = (
        open_source(TaskConfig("stars", dataset="torchvision/Imagenette", args={"size": size}), tmp_path)
        for size in ("full", "160px")
    )
    assert (len(full.labels), len(small.labels)) == (32, 36)
    check_pictures(full, wanted, {"val": "test"})
    assert full.location != small.location  # so that they do not share decoded images


def test_another_variant_of_a_set_of_torchvision_is_added(server, monkeypatch, tmp_path):
    sizes = {"full": "imagenette2", "160px": "imagenette2-160"}
    trees, addresses = {}, {}
    for each, (size, stem) in enumerate(sizes.items(), 7):
        tree, _ = in_classes(["n01440764", "n02102040"], ["train", "val"], ".JPEG", "JPEG", each)
        trees |= {f"Imagenette/{stem}/{name}": content for name, content in tree.items()}
        server.files[f"/{stem}.tgz"] = archive({f"{stem}/{name}": content for name, content in tree.items()})
        addresses[size] = (f"{server.url}/{stem}.tgz", md5(server.files[f"/{stem}.tgz"]))
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", addresses)
    for size, count, asked in (("full", 28, True), ("160px", 32, True), ("full", 28, False)):
        task = TaskConfig("stars", dataset="torchvision/Imagenette", args={"size": size})
        server.requests.clear()
        prepare_source(task, tmp_path)
        assert len(open_source(task, tmp_path).labels) == count
        assert {path for path, _ in server.requests} == ({f"/{sizes[size]}.tgz"} if asked else set())
    assert trees.items() <= tree_of(tmp_path).items()


def test_torchvision_downloads_into_a_folder_that_has_other_things(mnist_server, tmp_path):
    put(tmp_path, {"far/notes.txt": b"mine"})
    task = TaskConfig("digits", path=str(tmp_path / "far"), dataset="torchvision/MNIST")
    prepare_source(task, tmp_path / "root")
    assert len(open_source(task, tmp_path / "root").labels) == 100
    assert (tmp_path / "far" / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["birds", "torchvision/MNIST"])
def test_a_set_in_a_root_that_cannot_be_written_is_used(name, publish, tmp_path, monkeypatch):
    publish("birds")
    put(tmp_path, make("birds").tree)
    put(tmp_path, {f"MNIST/MNIST/raw/{file}": content for file, content in mnist().items()})

    def refuse(path, what):
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(sources, "exclusive", refuse)
    data = SequentialTaskDataModule((TaskConfig("task", dataset=name),), 16, root=str(tmp_path), cache="ram")
    data.prepare_data()
    assert len(data.classes) == (3 if name == "birds" else 10)


def test_a_set_of_torchvision_with_a_list_of_samples(tmp_path):
    tree, wanted = in_classes(["negative", "positive"], ["train", "valid", "test"], ".png", "PNG")
    put(tmp_path / "RenderedSST2" / "rendered-sst2", tree)
    assert prepare(tmp_path, "torchvision/RenderedSST2") == 0
    source = open_source(TaskConfig("torchvision/RenderedSST2"), tmp_path)
    check_pictures(source, wanted, {"valid": "val"})
    assert source.classes == ["negative", "positive"]


def test_a_set_of_torchvision_whose_test_images_are_in_a_table(tmp_path):
    tree, wanted = in_classes(["00000", "00001", "00002"], ["Training"], ".ppm", "PPM")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(9):
        tree[f"Final_Test/Images/{i:05d}.ppm"] = encoded(len(wanted), "PPM")
        rows.append(f"{i:05d}.ppm;32;32;0;0;31;31;{i * 2 % 3}")
        wanted.append((i * 2 % 3, "test"))
    put(tmp_path / "GTSRB" / "gtsrb", {f"GTSRB/{name}": content for name, content in tree.items()})
    put(tmp_path / "GTSRB" / "gtsrb", {"GT-final_test.csv": "\n".join(rows).encode()})
    assert prepare(tmp_path, "torchvision/GTSRB") == 0
    check_pictures(open_source(TaskConfig("torchvision/GTSRB"), tmp_path), wanted, {"Training": "train"})


def test_a_set_of_torchvision_that_keeps_no_list_of_files(tmp_path, capsys):
    tree, wanted = in_classes(["BACKGROUND_Google", "accordion", "barrel", "yin_yang"], ["none"], "", "JPEG")
    tree = {f"{name[5:-1]}image_{int(name[-1]) + 1:04d}.jpg": content for name, content in tree.items()}
    put(tmp_path / "Caltech101" / "caltech101" / "101_ObjectCategories", tree)
    assert prepare(tmp_path, "torchvision/Caltech101") == 0
    source = open_source(TaskConfig("torchvision/Caltech101"), tmp_path)
    assert list(source.classes) == ["accordion", "barrel", "yin_yang"]  # the background is none
    shown = numbers(source)
    assert sorted(shown) == [number for number, (label, _) in enumerate(wanted) if label]
    assert source.labels.tolist() == [wanted[number][0] - 1 for number in shown]
    assert set(source.splits) == {""}
    before = source.images.fingerprint()
    put(tmp_path / "Caltech101" / "caltech101" / "101_ObjectCategories", {"barrel/image_0003.jpg": jpeg(500)})
    assert open_source(TaskConfig("torchvision/Caltech101"), tmp_path).images.fingerprint() != before


def test_a_set_of_torchvision_with_three_splits(tmp_path):
    tree, wanted = in_classes(["AD", "AE", "AF"], ["train", "valid", "test"], ".jpg", "JPEG")
    put(tmp_path / "Country211" / "country211", tree)
    assert prepare(tmp_path, "torchvision/Country211") == 0
    check_pictures(open_source(TaskConfig("torchvision/Country211"), tmp_path), wanted, {"valid": "val"})


def test_a_set_of_torchvision_may_lie_elsewhere(tmp_path):
    tree, wanted = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    put(tmp_path / "far" / "country211", tree)
    task = TaskConfig("lands", path=str(tmp_path / "far"), dataset="torchvision/Country211")
    data = SequentialTaskDataModule((task,), 16, root=str(tmp_path / "root"))
    data.prepare_data()
    assert data.sizes == {"train": 16, "val": 16, "test": 16}
    check_pictures(open_source(task, tmp_path / "root"), wanted, {"valid": "val"})


@pytest.mark.parametrize("kind", ["binary-category", ["binary-category"]])
def test_labels_are_those_that_the_arguments_ask_for(kind, tmp_path):
    made = make("pets")
    put(tmp_path / "OxfordIIITPet", made.tree)
    task = TaskConfig("cats_or_dogs", dataset="torchvision/OxfordIIITPet", args={"target_types": kind})
    source = open_source(task, tmp_path)
    assert source.labels.tolist() == [SPECIES[made.labels[number]] for number in numbers(source)]
    assert len(source.classes) == 2


@pytest.mark.parametrize(
    ("name", "args", "named"),
    [
        ("Country212", {}, "'Country212'"),
        ("Country211", {"split": "tset"}, "'tset'"),
        ("Country211", {"spilt": "test"}, "'spilt'"),
        ("OxfordIIITPet", {"target_types": "segmentation"}, "OxfordIIITPet"),
        ("OxfordIIITPet", {"target_types": "bianry-category"}, "'bianry-category'"),
    ],
)
def test_what_torchvision_does_not_have_is_named(name, args, named, tmp_path):
    put(tmp_path / "OxfordIIITPet", make("pets").tree)
    trimaps = "OxfordIIITPet/oxford-iiit-pet/annotations/trimaps"
    put(tmp_path, {f"{trimaps}/{file.stem}.png": encoded(0, "PNG") for file in tmp_path.rglob("images/*.jpg")})
    tree, _ = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    put(tmp_path / "Country211" / "country211", tree)
    task = TaskConfig("wrong", dataset=f"torchvision/{name}", args=args)
    with pytest.raises(DataError, match=re.escape(named)):
        open_source(task, tmp_path)


def test_every_class_of_torchvision_that_is_absent_is_named(tmp_path):
    classes = [name for name in torchvision.datasets.__all__ if name[0].isupper()]
    assert len(classes) > 50
    crashed = []
    for name in classes:
        try:
            open_source(TaskConfig("absent", dataset=f"torchvision/{name}"), tmp_path)
            crashed.append((name, "opened"))
        except Exception as error:
            if not isinstance(error, DataError) or name not in str(error):
                crashed.append((name, error))
    assert not crashed


# the first command of a user


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_command_downloads_the_six_and_learns_them(server, publish, tmp_path, tiny_fit):
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
