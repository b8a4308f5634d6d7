"""Data sets of torchvision."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from fixtures_catalogue import Fault, mnist, numbers, prepare, prepare_twice_at_once, put, tree_of, verify
from fixtures_sets import SPECIES, archive, encoded, jpeg, make, md5

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.data import sources
from recast_pl.data.catalogue import CATALOGUE
from recast_pl.data.sources import open_source, prepare_source
from recast_pl.errors import DataError

pytest_plugins = ["fixtures_catalogue"]


def check_mnist(root):
    source = open_source(TaskConfig("torchvision/MNIST"), root)
    assert list(source.splits) == ["train"] * 80 + ["test"] * 20
    assert source.labels.tolist() == [*np.arange(100, 180) % 10, *np.arange(200, 220) % 10]
    assert source.classes[:2] == ["0 - zero", "1 - one"]
    assert source.images.native == 28
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


def test_torchvision_downloads_its_own_sets_once(mnist_server, tmp_path):
    server = mnist_server
    assert prepare(tmp_path, "torchvision/MNIST") == 0
    assert {path for path, _ in server.requests} == set(server.files)
    check_mnist(tmp_path)
    server.requests.clear()
    assert prepare(tmp_path, "torchvision/MNIST") == 0
    assert server.requests == []


def test_only_one_of_two_processes_lets_torchvision_download(mnist_server, tmp_path):
    assert prepare(tmp_path / "alone", "torchvision/MNIST") == 0
    needed = sorted(mnist_server.requests)
    mnist_server.requests.clear()
    for path in mnist_server.files:
        mnist_server.fail(path, Fault(delay=0.1))
    assert prepare_twice_at_once("torchvision/MNIST", tmp_path) == [0, 0]
    assert sorted(mnist_server.requests) == needed
    check_mnist(tmp_path)


def test_a_set_that_torchvision_cannot_download_is_named(server, monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torchvision.datasets.Country211, "_URL", f"{server.url}/country211.tgz")
    message = refused("data", "prepare", "torchvision/Country211", "--root", tmp_path)
    assert "torchvision's Country211" in message
    assert "404" in message
    assert str(tmp_path / "Country211") in message
    assert set(tree_of(tmp_path)) <= {".Country211.lock"}


def test_an_interrupted_download_by_torchvision_starts_again(monkeypatch, tmp_path):
    tree, wanted = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    half = [name for name in tree if not name.endswith(("6.jpg", "7.jpg"))]

    def unpack(url, download_root, **rest):
        put(Path(download_root) / "country211", {name: tree[name] for name in (half if interrupted else tree)})
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.country211, "download_and_extract_archive", unpack)
    interrupted = True
    assert prepare(tmp_path, "torchvision/Country211") == 130
    interrupted = False
    assert prepare(tmp_path, "torchvision/Country211") == 0
    check_pictures(open_source(TaskConfig("torchvision/Country211"), tmp_path), wanted, {"valid": "val"})


def in_classes(names, splits, suffix, kind, each=8):
    """Files SPLIT/CLASS/IMAGE that show pictures 0, 1, 2, …, and the (label, split) of each picture."""
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
    assert "{'train': 17, 'val': 4, 'test': 3}" in capsys.readouterr().out
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


def test_of_several_names_of_a_class_the_first_is_used(tmp_path):
    tree, _ = in_classes(["n01440764", "n02102040", "n03888257"], ["train", "val"], ".JPEG", "JPEG", each=1)
    put(tmp_path / "Imagenette" / "imagenette2", tree)
    source = open_source(TaskConfig("torchvision/Imagenette"), tmp_path)
    assert list(source.classes) == ["tench", "English springer", "parachute"]


def test_arguments_choose_a_variant_of_a_set_of_torchvision(tmp_path):
    for size, each in (("-160", 9), ("", 8)):
        tree, wanted = in_classes(["n01440764", "n02102040"], ["train", "val"], ".JPEG", "JPEG", each)
        put(tmp_path / "Imagenette" / f"imagenette2{size}", tree)
    full, small = (
        open_source(TaskConfig("stars", dataset="torchvision/Imagenette", args={"size": size}), tmp_path)
        for size in ("full", "160px")
    )
    assert (len(full.labels), len(small.labels)) == (32, 36)
    check_pictures(full, wanted, {"val": "test"})
    assert full.location != small.location  # or they would share decoded images


def test_another_variant_of_a_set_of_torchvision_is_downloaded_beside_the_first(server, monkeypatch, tmp_path):
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


def test_torchvision_downloads_into_a_folder_with_other_files(mnist_server, tmp_path):
    put(tmp_path, {"far/notes.txt": b"mine"})
    task = TaskConfig("digits", path=str(tmp_path / "far"), dataset="torchvision/MNIST")
    prepare_source(task, tmp_path / "root")
    assert len(open_source(task, tmp_path / "root").labels) == 100
    assert (tmp_path / "far" / "notes.txt").read_bytes() == b"mine"


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
    assert list(source.classes) == ["accordion", "barrel", "yin_yang"]  # without the background
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


def test_a_set_of_torchvision_can_lie_elsewhere(tmp_path):
    tree, wanted = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    put(tmp_path / "far" / "country211", tree)
    task = TaskConfig("lands", path=str(tmp_path / "far"), dataset="torchvision/Country211")
    data = SequentialTaskDataModule((task,), 16, root=str(tmp_path / "root"))
    data.prepare_data()
    assert data.sizes == {"train": 16, "val": 16, "test": 16}
    check_pictures(open_source(task, tmp_path / "root"), wanted, {"valid": "val"})


@pytest.mark.parametrize("kind", ["binary-category", ["binary-category"]])
def test_arguments_choose_the_labels(kind, tmp_path):
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
def test_an_unknown_set_or_argument_of_torchvision_is_named(name, args, named, tmp_path):
    put(tmp_path / "OxfordIIITPet", make("pets").tree)
    trimaps = "OxfordIIITPet/oxford-iiit-pet/annotations/trimaps"
    put(tmp_path, {f"{trimaps}/{file.stem}.png": encoded(0, "PNG") for file in tmp_path.rglob("images/*.jpg")})
    tree, _ = in_classes(["AD", "AE"], ["train", "valid", "test"], ".jpg", "JPEG")
    put(tmp_path / "Country211" / "country211", tree)
    task = TaskConfig("wrong", dataset=f"torchvision/{name}", args=args)
    with pytest.raises(DataError, match=re.escape(named)):
        open_source(task, tmp_path)


def test_every_missing_set_of_torchvision_is_named(tmp_path):
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
