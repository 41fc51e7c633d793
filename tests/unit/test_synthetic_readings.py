"""Simulated readings: they depend on the seed alone, however they are cut, and hold what was asked for."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from pyarrow import csv, parquet

from tally.cli.simulate import simulate as command
from tally.errors import OutputExistsError, SpecError
from tally.training.anomaly import synthetic_readings
from tally.training.anomaly.synthetic_readings import KINDS, Readings

OUT = Path("nowhere")


def made(**given: Any) -> tuple[pa.Table, pa.Table]:
    """All readings, and what is known of the anomalous ones."""
    tables = list(Readings(out=OUT, **given).tables())
    return pa.concat_tables(a for a, _ in tables), pa.concat_tables(b for _, b in tables)


def matrix(table: pa.Table, sensors: int) -> np.ndarray[Any, Any]:
    """Values of readings without gaps, ``float64[time, sensor]``."""
    return table["Value"].to_numpy().reshape(-1, sensors)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["readings", *map(str, arguments)])


def test_the_same_seed_makes_the_same_readings() -> None:
    one, again, other = (made(devices=3, hours=2, seed=seed) for seed in (1, 1, 2))
    assert one[0].equals(again[0])
    assert one[1].equals(again[1])
    assert not one[0].equals(other[0])


@pytest.mark.parametrize("rows", [7, 30, 1000])
def test_readings_do_not_depend_on_how_many_are_made_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"devices": 4, "sensors": 5, "hours": 4, "anomalies": 0.05, "gaps": 0.05, "disorder": 0.1}
    whole = made(**given)
    monkeypatch.setattr(synthetic_readings, "BLOCK_ROWS", rows)
    cut = made(**given)
    assert whole[0].combine_chunks().equals(cut[0].combine_chunks())
    assert whole[1].combine_chunks().equals(cut[1].combine_chunks())


def test_a_longer_series_begins_with_the_shorter() -> None:
    short, long = made(hours=3)[0], made(hours=30)[0]
    assert long.num_rows > 9 * short.num_rows
    assert long.slice(0, short.num_rows).combine_chunks().equals(short.combine_chunks())


def test_readings_look_like_what_was_asked_for() -> None:
    start = datetime.fromisoformat("2026-03-01T05:00:00")
    table, labels = made(devices=3, sensors=2, hours=1, every=30.0, anomalies=0, gaps=0, start=start)
    assert table.schema == pa.schema(
        {"TS": pa.timestamp("ms"), "Device": pa.int32(), "Tag": pa.int32(), "Value": pa.float64()}
    )
    assert (table.num_rows, labels.num_rows) == (3 * 2 * 120, 0)
    assert table["Device"].to_pylist()[:7] == [1, 1, 2, 2, 3, 3, 1]
    assert table["Tag"].to_pylist()[:7] == [1, 2, 1, 2, 1, 2, 1]
    times = table["TS"].to_pylist()
    assert (times[0], times[6], times[-1]) == tuple(start + timedelta(seconds=after) for after in (0, 30, 119 * 30))


def test_sensors_have_a_daily_rhythm_a_drift_and_noise_of_their_own() -> None:
    values = matrix(made(devices=4, sensors=5, hours=24 * 8, every=600.0, anomalies=0, gaps=0)[0], 20)
    day = 144
    levels = values[:day].mean(axis=0)
    assert np.unique(levels.round(3)).size == 20
    assert (np.abs(values[7 * day :].mean(axis=0) - levels) / levels > 1e-4).all()
    same_hour = [np.corrcoef(values[:-day, key], values[day:, key])[0, 1] for key in range(20)]
    half_a_day = [np.corrcoef(values[: -day // 2, key], values[day // 2 :, key])[0, 1] for key in range(20)]
    assert min(same_hour) > 0.8
    assert max(half_a_day) < -0.5
    assert (np.abs(np.diff(values, axis=0)).max(axis=0) > 0).all()


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1])
def test_about_as_many_readings_are_anomalous_as_asked_for(share: float) -> None:
    table, labels = made(devices=20, sensors=5, hours=48, anomalies=share)
    assert labels.num_rows == pytest.approx(share * table.num_rows, rel=0.15)
    assert set(labels["Kind"].to_pylist()) == set(KINDS)


def test_anomalies_are_what_their_kind_says() -> None:
    given = {"devices": 5, "sensors": 4, "hours": 72, "gaps": 0}
    (plain, _), (table, labels) = made(**given, anomalies=0), made(**given, anomalies=0.02)
    before, after = matrix(plain, 20), matrix(table, 20)
    kinds = np.zeros(after.shape, "U8")
    tick = (labels["TS"].to_numpy() - np.datetime64("2026-01-01")) // np.timedelta64(1, "m")
    key = (labels["Device"].to_numpy() - 1) * 4 + labels["Tag"].to_numpy() - 1
    kinds[tick, key] = labels["Kind"].to_numpy(zero_copy_only=False)
    assert np.array_equal(before[kinds == ""], after[kinds == ""])
    usual = (np.percentile(before, 95, axis=0) - np.percentile(before, 5, axis=0)) / 2
    off = np.abs(after - before) / usual
    assert off[kinds == "spike"].min() > 1.5
    assert off[kinds == "shift"].min() > 0.8
    assert (after[kinds == "dropout"] == 0).all()
    stuck = kinds == "stuck"
    assert (after[1:][stuck[1:] & stuck[:-1]] == after[:-1][stuck[1:] & stuck[:-1]]).mean() > 0.95


def test_gaps_are_missing_rows() -> None:
    given = {"devices": 20, "sensors": 5, "hours": 24}
    full, gappy = made(**given, gaps=0)[0], made(**given, gaps=0.05)[0]
    assert 1 - gappy.num_rows / full.num_rows == pytest.approx(0.05, rel=0.2)
    keys = ["TS", "Device", "Tag"]
    joined = gappy.join(full, keys, right_suffix="_full", join_type="inner")
    assert joined.num_rows == gappy.num_rows
    assert joined["Value"].equals(joined["Value_full"])


def test_disorder_is_repeated_and_backward_stamps() -> None:
    table = made(devices=1, sensors=1, hours=200, gaps=0, anomalies=0, disorder=0.02)[0]
    steps = np.diff(table["TS"].to_numpy()).astype("timedelta64[s]").astype(int)
    assert (steps == 0).sum() > 60  # sent twice, or set back by one reading
    assert (steps < 0).sum() > 60
    assert table.num_rows - 12_000 == pytest.approx(120, rel=0.4)
    assert steps.sum() == 11_999 * 60


def test_a_folder_holds_parts_and_a_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_readings, "PART_ROWS", 1000)
    monkeypatch.setattr(synthetic_readings, "BLOCK_ROWS", 300)
    given: dict[str, Any] = {"devices": 2, "sensors": 5, "hours": 4, "gaps": 0}
    counts = Readings(out=tmp_path / "parts", labels=tmp_path / "truth" / "labels.csv", **given).write()
    Readings(out=tmp_path / "one.parquet", **given).write()
    Readings(out=tmp_path / "one.csv", **given).write()
    parts = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in parts] == [f"readings-{part:05d}.parquet" for part in range(3)]
    assert [parquet.read_metadata(path).num_rows for path in parts] == [1000, 1000, 400]
    whole, one = parquet.read_table(tmp_path / "parts"), parquet.read_table(tmp_path / "one.parquet")
    assert whole.equals(one)
    assert counts["rows"] == whole.num_rows == 2400
    text = csv.read_csv(tmp_path / "one.csv")
    assert text["TS"].type == pa.timestamp("s")
    assert text["Value"].equals(whole["Value"])
    assert csv.read_csv(tmp_path / "truth" / "labels.csv").num_rows == counts["anomalies"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("kept")
    for given in ({"out": tmp_path}, {"out": tmp_path / "mine.csv"}, {"out": OUT, "labels": tmp_path / "mine.csv"}):
        with pytest.raises(OutputExistsError, match="there already"):
            Readings(**given)
    assert (tmp_path / "mine.csv").read_text() == "kept"


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, exchange: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_readings._Writer, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Readings(out=tmp_path / "out", labels=tmp_path / "labels.csv").write()
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_number_is_reported_together() -> None:
    with pytest.raises(SpecError) as raised:
        Readings(out=OUT, devices=0, sensors=-1, hours=0, anomalies=0.5, gaps=-1, disorder=2, seed=-1, labels=OUT)
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        *("--devices", "--sensors", "--anomalies", "--gaps", "--disorder", "--hours", "--seed"),
        *("--labels", "--labels"),
    ]


def test_the_command_understands_durations_and_shares(tmp_path: Path) -> None:
    out = tmp_path / "readings.parquet"
    labels = tmp_path / "labels.parquet"
    ran = run("--out", out, "--devices", 2, "--hours", 6, "--every", "5m", "--anomalies", "2%", "--labels", labels)
    assert ran.exit_code == 0, ran.output
    assert f"wrote {out}: {parquet.read_metadata(out).num_rows} readings of 10 sensors" in ran.output
    times = parquet.read_table(out)["TS"].to_pylist()
    assert set(np.diff(np.unique(times))) == {timedelta(minutes=5)}
    assert parquet.read_table(labels).column_names == ["TS", "Device", "Tag", "Kind"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--every", "soon", "not a duration"), ("--every", "0s", "not a duration"), ("--anomalies", "few", "not a share")],
)
def test_the_command_says_what_it_does_not_understand(option: str, value: str, said: str, tmp_path: Path) -> None:
    ran = run("--out", tmp_path / "out", option, value)
    assert ran.exit_code == 2
    assert said in ran.output
    assert not (tmp_path / "out").exists()
