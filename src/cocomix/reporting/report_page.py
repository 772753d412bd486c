"""Render the Markdown report as a self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from cocomix.common.html_page import html_page

_STYLE = """
  body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto;
    font-variant-numeric: tabular-nums; }
  th, td { padding: .35rem .75rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; }
  img { max-width: 100%; background: white; }
  code { font-size: .9em; }
"""


def to_html(text: str, title: str, pictures: Mapping[str, bytes]) -> str:
    """Render Markdown as one HTML page with its pictures embedded.

    Args:
        text: Markdown.
        title: title of the page.
        pictures: PNG bytes by the file name that `text` links to.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)
    for name, picture in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"')
    return html_page(title, _STYLE, body)
