"""Real series with gaps, repeated and backward stamps: trained on their early part, the rest scored."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import compute, parquet

from tally.scorers.per_key import packed

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'tally-scoring[sklearn]'")

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "nab.py"
ROWS = {
    "realKnownCause/machine_temperature_system_failure": 22_695,
    "realAWSCloudwatch/ec2_disk_write_bytes_1ef3de": 4730,
    "realAWSCloudwatch/iio_us-east-1_i-a2eb1cd9_NetworkIn": 1243,
}
"""Of three series, as the list of the data says."""


@pytest.fixture(scope="module")
def nab(data: Path) -> Path:
    path = data / "sensors" / "nab"
    if not path.is_dir():
        pytest.skip(f"there are no series of NAB at {path}")
    return path


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """The benchmark, whose report is in the documentation."""
    spec = importlib.util.spec_from_file_location("nab_report", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scored(cli: Callable[..., Any], nab: Path, report: ModuleType, tmp_path: Path) -> Callable[[str], pa.Table]:
    """Trains and scores one of the report's variants; returns the results."""
    early, late, _ = report.read(nab)
    parquet.write_table(early, tmp_path / "early.parquet")
    parquet.write_table(late, tmp_path / "late.parquet")

    def run(variant: str) -> pa.Table:
        for command in report.commands(tmp_path, variant):
            ran = cli(*command)
            assert ran.code == 0, ran.err
        return parquet.read_table(tmp_path / f"{variant.replace(' ', '-')}.parquet")

    return run


def test_series_are_split_by_rows_and_keep_their_order(nab: Path, report: ModuleType) -> None:
    early, late, windows = report.read(nab)
    assert len(late["series"].unique()) == 13
    for name, rows in ROWS.items():
        one, two = (table.filter(compute.equal(table["series"], name)) for table in (early, late))
        assert one.num_rows == int(0.15 * rows)
        assert one.num_rows + two.num_rows == rows
    disk = late.filter(compute.equal(late["series"], "realAWSCloudwatch/ec2_disk_write_bytes_1ef3de"))
    steps = np.diff(disk["timestamp"].to_numpy()).astype("timedelta64[s]").astype(int)
    assert (steps <= 0).any()
    assert (steps > 300).any()
    assert len(windows["realKnownCause/machine_temperature_system_failure"]) == 4


def test_every_reading_is_scored_and_failures_of_the_machine_are_found(
    scored: Callable[[str], pa.Table], nab: Path, report: ModuleType, tmp_path: Path
) -> None:
    _, late, windows = report.read(nab)
    results = scored("each value")
    # Every row once, in the order of the series, repeated and backward stamps included.
    for column in ("series", "timestamp"):
        assert results[column].to_pylist() == late[column].to_pylist()
    assert not results["score"].null_count
    assert results["anomaly"].equals(compute.less_equal(results["score"], 0.0))
    found = report.measure(results, late, windows)
    assert len(found) == 13
    assert sum(each.rows for each in found.values()) == late.num_rows
    assert all(each.anomalous for each in found.values())
    machine = found["realKnownCause/machine_temperature_system_failure"]
    # The first of its four windows lies in the part that is trained with.
    assert (machine.windows, machine.found) == (3, 3)
    assert machine.right / machine.anomalous > 0.5
    assert machine.labelled / machine.rows < 0.1
    taxi = found["realKnownCause/nyc_taxi"]
    assert (taxi.windows, taxi.found) == (5, 5)
    assert sum(each.found for each in found.values()) >= 22
    models = packed.inspect(tmp_path / "m-each-value" / packed.FILE, {}, trusted=False)
    assert (models["by"], models["names"]) == (["series"], ["value"])


def test_hours_are_gathered_whatever_the_order_of_readings(
    scored: Callable[[str], pa.Table], nab: Path, report: ModuleType
) -> None:
    _, late, windows = report.read(nab)
    results = scored("hours")
    hours = late["timestamp"].to_numpy().astype("datetime64[h]")
    expected = {
        name: np.unique(hours[late["series"].to_numpy(zero_copy_only=False) == name])
        for name in late["series"].unique().to_pylist()
    }
    for name, starts in expected.items():
        mine = results.filter(compute.equal(results["series"], name))["timestamp"].to_numpy()
        assert np.array_equal(mine.astype("datetime64[h]"), starts), name
    found = report.measure(results, late, windows)
    assert found["realKnownCause/machine_temperature_system_failure"].found == 3
