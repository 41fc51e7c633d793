"""Jobs from bucket to bucket, typed as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.faulty import FaultyProxy
from tests.https import https
from tests.objectstores import Service
from tests.ports import free_ports

import tally
from tally.errors import StorageError
from tally.storage import buckets, open_store

COUNT = 20


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tally", *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )


def photos(data: Path) -> list[Path]:
    return sorted((data / "images" / "imagenet").glob("*.JPEG"))[:COUNT]


def options(data: Path) -> list[object]:
    models = data / "models"
    labels = models / "labels" / "imagenet_1001_background.txt"
    return ["--model", models / "classify" / "mobilenet_v2_fp32.onnx", "--task", "classify", "--labels", labels]


def rows_of(*arguments: object) -> list[dict[str, Any]]:
    ran = run("query", *arguments, "select * from results order by key", "--json")
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture
def expected(data: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What the same photos give on this machine's disk."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos(data):
        (folder / photo.name).symlink_to(photo)
    ran = run("score", folder, *options(data), "--out", tmp_path / "out", "-q")
    assert ran.returncode == 0, ran.stderr
    rows = rows_of(tmp_path / "out")
    assert len(rows) == COUNT
    return rows


@pytest.mark.parametrize("stormy", [False, True])
def test_photos_of_a_bucket_are_scored_into_a_container(
    data: Path,
    expected: list[dict[str, Any]],
    s3_server: Service,
    azure_server: Service,
    monkeypatch: pytest.MonkeyPatch,
    stormy: bool,
) -> None:
    bucket, container = (each.make(f"test-{uuid.uuid4().hex}") for each in (s3_server, azure_server))
    with FaultyProxy(s3_server.url) as source, FaultyProxy(azure_server.url) as out:
        s3_server.through(source.url).enter(monkeypatch, azure_server.through(out.url))
        store = open_store(f"{bucket}/photos")
        for photo in photos(data):
            store.upload(photo.name, photo)
        store.write("readme.txt", b"no photo")
        if stormy:
            source.random(0.15, seed=1)
            out.random(0.15, seed=2)
        ran = run("score", f"{bucket}/photos/", *options(data), "--out", f"{container}/predictions/")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found = rows_of(f"{container}/predictions")
        if stormy:
            assert source.injected.total() + out.injected.total() > 5
        source.calm()
        out.calm()
        assert [row["key"] for row in found] == [row["key"] for row in expected]
        assert found == expected
        assert open_store(container).exists("predictions/_SUCCESS")
        result = open_store(f"{container}/predictions")
        manifest = json.loads(result.read("_manifest.json"))
        names = [entry.name for entry in result.list()]
        assert names == sorted(["_SUCCESS", "_manifest.json", *(file["path"] for file in manifest["files"])])
        text = ran.stdout + ran.stderr + json.dumps(manifest)
        for secret in (*s3_server.environment.values(), *azure_server.environment.values()):
            assert secret not in text or len(secret) < 12 or secret.startswith("http"), "a secret was told"


def test_a_job_in_buckets_is_replaced_and_queried_through_python(s3: str, tmp_path: Path) -> None:
    script = tmp_path / "length.py"
    script.write_text(
        "import tally\n\n\nclass Length(tally.Scorer):\n    input = 'bytes'\n\n"
        "    def score(self, batch):\n        return [{'bytes': len(data)} for data in batch]\n"
    )
    store = open_store(s3)
    for number in range(7):
        store.write(f"in/{number}.bin", b"x" * number)
    job = tally.score(f"{s3}/in", script, f"{s3}/out.csv", quiet=True)
    assert job.results()["bytes"].to_pylist() == list(range(7))
    store.write("in/7.bin", b"seven")
    again = tally.score(f"{s3}/in", script, f"{s3}/out.csv", quiet=True, overwrite=True)
    assert again.results()["bytes"].to_pylist() == [*range(7), 5]
    names = [entry.name for entry in store.list() if not entry.name.startswith("in/")]
    assert names == ["out.csv", "out.csv.manifest.json"]


def test_mistakes_are_told_in_a_line(s3: str, data: Path) -> None:
    ran = run("score", f"{s3}/nothing/", *options(data), "--out", f"{s3}/out")
    assert ran.returncode != 0
    assert f"{s3}/nothing holds no files to score" in ran.stderr
    open_store(s3).write("photos/x.jpg", b"x")
    ran = run("score", f"{s3}/photos/", *options(data), "--out", "s3://no-such-bucket/out")
    assert ran.returncode != 0
    assert "there is no bucket 'no-such-bucket'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("secure", [False, True])
def test_another_service_is_named_as_for_tensorflow(
    s3: str, s3_server: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    open_store(s3).write("in/a.bin", b"four")
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(buckets, "_clients", {})
    inner = int(s3_server.url.rpartition(":")[2])
    [outer] = free_ports(1)
    monkeypatch.setenv("S3_ENDPOINT", f"127.0.0.1:{outer if secure else inner}")
    monkeypatch.setenv("S3_USE_HTTPS", str(secure).lower())
    with https(tmp_path, outer, inner):
        if secure:
            monkeypatch.setenv("S3_VERIFY_SSL", "false")
        assert open_store(s3).read("in/a.bin") == b"four"
        if secure:  # a certificate that nobody has signed
            monkeypatch.delenv("S3_VERIFY_SSL")
            monkeypatch.setattr(buckets, "_clients", {})
            monkeypatch.setitem(buckets._RETRY, "max_retries", 0)
            with pytest.raises(StorageError, match=r"its certificate is not to be trusted \(UnknownIssuer\)"):
                open_store(s3).read("in/a.bin")
