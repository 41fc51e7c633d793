"""What tests do on pages."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page
from tests.server import Server


def log_in(page: Page, server: Server, key: str | None = None, *, path: str = "/") -> None:
    page.goto(server.url + path)
    page.get_by_label("Your key").fill(server.key if key is None else key)
    page.get_by_role("button", name="Log in").click()


def state(page: Page) -> Locator:
    """What a job's page says that the job is. The same words stand beside its map of chunks, too."""
    return page.get_by_role("list", name="Where the job stands").locator(".state")


def check_accessibility(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    serious = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []
