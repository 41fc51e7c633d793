"""Requests that mean harm: they get an error, and the server goes on answering others."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from tests.server import Server, job, lengths, running, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "quick.py").write_text(lengths())
    (folder / "slow.py").write_text(lengths(pause=0.2))
    (folder / "in").mkdir()
    for number in range(20):
        (folder / "in" / f"{number}.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder, "--max-upload", 1) as server:
            yield server


@pytest.fixture
def admin(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client
        assert client.get("/me").status_code == 200, "it still answers"


def test_sql_reads_one_job_only(admin: httpx2.Client, folder: Path) -> None:
    ids = [admin.post("/jobs", json=job(folder, name)).json()["id"] for name in ("mine", "theirs")]
    for each in ids:
        until(admin, each, lambda view: view["state"] == "finished")
    mine, other = (next((folder / name).glob("part-*")) for name in ("mine", "theirs"))
    database = "sqlite_scan('tally.db', 'api_keys')"
    for sql in (
        f"from '{other}'", f"from read_parquet('{other}')", f"from '{folder}/mine/../theirs/part-00000.parquet'",
        f"from glob('{folder}/*')", f"from read_blob('{folder}/in/0.txt')", f"from {database}",
        "from '/proc/1/environ'",
        f"select * from results union all by name select * from '{other}'", "from read_csv('http://127.0.0.1/x')",
        "select getenv('TALLY_HOME')", "call pragma_database_list()", "load httpfs", "export database '/tmp/x'",
        "with x as (from read_text('/etc/hostname')) from x", f"copy (from results) to '{folder}/written.csv'",
        "select date '5881580-07-10'", "select timestamp 'infinity'",
        f"explain analyze copy (select 'forged' as key) to '{mine}' (format parquet, use_tmp_file false)",
        f"with x as (copy (select 'forged' as key) to '{mine}' (format parquet, use_tmp_file false)) from x",
    ):  # fmt: skip
        answer = admin.post(f"/jobs/{ids[0]}/query", json={"sql": sql})
        assert answer.status_code == 422, (sql, answer.text)
        assert "secret" not in answer.text
    assert not (folder / "written.csv").exists()
    rows = admin.get(f"/jobs/{ids[0]}/rows").json()["rows"]
    assert len(rows) == 20
    assert "forged" not in {row["key"] for row in rows}


@pytest.mark.parametrize("depth", [100, 900, 5_000, 200_000])
def test_deeply_nested_bodies_are_refused(admin: httpx2.Client, folder: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    fields = '"source": ["s3://b/in"], "model": "models:/m", "out": "s3://b/out"'
    for body in (nested, f'{{{fields}, "settings": {{"a": {nested}}}}}', f'{{{fields}, "csv": {{"a": {nested}}}}}'):
        answer = admin.post("/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (202, 400, 422), answer.text
        if answer.status_code == 202:
            assert admin.post(f"/jobs/{answer.json()['id']}/cancel").status_code in (200, 409)


@pytest.mark.parametrize("text", ["a\r\nX-Injected: 1", "a\nb", "\0", "\ud800", "ä" * 2000, "%0d%0aX-Injected: 1"])
def test_no_text_becomes_a_header(server: Server, admin: httpx2.Client, text: str) -> None:
    plain = text.encode("utf-8", "surrogatepass")
    quoted = "".join(f"%{byte:02x}" for byte in plain)
    base = server.url
    for path in (f"/login?then={quoted}", f"/api/v1/jobs/{quoted}", f"/api/v1/jobs?text={quoted}", f"/jobs/{quoted}"):
        answer = admin.get(base + path, headers={"Accept": "text/html"}, timeout=60)
        assert answer.status_code < 500, path
        assert "x-injected" not in answer.headers
    nobody = httpx2.get(f"{base}/jobs?x={quoted}", headers={"Accept": "text/html"}, timeout=60)
    assert "x-injected" not in nobody.headers


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /api/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /api/v1/jobs HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
    ],
)
def test_what_is_no_request_is_no_fault(server: Server, admin: httpx2.Client, request_: bytes) -> None:
    with connected(server) as connection:
        try:
            connection.sendall(request_)
            answer = connection.recv(1000)
        except ConnectionError:
            answer = b""
        assert not answer.startswith(b"HTTP/1.1 5"), answer
        assert not answer.startswith(b"HTTP/1.1 200"), answer


def test_who_does_not_read_holds_nobody_up(server: Server, admin: httpx2.Client, folder: Path) -> None:
    """Forty pages that are open on a job and read nothing; as many requests that never end."""
    fields = job(folder, "watched", model=str(folder / "slow.py"), batch_size=1)
    started = admin.post("/jobs", json=fields).json()["id"]
    streams = [connected(server) for _ in range(40)]
    halves = [connected(server) for _ in range(40)]
    try:
        for each in streams:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = f"GET /api/v1/jobs/{started}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}"
            each.sendall(f"{head}\r\n\r\n".encode())
        for each in halves:
            each.sendall(b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        ended = until(admin, started, lambda view: view["state"] == "finished")
        assert ended["done"] == 20
    finally:
        for each in (*streams, *halves):
            each.close()


def test_uploads_without_an_announced_length_are_bounded(admin: httpx2.Client) -> None:
    boundary = "b"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'.encode()

    def endless() -> Iterator[bytes]:
        yield head
        for _ in range(64):
            yield b"x" * (1 << 20)

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    try:
        assert admin.post("/uploads", content=endless(), headers=headers).status_code == 413
    except httpx2.TransportError:  # it hung up while we were still sending
        pass
    many = b"".join(head + b"x\r\n" for _ in range(3_000)) + b"--b--\r\n"
    assert admin.post("/uploads", content=many, headers=headers).status_code in (400, 413, 422)


@pytest.mark.parametrize("role", [None, "viewer"])
@pytest.mark.parametrize("path", ["/api/v1/uploads", "/jobs/new", "/models"])
def test_files_of_who_may_not_bring_any_are_not_waited_for(
    server: Server, admin: httpx2.Client, path: str, role: str | None
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    if role is not None:
        key = admin.post("/keys", json={"name": "looks", "role": role}).json()["text"]
        head += f"Authorization: Bearer {key}\r\n"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    with connected(server) as connection:
        connection.sendall(f"{head}Content-Length: 1000000\r\n\r\n{part}".encode())
        answer = connection.recv(1000)  # while there is more to come
    assert answer.startswith(b"HTTP/1.1 401" if role is None else b"HTTP/1.1 403"), answer


def test_a_body_is_not_waited_for_where_the_headers_say_enough(server: Server, admin: httpx2.Client) -> None:
    """A change that is to be made once, by who may not make it; a page of another site; a session that is none."""
    key = admin.post("/keys", json={"name": "looks on", "role": "viewer"}).json()["text"]
    with httpx2.Client(base_url=server.url, timeout=60) as browser:
        browser.post("/login", data={"key": server.key})
        session = browser.cookies["tally_session"]
    for path, headers, status in (
        ("/api/v1/jobs", f"Authorization: Bearer {key}\r\nIdempotency-Key: once", 403),
        ("/api/v1/jobs", f"Authorization: Bearer {server.key}\r\nIdempotency-Key: {'x' * 300}", 422),
        ("/endpoints/plastic/scale", f"Cookie: tally_session={session}\r\nSec-Fetch-Site: cross-site", 403),
        ("/endpoints/plastic/scale", "Cookie: tally_session=none", 401),
    ):
        kind = "application/json" if path.startswith("/api") else "application/x-www-form-urlencoded"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{headers}\r\n"
        with connected(server) as connection:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
            answer = connection.recv(1000)  # while all of the body is to come
        assert answer.startswith(b"HTTP/1.1 %d" % status), (path, headers, answer)


def test_a_form_that_is_sent_twice_starts_one_job(server: Server, admin: httpx2.Client, folder: Path) -> None:
    with httpx2.Client(base_url=server.url, timeout=60) as browser:
        browser.post("/login", data={"key": server.key})

        def form() -> dict[str, str]:
            fields = re.findall(r'name="(csrf|once)" value="([^"]+)"', browser.get("/jobs/new").text)
            wanted = {"source": str(folder / "in"), "model": str(folder / "quick.py"), "out": str(folder / "twice")}
            return {**dict(fields), **wanted}

        filled = form()
        assert set(filled) >= {"csrf", "once"}
        first, again = (browser.post("/jobs/new", data=filled) for _ in range(2))
        assert first.headers["location"] == again.headers["location"]
        other = browser.post("/jobs/new", data={**filled, "out": str(folder / "else")})  # the same form, changed
        anew = browser.post("/jobs/new", data=form() | {"overwrite": "yes"})
        places = {each.headers["location"] for each in (first, other, anew)}
        assert len(places) == 3
        for each in places:
            until(admin, each.rpartition("/")[2], lambda view: view["state"] in ("finished", "failed"))


def test_a_server_that_ends_answers_what_it_has(folder: Path, tmp_path: Path) -> None:
    """A request of which half has come, and a stream."""
    with (tmp_path / "log").open("wb") as log, running("--root", folder, log=log) as server:
        lines = f"Host: x\r\nAuthorization: Bearer {server.key}\r\n"
        with connected(server) as half, connected(server) as stream:
            stream.sendall(f"GET /live HTTP/1.1\r\n{lines}\r\n".encode())
            assert b"200" in stream.recv(4096)
            half.sendall(f"POST /api/v1/jobs HTTP/1.1\r\n{lines}Content-Length: 100\r\n\r\n".encode() + b'{"source"')
            with server.client() as client:
                assert client.get("/me").status_code == 200  # what was sent before has been taken
            server.process.terminate()
            answer = half.recv(4096)
        assert server.process.wait(60) in (0, -signal.SIGTERM)
    assert answer.startswith(b"HTTP/1.1 503"), answer
    assert b"retry-after: 5" in answer.lower()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_upload_of_many_small_files(admin: httpx2.Client) -> None:
    kept = admin.post("/uploads", files=[("files", (f"{number}.txt", b"x")) for number in range(1200)])
    assert kept.status_code == 201, kept.text
    assert len(kept.json()["files"]) == 1200
    for body in ({"data": {"files": "no file"}}, {"files": [("other", ("a", b"x"))]}, {"json": {"files": []}}):
        assert admin.post("/uploads", **body).status_code == 422


def test_a_stream_ends_when_its_key_is_revoked(server: Server, admin: httpx2.Client, folder: Path) -> None:
    key = admin.post("/keys", json={"name": "leaver", "role": "viewer"}).json()
    fields = job(folder, "left", model=str(folder / "slow.py"), batch_size=1)
    started = admin.post("/jobs", json=fields).json()["id"]
    with (
        httpx2.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {key['text']}"}) as leaver,
        leaver.stream("GET", f"/api/v1/jobs/{started}/events") as stream,
    ):
        told = stream.iter_lines()
        assert next(told) == "event: job"
        until(admin, started, lambda view: view["done"] > 0)
        admin.post(f"/keys/{key['id']}/revoke").raise_for_status()
        last = [line for line in told if line.startswith("data:")][-1:]
    assert not any('"finished"' in line for line in last)
    until(admin, started, lambda view: view["state"] == "finished")


def connected(server: Server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)
