"""Schedules and watches from a form to their end, and the dead messages of a real queue, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.brokers import BROKERS
from tests.server import Server, job, lengths, running, until
from tests.waiting import eventually

pytest.importorskip("playwright")

from playwright.sync_api import Page, expect
from tests.browsing import check_accessibility, log_in

from tally.sources.queues.base import Message
from tally.sources.queues.factory import open_queue

BODY = "<b>not & there</b>\u202e\x1b[31m" + "x" * 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "quick.py").write_text(lengths())
    (folder / "in").mkdir()
    for number in range(3):
        (folder / "in" / f"{number:02}.txt").write_text("x" * number)
    (folder / "inbox").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder, "--allow-host", "127.0.0.1") as server:
            yield server


@pytest.fixture
def operator(server: Server) -> str:
    with server.client() as client:
        text: str = client.post("/keys", json={"name": "ben", "role": "operator"}).json()["text"]
    return text


def test_a_schedule_is_added_and_removed(page: Page, server: Server, folder: Path) -> None:
    log_in(page, server, path="/schedules")
    page.get_by_role("link", name="Add a schedule").click()
    expect(page.get_by_role("navigation", name="Main").locator("[aria-current]")).to_have_text("Schedules")
    check_accessibility(page)
    page.get_by_label("Name").fill("from a form")
    page.get_by_label("When").fill("61 * * * *")
    fields = f"source: {folder}/in\nmodel: {folder}/quick.py\nout: {folder}/out\nworkers: 1\n"
    page.get_by_label("What it does").fill(fields)
    page.get_by_role("button", name="Add").press("Enter")
    problems = page.get_by_role("alert")
    expect(problems).to_contain_text("name: 'from a form' is not made of letters")
    expect(problems).to_contain_text("61")
    expect(page.get_by_label("What it does")).to_have_value(fields)  # nothing has to be typed again
    check_accessibility(page)
    page.get_by_label("Name").fill("from-a-form")
    page.get_by_label("When").fill("0 * * * *")
    page.get_by_role("button", name="Add").click()
    expect(problems).to_contain_text("out: names no interval")
    page.get_by_label("What it does").fill(fields.replace("/out", "/out-{interval_start}").replace("/in", "/../in"))
    page.get_by_role("button", name="Add").click()
    expect(problems).to_contain_text("not under a folder that requests may name")
    page.get_by_label("What it does").fill("source: [")
    page.get_by_role("button", name="Add").click()
    expect(problems).to_contain_text("what it does is not valid YAML")
    page.get_by_label("What it does").fill(fields.replace("/out", "/out-{interval_start}"))
    page.get_by_label("A run that is due").select_option("skip")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("heading", name="Schedule from-a-form")).to_be_visible()
    with server.client() as client:
        added = client.get("/schedules/from-a-form").json()["schedule"]
        assert (added["overlap"], added["catch_up"], added["timezone"]) == ("skip", "all", "UTC")
        page.get_by_role("button", name="Run now").click()
        past = page.get_by_role("table").filter(has=page.get_by_role("columnheader", name="Interval"))
        expect(past.get_by_text("finished")).to_be_visible()
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Remove").click()
        expect(page.get_by_text("No schedules yet.")).to_be_visible()
        assert client.get("/schedules").json() == []


def test_a_training_is_scheduled_and_leads_to_its_run(page: Page, server: Server, folder: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'tally-scoring[sklearn]'")
    lines = [f"{device},{value}" for device in range(3) for value in range(20)]
    (folder / "readings.csv").write_text("\n".join(["device,value", *lines]))
    log_in(page, server, path="/new/schedule")
    page.get_by_label("Name").fill("train")
    page.get_by_label("When").fill("0 * * * *")
    fields = (
        f"train: anomaly\nsource: {folder}/readings.csv\nby: device\nvalue: value\nregister: pumps\ngate: keyz >= 3\n"
    )
    page.get_by_label("What it does").fill(fields)
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("alert")).to_contain_text("'keyz' is not measured; did you mean 'keys'?")
    page.get_by_label("What it does").fill(fields.replace("keyz", "keys"))
    page.get_by_role("button", name="Add").click()
    page.get_by_role("button", name="Run now").click()
    outcome = page.get_by_role("cell", name="models:/pumps/1 is champion: keys is 3, and >= 3")
    expect(outcome).to_be_visible(timeout=60_000)
    check_accessibility(page)
    page.get_by_role("link", name="Schedules").first.click()
    expect(page.get_by_role("row", name="train train anomaly 0 * * * * UTC active")).to_be_visible()
    check_accessibility(page)
    page.get_by_role("row", name="train train anomaly").get_by_role("link").last.click()
    expect(page.get_by_role("heading", name="pumps")).to_be_visible()
    with server.client() as client:
        assert client.delete("/schedules/train").status_code == 204


def test_a_watch_is_added_takes_an_upload_and_is_removed(page: Page, server: Server, folder: Path) -> None:
    log_in(page, server, path="/watches")
    page.get_by_role("link", name="Add a watch").click()
    check_accessibility(page)
    page.get_by_label("Name").fill("inbox & more")
    page.get_by_label("Place").fill("/etc")
    page.get_by_label("Job", exact=True).fill(f"source: '{{url}}'\nmodel: {folder}/quick.py\nout: {folder}/seen\n")
    page.get_by_label("Jobs of this watch at once").fill("2")
    page.get_by_role("button", name="Add").click()
    problems = page.get_by_role("alert")
    expect(problems).to_contain_text("not under a folder that requests may name")
    page.get_by_label("Place").fill(str(folder / "inbox"))
    page.get_by_role("button", name="Add").click()
    expect(problems).to_contain_text("put {name} or {stem} into it")
    check_accessibility(page)
    fields = f"source: '{{url}}'\nmodel: {folder}/quick.py\nout: {folder}/seen-{{stem}}\nworkers: 1\n"
    page.get_by_label("Job", exact=True).fill(fields)
    page.get_by_role("button", name="Add").press("Enter")
    expect(page.get_by_role("heading", name="Watch inbox & more")).to_be_visible()
    expect(page.get_by_text("Nothing has come since it was added.")).to_be_visible()
    check_accessibility(page)
    (folder / "inbox" / "a.txt").write_text("four")
    seen = page.get_by_role("row").filter(has_text="a.txt")
    expect(seen).to_contain_text("finished")  # the page follows
    check_accessibility(page)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Watches").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="inbox & more"))
    expect(row).to_contain_text("active")
    expect(row).to_contain_text("1 taken")
    with server.client() as client:
        assert client.get("/watches").json()[0]["watch"]["parallel"] == 2
        until(client, "", lambda jobs: any("seen-a" in each["out"] and each["done"] for each in jobs["jobs"]))
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Remove inbox & more").click()
        expect(page.get_by_text("No watches yet.")).to_be_visible()
        assert client.get("/watches").json() == []


def test_who_may_not_remove_sees_no_button_and_is_refused(
    page: Page, server: Server, folder: Path, operator: str
) -> None:
    with server.client() as client:
        given = {"name": "kept", "cron": "0 0 * * *", "job": job(folder, "{interval_start}")}
        client.post("/schedules", json=given).raise_for_status()
        log_in(page, server, operator, path="/schedules/kept")
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
        assert page.get_by_role("button", name="Remove").count() == 0
        csrf = page.locator("input[name=csrf]").first.input_value()
        refused = page.request.post(f"{server.url}/schedules/kept/remove", form={"csrf": csrf})
        assert refused.status == 403
        forged = page.request.post(f"{server.url}/new/schedule", form={"csrf": "guessed", "name": "forged"})
        assert forged.status == 403
        assert [each["schedule"]["name"] for each in client.get("/schedules").json()] == ["kept"]
        client.delete("/schedules/kept")


@pytest.mark.parametrize("broker", ["rabbitmq", "redis-list"])
def test_dead_messages_are_shown_and_replayed(
    page: Page, server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker: str
) -> None:
    with BROKERS[broker](tmp_path, monkeypatch) as there, server.client() as client:
        queue = open_queue(there.url)
        queue.send([Message(BODY.encode()), Message(b"01.txt")])
        given = job(folder, f"from-{broker}") | {"source": [there.url], "queue": {"base": str(folder / "in")}}
        started = client.post("/jobs", json=given).raise_for_status().json()["id"]
        view = until(client, started, lambda view: view["done"] == 2 or view["state"] == "failed")
        assert (view["dead"], view["error"]) == (1, None)
        log_in(page, server, path="/queues")
        row = page.get_by_role("row").filter(has_text=started)
        expect(row).to_contain_text(re.compile(r"0 waiting.*1 dead"))
        check_accessibility(page)
        row.get_by_role("link").first.click()
        dead = page.get_by_role("group", name="Dead messages").get_by_role("row").nth(1)
        expect(dead).to_contain_text("<b>not & there</b>\\u202e\\x1b[31mxxx")  # as text
        expect(dead).to_contain_text(re.compile(r"and 4,\d\d\d more characters"))
        expect(page.get_by_role("navigation", name="Main").locator("[aria-current]")).to_have_text("Queues")
        check_accessibility(page)
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing sticks out
        client.post(f"/jobs/{started}/cancel").raise_for_status()
        until(client, started, lambda view: not view["alive"])
        page.get_by_role("button", name="Replay dead messages").press("Enter")
        expect(page.get_by_role("status")).to_have_text("Back in the queue: 1.")
        expect(page.get_by_text("There are none.")).to_be_visible()
        expect(page.get_by_text("1 waiting")).to_be_visible()
        # A consumer that is just leaving may have had it in hand once more.
        eventually(lambda: [each.body for each in queue.peek(5)] == [BODY.encode()])
        queue.close()
