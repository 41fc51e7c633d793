"""The server's API beside jobs: results, models, schedules, watches, queues, uploads; and idempotency keys."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
import sqlalchemy as sa
from tests.server import Server, running, until

from tally.database.clock import now
from tally.database.tables import answers
from tally.jobs.facade import Jobs

SCORER = """
import tally

class Words(tally.Scorer):
    input = "bytes"
    columns = {"word": "int64"}

    def score(self, batch):
        return [[{"word": number} for number in range(3)] for content in batch]
"""

ITEMS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "words.py").write_text(SCORER)
    (folder / "in").mkdir()
    for number in range(ITEMS):
        (folder / "in" / f"{number}.txt").write_text("x" * number)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(folder: Path, home: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(home))
        with running("--root", folder, "--max-upload", 1, "--price-per-hour", 36) as server:
            yield server


@pytest.fixture(scope="module")
def admin(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def operator(server: Server, admin: httpx2.Client) -> Iterator[httpx2.Client]:
    key = admin.post("/keys", json={"name": "ada", "role": "operator"}).json()["text"]
    with server.client(key) as client:
        yield client


def job(folder: Path, out: str, **fields: Any) -> dict[str, Any]:
    return {
        "source": [str(folder / "in")], "model": str(folder / "words.py"), "out": str(folder / out), "workers": 1,
        **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(admin: httpx2.Client, folder: Path) -> str:
    """A finished job."""
    started = admin.post("/jobs", json=job(folder, "whole.csv")).json()["id"]
    until(admin, started, lambda view: view["state"] == "finished")
    return str(started)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["source", "key"])
@pytest.mark.parametrize("limit", [1, 2, 4, 100])
def test_pages_hold_each_row_once(admin: httpx2.Client, finished: str, order: str, limit: int) -> None:
    rows, after = [], None
    while True:
        asked: dict[str, Any] = {"order": order, "limit": limit} | ({} if after is None else {"after": after})
        page = admin.get(f"/jobs/{finished}/rows", params=asked).json()
        rows += [(row["key"], row["word"]) for row in page["rows"]]
        assert len(page["rows"]) <= limit
        if (after := page["next"]) is None:
            break
    assert rows == [(f"{number}.txt", word) for number in range(ITEMS) for word in range(3)]


def test_pages_that_are_none_are_refused(admin: httpx2.Client, finished: str) -> None:
    for order, after in (("source", "-1"), ("source", "x"), ("key", "x"), ("key", "W10="), ("key", "bnVsbA==")):
        answer = admin.get(f"/jobs/{finished}/rows", params={"order": order, "after": after})
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "SpecError")


def test_answers_come_as_arrow(admin: httpx2.Client, finished: str) -> None:
    asked = {"sql": "select *, 'x'::blob as b from results", "format": "arrow", "limit": 20}
    answer = admin.post(f"/jobs/{finished}/query", json=asked)
    table = pa.ipc.open_stream(answer.content).read_all()
    assert (table.num_rows, table["word"].type, table["b"].type) == (20, pa.int64(), pa.binary())
    assert answer.headers["x-truncated"] == "true"
    odd = admin.post(f"/jobs/{finished}/query", json={"sql": "select '\\xff'::blob as b, 'nan'::double as n"})
    assert odd.json()["rows"] == [{"b": "/w==", "n": None}]
    assert admin.post(f"/jobs/{finished}/query", json={"sql": "from results", "limit": 20_000}).status_code == 422


def test_files_are_fetched_whole_and_in_ranges(admin: httpx2.Client, folder: Path, finished: str) -> None:
    files = {each["name"]: each["bytes"] for each in admin.get(f"/jobs/{finished}/files").json()}
    content = (folder / "whole.csv").read_bytes()
    assert files["whole.csv"] == len(content)
    assert "whole.csv.manifest.json" in files
    url = f"/jobs/{finished}/files/whole.csv"
    whole = admin.get(url)
    assert (whole.content, whole.headers["accept-ranges"]) == (content, "bytes")
    assert whole.headers["x-content-type-options"] == "nosniff"
    for asked, start, stop in (("0-9", 0, 10), ("5-", 5, None), ("-4", len(content) - 4, None), ("3-99999", 3, None)):
        part = admin.get(url, headers={"Range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, content[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{(stop or len(content)) - 1}/{len(content)}"
    for asked in (f"{len(content)}-", "9-3", "-0"):
        assert admin.get(url, headers={"Range": f"bytes={asked}"}).status_code == 416
    for asked in ("lines=1-2", "bytes=1-2,4-5", "bytes=x"):
        assert admin.get(url, headers={"Range": asked}).status_code == 200
    changed = admin.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, content)


@pytest.mark.parametrize("name", ["../words.py", "..%2fwords.py", "/etc/passwd", "%2fetc%2fpasswd", "words.py", "x%00"])
def test_only_files_of_the_output_are_fetched(admin: httpx2.Client, finished: str, name: str) -> None:
    answer = admin.get(f"/jobs/{finished}/files/{name}")
    assert answer.status_code in (404, 422)
    assert "tally.Scorer" not in answer.text


def test_a_file_that_became_a_link_is_not_followed(admin: httpx2.Client, folder: Path) -> None:
    started = admin.post("/jobs", json=job(folder, "linked")).json()["id"]
    until(admin, started, lambda view: view["state"] == "finished")
    name = admin.get(f"/jobs/{started}/files").json()[0]["name"]
    (folder / "linked" / name).unlink()
    (folder / "linked" / name).symlink_to("/etc/passwd")
    assert admin.get(f"/jobs/{started}/files/{name}").status_code == 404


def test_figures(admin: httpx2.Client, finished: str) -> None:
    found = admin.get("/figures").json()
    assert found["items"] == sum(found["minutes"]) >= ITEMS
    assert (len(found["minutes"]), found["price_per_hour"], found["jobs"]["failed"]) == (60, 36, 0)


def test_a_stream_of_a_job_that_is_replayed_ends_when_that_has_ended(admin: httpx2.Client, folder: Path) -> None:
    (folder / "bad").mkdir()
    for name in ("a", "b", "c"):
        (folder / "bad" / name).write_text(name)
    failing = "if b'a' not in batch and open(PLACE).read() == 'bad': raise ValueError('no')"
    scorer = SCORER.replace("return", f"{failing}\n        return")
    (folder / "fails.py").write_text(scorer.replace("PLACE", repr(str(folder / "switch"))))
    (folder / "switch").write_text("bad")
    fields = job(folder, "fails", model=str(folder / "fails.py"), source=[str(folder / "bad")], batch_size=1)
    started = admin.post("/jobs", json=fields).json()["id"]
    assert until(admin, started, lambda view: view["state"] == "finished")["dead"] == 2
    (folder / "switch").write_text("good")
    assert admin.post(f"/jobs/{started}/retry").json()["starting"]
    with admin.stream("GET", f"/jobs/{started}/events") as events:
        seen = [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]
    assert (seen[-1]["state"], seen[-1]["dead"], seen[-1]["done"]) == ("finished", 0, 3)


# -- idempotency keys --------------------------------------------------------------------------------------------------


def test_a_request_that_is_repeated_is_carried_out_once(
    admin: httpx2.Client, operator: httpx2.Client, folder: Path
) -> None:
    fields, named = job(folder, "once"), {"Idempotency-Key": "first-try"}
    first = operator.post("/jobs", json=fields, headers=named)
    again = operator.post("/jobs", json=fields, headers=named)
    assert (first.status_code, first.json()) == (again.status_code, again.json())
    other = operator.post("/jobs", json=job(folder, "other"), headers=named)
    assert (other.status_code, other.json()["error"]["type"]) == (422, "SpecError")
    elsewhere = operator.post("/jobs", params={"overwrite": "true"}, json=fields, headers=named)
    assert elsewhere.status_code == 422
    until(admin, first.json()["id"], lambda view: view["state"] == "finished")
    theirs = admin.post("/jobs", json=fields, headers=named)  # another key's request
    assert theirs.json()["id"] != first.json()["id"]
    wrong = job(folder, "once") | {"batchsize": 1}
    for _ in range(2):  # an error is no answer to keep
        assert operator.post("/jobs", json=wrong, headers={"Idempotency-Key": "wrong"}).status_code == 422
    assert operator.post("/jobs", json=fields, headers={"Idempotency-Key": "wrong"}).status_code == 202
    assert operator.post("/jobs", json=fields, headers={"Idempotency-Key": "x" * 201}).status_code == 422


def test_a_request_whose_answer_was_lost_makes_no_second_job(
    operator: httpx2.Client, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLY_HOME", str(home))
    fields, named = job(folder, "lost"), {"Idempotency-Key": "lost"}
    del fields["out"]  # the server's own place, another one each time
    first = operator.post("/jobs", json=fields, headers=named).json()["id"]
    lose_the_last_answer()
    again = operator.post("/jobs", json=fields, headers=named)
    assert (again.status_code, again.json()["id"]) == (202, first)
    lose_the_last_answer()
    assert operator.post("/jobs", json=fields | {"batch_size": 1}, headers=named).json()["id"] != first


def lose_the_last_answer() -> None:
    """Leave it as a server does that is killed between a change and its answer, some time ago."""
    last = sa.select(sa.func.max(answers.c.at)).scalar_subquery()
    with Jobs().store.engine.begin() as connection:
        lost = sa.update(answers).where(answers.c.at == last).values(status=None, body=None, at=now() - 1000)
        assert connection.execute(lost).rowcount == 1


def test_the_same_files_again_are_the_same_upload(admin: httpx2.Client) -> None:
    def send(content: bytes) -> httpx2.Response:
        return admin.post("/uploads", files=[("files", ("a.txt", content))], headers={"Idempotency-Key": "files"})

    first = send(b"one")
    assert first.status_code == 201
    assert send(b"one").json() == first.json()
    assert send(b"two").status_code == 422


def test_a_key_is_shown_once(admin: httpx2.Client) -> None:
    wanted, named = {"name": "bob", "role": "viewer"}, {"Idempotency-Key": "bob"}
    assert admin.post("/keys", json=wanted, headers=named).status_code == 201
    assert admin.post("/keys", json=wanted, headers=named).status_code == 409
    assert [each["name"] for each in admin.get("/keys").json()].count("bob") == 1


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_uploads_are_scored(operator: httpx2.Client, folder: Path) -> None:
    files = [("files", ("a.txt", b"a")), ("files", ("../../b.txt", b"bb")), ("files", ("c d;.txt", b"ccc"))]
    kept = operator.post("/uploads", files=files).json()
    assert {each["name"]: each["bytes"] for each in kept["files"]} == {"a.txt": 1, "b.txt": 2, "c d_.txt": 3}
    started = operator.post("/jobs", json=job(folder, "uploaded", source=[kept["place"]])).json()["id"]
    ended = until(operator, started, lambda view: view["state"] in ("finished", "failed"))
    assert (ended["state"], ended["done"], ended["rows"]) == ("finished", 3, 9)


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def damaged(compression: int) -> bytes:
    """An archive in which a file's compressed bytes are others."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("a", bytes(range(256)) * 8)
    content = bytearray(buffer.getvalue())
    content[45:55] = bytes(10)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(("../out.txt", b"x")), "no name inside"),
        (zipped(("/etc/x", b"x")), "no name inside"),
        (zipped(("a\\..\\b", b"x")), "no name inside"),
        (zipped((link("a"), b"/etc/passwd")), "no file"),
        (zipped(("bomb", b"\0" * (3 << 20))), "more than 1,048,576 bytes"),
        (zipped(("a", b"x"), ("a/b", b"x")), "same name"),
        (zipped(("a", b"x"), ("A", b"x")), "are called"),
        (b"no archive", "cannot be unpacked"),
        *(
            (damaged(kind), "cannot be unpacked")
            for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        ),
        (zipped(("a" * 300, b"x")), "no name that a file is kept by"),
        (zipped(), "holds no file"),
    ],
)
def test_archives_are_unpacked_within_bounds(operator: httpx2.Client, content: bytes, said: str) -> None:
    answer = operator.post("/uploads", params={"unpack": "true"}, files=[("files", ("a.zip", content))])
    assert answer.status_code == 422
    assert said in answer.text


def test_uploads_are_bounded(server: Server, operator: httpx2.Client, home: Path) -> None:
    operator.post("/uploads", files=[("files", ("a", b"x"))]).raise_for_status()
    assert operator.post("/uploads", files=[("files", ("a", b"x" * (3 << 20)))]).status_code == 413
    assert operator.post("/uploads", files=[("files", ("a", b"x" * ((1 << 20) + 1)))]).status_code == 422
    assert operator.post("/uploads", files=[("files", ("a", b"1")), ("files", ("A", b"2"))]).status_code == 422
    left = list((home / "uploads").iterdir())
    assert left
    assert all(any(each.iterdir()) for each in left), "what was refused is gone"


def test_an_upload_is_data_and_runs_not(operator: httpx2.Client, admin: httpx2.Client, folder: Path) -> None:
    kept = operator.post("/uploads", files=[("files", ("words.py", SCORER.encode()))]).json()
    script = f"{kept['place']}/words.py"
    assert operator.post("/jobs", json=job(folder, "runs", model=script)).status_code == 422
    for named in (script, f"{script}:Words"):
        refused = operator.post("/models/words/versions", json={"model": named})
        assert (refused.status_code, "by an admin" in refused.text) == (403, True)
    for hidden in (f"{script}:", f"{script}:No such", f"{script}:/../words.onnx"):
        assert operator.post("/models/words/versions", json={"model": hidden}).status_code == 422
    assert admin.post("/models/words/versions", json={"model": script}).status_code == 201
    assert admin.post("/models/words/versions", json={"model": f"{script}:Words"}).json()["existed"]
    anybodys = "s3://anybody/package"
    refused = operator.post("/jobs", json=job(folder, "brought", model=anybodys))
    assert (refused.status_code, "only an admin" in refused.text) == (403, True)
    assert operator.post("/models/brought/versions", json={"model": anybodys}).status_code == 403
    uploads = str(Path(kept["place"]).parent)
    assert operator.post("/jobs", json=job(folder, "all", source=[uploads])).status_code == 422


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> bytes:
    """A small ONNX model of tables."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "small",
        [helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["n", 3, 8, 8])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_models_are_uploaded_versioned_and_rolled_back(
    admin: httpx2.Client, operator: httpx2.Client, network: bytes
) -> None:
    kept = operator.post("/uploads", files=[("files", ("net.onnx", network))]).json()
    place = f"{kept['place']}/net.onnx"
    asked = {"model": place, "alias": "champion", "task": "restyle", "metadata": {"metrics": {"loss": 0.5}}}
    first = operator.post("/models/net/versions", json=asked)
    assert first.status_code == 201, first.text
    assert (first.json()["version"], first.json()["kind"], first.json()["existed"]) == (1, "onnx", False)
    assert operator.post("/models/net/versions", json=asked).json()["existed"]
    second = operator.post("/models/net/versions", json=asked | {"settings": {"batch_size": 2}}).json()
    assert (second["version"], second["aliases"]) == (2, ["champion"])
    assert operator.post("/models/net/aliases/champion/rollback").json()["version"] == 1
    assert operator.put("/models/net/aliases/newest", json={"version": 2}).status_code == 200
    assert operator.put("/models/net/aliases/newest", json={"version": 9}).status_code == 404
    assert operator.put("/models/net/aliases/passing", json={"version": 1}).status_code == 200
    assert operator.delete("/models/net/aliases/passing").json()["version"] == 1
    assert operator.delete("/models/net/aliases/passing").status_code == 404
    tagged = operator.patch("/models/net/versions/2/tags", json={"tags": {"stage": "trial", "by": "ada"}}).json()
    assert tagged["metadata"]["tags"] == {"stage": "trial", "by": "ada"}
    tagged = operator.patch("/models/net/versions/2/tags", json={"tags": {"stage": None}}).json()
    assert tagged["metadata"]["tags"] == {"by": "ada"}
    shown = operator.get("/models/net").json()
    assert [each["aliases"] for each in shown["versions"]] == [["champion"], ["newest"]]
    assert [(each["alias"], each["version"], each["action"]) for each in shown["history"]] == [
        ("champion", 1, "set"), ("champion", 1, "set"), ("champion", 2, "set"), ("champion", 1, "rollback"),
        ("newest", 2, "set"), ("passing", 1, "set"), ("passing", 1, "remove"),
    ]  # fmt: skip
    assert {each["who"] for each in shown["history"] if each["alias"] != "champion"} == {"ada"}
    assert {each["name"] for each in operator.get("/models").json()} >= {"net"}
    assert operator.delete("/models/net/versions/2").status_code == 403
    assert admin.delete("/models/net/versions/2").status_code == 409
    assert operator.get("/models/nothing").status_code == 404
    bad = operator.post("/uploads", files=[("files", ("bad.onnx", b"nothing"))]).json()
    broken = operator.post("/models/bad/versions", json={"model": f"{bad['place']}/bad.onnx"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (409, "ModelLoadError")


@pytest.mark.parametrize("model", ["/etc/passwd", "os:system", "file:///etc/passwd", "http://127.0.0.1/m.onnx"])
def test_models_come_from_places_that_may_be_named(operator: httpx2.Client, model: str) -> None:
    assert operator.post("/models/net/versions", json={"model": model}).status_code == 422


# -- schedules and watches ---------------------------------------------------------------------------------------------


def test_schedules(admin: httpx2.Client, operator: httpx2.Client, folder: Path) -> None:
    fields = job(folder, "hourly/{interval_start:%Y%m%dT%H%M%z}")
    asked = {"name": "hourly", "job": fields, "cron": "0 * * * *", "timezone": "Europe/Berlin"}
    added = operator.post("/schedules", json=asked)
    assert added.status_code == 201, added.text
    assert (added.json()["cron"], added.json()["paused"]) == ("0 * * * *", False)
    assert operator.post("/schedules", json=asked).status_code == 422
    wrong = operator.post("/schedules", json=asked | {"cron": "x", "timezone": "Mars", "job": fields | {"out": "/etc"}})
    assert wrong.status_code == 422
    assert len(wrong.json()["error"]["problems"]) >= 2
    outside = operator.post("/schedules", json=asked | {"name": "o", "job": fields | {"source": ["/etc"]}})
    assert (outside.status_code, "not under a folder" in outside.text) == (422, True)

    assert operator.post("/schedules/hourly/pause").json()["paused"]
    assert operator.post("/schedules/hourly/run").status_code == 409
    assert not operator.post("/schedules/hourly/resume").json()["paused"]
    run = operator.post("/schedules/hourly/run")
    assert run.status_code == 202
    started = until(operator, "", lambda page: page["jobs"], params={"text": "hourly/"})["jobs"][0]["id"]
    assert until(operator, started, lambda view: view["state"] == "finished")["done"] == ITEMS
    shown = operator.get("/schedules/hourly").json()
    assert len(shown["next"]) == 5
    assert shown["next"][0]["start"] >= run.json()["interval_end"]
    assert [each["interval_start"] for each in shown["runs"]] == [run.json()["interval_start"]]
    assert [each["schedule"]["name"] for each in operator.get("/schedules").json()] == ["hourly"]
    assert operator.delete("/schedules/hourly").status_code == 403
    assert operator.get("/schedules/nothing").status_code == 404


def test_watches(admin: httpx2.Client, operator: httpx2.Client, folder: Path) -> None:
    (folder / "drop").mkdir()
    (folder / "drop" / "old.txt").write_text("old")
    fields = job(folder, "dropped/{stem}", source=["{url}"])
    asked = {"name": "drop", "place": str(folder / "drop"), "job": fields, "pattern": "*.txt"}
    added = operator.post("/watches", json=asked)
    assert (added.status_code, added.json().get("there")) == (201, 1), added.text
    (folder / "drop" / "new.txt").write_text("new")
    started = until(operator, "", lambda page: page["jobs"], params={"text": "dropped/new"})["jobs"][0]["id"]
    assert until(operator, started, lambda view: view["state"] == "finished")["done"] == 1
    assert operator.get("/watches/drop").json()["objects"] == {"passed": 1, "taken": 1}
    assert operator.post("/watches/drop/pause").json()["paused"]
    assert not operator.post("/watches/drop/resume").json()["paused"]
    for wrong in ({"place": "/etc"}, {"job": fields | {"out": "/etc/{stem}"}}, {"job": fields | {"out": "/x"}}):
        assert operator.post("/watches", json=asked | {"name": "w"} | wrong).status_code == 422
    assert operator.delete("/watches/drop").status_code == 403
    assert admin.delete("/watches/drop").status_code == 204
    for path, name in (("/watches/drop", "watch"), ("/schedules/drop", "schedule")):
        gone = operator.get(path)
        error = gone.json()["error"]
        assert (gone.status_code, error["type"]) == (404, "TriggerNotFoundError")
        assert error["message"].startswith(f"there is no {name} 'drop'")
        assert f"tally {name} list" in error["hint"]
    for answer in (operator.get("/nowhere"), operator.put("/jobs"), operator.get("/jobs?limit=0")):
        error = answer.json()["error"]
        assert answer.status_code in (404, 405, 422)
        assert "openapi.json" in error["hint"]
        assert error["message"] not in ("Not Found", "Method Not Allowed")


# -- queues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1/0/list?kind=list",
        "amqp://localhost/%2f/q",
        "kafka://198.51.100.1:9092,127.0.0.1:9092/t",
        "nothing",
        "redis://[",
    ],
)
def test_queues_in_the_servers_network_are_not_asked(operator: httpx2.Client, url: str) -> None:
    assert operator.get("/queues/depth", params={"url": url}).status_code == 422
    assert operator.get("/queues/messages", params={"url": url}).status_code == 422
    assert operator.post("/queues/replay", json={"url": url}).status_code == 422
