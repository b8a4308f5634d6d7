"""Images are decoded once, in every mode of the cache, and bad images are found before training."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from recast_pl import SequentialTaskDataModule, TaskConfig
from recast_pl.cli import main
from recast_pl.data import images as images_module
from recast_pl.errors import DataError

MODES = ("disk", "ram", "off")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("RECAST_PL_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def decoded(monkeypatch):
    """The names of files decoded so far."""
    names, decode = [], images_module.decode_file

    def counting(path, *settings):
        names.append(path.name)
        return decode(path, *settings)

    monkeypatch.setattr(images_module, "decode_file", counting)
    return names


def stream(folder, name="colours", **settings):
    task = TaskConfig(name, str(folder))
    data = SequentialTaskDataModule((task,), **{"image_size": 16, "batch_size": 4, "num_workers": 0} | settings)
    data.prepare_data()
    return data


def everything(data):
    return [torch.cat([batch[0] for batch in data.plain_dataloader(split)]) for split in ("train", "val", "test")]


def entries(root):
    return sorted(path.name for path in (root / "cache").iterdir() if not path.name.endswith(".lock"))


# where images are kept


def test_images_are_the_same_wherever_they_are_kept(image_folder, root):
    folder = image_folder("colours")
    disk, ram, off = (everything(stream(folder, cache=mode)) for mode in MODES)
    for a, b, c in zip(disk, ram, off, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("mode", MODES)
def test_how_often_an_image_is_decoded(image_folder, root, decoded, mode):
    folder = image_folder("colours")
    data = stream(folder, cache=mode)
    assert len(decoded) == 24
    for _ in range(2):
        everything(data)
    everything(stream(folder, cache=mode))
    # off: once to find bad images, which the second run reads from the cache, then at each of three readings
    assert len(decoded) == {"disk": 24, "ram": 48, "off": 24 * 4}[mode]
    assert len(entries(root)) == (0 if mode == "ram" else 1) if (root / "cache").exists() else mode == "ram"


def test_another_size_is_another_entry_and_the_first_stays(image_folder, root, decoded):
    folder = image_folder("colours")
    for size in (16, 24, 16, 24):
        assert everything(stream(folder, image_size=size))[0].shape[1:] == (3, size, size)
    assert len(decoded) == 48
    assert len(entries(root)) == 2


def changed(folder):
    (folder / "class0" / "000.png").write_bytes((folder / "class1" / "000.png").read_bytes())


def changed_keeping_size_and_time(folder):
    path, other = folder / "class0" / "000.png", folder / "class1" / "000.png"
    before, content = path.stat(), bytearray(path.read_bytes())
    Image.open(other).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: before.st_size] + b"\0" * max(0, before.st_size - len(content)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def added(folder):
    (folder / "class0" / "100.png").write_bytes((folder / "class1" / "000.png").read_bytes())


def removed(folder):
    (folder / "class0" / "007.png").unlink()


@pytest.mark.parametrize("change", [changed, changed_keeping_size_and_time, added, removed])
def test_a_changed_source_is_decoded_again_and_replaces_the_old_entry(image_folder, root, change):
    folder = image_folder("colours")
    before = everything(stream(folder))
    time.sleep(0.02)  # file systems store times in steps
    change(folder)
    after = everything(stream(folder))
    fresh = everything(stream(folder, cache="ram"))
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(entries(root)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / "images.npy", 1000),
        lambda entry: os.truncate(entry / "images.npy", 0),
        lambda entry: (entry / "images.npy").unlink(),
        lambda entry: (entry / "index.json").write_text("{"),
        lambda entry: (entry / "index.json").write_text('{"bad": {}}'),
        lambda entry: (entry / "index.json").write_text("[]"),
        lambda entry: (entry / "index.json").unlink(),
    ],
)
def test_a_damaged_entry_is_built_again(image_folder, root, decoded, damage):
    folder = image_folder("colours")
    before = everything(stream(folder))
    damage(root / "cache" / entries(root)[0])
    assert all(torch.equal(a, b) for a, b in zip(everything(stream(folder)), before, strict=True))
    assert len(decoded) == 48


def test_folders_of_the_same_name_do_not_share_an_entry(image_folder, root):
    first, second = image_folder("a/colours", seed=0), image_folder("b/colours", seed=1)
    assert not torch.equal(everything(stream(first))[0], everything(stream(second))[0])
    assert len(entries(root)) == 2


def test_two_tasks_on_one_folder_share_its_entry(image_folder, root, decoded):
    folder = image_folder("colours")
    stream(folder, "one")
    stream(folder, "two")
    assert len(decoded) == 24


def prepare_slowly(folder, fatal, barrier, counts):
    """Runs in its own process: counts the images it decodes, and kills itself at image number `fatal`."""
    count, decode = 0, images_module.decode_file

    def slow(path, *settings):
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return decode(path, *settings)

    images_module.decode_file = slow
    barrier.wait()
    SequentialTaskDataModule((TaskConfig("colours", str(folder)),), 16).prepare_data()
    counts.put(count)


def start(folder, fatal, barrier, counts):
    process = multiprocessing.get_context("fork").Process(target=prepare_slowly, args=(folder, fatal, barrier, counts))
    process.start()
    return process


def test_only_one_of_two_processes_decodes(image_folder, root, capfd):
    folder = image_folder("colours", images=20)
    barrier, counts = multiprocessing.Barrier(2), multiprocessing.Queue()
    processes = [start(folder, None, barrier, counts) for _ in range(2)]
    assert sorted(counts.get(timeout=300) for _ in processes) == [0, 60]
    for process in processes:
        process.join()
    assert capfd.readouterr().err.count("waiting for another process") == 1


def test_a_process_killed_while_it_decodes_leaves_no_complete_entry(image_folder, root, decoded):
    folder = image_folder("colours")
    process = start(folder, 10, multiprocessing.Barrier(1), None)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert all(name.endswith(".part") for name in entries(root))
    everything(stream(folder))
    assert len(decoded) == 24
    assert len(entries(root)) == 1
    assert not entries(root)[0].endswith(".part")


def test_a_full_disk_is_an_error_that_says_what_to_do(image_folder, root):
    folder = image_folder("colours")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the largest size of a file
    try:
        with pytest.raises(DataError, match=r"cannot write decoded images to .*cache.*data\.root.*data\.cache to ram"):
            stream(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(root) == []
    stream(folder)


def test_a_root_that_cannot_be_written_is_an_error_and_ram_avoids_it(image_folder, tmp_path):
    folder = image_folder("colours")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.root"):
        stream(folder, root=str(tmp_path / "file"))
    everything(stream(folder, root=str(tmp_path / "file"), cache="ram"))


def test_workers_receive_the_path_of_mapped_images(image_folder, root):
    data = stream(image_folder("colours", images=40), image_size=64)
    dataset = data.train_dataloader().dataset
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).pixels[torch.arange(3)], dataset.pixels[torch.arange(3)])


def test_workers_are_used_only_to_decode_and_transform(image_folder, root):
    folder = str(image_folder("colours"))
    plain, shaken = TaskConfig("plain", folder), TaskConfig("shaken", folder, transforms=[v2.ColorJitter(0.4)])
    for task, mode, training, evaluating in (
        (plain, "disk", 0, 0),
        (plain, "ram", 0, 0),
        (plain, "off", 3, 3),
        (shaken, "disk", 3, 0),
    ):
        data = SequentialTaskDataModule((task,), 16, num_workers=3, cache=mode)
        assert (data.train_dataloader().num_workers, data.val_dataloader().num_workers) == (training, evaluating)
        assert data.train_dataloader().persistent_workers == (training > 0)


def test_memory_does_not_grow_with_epochs(image_folder, root):
    data = stream(image_folder("colours", images=60), image_size=96, batch_size=32)

    def anonymous():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    for _ in range(20):
        everything(data)
    before = anonymous()
    for _ in range(100):
        everything(data)
    assert anonymous() - before < 5  # MB; the images have 5 MB


# images that cannot be read


def spoil(folder):
    """Writes every kind of unreadable file into a folder of classes; returns their names."""
    place = folder / "class0"
    whole = (place / "000.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "whole.jpeg")
    (place / "truncated.jpg").write_bytes((place / "whole.jpeg").read_bytes()[:1500])
    (place / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (place / "empty.png").touch()
    (place / "text.jpg").write_text("<html>404 Not Found</html>")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30000).to_bytes(4) + (20000).to_bytes(4) + b"\x08\x02\0\0\0"
    (place / "600 megapixels.png").write_bytes(
        header + zlib.crc32(header[12:]).to_bytes(4) + b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4)
    )
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(place / "float.tif")
    (place / "dangling.png").symlink_to(place / "nowhere.png")
    (place / "folder.png").mkdir()  # not a file, so that it does not count
    return sorted(["truncated.jpg", "truncated.png", "empty.png", "text.jpg", "600 megapixels.png", "float.tif"])


def handled(folder):
    """Writes unusual but readable images into a folder of classes; returns their number."""
    place = folder / "class1"
    rgb = Image.fromarray(np.full((20, 30, 3), (200, 30, 90), np.uint8))
    rgb.convert("CMYK").save(place / "cmyk.jpg")
    rgb.convert("P").save(place / "palette.png")
    rgb.convert("L").save(place / "grey.jpg")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(place / "sixteen bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(place / "turned.jpg", exif=exif)
    for name in ("été 日本 🌸.png", " blank .png", "new\nline.png", "a'b\"c.png", "[brackets].png"):
        rgb.save(place / name)
    return 10


@pytest.mark.parametrize("mode", MODES)
def test_unusual_images_are_read_and_unreadable_ones_are_named(image_folder, root, mode):
    folder = image_folder("colours", classes=2, images=10)
    good = handled(folder)
    assert sum(stream(folder, cache=mode).sizes.values()) == 20 + good
    names = spoil(folder)
    (folder / "class0" / "dangling.png").unlink()
    with pytest.raises(DataError) as error:
        stream(folder, cache=mode)
    message = str(error.value)
    assert f"{len(names)} of {21 + good + len(names)} images of 'colours' cannot be used" in message
    assert all(f"/{name}'" in message for name in names)
    assert "--data.on_bad_image skip" in message
    with pytest.warns(UserWarning, match=f"{len(names)} of .*they are skipped") as warned:
        data = stream(folder, cache=mode, on_bad_image="skip")
    assert len([w for w in warned if "skipped" in str(w.message)]) == 1
    assert sum(data.sizes.values()) == 21 + good
    assert [split.float().mean((1, 2, 3)).min() > 0 for split in everything(data)]  # bad images are black


def test_a_missing_file_is_named(image_folder, root):
    folder = image_folder("colours", classes=2, images=10)
    spoil(folder)
    with pytest.raises(DataError, match=r"1 of \d+ image files are missing, the first is .*dangling\.png"):
        stream(folder)


@pytest.mark.parametrize("mode", MODES)
def test_a_limit_on_pixels_can_be_lower_than_that_of_pillow(image_folder, root, mode):
    folder = image_folder("colours", images=20)
    Image.new("RGB", (50, 41)).save(folder / "class0" / "large.png")
    assert sum(stream(folder, cache=mode).sizes.values()) == 61
    with pytest.raises(DataError, match=r"1 of 61 .*large\.png' \(50×41 pixels are more than data\.max_pixels=2,049\)"):
        stream(folder, cache=mode, max_pixels=2049)
    assert sum(stream(folder, cache=mode, max_pixels=2050).sizes.values()) == 61
    with pytest.warns(UserWarning, match="large"):
        assert sum(stream(folder, cache=mode, max_pixels=2049, on_bad_image="skip").sizes.values()) == 60


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_limit_on_pixels_can_be_higher_than_that_of_pillow(image_folder, root, mode, monkeypatch):
    folder = image_folder("colours", images=20)  # of 32×32 = 1024 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses twice as many
    with pytest.raises(DataError, match="60 of 60 images of 'colours' cannot be used"):
        stream(folder, cache=mode)
    assert sum(stream(folder, cache=mode, max_pixels=1024).sizes.values()) == 60
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_limit_on_pixels_is_an_option(tiny_fit, capsys):
    assert main(tiny_fit("--data.max_pixels", 1000)) == 2
    assert "24 of 24 images of 'first' cannot be used" in capsys.readouterr().err
    assert main(tiny_fit("--data.max_pixels", 0)) == 2
    assert "data.max_pixels=0 must be at least 1" in capsys.readouterr().err
    assert main(tiny_fit("--data.max_pixels", 1024, "--trainer.max_epochs", 1)) == 0


def test_skipped_images_do_not_move_the_others(image_folder, root):
    folder = image_folder("colours", classes=2, images=40)
    before = stream(folder)
    indices = {split: set(before.plain_dataloader(split).dataset.indices) for split in ("train", "val", "test")}
    os.truncate(folder / "class0" / "003.png", 40)
    with pytest.warns(UserWarning, match=r"003\.png"):
        after = stream(folder, on_bad_image="skip")
    for split, wanted in indices.items():
        assert set(after.plain_dataloader(split).dataset.indices) == wanted - {3}
    assert after.split_digest != before.split_digest


def test_a_split_without_readable_images_is_an_error(image_folder, root, tmp_path):
    for split in ("train", "val", "test"):
        image_folder(f"given/{split}", classes=2, images=2)
    folder = tmp_path / "given"
    for path in (folder / "val").rglob("*.png"):
        path.write_text("")
    with pytest.raises(DataError, match="'given' has no val image; repair"), pytest.warns(UserWarning, match="skipped"):
        stream(folder, "given", on_bad_image="skip")


def test_fit_stops_at_bad_images_before_training_or_skips_them(tiny_fit, tmp_path, capsys):
    bad = tmp_path / "second" / "class1" / "005.png"
    bad.write_text("text")
    assert main(tiny_fit()) == 2
    error = capsys.readouterr().err
    assert "1 of 16 images of 'second' cannot be used" in error
    assert str(bad) in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("*.safetensors"))  # not even the first task has been trained
    with pytest.warns(UserWarning, match="they are skipped"):
        assert main(tiny_fit("--data.on_bad_image", "skip", run_dir=tmp_path / "other")) == 0
    tasks = json.loads((tmp_path / "other" / "summary.json").read_text())["tasks"]
    assert [len(task["split"]) for task in tasks] == [16, 16]


def test_a_repaired_image_is_read_again(image_folder, root):
    folder = image_folder("colours")
    content = (folder / "class0" / "000.png").read_bytes()
    (folder / "class0" / "000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"000\.png"):
        stream(folder)
    (folder / "class0" / "000.png").write_bytes(content)
    stream(folder)


# splits


def test_ratio_ignores_official_splits(image_folder, root):
    for split in ("train", "val", "test"):
        folder = image_folder(f"given/{split}", classes=2, images=20).parent
    official, ratio = stream(folder), stream(folder, split="ratio")
    assert official.sizes == {"train": 40, "val": 40, "test": 40}
    assert sum(ratio.sizes.values()) == 120
    assert 70 < ratio.sizes["train"] < 98  # 70 % are 84


# resuming


def test_a_run_can_be_resumed_with_another_cache(tiny_fit, tmp_path, capsys):
    words = ["--trainer.max_epochs", 1]
    assert main(tiny_fit(*words)) == 0
    words += ["--resume", "true"]
    assert main(tiny_fit(*words, "--data.cache", "ram", "--data.root", tmp_path / "other")) == 0
    assert main(tiny_fit(*words, "--data.split", "official")) == 2
    assert "data differs" in capsys.readouterr().err
