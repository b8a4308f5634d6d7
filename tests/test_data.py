"""Splits, folders, decoding, and the batches that reach the model."""

import hashlib
import itertools
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.data.batches import TaskSampler
from recast_pl.data.datasets import open_folder
from recast_pl.data.images import decode_file
from recast_pl.data.tasks import split_images
from recast_pl.errors import DataError

SPLITS = ("train", "val", "test")
FOOD_SIZES = {"train": 190, "val": 39, "test": 39}
FOOD = "9ce7fc6c898328447153cc9d9bf4480b103ca76de5b30310147565e543daf033"


def stream(*tasks, **settings):
    data = SequentialTaskDataModule(tasks, **{"image_size": 16, "batch_size": 4} | settings)
    data.setup("fit")
    return data


def epoch_of(data, epoch=0):
    """Images, labels and flips of all batches of a training epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def write(path, colour=(200, 30, 90), size=(20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


# splits


LABELS = np.repeat(np.arange(5), [3, 7, 40, 111, 20])


def test_splits_are_disjoint_complete_and_stratified():
    splits = split_images(LABELS, [""] * len(LABELS), 42)
    assert list(splits) == list(SPLITS)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(LABELS)))
    for label, count in enumerate(np.bincount(LABELS)):
        for held_out in ("val", "test"):
            share = (LABELS[splits[held_out]] == label).sum()
            assert abs(share - 0.15 * count) <= 1
            assert share >= 1
        assert (LABELS[splits["train"]] == label).sum() >= 1


def test_a_split_depends_only_on_the_seed():
    first, again, other = (split_images(LABELS, [""] * len(LABELS), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in SPLITS)
    assert not np.array_equal(first["val"], other["val"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_too_small_to_divide_goes_to_training(count):
    labels = np.repeat([0, 1], [count, 10])
    splits = split_images(labels, [""] * len(labels), 0)
    assert (labels[splits["train"]] == 0).sum() == count


@pytest.mark.parametrize(("given", "missing"), [(("train", "test"), "val"), (("train", "val"), "test")])
def test_only_the_missing_split_is_taken_from_training(given, missing):
    labels = np.tile(np.repeat([0, 1], 20), 2)
    names = np.repeat(given, 40)
    splits = split_images(labels, list(names), 0)
    kept = given[1]
    assert splits[kept].tolist() == np.flatnonzero(names == kept).tolist()
    assert np.bincount(labels[splits[missing]]).tolist() == [3, 3]  # 15 % of 20
    assert set(splits[missing]) | set(splits["train"]) == set(np.flatnonzero(names == "train"))


def test_given_splits_are_kept():
    names = ["train", "val", "test"] * 4
    splits = split_images(np.repeat([0, 1], 6), names, 0)
    assert {name: splits[name].tolist() for name in SPLITS} == {n: list(range(i, 12, 3)) for i, n in enumerate(SPLITS)}


def test_the_split_of_real_images_is_the_same_on_every_machine():
    data = SequentialTaskDataModule([TaskConfig("food", "data/clipart/food")], seed=42)
    assert data.classes == ["beverages", "breads", "desserts", "fruit", "meats_and_eggs"]
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(",".join(map(str, data.plain_dataloader(split).dataset.indices)).encode() + b";")
    assert data.sizes == FOOD_SIZES
    assert digest.hexdigest() == FOOD


def test_the_order_in_which_the_system_lists_files_does_not_matter(image_folder, monkeypatch):
    folder = image_folder("colours")
    before = open_folder(folder)
    pixels = [before.images.decode(index, 8) for index in range(len(before.labels))]
    for method in ("iterdir", "rglob"):
        listing = getattr(Path, method)
        monkeypatch.setattr(Path, method, lambda *args, listing=listing: reversed(list(listing(*args))))
    after = open_folder(folder)
    assert after.classes == before.classes
    assert after.labels.tolist() == before.labels.tolist()
    assert all(torch.equal(after.images.decode(index, 8), image) for index, image in enumerate(pixels))


# folders


def test_a_folder_of_classes(image_folder):
    source = open_folder(image_folder("colours", classes=3, images=4))
    assert source.classes == ["class0", "class1", "class2"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert set(source.splits) == {""}


def test_a_folder_of_splits_of_classes(image_folder):
    folders = [image_folder(f"given/{split}", images=i + 1, seed=i) for i, split in enumerate(SPLITS)]
    data = stream(TaskConfig("given", str(folders[0].parent)))
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
        (lambda folder: [c.rename(folder.parent / c.name) for c in list(folder.iterdir())], "has 0 class folders"),
        (lambda folder: (folder / "class0").rename(folder.parent / "class0"), "has 1 class folders"),
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
        stream(TaskConfig("spoilt", str(folder)))
    assert str(folder) in str(error.value)


def test_a_class_without_training_images_is_named(image_folder):
    folder = image_folder("given/train", classes=2)
    write(folder.parent / "test" / "novel" / "0.png")
    with pytest.raises(DataError, match="novel"):
        open_folder(folder.parent)


def test_a_task_too_small_for_three_splits_is_named(image_folder):
    with pytest.raises(DataError, match=r"'scarce' has no val image"):
        stream(TaskConfig("scarce", str(image_folder("scarce", images=2))))


# decoding


@pytest.mark.parametrize(
    ("mode", "pixel", "suffix"),
    [
        ("RGB", (200, 30, 90), "png"),
        ("RGBA", (200, 30, 90, 255), "png"),
        ("L", 120, "png"),
        ("LA", (120, 255), "png"),
        ("1", 255, "png"),
        ("L", 120, "tif"),
        ("RGB", (200, 30, 90), "bmp"),
        ("I;16", 120 * 257, "png"),
    ],
)
def test_images_of_every_mode_become_rgb(tmp_path, mode, pixel, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (12, 8), pixel).save(path)
    image = decode_file(path, 6)
    assert image.dtype == torch.uint8
    grey = 255 if mode == "1" else 120
    wanted = torch.tensor([200, 30, 90] if mode.startswith("RGB") else [grey] * 3)
    assert torch.equal(image.long(), wanted[:, None, None].expand(3, 6, 6))


def test_cmyk_and_palette_images_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")
    cyan = decode_file(tmp_path / "cyan.jpg", 4)
    assert cyan[0].max() < 20
    assert cyan[1:].min() > 235
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 30, 90])
    palette.save(tmp_path / "palette.gif")
    assert decode_file(tmp_path / "palette.gif", 4)[:, 0, 0].tolist() == [200, 30, 90]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    upright = np.zeros((8, 8, 3), np.uint8)  # asymmetric: a bright corner, and a darker one to its right
    upright[:4, :4], upright[:4, 4:] = 255, 100
    # how a camera stores it: the EXIF standard defines row 0 and column 0 for each orientation
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(decode_file(tmp_path / "image.png", 8).permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_is_cropped_after_the_shorter_side_is_resized(tmp_path, wide):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2).copy()).save(tmp_path / "image.png")
    assert (decode_file(tmp_path / "image.png", 8) == 255).all()
    assert (decode_file(tmp_path / "image.png", 4)[:, :, 1:3] > 200).all()


# batches


def test_batches_reach_the_model_as_numbers_from_0_to_1(image_folder):
    data = stream(TaskConfig("colours", str(image_folder("colours"))))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            raw, labels, flip = batch
            images, same = data.on_after_batch_transfer(batch, 0)
            assert (images.dtype, images.shape) == (torch.float32, (len(labels), 3, 16, 16))
            assert same is labels
            wanted = raw.numpy().astype(np.float64)
            wanted[flip.numpy()] = wanted[flip.numpy()][..., ::-1]
            assert np.abs(images.numpy() * 255.0 - wanted).max() < 1e-4  # a pixel in the wrong place would be off by 1


def test_digits_keep_their_own_size_until_they_are_on_the_device():
    data = stream(TaskConfig("digits", flip=False), image_size=32)
    batch = next(iter(data.plain_dataloader("val")))
    assert (batch[0].dtype, batch[0].shape) == (torch.uint8, (4, 3, 8, 8))
    bunch = load_digits()
    first = data.plain_dataloader("val").dataset.indices[:4]
    wanted = np.round(bunch.images[first] * (255 / 16))
    assert np.array_equal(batch[0].numpy(), np.repeat(wanted[:, None], 3, axis=1))
    assert batch[1].tolist() == bunch.target[first].tolist()
    images, _ = data.on_after_batch_transfer(batch, 0)
    assert images.shape == (4, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    # linear interpolation keeps the mean, except at the border
    assert float((images.mean() - batch[0].float().mean() / 255).abs()) < 0.02


def test_an_epoch_depends_only_on_seed_task_and_epoch(image_folder):
    folder = str(image_folder("colours", images=30))
    wanted = epoch_of(stream(TaskConfig("colours", folder)), 3)
    data = stream(TaskConfig("other", folder), TaskConfig("colours", folder))
    data.select(1)
    torch.rand(7)
    epoch_of(data, 0)  # earlier epochs, other tasks and the batch size change nothing
    data.batch_size = 7
    assert all(torch.equal(a, b) for a, b in zip(epoch_of(data, 3), wanted, strict=True))


@pytest.mark.parametrize("change", ["epoch", "seed", "task"])
def test_order_and_flips_change_with(image_folder, change):
    folder = image_folder("colours", images=30)
    for split in ("val", "test"):  # with given splits, the seed decides only the order
        image_folder(f"given/{split}", images=3, seed=1)
    folder.rename(folder.parent / "given" / "train")
    task = TaskConfig("colours", str(folder.parent / "given"))
    images, _, flips = epoch_of(stream(task))
    other = {
        "epoch": lambda: epoch_of(stream(task), 1),
        "seed": lambda: epoch_of(stream(task, seed=1)),
        "task": lambda: epoch_of(stream(TaskConfig("paints", task.path))),
    }[change]()
    assert not torch.equal(images, other[0])
    assert not torch.equal(flips, other[2])
    rows, others = (sorted(map(bytes, t.flatten(1).numpy())) for t in (images, other[0]))
    assert rows == others  # every image once


def test_half_of_the_training_images_are_mirrored_and_nothing_else(image_folder):
    data = stream(TaskConfig("colours", str(image_folder("colours", images=60))))
    _, labels, flips = epoch_of(data)
    assert 0.35 < flips.float().mean() < 0.65
    assert len(set(labels[:40].tolist())) == 3  # shuffled
    loaders = [data.val_dataloader(), data.test_dataloader(), *map(data.plain_dataloader, SPLITS)]
    assert not any(flip.any() for loader in loaders for _, _, flip in loader)


def test_flip_false_mirrors_nothing(image_folder):
    data = stream(TaskConfig("colours", str(image_folder("colours", images=30)), flip=False))
    assert not any(epoch_of(data, epoch)[2].any() for epoch in range(3))


def test_transforms_are_seeded_by_image_and_epoch(image_folder):
    transforms = [v2.RandomAffine(30, translate=(0.2, 0.2)), v2.ColorJitter(0.4)]
    folder = str(image_folder("colours"))
    data = stream(TaskConfig("colours", folder, transforms=transforms))
    torch.manual_seed(0)
    first, state = epoch_of(data), torch.get_rng_state()
    torch.manual_seed(0)
    plain = epoch_of(stream(TaskConfig("colours", folder)))
    assert torch.equal(torch.get_rng_state(), state)  # the random state that dropout uses is unchanged
    assert torch.equal(first[1], plain[1])
    assert not torch.equal(first[0], plain[0])
    torch.manual_seed(9)
    assert torch.equal(epoch_of(data)[0], first[0])
    for count in (1, 2):
        data.num_workers = count
        assert torch.equal(epoch_of(data)[0], first[0])


def test_transforms_differ_between_epochs_and_skip_evaluation(image_folder):
    folder = str(image_folder("colours"))
    data = stream(TaskConfig("colours", folder, flip=False, transforms=[v2.ColorJitter(0.9)]))
    means = [sorted(epoch_of(data, epoch)[0].float().mean((1, 2, 3)).tolist()) for epoch in (0, 1)]
    assert means[0] != means[1]
    plain = stream(TaskConfig("colours", folder))
    for split in SPLITS:
        for ours, theirs in zip(data.plain_dataloader(split), plain.plain_dataloader(split), strict=True):
            assert torch.equal(ours[0], theirs[0])


def test_a_data_set_can_be_sent_to_workers(image_folder):
    data = stream(TaskConfig("colours", str(image_folder("colours"))))
    dataset = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
    assert len(dataset) == data.sizes["train"]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shares_of_evaluation_cover_every_image_once(image_folder, replicas):
    dataset = stream(TaskConfig("colours", str(image_folder("colours", images=17)))).plain_dataloader("train").dataset
    samplers = [TaskSampler(dataset, replicas, rank, shuffle=False) for rank in range(replicas)]
    shares = [[position for _, position in sampler] for sampler in samplers]
    assert sorted(itertools.chain(*shares)) == list(range(len(dataset)))
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_shares_of_training_have_equal_length_and_cover_every_image(image_folder, replicas):
    dataset = stream(TaskConfig("colours", str(image_folder("colours", images=17)))).plain_dataloader("train").dataset
    samplers = [TaskSampler(dataset, replicas, rank, shuffle=True, seed=1) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(5)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {-(-len(dataset) // replicas)}
    assert {key for share in shares for key in share} == {(5, position) for position in range(len(dataset))}


# the stream


def test_selecting_changes_the_current_task(image_folder):
    tasks = [TaskConfig(name, str(image_folder(name, classes))) for name, classes in (("a", 2), ("b", 3))]
    data = stream(*tasks)
    assert (data.task_name, len(data.classes)) == ("a", 2)
    data.select(1)
    assert (data.task_name, len(data.classes)) == ("b", 3)
    assert epoch_of(data)[1].max() == 2
    data.select(2)
    with pytest.raises(DataError, match="task 2 was selected"):
        _ = data.task_name


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ([], "data.tasks is empty"),
        ([TaskConfig("digits"), TaskConfig("digits")], "'digits' is listed twice"),
        ([TaskConfig("digist")], "'digist'; known by name: flowers"),
        *(([TaskConfig(name)], repr(name)) for name in ("", "../up", "a/b", ".hidden", "new\nline")),
    ],
)
def test_a_stream_that_cannot_be_trained_names_the_task(tasks, named):
    with pytest.raises(DataError, match=re.escape(named)):
        SequentialTaskDataModule(tasks).check()


@pytest.mark.parametrize("name", ["batch_size", "image_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(DataError, match=f"data.{name}={value}"):
        SequentialTaskDataModule(**{name: value})


def test_names_that_differ_only_in_case_are_the_same():
    with pytest.raises(DataError, match="listed twice"):
        SequentialTaskDataModule([TaskConfig("digits"), TaskConfig("Digits")]).check()
