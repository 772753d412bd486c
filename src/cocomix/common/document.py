"""A document as data, and its rendering as HTML, Markdown, or text for a terminal.

Names, texts and figures of a run are data: each renderer escapes all of them, so that none becomes markup, a link or an
image. The text of paragraphs, headings and lists has one kind of markup: `code` in backticks. A backslash before a
backtick or backslash shows that character itself (`literal`). The cells of tables have no such form.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cocomix.common.console import table, visible
from cocomix.common.html_page import html_page


class Heading(NamedTuple):
    """A heading, of level 1 or more."""

    level: int
    text: str


class Table(NamedTuple):
    """A table whose first column is aligned to the left, and the others to the right."""

    header: list[str]
    rows: list[list[str]]


class Bullets(NamedTuple):
    """A list of short texts."""

    items: list[str]


class Picture(NamedTuple):
    """A PNG file next to the document, and a description of what it shows."""

    file: str
    description: str


class Code(NamedTuple):
    """Lines of a program, which are shown as they are; they hold no text of a run."""

    language: str
    text: str


Block = str | Heading | Table | Bullets | Picture | Code
"""A part of a document; a string is a paragraph."""

DARK = "(prefers-color-scheme: dark)"
NARROW = "(max-width: 48rem)"
Variants = Mapping[str, bytes]
"""PNG bytes of a picture by the media query of the pages that show it; the last one, "", is for all others."""

_STYLE = """
  body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
    overflow-wrap: anywhere; }
  table { border-collapse: collapse; margin: 1rem 0; max-width: 100%; font-variant-numeric: tabular-nums;
    font-size: .9rem; }
  th, td { padding: .35rem .5rem; border-bottom: 1px solid #8886; text-align: right; vertical-align: bottom;
    overflow-wrap: normal; }
  th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
  img { max-width: 100%; }
  code { font-size: .9em; }
  @media (max-width: 48rem) {
    table, tbody, tr, td { display: block; }
    thead { display: none; }
    tr { padding: .5rem 0; border-bottom: 1px solid #8886; }
    td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0;
      text-align: right; overflow-wrap: anywhere; }
    td:first-child { font-weight: 600; }
    td::before { content: attr(data-label); font-weight: 400; text-align: left; opacity: .75; }
  }
"""
_PIECES = re.compile(r"`([^`\\]+)`|\\([`\\])|([^`\\]+|.)")
# What CommonMark and GitHub read as markup, HTML, mathematics, or an address to link to.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$#]|(?<!\w)@|@(?=[\w.-]*\.)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")


def literal(text: str) -> str:
    """Return the form in which a paragraph shows this text as it is, on one line."""
    return re.sub(r"([`\\])", r"\\\1", visible(text))


def plain_text(block: Block) -> str:
    """Render a block for a terminal."""
    if isinstance(block, Table):
        return table(*_cells(block, visible))
    assert isinstance(block, str)
    return "".join(text for text, _ in _pieces(block))


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render a document as Markdown."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_inline_markdown(text)}"
        case Table():
            return table(*_cells(block, _escaped_markdown))
        case Bullets(items):
            return "\n".join(f"- {_inline_markdown(item)}" for item in items)
        case Picture(file, description):
            return f"![{_escaped_markdown(description)}]({file})"
        case Code(language, text):
            return f"```{language}\n{text}\n```"
    return _inline_markdown(block)


def _inline_markdown(text: str) -> str:
    return "".join(f"`{piece}`" if is_code else _escaped_markdown(piece) for piece, is_code in _pieces(text))


def _escaped_markdown(text: str) -> str:
    return _MARKUP.sub(lambda match: f"\\{match[0]}", visible(text))


def to_html(blocks: Sequence[Block], title: str, pictures: Mapping[str, Variants]) -> str:
    """Render a document as one HTML page with its pictures embedded.

    Args:
        blocks: the document.
        title: title of the page, as plain text.
        pictures: variants of the pictures by file name.
    """
    return html_page(title, _STYLE, "\n".join(_html(block, pictures) for block in blocks))


def _html(block: Block, pictures: Mapping[str, Variants]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline_html(text)}</h{level}>"
        case Table():
            header, rows = _cells(block, _escaped_html)
            head = "".join(f"<th>{cell}</th>" for cell in header)
            body = "\n".join(_row(header, row) for row in rows)
            return f"<table>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline_html(item)}</li>" for item in items) + "\n</ul>"
        case Picture(file, description):
            return _picture(pictures[file], description)
        case Code(_, text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
    return f"<p>{_inline_html(block)}</p>"


def _row(header: list[str], row: list[str]) -> str:
    """Render a row; a narrow page shows it as a list, where each cell has the label of its column."""
    cells = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(header, row, strict=True))
    return f"<tr>{cells}</tr>"


def _picture(variants: Variants, description: str) -> str:
    urls = {media: f"data:image/png;base64,{base64.b64encode(png).decode()}" for media, png in variants.items()}
    sources = "".join(f'<source media="{media}" srcset="{url}">' for media, url in urls.items() if media)
    return f'<p><picture>{sources}<img src="{urls[""]}" alt="{_escaped_html(description)}"></picture></p>'


def _inline_html(text: str) -> str:
    return "".join(
        f"<code>{_escaped_html(piece)}</code>" if is_code else _escaped_html(piece) for piece, is_code in _pieces(text)
    )


def _escaped_html(text: str) -> str:
    return html.escape(visible(text))


def _cells(block: Table, escaped: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    return list(map(escaped, block.header)), [list(map(escaped, row)) for row in block.rows]


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text, and whether each is code. A backtick without a partner is shown."""
    for code, character, other in _PIECES.findall(visible(text)):
        yield code or character or other, bool(code)
