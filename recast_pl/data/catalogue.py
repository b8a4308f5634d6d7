"""Data sets known by name: where each comes from, what it must contain, and how it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from recast_pl.data.datasets import ImageSource
from recast_pl.data.folders import open_folder
from recast_pl.data.images import ImageFiles, ImageItems
from recast_pl.data.torchvision_sets import open_torchvision, torchvision_class
from recast_pl.errors import DataError


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set on the network.

    Args:
        url: Its address.
        md5: The published MD5 checksum; None if there is none.
        provides: What exists, below the root, when the file is in place (and unpacked, if it is an archive).
        folder: Where the file is put, and unpacked, below the root.
    """

    url: str
    md5: str | None
    provides: str
    folder: str = ""


@dataclass(frozen=True)
class DataSet:
    """An entry of the catalogue.

    Args:
        title: What it is, in a few words.
        classes: Number of classes, as its authors divide them.
        images: Number of images by official split; under an empty string, of those without split.
        reader: Name of its class in `torchvision.datasets`, or a function that finds its images below a root.
        files: Files to download; empty if it cannot be downloaded, or does not have to be.
        folder: Root of its torchvision class, below the root of all data sets.
        native: Height and width of its images in pixels; None if they differ.
        present: What exists below the root when it is on disk, if `files` do not say so.
        note: What a user should know.
    """

    title: str
    classes: int
    images: Mapping[str, int]
    reader: str | Callable[[Path], ImageSource]
    files: tuple[RemoteFile, ...] = ()
    folder: str = ""
    native: int | None = None
    present: str = ""
    note: str = ""

    def is_present(self, root: Path) -> bool:
        """Whether all of it is on disk."""
        needed = [file.provides for file in self.files] + ([self.present] if self.present else [])
        return all((root / path).exists() for path in needed)

    def open(self, root: Path, args: Mapping[str, Any]) -> ImageSource:
        """Finds its images below a root; `args` are for its torchvision class. Raises DataError if it is damaged."""
        if isinstance(self.reader, str):
            return open_torchvision(self.reader, root / self.folder, args)
        try:
            return self.reader(root)
        except (LookupError, ValueError) as cause:
            raise DataError(
                f"{self.title} in {root} is damaged ({cause!r}); remove its folder and prepare it again"
            ) from cause

    def check_args(self, args: Mapping[str, Any]) -> None:
        """Raises DataError if its torchvision class does not take the arguments, or it has no such class."""
        if isinstance(self.reader, str):
            torchvision_class(self.reader, args)
        elif args:
            raise DataError(f"{self.title} takes no args; remove {dict(args)}")


def _open_digits(root: Path) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, at their own 8×8 pixels."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as cause:
        raise DataError("task 'digits' is scikit-learn's data set: pip install scikit-learn") from cause
    bunch = load_digits()
    arrays = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    items = [(Image.fromarray(array), label) for array, label in zip(arrays, bunch.target, strict=True)]
    labels = bunch.target.astype(np.int64)
    images = ImageItems("digits", items, 8, lambda: sha256(arrays).hexdigest())
    names, splits = [str(number) for number in range(len(labels))], [""] * len(labels)
    return ImageSource([str(name) for name in bunch.target_names], labels, splits, images, "digits", names)


def _open_birds(root: Path) -> ImageSource:
    """CUB-200-2011, from its lists of images, labels, splits and classes; each line is `ID VALUE`."""
    folder = root / "CUB_200_2011"
    files, labels, training, names = (
        dict(line.split(" ", 1) for line in _read_lines(folder / f"{name}.txt"))
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    if not files.keys() == labels.keys() == training.keys():
        raise DataError(f"the lists in {folder} do not name the same images; remove the folder and prepare it again")
    classes = {key: position for position, key in enumerate(names)}
    return ImageSource(
        [name.partition(".")[2].replace("_", " ") for name in names.values()],
        np.array([classes[labels[key]] for key in files]),
        ["train" if training[key] == "1" else "test" for key in files],
        ImageFiles([folder / "images" / name for name in files.values()]),
        str(folder.resolve()),
        list(files.values()),
    )


def _open_scenes(root: Path) -> ImageSource:
    """MIT Indoor-67: folders of classes, and two lists that name 80 training and 20 test images of each class."""
    lists, folder = root / "indoor-67", root / "indoor-67" / "Images"
    found = open_folder(folder)
    assert isinstance(found.images, ImageFiles)
    names = {path.relative_to(folder).as_posix(): i for i, path in enumerate(found.images.paths)}
    splits = [""] * len(names)
    for split, file in (("train", "TrainImages.txt"), ("test", "TestImages.txt")):
        for line in _read_lines(lists / file):
            if line not in names:
                raise DataError(f"{lists / file} names {line!r}, which is not in {folder}; prepare it again")
            splits[names[line]] = split
    return replace(found, classes=[name.replace("_", " ") for name in found.classes], splits=splits)


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, without blank ones."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"cannot read {path} ({cause}); remove its folder and prepare the data set again") from cause
    return [line.strip() for line in lines if line.strip()]


def _files(folder: str, *entries: tuple[str, str | None, str]) -> tuple[RemoteFile, ...]:
    """Files below one folder, each as (address, MD5 checksum, what it provides in the folder)."""
    return tuple(RemoteFile(url, md5, str(PurePosixPath(folder, provides)), folder) for url, md5, provides in entries)


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
_CALTECH = "https://data.caltech.edu/records/65de6-vp158/files"

_FILES = {
    "flowers": _files(
        "flowers-102",
        (f"{_OXFORD}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "jpg"),
        (f"{_OXFORD}/flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "imagelabels.mat"),
        (f"{_OXFORD}/flowers/102/setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "setid.mat"),
    ),
    "aircraft": _files(
        "",
        (
            f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
            "d4acdd33327262359767eeaa97a4f732",
            "fgvc-aircraft-2013b",
        ),
    ),
    "scenes": _files(
        "indoor-67",
        ("http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar", None, "Images"),
        ("http://web.mit.edu/torralba/www/TrainImages.txt", None, "TrainImages.txt"),
        ("http://web.mit.edu/torralba/www/TestImages.txt", None, "TestImages.txt"),
    ),
    "cifar100": _files(
        "", (f"{_TORONTO}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")
    ),
    "cifar10": _files(
        "", (f"{_TORONTO}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")
    ),
    "birds": _files(
        "", (f"{_CALTECH}/CUB_200_2011.tgz?download=1", "97eceeb196236b17998738112f37df78", "CUB_200_2011")
    ),
    "pets": _files(
        "oxford-iiit-pet",
        (f"{_OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "images"),
        (f"{_OXFORD}/pets/data/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "annotations"),
    ),
    "food101": _files(
        "", ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87", "food-101")
    ),
    "dtd": _files("dtd", (f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd")),
    "svhn": _files(
        "svhn",
        (f"{_STANFORD}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", "train_32x32.mat"),
        (f"{_STANFORD}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", "test_32x32.mat"),
    ),
}

_LEVELS = "annotation_level variant has 100 classes, family 70, manufacturer 41 (torchvision: 30); the paper, 55"
_COUNTED = "no published checksum: images are counted; 8,920 of 15,620 have no official split"
_GONE = "its site is gone; copies exist elsewhere"

_SETS = {
    "flowers": DataSet("Oxford Flowers-102", 102, {"train": 1020, "val": 1020, "test": 6149}, "Flowers102"),
    "aircraft": DataSet(
        "FGVC-Aircraft 2013b", 100, {"train": 3334, "val": 3333, "test": 3333}, "FGVCAircraft", note=_LEVELS
    ),
    "scenes": DataSet("MIT Indoor-67", 67, {"train": 5360, "test": 1340, "": 8920}, _open_scenes, note=_COUNTED),
    "cifar100": DataSet("CIFAR-100", 100, {"train": 50000, "test": 10000}, "CIFAR100", native=32),
    "cifar10": DataSet("CIFAR-10", 10, {"train": 50000, "test": 10000}, "CIFAR10", native=32),
    "birds": DataSet("Caltech-UCSD Birds 200-2011", 200, {"train": 5994, "test": 5794}, _open_birds),
    "cars": DataSet(
        "Stanford Cars", 196, {"train": 8144, "test": 8041}, "StanfordCars", present="stanford_cars", note=_GONE
    ),
    "pets": DataSet("Oxford-IIIT Pet", 37, {"train": 3680, "test": 3669}, "OxfordIIITPet"),
    "food101": DataSet("Food-101", 101, {"train": 75750, "test": 25250}, "Food101"),
    "dtd": DataSet("Describable Textures", 47, {"train": 1880, "val": 1880, "test": 1880}, "DTD"),
    "svhn": DataSet("Street View House Numbers", 10, {"train": 73257, "test": 26032}, "SVHN", folder="svhn", native=32),
    "digits": DataSet("handwritten digits", 10, {"": 1797}, _open_digits, native=8, note="part of scikit-learn"),
}

CATALOGUE = {name: replace(data_set, files=_FILES.get(name, ())) for name, data_set in _SETS.items()}
"""Data sets by name."""

PAPER = ("flowers", "aircraft", "scenes", "cifar100", "cifar10", "birds")
"""The six data sets of the paper, in its order."""
