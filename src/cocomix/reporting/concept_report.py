"""Write the report's section on a model's concepts: best predicted concepts, a traced sentence, steered next tokens."""

from __future__ import annotations

from typing import Any

from cocomix.common.console import compact, visible
from cocomix.common.document import Block, Bullets, Heading, Table, literal
from cocomix.inspection.effects import SMALL

NOTABLE = 0.05
"""Smallest effect on a log-probability that is shown, in nats."""


def concept_section(shown: dict[str, Any]) -> list[Block]:
    """Return the parts of the section.

    Args:
        shown: a `Showcase` as a dictionary.
    """
    parts: list[Block] = [Heading(2, f"Concepts of `{shown['student']}`")]
    if best := shown["best"]:
        parts += [
            _best_table(best),
            "Concepts where the student is furthest ahead of tables that read only one or two tokens, by F1 on "
            f"{shown['blocks']} blocks of validation text, which both select and score them. A small model may be "
            "ahead nowhere; the table then begins with the concepts where it is closest. Precision: of the tokens "
            "where the concept is among the model's top A (A: the token's number of labels), the share where it is a "
            "label. Recall: the share of its labels found that way; token table and bigram table: the recall of a "
            "table of the current token, and of the last two. Names are hints: the tokens that the concept "
            "promotes most, unless the catalog has better names.",
        ]
    if contexts := [f"{_named(each)}: {_contexts(each['contexts'])}" for each in best if each["contexts"]]:
        parts += ["Where they are most active in the teacher:", Bullets(contexts)]
    parts += [Heading(3, "One sentence of validation text"), *_trace(shown["trace"])]
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


def _trace(steps: list[dict[str, Any]]) -> list[Block]:
    """Show the sentence, and where a concept changes what the model expects."""
    sentence = f"«{literal(''.join(step['text'] for step in steps))}»"
    notable = [
        (step, found)
        for step in steps
        if (found := [each for each in step["concepts"] if abs(each["effect"]) >= NOTABLE])
    ]
    if not notable:
        return [f"{sentence}: no concept changes the log-probability of a next token by {NOTABLE:g} nats or more."]
    return [
        sentence,
        Bullets([_traced(step, found) for step, found in notable]),
        f"What concepts change: token, next token, its log-probability, and in parentheses how much of it each of the "
        f"three strongest concepts adds, in nats, measured by leaving the concept out. Effects below {NOTABLE:g} nats "
        "are left out. The last token is followed by the model's own prediction.",
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


def _traced(step: dict[str, Any], concepts: list[dict[str, Any]]) -> str:
    """Format a token of the sentence with concepts and their effects."""
    effects = "; ".join(f"{_named(each)} ({each['effect']:+.2f})" for each in concepts)
    text, following = literal(step["text"]), literal(step["next_text"])
    return f"«{text}» → «{following}», log p {step['next_logprob']:.2f}: {effects}"


def _named(concept: dict[str, Any]) -> str:
    return literal(_name(concept))


def _name(concept: dict[str, Any]) -> str:
    return f"{concept['concept_id']} {compact(concept['name'] or '')}".rstrip()
