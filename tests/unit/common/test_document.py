"""Whatever a run contains is text in its report."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cocomix.common.document import (
    DARK,
    Block,
    Bullets,
    Heading,
    Picture,
    Table,
    literal,
    plain_text,
    to_html,
    to_markdown,
)
from property_cases import Cases

PICTURES = {"a.png": {DARK: b"2", "": b"1"}}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![](x.png)",
    "[a](javascript:alert(1))",
    "`a` \\` <b>",
    "https://evil.example www.evil.example a@evil.example",
    "a | b",
    "*a* _b_ ~~c~~ $d$ &lt; # e",
    "a\nb\x1b[31m",
]


def document(text: str) -> list[Block]:
    """A document with this text wherever a run has names, raw and as literal text."""
    return [
        Heading(1, literal(text)),
        f"raw {text}",
        f"code `{text}`",
        Table(["name", f"in {text}"], [[text, "1"]]),
        Bullets([f"item {literal(text)}"]),
        Picture("a.png", text),
    ]


def test_a_table_of_single_characters_is_a_table() -> None:
    html = MarkdownIt("commonmark").enable("table").render(to_markdown([Table(["a", "K"], [["b", "1"]])]))
    assert html.count("<td") == 2


class Elements(HTMLParser):
    """Collect the elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def elements(page: str) -> list[tuple[str, tuple[str, ...]]]:
    parser = Elements()
    parser.feed(page)
    return [each for each in parser.found if each[0] != "code"]


def check(text: str) -> None:
    page = to_html(document(text), text, PICTURES)
    assert elements(page) == elements(to_html(document("harmless"), "harmless", PICTURES))
    shown = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    markdown = shown.render(to_markdown(document(text)))
    assert elements(markdown) == elements(shown.render(to_markdown(document("harmless"))))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str) -> None:
    check(text)
    (heading,) = re.findall("<h1>(.*)</h1>", to_html([Heading(1, literal(text))], "", {}))
    assert unescape(heading) == plain_text(literal(text))
    assert not re.search(r"(?<!\\):(?=//)|www\.|(?<!\\)@", to_markdown([literal(text)]))  # GitHub links bare addresses


@Cases(100).settings
@given(st.text(alphabet="a `\\<>&!|*_[]()#\"'$~:/\n", max_size=30))
def test_no_mixture_of_signs_becomes_markup(text: str) -> None:
    check(text)


def test_a_page_has_pictures_for_light_and_dark_and_labels_for_narrow_tables() -> None:
    page = to_html([Table(["student", "loss & more"], [["a", "1"]]), Picture("a.png", "b")], "t", PICTURES)
    assert f'<source media="{DARK}" srcset="data:image/png;base64,Mg=="><img src="data:image/png;base64,MQ=="' in page
    assert '<td data-label="student">a</td><td data-label="loss &amp; more">1</td>' in page


def test_markdown_escapes_only_what_needs_it() -> None:
    text = "precision@A of a_b (c) - 95 %: 1.5 + 2 = x; «d» → e."
    assert to_markdown([text]) == text + "\n"


def test_code_and_signs_around_it() -> None:
    text = r"`a_b` is \`c\` and ` \\ 2 < 3"
    assert to_html([text], "t", {}).count(r"<p><code>a_b</code> is `c` and ` \ 2 &lt; 3</p>") == 1
    assert plain_text(text) == r"a_b is `c` and ` \ 2 < 3"
    assert to_markdown([text]) == "`a_b` is \\`c\\` and \\` \\\\ 2 \\< 3\n"
