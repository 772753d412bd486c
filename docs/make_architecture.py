"""Draw the architecture for README.md and docs/method.md: python docs/make_architecture.py

The picture follows the reader's light or dark color scheme.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; dominant-baseline: central; }
.note { font-size: 12px; fill: #59636e; }
.box { fill: #f6f8fa; stroke: #818b98; }
.frozen { fill: #ddf4ff; stroke: #54aeff; }
.mixer { fill: #fff1e5; stroke: #fb8f44; }
.loss { fill: #ffebe9; stroke: #ff8182; }
.arrow { stroke: #59636e; stroke-width: 1.5; fill: none; marker-end: url(#head); }
.dashed { stroke-dasharray: 5 4; }
.head { fill: #59636e; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .note { fill: #9198a1; }
  .box { fill: #212830; stroke: #656c76; }
  .frozen { fill: #0c2d4e; stroke: #388bfd; }
  .mixer { fill: #3d2205; stroke: #db6d28; }
  .loss { fill: #3c1618; stroke: #da3633; }
  .arrow { stroke: #9198a1; }
  .head { fill: #9198a1; }
}
"""
TEACHER, LOSSES, STUDENT = 60, 155, 250
"""Vertical centers of the rows."""


def box(x: int, y: int, width: int, kind: str, *lines: str) -> str:
    """Return a box with its center at (x, y), and one line of text per string; later ones are smaller."""
    height = 46
    parts = [
        f'<rect class="{kind}" x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="7"/>'
    ]
    offsets = [0] if len(lines) == 1 else [-9, 10]
    for number, (line, offset) in enumerate(zip(lines, offsets, strict=True)):
        note = ' class="note"' if number else ""
        parts.append(f'<text{note} x="{x}" y="{y + offset}">{escape(line)}</text>')
    return "\n".join(parts)


def arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    """Return an arrow through points."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="arrow{" dashed" if dashed else ""}" d="{path}"/>'


def note(x: int, y: int, text: str) -> str:
    """Return a small text with its center at (x, y)."""
    return f'<text class="note" x="{x}" y="{y}">{escape(text)}</text>'


def picture() -> str:
    """Return the picture as SVG."""
    parts = [
        box(60, LOSSES, 90, "box", "tokens", "T per block"),
        # The teacher's row.
        box(215, TEACHER, 150, "frozen", "teacher (frozen)", "blocks up to a layer"),
        box(415, TEACHER, 160, "frozen", "sparse autoencoder", "C latents per token"),
        box(625, TEACHER, 150, "box", "concept labels", "the A of largest score"),
        arrow((60, LOSSES - 24), (60, TEACHER), (138, TEACHER)),
        arrow((291, TEACHER), (333, TEACHER)),
        arrow((496, TEACHER), (548, TEACHER)),
        # The student's row.
        box(215, STUDENT, 150, "box", "lower blocks", "hidden states h"),
        box(415, STUDENT, 150, "mixer", "predict concepts", "logits z, keep K"),
        box(590, STUDENT, 110, "mixer", "compress", "vector c"),
        box(725, STUDENT, 70, "mixer", "mix", "h and c"),
        box(850, STUDENT, 110, "box", "upper blocks", "causal"),
        arrow((60, LOSSES + 24), (60, STUDENT), (138, STUDENT)),
        arrow((291, STUDENT), (338, STUDENT)),
        arrow((491, STUDENT), (533, STUDENT)),
        arrow((646, STUDENT), (688, STUDENT)),
        arrow((761, STUDENT), (793, STUDENT)),
        arrow((215, STUDENT + 24), (215, STUDENT + 55), (725, STUDENT + 55), (725, STUDENT + 26)),
        # The losses.
        box(415, LOSSES, 150, "loss", "concept loss", "weight λ"),
        box(850, LOSSES, 110, "loss", "token loss", "next token"),
        arrow((415, STUDENT - 24), (415, LOSSES + 26)),
        arrow((625, TEACHER + 24), (625, LOSSES), (492, LOSSES), dashed=True),
        arrow((850, STUDENT - 24), (850, LOSSES + 26)),
        note(800, TEACHER - 8, "Only in training:"),
        note(800, TEACHER + 10, "this row and the losses"),
    ]
    marker = (
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L10 5 L0 10 z"/></marker>'
    )
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 320" role="img" '
        'aria-label="A teacher and its sparse autoencoder label each token with concepts; the student predicts them '
        f'after its lower blocks and mixes the prediction into its hidden states">\n<style>{STYLE}</style>\n'
        f"<defs>{marker}</defs>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(picture())
