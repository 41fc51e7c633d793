"""Columns in the paths of files, files that differ, times that are numbers, days of a place, and other aggregates."""

from __future__ import annotations

import math
import pickle
import statistics
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.test_tables import Outcome, outcome, parquet, plan, prepared, problems, text

from tally.errors import SourceNotFoundError, SpecError, StorageError
from tally.sources.tables.source import TableSource

# -- columns in paths ---------------------------------------------------------------------------------


def partitioned(tmp_path: Path) -> str:
    for at, name in enumerate(("region=eu/day=2026-01-01", "region=eu/day=2026-01-02", "region=n%2Fa/day=2026-01-01")):
        parquet(tmp_path / "in" / name / "part.parquet", {"v": [at + 0.5, at + 0.75], "year": [1, 2]})
    return str(tmp_path / "in")


def test_partitions_in_the_path_are_columns(tmp_path: Path) -> None:
    found = outcome(tmp_path, partitioned(tmp_path), features=["v"], keep=["region", "day"])
    assert list(found.info.items()) == [
        ("region=eu/day=2026-01-01/part.parquet#1", {"region": "eu", "day": date(2026, 1, 1)}),
        ("region=eu/day=2026-01-01/part.parquet#2", {"region": "eu", "day": date(2026, 1, 1)}),
        ("region=eu/day=2026-01-02/part.parquet#1", {"region": "eu", "day": date(2026, 1, 2)}),
        ("region=eu/day=2026-01-02/part.parquet#2", {"region": "eu", "day": date(2026, 1, 2)}),
        ("region=n%2Fa/day=2026-01-01/part.parquet#1", {"region": "n/a", "day": date(2026, 1, 1)}),
        ("region=n%2Fa/day=2026-01-01/part.parquet#2", {"region": "n/a", "day": date(2026, 1, 1)}),
    ]


def test_partitions_are_keys_and_in_conditions(tmp_path: Path) -> None:
    source = prepared(tmp_path, partitioned(tmp_path), features=["v"], by=["region"], where="day < '2026-01-02'")
    assert [key for key, _, _ in source.groups()] == [{"region": "eu"}, {"region": "n/a"}]
    assert len(Outcome(source).rows) == 4
    again: TableSource = pickle.loads(pickle.dumps(source))
    assert Outcome(again, plan(source, items=1)).rows == Outcome(source).rows


def test_partitions_that_nobody_needs_leave_parquet_in_its_place(tmp_path: Path) -> None:
    assert TableSource.describe([partitioned(tmp_path)], features=["v"]).in_place
    numbers = parquet(tmp_path / "n" / "Device=7" / "a.parquet", {"v": [1.5]})
    source = TableSource.describe([numbers], features=1)  # a partition is no feature by itself
    assert (source.features, source.in_place) == (("v",), True)
    assert outcome(tmp_path, numbers, features=["v"], keep=["Device"]).info == {"a.parquet#1": {"Device": 7}}


def test_a_column_of_the_file_comes_before_that_of_its_path(tmp_path: Path) -> None:
    place = parquet(tmp_path / "v=9" / "a.parquet", {"v": [1.5]})
    assert outcome(tmp_path, place, features=["v"], keep=["v"]).info == {"a.parquet#1": {"v": 1.5}}


def test_a_partition_without_a_value_is_null(tmp_path: Path) -> None:
    for name in ("__HIVE_DEFAULT_PARTITION__", "007"):
        text(tmp_path / "in" / f"code={name}" / "a.csv", "v\n1\n")
    found = outcome(tmp_path, str(tmp_path / "in"), features=["v"], keep=["code"])
    assert sorted(map(str, found.info.values())) == ["{'code': '007'}", "{'code': None}"]


def test_names_of_files_are_keys(tmp_path: Path) -> None:
    for device, tag in ((1, "temp"), (2, "flow")):
        text(tmp_path / "in" / f"{device}_{tag}.csv", "v\n" + f"{device}.5\n" * 3)
    options: dict[str, Any] = {"features": ["v"], "by": ["Device", "Tag"]}
    source = prepared(tmp_path, str(tmp_path / "in"), **options, path_columns="{Device}_{Tag}.csv")
    assert source.groups() == [({"Device": 1, "Tag": "temp"}, 0, 3), ({"Device": 2, "Tag": "flow"}, 3, 3)]
    assert Outcome(source).rows["2_flow.csv#3"] == {"Device": 2, "Tag": "flow", "v": 2.5}
    stems = prepared(tmp_path / "stems", str(tmp_path / "in"), features=["v"], keep=["series"], path_columns="{series}")
    assert Outcome(stems).info["1_temp.csv#1"] == {"series": "1_temp"}


def test_names_that_do_not_fit_or_fit_twice_are_refused(tmp_path: Path) -> None:
    place = text(tmp_path / "a_b_c.csv", "v\n1\n")
    said = {
        "{Device}_{Tag}.csv": "path_columns: a_b_c.csv fits '{Device}_{Tag}.csv' in more than one way",
        "{Device}-{Tag}.csv": "path_columns: a_b_c.csv does not fit '{Device}-{Tag}.csv'",
        "x.csv": "path_columns: 'x.csv' names no column; an example is '{Device}_{Tag}.csv'",
    }
    assert {pattern: problems(place, features=["v"], path_columns=pattern) for pattern in said} == {
        pattern: [message] for pattern, message in said.items()
    }


# -- files that differ --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("options", [{}, {"by": ["id"]}, {"where": "id > 0"}])
def test_files_may_differ_in_columns_that_are_not_needed(tmp_path: Path, suffix: str, options: Any) -> None:
    contents: list[dict[str, list[Any]]] = [
        {"id": [1], "v": [1.5], "note": ["x"]},
        {"v": [2.5], "id": [2], "more": [1]},
        {"id": [3], "v": [3.5], "note": [7.25]},
    ]
    for at, columns in enumerate(contents):
        if suffix == "parquet":
            parquet(tmp_path / "in" / f"{at}.parquet", columns)
        else:
            lines = [",".join(columns), ",".join(str(value[0]) for value in columns.values())]
            text(tmp_path / "in" / f"{at}.csv", "\n".join(lines) + "\n")
    found = outcome(tmp_path, str(tmp_path / "in"), features=["v"], keep=["id"], **options)
    assert [row["v"] for row in found.rows.values()] == [1.5, 2.5, 3.5]
    with pytest.raises(SpecError, match=r"1\.\w+ lacks column 'note', which 0\.\w+ has"):
        outcome(tmp_path, str(tmp_path / "in"), features=["v"], keep=["note"])
    with pytest.raises(SpecError, match=r"1\.\w+ has column 'more', which 0\.\w+ lacks"):
        outcome(tmp_path, str(tmp_path / "in"), features=["v", "more"])
    with pytest.raises(SpecError, match=r"where: .*more"):
        outcome(tmp_path, str(tmp_path / "in"), features=["v"], where="more > 0")


# -- times that are numbers ---------------------------------------------------------------------------

BEGIN = datetime(2026, 3, 28, 22, 30, tzinfo=UTC)


def windows(tmp_path: Path, times: list[Any], **options: Any) -> tuple[dict[Any, float], TableSource]:
    columns = {"t": times, "v": pa.array(range(len(times)), pa.float64())}
    place = parquet(tmp_path / "in.parquet", columns)
    given: dict[str, Any] = {"features": None, "time": "t", "window": 3600, "aggregate": ["count"]} | options
    source = prepared(tmp_path, place, **given)
    found = Outcome(source)
    return {row["t"]: found.rows[key]["count"] for key, row in found.info.items()}, source


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("kind", ["int64", "float64"])
def test_times_since_1970_are_told_by_their_values(tmp_path: Path, unit: str, per_second: int, kind: str) -> None:
    seconds = [int(BEGIN.timestamp()) + 900 * step for step in range(4)]
    times: Any = pa.array([(int if kind == "int64" else float)(each * per_second) for each in seconds], kind)
    found, source = windows(tmp_path, times)
    half = BEGIN.replace(minute=0)
    assert found == {half: 2, half + timedelta(hours=1): 2}
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    assert source.remark() == f"t is taken for {names[unit]} since 1970, UTC"
    said, source = windows(tmp_path / "said", times, time_unit=unit)
    assert (said, source.remark()) == (found, None)


def test_a_unit_that_the_values_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"'t' holds numbers from 5 to 1774737000, .*\n.*--time-unit ms"):
        windows(tmp_path, [5, 1_774_737_000])
    with pytest.raises(StorageError, match="holds numbers from 1774737000 to 1774737000000"):
        windows(tmp_path / "mixed", [1_774_737_000, 1_774_737_000_000])
    found, source = windows(tmp_path / "few", [math.nan, 1_774_737_000.75, None])
    assert (list(found.values()), "2 rows are in no window" in str(source.remark())) == ([1], True)
    with pytest.raises(SourceNotFoundError, match=r"no row of .* has a time"):
        windows(tmp_path / "none", pa.array([None, None], "int64"))


def test_days_are_those_of_a_place(tmp_path: Path) -> None:
    times = [BEGIN + timedelta(hours=step) for step in range(48)]  # the clocks in Berlin go forward on the 29th
    found, _ = windows(tmp_path, times, window=86_400, timezone="Europe/Berlin")
    assert found == {
        datetime(2026, 3, 27, 23, tzinfo=UTC): 1,
        datetime(2026, 3, 28, 23, tzinfo=UTC): 23,
        datetime(2026, 3, 29, 22, tzinfo=UTC): 24,
    }
    numbers = [int(each.timestamp()) for each in times]
    assert windows(tmp_path / "numbers", numbers, window=86_400, timezone="Europe/Berlin")[0] == found


def test_zones_and_units_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    plain = [datetime(2026, 1, 1)]  # noqa: DTZ001
    for options, said in (
        ({"timezone": "Europe/Berlin"}, "timezone: is for windows of whole days"),
        ({"timezone": "Europe/Berlin", "window": 86_400}, "timezone: 't' has no zone"),
        ({"timezone": "Mars/Olympus", "window": 86_400}, "timezone: there is no 'Mars/Olympus'"),
        ({"time_unit": "ms"}, "time_unit: is for windows over times that are numbers"),
    ):
        with pytest.raises(SpecError, match=said):
            windows(tmp_path, plain, **options)


# -- aggregates ---------------------------------------------------------------------------------------


def test_deviation_median_and_quantiles(tmp_path: Path) -> None:
    values = [4.0, 1.0, math.nan, 9.5, 2.25, 7.0]
    columns = {"t": [BEGIN] * 6 + [BEGIN + timedelta(hours=2)] * 2, "v": [*values, 3.0, math.inf], "w": [1] * 8}
    place = parquet(tmp_path / "in.parquet", columns)
    asked = ["std", "median", "p95", "p99.9"]
    found = outcome(tmp_path, place, features=None, time="t", window=3600, aggregate=asked)
    first, second = found.rows.values()
    there = [value for value in values if not math.isnan(value)]
    assert first["v_std"] == pytest.approx(statistics.stdev(there))
    assert (first["v_median"], first["w_std"]) == (statistics.median(there), 0)
    assert first["v_p95"] == pytest.approx(np.quantile(there, 0.95))
    assert first["v_p99.9"] == pytest.approx(np.quantile(there, 0.999))
    assert math.isnan(second["v_std"])
    assert second["v_p95"] == math.inf
    with pytest.raises(SpecError, match=r"aggregate: there is no 'p100'.*quantiles are p5, p95"):
        outcome(tmp_path, place, features=None, time="t", window=3600, aggregate=["p100"])


def test_one_reading_has_no_deviation(tmp_path: Path) -> None:
    place = parquet(tmp_path / "in.parquet", {"t": [BEGIN], "v": [1.5]})
    found = outcome(tmp_path, place, features=None, time="t", window=3600, aggregate=["std", "median"])
    assert list(found.rows.values()) == [{"v_std": None, "v_median": 1.5}]


# -- other names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"by": ["d"]}, {"where": "v > 0"}])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_kept_columns_get_other_names(tmp_path: Path, suffix: str, options: Any) -> None:
    columns = {"key": ["a", "b"], "v": [1.5, 2.5], "label": [7, 8], "d": [1, 2]}
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    csv = suffix == "csv"
    place = text(tmp_path / "in.csv", "\n".join(lines)) if csv else parquet(tmp_path / "in.parquet", columns)
    source = prepared(tmp_path, place, features=["v"], keep=["Id=key", "truth=label", "v"], **options)
    assert [name for name in source.columns if name not in ("d", "_order")] == ["Id", "truth", "v"]
    found = [{name: row[name] for name in ("Id", "truth", "v")} for row in Outcome(source).info.values()]
    assert found == [{"Id": "a", "truth": 7, "v": 1.5}, {"Id": "b", "truth": 8, "v": 2.5}]
    every = prepared(tmp_path / "all", place, features=["v"], keep=["*", "Id=key"])
    assert list(Outcome(every).info.values())[1] == {"Id": "b", "v": 2.5, "label": 8, "d": 2}


def test_the_start_of_windows_gets_another_name(tmp_path: Path) -> None:
    place = parquet(tmp_path / "in.parquet", {"key": [BEGIN, BEGIN + timedelta(hours=1)], "v": [1.5, 2.5]})
    options: dict[str, Any] = {"time": "key", "window": 3600, "keep": ["begin=key"]}
    found = outcome(tmp_path, place, features=None, **options)
    first = BEGIN.replace(minute=0)
    assert list(found.info.values()) == [{"begin": first}, {"begin": first + timedelta(hours=1)}]


def test_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    place = parquet(tmp_path / "in.parquet", {"key": [1], "v": [1.5], "d": [2]})
    assert problems(place, features=["v"], keep=["key"]) == [
        (
            "column 'key' cannot be kept as 'key': the results have a column of that name of their own; "
            "--keep NEW=key gives it another name"
        )
    ]
    assert problems(place, features=["v"], keep=["v", "v=d"]) == ["keep: two columns would be called 'v'"]
    assert problems(place, features=["v"], by=["d"], keep=["e=d"]) == [
        "keep: 'd' is a column of the key, which keeps its name"
    ]
    assert problems(place, features=["v"], keep=["a=d", "b=d"]) == ["keep: 'd' is named twice"]
