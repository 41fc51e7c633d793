"""Detectors for each key: what a model is made of, what is left out, and that nothing but the readings matters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'tally-scoring[sklearn]'")

from tally.engines.base import Engine
from tally.engines.local import LocalEngine
from tally.errors import ModelError, OutputExistsError, SourceNotFoundError, SpecError, WorkerCrashedError
from tally.scorers.base import TableResult, Window
from tally.scorers.per_key.packed import PackedScorer, inspect
from tally.sources.factory import SourceRequest, source_for
from tally.sources.tables.source import TableSource
from tally.training.anomaly import training as anomaly
from tally.training.anomaly.training import MIN_ROWS, Group, Recipe, Step, Trained, Training, fit_key, sample


def readings(path: Path, series: Mapping[tuple[int, str], np.ndarray[Any, Any]]) -> Path:
    """A table of readings with the columns TS, Device, Tag and Value; keys take turns, as readings come in."""
    rows = [
        (tick, device, tag, float(values[tick]))
        for tick in range(max(map(len, series.values())))
        for (device, tag), values in series.items()
        if tick < len(values)
    ]
    times = np.datetime64("2026-01-01", "ms") + np.array([row[0] for row in rows]) * np.timedelta64(60_000, "ms")
    columns = {"TS": times, "Device": [row[1] for row in rows], "Tag": [row[2] for row in rows]}
    parquet.write_table(pa.table({**columns, "Value": [row[3] for row in rows]}), path, row_group_size=500)
    return path


class Here(Engine):
    """Runs tasks in this process, and has a key that kills workers."""

    killer: ClassVar[Mapping[str, Any] | None] = None

    def start(self, setup: Any, args: Any, *, slots: int, limits: Any, log: Any = None) -> None:
        self._state = setup(*args)

    def submit(self, function: Any, *arguments: Any, reports: Any = None) -> Any:
        future: Future[Any] = Future()
        if any(group.key == self.killer for group in arguments[0]):
            future.set_exception(WorkerCrashedError("the worker was killed"))
        else:
            future.set_result(function(self._state, *arguments))
        return future

    def default_slots(self) -> int:
        return 1

    def default_memory(self, slots: int) -> int | None:
        return None

    @property
    def slots(self) -> int:
        return 1

    def stop_task(self, future: Future[Any], *, seconds: float) -> None:
        raise NotImplementedError

    def resize(self, slots: int) -> None:
        raise NotImplementedError

    def stop(self, *, kill: bool = False) -> None:
        pass


@pytest.fixture
def noise() -> dict[tuple[int, str], np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    return {(device, tag): random.normal(10 * device, 1, 300) for device in (1, 2) for tag in ("a", "b")}


@pytest.fixture
def table(tmp_path: Path, noise: dict[tuple[int, str], np.ndarray[Any, Any]]) -> Path:
    return readings(tmp_path / "readings.parquet", noise)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are trained in this process: workers take a second to start."""
    monkeypatch.setattr("tally.engines.local.LocalEngine", Here)


def training(source: Path, out: Path, **given: Any) -> Training:
    recipe = Recipe(**{name: given.pop(name) for name in [*given] if name in Recipe.__slots__})
    return Training(
        **{"sources": (str(source),), "by": ("Device", "Tag"), "values": ("Value",), "out": out, "recipe": recipe}
        | given
    )


def trained(source: Path, out: Path, **given: Any) -> Trained:
    return training(source, out, **given).run()


def loaded(package: Path) -> PackedScorer:
    scorer = PackedScorer(inspect(package / Training.file, {}, trusted=False))
    scorer.load(package, "cpu")
    return scorer


def scores(package: Path, device: int, tag: str, **columns: list[float]) -> tuple[list[bool], list[float]]:
    """What the package's model of one key says of values."""
    count = len(next(iter(columns.values())))
    given = {"Device": pa.array([device] * count, pa.int64()), "Tag": [tag] * count, **columns}
    result = loaded(package).score(pa.table(given))
    if isinstance(result, TableResult):
        assert not result.errors
        result = result.rows
    assert isinstance(result, pa.Table)
    return result["anomaly"].to_pylist(), result["score"].to_pylist()


def fitted(values: np.ndarray[Any, Any], **given: Any) -> Any:
    """A model of one key with these values ``[rows]`` or ``[rows, features]``."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    group = Group({"Device": 1}, 0, len(values))
    return fit_key(group, lambda at, rows: values[at : at + rows], Recipe(**given))


# -- what is refused before training begins ------------------------------------------------------------


def test_every_wrong_option_is_reported_together(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        training(
            tmp_path,
            tmp_path / "out",
            by=("Value",),
            window=60.0,
            workers=0,
            nu=0.7,
            gamma=-1.0,
            max_rows=3,
            seed=-1,
        )
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        *("--nu", "--gamma", "--max-rows", "--seed", "--value", "--window", "--workers")
    ]


def test_columns_that_are_not_there_are_reported(table: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"(?s)Gadget.*Wert|Wert.*Gadget"):
        trained(table, tmp_path / "out", by=("Gadget",), values=("Wert",))
    with pytest.raises(SourceNotFoundError):
        trained(tmp_path / "nowhere.parquet", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_nothing_is_overwritten(table: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="there already"):
        training(table, tmp_path)


# -- one model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [0.001, 0.01, 0.05, 0.2])
def test_no_more_rows_are_anomalous_than_asked_for(nu: float) -> None:
    values = np.random.default_rng(1).normal(size=2000)
    outcome = fitted(values, nu=nu, gamma=0.03)  # a narrow kernel may leave holes in the middle
    assert 0.7 * nu * 2000 - 3 <= outcome.anomalous <= nu * 2000
    assert (outcome.model.predict([[values.mean()], [9.0], [-9.0]]) == [1, -1, -1]).all()


def test_a_value_that_never_changes_is_normal_and_any_other_is_not() -> None:
    outcome = fitted(np.full(600, 45.0))
    assert outcome.anomalous == 0
    assert outcome.model.predict([[45.0], [45.01], [44.9], [0.0], [1e6]]).tolist() == [1, -1, -1, -1, -1]


def test_a_sensor_that_rests_most_of_the_time_is_normal_at_rest() -> None:
    outcome = fitted(np.r_[np.zeros(1980), np.random.default_rng(1).uniform(50, 100, 20)])
    assert outcome.anomalous <= 20
    assert outcome.model.predict([[0.0], [300.0], [-20.0]]).tolist() == [1, -1, -1]


def test_rows_with_values_that_are_not_finite_are_left_out_and_counted() -> None:
    values = np.random.default_rng(1).normal(size=(100, 2))
    values[3, 0], values[4, 1], values[5] = np.nan, np.inf, -np.inf
    outcome = fitted(values)
    assert (outcome.left_out, outcome.used) == (3, 97)
    same = fitted(np.delete(values, [3, 4, 5], axis=0))
    assert np.array_equal(outcome.model.decision_function(values[:3]), same.model.decision_function(values[:3]))


def test_too_few_usable_rows_are_a_reason() -> None:
    outcome = fitted(np.r_[np.arange(MIN_ROWS - 1.0), np.nan])
    assert outcome.model is None
    assert outcome.reason == f"{MIN_ROWS - 1} usable rows, and at least {MIN_ROWS} are needed"


def test_what_goes_wrong_with_a_key_is_its_reason() -> None:
    def read(at: int, rows: int) -> np.ndarray[Any, Any]:
        raise ValueError("no such luck")

    assert fit_key(Group({"Device": 1}, 0, 100), read, Recipe()).reason == "ValueError: no such luck"


def test_a_seed_and_a_key_make_a_forest() -> None:
    values = np.random.default_rng(1).normal(size=300)
    one, again, other = (
        fitted(values, kind="isolation-forest", seed=seed).model.decision_function([[0.3], [2.0]]) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# -- samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 64, 1000, 1 << 20])
def test_a_sample_is_spread_evenly_however_it_is_read(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomaly, "READ_ROWS", at_once)
    values = np.arange(1000.0)[:, None]
    values[100:200] = np.nan
    asked: list[int] = []

    def read(at: int, rows: int) -> np.ndarray[Any, Any]:
        asked.append(rows)
        return values[at : at + rows]

    drawn, usable = sample(read, 1000, 50, seed=3)
    assert usable == 900
    assert (drawn[:, 0] // 20).tolist() == [run for run in range(50) if not 5 <= run < 10]
    assert sum(asked) == 1000
    assert max(asked) <= max(at_once, 20)
    assert len(set(drawn[:, 0] % 20)) > 10
    expected, _ = sample(lambda at, rows: values[at : at + rows], 1000, 50, seed=3)
    assert np.array_equal(drawn, expected)


def test_few_rows_are_all_taken() -> None:
    values = np.arange(30.0)[:, None]
    drawn, usable = sample(lambda at, rows: values[at : at + rows], 30, 50, seed=1)
    assert np.array_equal(drawn, values)
    assert usable == 30


# -- packages ------------------------------------------------------------------------------------------


def test_each_key_has_a_model_of_its_own(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "pumps"
    steps: list[Step] = []
    made = training(table, out).run(steps.append)
    assert sorted(path.name for path in out.iterdir()) == ["models.parquet", "tally.yaml"]
    assert [path.name for path in out.parent.iterdir()] == ["pumps"]
    assert (steps[0], steps[-1]) == (Step(0, 4, 0, 0), Step(4, 4, 1200, 0))
    assert made.failed == {}
    json.dumps(made.facts)
    figures = made.facts["metrics"]
    assert (figures["keys"], figures["rows"], figures["rows_used"]) == (4, 1200, 1200)
    assert figures["anomalous_share"] <= 0.01
    assert scores(out, 1, "a", Value=[10.0, 20.0])[0] == [False, True]
    assert scores(out, 2, "b", Value=[10.0, 20.0])[0] == [True, False]
    assert loaded(out).missing_reason({"Device": 3, "Tag": "a"}) is not None


def test_models_are_the_same_whatever_the_number_of_workers_and_the_other_keys(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(table, tmp_path / "one", max_rows=100)
    monkeypatch.setattr("tally.engines.local.LocalEngine", LocalEngine)
    monkeypatch.setattr(anomaly, "TASK_KEYS", 1)
    trained(table, tmp_path / "two", workers=2, max_rows=100)
    one, two = (tmp_path / name / Training.file for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    monkeypatch.setattr("tally.engines.local.LocalEngine", Here)
    trained(table, tmp_path / "alone", where="Device = 2 AND Tag = 'b'", max_rows=100)
    values = [18.0, 19.0, 20.0, 30.0]
    alone, among = (scores(tmp_path / name, 2, "b", Value=values) for name in ("alone", "one"))
    assert alone == among


def test_a_value_that_never_changes_is_normal_in_a_package_too(tmp_path: Path) -> None:
    source = readings(tmp_path / "readings.parquet", {(1, "a"): np.full(300, 45.3)})
    trained(source, tmp_path / "out")
    assert scores(tmp_path / "out", 1, "a", Value=[45.3, 45.2, 45.4, 0.0])[0] == [False, True, True, True]


def test_keys_that_cannot_be_trained_do_not_stop_the_others(tmp_path: Path, noise: Any) -> None:
    source = readings(tmp_path / "readings.parquet", {**noise, (3, "a"): np.arange(4.0), (4, "a"): np.full(50, np.nan)})
    made = trained(source, tmp_path / "out")
    assert made.failed == {
        "Device=3,Tag=a": "4 usable rows, and at least 10 are needed",
        "Device=4,Tag=a": "0 usable rows, and at least 10 are needed",
    }
    figures = made.facts["metrics"]
    assert (figures["keys"], figures["keys_failed"], figures["rows_left_out"]) == (4, 2, 50)


def test_rows_without_a_key_have_no_model(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=60)
    path = tmp_path / "readings.parquet"
    parquet.write_table(pa.table({"Device": [1, None] * 30, "Value": values}), path)
    made = trained(path, tmp_path / "out", by=("Device",))
    assert made.failed == {"Device=null": "null makes no key"}
    assert (made.facts["metrics"]["keys"], made.facts["metrics"]["rows"]) == (1, 60)


def test_a_package_may_lie_among_the_readings(table: Path) -> None:
    made = trained(table.parent, table.parent / "models" / "pumps")
    assert made.facts["metrics"]["rows"] == 1200


def test_none_trained_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = readings(tmp_path / "readings.parquet", {(1, "a"): np.arange(4.0)})
    with pytest.raises(ModelError, match=r"none of 1 keys could be trained\n  Device=1,Tag=a: 4 usable rows"):
        trained(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_windows_are_gathered_before_training(table: Path, tmp_path: Path) -> None:
    given = {"time": "TS", "window": 600.0, "aggregate": ("mean", "max", "count")}
    made = trained(table, tmp_path / "out", **given)
    assert made.facts["trained"]["features"] == ["Value_mean", "Value_max", "count"]
    assert made.facts["metrics"]["rows"] == 4 * 30
    columns = {"Value_mean": [10.0, 10.0], "Value_max": [11.5, 40.0], "count": [10.0, 10.0]}
    assert scores(tmp_path / "out", 1, "a", **columns)[0] == [False, True]


def test_series_in_files_of_their_own_are_trained_by_the_days_of_a_place(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Readings of each hour at times in milliseconds; in UTC, the first day and the last are not whole."""
    folder = tmp_path / "series"
    folder.mkdir()
    for device, tag in ((1, "a"), (2, "b")):
        hours = np.arange(14 * 24)
        times, values = 1_767_222_000_000 + hours * 3_600_000, device + np.sin(hours)  # from 2026-01-01 in Berlin
        parquet.write_table(pa.table({"TS": times, "Value": values}), folder / f"{device}_{tag}.parquet")
    out = tmp_path / "out"
    of_files = ("--path-columns", "{Device}_{Tag}.parquet", "--time", "TS", "--time-unit", "ms")
    ran = command(cli, folder, out, *of_files, "--window", "1d", "--timezone", "Europe/Berlin")
    assert ran.code == 0, ran.err
    assert "2 models from 28 of 28 rows" in ran.out  # in UTC, there are fifteen days of each
    scorer = loaded(out)
    assert scorer.window == Window("TS", 86_400, ("mean",), "Europe/Berlin")
    source = source_for(SourceRequest((str(folder),), scorer, options={"path_columns": "{Device}_{Tag}.parquet"}))
    assert isinstance(source, TableSource)
    assert source.query.request.zone == "Europe/Berlin"  # without being told
    with pytest.raises(SpecError, match="--time-unit: s, ms, us or ns, not 'h'"):
        training(folder, tmp_path / "other", time_unit="h")


def test_forests_are_kept_whole(table: Path, tmp_path: Path) -> None:
    trained(table, tmp_path / "out", kind="isolation-forest", where="Device = 1 AND Tag = 'a'")
    assert scores(tmp_path / "out", 1, "a", Value=[10.0, 20.0])[0] == [False, True]


def test_a_worker_that_is_lost_costs_the_key_that_did_it(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "killer", {"Device": 2, "Tag": "a"})
    made = trained(table, tmp_path / "out")
    assert made.failed == {"Device=2,Tag=a": "the worker was killed"}
    assert made.facts["metrics"]["keys"] == 3


def test_lines_that_cannot_be_read_are_told_and_left_out(tmp_path: Path) -> None:
    lines = [f"1,{value:.3f}" for value in np.random.default_rng(1).normal(size=3000)]
    lines[2500] = "1,broken"
    (tmp_path / "readings.csv").write_text("\n".join(["Device,Value", *lines, ""]))
    said: list[str] = []
    made = training(tmp_path / "readings.csv", tmp_path / "out", by=("Device",)).run(say=said.append)
    assert made.facts["metrics"]["rows"] == 2999
    assert any("1 lines" in line and "readings.csv, line 2502" in line for line in said)


# -- the command ---------------------------------------------------------------------------------------


def command(cli: Callable[..., Any], source: Path, out: Path, *more: object) -> Any:
    return cli("train", "anomaly", source, "--by", "Device,Tag", "--value", "Value", "--out", out, *more)


def test_the_command_registers_what_it_trained(cli: Callable[..., Any], tmp_path: Path, noise: Any) -> None:
    source = readings(tmp_path / "readings.parquet", {**noise, (3, "a"): np.arange(4.0)})
    ran = command(cli, source, tmp_path / "My Pumps", "--nu", "5%", "--gamma", "0.5")
    assert (ran.code, "registered as models:/my-pumps/1" in ran.out) == (0, True), ran.err
    assert "4 models from 1,200 of 1,204 rows" in ran.out
    assert "no model for Device=3,Tag=a: 4 usable rows" in ran.err
    assert "5/5 keys" in ran.err
    assert "tally score SOURCE --model models:/my-pumps/1 --out OUT" in ran.err
    (version,) = json.loads(cli("models", "show", "my-pumps", "--json").out)["versions"]
    assert version["metadata"]["metrics"]["keys"] == 4
    assert (version["metadata"]["trained"]["nu"], version["metadata"]["trained"]["gamma"]) == (0.05, 0.5)
    run = json.loads(cli("runs", "show", version["metadata"]["run"], "--json").out)
    assert (run["kind"], run["state"], run["models"]) == ("anomaly", "finished", ["models:/my-pumps/1"])
    assert (run["metrics"]["keys"]["last"], run["parameters"]["by"]) == (4, ["Device", "Tag"])


def test_an_interrupted_training_leaves_no_package(
    cli: Callable[..., Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)  # as late as can be
    ran = command(cli, table, tmp_path / "out")
    assert ran.code == 130
    assert "stopped after 4 keys: no model was written" in ran.err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize(("option", "value"), [("--gamma", "wide"), ("--window", "soon"), ("--nu", "little")])
def test_the_command_says_what_it_does_not_understand(
    cli: Callable[..., Any], table: Path, tmp_path: Path, option: str, value: str
) -> None:
    ran = command(cli, table, tmp_path / "out", option, value)
    assert ran.code == 2
    assert option in ran.err
    assert repr(value) in ran.err
