"""Decoding: every mode, orientation and format, and damaged files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from recast_pl.data.images import decode_file
from recast_pl.errors import DataError


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


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_damaged_files_are_read_or_raise_a_data_error(tmp_path, suffix):
    generator = np.random.default_rng(7)
    picture = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = tmp_path / f"whole.{suffix}"
    picture.save(whole, **({"exif": exif} if suffix in ("jpg", "png", "webp", "tif") else {}))
    content = np.frombuffer(whole.read_bytes(), np.uint8)
    path, errors = tmp_path / f"damaged.{suffix}", []
    for _ in range(150):
        damaged = content.copy()
        places = generator.integers(0, min(len(damaged), 600), generator.integers(1, 8))  # mostly in headers
        damaged[places] = generator.integers(0, 256, len(places))
        path.write_bytes(damaged[: generator.integers(1, len(damaged) + 1)].tobytes())
        try:
            assert decode_file(path, 8).shape == (3, 8, 8)
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert all(str(path) in error for error in errors)


@pytest.mark.parametrize(
    ("mode", "clear", "solid"),
    [("RGBA", (200, 30, 90, 0), (200, 30, 90, 255)), ("LA", (0, 0), (0, 255))],
)
def test_transparent_pixels_are_white(tmp_path, mode, clear, solid):
    image = Image.new(mode, (8, 4), clear)
    image.paste(solid, (4, 0, 8, 4))
    image.save(tmp_path / "image.png")
    pixels = decode_file(tmp_path / "image.png", 4)  # the centre: two columns of each
    assert pixels[:, :, 0].tolist() == [[255] * 4] * 3
    assert pixels[:, 0, 3].tolist() == ([200, 30, 90] if mode == "RGBA" else [0] * 3)


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 30, 90])
    image.paste(1, (2, 0, 4, 4))
    image.save(tmp_path / "image.gif", transparency=0)
    pixels = decode_file(tmp_path / "image.gif", 4)
    assert pixels[:, 0, 0].tolist() == [255] * 3
    assert pixels[:, 0, 3].tolist() == [200, 30, 90]


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(DataError, match="no known range"):
        decode_file(tmp_path / "large.tif", 4)


def fuzz(folder, seed, count, seconds):
    """Decodes mutated files in a process of its own; returns what happened."""
    script = str(ROOT / "tests" / "fuzz_images.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    words = [sys.executable, script, str(seed), str(count)]
    process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert process.returncode == 0, (process.returncode, process.stderr[-2000:], os.listdir(folder))
    assert os.listdir(folder) == ["result.json"]  # nothing else is written
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("seed", "count", "seconds"), [(0, 300, 120), pytest.param(1, 10_000, 1200, marks=pytest.mark.release)]
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and counts memory as Linux does")
def test_mutated_files_are_read_or_refused(tmp_path, seed, count, seconds):
    result = fuzz(tmp_path, seed, count, seconds)
    assert result["foreign"] == []
    assert result["read"] + result["refused"] == count
    assert min(result["read"], result["refused"]) > count / 10  # the mutations neither miss nor destroy everything
    assert result["formats"] >= 10
    assert result["slowest"] < 10  # seconds of computing time
