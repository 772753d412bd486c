"""The pictures of the page in README.md and docs/app.md: python docs/make_pictures.py RUN

Needs the extra `app`, playwright and a Chromium; the run needs its catalogue, and for the last figures its labels.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from cocomix.app.limits import Limits
from cocomix.app.playground import build_playground
from cocomix.app.serving import serve
from cocomix.inspection.runs import open_run

FOLDER = Path(__file__).parent
TEXT = 'def read_file(path):\n    with open(path, encoding="utf-8") as f:\n        return f.read()\n'
SHOWN = "append"
"""A word; the first concept that is found for it is taken."""


def picture(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(300)
    page.screenshot(path=FOLDER / f"app-{name}.png", full_page=True)


def main(run: Path) -> None:
    served = build_playground(open_run(run), Limits())
    address = serve(served, "127.0.0.1", None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 640}, color_scheme="light")
        page.goto(address)
        page.wait_for_timeout(2000)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#generate-message")).to_contain_text("Done", timeout=60_000)
        picture(page, "generate")
        page.get_by_role("tab", name="Read").click()
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_role("button", name="Read", exact=True).click()
        page.locator(".token").nth(5).click()
        expect(page.locator("#bars h3")).to_be_visible()
        picture(page, "read")
        page.get_by_role("tab", name="Concepts").click()
        page.get_by_label("Search", exact=True).fill(SHOWN)
        expect(page.locator(".hits .name:visible").first).to_contain_text(SHOWN)
        page.locator(".hits button:visible").first.click()
        expect(page.locator("#card dl")).to_contain_text("validation tokens", timeout=120_000)
        picture(page, "concepts")
        browser.close()
    served.close(verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
