"""Decodes mutated image files, as a process of its own with limits: python fuzz_images.py SEED COUNT.

It writes only files in the current folder: `current.*`, the file that is being decoded, and `result.json`.
"""

import io
import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from recast_pl.data.images import decode_file
from recast_pl.errors import DataError

MEMORY = 3 << 30  # bytes beyond those of the imported libraries


def seeds():
    """Small files of many formats, by ending, with metadata, palettes, animation and compression."""
    generator = np.random.default_rng(1)
    smooth = np.add.outer(np.arange(24), np.arange(20))[..., None] * np.array([5, 3, 2]) % 256
    image = Image.fromarray((smooth + generator.integers(0, 9, smooth.shape)).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = [image.rotate(angle) for angle in (90, 180)]
    grey, clear = image.convert("L"), image.copy()
    clear.putalpha(grey)
    sixteen = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    kinds = [
        ("jpg", image, {"exif": exif}),
        ("jpg", image, {"progressive": True, "quality": 40}),
        ("jpg", image.convert("CMYK"), {}),
        ("png", image, {"exif": exif}),
        ("png", clear, {}),
        ("png", sixteen, {}),
        ("png", image.convert("P"), {"transparency": 3, "bits": 8}),
        ("png", image, {"save_all": True, "append_images": frames}),
        ("gif", image, {}),
        ("gif", image, {"save_all": True, "append_images": frames}),
        ("bmp", image, {}),
        ("bmp", image.convert("P"), {}),
        ("webp", image, {"exif": exif}),
        ("webp", clear, {"lossless": True}),
        ("webp", image, {"save_all": True, "append_images": frames}),
        ("tif", image, {"exif": exif}),
        *(("tif", image, {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        ("tif", sixteen, {}),
        ("tif", image.convert("1"), {"compression": "group4"}),
        *((suffix, image, {}) for suffix in ("ppm", "tga", "ico", "jp2", "pcx", "sgi", "dds", "avif", "im", "qoi")),
    ]
    for suffix, picture, options in kinds:
        file = io.BytesIO()
        kind = Image.registered_extensions()[f".{suffix}"]
        try:
            picture.save(file, kind, **options)
        except (KeyError, OSError):  # this Pillow cannot write the format
            continue
        yield suffix, file.getvalue()


def mutate(content, other, generator):
    """Changes a few places of a file: bytes, numbers, lengths; or cuts, repeats, and joins with another file."""
    content = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        size = len(content)
        near = min(size, int(generator.choice([32, 200, size])))  # mostly headers
        place = int(generator.integers(0, max(near, 1)))
        length = int(generator.integers(1, 65))
        match generator.integers(0, 8):
            case 0 | 1:
                content[place : place + 1] = generator.bytes(1)
            case 2:
                extremes = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff", b"\x80", b"\0\0\x40\0")
                value = extremes[generator.integers(len(extremes))]
                content[place : place + len(value)] = value
            case 3:
                content[place : place + length] = generator.bytes(length)
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length] * int(generator.integers(1, 20))
            case 6:
                content = content[: generator.integers(1, size + 1)]
            case 7:
                content[place:] = other[place:]
        content = content or bytearray(b"\0")
    return bytes(content)


def main(seed, count):
    """Decodes the mutated files and writes what happened."""
    warnings.simplefilter("ignore")
    files, generator = list(seeds()), np.random.default_rng(seed)
    for suffix, content in files:  # all of them are good, and all decoders are loaded
        Path(f"current.{suffix}").write_bytes(content)
        assert decode_file(Path(f"current.{suffix}"), 16).shape == (3, 16, 16)
        Path(f"current.{suffix}").unlink()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = {"formats": len({suffix for suffix, _ in files}), "read": 0, "refused": 0, "foreign": [], "slowest": 0.0}
    for number in range(count):
        suffix, content = files[number % len(files)]
        path = Path(f"current.{suffix}")
        path.write_bytes(mutate(content, files[generator.integers(len(files))][1], generator))
        started = time.process_time()
        try:
            decode_file(path, 16)
            result["read"] += 1
        except DataError:
            result["refused"] += 1
        except BaseException as error:
            result["foreign"].append(f"{number}: {type(error).__name__}: {error}")
        result["slowest"] = max(result["slowest"], time.process_time() - started)
        path.unlink()
    Path("result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
