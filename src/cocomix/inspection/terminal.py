"""Format traces and generated texts for a terminal."""

from __future__ import annotations

import textwrap
from itertools import zip_longest

from cocomix.common.console import BOLD, DIM, GREEN, RED, styled, visible
from cocomix.inspection.trace import Comparison, Trace, TracedConcept, TracedToken

HEADER = f"{'concept':>10}{'logit':>9}{'prob.':>9}{'share':>9}{'gradient':>10}{'ablated':>9}  name"
NARROW = 72
"""Terminal width in columns below which two texts do not fit side by side."""


def trace_text(trace: Trace, concepts: int) -> str:
    """Format a trace with the first `concepts` concepts of each token; green raises the next token, red lowers it."""
    blocks = [token_text(token, concepts) for token in trace.tokens]
    return "\n\n".join([styled(HEADER, DIM), *blocks, summary(trace)])


def token_text(token: TracedToken, concepts: int) -> str:
    """Format a token and its first `concepts` concepts, one line each."""
    follows = "" if token.next_in_text else " (the model's choice)"
    lines = [
        f"{token.position:>4}  {styled(f'«{visible(token.text)}»', BOLD)} → «{visible(token.next_text)}»{follows}  "
        f"log p {token.next_logprob:.3f}"
    ]
    return "\n".join([*lines, *map(_concept_line, token.concepts[:concepts])])


def _concept_line(concept: TracedConcept) -> str:
    effect = "–" if concept.ablation_effect is None else f"{concept.ablation_effect:+.3f}"
    return (
        f"{concept.concept_id:>10}{concept.logit:>+9.2f}{concept.probability:>9.1%}{concept.share:>+9.1%}"
        f"{_effect(f'{concept.gradient_effect:+.3f}', 10, concept.gradient_effect)}"
        f"{_effect(effect, 9, concept.ablation_effect or 0.0)}  {visible(concept.name or '')}"
    ).rstrip()


def _effect(text: str, width: int, effect: float) -> str:
    """Right-align an effect, colored unless it rounds to zero."""
    return styled(text.rjust(width), *([] if abs(effect) < 0.0005 else [GREEN if effect > 0 else RED]))


def summary(trace: Trace) -> str:
    """Summarize a trace, and explain its columns."""
    mixed, concepts = trace.mixture.values.shape[-1], len(trace.mixture.weight)
    lines = [
        f"{len(trace.tokens)} tokens, {mixed} of {concepts:,} concepts mixed in at each. Their parts, the biases and "
        f"the mean sum to the continuous vector within {trace.verify():.0e} of it.",
        "prob.: among all concepts; share: of the continuous vector, of which all concepts and the biases make 100%; "
        "gradient, ablated: nats that the concept adds to log p of the next token.",
    ]
    if (comparison := trace.comparison) is not None:
        lines.append(comparison_text(comparison))
    return "\n".join(lines)


def comparison_text(comparison: Comparison) -> str:
    """Describe in a sentence how far gradient and ablation agree."""
    correlation = "not defined" if comparison.correlation is None else f"{comparison.correlation:.3f}"
    agreement = "no" if comparison.sign_agreement is None else f"{comparison.sign_agreement:.1%}"
    return (
        f"Gradient against ablation, {comparison.concepts} concepts: correlation {correlation}, the same sign in "
        f"{agreement} of them, at most {comparison.largest_difference:.3f} nats apart."
    )


def side_by_side(left: str, right: str, titles: tuple[str, str], columns: int) -> str:
    """Format two texts in columns, or one below the other in a narrow terminal.

    Args:
        left, right: texts.
        titles: their titles.
        columns: width of the terminal.
    """
    if columns < NARROW:
        return f"{styled(titles[0], BOLD)}\n{left}\n\n{styled(titles[1], BOLD)}\n{right}"
    width = (columns - 3) // 2
    rows = zip_longest(_lines(left, width), _lines(right, width), fillvalue="")
    head = f"{styled(titles[0].ljust(width), BOLD)} │ {styled(titles[1], BOLD)}"
    return "\n".join([head, *(f"{one.ljust(width)} │ {other}".rstrip() for one, other in rows)])


def _lines(text: str, width: int) -> list[str]:
    wrap = textwrap.TextWrapper(width, replace_whitespace=False, drop_whitespace=False)
    return [piece for line in text.split("\n") for piece in wrap.wrap(line) or [""]]


def harmless(text: str) -> str:
    """Escape all control characters but line breaks."""
    return "\n".join(map(visible, text.expandtabs(4).split("\n")))
