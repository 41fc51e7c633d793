"""Everything that a job of a team stands on is hurt, again and again; its rows equal those of an undisturbed run.

A small storm on this machine by default. ``TALLY_TEST_FULL=1``: as many photos and faults as were promised, for each of
the jobs, and on a cluster; ``TALLY_TEST_SEED`` draws other moments.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.clusters import Cluster
from tests.extent import FULL
from tests.faults.storms import BUCKET, CLUSTER, LOCAL, SCORERS, Weather, World, drawn, rage, tally, world
from tests.videos import assert_same_video, write_clip

SEED = int(os.environ.get("TALLY_TEST_SEED", "1"))
PHOTOS = 2000 if FULL else 100
FRAMES = 600 if FULL else 120
COPIES = 6 if FULL else 1
FAULTS = 30
SECONDS = 700 if FULL else 300
"""For each job."""
pytestmark = pytest.mark.timeout(4 * SECONDS)

JOBS = ("photos", "clip", "readings")


@pytest.fixture
def photos(data: Path, tmp_path: Path) -> Path:
    """Real photos, each under several names."""
    kinds = ("imagenet/*.JPEG", "coco/*.jpg", "retrain_animals4/*/*.jpg")
    real = [path for kind in kinds for path in sorted((data / "images").glob(kind))]
    folder = tmp_path / "photos"
    for number in range(PHOTOS):
        path = folder / f"{number % 7}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(real[number * 7 % len(real)])
    return folder


@pytest.fixture
def weights(data: Path, tmp_path: Path) -> Path:
    """Artifacts of the scorer of photos."""
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(data / "models" / "classify" / "mobilenet_v1_025_128_u8.onnx", folder / "model.onnx")
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", FRAMES, gop=40, sound=FRAMES / 25)


@pytest.fixture
def readings(data: Path, tmp_path: Path) -> Path:
    first, *lines = (data / "sensors" / "azure_iot" / "sensor_data.csv").read_text().splitlines()
    path = tmp_path / "readings.csv"
    path.write_text("\n".join([first, *lines * COPIES, ""]))
    return path


@pytest.mark.ray
@pytest.mark.skipif(not FULL, reason="a storm over a cluster takes minutes: TALLY_TEST_FULL=1")
@pytest.mark.parametrize("what", JOBS)
def test_on_a_cluster(
    what: str, request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    material: Path = request.getfixturevalue(what)
    folder = tmp_path_factory.mktemp("storm")  # short: it holds sockets
    with world(folder, cluster=lambda env: Cluster(2, cpus=1, env=env), PACE="0.08") as one:
        assert one.cluster is not None
        ray = ("--engine", "ray", "--address", one.cluster.dashboard)
        if what == "photos":
            given = score_photos(one, material, request.getfixturevalue("weights"), ray, CLUSTER)
        elif what == "clip":
            given = score_video(one, material, ray, CLUSTER)
        else:
            given = score_readings(one, material, data, ray, CLUSTER)
        one.close_cluster()
        out = {"photos": "out", "clip": "out.mp4", "readings": "out.parquet"}[what]
        expect_nothing(one.in_results(given, out))
        expect_nothing(one.left())


def test_on_this_machine(photos: Path, weights: Path, clip: Path, readings: Path, data: Path, tmp_path: Path) -> None:
    with world(tmp_path / "storm", PACE="0.04") as one:
        given = score_photos(one, photos, weights, (), LOCAL)
        outs = ["out"]
        if FULL:
            given |= score_video(one, clip, (), LOCAL)
            given |= score_readings(one, readings, data, (), LOCAL)
            outs += ["out.mp4", "out.parquet"]
        expect_nothing(one.in_results(given, *outs))
        expect_nothing(one.left())


# -- the jobs --------------------------------------------------------------------------------------------------


def score_photos(one: World, photos: Path, weights: Path, engine: Sequence[object], kinds: Sequence[str]) -> set[str]:
    options = ("--model", SCORERS / "photos.py", "--artifacts", weights)
    calm(photos, one.folder / "calm", *options)
    expected = rows(pq.read_table(sorted((one.folder / "calm").glob("part-*.parquet"))))
    assert len({row["key"] for row in expected}) == len(expected) == PHOTOS

    given = one.put(
        {f"photos/{path.relative_to(photos)}": path for path in sorted(photos.rglob("*")) if path.is_file()}
    )
    disturbed(
        one,
        "photos/",
        "out/",
        (*options, *engine),
        drawn(kinds, FAULTS if FULL else len(kinds), SEED, 0.9 if FULL else 0.75),
        PHOTOS,
    )
    manifest = json.loads(one.get("out/_manifest.json").read_text())
    found = pa.concat_tables(pq.read_table(one.get(f"out/{file['path']}")) for file in manifest["files"])
    assert rows(found) == expected
    return given


def score_video(one: World, clip: Path, engine: Sequence[object], kinds: Sequence[str]) -> set[str]:
    options = ("--model", SCORERS / "slow_pictures.py", "--crf", 0)
    calm(clip, one.folder / "calm.mp4", *options)

    given = one.put({"clips/clip.mp4": clip})
    disturbed(
        one,
        "clips/clip.mp4",
        "out.mp4",
        (*options, *engine),
        drawn(kinds, FAULTS if FULL else len(kinds), SEED + 1, 0.8 if FULL else 0.5),
        FRAMES,
    )
    assert_same_video(one.get("out.mp4"), one.folder / "calm.mp4")
    return given


def score_readings(one: World, readings: Path, data: Path, engine: Sequence[object], kinds: Sequence[str]) -> set[str]:
    """With a model for each device and tag."""
    models = f"Device,Tag={data}/models/sensor_ocsvm/device{{Device}}_tag{{Tag}}.onnx"
    options = ("--model-per", models, "--keep", "TS,Value", "--batch-size", 20)
    calm(readings, one.folder / "calm.parquet", *options)
    expected = pq.read_table(one.folder / "calm.parquet")

    given = one.put({"readings/readings.csv": readings})
    count = expected.num_rows
    disturbed(
        one,
        "readings/readings.csv",
        "out.parquet",
        (*options, *engine),
        drawn(kinds, FAULTS if FULL else len(kinds), SEED + 2, 0.8 if FULL else 0.5),
        count,
    )
    found = pq.read_table(one.get("out.parquet"))
    assert found["key"].to_pylist() == [f"readings.csv#{number}" for number in range(1, count + 1)]
    # Sums of floats depend, in their last digits, on how many rows are computed at once.
    assert found.drop_columns("score").equals(expected.drop_columns("score"))
    assert np.allclose(found["score"], expected["score"], rtol=0, atol=1e-9)
    return given


def calm(source: Path, out: Path, *options: object) -> None:
    """The same by the local engine on plain files, undisturbed."""
    environment = {**os.environ, "TALLY_HOME": str(out.parent / "calm-home")}
    subprocess.run(
        tally("score", source, "--out", out, "--workers", 2, "-q", *options), check=True, timeout=600, env=environment
    )


def disturbed(
    one: World, source: str, out: str, options: Sequence[object], faults: Sequence[Any], items: int
) -> Weather:
    place = (f"s3://{BUCKET}/{source}", "--out", f"s3://{BUCKET}/{out}", "--workers", 2)
    weather = rage(one, tally("score", *place, *options), faults, seed=SEED, seconds=SECONDS)
    print(f"\n{out}: {weather}; at the proxy, so far: {dict(one.proxy.injected)}")
    assert not weather.gave_up, "\n".join(weather.gave_up)
    job = weather.job
    assert (job["items"], job["done"], job["dead"]) == (items, items, 0), one.told()
    return weather


def rows(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: str(row["key"]))


def expect_nothing(left: list[str]) -> None:
    assert not left, "\n".join(left)
