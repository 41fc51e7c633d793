"""Lists of items, from the command to the rows: files, objects and URLs, and what is wrong with them."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from tests.conftest import Ran

from tally import network
from tally.errors import StorageError
from tally.storage import web

SCRIPT = """from pathlib import Path

def init():
    pass

def run(mini_batch):
    return [{"text": Path(each).read_text()} for each in mini_batch]
"""


class Site(http.server.BaseHTTPRequestHandler):
    """What is asked for says what happens. asked: how often each path was."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        name, _, _ = self.path.partition("?")
        Site.asked[name] += 1
        body = f"content of {name}".encode()
        status, headers = 200, {}
        if name.startswith("/status/"):
            status = int(name[8:])
        elif name == "/flaky" and Site.asked[name] < 3:
            status, headers = 503, {"Retry-After": "0"}
        elif name.startswith("/hops/"):
            left = int(name[6:])
            if left:
                status, headers = 302, {"Location": f"/hops/{left - 1}"}
        elif name == "/file":
            status, headers = 302, {"Location": "file:///etc/passwd"}
        elif name == "/large":
            headers = {"Content-Length": str(web.LARGEST + 1)}
        elif name == "/short":
            headers = {"Content-Length": str(len(body) + 10)}
        self.send_response(status)
        for each, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(each, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Site.asked.clear()
    monkeypatch.setattr(web, "_PAUSES", (0.01,))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "read.py"
    path.write_text(SCRIPT)
    return path


def fetched(url: str) -> bytes:
    import io

    content = io.BytesIO()
    web.fetch(url, content)
    return content.getvalue()


def test_the_web_is_read_within_limits(site: str) -> None:
    assert fetched(f"{site}/a b é?x=1#part") == b"content of /a%20b%20%C3%A9"
    assert fetched(f"{site}/flaky") == b"content of /flaky"
    assert Site.asked["/flaky"] == 3
    assert fetched(f"{site}/hops/5") == b"content of /hops/0"
    for path, why in (
        ("/status/404", "the server answered 404 Not Found"),
        ("/status/500", r"the server answered 500 Internal Server Error \(tried 3 times\)"),
        ("/hops/6", "redirects more than 5 times"),
        ("/file", "redirects to no address of the web"),
        ("/large", "has 268,435,457 bytes, and a file from the web may have 268,435,456 bytes"),
        ("/short", r"cut off after \d+ .*bytes"),
    ):
        with pytest.raises(StorageError, match=why) as caught:
            fetched(f"{site}{path}?sig=very-secret")
        assert "very-secret" not in str(caught.value)
    assert Site.asked["/status/404"] == 1
    with pytest.raises(StorageError, match="connection refused"):
        fetched("http://127.0.0.1:1/x")


def test_private_addresses_are_read_where_that_is_allowed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.ALLOWED, "127.0.0.1")
    assert fetched(f"{site}/x") == b"content of /x"
    monkeypatch.setenv(network.ALLOWED, "")
    with pytest.raises(StorageError, match=r"is a private address.*\n.*--allow-host"):
        fetched(f"{site}/x")
    assert Site.asked["/x"] == 1


def test_a_list_of_everything(tmp_path: Path, s3: str, site: str, script: Path, cli: Callable[..., Ran]) -> None:
    from tally.storage import open_store

    open_store(f"{s3}/in").write("b.txt", b"in a bucket")
    (tmp_path / "a.txt").write_text("beside the list")
    references = ["a.txt", f"{s3}/in/b.txt", f"{site}/c?sig=very-secret", "none.txt", f"{site}/status/404", None]
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"image": each, "n": n}) for n, each in enumerate(references))
    )
    out = tmp_path / "out"
    ran = cli("score", "--items", tmp_path / "list.jsonl", "--keep", "*", "--model", script, "--out", out)
    assert ran.code == 0, ran.err
    masked = f"{site}/c?sig=***"
    assert pq.read_table(out / "part-00000.parquet").to_pylist() == [
        {"key": "a.txt", "image": "a.txt", "n": 0, "text": "beside the list"},
        {"key": f"{s3}/in/b.txt", "image": f"{s3}/in/b.txt", "n": 1, "text": "in a bucket"},
        {"key": masked, "image": masked, "n": 2, "text": "content of /c"},
    ]
    from tally import Job

    dead = Job(str(out)).dead().to_pydict()
    assert dead["key"] == ["none.txt", f"{site}/status/404", "list.jsonl#6"]
    assert "very-secret" not in (out / "_manifest.json").read_text()
    (tmp_path / "none.txt").write_text("by now")
    assert cli("jobs", "retry", out, "--dead", "-q").code == 0
    assert "by now" in pq.read_table(sorted(out.glob("part-*.parquet"))).column("text").to_pylist()


def test_standard_input(tmp_path: Path, script: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    (tmp_path / "a.txt").write_text("A")
    monkeypatch.chdir(tmp_path)

    def score(text: str, *more: str) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return cli("score", "--items", "-", "--model", script, "--out", tmp_path / "out.csv", "-q", *more)

    assert score("a.txt\r\n").code == 0
    assert (tmp_path / "out.csv").read_text() == "key,text\na.txt,A\n"
    assert "already did this same job" in score("a.txt\r\n").err
    assert score("path,id\na.txt,7\n", "--key", "id", "--overwrite").code == 0
    assert (tmp_path / "out.csv").read_text() == "key,text\n7,A\n"
    assert "standard input is empty" in score("").err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    "ids",
    [["007", "7", "7.0"], ["00725", "00812", "00999"], ["1.50", "1.5", "2"], ["123456789012345678", "0.1", "1e3"]],
)
def test_keys_and_references_are_read_as_they_are_written(tmp_path: Path, suffix: str, ids: list[str]) -> None:
    from tally.sources.lists import open_list

    names = [f"{each}0" for each in ids]
    rows = [{"path": name, "id": each} for name, each in zip(names, ids, strict=True)]
    lines = (
        [json.dumps(row) for row in rows]
        if suffix == ".jsonl"
        else ["path,id", *map(",".join, zip(names, ids, strict=True))]
    )
    (tmp_path / f"list{suffix}").write_text("\n".join(lines) + "\n")
    found = open_list(str(tmp_path / f"list{suffix}"), item_column="path", key="id")
    found = found.located(str(tmp_path / "work"))
    found.prepare()
    [page] = found.pages()
    assert (page.references, page.keys) == (names, ids)


def test_what_is_wrong_with_lists(tmp_path: Path, script: Path, cli: Callable[..., Ran]) -> None:
    (tmp_path / "twice.txt").write_text("a\nb\na\nc\nb\nb\n")
    (tmp_path / "odd.csv").write_text("one,two\n1,2\n")
    (tmp_path / "two.csv").write_text("image,url\na,b\n")
    (tmp_path / "good.csv").write_text("image,id\na,b\n")

    def refused(*options: object) -> str:
        ran = cli("score", *options, "--model", script, "--out", tmp_path / "out")
        assert ran.code
        return ran.err

    (tmp_path / "headless.csv").write_text("a.jpg\nb.jpg\n")
    assert "'a.jpg' looks like an item" in refused("--items", tmp_path / "headless.csv")
    assert "have the same key: 'a' (2 times), 'b' (3 times)" in refused("--items", tmp_path / "twice.txt")
    assert "none is called so" in refused("--items", tmp_path / "odd.csv")
    assert "image and url could be it" in refused("--items", tmp_path / "two.csv")
    assert "has no column 'idd'; did you mean 'id'?" in refused("--items", tmp_path / "good.csv", "--key", "idd")
    assert "has no columns" in refused("--items", tmp_path / "twice.txt", "--keep", "x")
    assert "give one of them" in refused("--items", tmp_path / "twice.txt", tmp_path)
    assert "key: is for lists of items and databases only" in refused(script, "--key", "x")
    assert "there is no list" in refused("--items", tmp_path / "nothing.txt")


def test_on_a_server_a_list_stays_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tally.sources.lists import open_list
    from tally.sources.references import ReferenceSource
    from tally.testing.sources import chunks_of

    monkeypatch.setenv(network.ALLOWED, "")
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "in" / "list.txt").write_text(f"../secret\nlink\n{tmp_path}/secret\nfile://{tmp_path}/secret\nfine\n")
    source = ReferenceSource.describe(open_list(str(tmp_path / "in" / "list.txt")), "bytes")
    [chunk] = chunks_of(source, 10)
    errors = chunk.payload["errors"]
    assert [each is None for each in errors] == [False, False, False, False, True]
    assert all("is not below" in each[0] for each in errors[:4])
