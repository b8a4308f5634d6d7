"""Splits, and the batches that reach the model."""

import hashlib
import itertools
import json
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler
from torchvision.transforms import v2

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data.batches import TaskSampler, share_of_step
from recast_pl.data.folders import open_folder
from recast_pl.data.tasks import hold_out, split_images
from recast_pl.errors import DataError
from recast_pl.files import sealed_json

SPLITS = ("train", "val", "test")
FOOD_SIZES = {"train": 182, "val": 44, "test": 42}
FOOD = "d6912b7566ee3414313002a8cc411fa7f051b5efdc7f045dbf96ab42539f65ea"


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


def divide(labels, seed=0, given=None, **settings):
    """Splits images with names of their own."""
    names = [f"{label}/{index:04d}.png" for index, label in enumerate(labels)]
    return split_images(labels, given or [""] * len(labels), names, seed, **settings)


@pytest.mark.parametrize("seed", range(20))
def test_splits_are_disjoint_complete_and_hold_every_class(seed):
    splits = divide(LABELS, seed)
    assert list(splits) == list(SPLITS)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(LABELS)))
    assert all(set(LABELS[splits[name]]) == set(LABELS) for name in SPLITS)


def test_splits_have_the_sizes_asked_for_on_average():
    sizes = np.array([[len(split) for split in divide(np.repeat([0, 1], 300), seed).values()] for seed in range(50)])
    assert np.abs(sizes.mean(0) / 600 - [0.7, 0.15, 0.15]).max() < 0.01
    assert np.abs(sizes / 600 - [0.7, 0.15, 0.15]).max() < 0.06


def test_a_split_depends_only_on_the_seed():
    first, again, other = (divide(LABELS, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in SPLITS)
    assert not np.array_equal(first["val"], other["val"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_too_small_to_divide_goes_to_training(count):
    labels = np.repeat([0, 1], [count, 10])
    assert (labels[divide(labels)["train"]] == 0).sum() == count


@pytest.mark.parametrize(("given", "missing"), [(("train", "test"), "val"), (("train", "val"), "test")])
def test_only_the_missing_split_is_taken_from_training(given, missing):
    labels = np.tile(np.repeat([0, 1], 20), 2)
    names = np.repeat(given, 40)
    splits = divide(labels, given=list(names))
    kept = given[1]
    assert splits[kept].tolist() == np.flatnonzero(names == kept).tolist()
    assert np.bincount(labels[splits[missing]]).min() >= 1
    assert 2 <= len(splits[missing]) <= 12  # 15 % of 40 are 6
    assert set(splits[missing]) | set(splits["train"]) == set(np.flatnonzero(names == "train"))


def split_names(folder):
    """The split of each image of a folder, by its name."""
    images = stream(TaskConfig("colours", str(folder)))._images
    return {images.source.names[index]: split for split in SPLITS for index in images.splits[split].tolist()}


def test_the_split_of_an_image_does_not_depend_on_the_other_images(image_folder):
    folder = image_folder("colours", images=60)
    before = split_names(folder)
    for index in range(9):
        write(folder / "class1" / f"0{index}x.png", colour=(index, 0, 0))  # sorted between the others
    write(folder / "another" / "x.png", colour=(0, 0, 9))
    after = split_names(folder)
    assert after.items() > before.items()
    for index in range(0, 60, 3):
        (folder / "class0" / f"{index:03d}.png").unlink()
    assert split_names(folder).items() < after.items()


def test_an_image_added_to_a_tiny_class_moves_at_most_one_other_into_each_split(image_folder):
    folder = image_folder("colours", classes=2, images=3)
    before = split_names(folder)
    for index in range(12):
        write(folder / "class0" / f"{index}x.png", colour=(index, 0, 0))
        after = split_names(folder)
        assert sum(after[name] != split for name, split in before.items()) <= 2
        before = after


def test_a_moved_folder_has_the_same_splits(image_folder, tmp_path):
    folder = image_folder("colours", images=30)
    before = split_names(folder)
    folder.rename(tmp_path / "elsewhere")
    assert split_names(tmp_path / "elsewhere") == before


def test_given_splits_are_kept():
    names = ["train", "val", "test"] * 4
    splits = divide(np.repeat([0, 1], 6), given=names)
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


# images that change


def add(folder):
    for index in range(9):
        write(folder / "class0" / f"new{index}.png", colour=(index, 0, 0))


def replace(folder):
    write(folder / "class1" / "003.png", colour=(0, 0, 0), size=(90, 90))


CHANGES = {
    "added": (add, r"from \d+ to \d+ train images \('class0' from \d+ to \d+\)"),
    "removed": (lambda folder: (folder / "class2" / "001.png").unlink(), r"images \('class2' from \d+ to \d+\)"),
    "replaced": (replace, "as many [a-z]+ images as before, but others"),
    "moved to another class": (
        lambda folder: (folder / "class0" / "004.png").rename(folder / "class1" / "new.png"),
        "'class0' from",
    ),
    "a new class": (lambda folder: shutil.copytree(folder / "class0", folder / "new"), r"'new' from 0 to \d"),
}


@pytest.fixture
def finished(tiny_fit, tmp_path, request):
    """A run of two tasks, of which one is finished, the folder of that task, and the command line that continues it."""
    words = tiny_fit("--trainer.max_epochs", 1)
    assert main([*words, "--only", "first"]) == 0
    return tmp_path / "run", tmp_path / "first", [*words, "--resume", "true"]


@pytest.mark.filterwarnings("ignore:.*equal pixels")
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_whose_images_have_changed_is_neither_resumed_nor_tested(finished, capsys, name):
    run, folder, words = finished
    change, named = CHANGES[name]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(folder)
    for command in (words, ["test", "--run_dir", str(run)], [*words, "--only", "first"]):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(f"the images of task 'first' have changed since it was trained: .*{named}", error)
        assert "restore them, or train in another --run_dir" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    predict = ["predict", "--run_dir", str(run), "--task", "first", "--output", str(run / "labels.csv")]
    assert main([*predict, "--images", str(folder / "class0" / "000.png")]) == 0


def test_a_run_is_resumed_and_tested_after_its_images_have_moved(finished, tmp_path):
    run, folder, words = finished
    shutil.copytree(folder, tmp_path / "copy")  # copies have other times
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert main(words) == 0
    assert json.loads((run / "summary.json").read_text())["forgetting"] == 0
    assert main(["test", "--run_dir", str(run)]) == 0


def edit_record(run, edit):
    """Edits the record of a finished task as an older version would have written it."""
    (path,) = (run / "tasks").glob("*_first.json")
    record = json.loads(path.read_text())
    del record["images"], record["checksum"]
    edit(record)
    path.write_text(sealed_json(record))


def test_a_run_of_an_older_version_with_the_same_split_is_resumed(finished):
    run, _, words = finished
    edit_record(run, lambda record: None)
    assert main(words) == 0


def test_a_run_of_an_older_version_with_another_split_is_tested_but_not_resumed(finished, capsys):
    run, _, words = finished
    edit_record(run, lambda record: record["task"].update(split="0123456789abcdef"))
    with pytest.warns(
        UserWarning, match="task 'first' was trained on another split of its images, by an earlier version"
    ):
        assert main(["test", "--run_dir", str(run)]) == 0
    capsys.readouterr()
    assert main(words) == 2
    assert "task 'first' was trained on another split" in capsys.readouterr().err


@pytest.mark.parametrize("change", [add, replace])
def test_training_does_not_continue_on_changed_images(tiny_fit, tmp_path, capsys, change):
    poison = [{"class_path": "crash_callbacks.Poison", "init_args": {"task": "first", "epoch": 1}}]
    assert main(tiny_fit("--trainer.callbacks", json.dumps(poison))) == 2
    assert (tmp_path / "run" / "checkpoints" / "00_first" / "last.ckpt").exists()
    change(tmp_path / "first")
    capsys.readouterr()
    assert main(tiny_fit("--resume", "true")) == 2
    error = capsys.readouterr().err
    assert "the images of task 'first' have changed since its training was interrupted: " in error
    assert error.count("\n") == 1


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


AUGMENT = (v2.RandomResizedCrop(16, (0.2, 1)), v2.RandAugment())


def test_each_image_of_a_batch_gets_a_crop_and_an_augmentation_of_its_own(tmp_path):
    # all images are equal, so they differ after the transforms only if each has random numbers of its own
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for label, index in itertools.product("ab", range(12)):
        write(tmp_path / "equal" / label / f"{index}.png")
        picture.save(tmp_path / "equal" / label / f"{index}.png")
    for transform in AUGMENT:
        data = stream(TaskConfig("equal", str(tmp_path / "equal"), flip=False), transforms=[transform], batch_size=16)
        epochs = [epoch_of(data, epoch)[0] for epoch in (0, 1, 0)]
        distinct = [len(torch.unique(images.flatten(1), dim=0)) for images in epochs]
        assert min(distinct) > 0.6 * len(epochs[0])  # some operations of RandAugment change nothing
        assert torch.equal(epochs[0], epochs[2])
        assert not torch.equal(epochs[0], epochs[1])


def test_tasks_without_transforms_have_those_of_the_stream(image_folder):
    folder, own, none = str(image_folder("colours")), (v2.ColorJitter(0.4),), (v2.Identity(),)
    tasks = TaskConfig("a", folder), TaskConfig("b", folder, transforms=own), TaskConfig("c", folder, transforms=none)
    data = stream(*tasks, transforms=AUGMENT)
    assert [task.transforms for task in data.tasks] == [AUGMENT, own, none]
    alone = stream(TaskConfig("a", folder, transforms=AUGMENT))
    assert torch.equal(epoch_of(data)[0], epoch_of(alone)[0])
    plain = stream(TaskConfig("a", folder))
    assert not torch.equal(epoch_of(data)[0], epoch_of(plain)[0])
    data.select(2)
    plain.tasks[0] = TaskConfig("c", folder)
    assert torch.equal(epoch_of(data)[0], epoch_of(plain)[0])


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


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("together", [12, 24, 36])
def test_a_step_of_all_processes_holds_the_images_of_one_process(image_folder, replicas, together):
    size = together // replicas
    dataset = stream(TaskConfig("colours", str(image_folder("colours", images=17)))).plain_dataloader("train").dataset
    count = len(dataset)
    whole = TaskSampler(dataset, 1, 0, shuffle=True, seed=1, batch_size=together)
    samplers = [TaskSampler(dataset, replicas, rank, shuffle=True, seed=1, batch_size=size) for rank in range(replicas)]
    for sampler in [whole, *samplers]:
        sampler.set_epoch(5)
    keys = list(whole)
    assert sorted(keys) == [(5, position) for position in range(count)]
    loaders = [list(BatchSampler(sampler, size, drop_last=False)) for sampler in samplers]
    for step, batches in enumerate(zip(*loaders, strict=True)):  # all processes make the same steps
        weights = Counter()
        for rank, batch in enumerate(batches):
            for key in batch:
                weights[key] += share_of_step(count, size, replicas, rank, step) / len(batch) / replicas
        expected = keys[step * together : (step + 1) * together]
        assert {key for key, weight in weights.items() if weight} == set(expected)
        assert [weights[key] for key in expected] == pytest.approx([1 / len(expected)] * len(expected))


# plain images


@pytest.mark.parametrize("transforms", [(), (v2.ColorJitter(0.9),)])
def test_images_before_augmentation_stay_available(image_folder, transforms):
    data = stream(TaskConfig("colours", str(image_folder("colours", images=20)), transforms=transforms), image_size=24)
    loader = data.train_dataloader()
    positions = [position for _, position in loader.sampler]
    plain, augmented = [], []
    for batch in loader:
        augmented.append(data.on_after_batch_transfer(batch, 0)[0])
        plain.append(data.plain_images)
    dataset = data.plain_dataloader("train").dataset
    wanted = dataset.__getitems__([(0, position) for position in positions])
    wanted, _ = data.on_after_batch_transfer(wanted, 0)
    assert torch.equal(torch.cat(plain), wanted)
    assert not torch.equal(torch.cat(augmented), wanted)


def test_images_are_augmented_as_their_tasks_ask(image_folder):
    folder = str(image_folder("colours"))
    dark = v2.Lambda(lambda image: image // 2)
    data = stream(
        TaskConfig("a", folder), TaskConfig("b", folder, flip=False), TaskConfig("c", folder, transforms=[dark])
    )
    images = torch.randint(0, 256, (90, 3, 4, 4), dtype=torch.uint8)
    tasks = torch.arange(90) % 3
    torch.manual_seed(3)
    first = data.augment(images, tasks)
    assert (first.dtype, first.shape) == (images.dtype, images.shape)
    assert torch.equal(first[1::3], images[1::3])
    for task, wanted in ((0, images[0::3]), (2, images[2::3] // 2)):
        mirrored = (first[task::3] == wanted.flip(-1)).flatten(1).all(1)
        kept = (first[task::3] == wanted).flatten(1).all(1)
        assert (mirrored ^ kept).all()
        assert 5 < mirrored.sum() < 25
    torch.manual_seed(3)
    assert torch.equal(data.augment(images, tasks), first)


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
        ([TaskConfig("x" * 201)], "at most 200 bytes"),
    ],
)
def test_a_stream_that_cannot_be_trained_names_the_task(tasks, named):
    with pytest.raises(DataError, match=re.escape(named)):
        SequentialTaskDataModule(tasks).check()


@pytest.mark.parametrize("name", ["batch_size", "image_size", "max_pixels"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(DataError, match=f"data.{name}={value}"):
        SequentialTaskDataModule(**{name: value})


def test_an_image_size_that_a_patch_may_not_have_is_refused():
    with pytest.raises(DataError, match=r"data.image_size=3000 must be 1 to 2048 pixels"):
        SequentialTaskDataModule(image_size=3000)


def test_a_class_name_that_a_patch_may_not_have_is_refused(image_folder, tmp_path):
    path = image_folder("colours")
    (path / "class0").rename(path / "two\nlines")
    with pytest.raises(DataError, match=r"class 'two\\nlines' of .*control characters; rename the class"):
        stream(TaskConfig("colours", str(path))).check()


def test_names_that_differ_only_in_case_are_the_same():
    with pytest.raises(DataError, match="listed twice"):
        SequentialTaskDataModule([TaskConfig("digits"), TaskConfig("Digits")]).check()


def test_a_task_can_use_some_of_its_images(image_folder):
    folder = str(image_folder("first", 3, 40))

    def data(images, **more):
        return SequentialTaskDataModule((TaskConfig("first", folder, images=images),), 32, **more)

    some = data(60)
    assert sum(some.sizes.values()) == 60
    assert all(some.sizes.values())
    assert sum(data(None).sizes.values()) == sum(data(500).sizes.values()) == 120
    assert data(60).split_digest == some.split_digest != data(60, seed=1).split_digest
    with pytest.raises(DataError, match=r"tasks\.first\.images=0 must be at least 1"):
        data(0)
    sizes = data(None).sizes
    assert data({"train": 30, "test": 5}).sizes == {"train": 30, "val": sizes["val"], "test": 5}
    assert data({"train": 30, "test": 500}).sizes == {**sizes, "train": 30}
    with pytest.raises(DataError, match=r"tasks\.first\.images\.val=0 must be at least 1"):
        data({"train": 30, "val": 0})
    with pytest.raises(DataError, match=r"tasks\.first\.images has 'tests'; give it train, val, test, or one number"):
        data({"tests": 30})
    for path in sorted(Path(folder, "class0").iterdir())[1:]:
        path.unlink()

    def with_many_seeds():  # with most, the only image of this class is not among the 30 of 81
        return [data(30, seed=seed).sizes for seed in range(100)]

    with pytest.raises(DataError, match="no training image of class 'class0' among its 30 images; use more"):
        with_many_seeds()


# another source of images than in training


@pytest.mark.parametrize(
    ("given", "wanted"),
    [  # images 0 to 3 have names that match, 4 to 7 do not
        (["", "", "", "", "", "", "", ""], "test test test test train train train train"),
        (["train", "val", "test", "test", "train", "val", "test", "train"], "- - test test train val - train"),
        (["train", "val", "train", "val", "train", "val", "val", "train"], "test test test test train val val train"),
    ],
)
def test_held_out_images_are_tested_and_never_trained_on(given, wanted):
    names = [f"cats/{index}_{'scan' if index < 4 else 'photo'}.png" for index in range(8)]
    assert hold_out(given, names, "*_scan.*") == [split.replace("-", "") for split in wanted.split()]


def makers(image_folder, name, *args, **settings):
    """A task whose images are, in turn, of three makers, which end the names of their files."""
    folder = image_folder(name, *args, **settings)
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_stem(f"{path.stem}_{'abc'[int(path.stem) % 3]}"))
    return folder


def test_a_run_trains_on_other_makers_than_it_tests(image_folder, tiny_fit, tmp_path):
    folder = makers(image_folder, "made", classes=2, images=12)
    tasks = json.dumps([{"name": "made", "path": str(folder)}])
    run = tmp_path / "run"
    words = tiny_fit("--data.tasks", tasks, "--data.held_out", "*_b.*", "--trainer.max_epochs", 1, run_dir=run)
    assert main(words) == 0
    result = json.loads((run / "summary.json").read_text())["tasks"][0]
    data = SequentialTaskDataModule((TaskConfig("made", str(folder)),), 32, held_out="*_b.*")
    assert (result["train_images"], result["test_images"]) == (data.sizes["train"], 8)
    assert data.sizes["train"] + data.sizes["val"] == 16
    source, splits = data._images.source, data._images.splits
    for split, wanted in (("train", "ac"), ("val", "ac"), ("test", "b")):
        assert {Path(source.names[index]).stem[-1] for index in splits[split]} <= set(wanted)


@pytest.mark.parametrize(("pattern", "count"), [("*_d.*", "none of 24 images"), ("*", "all of 24 images")])
def test_a_pattern_that_holds_out_nothing_or_everything_is_refused(pattern, count, image_folder, tiny_fit, capsys):
    folder = makers(image_folder, "made", classes=2, images=12)
    tasks = json.dumps([{"name": "made", "path": str(folder)}])
    assert main(tiny_fit("--data.tasks", tasks, "--data.held_out", pattern)) == 2
    error = capsys.readouterr().err
    assert f"task 'made': held_out={pattern!r} matches {count}, such as class0/000_a.png" in error


def test_a_class_that_only_held_out_images_have_is_named(image_folder):
    folder = makers(image_folder, "made", classes=2, images=12)
    for path in folder.glob("class0/*_[ac].png"):
        path.unlink()
    with pytest.raises(DataError, match="no training image of class 'class0'"):
        _ = SequentialTaskDataModule((TaskConfig("made", str(folder)),), 32, held_out="*_b.*").sizes
