"""A report's section on what a model's concepts are: the best predicted, a traced sentence, a steered text."""

from __future__ import annotations

import re
from typing import Any

from cocomix.catalog.rows import visible
from cocomix.console import table


def concept_section(shown: dict[str, Any]) -> list[str]:
    """The section's parts in Markdown.

    Args:
        shown: a `Showcase` as a dictionary.
    """
    parts = [f"## What `{shown['student']}` thinks of"]
    if best := shown["best"]:
        parts += [
            _best_table(best),
            f"The concepts with the best F1 on the first {shown['blocks']} blocks of validation text, chosen and "
            "scored there, of those that are labels there often enough to tell. Precision: where a concept is among "
            "a token's most probable, as many as it has labels, how often it is one; recall: how many of its labels "
            "are found so; token table: the recall of a table of each token's most frequent training labels. Names "
            "are hints: the tokens whose logits the concept raises most, unless the catalogue has better ones.",
        ]
    if contexts := [f"- {_named(each)}: {_contexts(each['contexts'])}" for each in best if each["contexts"]]:
        parts += ["Where the teacher has them most active:", "\n".join(contexts)]
    parts += [
        "### One sentence of validation text",
        "\n".join(map(_traced, shown["trace"])),
        "At each token the three concepts with the largest logits; in brackets what each adds to the log-probability "
        "of the token that follows, nats, by leaving it out. The last one is followed by the model's own choice.",
    ]
    if sample := shown["sample"]:
        parts += [
            "### One text, plain and steered",
            "\n".join(f"- {name}: {literal(sample[name])}" for name in ("prompt", "plain", "steered")),
            f"Steered: {sample['strength']:g} standard deviations of the concept logits added to concept "
            f"{_named(sample)}, the first of the table, at every token; both texts with the same random numbers. One "
            "example, not chosen for its effect: `cocomix evaluate steering` measures effects on many.",
        ]
    return parts


def _best_table(best: list[dict[str, Any]]) -> str:
    rows = [
        [
            _named(each),
            f"{each['frequency']:.2%}",
            *(f"{each[key]:.1%}" for key in ("precision", "recall", "table_recall")),
        ]
        for each in best
    ]
    return table(["concept", "of labelled tokens", "precision", "recall", "token table"], rows)


def _contexts(contexts: list[dict[str, Any]]) -> str:
    """The places at which a concept is active, the token in «»."""
    return " — ".join(
        f"{literal(each['before'])}«{literal(each['token'])}»{literal(each['after'])}" for each in contexts
    )


def _traced(step: dict[str, Any]) -> str:
    """A token of the sentence, and what was thought at it."""
    concepts = "; ".join(f"{_named(each)} ({each['effect']:+.2f})" for each in step["concepts"])
    text, following = literal(step["text"]), literal(step["next_text"])
    return f"- «{text}» → «{following}», log p {step['next_logprob']:.2f}: {concepts}"


def _named(concept: dict[str, Any]) -> str:
    name = concept["name"]
    return f"{concept['concept_id']}" + (f" {literal(name)}" if name else "")


def literal(text: str) -> str:
    """Any text as the text that it is, in one line, wherever in Markdown it stands."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", visible(text))
