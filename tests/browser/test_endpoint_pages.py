"""Kept endpoints in a real browser: what they do, their changes, and a picture to try them with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from tests.server import Server, running

pytest.importorskip("playwright")
pytest.importorskip("msgspec")

from playwright.sync_api import Locator, Page, expect
from tests.browsing import check_accessibility, log_in

SCORER = """
import tally

class Finder(tally.Scorer):
    columns = {"label": "string", "score": "float64", "xmin": "float64", "ymin": "float64", "xmax": "float64",
               "ymax": "float64"}

    def score(self, batch):
        return [[{"label": LABEL, "score": 0.87, "xmin": 20.0, "ymin": 10.0, "xmax": 80.0, "ymax": 60.0},
                 {"label": "<b>lid</b>", "score": 0.5, "xmin": 100.0, "ymin": 20.0, "xmax": 140.0, "ymax": 90.0}]
                for _ in batch]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for label in ("bottle", "can"):
        (folder / f"{label}.py").write_text(SCORER.replace("LABEL", repr(label)))
    Image.new("RGB", (160, 120), (120, 140, 150)).save(folder / "street.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TALLY_ENDPOINT_KEY", "a-key,another")  # which the endpoint asks for, and the page sends
        with running("--root", folder) as server:
            yield server


@pytest.fixture
def plastic(server: Server, folder: Path) -> Iterator[str]:
    """An endpoint with two versions."""
    with server.client() as client:
        asked = {"name": "plastic", "model": f"{folder}/bottle.py", "port": 0}
        client.post("/endpoints", json=asked).raise_for_status()
        beside = {"model": f"{folder}/can.py", "share": 0.0}
        client.post("/endpoints/plastic/versions", json=beside).raise_for_status()
        yield "plastic"
        client.delete("/endpoints/plastic")


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="Where the endpoint stands")


def fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1100, "height": 800})


def test_without_an_endpoint_the_page_says_how_to_make_one(page: Page, server: Server) -> None:
    log_in(page, server, path="/endpoints")
    expect(page.get_by_text("No endpoints yet.")).to_contain_text("with the button above, or from a terminal")
    expect(page.get_by_role("navigation", name="Main").locator("[aria-current]")).to_have_text("Endpoints")
    check_accessibility(page)


def make(page: Page, folder: Path, name: str) -> None:
    """Have a model kept online, and another beside it, with the forms."""
    page.get_by_role("link", name="Keep a model online").click()
    check_accessibility(page)
    fits_a_phone(page)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Model").fill(f"{folder}/bottle.py")
    page.get_by_label("Replicas").fill("1..")
    page.get_by_label("Port").fill("0")
    page.get_by_role("button", name="Keep it online").click()
    expect(page.get_by_role("alert")).to_contain_text("replicas: '1..' is neither a number nor a range")
    expect(page.get_by_label("Model")).to_have_value(f"{folder}/bottle.py")
    page.get_by_label("Replicas").fill("1")
    page.get_by_role("button", name="Keep it online").press("Enter")
    expect(tiles(page)).to_contain_text("1 of 1 replicas ready")
    page.get_by_label("Another version").fill(f"{folder}/none.py")
    page.get_by_label("Its share of the requests").fill("0")
    page.get_by_role("button", name="Serve it").click()
    expect(page.locator("#message").get_by_role("alert")).to_contain_text("there is no model at")
    page.get_by_label("Another version").fill(f"{folder}/can.py")
    with page.expect_response(lambda each: each.request.method == "GET" and each.url.endswith(f"/endpoints/{name}")):
        page.get_by_role("button", name="Serve it").click()
    expect(page.locator("#message")).to_contain_text("served once it is loaded")
    expect(tiles(page)).to_contain_text("revision 2")
    page.goto(page.url.rpartition("/")[0])


def test_an_endpoint_is_made_tried_changed_and_deleted(page: Page, server: Server, folder: Path) -> None:
    plastic = "plastic"
    log_in(page, server, path="/endpoints")
    make(page, folder, plastic)
    row = page.get_by_role("row").filter(has_text=plastic)
    expect(row).to_contain_text("ready")
    expect(row).to_contain_text("1: 100 %")
    check_accessibility(page)
    fits_a_phone(page)
    row.get_by_role("link").press("Enter")
    expect(page.get_by_role("heading", name="Endpoint plastic")).to_be_visible()
    expect(tiles(page)).to_contain_text("1 of 1 replicas ready")

    page.get_by_label("A picture, or another file").set_input_files(folder / "street.jpg")
    page.get_by_role("button", name="Score it").press("Enter")
    answer = page.locator("#answer")
    expect(answer.get_by_role("status")).to_contain_text(re.compile(r"status 200 in .* by version 1"))
    expect(answer.get_by_role("row").nth(1)).to_contain_text("bottle0.87201080")
    expect(answer).to_contain_text("<b>lid</b>")  # as text
    picture = answer.get_by_role("img", name="The picture, with what was found")
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 160
    # It is live: what was just asked is counted without a reload.
    versions = page.get_by_role("group", name="Versions").get_by_role("row")
    expect(versions.nth(1)).to_contain_text(re.compile(r"\d ms"))
    expect(page.get_by_role("heading", name="Sizes of batches")).to_be_visible()
    check_accessibility(page)
    page.emulate_media(color_scheme="dark")
    check_accessibility(page)
    page.emulate_media(color_scheme="light")
    fits_a_phone(page)

    page.get_by_label("A picture, or another file").set_input_files(folder / "notes.txt")
    page.get_by_role("button", name="Score it").click()
    expect(answer.get_by_role("status")).to_contain_text("status 422")
    expect(answer.get_by_role("img")).to_have_count(0)

    page.get_by_label("Share of version 1").fill("1")
    page.get_by_label("Share of version 2").fill("3")
    page.get_by_label("Copies for version 1").fill("50")
    with page.expect_response(lambda each: each.request.method == "GET" and each.url.endswith(f"/endpoints/{plastic}")):
        page.get_by_role("button", name="Share out").click()  # and the forms are asked for anew
    expect(page.locator("#message")).to_contain_text("shared out anew")
    expect(tiles(page)).to_contain_text("2 of 2 replicas ready")
    expect(versions.nth(2)).to_contain_text("75 %")
    expect(versions.nth(1)).to_contain_text(re.compile(r"25 %\s+50 %"))
    page.get_by_label("Replicas of each version").fill("none")
    page.get_by_role("button", name="Scale").click()
    expect(page.locator("#message").get_by_role("alert")).to_contain_text("neither a number nor a range")
    page.get_by_label("Replicas of each version").fill("2")
    page.get_by_role("button", name="Scale").click()
    expect(page.get_by_role("group", name="Replicas").get_by_text("ready")).to_have_count(4)
    expect(page.get_by_label("Replicas of each version")).to_have_value("2")
    page.get_by_role("button", name="Roll back to revision 3").press("Enter")
    expect(page.get_by_role("group", name="Replicas").get_by_text("ready")).to_have_count(2)
    expect(tiles(page)).to_contain_text("revision 5")
    (folder / "can.py").write_text((folder / "can.py").read_text() + "# a better one\n")
    page.get_by_role("button", name="Look its model up again").click()
    expect(tiles(page)).to_contain_text("revision 6")
    expect(tiles(page)).to_contain_text("2 of 2 replicas ready")
    expect(versions.filter(has_text="can.py")).to_contain_text(re.compile(r"^\s*3.*75 %", re.DOTALL))
    expect(page.get_by_role("group", name="The last lines of its processes")).to_contain_text("revision 6 of plastic")
    check_accessibility(page)

    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No endpoints yet.")).to_be_visible()
    with server.client() as client:
        done = {each["action"] for each in client.get("/audit").json()}
    made = {"add_endpoint", "serve_version", "try_endpoint", "split_endpoint", "scale_endpoint", "roll_back_endpoint"}
    assert made | {"remove_endpoint"} <= done


def test_who_may_only_look_sees_no_form_and_is_refused(page: Page, server: Server, plastic: str, folder: Path) -> None:
    with server.client() as client:
        viewer = client.post("/keys", json={"name": "cy", "role": "viewer"}).json()["text"]
        operator = client.post("/keys", json={"name": "ben", "role": "operator"}).json()["text"]
    log_in(page, server, viewer, path=f"/endpoints/{plastic}")
    expect(tiles(page)).to_contain_text("ready")
    assert page.locator("#change, input[type=file]").count() == 0
    assert page.get_by_role("button").all_inner_texts() == ["Log out"]
    csrf = page.locator("input[name=csrf]").first.input_value()
    url = f"{server.url}/endpoints"
    picture = {"name": "street.jpg", "mimeType": "image/jpeg", "buffer": (folder / "street.jpg").read_bytes()}
    for path in ("scale", "split", "reload", "rollback", "remove"):
        refused = page.request.post(f"{url}/{plastic}/{path}", form={"csrf": csrf, "replicas": "3"})
        assert refused.status == 403, path
    tried = page.request.post(f"{url}/try", multipart={"csrf": csrf, "name": plastic, "file": picture})
    assert tried.status == 403
    page.get_by_role("button", name="Log out").click()
    log_in(page, server, operator, path=f"/endpoints/{plastic}")
    expect(page.get_by_role("button", name="Score it")).to_be_visible()
    assert page.get_by_role("button", name="Delete").count() == 0
    forged = page.request.post(f"{url}/{plastic}/scale", form={"csrf": "guessed", "replicas": "3"})
    assert forged.status == 403


def test_without_scripts_a_file_is_scored_all_the_same(server: Server, plastic: str, folder: Path) -> None:
    with httpx2.Client(base_url=server.url, headers={"Accept": "text/html"}, timeout=60) as browser:
        browser.post("/login", data={"key": server.key})
        shown = browser.get(f"/endpoints/{plastic}").text
        csrf = re.search(r'name="csrf" value="(\w+)"', shown)
        assert csrf is not None
        given = {"csrf": csrf[1], "name": plastic}
        nothing = browser.post("/endpoints/try", data=given, files={"file": ("", b"")})
        assert "no file was chosen" in nothing.text
        assert nothing.status_code == 409
        scaled = browser.post(f"/endpoints/{plastic}/scale", data={**given, "replicas": "1"})
        assert (scaled.status_code, scaled.headers["location"]) == (303, f"/endpoints/{plastic}")
        missing = browser.post("/endpoints/try", data={**given, "name": "none"}, files={"file": ("a.jpg", b"x")})
        assert missing.status_code == 404
