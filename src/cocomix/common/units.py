"""Durations and sizes in the unit that suits them."""

from __future__ import annotations

GIB = 2**30


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes, hours or days."""
    if 0 < seconds < 1:
        return "< 1 s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds / 86400:,.1f} days"


def size(count: float) -> str:
    """Format a number of bytes as KiB, MiB, GiB or TiB, with three digits."""
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if value >= 100 or unit == "KiB" else f"{value:.3g} {unit}"
