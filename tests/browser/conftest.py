"""A small run with its catalog, the page that serves it, and a browser that looks at it.

Screenshots go to the folder that COCOMIX_SCREENSHOTS names, or to pytest's temporary one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from cocomix.app.limits import Limits
from cocomix.app.playground import build_playground
from cocomix.app.serving import serve
from cocomix.inspection.runs import OpenRun, open_run
from tiny_run import Runner, tiny_recipe, training, write_text

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the tiny recipe, up to the students, and its catalog."""
    folder = tmp_path_factory.mktemp("run")
    runner = Runner(folder)
    recipe = tiny_recipe(write_text(folder / "text"), folder / "out") | {"block_size": 64, "training": training(32_768)}
    recipe["teacher"]["training"] = training(32_768)
    runner.write(recipe)
    assert runner("train", "--only", "cocomix") == 0
    assert runner("concepts") == 0
    return folder / "out"


@pytest.fixture(scope="session")
def opened(made: Path) -> OpenRun:
    """The student, made to heed its concepts: after so short a training, steering changes half of the texts."""
    opened = open_run(made / "students" / "cocomix")
    with torch.no_grad():
        opened.model.mixer.compress_weight.mul_(10)
    return opened


@pytest.fixture(scope="session")
def address(opened: OpenRun) -> Iterator[str]:
    """Where the page of the run is."""
    page = build_playground(opened, Limits(seconds=20))
    yield serve(page, "127.0.0.1", None)
    page.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def settle(page: Page) -> None:
    """Wait until the page keeps its height: while Gradio is at work, it moves fields, and puts back their values."""
    height = None
    while height != (height := page.evaluate("document.documentElement.scrollHeight")):
        page.wait_for_timeout(700)


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """visit(size, "dark"): the page as a new visitor sees it; at the end the browser may not have met a mistake."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def check_request(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            wrong.append(f"request to {url}")

    def open_page(size: dict[str, int] = DESKTOP, scheme: str = "light", at: str = address) -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("request", lambda request: check_request(request.url))
        page.on("pageerror", lambda error: wrong.append(f"error {error}"))
        page.on("console", lambda said: wrong.append(f"console {said.text}") if said.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        with page.expect_response("**/gradio_api/heartbeat/**"):
            page.goto(at)
        settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def keep(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """keep(page, "dark"): a screenshot of the whole page; nothing in it may reach beyond its width."""
    folder = Path(os.environ.get("COCOMIX_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{request.node.name.removeprefix('test_')}-{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    return shoot
