"""Write the report's section on a model's concepts: best predicted concepts, a traced sentence, steered next tokens."""

from __future__ import annotations

from typing import Any

from cocomix.common.console import visible
from cocomix.common.document import Block, Bullets, Heading, Table, literal

SMALL = 10_000_000
"""Number of parameters below which a model illustrates the mechanics of steering only."""


def concept_section(shown: dict[str, Any]) -> list[Block]:
    """Return the parts of the section.

    Args:
        shown: a `Showcase` as a dictionary.
    """
    parts: list[Block] = [Heading(2, f"Concepts of `{shown['student']}`")]
    if best := shown["best"]:
        parts += [
            _best_table(best),
            f"Concepts with the best F1 on the first {shown['blocks']} blocks of validation text, among those that are "
            "labels often enough there; the same blocks select and score them. A concept counts as predicted at a "
            "token with A labels if it is among the A most probable concepts. Precision: share of these predictions "
            "that are labels. Recall: share of its labels that are predicted. Token table, bigram table: the recall of "
            "the labels that are most frequent in training with the current token, and with the previous and the "
            "current token. Names are hints: the tokens whose logits the concept raises most, unless the catalog has "
            "better names.",
        ]
    if contexts := [f"{_named(each)}: {_contexts(each['contexts'])}" for each in best if each["contexts"]]:
        parts += ["Where they are most active in the teacher:", Bullets(contexts)]
    parts += [
        Heading(3, "One sentence of validation text"),
        Bullets([_traced(step) for step in shown["trace"]]),
        "For each token, the three concepts with the largest logits. In parentheses: the concept's effect on the "
        "log-probability of the next token, in nats, measured by leaving the concept out. The last token is followed "
        "by the model's own prediction.",
    ]
    if (steered := shown.get("steered")) and steered["concepts"]:
        parts += [Heading(3, "The next token, plain and steered"), *_steered(steered)]
    return parts


def _steered(steered: dict[str, Any]) -> list[Block]:
    rows = [
        [_name(each), f"{each['plain']:.1%}", f"{each['steered']:.1%}", _tokens(each["tokens"])]
        for each in steered["concepts"]
    ]
    size = f" A model of {steered['parameters'] / 1e6:.1f}M parameters illustrates the mechanics only."
    return [
        f"After the sentence above, the model's most probable next tokens are {literal(_tokens(steered['tokens']))}. "
        f"Each row adds {steered['strength']:g} to the logit of one concept at every token, and nothing else.",
        Table(["concept", "its tokens, plain", "its tokens, steered", "most probable next tokens, steered"], rows),
        f"Its tokens: the first tokens that the concept promotes. These are the concepts with the largest increase of "
        f"{steered['ranked']:,} that are labels most often. They show that steering acts, not how well it works on "
        "average; `cocomix evaluate steering` measures that." + (size if steered["parameters"] < SMALL else ""),
    ]


def _tokens(tokens: list[Any]) -> str:
    """Format next tokens and their probabilities."""
    return ", ".join(f"«{visible(token)}» {probability:.1%}" for token, probability in tokens)


def _best_table(best: list[dict[str, Any]]) -> Table:
    keys = ("precision", "recall", "table_recall", "bigram_recall")
    rows = [
        [
            _name(each),
            f"{each['frequency']:.2%}",
            *(f"{each[key]:.1%}" if key in each else "–" for key in keys),
        ]
        for each in best
    ]
    return Table(["concept", "share of labeled tokens", "precision", "recall", "token table", "bigram table"], rows)


def _contexts(contexts: list[dict[str, Any]]) -> str:
    """Format the contexts in which a concept is active, with the token in «»."""
    return " — ".join(
        f"{literal(each['before'])}«{literal(each['token'])}»{literal(each['after'])}" for each in contexts
    )


def _traced(step: dict[str, Any]) -> str:
    """Format a token of the sentence with its concepts and their effects."""
    concepts = "; ".join(f"{_named(each)} ({each['effect']:+.2f})" for each in step["concepts"])
    text, following = literal(step["text"]), literal(step["next_text"])
    return f"«{text}» → «{following}», log p {step['next_logprob']:.2f}: {concepts}"


def _named(concept: dict[str, Any]) -> str:
    return literal(_name(concept))


def _name(concept: dict[str, Any]) -> str:
    return f"{concept['concept_id']} {concept['name'] or ''}".rstrip()
