"""A document of headings, tables and figures: one self-contained HTML page, and Markdown with picture files."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from recast_pl.files import write_atomic
from recast_pl.reporting.plots import to_svg, write_figure
from recast_pl.reporting.tables import markdown_table, plain


class Text(NamedTuple):
    """A run of text without markup; `link` is a URL relative to the document, None for no link."""

    text: str
    link: str | None = None
    bold: bool = False


Line = Sequence[Text]
"""Text of one table cell, list item or paragraph."""


class Heading(NamedTuple):
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """A paragraph of one line of text."""

    line: Line


class Bullets(NamedTuple):
    """A bulleted list."""

    items: Sequence[Line]


class DataTable(NamedTuple):
    """A table; its first `text_columns` columns hold text, the others numbers, which are aligned right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Line]]
    text_columns: int = 1


class Chart(NamedTuple):
    """A figure; `name` is its file name without suffix, and the caption is also its text alternative."""

    name: str
    caption: str
    figure: Figure


Block = Heading | Paragraph | Bullets | DataTable | Chart


def write_document(blocks: Sequence[Block], folder: Path, name: str) -> None:
    """Writes NAME.html, NAME.md, and the figures of the latter as figures/*.png and *.svg.

    The HTML page has no scripts and embeds its figures.

    Args:
        blocks: The document; its first block is the title.
        folder: Output folder.
        name: File name without suffix.

    Raises:
        StorageError: If a file cannot be written.
    """
    for block in blocks:
        if isinstance(block, Chart):
            write_figure(block.figure, folder / "figures" / block.name)
    text = "".join(f"{_markdown(block)}\n\n" for block in blocks)
    write_atomic(folder / f"{name}.md", text.encode(errors="replace"))  # names of files may be no text
    environment = Environment(loader=PackageLoader("recast_pl.reporting", ""), autoescape=True, trim_blocks=True)
    environment.filters["svg_data"] = lambda chart: base64.b64encode(to_svg(chart.figure, chart.name).encode()).decode()
    page = environment.get_template("document.html").render(blocks=[(type(block).__name__, block) for block in blocks])
    write_atomic(folder / f"{name}.html", page.encode(errors="replace"))


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {plain(block.text)}"
        case Paragraph():
            return _markdown_line(block.line)
        case Bullets():
            return "\n".join(f"- {_markdown_line(item)}" for item in block.items)
        case Chart():
            return f"![{plain(block.caption)}](figures/{block.name}.png)\n\n*{plain(block.caption)}*"
        case DataTable():
            header = [plain(heading) for heading in block.header]
            rows = [[_markdown_line(cell) for cell in row] for row in block.rows]
            table = markdown_table((header, rows), block.text_columns).rstrip("\n")
            return f"*{plain(block.caption)}*\n\n{table}"


def _markdown_line(line: Line) -> str:
    parts = []
    for part in line:
        text = f"**{plain(part.text)}**" if part.bold else plain(part.text)
        parts.append(text if part.link is None else f"[{text}](<{part.link}>)")
    return "".join(parts)
