"""Render a trace as a self-contained web page, light and dark, for wide screens and phones."""

from __future__ import annotations

import html

from cocomix.common.console import visible
from cocomix.common.html_page import html_page
from cocomix.inspection.terminal import summary
from cocomix.inspection.trace import Trace, TracedConcept, TracedToken

_STYLE = """
  :root { --up: #1a7f37; --down: #b42318; --line: #8885; }
  @media (prefers-color-scheme: dark) { :root { --up: #5fd38a; --down: #ff8f85; } }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; }
  h1 { font-size: 1.3rem; }
  .text { font: 1rem/2.1 ui-monospace, monospace; overflow-wrap: anywhere; }
  .text a { color: inherit; text-decoration: none; padding: .2rem .1rem; border-radius: .25rem; white-space: pre-wrap;
    border: 1px solid var(--line);
    background: color-mix(in srgb, var(--effect, transparent) calc(var(--strength, 0) * 45%), transparent); }
  .text a:hover, .text a:focus-visible { outline: 2px solid currentColor; }
  section { border-top: 1px solid var(--line); padding: .6rem 0; scroll-margin-top: 1rem; }
  section:target { background: #8882; }
  h2 { font-size: 1rem; font-weight: normal; margin: 0 0 .3rem; overflow-wrap: anywhere; }
  h2 code { font-weight: bold; white-space: pre-wrap; }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
  th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; }
  th { font-weight: normal; opacity: .75; }
  :is(th, td):last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; width: 45%;
    min-width: 8rem; }
  @media (max-width: 40rem) {
    table, tbody { display: block; }
    tr { display: grid; grid-template-columns: repeat(6, 1fr); padding: .15rem 0; }
    th, td { padding: 0; font-size: .8rem; }
    :is(th, td):last-child { grid-column: 1 / -1; width: auto; padding-left: .6rem; opacity: .85; }
  }
  .up { color: var(--up); }
  .down { color: var(--down); }
  footer { border-top: 1px solid var(--line); padding: .6rem 0; opacity: .8; font-size: .9rem; }
"""
_BODY = """<h1>{title}</h1>
<p class="text">{text}</p>
<p>Tap a token for its concepts. Its color shows the largest effect of a concept on the next token: green raises it,
red lowers it.</p>
{tokens}
<footer>{footer}</footer>"""
_HEADER = "<tr><th>concept<th>logit<th>prob.<th>share<th>gradient<th>ablated<th>name</tr>"


def trace_page(trace: Trace, title: str, concepts: int) -> str:
    """Render a trace.

    Args:
        trace: trace to show.
        title: title of the page.
        concepts: number of concepts per token to show.
    """
    effects = [max((concept.effect for concept in token.concepts), key=abs) for token in trace.tokens]
    scale = max(map(abs, effects), default=0.0) or 1.0
    body = _BODY.format(
        title=html.escape(title),
        text="".join(_chip(token, effect / scale) for token, effect in zip(trace.tokens, effects, strict=True)),
        tokens="\n".join(_section(token, concepts) for token in trace.tokens),
        footer="<br>".join(map(html.escape, summary(trace).splitlines())),
    )
    return html_page(title, _STYLE, body)


def _chip(token: TracedToken, effect: float) -> str:
    color = "up" if effect > 0 else "down"
    broken = "<br>" if token.text.endswith("\n") else "<wbr>"
    style = f"--effect: var(--{color}); --strength: {abs(effect):.2f}"
    return f'<a href="#t{token.position}" style="{style}">{html.escape(visible(token.text))}</a>{broken}'


def _section(token: TracedToken, concepts: int) -> str:
    follows = "" if token.next_in_text else " (the model’s choice)"
    rows = "\n".join(map(_row, token.concepts[:concepts]))
    return (
        f'<section id="t{token.position}"><h2>{token.position} <code>{html.escape(visible(token.text))}</code> → '
        f"<code>{html.escape(visible(token.next_text))}</code>{follows}, log p {token.next_logprob:.3f}</h2>"
        f"<table>{_HEADER}\n{rows}</table></section>"
    )


def _row(concept: TracedConcept) -> str:
    name = html.escape(visible(concept.name or ""))
    return (
        f"<tr><td>{concept.concept_id}<td>{concept.logit:+.2f}<td>{concept.probability:.1%}<td>{concept.share:+.1%}"
        f"{_effect(concept.gradient_effect)}{_effect(concept.ablation_effect)}<td>{name}</tr>"
    )


def _effect(effect: float | None) -> str:
    if effect is None:
        return "<td>–"
    color = "" if abs(effect) < 0.0005 else f' class="{"up" if effect > 0 else "down"}"'
    return f"<td{color}>{effect:+.3f}"
