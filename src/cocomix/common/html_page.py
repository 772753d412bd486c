"""The skeleton of a self-contained HTML page."""

from __future__ import annotations

import html

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_page(title: str, style: str, body: str) -> str:
    """Return a page in light and dark, for wide screens and phones.

    Args:
        title: plain text.
        style: CSS rules.
        body: HTML.
    """
    return _PAGE.format(title=html.escape(title), style=style.strip("\n"), body=body)
