"""What users and files may ask for: names of tasks and classes, and sizes of images."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

ANY_TASK, NO_TASK = "auto", "none"
"""What stands for a task where it is to be found, and where an image belongs to none; no task has such a name."""

TASK_RULE = "a name of at most 200 bytes, not 'auto' or 'none': letters, digits and '_', then also '-', '.' and spaces"

LABEL_RULE = "a text of 1 to 1,000 characters without line breaks and other control characters"

LARGEST_SIDE = 2048
"""The most pixels that the input of a network may have on a side: larger ones could block a server for minutes."""

_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Categories of Unicode: control characters, bytes that are not UTF-8, and separators of lines and paragraphs."""


ImageSize = int | tuple[int, int]
"""The height and width of images in pixels: one number if they are equal, otherwise two."""


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """The height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: ImageSize) -> str:
    """The size for messages, as HEIGHT×WIDTH."""
    return "×".join(map(str, height_and_width(size)))


def read_size(value: Any) -> ImageSize | None:
    """The size that a user gives, two equal numbers as one; None unless the sides are 1 to `LARGEST_SIDE` pixels."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides):
        return None
    height, width = sides
    return height if height == width else (height, width)


def is_task_name(name: str) -> bool:
    """Whether a task may have this name, which becomes part of file names: it follows `TASK_RULE`."""
    return re.fullmatch(r"\w[\w.\- ]*", name) is not None and len(name.encode()) <= 200 and not is_reserved(name)


def is_reserved(name: str) -> bool:
    """Whether a name stands for something else than a task, in any case of its letters."""
    return name.casefold() in (ANY_TASK, NO_TASK)


def is_label(text: str) -> bool:
    """Whether a class may have this name: it follows `LABEL_RULE`."""
    if text.isascii() and text.isprintable():  # the usual case, which is quicker to tell
        return 1 <= len(text) <= 1000
    return 1 <= len(text) <= 1000 and not any(unicodedata.category(character) in _CONTROL for character in text)


def find_bad_label(classes: Iterable[str]) -> str | None:
    """The first class name that does not follow `LABEL_RULE`, or that comes a second time; None if there is none."""
    seen: set[str] = set()
    for name in classes:
        if not is_label(name) or name in seen:
            return name
        seen.add(name)
    return None
