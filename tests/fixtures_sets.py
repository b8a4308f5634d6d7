"""Tiny data sets in the formats of their authors, and a web server that can fail."""

import gzip
import hashlib
import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import numpy as np
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

SIDE = 32


# pictures


def picture(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """Picture `number` (H, W, 3): four squares; the colour of the upper left one is unique."""
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:16, :16] = [16 + 32 * digit for digit in (number // 64, number // 8 % 8, number % 8)]
    pixels[:16, 16:], pixels[16:, :16], pixels[16:, 16:] = 255, 0, 128
    margins = [((extra - SIDE) // 2,) * 2 for extra in (height, width)]
    return np.pad(pixels, (*margins, (0, 0)), mode="edge")


def number_of(image: object) -> int:
    """The number of a decoded picture (3, 32, 32); fails if it is turned, in wrong colours, or not a picture."""
    squares = np.asarray(image, dtype=float).reshape(3, 2, 16, 2, 16)[:, :, 3:-3, :, 3:-3].mean((2, 4))  # (3, 2, 2)
    corners = squares.reshape(3, 4)
    assert np.abs(corners[:, 1:] - [255, 0, 128]).max() < 8, corners
    digits = np.round((corners[:, 0] - 16) / 32)
    assert np.abs(corners[:, 0] - 16 - 32 * digits).max() < 8, corners
    return int(digits @ [64, 8, 1])


def jpeg(number: int) -> bytes:
    """Picture `number` as a square, wide or tall JPEG file, with its four squares at the centre."""
    width, height = ((32, 32), (48, 32), (32, 48))[number % 3]
    return encoded(number, "JPEG", width, height)


def encoded(number: int, kind: str, width: int = SIDE, height: int = SIDE) -> bytes:
    """Picture `number` in one of Pillow's formats."""
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(picture(number, width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def archive(tree: Mapping[str, bytes], compress: bool = True) -> bytes:
    """A tar file; like those of `tar`, it also has an entry for each folder."""
    buffer = io.BytesIO()
    folders = sorted({str(up) for name in tree for up in PurePosixPath(name).parents} - {"."})
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for name, content in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0) if compress else buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# data sets


@dataclass(frozen=True)
class Made:
    """A data set of pictures 0, 1, 2, …

    Args:
        classes: Class names, in order of label.
        labels: Label of each picture.
        splits: Official split of each picture; an empty string for none.
        tree: Its files below the root, once it is prepared.
        downloads: Files on the server, by name.
        checks: Attributes of torchvision's class with the checksums of these files.
    """

    classes: list[str]
    labels: list[int]
    splits: list[str]
    tree: dict[str, bytes]
    downloads: dict[str, bytes]
    checks: dict[str, object] | None = None

    def numbers(self, *splits: str) -> list[int]:
        """The pictures of some splits."""
        return [number for number, split in enumerate(self.splits) if split in splits]


def _deal(classes: int, **counts: int) -> tuple[list[int], list[str]]:
    """Labels and splits of pictures, from the number of each class in each split; `none` means without split."""
    dealt = [
        (label, split.replace("none", ""))
        for split, count in counts.items()
        for _ in range(count)
        for label in range(classes)
    ]
    return [label for label, _ in dealt], [split for _, split in dealt]


def _shuffled(items: Sequence[int]) -> list[int]:
    return random.Random(len(items)).sample(list(items), len(items))


def _below(folder: str, tree: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in tree.items()}


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _mat(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def _flowers() -> Made:
    labels, splits = _deal(102, train=1, val=1, test=1)
    order = _shuffled(range(len(labels)))  # image ID i + 1 shows picture order[i]
    images = {f"jpg/image_{i:05d}.jpg": jpeg(number) for i, number in enumerate(order, 1)}
    ids = {
        key: np.array([[i for i, number in enumerate(order, 1) if splits[number] == split]], np.uint16)
        for key, split in (("trnid", "train"), ("valid", "val"), ("tstid", "test"))
    }
    lists = {
        "imagelabels.mat": _mat(labels=np.array([[labels[number] + 1 for number in order]], np.uint8)),
        "setid.mat": _mat(**ids),
    }
    checks = {
        "_file_dict": {
            "image": ("102flowers.tgz", "unused"),
            "label": ("imagelabels.mat", md5(lists["imagelabels.mat"])),
            "setid": ("setid.mat", md5(lists["setid.mat"])),
        }
    }
    tree = _below("flowers-102", images | lists)
    downloads = {"102flowers.tgz": archive(images)} | lists
    return Made(list(torchvision.datasets.Flowers102.classes), labels, splits, tree, downloads, checks)


VARIANTS = {  # in the order of variants.txt
    "737-300": ("Boeing 737", "Boeing"),
    "737-400": ("Boeing 737", "Boeing"),
    "747-100": ("Boeing 747", "Boeing"),
    "A310": ("A310", "Airbus"),
    "F/A-18": ("F/A-18", "McDonnell Douglas"),
}


def aircraft_level(level: str) -> tuple[list[str], list[int]]:
    """Class names, and the label of each variant, at a level."""
    names = {
        "variant": list(VARIANTS),
        "family": ["A310", "Boeing 737", "Boeing 747", "F/A-18"],
        "manufacturer": ["Airbus", "Boeing", "McDonnell Douglas"],
    }[level]
    of = [{"variant": v, "family": f, "manufacturer": m}[level] for v, (f, m) in VARIANTS.items()]
    return names, [names.index(name) for name in of]


def _aircraft() -> Made:
    labels, splits = _deal(len(VARIANTS), train=4, val=3, test=2)
    ids = [f"{(number * 7919 + 34309) % 1_000_000:07d}" for number in range(len(labels))]
    tree = {f"data/images/{ids[number]}.jpg": jpeg(number) for number in _shuffled(range(len(labels)))}
    tree["data/images_box.txt"] = _lines([f"{name} 1 1 32 32" for name in ids])
    for level, file in (("variant", "variants"), ("family", "families"), ("manufacturer", "manufacturers")):
        names, label_of = aircraft_level(level)
        tree[f"data/{file}.txt"] = _lines(names)
        for part, members in (
            ("train", ["train"]),
            ("val", ["val"]),
            ("trainval", ["train", "val"]),
            ("test", ["test"]),
        ):
            chosen = [number for number in _shuffled(range(len(labels))) if splits[number] in members]
            rows = [f"{ids[number]} {names[label_of[labels[number]]]}" for number in chosen]
            tree[f"data/images_{level}_{part}.txt"] = _lines(rows)
    tree = _below("fgvc-aircraft-2013b", tree | {"README.md": b"FGVC-Aircraft\n"})
    return Made(list(VARIANTS), labels, splits, tree, {"fgvc-aircraft-2013b.tar.gz": archive(tree)})


def _scenes() -> Made:
    folders = ["airport_inside", "bakery", "tv_studio"]
    labels, splits = _deal(len(folders), train=8, test=2, none=3)
    names = [f"{folders[label]}/{label}int{number * 37 % 101}.jpg" for number, label in enumerate(labels)]
    images = {f"Images/{names[number]}": jpeg(number) for number in _shuffled(range(len(names)))}
    lists = {
        file: "\n".join(names[n] for n in _shuffled(range(len(names))) if splits[n] == split).encode()
        for file, split in (("TrainImages.txt", "train"), ("TestImages.txt", "test"))
    }
    downloads = {"indoorCVPR_09.tar": archive(images, compress=False)} | lists
    classes = ["airport inside", "bakery", "tv studio"]
    return Made(classes, labels, splits, _below("indoor-67", images | lists), downloads)


def _cifar(name: str, fine: bool, batches: Sequence[str], per_class: int, meta: Mapping[str, object]) -> Made:
    classes = list(meta["fine_label_names" if fine else "label_names"])  # type: ignore[call-overload]
    labels, splits = _deal(len(classes), train=per_class * len(batches), test=2)
    train = _shuffled([number for number, split in enumerate(splits) if split == "train"])
    each = len(train) // len(batches)
    parts = {batch: train[i * each : (i + 1) * each] for i, batch in enumerate(batches)}
    test = "test" if fine else "test_batch"
    parts[test] = [number for number, split in enumerate(splits) if split == "test"]
    files: dict[str, bytes] = {}
    for part, numbers in parts.items():
        # one row for each image: all reds, then greens, then blues, each row by row
        content: dict[str, object] = {"data": np.stack([picture(n).transpose(2, 0, 1).ravel() for n in numbers])}
        own = [labels[n] for n in numbers]
        content |= {"fine_labels": own, "coarse_labels": [9 - label for label in own]} if fine else {"labels": own}
        content |= {"batch_label": part, "filenames": [f"{n:06d}.png" for n in numbers]}
        files[part] = pickle.dumps(content, protocol=2)
    key = "meta" if fine else "batches.meta"
    files[key] = pickle.dumps(dict(meta), protocol=2)
    tree = _below(name, files | {"readme.html": b"<html></html>"})
    checks = {
        "train_list": [[batch, md5(files[batch])] for batch in batches],
        "test_list": [[test, md5(files[test])]],
        "meta": {"filename": key, "key": "fine_label_names" if fine else "label_names", "md5": md5(files[key])},
    }
    published = {"cifar-10-batches-py": "cifar-10-python"}.get(name, name)
    return Made(classes, labels, splits, tree, {f"{published}.tar.gz": archive(tree)}, checks)


def _cifar10() -> Made:
    meta = {"label_names": ["airplane", "automobile", "bird"], "num_cases_per_batch": 6, "num_vis": 3072}
    return _cifar("cifar-10-batches-py", False, [f"data_batch_{i}" for i in range(1, 6)], 2, meta)


def _cifar100() -> Made:
    meta = {
        "fine_label_names": ["apple", "aquarium_fish", "baby", "bear"],
        "coarse_label_names": ["fish", "flowers", "fruit_and_vegetables"],
    }
    return _cifar("cifar-100-python", True, ["train"], 8, meta)


def _birds() -> Made:
    folders = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    labels, splits = _deal(len(folders), train=9, test=4)
    names = [
        f"{folders[label]}/{folders[label][4:]}_{number * 31 % 97:04d}_{796000 + number}.jpg"
        for number, label in enumerate(labels)
    ]
    order = sorted(range(len(names)), key=names.__getitem__)  # IDs follow the order of names
    lists = {
        "images.txt": [names[number] for number in order],
        "image_class_labels.txt": [str(labels[number] + 1) for number in order],
        "train_test_split.txt": [str(int(splits[number] == "train")) for number in order],
        "classes.txt": folders,
        "bounding_boxes.txt": ["0.0 0.0 32.0 32.0" for _ in order],
    }
    tree = {f"images/{names[number]}": jpeg(number) for number in order}
    tree |= {file: _lines([f"{i} {line}" for i, line in enumerate(lines, 1)]) for file, lines in lists.items()}
    tree |= {"parts/parts.txt": _lines(["1 back", "2 beak"])}
    tree |= {"attributes/image_attribute_labels.txt": random.Random(0).randbytes(50_000)}  # incompressible
    tree = {"attributes.txt": _lines(["1 has_bill_shape::curved_(up_or_down)"])} | _below("CUB_200_2011", tree)
    classes = ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]
    return Made(classes, labels, splits, tree, {"CUB_200_2011.tgz": archive(tree)})


def _cars() -> Made:
    classes = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]
    labels, splits = _deal(len(classes), train=8, test=3)
    tree: dict[str, bytes] = {}
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for i, number in enumerate(_shuffled([n for n, s in enumerate(splits) if s == split]), 1):
            tree[f"cars_{split}/{i:05d}.jpg"] = jpeg(number)
            rows.append((1, 1, 32, 32, np.uint8(labels[number] + 1), f"{i:05d}.jpg"))
        tree[file] = _mat(annotations=np.array([rows], [(field, object) for field in fields])[0][None])
    tree["devkit/cars_meta.mat"] = _mat(class_names=np.array([classes], object))
    return Made(classes, labels, splits, _below("stanford_cars", tree), {})


SPECIES = [0, 1, 1, 0]  # of the four breeds below: 0 for cats, 1 for dogs


def _pets() -> Made:
    breeds = ["Abyssinian", "american_bulldog", "beagle", "Bengal"]
    labels, splits = _deal(len(breeds), train=8, test=3)
    rows = []
    for number, label in enumerate(labels):
        rows.append(f"{breeds[label]}_{number + 100} {label + 1} {SPECIES[label] + 1} {number % 9 + 1}")
    images = {f"images/{row.split()[0]}.jpg": jpeg(number) for number, row in enumerate(rows)}
    images["images/Abyssinian_100.mat"] = b"MATLAB"  # as in the published archive
    notes = {
        f"annotations/{part}.txt": _lines([row for row, s in zip(rows, splits, strict=True) if s == split])
        for part, split in (("trainval", "train"), ("test", "test"))
    }
    notes["annotations/list.txt"] = _lines(["#Image CLASS-ID SPECIES BREED ID", *rows])
    notes["annotations/trimaps/._Abyssinian_100.png"] = b"\0\5\26\7"
    downloads = {"images.tar.gz": archive(images), "annotations.tar.gz": archive(notes)}
    classes = ["Abyssinian", "American Bulldog", "Beagle", "Bengal"]
    return Made(classes, labels, splits, _below("oxford-iiit-pet", images | notes), downloads)


def _food101() -> Made:
    classes = ["apple_pie", "baby_back_ribs", "baklava"]
    labels, splits = _deal(len(classes), train=9, test=3)
    names = [f"{classes[label]}/{(number + 5) * 1009}" for number, label in enumerate(labels)]
    tree = {f"images/{name}.jpg": jpeg(number) for number, name in enumerate(names)}
    tree["meta/classes.txt"] = _lines(classes)
    for split in ("train", "test"):
        mine = [name for name, given in zip(names, splits, strict=True) if given == split]
        by_class = {c: [name for name in mine if name.startswith(f"{c}/")] for c in reversed(classes)}
        tree[f"meta/{split}.json"] = json.dumps(by_class).encode()
        tree[f"meta/{split}.txt"] = _lines(mine)
    tree = _below("food-101", tree)
    return Made(classes, labels, splits, tree, {"food-101.tar.gz": archive(tree)})


def dtd_split(number: int, partition: int) -> str:
    """The split of a picture in one of DTD's ten partitions."""
    return ("train", "train", "val", "test")[(number // 3 + partition - 1) % 4]


def _dtd() -> Made:
    classes = ["banded", "blotchy", "zigzagged"]
    labels = [number % 3 for number in range(36)]
    names = [f"{classes[label]}/{classes[label]}_{number + 2:04d}.jpg" for number, label in enumerate(labels)]
    tree = {f"images/{name}": jpeg(number) for number, name in enumerate(names)}
    for partition in range(1, 11):
        for split in ("train", "val", "test"):
            mine = [name for number, name in enumerate(names) if dtd_split(number, partition) == split]
            tree[f"labels/{split}{partition}.txt"] = _lines(sorted(mine))
    tree["images/banded/.directory"] = b"[Dolphin]\n"  # as in the published archive
    tree["imdb/imdb.mat"] = b"MATLAB"
    splits = [dtd_split(number, 1) for number in range(len(labels))]
    return Made(classes, labels, splits, _below("dtd/dtd", tree), {"dtd-r1.0.1.tar.gz": archive(_below("dtd", tree))})


def _svhn() -> Made:
    labels, splits = _deal(10, train=8, test=2)
    files = {}
    for split in ("train", "test"):
        numbers = _shuffled([number for number, given in enumerate(splits) if given == split])
        images = np.stack([picture(number) for number in numbers], axis=-1)  # (32, 32, 3, N)
        digits = np.array([[labels[number] or 10] for number in numbers], np.uint8)  # 10 stands for 0
        files[f"{split}_32x32.mat"] = _mat(X=images, y=digits)
    lists = {
        split: [f"http://ufldl.stanford.edu/housenumbers/{file}", file, md5(content)]
        for split, (file, content) in zip(("train", "test"), files.items(), strict=True)
    }
    return Made(list("0123456789"), labels, splits, _below("svhn", files), files, {"split_list": lists})


_MAKERS: dict[str, Callable[[], Made]] = {
    "flowers": _flowers,
    "aircraft": _aircraft,
    "scenes": _scenes,
    "cifar100": _cifar100,
    "cifar10": _cifar10,
    "birds": _birds,
    "cars": _cars,
    "pets": _pets,
    "food101": _food101,
    "dtd": _dtd,
    "svhn": _svhn,
}


@cache
def make(name: str) -> Made:
    """A data set of the catalogue, by its name there."""
    return _MAKERS[name]()
