"""The page in a real browser: steer, read, look up, stop, mistakes, several visitors, narrow and dark."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Locator, Page, expect

from cocomix.app.finding import find_concepts
from cocomix.app.guard import POLICY
from cocomix.app.limits import Limits
from cocomix.app.playground import build_playground
from cocomix.app.serving import serve
from cocomix.catalog.search import Catalog
from cocomix.inspection.runs import OpenRun

pytestmark = pytest.mark.browser

PROMPT = "The river crosses the"
TEXT = "The river crosses the stone. The letter opens the window."


def search(page: Page, box: str, words: str) -> Locator:
    """The concepts found; their list is that of the view which is open."""
    forget(page, ".hits")
    page.get_by_label(box, exact=True).fill(words)
    hits = page.locator(".hits button:visible")
    expect(hits.first).to_be_visible()
    return hits


def forget(page: Page, selector: str) -> None:
    """Take away what an earlier request made, so that it is not taken for what the next one makes."""
    page.evaluate("selector => document.querySelectorAll(selector).forEach(each => each.remove())", selector)


def steer(page: Page, concept: int, strength: float) -> None:
    search(page, "Steer a concept", str(concept)).first.click()
    set_strength(page.locator(".steered:visible").filter(has_text=re.compile(rf"\b{concept} ·")), strength)


def set_strength(row: Locator, strength: float) -> None:
    expect(row).to_be_visible()
    row.page.wait_for_timeout(500)  # while Gradio makes a slider, it puts it back to what it began with
    slider = row.get_by_role("spinbutton")
    slider.fill(str(strength))
    slider.press("Tab")


def generate(page: Page, prompt: str = PROMPT) -> tuple[str, str]:
    """The plain and the steered text."""
    page.get_by_label("Prompt").fill(prompt)
    forget(page, "#generate-message p")
    page.get_by_role("button", name="Generate").click()
    return finished(page)


def finished(page: Page) -> tuple[str, str]:
    expect(page.locator("#generate-message")).to_contain_text("Done: ")
    plain, steered = (page.locator(f"#{name} .text").inner_text() for name in ("plain", "steered"))
    return plain, steered


def expect_texts(page: Page, texts: tuple[str, str]) -> None:
    """Wait until the page shows these texts, plain and steered; what it showed before may still be there."""
    for name, text in zip(("plain", "steered"), texts, strict=True):
        expect(page.locator(f"#{name} .text")).to_have_text(text, use_inner_text=True)


def few_tokens(page: Page, tokens: int = 30) -> None:
    if not page.get_by_label("New tokens").is_visible():
        page.get_by_text("Length, temperature and seed").click()
        page.wait_for_timeout(500)  # while Gradio creates the fields, it puts them back to what they began with
    page.get_by_label("New tokens").fill(str(tokens))


def start_over(page: Page) -> None:
    """Remove the example with which the page opens."""
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".steered:visible")).to_have_count(0)
    page.get_by_label("Prompt").fill("")


def read(page: Page, text: str = TEXT) -> Locator:
    page.get_by_role("tab", name="Read").click()
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Read", exact=True).click()
    tokens = page.locator("#tokens .token")
    expect(tokens.first).to_be_visible()
    return tokens


@contextmanager
def slowly(run: OpenRun, seconds: float) -> Iterator[list[None]]:
    """Each pass of the model takes that long; the list grows by one with each."""
    passes: list[None] = []

    def wait(*_: object) -> None:
        passes.append(None)
        time.sleep(seconds)

    hook = run.model.mixer.register_forward_hook(wait)
    try:
        yield passes
    finally:
        hook.remove()


def test_steering_changes_the_text(visit, keep, opened):
    page = visit()
    expect(page).to_have_title("out / cocomix · CoCoMix")
    expect(page.locator("header")).to_contain_text("million parameters · validation loss")
    expect(page.locator("header")).to_contain_text("a model of this size illustrates the mechanics only")
    expect(page.locator(".steered:visible")).to_contain_text("typical logits here")
    keep(page, "start")
    page.get_by_role("button", name="Generate").click()
    finished(page)
    first = [page.locator(f"#{name} .chips .figure").all_inner_texts() for name in ("plain", "steered")]
    assert first[0] != first[1][:5], "the example changes no probability"
    expect(page.locator("#steered")).to_contain_text("at twice the strength")
    start_over(page)
    few_tokens(page)
    plain, same = generate(page)
    assert plain == same
    assert plain.startswith(PROMPT)
    expect(page.locator("#generate-message")).to_contain_text("No concept is steered")
    search(page, "Steer a concept", "river")
    keep(page, "search")
    steer(page, opened.catalog.steerable[0], 20)
    expect(page.locator(".steered:visible")).to_have_count(1)
    again, steered = generate(page)
    assert again == plain
    assert steered != plain
    assert steered.startswith(PROMPT)
    expect(page.locator("#steered mark")).to_be_visible()
    keep(page, "steered")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".steered:visible")).to_have_count(0)
    assert generate(page) == (plain, plain)


def test_sliders_keep_their_values_when_one_is_removed(visit):
    page = visit()
    start_over(page)
    for concept, strength in ((3, 5), (7, -8), (11, 2.5)):
        steer(page, concept, strength)
    page.get_by_role("button", name="Remove").nth(0).click()
    expect(page.locator(".steered:visible")).to_have_count(2)
    rows = page.locator(".steered:visible")
    expect(rows.nth(0)).to_contain_text("7 ·")
    expect(rows.nth(0).get_by_role("spinbutton")).to_have_value("-8")
    expect(rows.nth(1).get_by_role("spinbutton")).to_have_value("2.5")


def test_stop(visit, opened):
    page = visit()
    few_tokens(page, 50)
    page.get_by_label("Prompt").fill(PROMPT)
    with slowly(opened, 0.2) as passes:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#generate-message")).to_contain_text(re.compile(r"\d tokens …"))
        assert len(page.locator("#plain .text").inner_text()) > len(PROMPT), "the text is there before its end"
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#generate-message")).to_contain_text("Stopped.")
        page.wait_for_timeout(600)
        done = len(passes)
        page.wait_for_timeout(600)
        assert len(passes) == done < 50, "the model goes on after Stop"


def test_two_visitors_do_not_mix(visit, opened):
    first, second = visit(), visit()
    for page in (first, second):
        start_over(page)
        few_tokens(page)
    steer(first, 3, 20)
    steer(second, 40, 20)
    alone = [generate(first), generate(second)]
    assert alone[0][0] == alone[1][0]
    assert alone[0][1] != alone[1][1]
    with slowly(opened, 0.05):
        for page in (first, second):
            forget(page, "#generate-message p")
            page.get_by_role("button", name="Generate").click()
            expect(page.locator("#generate-message")).to_contain_text("tokens …")
        assert [finished(first), finished(second)] == alone
    expect(first.locator(".steered:visible")).to_have_count(1)


def test_a_token_shows_its_concepts(visit, keep):
    page = visit()
    tokens = read(page)
    assert "".join(tokens.all_inner_texts()).replace(" ", "") == TEXT.replace(" ", "")
    expect(page.locator(".legend")).to_contain_text("loss (nats)")
    tokens.nth(4).click()
    bars = page.locator("#bars li")
    expect(bars).to_have_count(8)
    expect(page.locator("#bars h3")).to_contain_text("Token 4")
    expect(tokens.nth(4)).to_have_attribute("aria-pressed", "true")
    keep(page, "token")
    search(page, "Concept to color by", "river").first.click()
    expect(page.locator(".legend")).to_contain_text("is mixed in at")
    expect(page.get_by_role("radio", name="a concept")).to_be_checked()
    keep(page, "concept")
    bars.first.click()
    expect(page.get_by_role("tab", name="Concepts")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#card dl")).to_contain_text("validation tokens")


def test_a_concept_has_a_card(visit, keep, opened):
    page = visit()
    start_over(page)
    page.get_by_role("tab", name="Concepts").click()
    expect(page.locator(".hits button:visible")).to_have_count(8)
    expect(page.locator(".hits .figure:visible").first).to_contain_text(re.compile(r"active on [\d.]+% of tokens"))
    keep(page, "start")
    hits = search(page, "Search", "river")
    at = next(at for at, hit in enumerate(hits.all()) if hit.locator("mark").count())  # it was active somewhere
    number = hits.nth(at).locator(".id").inner_text()
    assert int(number) in {found.concept_id for found in find_concepts(opened, "river", 8)}
    hits.nth(at).click()
    card = page.locator("#card")
    expect(card.locator("h3 .id")).to_have_text(number)
    expect(card).to_contain_text("Promoted tokens")
    expect(card.locator(".contexts mark").first).to_be_visible()
    predicted = re.compile(r"of [\d,]+ validation tokens \(a table of .*: [\d.]+%\)")
    expect(card.locator("dl")).to_contain_text(predicted)
    expect(card.locator("dl")).to_contain_text(re.compile(r"with a median logit of|at none of"))
    expect(page.locator("#alike button")).to_have_count(6)
    keep(page, "card")
    other = page.locator("#alike button .id").first.inner_text()
    page.locator("#alike button").first.click()
    expect(card.locator("h3 .id")).to_have_text(other)
    expect(page).to_have_url(re.compile(f"concept={other}$"))
    page.go_back()
    expect(card.locator("h3 .id")).to_have_text(number)
    page.get_by_role("button", name="Steer with it").click()
    expect(page.locator(".steered:visible").last).to_contain_text(f"{number} ·")  # after the one of the start
    page.get_by_role("tab", name="Concepts").click()
    page.get_by_role("button", name="Color a text by it").click()
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.get_by_role("button", name="Read", exact=True).click()
    expect(page.locator(".legend")).to_contain_text(f"«{number} ·")


def test_mistakes_are_said_in_the_page(visit, keep):
    page = visit()
    start_over(page)
    message = page.locator("#generate-message [role=alert]")
    page.get_by_role("button", name="Generate").click()
    expect(message).to_have_text("Enter a text first.")
    page.get_by_label("Prompt").fill("river " * 200)
    page.get_by_role("button", name="Generate").click()
    expect(message).to_contain_text("this model reads 1 to 64")
    keep(page, "long")
    page.get_by_label("Prompt").fill(PROMPT)
    few_tokens(page)
    for name, wrong, said in (
        ("New tokens", "1.5", "is 1.5; expected a whole number"),
        ("New tokens", "0", "is 0; expected a whole number from 1"),
        ("Top p", "2", "is 2.0; expected a number above 0"),
        ("Seed", "2.5", "is 2.5; expected a whole number"),
        ("Seed", "-1", "is -1; expected a whole number from 0"),
    ):
        field = page.get_by_label(name)
        right = field.input_value()
        field.fill(wrong)
        page.get_by_role("button", name="Generate").click()
        expect(message).to_contain_text(f"{name} {said}")
        field.fill(right)
    page.get_by_label("Steer a concept").fill("64")
    expect(page.get_by_text("There is no concept 64; this model has 0 to 63.")).to_be_visible()
    page.get_by_label("Steer a concept").fill("")
    steer(page, 3, 5)
    search(page, "Steer a concept", "3").first.click()
    expect(message).to_contain_text("Concept 3 is already steered")
    page.get_by_role("tab", name="Read").click()
    page.get_by_label("Text", exact=True).fill("")
    page.get_by_role("button", name="Read", exact=True).click()
    expect(page.locator("#read-message [role=alert]")).to_have_text("Enter a text first.")


EVIL = "<img src=x onerror=alert(1)></button><script>alert(2)</script>{{3}}${alert(4)}`"


def test_text_does_not_become_markup(visit, opened):
    page = visit()
    few_tokens(page, 2)
    plain, _ = generate(page, EVIL[:40])
    assert plain.startswith(EVIL[:40])
    tokens = read(page, EVIL[:40])
    tokens.nth(1).click()
    expect(page.locator("#bars li").first).to_be_visible()
    page.get_by_role("tab", name="Concepts").click()
    page.get_by_label("Search").fill(EVIL)
    expect(page.get_by_text("No concept fits.")).to_be_visible()
    assert page.locator("img[src=x], .panel script").count() == 0  # and `visit` sees every dialog


def with_catalog(run: OpenRun, catalog: Catalog | None) -> OpenRun:
    """The same run, with its model, and another catalog."""
    other = dataclasses.replace(run, catalog=catalog)
    vars(other)["model"] = run.model
    return other


def test_names_do_not_become_markup(visit, opened):
    table = opened.catalog.table
    names = table.column_names.index("name")
    evil = table.set_column(names, table.schema.field("name"), [[EVIL] * len(table)])
    catalog = Catalog(opened.catalog.folder, opened.catalog.info, evil)
    served = build_playground(with_catalog(opened, catalog), Limits())
    page = visit(at=serve(served, "127.0.0.1", None))
    expect(page.locator(".steered:visible")).to_contain_text("<img src=x")  # the example
    page.get_by_role("tab", name="Concepts").click()
    page.locator(".hits button:visible").first.click()
    expect(page.locator("#card h3")).to_contain_text("<img src=x")
    assert page.locator("img[src=x]").count() == 0
    served.close(verbose=False)


def test_by_keyboard(visit, keep):
    page = visit()
    start_over(page)
    page.get_by_label("Steer a concept").focus()
    page.keyboard.type("river")
    hits = page.locator(".hits button:visible")
    expect(hits.first).to_be_visible()
    page.keyboard.press("Tab")
    expect(hits.first).to_be_focused()
    keep(page, "hit")
    page.keyboard.press("Enter")
    expect(page.locator(".steered:visible")).to_have_count(1)
    tokens = read(page)
    tokens.first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "ArrowRight"):
        page.keyboard.press(key)
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#bars h3")).to_contain_text("Token 1")
    expect(page.locator("#tokens .token[tabindex='0']")).to_have_count(1)
    outline = tokens.nth(1).evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline == "solid"
    keep(page, "token")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(visit, keep, width, scheme):
    page = visit({"width": width, "height": 900}, scheme)
    top = page.locator("#plain").bounding_box()["y"]
    search(page, "Steer a concept", "river")
    assert page.locator("#plain").bounding_box()["y"] == top, "results move the texts"
    keep(page, "search")
    page.get_by_label("Steer a concept").fill("")
    expect(page.locator(".hits:visible")).to_have_count(0)
    start_over(page)
    few_tokens(page)
    steer(page, 3, 12)
    steer(page, 40, -6)
    page.evaluate("scrollTo(0, 0)")
    generate(page)
    if width == 400:
        assert page.locator("#plain").bounding_box()["y"] < 300, "the texts are below the fold"
    keep(page, "generate")
    check_contrast(page, "header p", "#plain .text", "#plain .prompt", "#plain small", "#steered mark")
    check_contrast(page, "#generate-message p")
    read(page).nth(4).click()
    expect(page.locator("#bars li").first).to_be_visible()
    keep(page, "read")
    check_contrast(page, "#tokens .token", ".legend", "#bars .note", "#bars .head span", "#bars .id", "#bars .figure")
    page.locator("#bars li button").first.click()
    expect(page.locator("#card dl")).to_contain_text("validation tokens")
    keep(page, "concepts")
    widths = set()
    for tab in ("Generate", "Read", "Concepts"):
        page.get_by_role("tab", name=tab).click()
        widths.add(page.locator("header").bounding_box()["width"])
    assert len(widths) == 1, "the width depends on the tab"
    check_contrast(page, ".hits .name", ".hits .figure", ".hits .where", ".hits mark")
    check_contrast(page, "#card h3", "#card .note", "#card dt", "#card dd", "#card .figure", "#card code", "#card mark")
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")


def check_contrast(page: Page, *selectors: str) -> None:
    """Every visible text that a selector finds, one at least, can be read: 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    for selector in selectors:
        found = page.locator(f"{selector}:visible").evaluate_all(
            """(elements) => elements.map((element) => {
              const behind = [];
              for (let each = element; each; each = each.parentElement) behind.push(getComputedStyle(each));
              return [element.innerText, behind[0].color, behind.map((style) => style.backgroundColor)];
            })"""
        )
        assert found, f"{selector} finds nothing"
        for text, color, layers in found:
            assert contrast(color, layers) >= 4.5, f"{selector}: {text!r}, {color} on {layers}"


def contrast(text: str, layers: list[str]) -> float:
    """Contrast of a color against backgrounds that may let through those behind them, the nearest first."""
    ground = (255.0, 255.0, 255.0)  # of the browser
    for layer in reversed(layers):
        ground = over(layer, ground)

    def luminance(color: tuple[float, ...]) -> float:
        parts = [part / 255 for part in color]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(over(text, ground)), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def over(color: str, ground: tuple[float, ...]) -> tuple[float, ...]:
    """A computed color, rgb(…) or rgba(…), on another."""
    assert color.startswith("rgb"), color
    red, green, blue, *rest = map(float, re.findall(r"[\d.]+", color))
    opacity = rest[0] if rest else 1.0
    return tuple(
        opacity * part + (1 - opacity) * behind for part, behind in zip((red, green, blue), ground, strict=True)
    )


def test_without_a_catalogue(visit, opened, keep):
    served = build_playground(with_catalog(opened, None), Limits())
    page = visit(at=serve(served, "127.0.0.1", None))
    expect(page.locator("header")).to_contain_text("` builds one")
    expect(page.locator(".steered:visible")).to_have_count(0)
    few_tokens(page)
    search(page, "Steer a concept", "3").first.click()
    set_strength(page.locator(".steered:visible"), 20)
    plain, steered = generate(page)
    assert plain != steered
    page.get_by_role("tab", name="Concepts").click()
    page.get_by_label("Search").fill("river")
    expect(page.get_by_text("'river' is not a number.")).to_be_visible()
    search(page, "Search", "3").first.click()
    expect(page.locator("#card h3")).to_contain_text("concept 3")
    keep(page, "card")
    served.close(verbose=False)


def test_links_keep_the_state(visit, opened):
    page = visit()
    start_over(page)
    few_tokens(page, 12)
    steer(page, 3, 7.5)
    row = page.locator(".steered:visible")
    row.get_by_label("Operation").click()
    page.get_by_role("option", name="Set").click()
    expect(row).to_contain_text("the concept's new logit")
    texts = generate(page)
    page.get_by_text("Copy as a link").click()
    copies = {name: page.locator(f"#{name} textarea") for name in ("link", "command", "python")}
    expect(copies["link"]).to_have_value(re.compile("#tab=generate.*steer=3%3D%3D7.5"))
    link = copies["link"].input_value()
    assert page.url == link
    expect(copies["command"]).to_have_value(re.compile("^cocomix generate .* --steer 3==7.5 --compare"))
    expect(copies["python"]).to_have_value(re.compile(r"Steering.set\({3: 7.5}\)"))
    other = visit(at=link)
    expect_texts(other, texts)
    expect(other.locator(".steered:visible").get_by_role("spinbutton")).to_have_value("7.5")
    page.reload()
    expect_texts(page, texts)
    read(page)
    expect(page).to_have_url(re.compile("#tab=read"))
    page.go_back()
    expect_texts(page, texts)


def test_positions_limit_the_steering(visit, opened):
    page = visit()
    start_over(page)
    few_tokens(page, 12)
    steer(page, 3, 20)
    positions = page.get_by_label("Steer at")
    positions.fill("60-")
    positions.press("Enter")
    plain, steered = generate(page)
    assert plain == steered
    positions.fill("x")
    positions.press("Enter")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#generate-message [role=alert]")).to_contain_text("Cannot read positions 'x'")


def test_concepts_in_order_and_in_pages(visit, opened):
    page = visit()
    page.get_by_role("tab", name="Concepts").click()
    ids = page.locator(".hits:visible .id")
    expect(page.locator(".pages")).to_contain_text("1–8 of")
    first = ids.all_inner_texts()
    page.get_by_role("button", name="Next").click()
    expect(page.locator(".pages")).to_contain_text("9–16 of")
    assert not set(first) & set(ids.all_inner_texts())
    page.get_by_label("Sort all concepts by").click()
    page.get_by_role("option", name="frequency in the teacher").click()
    expect(page.locator(".pages")).to_contain_text("1–8 of")
    frequencies = opened.catalog.table["frequency"].to_pylist()
    assert int(ids.first.inner_text()) == frequencies.index(max(frequencies))
    page.get_by_label("Sort all concepts by").click()
    page.get_by_role("option", name="predictability").click()
    page.wait_for_timeout(3000)
    expect(page.locator(".hits button:visible")).to_have_count(8)


def test_a_context_is_read(visit):
    page = visit()
    page.get_by_role("tab", name="Concepts").click()
    page.locator(".hits button:visible").first.click()
    context = page.locator("#card .contexts button").first
    token = context.locator("mark").inner_text()
    context.click()
    expect(page.get_by_role("tab", name="Read")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#tokens .token.mixed").first).to_be_visible()
    assert token.strip("␣⏎ ") in page.get_by_label("Text", exact=True).input_value()


def test_long_text_is_read(visit):
    tokens = read(visit(), TEXT * 12)
    assert tokens.count() > 64


def test_the_browser_may_load_nothing_from_elsewhere(visit, address):
    page = visit()
    response = page.request.get(address)
    assert response.headers["content-security-policy"] == POLICY
    config = page.request.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis" not in page.content() + page.request.get(f"{address}theme.css").text()
