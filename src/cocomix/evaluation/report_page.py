"""The Markdown report as one page."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
  table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto;
    font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .35rem .75rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }}
  th:first-child, td:first-child {{ text-align: left; }}
  img {{ max-width: 100%; background: white; }}
  code {{ font-size: .9em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(text: str, title: str, folder: Path) -> str:
    """The Markdown report as one page, pictures inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    return _PAGE.format(title=html.escape(title), body=re.sub(r'src="([^"]+\.png)"', embed, body))
