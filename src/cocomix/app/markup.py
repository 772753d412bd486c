"""Render the contents of the page as HTML. All text from models, catalogs, and users is escaped here and in `card`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from cocomix.app.finding import FoundConcept
from cocomix.app.generating import Continuations
from cocomix.app.reading import BARS, Reading
from cocomix.catalog.rows import Context
from cocomix.common.console import compact, visible
from cocomix.inspection.effects import NextToken
from cocomix.inspection.similar import SimilarConcept
from cocomix.inspection.trace import TracedConcept, TracedToken

WEIGHT = "--weight: {:.3f}"
"""Intensity of a color, 0 to 1; the style sheet turns it into a background."""


def shown(text: str) -> str:
    """Return a text on one line, shortened and escaped, with line breaks and invisible characters as symbols."""
    return escape(compact(text))


def shown_token(token: str) -> str:
    """Return a token like `shown`; the blanks of one that has nothing else become visible."""
    return shown(token if token.strip() else visible(token).replace(" ", "␣"))


def title_of(concept_id: int, name: str) -> str:
    """Return a concept's number and name."""
    return f"{concept_id} · {compact(name)}" if name else f"concept {concept_id}"


def note(text: str, kind: str = "note") -> str:
    """Render a message; screen readers announce the kind `error` immediately."""
    if not text:
        return ""
    return f'<p class="message {kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>'


def error(text: object) -> str:
    """Render an error message as a sentence."""
    message = str(text)
    return note(message[:1].upper() + message[1:] + ("" if message.endswith(".") else "."), "error")


# Lists of concepts


def hits(found: Sequence[FoundConcept], action: str) -> str:
    """Render a list of concepts as buttons; `action` describes their effect for screen readers."""
    if not found:
        return '<p class="empty">No concept fits.</p>'
    return f'<ul class="hits" aria-label="concepts found">{"".join(_hit(each, action) for each in found)}</ul>'


def brief_hits(found: Sequence[FoundConcept], action: str) -> str:
    """Render concepts as a row of buttons with numbers and names only."""
    return _brief_list((each.concept_id, each.name, action, "") for each in found)


def similar(concepts: Sequence[SimilarConcept], names: Mapping[int, str]) -> str:
    """Render the concepts that are similar to the one of a card as a row of buttons."""
    rows = ((each.concept_id, names.get(each.concept_id, ""), "show", f"{each.cosine:.2f}") for each in concepts)
    return f"<h4>Similar concepts <small>(cosine of what the model mixes in)</small></h4>{_brief_list(rows)}"


def _brief_list(rows: Iterable[tuple[int, str, str, str]]) -> str:
    """Render buttons of a concept's number, name, what a click does, and a figure or none."""
    buttons = (
        f'<li><button type="button" data-concept="{concept_id}" '
        f'aria-label="{escape(f"{action} concept {title_of(concept_id, name)}")}">'
        f'<span class="id">{concept_id}</span> {shown(name)}'
        + (f' <span class="figure">{figure}</span>' if figure else "")
        + "</button></li>"
        for concept_id, name, action, figure in rows
    )
    return f'<ul class="hits brief" aria-label="concepts">{"".join(buttons)}</ul>'


def _hit(found: FoundConcept, action: str) -> str:
    name = shown(found.name) or f"concept {found.concept_id}"
    figure = "" if found.frequency is None else f'<span class="figure">{active(found.frequency)}</span>'
    where = "" if found.context is None else f'<span class="where">{excerpt(found.context)}</span>'
    label = f"{action} concept {title_of(found.concept_id, found.name)}"
    return (
        f'<li><button type="button" data-concept="{found.concept_id}" aria-label="{escape(label)}">'
        f'<span class="id">{found.concept_id}</span><span class="name">{name}</span>{figure}{where}</button></li>'
    )


def percent(share: float) -> str:
    """Format a share as a percentage with three significant digits."""
    return f"{100 * share:.3g}%"


def active(frequency: float) -> str:
    """Describe how often a concept is active in the text that the catalog was built from."""
    return f"active on {percent(frequency)} of tokens" if frequency else "never active"


def excerpt(context: Context) -> str:
    """Render a context on one line; the style sheet centers the token and cuts the text at both ends."""
    before, after = visible(context.before), visible(context.after)
    return (
        f'<span class="before">{shown(before)}</span><mark>{shown_token(context.token)}</mark>'
        f'<span class="after">{shown(after)}</span>'
    )


# Generated texts


def both(prompt: str, texts: Continuations) -> tuple[str, str]:
    """Render the plain and the steered text; the latter is marked from the first difference on."""
    pairs = zip(texts.plain, texts.steered, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(map(len, texts[:2])))
    return _continuation(prompt, texts.plain, ""), _continuation(prompt, texts.steered[:same], texts.steered[same:])


def _continuation(prompt: str, text: str, differs: str) -> str:
    mark = f"<mark>{escape(differs)}</mark>" if differs else ""
    return f'<p class="text"><span class="prompt">{escape(prompt)}</span>{escape(text)}{mark}</p>'


def next_tokens(tokens: Sequence[NextToken], when: str = "") -> str:
    """Render the most probable tokens after a prompt; `when` describes the steering."""
    chips = "".join(
        f'<li><code>{shown_token(each.token)}</code> <span class="figure">{each.probability:.1%}</span></li>'
        for each in tokens
    )
    return f'<p class="note">Most probable next tokens{escape(when)}:</p><ul class="chips">{chips}</ul>'


def panel(title: str, about: str, body: str) -> str:
    """Render a part of the page with its title."""
    return f"<h3>{escape(title)} <small>{escape(about)}</small></h3>{body}"


# A text that was read


def read_tokens(reading: Reading, values: Sequence[float], what: str) -> str:
    """Render tokens as buttons, colored by their values from 0 to the maximum; NaN has no color.

    Args:
        reading: the text.
        values: (T,) the value of each token.
        what: name of the values.
    """
    largest = max((value for value in values if not math.isnan(value)), default=0.0)
    buttons = [
        _token(at, text, value, value / largest if largest > 0 else 0.0, what)
        for at, (text, value) in enumerate(zip(reading.tokens, values, strict=True))
    ]
    return f'<div class="tokens" role="group" aria-label="tokens of the text">{"".join(buttons)}</div>'


def _token(at: int, text: str, value: float, weight: float, what: str) -> str:
    figure = f"{what} –" if math.isnan(value) else f"{what} {value:.2f}"
    style = "" if math.isnan(value) else f' style="{WEIGHT.format(min(1.0, max(0.0, weight)))}"'
    marked = " mixed" if not math.isnan(value) else ""
    # A single tab stop; the arrow keys move between the tokens.
    label = escape(f"token {at}, {visible(text)}, {figure}")
    return (
        f'<button type="button" class="token{marked}" data-position="{at}" tabindex="{0 if at == 0 else -1}"{style} '
        f'title="{escape(figure)}" aria-label="{label}">{shown(text)}</button>'
        f"{'<br>' if chr(10) in text else ''}"
    )


def legend(values: Sequence[float], what: str, about: str) -> str:
    """Render the range, maximum, and mean of the colored values."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return f'<p class="legend">{escape(about)}</p>'
    return (
        f'<p class="legend"><span class="scale"><span>0</span><span class="ramp"></span>'
        f"<span>{max(known):.2f}</span></span> {escape(what)}, at most {max(known):.2f}, on average "
        f"{sum(known) / len(known):.2f}. {escape(about)}</p>"
    )


def bars(token: TracedToken, loss: float) -> str:
    """Render the strongest concepts at a token with this loss: logits as bars, effects as bars to either side."""
    concepts = token.concepts[:BARS]
    strongest = max((abs(each.logit) for each in concepts), default=1.0) or 1.0
    effects = max((abs(each.effect) for each in concepts), default=1.0) or 1.0
    follows = "the next token" if token.next_in_text else "the model's choice for the next token"
    rest = len(token.concepts) - len(concepts)
    more = f" {rest} weaker concepts are mixed in too." if rest else ""
    surprise = "" if math.isnan(loss) else f"<small>loss {loss:.2f} nats</small>"
    return (
        f'<section class="bars" aria-label="concepts at token {token.position}">'
        f"<h3>Token {token.position} <code>{shown(token.text)}</code> {surprise}</h3>"
        f'<p class="note">Effects: what each concept adds to log p of {follows}, '
        f"<code>{shown(token.next_text)}</code> ({token.next_logprob:.2f} nats, p {math.exp(token.next_logprob):.1%}): "
        f"log p minus its value without the concept at this token.{more}</p>"
        '<div class="head" aria-hidden="true"><span>concept</span><span>strength (logit)</span>'
        "<span>effect (nats)</span></div>"
        f"<ol>{''.join(_bar(each, strongest, effects) for each in concepts)}</ol></section>"
    )


def _bar(concept: TracedConcept, strongest: float, effects: float) -> str:
    side = "up" if concept.effect > 0 else "down"
    strength = max(0.0, concept.logit) / strongest
    label = (
        f"concept {title_of(concept.concept_id, concept.name or '')}, strength {concept.logit:.2f}, "
        f"effect {concept.effect:+.3f} nats; show it"
    )
    return (
        f'<li><button type="button" data-concept="{concept.concept_id}" aria-label="{escape(label)}">'
        f'<span class="name"><span class="id">{concept.concept_id}</span> {shown(concept.name or "")}</span>'
        f'<span class="strength">{track(strength)}<span class="figure">{concept.logit:.2f}</span></span>'
        f'<span class="effect {side}">{track(abs(concept.effect) / effects)}'
        f'<span class="figure">{concept.effect:+.3f}</span></span>'
        "</button></li>"
    )


def track(share: float, kind: str = "track") -> str:
    """Render a bar that is filled to this share."""
    return f'<span class="{kind}" aria-hidden="true"><span class="fill" style="{WEIGHT.format(share)}"></span></span>'
