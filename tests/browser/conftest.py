"""A real browser: Chromium, without a screen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from tests.server import PATIENCE
from tests.services import require

pytest.importorskip("playwright")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")  # while Playwright runs, no other test may run an event loop
def browser() -> Iterator[Browser]:
    path = os.environ.get("TALLY_TEST_CHROMIUM") or shutil.which("chromium")
    require("Chromium (apt-get install chromium, or TALLY_TEST_CHROMIUM)", path is not None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab whose console must be empty by the end, but for what Chromium itself says of a form that was refused."""
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    assert [text for text in said if "422 (Unprocessable" not in text] == []
