"""Whole jobs over tables of real sensor readings, with a model for each device and sensor."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tally
from tally.jobs.facade import Jobs

Cli = Callable[..., Any]
TEMPLATE = "device{Device}_tag{Tag}.onnx"


@pytest.fixture
def readings(data: Path) -> Path:
    return data / "sensors" / "azure_iot" / "sensor_data.csv"


@pytest.fixture
def models(data: Path) -> Path:
    return data / "models" / "sensor_ocsvm"


def expected(models: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((models / "reference.json").read_text())
    return found


def test_the_models_of_fifteen_sensors_give_their_counts(
    cli: Cli, readings: Path, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.csv"
    ran = cli(
        *("score", readings, "--model-per", f"Device,Tag={models / TEMPLATE}"),
        *("--keep", "TS,Value", "--out", out),
    )
    assert ran.code == 0, ran.err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "Device", "Tag", "TS", "Value", "anomaly", "score"]
    counts = Counter(f"{row['Device']}_{row['Tag']}" for row in rows)
    anomalies = Counter(f"{row['Device']}_{row['Tag']}" for row in rows if row["anomaly"] == "true")
    assert counts == {name: each["n"] for name, each in expected(models).items()}
    assert anomalies == {name: each["anomalies"] for name, each in expected(models).items()}
    with readings.open(newline="") as file:
        given = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [f"sensor_data.csv#{n}" for n in range(1, len(given) + 1)]
    assert [(row["Device"], row["Tag"], float(row["Value"])) for row in rows] == [
        (row["Device"], row["Tag"], float(row["Value"])) for row in given
    ]


@pytest.fixture
def trained(readings: Path, tmp_path: Path) -> str:
    """A model for each device and sensor, trained on its first readings; the template of their files."""
    import numpy as np
    import skops.io
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import OneClassSVM

    values: dict[tuple[str, str], list[float]] = {}
    with readings.open(newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault((row["Device"], row["Tag"]), []).append(float(row["Value"]))
    (tmp_path / "models").mkdir()
    for (device, tag), each in values.items():
        model = make_pipeline(StandardScaler(), OneClassSVM(nu=0.02)).fit(np.array(each[:500])[:, None])
        skops.io.dump(model, tmp_path / "models" / f"{device}_{tag}.skops")
    return str(tmp_path / "models" / "{Device}_{Tag}.skops")


def test_packed_models_give_the_same_and_are_registered(cli: Cli, readings: Path, trained: str, tmp_path: Path) -> None:
    packed = tmp_path / "sensors"
    ran = cli("models", "pack", trained, "--by", "Device,Tag", "--out", packed, "--name", "sensors")
    assert ran.code == 0, ran.err
    assert cli("models", "alias", "sensors", "champion", "1").code == 0
    apart = tally.score(readings, trained, tmp_path / "apart.parquet", by="Device,Tag", quiet=True)
    job = tally.score(readings, "models:/sensors@champion", tmp_path / "packed.parquet", quiet=True)
    assert job.results().equals(apart.results())
    assert job.results().num_rows == 17768
    assert 0 < sum(job.results()["anomaly"].to_pylist()) < 17768
    assert job.manifest["model"]["kind"] == "packed"


def test_a_sensor_without_a_model_costs_nobody_else_anything(
    cli: Cli, readings: Path, models: Path, tmp_path: Path
) -> None:
    some = tmp_path / "models"
    shutil.copytree(models, some)
    absent = some / TEMPLATE.format(Device=3, Tag=4)
    kept = absent.read_bytes()
    absent.chmod(0o644)
    some.chmod(0o755)
    absent.unlink()
    job = tally.score(readings, some / TEMPLATE, tmp_path / "out", by=["Device", "Tag"], quiet=True)
    lost = expected(models)["3_4"]["n"]
    [dead] = job.dead().to_pylist()
    assert dead["key"] == "Device=3,Tag=4"
    assert absent.name in dead["error"]
    assert f"{lost:,} rows" in dead["error"]
    assert job.results().num_rows == 17768 - lost
    absent.write_bytes(kept)
    again = job.retry(quiet=True)
    assert again.dead().num_rows == 0
    assert again.record.items == again.record.done == again.results().num_rows == 17768
    found = Counter(f"{row['Device']}_{row['Tag']}" for row in again.results().to_pylist() if row["anomaly"])
    assert found == {name: each["anomalies"] for name, each in expected(models).items()}


def test_windows_of_readings_are_scored(cli: Cli, readings: Path, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "def init(): pass\n"
        "def run(df):\n"
        "    return df.assign(spread=df.Value_max - df.Value_min)[['spread', 'Value_mean', 'Value_last', 'count']]\n"
    )
    out = tmp_path / "hourly.parquet"
    ran = cli(
        *("score", readings, "--model", script, "--by", "Device,Tag", "--time", "TS", "--window", "1h"),
        *("--aggregate", "mean,min,max,last,count", "--out", out),
    )
    assert ran.code == 0, ran.err
    rows = pq.read_table(out).to_pylist()
    by_hand = _by_hand(readings)
    assert len(rows) == len(by_hand)
    for row in rows:
        values = by_hand[row["Device"], row["Tag"], row["TS"].strftime("%Y-%m-%d %H")]
        assert row["count"] == len(values)
        assert row["spread"] == pytest.approx(max(values) - min(values))
        assert row["Value_mean"] == pytest.approx(sum(values) / len(values))
        assert row["Value_last"] == values[-1]
    assert rows[0]["key"].startswith("1/1/2018-08-28T23:00:00")


def _by_hand(readings: Path) -> dict[tuple[int, int, str], list[float]]:
    found: dict[tuple[int, int, str], list[tuple[str, int, float]]] = {}
    with readings.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            key = int(row["Device"]), int(row["Tag"]), row["TS"][:13]
            found.setdefault(key, []).append((row["TS"], number, float(row["Value"])))
    return {key: [value for *_, value in sorted(values)] for key, values in found.items()}


def test_a_job_on_a_table_says_what_is_wrong_at_once(cli: Cli, readings: Path, models: Path, tmp_path: Path) -> None:
    ran = cli(
        *("score", readings, "--model-per", f"Device,Tga={models / 'device{Device}_tag{Tga}.onnx'}"),
        *("--keep", "Valu", "--out", tmp_path / "out"),
    )
    assert ran.code == 2
    for part in ("'Tga'", "did you mean 'Tag'?", "'Valu'", "did you mean 'Value'?"):
        assert part in ran.err
    assert Jobs().store.newest() == []


def test_models_of_windows_are_given_windows(cli: Cli, readings: Path, tmp_path: Path) -> None:
    by = ("--by", "Device,Tag", "--value", "Value", "--time", "TS", "--window", "10m", "--aggregate", "mean,max")
    assert cli("train", "anomaly", readings, *by, "--out", tmp_path / "slow").code == 0
    job = tally.score(readings, "models:/slow", tmp_path / "out", quiet=True)
    said = tally.score(
        readings, "models:/slow", tmp_path / "said", quiet=True, time="TS", window="10m", aggregate="mean,max"
    )
    assert job.results().equals(said.results())
    assert job.results().column_names == ["key", "Device", "Tag", "TS", "anomaly", "score"]
    assert {row["TS"].minute % 10 for row in job.results().to_pylist()} == {0}
    other = cli(
        "score", readings, "--model", "models:/slow", "--time", "TS", "--window", "1h", "--out", tmp_path / "no"
    )
    assert other.code == 2
    assert "Value_max" in other.err
