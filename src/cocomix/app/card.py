"""Render the card of a concept as HTML; see `markup`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from cocomix.app.markup import WEIGHT, active, excerpt, percent, shown, shown_token, track
from cocomix.catalog.rows import PROMOTED_TOKENS, Concept, Context
from cocomix.common.console import visible
from cocomix.evaluation.concepts import ConceptPredictions

BINS = 24
"""Number of bars of a histogram."""


def card(concept: Concept, predictions: str) -> str:
    """Render the card of a concept.

    Args:
        concept: its row of the catalog.
        predictions: how well the model predicts it, as HTML (`predicted`, `histogram`).
    """
    strongest = max((each.activation for each in concept.contexts), default=0.0) or 1.0
    contexts = "".join(
        _context(number, each, each.activation / strongest) for number, each in enumerate(concept.contexts)
    )
    source = (
        "The name lists the tokens it promotes."
        if concept.name_source == PROMOTED_TOKENS
        else f"Named by {visible(concept.name_source)}."
    )
    activity = active(concept.frequency)
    if concept.max_activation:
        activity += f"; activation {concept.mean_activation:.3g} on average, at most {concept.max_activation:.3g}"
    facts = [
        ("in the teacher", activity),
        ("as a label", f"{concept.label_count:,} times, at {percent(concept.label_share)} of the training tokens"),
    ]
    return (
        f'<article class="card"><h3><span class="id">{concept.concept_id}</span> {shown(concept.name)}</h3>'
        f'<p class="note">{escape(source)} It is a hint, not a definition.</p>'
        f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts)}{predictions}</dl>"
        f"{_effects('Promoted tokens', concept.promoted, concept.promoted_logits, 'up')}"
        f"{_effects('Suppressed tokens', concept.suppressed, concept.suppressed_logits, 'down')}"
        "<h4>Where it is most active <small>(select a text to read it)</small></h4>"
        + (
            f'<ol class="contexts">{contexts}</ol>'
            if contexts
            else '<p class="empty">Never active in the text that the catalog was built from.</p>'
        )
        + "</article>"
    )


def bare_card(concept_id: int, predictions: str, about: str) -> str:
    """Render the card of a concept without a catalog."""
    return (
        f'<article class="card"><h3>concept <span class="id">{concept_id}</span></h3>'
        f'<p class="note">{escape(about)}</p><dl>{predictions}</dl></article>'
    )


def pending(text: str) -> str:
    """Render why there are no predictions, or not yet."""
    return f"<div><dt>predicted</dt><dd>{escape(text)}</dd></div>"


def predicted(concept_id: int, counts: ConceptPredictions) -> str:
    """Render how well the model and a table of each token's labels predict a concept."""
    labels, found = int(counts.labels[concept_id]), int(counts.model.at_k[concept_id])
    if not labels:
        return pending(f"it is not a label of any of {counts.tokens:,} validation tokens")
    recall = found / labels
    return (
        f"<div><dt>predicted</dt><dd>{track(recall, 'meter')}{percent(recall)} of the {labels:,} places where it is a "
        f"label, of {counts.tokens:,} validation tokens (a table of the current token's most frequent labels: "
        f"{percent(counts.tables.token.at_k[concept_id] / labels)}, of the last two tokens: "
        f"{percent(counts.tables.bigram.at_k[concept_id] / labels)})</dd></div>"
    )


def histogram(logits: np.ndarray, tokens: int) -> str:
    """Render the distribution of a concept's logits (N,) at the N of `tokens` tokens where it is mixed in."""
    if not len(logits):
        return f"<div><dt>mixed in</dt><dd>at none of {tokens:,} validation tokens</dd></div>"
    counts, _ = np.histogram(logits, BINS)
    bars = "".join(f'<span style="{WEIGHT.format(count)}"></span>' for count in counts / counts.max())
    low, middle, high = (f"{each:.3g}" for each in (logits.min(), np.median(logits), logits.max()))
    return (
        f"<div><dt>mixed in</dt><dd>at {percent(len(logits) / max(1, tokens))} of {tokens:,} validation tokens, with a "
        f'median logit of {middle}<span class="histogram" role="img" '
        f'aria-label="histogram of its logits, from {low} to {high}">{bars}</span>'
        f'<span class="axis"><span>{low}</span><span>logit</span><span>{high}</span></span></dd></div>'
    )


def _effects(title: str, tokens: Iterable[str], logits: Iterable[float], side: str) -> str:
    chips = "".join(
        f'<li><code>{shown_token(token)}</code> <span class="figure">{logit:+.1f}</span></li>'
        for token, logit in zip(tokens, logits, strict=True)
    )
    return f'<h4>{title} <small>(logit)</small></h4><ul class="chips {side}">{chips}</ul>'


def _context(number: int, context: Context, weight: float) -> str:
    source = f'<span class="source">{shown(context.source)}</span>' if context.source else ""
    text = escape(visible(context.before + context.token + context.after))
    return (
        f'<li><button type="button" data-context="{number}" aria-label="read: {text}">'
        f'<span class="figure">{context.activation:.3g}</span>'
        f'<span class="where" style="{WEIGHT.format(weight)}">{excerpt(context)}</span>{source}</button></li>'
    )
