"""What users and files may ask for: names of tasks and classes, and sizes of images."""

import re
import unicodedata
from collections.abc import Iterable

TASK_RULE = "a name of at most 200 bytes: letters, digits and '_', then also '-', '.' and spaces"

LABEL_RULE = "a text of 1 to 1,000 characters without line breaks and other control characters"

LARGEST_SIDE = 2048
"""The most pixels that the input of a network may have on a side: larger ones could block a server for minutes."""

_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Categories of Unicode: control characters, bytes that are not UTF-8, and separators of lines and paragraphs."""


def is_task_name(name: str) -> bool:
    """Whether a task may have this name, which becomes part of file names: it follows `TASK_RULE`."""
    return re.fullmatch(r"\w[\w.\- ]*", name) is not None and len(name.encode()) <= 200


def is_label(text: str) -> bool:
    """Whether a class may have this name: it follows `LABEL_RULE`."""
    return 1 <= len(text) <= 1000 and not any(unicodedata.category(character) in _CONTROL for character in text)


def find_bad_label(classes: Iterable[str]) -> str | None:
    """The first class name that does not follow `LABEL_RULE`, or that comes a second time; None if there is none."""
    seen: set[str] = set()
    for name in classes:
        if not is_label(name) or name in seen:
            return name
        seen.add(name)
    return None
