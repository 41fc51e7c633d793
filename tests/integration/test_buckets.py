"""Videos and tables in a bucket, as a user types it: what comes out is what comes out of folders."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tests.objectstores import Service, azurite, moto_s3
from tests.videos import assert_same_video

from tally.errors import SourceNotFoundError, StorageError
from tally.media.video.probe import Prober, probe
from tally.sources.base import Timings
from tally.sources.tables.source import TableSource
from tally.storage import open_store
from tally.testing.sources import Recorder, chunks_of

Cli = Callable[..., Any]

IDENTITY = """
import tally


class Identity(tally.Scorer):
    output = "image"
    batch_size = 5

    def score(self, batch):
        return batch
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with moto_s3() as service:
        yield service


@pytest.fixture(scope="module", params=["s3", "az"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    with azurite() as service:
        yield service


_number = itertools.count(1)


def make_bucket(service: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket of the test's own, in a service that this process now uses."""
    service.enter(monkeypatch)
    return service.make(f"test-{next(_number)}")


def names(url: str) -> list[str]:
    return [entry.name for entry in open_store(url).list()]


def excerpt(source: Path, target: Path, frames: int) -> Path:
    """The first so many frames of a clip, with the sound beside them, as they are."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams.get()}
        video = given.streams.video[0]
        left = frames
        for packet in given.demux():
            if not packet.size:
                continue
            if packet.stream_index == video.index:
                left -= 1
            if left < 0:
                break
            packet.stream = streams[packet.stream_index]
            made.mux(packet)
    return target


# -- videos --------------------------------------------------------------------------------------------


def test_a_clip_in_a_bucket_becomes_a_video_in_a_bucket(
    cli: Cli, data: Path, s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(s3, monkeypatch)
    clip = excerpt(data / "video" / "plain" / "exo_sample_with_increasing_timestamps_360p.mp4", tmp_path / "x.mp4", 40)
    open_store(bucket).upload("clips/x.mp4", clip)
    model = tmp_path / "identity.py"
    model.write_text(IDENTITY)
    options = ("--model", model, "--crf", 0, "--workers", 1)  # without loss, how it is cut into chunks changes nothing

    ran = cli("score", clip, *options, "--out", tmp_path / "out.mp4")
    assert ran.code == 0, ran.err
    ran = cli("score", f"{bucket}/clips/x.mp4", *options, "--out", f"{bucket}/out.mp4")
    assert ran.code == 0, ran.err
    assert "40 of 40 frames scored" in ran.err
    assert names(bucket) == ["clips/x.mp4", "out.mp4", "out.mp4.manifest.json"]
    assert not list((tmp_path / "tally-home").rglob("*.mp4"))  # the source was not fetched
    made = tmp_path / "made.mp4"
    made.write_bytes(open_store(bucket).read("out.mp4"))
    assert_same_video(made, tmp_path / "out.mp4")

    ran = cli("score", f"{bucket}/clips/", *options, "--out", f"{bucket}/styled/")
    assert ran.code == 0, ran.err
    assert names(f"{bucket}/styled") == ["_SUCCESS", "_manifest.json", "x.mp4"]
    made.write_bytes(open_store(bucket).read("styled/x.mp4"))
    assert_same_video(made, tmp_path / "out.mp4")


def test_a_video_in_a_bucket_is_looked_at_from_another_process(
    data: Path, s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(s3, monkeypatch)
    clip = data / "video" / "plain" / "exo_sample_with_increasing_timestamps_360p.mp4"
    open_store(bucket).upload("x.mp4", clip)
    with closing(Prober()) as prober:
        found = prober("x.mp4", bucket, "x.mp4")
        local = prober("x.mp4", str(clip.parent), clip.name)
        assert found.video.mark
        assert replace(found.video, root="", name="", mark="") == replace(local.video, root="", name="", mark="")
        assert (found.ticks, found.packets, found.keys) == (local.ticks, local.packets, local.keys)
        with pytest.raises(SourceNotFoundError, match=rf"{bucket}/y\.mp4"):
            prober("y.mp4", bucket, "y.mp4")
        with pytest.raises(StorageError, match=rf"{bucket}/x\.mp4 has changed since the job was planned"):
            probe("x.mp4", bucket, "x.mp4", (found.video.size, "another mark"))


# -- tables --------------------------------------------------------------------------------------------


@pytest.fixture
def readings(data: Path) -> Any:
    return pyarrow.csv.read_csv(data / "sensors" / "azure_iot" / "sensor_data.csv")


def fill(place: str, readings: Any) -> None:
    """A Parquet file of two row groups, and a CSV file."""
    import io

    half = readings.num_rows // 2
    file = io.BytesIO()
    pq.write_table(readings.slice(0, half), file, row_group_size=half // 2 + 1)
    open_store(place).write("a.parquet", file.getvalue())
    file = io.BytesIO()
    pyarrow.csv.write_csv(readings.slice(half), file)
    open_store(place).write("b.csv", file.getvalue())


def rows(place: str) -> list[dict[str, Any]]:
    store = open_store(place)
    found = [store.read(entry.name) for entry in store.list() if entry.name.startswith("part-")]
    return [row for each in found for row in pq.read_table(pyarrow.BufferReader(each)).to_pylist()]


def test_a_model_per_key_scores_a_table_of_a_bucket(
    cli: Cli, data: Path, readings: Any, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(service, monkeypatch)
    template = data / "models" / "sensor_ocsvm" / "device{Device}_tag{Tag}.onnx"
    found = []
    for source, out in ((tmp_path / "in", tmp_path / "out"), (f"{bucket}/in", f"{bucket}/out")):
        fill(str(source), readings)
        ran = cli(
            *("score", source, "--model-per", f"Device,Tag={template}", "--keep", "TS,Value"),
            *("--out", out, "--workers", 2),
        )
        assert ran.code == 0, ran.err
        found.append(sorted(rows(str(out)), key=lambda row: str(row["key"])))
    local, remote = found
    assert len(local) == readings.num_rows
    assert local == remote
    assert [name for name in names(f"{bucket}/out") if not name.startswith("part-")] == ["_SUCCESS", "_manifest.json"]


PREPARE = """
import pickle, sys
pickle.load(sys.stdin.buffer).prepare()
"""


def test_work_files_of_one_machine_are_read_on_others(
    readings: Any, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = make_bucket(service, monkeypatch)
    fill(f"{bucket}/in", readings)
    source = TableSource.describe([f"{bucket}/in"], features=["Value"], by=["Device", "Tag"], keep=["TS"])
    source = source.located(f"{bucket}/out/_tally/work")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-c", PREPARE],
        input=pickle.dumps(source),
        env={**os.environ, "TALLY_HOME": str(elsewhere), "TMPDIR": str(elsewhere)},
        check=True,
        timeout=300,
    )
    for path in sorted(elsewhere.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "here"))
    chunks = chunks_of(source, readings.num_rows // 4)
    scored = 0
    for chunk in chunks:
        source = pickle.loads(pickle.dumps(source))  # a worker of another machine
        scored += sum(len(batch.keys) for batch in source.read(chunk, Recorder(), Timings()))
    assert scored == readings.num_rows
    assert not (tmp_path / "here").exists()  # nothing was fetched whole
