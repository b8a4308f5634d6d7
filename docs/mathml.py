"""Turns the formulas of the pages into MathML while the site is built, so that no browser loads a script for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# what the Markdown extension `arithmatex` writes for $…$ and $$…$$
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces each formula of a page; MkDocs calls this for every page.

    Args:
        content: The HTML of the page.

    Returns:
        The HTML with MathML.
    """
    return _FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["tex"].strip()), display=display)
