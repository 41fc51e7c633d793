"""The example of the live dashboard: pictures of a bucket go by a queue, the detector and a database to the page."""

from __future__ import annotations

import csv
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from PIL import Image
from tests.brokers import answers
from tests.conftest import Ran
from tests.examples import EXAMPLES, script, serving
from tests.server import PATIENCE, running
from tests.services import require

import tally
from tally.storage import open_store

pytest.importorskip("playwright")

from playwright.sync_api import Page, expect
from tests.browsing import check_accessibility

SCENES = 14
COLUMNS = ("key", "label", "score", "xmin", "ymin", "xmax", "ymax")


@pytest.fixture
def queue() -> Iterator[str]:
    """A queue of the test's own."""
    require("RabbitMQ", answers(5672))
    import pika

    name = f"tally-test-{secrets.token_hex(6)}"
    yield f"amqp://127.0.0.1/{name}"
    with pika.BlockingConnection() as connection:
        for each in (name, f"{name}.dead"):
            connection.channel().queue_delete(each)


def comes(answer: Callable[[], Any], wanted: Callable[[Any], object]) -> Any:
    """The answer, once it is as wanted."""
    deadline = time.monotonic() + PATIENCE
    while not wanted(found := answer()):
        assert time.monotonic() < deadline, f"it did not come to that: {found}"
        time.sleep(0.1)
    return found


def followed(client: tally.Client, job: str, wanted: Callable[[Any], object]) -> None:
    """Until the job is as wanted."""
    for view in client.follow(job):
        if wanted(view):
            return
    raise AssertionError(f"the job ended: {view.state}, {view.error}")


def boxes_of(table: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(table)) as database:
        return sorted(database.execute(f"SELECT {', '.join(COLUMNS)} FROM inferences"))


def test_pictures_of_a_bucket_come_to_the_live_page(
    s3: str, queue: str, page: Page, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    scenes, detector, table = tmp_path / "scenes", tmp_path / "detector", tmp_path / "dashboard.db"
    maker = script("live_dashboard/make_scenes.py")
    maker.main([str(scenes), "--count", str(SCENES)])
    script("live_dashboard/make_detector.py").main([str(detector)])
    names = sorted(each.name for each in scenes.iterdir())
    for name in names:
        open_store(f"{s3}/images").upload(name, scenes / name)

    # What the detector finds without a queue, a server and a database; it is right about nearly all.
    ran = cli("score", scenes, "--model", detector, "--out", tmp_path / "boxes.csv", "--quiet")
    assert ran.code == 0, ran.err
    with (tmp_path / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = sorted((row["key"], row["label"], *(float(row[each]) for each in COLUMNS[2:])) for row in rows)
    right = sum(
        label == maker.shapes_of(names.index(key), 7)[int(ymin > 100) * 2 + int(xmin > 100)]
        for key, label, _, xmin, ymin, *_ in expected
    )
    assert right >= 0.9 * 4 * SCENES

    job = yaml.safe_load((EXAMPLES / "live_dashboard" / "boxes.yaml").read_text("utf-8"))
    job |= {"source": queue, "queue": {**job["queue"], "base": f"{s3}/images"}, "model": str(detector)}
    job |= {"out": f"{s3}/boxes", "push": f"sqlite:///{table}#inferences", "workers": 1}
    options = ("--root", EXAMPLES, "--root", tmp_path, "--allow-host", "127.0.0.1", "--price-per-hour", 0.0864)
    with running(*options) as server, tally.Client(server.url, key=server.key) as client:
        environment = {
            "DATABASE": f"sqlite:///{table}", "BOXES": job["out"], "THUMBS": f"{s3}/thumbs",
            "TALLY_SERVER": server.url, "TALLY_KEY": client.add_key("dashboard", "viewer").text,
        }  # fmt: skip
        with serving("live_dashboard", "dashboard:app", **environment) as url:

            def asked(route: str) -> Any:
                return httpx2.get(f"{url}/api/coco/{route}", timeout=60).raise_for_status().json()

            assert asked("images/0") == []
            assert asked("vis") == {"nodes": [], "edges": [], "lastObject": "0"}
            assert cli("inject", f"{s3}/images", "--queue", queue).out == f"{SCENES} messages sent\n"
            started = client.submit(**job)
            followed(client, started.id, lambda view: view.done == SCENES)
            images = comes(lambda: asked("images/0"), lambda found: len(found) == SCENES)

            # Each once, and as without all that; also if they are sent again.
            cli("inject", f"{s3}/images", "--queue", queue)
            comes(
                lambda: client.queue_depth(queue), lambda depth: (depth.waiting, depth.in_hand) in ((0, 0), (0, None))
            )
            assert sorted(each["image"] for each in images) == names
            found = boxes_of(table)
            assert [row[:2] for row in found] == [row[:2] for row in expected]
            assert [row[2:] for row in found] == [pytest.approx(row[2:], rel=1e-5) for row in expected]

            # The graph: of the last ten, of all, and of what came after one.
            of = {name: [row[1] for row in rows_by_score(expected, name)] for name in names}
            order = [each["image"] for each in images]
            whole = asked("vis/0")
            assert whole == asked("vis")
            assert whole["lastObject"] == images[-1]["_id"]
            assert {each["id"] for each in whole["nodes"]} == {label for name in order[-10:] for label in of[name]}
            newest = asked(f"vis/{images[-2]['_id']}")
            distinct = list(dict.fromkeys(of[order[-1]]))
            assert [each["label"] for each in newest["nodes"]] == distinct
            assert newest["edges"] == [{"from": one, "to": other} for one, other in pairwise(distinct)]
            assert asked(f"images/{images[-2]['_id']}") == images[-1:]
            assert asked(f"vis/{images[-1]['_id']}")["nodes"] == []
            assert asked("stats")["tpm"] in range(SCENES + 1)
            assert asked("agents") == {"agents": 1}

            # What it costs stops with the job.
            client.pause(started.id)
            followed(client, started.id, lambda view: view.state == "paused")
            spent = float(asked("cost")["cost"])
            assert 0 < spent == float(asked("cost")["cost"])
            assert asked("agents") == {"agents": 0}

            # Thumbnails.
            assert httpx2.get(f"{url}/api/coco/thumbs/{names[0]}", timeout=60).status_code == 404
            model = EXAMPLES / "live_dashboard" / "thumbnails.py"
            thumbs = client.submit(source=f"{s3}/images", model=model, out=f"{s3}/thumbs", workers=1)
            followed(client, thumbs.id, lambda view: view.state == "finished")
            for name in names:
                content = httpx2.get(f"{url}/api/coco/thumbs/{name}", timeout=60).raise_for_status()
                (tmp_path / "thumbnail.jpg").write_bytes(content.content)
                with Image.open(tmp_path / "thumbnail.jpg") as picture:
                    assert (picture.format, picture.size) == ("JPEG", (150, 150))

            # The page.
            page.goto(url)
            expect(page.locator("#thumbs img")).to_have_count(SCENES)
            page.wait_for_function("[...document.images].every(each => each.naturalWidth == 150)")
            shown = page.locator("#graph text").all_text_contents()
            assert sorted(shown) == sorted(each["id"] for each in whole["nodes"])
            check_accessibility(page)
            expect(page.locator("#cost")).to_have_text(asked("cost")["cost"])

            # No link deletes.
            assert httpx2.get(f"{url}/api/coco/clear", timeout=60).status_code == 405
            assert len(boxes_of(table)) == len(expected)
            assert httpx2.delete(f"{url}/api/coco/clear", timeout=60).json() == {"message": "OK"}
            assert asked("images/0") == boxes_of(table) == []
            client.cancel(started.id)


def rows_by_score(rows: list[tuple[Any, ...]], key: str) -> list[tuple[Any, ...]]:
    return sorted((row for row in rows if row[0] == key), key=lambda row: -row[2])
