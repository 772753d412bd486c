"""What the figures of a report have in common."""

from __future__ import annotations

from io import BytesIO
from typing import Any


def png(figure: Any) -> bytes:
    """Return a figure of Matplotlib as a PNG. Names in its legends are text, even with dollar signs."""
    for legend in filter(None, [*figure.legends, *(axes.get_legend() for axes in figure.axes)]):
        for text in legend.get_texts():
            text.set_parse_math(False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
