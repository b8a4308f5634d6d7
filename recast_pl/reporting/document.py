"""A document of headings, tables and figures, as one HTML page that needs nothing else, and as Markdown with files."""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from recast_pl.files import write_atomic
from recast_pl.reporting.plots import to_svg, write_figure
from recast_pl.reporting.tables import markdown_table


class Text(NamedTuple):
    """A piece of text.

    Args:
        text: What it says.
        link: Where it leads, relative to the document; None for nowhere.
        bold: Whether it stands out.
    """

    text: str
    link: str | None = None
    bold: bool = False


Cell = Sequence[Text]


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: What it says.
        level: 1 for the title.
    """

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text between tables.

    Args:
        parts: Said one after the other.
    """

    parts: Cell


@dataclass(frozen=True)
class Items:
    """A list.

    Args:
        items: One line each.
    """

    items: Sequence[Cell]


@dataclass(frozen=True)
class Grid:
    """A table.

    Args:
        caption: What it shows.
        header: Of the columns.
        rows: As long as the header each.
        texts: How many columns, from the left, hold text; others are set flush right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Of its files, less their endings.
        caption: What it shows; also said to who cannot see it.
        figure: The drawing.
    """

    name: str
    caption: str
    figure: Figure


Block = Heading | Paragraph | Items | Grid | Picture


def write_document(blocks: Sequence[Block], folder: Path, name: str) -> None:
    """Writes NAME.html, NAME.md, and for the latter figures/*.png and *.svg.

    Args:
        blocks: The document; the first is its title.
        folder: Where to.
        name: Of the files.

    Raises:
        StorageError: If they cannot be written.
    """
    for block in blocks:
        if isinstance(block, Picture):
            write_figure(block.figure, folder / "figures" / block.name)
    write_atomic(folder / f"{name}.md", "".join(f"{_markdown(block)}\n\n" for block in blocks))
    write_atomic(folder / f"{name}.html", to_html(blocks))


def to_html(blocks: Sequence[Block]) -> str:
    """The document as a page without scripts, whose figures are in it.

    Args:
        blocks: The document; the first is its title.
    """
    title = blocks[0].text if isinstance(blocks[0], Heading) else ""
    body = "\n".join(line for block in blocks for line in _html(block))
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def _html(block: Block) -> Iterator[str]:
    match block:
        case Heading():
            yield f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            yield f"<p>{_html_cell(block.parts)}</p>"
        case Items():
            yield f"<ul>{''.join(f'<li>{_html_cell(item)}</li>' for item in block.items)}</ul>"
        case Picture():
            image = base64.b64encode(to_svg(block.figure, block.name).encode()).decode()
            caption = html.escape(block.caption)
            yield f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{image}">'
            yield f"<figcaption>{caption}</figcaption></figure>"
        case Grid():
            yield f'<div class="scroll"><table><caption>{html.escape(block.caption)}</caption><thead><tr>'
            classes = [_class(block, column) for column in range(len(block.header))]
            headings = zip(classes, block.header, strict=True)
            yield "".join(f'<th scope="col"{kind}>{html.escape(heading)}</th>' for kind, heading in headings)
            yield "</tr></thead><tbody>"
            for row in block.rows:
                cells = (f"<td{kind}>{_html_cell(cell)}</td>" for kind, cell in zip(classes, row, strict=True))
                yield f"<tr>{''.join(cells)}</tr>"
            yield "</tbody></table></div>"


def _class(block: Grid, column: int) -> str:
    return "" if column < block.texts else ' class="number"'


def _html_cell(cell: Cell) -> str:
    return "".join(_html_text(part) for part in cell)


def _html_text(part: Text) -> str:
    text = html.escape(part.text)
    text = f"<strong>{text}</strong>" if part.bold else text
    return text if part.link is None else f'<a href="{html.escape(part.link)}">{text}</a>'


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Paragraph():
            return _markdown_cell(block.parts)
        case Items():
            return "\n".join(f"- {_markdown_cell(item)}" for item in block.items)
        case Picture():
            return f"![{_plain(block.caption)}](figures/{block.name}.png)\n\n*{_plain(block.caption)}*"
        case Grid():
            return _markdown_grid(block)


def _markdown_grid(block: Grid) -> str:
    header = [_plain(heading) for heading in block.header]
    rows = [[_markdown_cell(cell) for cell in row] for row in block.rows]
    return f"*{_plain(block.caption)}*\n\n{markdown_table((header, rows), block.texts)}".rstrip("\n")


def _markdown_cell(cell: Cell) -> str:
    return "".join(_markdown_text(part) for part in cell)


def _markdown_text(part: Text) -> str:
    text = _plain(part.text)
    text = f"**{text}**" if part.bold else text
    return text if part.link is None else f"[{text}](<{part.link}>)"


def _plain(text: str) -> str:
    """Text in which nothing means anything to Markdown."""
    return "".join(f"\\{character}" if character in r"\`*_[]<>|#" else character for character in text)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { border-bottom: 1px solid #bbb; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #333; }
th, td { padding: 0.15rem 0.5rem; }
td { white-space: nowrap; }
.number { text-align: right; }
tbody tr:nth-child(even) { background: #f3f3f3; }
a { color: #0050a0; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: #444; }"""
