"""Models, schedules, watches, queues, uploads and SQL, in a real browser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tests.server import Server, job, lengths, running, until

pytest.importorskip("playwright")

from playwright.sync_api import Page, expect
from tests.browsing import check_accessibility, log_in
from tests.workflows import waiting

import tally
from tally.jobs.facade import Jobs
from tally.pipelines.steps import room
from tally.training.sweeps.store import SweepStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "quick.py").write_text(lengths())
    (folder / "other.py").write_text(lengths(pause=0.001))
    (folder / "in").mkdir()
    for number in range(30):
        (folder / "in" / f"{number:02}.txt").write_text("x" * number)
    (folder / "inbox").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder) as server:
            yield server


def test_empty_pages_say_what_to_do(page: Page, server: Server) -> None:
    log_in(page, server)
    for name, hint in [
        ("Models", "tally models add"), ("Schedules", "tally schedule add"), ("Watches", "tally watch add"),
        ("Queues", "tally score amqp://"), ("Runs", "tally train script"), ("Pipelines", "tally pipeline run"),
    ]:  # fmt: skip
        page.get_by_role("navigation", name="Main").get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        expect(page.get_by_text(hint)).to_be_visible()
        check_accessibility(page)


def test_a_model_and_a_picture_from_the_browser_give_results_without_any_folder(
    page: Page, server: Server, tmp_path: Path
) -> None:
    """What a fresh server needs: nothing but a model and a file."""
    (tmp_path / "dropped.py").write_text(lengths())
    (tmp_path / "a.txt").write_text("12345")
    log_in(page, server, path="/models")
    check_accessibility(page)
    page.get_by_label("Model").fill("dropped")
    page.get_by_label("Its files").set_input_files([tmp_path / "a.txt"])
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("alert")).to_contain_text("a.txt")
    expect(page.get_by_label("Model")).to_have_value("dropped")
    page.get_by_label("Its files").set_input_files([tmp_path / "dropped.py"])
    page.get_by_label("Alias").fill("champion")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("heading", name="dropped")).to_be_visible()
    expect(page.get_by_role("button", name="Roll back champion")).to_be_visible()

    page.goto(f"{server.url}/jobs/new?model=models:/dropped@champion")
    page.get_by_label("Model").fill("models:/droped")
    page.get_by_label("Or bring files along").set_input_files([tmp_path / "a.txt"])
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("there is no model 'droped' in the registry")
    page.get_by_label("Model").fill("models:/dropped@champion")  # the file has not to be brought again
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("1 of 1 items")).to_be_visible()
    expect(page.get_by_role("cell", name="a.txt")).to_be_visible()
    expect(page.get_by_role("group", name="The coordinator")).to_contain_text("is finished")
    check_accessibility(page)
    with server.client() as client:
        made = client.post("/keys", json={"name": "looks", "role": "viewer"}).raise_for_status().json()["text"]
    page.get_by_role("button", name="Log out").click()
    log_in(page, server, made, path="/models")
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    expect(page.get_by_role("button", name="Add")).to_have_count(0)


def test_a_detector_and_its_labels_are_dropped_together(page: Page, server: Server, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    kind = onnx.TensorProto.FLOAT
    (given, found) = (helper.make_tensor_value_info(name, kind, [1, 3, 8, 8]) for name in ("x", "y"))
    pool = helper.make_node("GlobalAveragePool", ["x"], ["p"])
    flat = helper.make_node("Flatten", ["p"], ["y"])
    found = helper.make_tensor_value_info("y", kind, [1, 3])
    graph = helper.make_graph([pool, flat], "g", [given], [found])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "colour.onnx")
    (tmp_path / "colours.txt").write_text("red\ngreen\nblue\n")
    log_in(page, server, path="/models")
    page.get_by_label("Model").fill("colour")
    page.get_by_label("Its files").set_input_files([tmp_path / "colour.onnx", tmp_path / "colours.txt"])
    page.get_by_label("Task").select_option("classify")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("heading", name="colour")).to_be_visible()
    PIL = pytest.importorskip("PIL.Image")
    PIL.new("RGB", (8, 8), "green").save(tmp_path / "g.png")
    page.get_by_role("link", name="Start a job with it").click()
    page.get_by_label("Or bring files along").set_input_files([tmp_path / "g.png"])
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("1 of 1 items")).to_be_visible()
    expect(page.get_by_role("cell", name="green").first).to_be_visible()


def test_a_job_like_another_has_all_that_was_asked_for(page: Page, server: Server, folder: Path) -> None:
    spaced = folder / "two words"
    spaced.mkdir()
    (spaced / "a.txt").write_text("12345")
    first = job(folder, out=str(folder / "first"), source=[str(spaced)], workers=1, max_dead=0.25, log=True)
    with server.client() as client:
        made = client.post("/jobs", json=first).raise_for_status().json()["id"]
    log_in(page, server, path=f"/jobs/{made}")
    expect(page.get_by_text("1 of 1 items")).to_be_visible()
    page.get_by_role("link", name="Start one like it").click()
    expect(page.get_by_label("Source")).to_have_value(str(spaced))
    more = page.get_by_label("Everything else that a job file has")
    expect(more).to_have_value(re.compile(r"max_dead: 0\.25\n"))
    check_accessibility(page)
    page.get_by_label("Output").fill(str(folder / "second"))
    more.fill("max_dead: 0.125\nmodel: other")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("model: has a field of its own above")
    expect(more).to_have_value("max_dead: 0.125\nmodel: other")
    more.fill("max_dead: 0.125\nlog: true\n")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("1 of 1 items")).to_be_visible()
    with server.client() as client:
        second = client.get("/jobs", params={"out": str(folder / "second")}).json()["jobs"][0]["id"]
        spec = client.get(f"/jobs/{second}").json()["spec"]
    assert (spec["max_dead"], spec["log"], spec["source"]) == (0.125, True, [str(spaced)])


def test_jobs_like_one_that_ran_are_scheduled(page: Page, server: Server, folder: Path) -> None:
    first = job(folder, out=str(folder / "once.csv"), workers=1)
    with server.client() as client:
        made = client.post("/jobs", json=first).raise_for_status().json()["id"]
    log_in(page, server, path=f"/jobs/{made}")
    page.get_by_role("link", name="Schedule jobs like it").click()
    expect(page.get_by_label("What it does")).to_have_value(
        re.compile(re.escape(f"out: {folder}/once-{{interval_start_utc:%Y-%m-%dT%H%M}}.csv\n"))
    )
    page.get_by_label("Name").fill("like-it")
    page.get_by_label("When").fill("0 * * * *")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_role("heading", name="Schedule like-it")).to_be_visible()


def test_a_model_is_rolled_back_and_a_job_started_with_it_and_an_upload(
    page: Page, server: Server, folder: Path, tmp_path: Path
) -> None:
    with server.client() as client:
        for name in ("quick", "other"):
            given = {"model": str(folder / f"{name}.py"), "alias": "champion"}
            client.post("/models/lengths/versions", json=given).raise_for_status()
    log_in(page, server, path="/models")
    page.get_by_role("link", name="lengths").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name="Roll back champion"))
    expect(row).to_contain_text("2")
    check_accessibility(page)
    page.get_by_role("button", name="Roll back champion").press("Enter")
    expect(page.get_by_role("status")).to_have_text("champion points at version 1.")
    expect(row).to_contain_text("1")  # the page follows
    page.get_by_role("button", name="Roll back champion").click()
    expect(page.get_by_role("alert")).to_be_visible()

    page.get_by_label("Alias", exact=True).fill("Staging")
    page.get_by_role("button", name="Set alias").click()
    expect(page.get_by_role("alert")).to_contain_text("the alias 'Staging' is not allowed")
    page.get_by_label("Alias", exact=True).fill("staging")
    page.get_by_label("Version", exact=True).select_option("2")
    page.get_by_role("button", name="Set alias").press("Enter")
    expect(page.get_by_role("status")).to_have_text("staging points at version 2.")
    check_accessibility(page)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove staging").click()
    expect(page.get_by_role("status")).to_have_text("staging is removed.")
    expect(page.get_by_role("button", name="Remove staging")).to_have_count(0)
    history = page.get_by_role("group", name="Aliases over time").get_by_role("row")
    expect(history.nth(1)).to_contain_text(re.compile("staging.*2.*remove.*first admin", re.DOTALL))

    page.get_by_role("link", name="Start a job with it").click()
    expect(page.get_by_label("Model")).to_have_value("models:/lengths")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    page.get_by_label("Or bring files along").set_input_files([tmp_path / "a.txt", tmp_path / "b.txt"])
    page.get_by_label("Output").fill("/nowhere")
    check_accessibility(page)
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("not under a folder that requests may name")
    expect(page.get_by_label("Source")).to_have_value(re.compile("/uploads/"))  # nothing has to be sent again
    page.get_by_label("Output").fill(str(folder / "uploaded"))
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("2 of 2 items")).to_be_visible()
    expect(page.get_by_text("finished", exact=True)).to_be_visible()


def test_a_schedule_is_paused_resumed_and_run_now(page: Page, server: Server, folder: Path) -> None:
    with server.client() as client:
        given = job(folder, "hours-{interval_start}")
        client.post("/schedules", json={"name": "hourly", "cron": "0 * * * *", "job": given}).raise_for_status()
    log_in(page, server, path="/schedules")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="hourly"))
    page.get_by_role("button", name="Pause hourly").click()
    expect(row.get_by_text("paused")).to_be_visible()
    page.get_by_role("button", name="Resume hourly").click()
    expect(row.get_by_text("active")).to_be_visible()
    check_accessibility(page)
    page.get_by_role("link", name="hourly").click()
    expect(page.get_by_role("listitem").filter(has_text="UTC to")).to_have_count(5)
    page.get_by_role("button", name="Run now").press("Enter")
    past = page.get_by_role("table").filter(has=page.get_by_role("columnheader", name="Interval"))
    expect(past.get_by_text("finished")).to_be_visible()
    check_accessibility(page)
    past.get_by_role("link").click()
    expect(page.get_by_text("30 of 30 items")).to_be_visible()


def test_a_watch_is_paused_and_goes_on(page: Page, server: Server, folder: Path) -> None:
    with server.client() as client:
        given = {"name": "in <box>", "place": str(folder / "inbox"), "job": job(folder, "{name}", source=["{url}"])}
        client.post("/watches", json=given).raise_for_status()
    log_in(page, server, path="/watches")
    row = page.get_by_role("row").filter(has_text="in <box>")
    check_accessibility(page)
    row.get_by_role("button", name="Pause in <box>").click()
    expect(row.get_by_text("paused")).to_be_visible()
    row.get_by_role("button", name="Resume in <box>").click()
    expect(row.get_by_text("active")).to_be_visible()


def test_queues_of_jobs_are_listed_with_what_keeps_them_from_being_asked(
    page: Page, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLY_HOME", server_home(server))
    given = {**job(folder, "from-queue"), "source": ["redis://127.0.0.1:1/orders"]}
    Jobs().store.create(fingerprint="f", spec=given, model={}, output={"kind": "rows", "place": given["out"]})
    log_in(page, server, path="/queues")
    row = page.get_by_role("row").filter(has_text="redis://127.0.0.1:1/orders")
    expect(row).to_contain_text("private address")
    expect(row).to_contain_text("tally up --allow-host HOST")
    check_accessibility(page)


def server_home(server: Server) -> str:
    return psutil.Process(server.process.pid).environ()["TALLY_HOME"]


def test_sql_has_an_address_and_its_answer_is_a_file(page: Page, server: Server, folder: Path, tmp_path: Path) -> None:
    with server.client() as client:
        started = client.post("/jobs", json=job(folder, "asked")).json()["id"]
        until(client, started, lambda view: view["state"] == "finished")
    log_in(page, server, path=f"/jobs/{started}")
    page.get_by_role("link", name="On a page of its own").click()
    page.get_by_label("SQL over").fill("select key, [length] as lengths from results where length > 27 order by key")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("row")).to_have_count(3)
    check_accessibility(page)
    page.reload()
    expect(page.get_by_role("row")).to_have_count(3)
    files = {}
    for name in ("CSV", "Parquet"):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    assert files["CSV"].read_text().splitlines() == ["key,lengths", "28.txt,[28]", "29.txt,[29]"]
    assert pq.read_table(files["Parquet"]).to_pylist()[0] == {"key": "28.txt", "lengths": [28]}

    page.get_by_label("SQL over").fill("select nothing from results")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("There are results(key, length)")
    page.goto(f"{server.url}/jobs/{started}/download?sql=from range(100001)")
    expect(page.get_by_role("alert")).to_contain_text("limit 100000")


def test_all_pages_fit_a_phone(page: Page, server: Server, folder: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme="dark")
    log_in(page, server)
    with server.client() as client:
        client.post("/models/small/versions", json={"model": str(folder / "quick.py"), "alias": "champion"})
        client.post("/schedules", json={"name": "small", "cron": "0 0 * * *", "job": job(folder, "{interval_start}")})
        newest = client.post("/jobs", json=job(folder, "small")).json()["id"]
        until(client, newest, lambda view: view["state"] == "finished")
    there = ["/", "/models", "/models/small", "/schedules", "/schedules/small", "/watches", "/queues", "/jobs/new"]
    for path in (*there, f"/jobs/{newest}", f"/jobs/{newest}/sql"):
        page.goto(server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        check_accessibility(page)


def test_a_sweep_is_followed_and_deleted(page: Page, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    monkeypatch.setenv("TALLY_HOME", str(home))
    store = SweepStore.open()
    spec = {"texts": ["rate=0.1..1", "net=a,b"], "metric": "loss", "lowest": True, "sampler": "tpe", "seed": 1}
    lease = store.create(name="<b>night</b>", kind="script", folder=str(home), spec=spec | {"prune": False})
    log_in(page, server, path="/runs")
    page.get_by_role("link", name="Sweeps").click()
    page.get_by_role("link", name="<b>night</b>").click()
    expect(page.get_by_text("None has begun yet")).to_be_visible()
    runs = []
    for number, loss in enumerate((0.5, 0.25)):
        parameters = {"rate": 0.1 + number / 2, "net": "ab"[number]}
        runs.append(tally.training.run(f"night {number}", parameters, sweep=lease.id))
        store.begin_trial(lease, number, runs[-1].id, parameters)
        runs[-1].log({"loss": loss}, step=7)
    rows = page.get_by_role("group", name="Trials").locator("tbody tr")
    expect(rows.first).to_contain_text("0.25")  # of one that is trained
    expect(rows.first.locator(".state")).to_have_text("running")
    for number, each in enumerate(runs):
        each.finish()
        store.end_trial(lease, number, "finished", value=(0.5, 0.25)[number], step=7)
    expect(page.get_by_text("The best so far is")).to_contain_text("trial 1: loss 0.25, rate 0.6, net b")
    store.finish(lease, "finished", best=1, model="models:/pets/1")
    expect(page.get_by_role("link", name="models:/pets/1")).to_be_visible()
    expect(page.get_by_role("img", name="Each run as a line across rate, net, loss")).to_be_visible()
    expect(page.locator(".parallel .best title")).to_have_text("trial 1, finished")
    check_accessibility(page)
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    rows.first.get_by_role("link").click()
    page.get_by_role("link", name=f"sweep {lease.id}").click()
    page.get_by_role("link", name="Compare all metrics and curves").click()
    expect(page.get_by_text("The best is night 1")).to_be_visible()
    page.get_by_role("link", name=lease.id).click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Sweeps")).to_be_visible()
    expect(page.get_by_text("tally sweep retrain")).to_be_visible()
    check_accessibility(page)
    assert not runs[0].folder.exists()


def test_runs_are_followed_and_compared(page: Page, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_HOME", psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    with tally.training.run("<i>first</i>", {"rate": 0.001, "net": "small"}) as first:
        for step in range(5):
            first.log({"loss": 1 / (1 + step), "odd": math.nan if step % 2 else step}, step=step)
        first.log_image("con/fusion", np.zeros((30, 40, 3), np.uint8), 4)
    with tally.training.run("second", {"rate": 0.9, "net": "large"}) as second:
        second.log({"loss": 0.5}, step=0)
        second.log({"loss": 0.05}, step=1)
        log_in(page, server, path="/runs")
        page.get_by_role("link", name="second").click()
        stands = page.get_by_role("list", name="Where the run stands")
        expect(stands.locator(".state")).to_have_text("running")
        curve = page.get_by_role("img", name="loss: from 0.05 to 0.5 in steps 0 to 1")
        expect(curve).to_be_visible()
        second.log({"loss": 0.01}, step=2)
        expect(page.get_by_role("img", name="loss: from 0.01 to 0.5 in steps 0 to 2")).to_be_visible()
    expect(stands.locator(".state")).to_have_text("finished")
    check_accessibility(page)

    page.goto(f"{server.url}/runs/{first.id}")
    expect(page.get_by_role("heading", name="Run <i>first</i>")).to_be_visible()
    picture = page.get_by_role("img", name="con/fusion, step 4")
    picture.scroll_into_view_if_needed()
    expect(picture).to_have_js_property("naturalWidth", 40)
    check_accessibility(page)

    page.goto(f"{server.url}/runs")
    for name in ("<i>first</i>", "second"):
        page.get_by_role("checkbox", name=f"Compare {name}").check()
    check_accessibility(page)
    page.get_by_role("button", name="Compare those that are marked").click()
    page.get_by_label("Metric").select_option("loss")
    page.get_by_label("The best is").select_option("the lowest")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("The best is second")).to_contain_text("loss 0.01, rate 0.9, net large")
    expect(page.get_by_role("img", name="Each run as a line across rate, net, loss")).to_be_visible()
    expect(page.locator(".parallel .best title")).to_have_text(f"second {second.id}")
    check_accessibility(page)
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    page.goto(f"{server.url}/runs/{first.id}")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    expect(page.get_by_role("link", name="<i>first</i>")).to_have_count(0)
    assert not first.folder.exists()


@pytest.mark.skipif(room.refusal() is not None, reason="steps cannot have a file system of their own here")
def test_a_pipeline_is_followed_answered_and_deleted(
    page: Page, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    monkeypatch.setenv("TALLY_HOME", str(home))
    run = waiting(tmp_path)
    log_in(page, server, path="/pipelines")
    page.get_by_label("State").select_option("succeeded")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_text("No run matches.")).to_be_visible()
    page.get_by_label("State").select_option("waiting")
    page.get_by_label("Find").fill("TEST-")
    page.get_by_role("button", name="Filter").click()
    check_accessibility(page)
    page.get_by_role("link", name="test-").click()
    expect(page.get_by_role("button", name="Delete")).to_be_visible()  # nobody drives what waits
    tree = page.get_by_role("group", name="Steps").locator("tbody tr")
    expect(tree).to_have_count(3)
    expect(page.get_by_text("approve waits for a person")).to_be_visible()
    expect(page.get_by_text("postgres://u:***@h/d")).to_be_visible()
    expect(page.get_by_label("verdict")).to_have_value("no")
    check_accessibility(page)
    page.get_by_label("verdict").select_option("yes")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("list", name="Where the run stands").locator(".state")).to_have_text("succeeded")
    expect(tree).to_have_count(5)
    expect(tree.last).to_contain_text("onExit")
    expect(page.get_by_text("waits for a person")).to_be_hidden()
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("link", name="after").click()
    expect(page.get_by_role("group", name="What it printed")).to_have_text("answer yes")
    check_accessibility(page)
    page.get_by_role("link", name="Pipeline test-").click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No pipeline has run yet")).to_be_visible()
    assert not (home / "pipelines" / run).exists()
