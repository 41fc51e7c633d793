"""The pages in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server import Server, job, lengths, running, until

pytest.importorskip("playwright")

from playwright.sync_api import Browser, BrowserContext, Page, expect
from tests.browsing import check_accessibility, log_in, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "slow.py").write_text(lengths(pause=0.2))
    (folder / "slower.py").write_text(lengths(pause=5))
    (folder / "in").mkdir()
    for number in range(30):
        (folder / "in" / f"{number:02}.txt").write_text("x" * number)
    (folder / "in" / "<b>odd &amp; more.txt").write_text("bad")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder, "--price-per-hour", 0.9) as server:
            yield server


def test_a_job_from_the_form_to_its_results(page: Page, server: Server, folder: Path) -> None:
    log_in(page, server)
    check_accessibility(page)
    page.get_by_role("link", name="Start a job").click()
    page.get_by_label("Source").fill("/etc")
    page.get_by_label("Model").fill(str(folder / "slow.py"))
    page.get_by_label("Output").fill(str(folder / "by-form"))
    check_accessibility(page)
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("not under a folder that requests may name")
    expect(page.get_by_label("Output")).to_have_value(str(folder / "by-form"))  # nothing has to be typed again

    page.get_by_label("Source").fill(str(folder / "in"))
    page.get_by_role("button", name="Start").click()
    expect(state(page)).to_have_text("running")
    expect(page.get_by_role("progressbar", name="Progress")).to_have_attribute("value", "100")  # it moves by itself
    expect(state(page)).to_have_text("finished")
    expect(page.get_by_role("cell", name="<b>odd &amp; more.txt")).to_be_visible()  # as text
    expect(page.get_by_role("img", name=re.compile(r"^Chunks: (\d+) of \1 done, 0 running$"))).to_be_visible()
    expect(
        page.get_by_role("img", name=re.compile(r"^items (per minute|in each [\d.]+ s): lately [\d,]+, at most"))
    ).to_be_visible()
    check_accessibility(page)

    page.reload()
    expect(page.locator("#rows").get_by_role("row")).to_have_count(31)
    page.get_by_label("SQL over").fill("select count(*) as n from results")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#rows").get_by_role("cell")).to_have_count(1)
    expect(page.locator("#rows").get_by_role("cell")).to_have_text("30")
    page.get_by_label("SQL over").fill("from read_text('/etc/passwd')")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#rows").get_by_role("alert")).to_contain_text("cannot be answered")

    (folder / "in" / "<b>odd &amp; more.txt").write_text("mended")
    page.get_by_role("button", name="Replay dead items").click()
    expect(page.get_by_text("The dead items are replayed.")).to_be_visible()
    expect(page.get_by_text("31 of 31 items")).to_be_visible()
    expect(page.get_by_role("heading", name="Dead items")).to_have_count(0)


def test_a_job_is_cancelled_and_the_overview_follows(
    page: Page, context: BrowserContext, server: Server, folder: Path
) -> None:
    log_in(page, server)
    with server.client() as client:
        started = client.post("/jobs", json=job(folder, "by-click", scorer="slower", batch_size=1)).json()["id"]
        row = page.get_by_role("row").filter(has_text=started)
        expect(row.first).to_contain_text("running")  # without a reload
        workers = page.get_by_role("table").filter(has=page.get_by_role("columnheader", name="GPU memory"))
        expect(workers.get_by_role("row").filter(has_text=started)).to_contain_text(re.compile(r"\d %\s*[\d.]+ MiB"))
        expect(page.get_by_role("img", name=re.compile("^Items per minute in the last hour"))).to_be_visible()
        check_accessibility(page)
        page.get_by_role("link", name=started).first.click()
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Cancel").click()
        expect(state(page)).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        until(client, started, lambda view: view["state"] == "cancelled")


def test_logging_in_and_out(page: Page, context: BrowserContext, server: Server) -> None:
    page.goto(server.url + "/keys")
    assert page.url == server.url + "/login?then=/keys"
    check_accessibility(page)
    log_in(page, server, path="/login?then=/keys")
    expect(page.get_by_role("heading", name="Keys")).to_be_visible()
    check_accessibility(page)
    [cookie] = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Your key")).to_be_visible()
    context.add_cookies([cookie])  # as a thief would
    page.goto(server.url + "/")
    expect(page.get_by_label("Your key")).to_be_visible()


def test_other_sites_are_not_led_to(page: Page, server: Server) -> None:
    log_in(page, server, path="/login?then=//example.org/")
    assert page.url == server.url + "/"


def test_a_viewer_sees_no_buttons_and_a_forged_form_does_nothing(
    browser: Browser, page: Page, context: BrowserContext, server: Server, folder: Path
) -> None:
    with server.client() as client:
        key = client.post("/keys", json={"name": "looks on", "role": "viewer"}).json()["text"]
        started = client.post("/jobs", json=job(folder, "watched", scorer="slow", batch_size=1)).json()["id"]
        log_in(page, server, key, path=f"/jobs/{started}")
        expect(state(page)).to_have_text("running")
        assert page.get_by_role("button", name="Cancel").count() == 0
        refused = context.request.post(f"{server.url}/jobs/{started}/cancel", form={"csrf": "guessed"})
        assert refused.status == 403
        assert client.get(f"/jobs/{started}").json()["state"] == "running"
        client.post(f"/jobs/{started}/cancel")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_both_schemes(browser: Browser, server: Server, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    log_in(page, server)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing sticks out
    check_accessibility(page)
    context.close()


def test_without_a_mouse(page: Page, server: Server) -> None:
    log_in(page, server)
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Start a job")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Start a job")).to_be_visible()
