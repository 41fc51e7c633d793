"""Buckets with folders made in a console, and with keys that are no paths."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.objectstores import Service

from tally.errors import StorageError
from tally.jobs.facade import Jobs
from tally.storage import open_store
from tally.storage.base import TEMPORARY

SCORER = """
import tally


class Length(tally.Scorer):
    input = "bytes"
    columns = {"bytes": "int64"}

    def score(self, batch):
        return [{"bytes": len(each)} for each in batch]
"""


@pytest.fixture
def put(s3_server: Service, s3: str) -> object:
    """Writes an object under any key, as other programs do."""
    bucket = s3.partition("://")[2]

    def write(key: str, content: bytes = b"x") -> None:
        kind = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{s3_server.url}/{bucket}/{quote(key)}", content, kind, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    return write


def run(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "tally", *map(str, arguments)]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    path = tmp_path / "length.py"
    path.write_text(SCORER)
    return path


def test_folders_made_in_a_console_are_no_items(s3: str, put: object, scorer: Path, tmp_path: Path) -> None:
    assert callable(put)
    for folder in ("ok/", "ok/inner/", "ok/none/", "empty/", "out/"):
        put(folder, b"")
    put("ok/a.txt")
    put("ok/inner/b")
    put("ok/nothing.txt", b"")
    put("ok/nothing", b"")
    names = ["a.txt", "inner/b", "nothing", "nothing.txt"]
    for place in (f"{s3}/ok", f"{s3}/ok/"):
        assert [entry.name for entry in open_store(place).list()] == names
    assert [entry.name for entry in open_store(s3).list()] == [f"ok/{name}" for name in names]
    assert list(open_store(f"{s3}/empty").list()) == []
    assert "read" in run("doctor", f"{s3}/ok/")
    run("score", f"{s3}/ok/", "--model", scorer, "--out", f"{s3}/out/", "-q")
    record = Jobs().store.newest(limit=1)[0]
    assert (record.done, record.dead) == (4, 0)
    assert "_SUCCESS" in [entry.name for entry in open_store(f"{s3}/out").list()]


def test_an_odd_key_costs_one_item(s3: str, put: object, scorer: Path, tmp_path: Path) -> None:
    """Of pages of a hundred: others come before it, with it, and after it."""
    assert callable(put)
    odd = ["//x", "/k", "b//c", "e/../f", "g/./h"]
    fine = [f"a/{number:03}" for number in range(120)] + ["b/c", "b/0", "m%20n", "o p+q", "ü", "z/last"]
    for key in [*odd, *fine, "folder/", "q//"]:
        put(key, b"" if key.endswith("/") else b"x")
    store = open_store(s3)
    listed = [entry.name for entry in store.list()]
    assert listed == sorted([*odd, *fine])
    for after in ("a/050", "b/c", "g"):
        assert [entry.name for entry in store.list(after=after)] == [name for name in listed if name > after]
    assert [entry.name for entry in open_store(f"{s3}/b").list()] == ["/c", "0", "c"]
    assert all(entry.mark and entry.size == 1 for entry in store.list())

    run("score", s3, "--model", scorer, "--out", tmp_path / "out", "-q")
    record = Jobs().store.newest(limit=1)[0]
    assert (record.items, record.dead) == (len(listed), len(odd))
    assert sorted(each.key for each in Jobs().store.dead(record.id)) == odd
    assert "ok" in run("doctor", s3)


def test_a_listing_of_odd_keys_that_is_refused(s3: str, put: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(put)
    put("a//b")
    assert len(list(open_store(s3).list())) == 1
    monkeypatch.setattr(
        "tally.storage.s3_listing._signed", lambda client, bucket, *_: f"{os.environ['AWS_ENDPOINT']}/no"
    )
    with pytest.raises(StorageError, match=r"cannot list .*: .*404"):
        list(open_store(s3).list())


def test_what_killed_downloads_left_is_swept(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_CACHE", str(tmp_path / "cache"))
    store = open_store(s3)
    for name in ("a", "b"):
        store.write(name, b"content")
    kept = store.local_path("a")
    left = kept.with_name(f"{TEMPORARY}left")
    left.write_bytes(b"half")
    assert store.local_path("b").read_bytes() == b"content"
    assert not left.exists()
    assert kept.read_bytes() == b"content"
