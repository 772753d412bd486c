"""What the figures of a report have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from typing import Any

from cocomix.common.document import DARK, NARROW, Variants

DARK_STYLE = {"savefig.facecolor": "none", "axes.facecolor": "none", "legend.facecolor": "none"}
TOKEN_UNITS = {9: "billions", 6: "millions", 3: "thousands", 0: ""}


def variants(draw: Callable[..., bytes]) -> Variants:
    """Draw a picture for light and dark, wide and narrow pages.

    Args:
        draw: returns the PNG; takes `dark` and `narrow`.
    """
    return {
        f"{DARK} and {NARROW}": draw(dark=True, narrow=True),
        DARK: draw(dark=True),
        NARROW: draw(narrow=True),
        "": draw(),
    }


def style(dark: bool) -> AbstractContextManager[Any]:
    """Return a context in which Matplotlib draws for a light page, or for a dark one with a transparent background."""
    from matplotlib import style as styles

    return styles.context(["dark_background", DARK_STYLE]) if dark else nullcontext()


def scale(maximum: float, label: str) -> tuple[float, str]:
    """Return the power of ten by which to divide the values of an axis, and the axis' label with that unit."""
    exponent = 3 * int(math.log10(maximum) // 3) if maximum >= 1 else 0
    if "tokens" in label:
        exponent = min(exponent, 9)
        return 10.0**exponent, f"{label}, {TOKEN_UNITS[exponent]}".rstrip(", ")
    return 10.0**exponent, f"{label}, $10^{{{exponent}}}$" if exponent else label


def png(figure: Any) -> bytes:
    """Return a figure of Matplotlib as a PNG. Names in its legends are text, even with dollar signs."""
    for legend in filter(None, [*figure.legends, *(axes.get_legend() for axes in figure.axes)]):
        for text in legend.get_texts():
            text.set_parse_math(False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
