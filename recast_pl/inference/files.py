"""Image files: which ones a user names, and their predictions, whatever their number."""

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recast_pl.data.images import decode_file, files_below, is_image_file
from recast_pl.errors import DataError
from recast_pl.inference.prediction import REFUSE, Prediction
from recast_pl.inference.predictor import Predictor

_BATCH = 64  # images that are in memory at a time


def find_files(names: Sequence[str]) -> tuple[list[Path], int]:
    """Lists the files that names stand for.

    Args:
        names: Each is a file, which need not be an image; a folder, for the images in it at any depth; or a pattern
            such as `photos/**/*.jpg`, for the files and folders that match.

    Returns:
        The files in the order of the names, those of a folder or pattern in order of path; and how many other files
        the folders have, which are not hidden and have no ending of an image.

    Raises:
        DataError: If a folder has no image, or nothing matches a pattern.
    """
    files: list[Path] = []
    others = 0
    for name in names:
        found, left_out = _files_of(name)
        files += found
        others += left_out
    return files, others


def read_names(file: str) -> list[str]:
    """Reads a text file with one file or folder a line.

    Args:
        file: The text file; `-` for standard input.

    Raises:
        DataError: If it cannot be read or names nothing.
    """
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as cause:
        raise DataError(f"cannot read the list {file!r} ({cause}); check --list") from cause
    lines = content.decode("utf-8-sig", errors="surrogateescape").split("\n")  # file names may have any bytes
    names = [line.removesuffix("\r") for line in lines if line.strip()]
    if not names:
        raise DataError(f"the list {file!r} is empty; write one image file or folder in each line")
    return names


def classify_files(
    predictor: Predictor,
    task: str | None,
    files: Sequence[Path],
    on_bad: Callable[[DataError], object],
    refuse: float = REFUSE,
) -> Iterator[tuple[Path, Prediction | None]]:
    """Classifies files in memory that does not grow with their number.

    Args:
        predictor: Has the task.
        task: Name of the task; None to find that of each image.
        files: The files.
        on_bad: Called with the error of each file that cannot be read.
        refuse: The share of known images that may be refused where tasks are found, as in `Predictor.predict`.

    Yields:
        Each file, in order, and its prediction; None if it cannot be read.
    """
    size = predictor.any_size if task is None else predictor.image_size(task)
    for start in range(0, len(files), _BATCH):
        chunk, images = files[start : start + _BATCH], {}
        for file in chunk:
            try:
                images[file] = decode_file(file, size)
            except DataError as error:
                on_bad(error)
        predictions: Sequence[Prediction]
        if task is None:
            predictions = predictor.route_tensors(list(images.values()), refuse)
        else:
            predictions = predictor.predict_tensors(list(images.values()), [task] * len(images))
        found = dict(zip(images, predictions, strict=True))
        yield from ((file, found.get(file)) for file in chunk)


def _files_of(name: str) -> tuple[list[Path], int]:
    path = Path(name)
    if not _is(Path.exists, path) and glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.iglob(name, recursive=True))]  # noqa: PTH207, takes whole paths
    else:
        matches = [path]
    found = [_files_below(match) if _is(Path.is_dir, match) else ([match], 0) for match in matches]
    files, others = [file for inside, _ in found for file in inside], sum(count for _, count in found)
    if not files:
        raise DataError(f"no image found in {name!r}; name image files, folders or patterns that match some")
    return files, others


def _files_below(folder: Path) -> tuple[list[Path], int]:
    files = files_below(folder)
    images = [file for file in files if is_image_file(file)]
    return images, len(files) - len(images)


def _is(test: Callable[[Path], bool], path: Path) -> bool:
    """The result of a test; False for a name that the system refuses, which is reported when the file is read."""
    try:
        return test(path)
    except OSError:
        return False
