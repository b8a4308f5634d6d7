"""Images per second of the cached pipeline and of torchvision's ImageFolder, on the same files with the same workers.

    uv run python benchmarks/pipeline.py

Both shuffle, mirror and normalise at 224×224. ImageFolder decodes with Pillow in each epoch; the cached pipeline
decodes once, before the first epoch, and converts on the device. Without a GPU, the CPU that loads images also converts
them. Therefore two rates are given: batches as the loader delivers them, and batches after conversion. The contenders
run one epoch each in turn, and the result is the median of the ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from recast_pl import SequentialTaskDataModule, TaskConfig

SIZE, BATCH = 224, 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def photographs(source, folder):
    """Copies the images at 500×375, about the size of the pictures of Flowers, Birds and Scenes."""
    for path in source.rglob("*.jpg"):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((500, 375), Image.Resampling.BICUBIC).save(copy, quality=90)
    return folder


def image_folder(folder, workers):
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(SIZE),
            v2.CenterCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        ImageFolder(folder, transform),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=DEVICE.type == "cuda",
    )


def cached(folder, workers, cache):
    data = SequentialTaskDataModule((TaskConfig("benchmark", str(folder)),), SIZE, BATCH, workers, root=str(cache))
    data.prepare_data()
    return data


def epoch(loader, convert=None):
    """Images per second of one epoch."""
    count, start = 0, time.perf_counter()
    for batch in loader:
        moved = [part.to(DEVICE, non_blocking=True) for part in batch]
        if convert is not None:
            convert(moved)
        count += len(moved[1])
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def anonymous_megabytes():
    """Memory of this process that does not belong to a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def compare(name, folder, workers, epochs, cache):
    start = time.perf_counter()
    data = cached(folder, workers, cache)
    building = time.perf_counter() - start
    mean, std = (torch.tensor(v, device=DEVICE)[:, None, None] for v in (MEAN, STD))

    def convert(batch):
        images, _ = data.on_after_batch_transfer(batch, 0)
        return (images - mean) / std

    loaders = (image_folder(folder, workers), data.train_dataloader())
    contenders = (lambda: epoch(loaders[0]), lambda: epoch(loaders[1]), lambda: epoch(loaders[1], convert))
    for contender in contenders:
        contender()  # the first epoch also starts the workers and reads the files
    rates = [[contender() for contender in contenders] for _ in range(epochs)]
    before = anonymous_megabytes()
    for _ in range(4 * epochs):
        epoch(loaders[1])
    growth = anonymous_megabytes() - before
    plain, loaded, converted = (statistics.median(column) for column in zip(*rates, strict=True))
    ready, done = (statistics.median(row[i] / row[0] for row in rates) for i in (1, 2))
    count = sum(data.sizes.values())
    print(f"{name}, {workers} workers, {len(data.train_dataloader().dataset)} training images:")
    print(f"  ImageFolder {plain:,.0f}, loaded {loaded:,.0f} ({ready:.1f}×)")
    print(f"  converted on {DEVICE.type} {converted:,.0f} ({done:.1f}×)")
    print(f"  decoding once took {building:.1f} s for {count} images; {growth:+.1f} MB after {4 * epochs} more epochs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path("data/clipart"), help="folder of classes of JPEG images")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        large = photographs(options.images, Path(temporary) / "photographs")
        for workers in options.workers:
            cache = Path(temporary) / f"cache{workers}"
            compare(f"{options.images} as it is", options.images, workers, options.epochs, cache)
            compare("the same at 500×375", large, workers, options.epochs, cache)
        images = np.zeros((BATCH, 3, 32, 32), np.uint8)
        print(
            f"a batch of CIFAR-100 moves {images.nbytes:,} bytes; "
            f"in fp32 at {SIZE}×{SIZE} it would be {BATCH * 3 * SIZE * SIZE * 4:,}"
        )


if __name__ == "__main__":
    main()
