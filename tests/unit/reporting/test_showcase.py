"""What a report shows of concepts: the sentence that is traced, and text of any kind in Markdown."""

from __future__ import annotations

import re
from html import unescape

import pytest
from markdown_it import MarkdownIt

from cocomix.catalog.rows import Context
from cocomix.common.document import to_html, to_markdown
from cocomix.data.tokenizer import train_tokenizer
from cocomix.reporting.concept_report import concept_section
from cocomix.reporting.showcase import distinct, first_sentence

ALLOWED = {"h2", "h3", "p", "code", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["abc"], 257)  # a token for each byte


def test_the_first_whole_sentence_is_traced(tokenizer) -> None:
    texts = ["of a block. Too short. This one is long enough, I say. And so on.", "other"]
    assert first_sentence(texts, tokenizer, 100) == "This one is long enough, I say."
    assert first_sentence(texts, tokenizer, 8) == "This one"
    assert first_sentence(["cut off", "def f():\n    return a + b * c\n"], tokenizer, 100) == "return a + b * c"


@pytest.mark.parametrize(("texts", "expected"), [(["", "\n", "word"], "word"), (["\n\n a"], "a"), ([""], ""), ([], "")])
def test_where_there_is_no_sentence(tokenizer, texts: list[str], expected: str) -> None:
    assert first_sentence(texts, tokenizer, 16) == expected


def test_no_character_is_cut_in_two(tokenizer) -> None:
    assert first_sentence(["x\nhe said é to me"], tokenizer, 9) == "he said"


@pytest.mark.parametrize(
    "text", ["<script>1</script>", "a|b", "`x` *y* _z_ [l](m) ![i](j)", "# 1. - \\", "&amp; ~~s~~", "$%^@:;"]
)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    concept = {"concept_id": 7, "name": text, "frequency": 0.1, "precision": 0.5, "recall": 0.5, "table_recall": 0.4}
    context = {"before": text, "token": text, "after": text}
    step = {"text": text, "next_text": text, "next_logprob": -1.0, "concepts": [concept | {"effect": 0.5}]}
    raised = {"concept_id": 7, "name": text, "plain": 0.1, "steered": 0.2, "tokens": [[text, 0.5]]}
    size = {"parameters": 10**6, "strength": 4.0, "ranked": 3}
    shown = {
        "student": "s",
        "blocks": 3,
        "best": [concept | {"contexts": [context]}],
        "trace": [step],
        "steered": size | {"prompt": text, "tokens": [[text, 0.5]], "concepts": [raised]},
    }
    section = concept_section(shown)
    markdown = MarkdownIt("commonmark").enable("table").render(to_markdown(section))
    for page in (markdown, to_html(section, text, {})):
        body = page.partition("<body>")[2] or page
        assert not {*re.findall(r"<(\w+)", body)} - ALLOWED
        assert unescape(body).count(f"7 {text}") == 4
        assert unescape(body).count(text) == 4 + 3 + 3 + 2


def test_concepts_of_the_same_places_are_shown_once() -> None:
    one, other, same = ([Context("sn", "o", "w", active, "", 4, at)] for active, at in ((2.0, 7), (2.0, 8), (1.0, 7)))
    assert distinct([5, 3, 8, 9], [one, other, same, []]) == ([5, 3, 9], [one, other, []])


def test_only_effects_that_can_be_seen_are_listed() -> None:
    near = {"concept_id": 1, "name": "⏎" + "␣" * 11, "effect": 0.01}
    step = {"text": "a", "next_text": "b", "next_logprob": -1.0, "concepts": [near, near | {"effect": -0.4}]}
    shown = {"student": "s", "blocks": 3, "best": [], "trace": [step, step | {"concepts": [near]}]}
    page = to_markdown(concept_section(shown))
    assert page.count("1 ⏎␣×11 (-0.40)") == 1 and "+0.01" not in page and "«aa»" in page
    shown["trace"] = [step | {"concepts": [near]}]
    assert "«a»: no concept changes" in to_markdown(concept_section(shown))
