"""Many models in one Parquet file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

pytest.importorskip("sklearn")
pytest.importorskip("skops")

from sklearn.dummy import DummyRegressor
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import OneClassSVM

from tally.errors import ModelLoadError, SpecError, UntrustedModelError
from tally.models.load import create, load
from tally.models.resolve import resolve
from tally.scorers.base import TableResult
from tally.scorers.per_key import batched_svms, packed
from tally.scorers.per_key.packed import FILE, Model, PackedScorer, inspect, write

READINGS = np.random.default_rng(0)


def detector(level: float = 20, features: int = 1, **options: Any) -> Any:
    values = np.random.default_rng(int(level)).normal(level, 2, (40, features))
    return make_pipeline(StandardScaler(), OneClassSVM(nu=0.1, **options)).fit(values)


def forest(level: float = 20) -> Any:
    values = np.random.default_rng(int(level)).normal(level, 2, (40, 1))
    return IsolationForest(n_estimators=5, random_state=0).fit(values)


def opened(folder: Path, **options: Any) -> PackedScorer:
    scorer = PackedScorer(inspect(folder / FILE, options, trusted=False))
    scorer.load(folder, "cpu")
    return scorer


def pumps(folder: Path, count: int = 6) -> dict[int, Any]:
    """A package of detectors for the devices 0, 1, ...; every third is a forest."""
    models = {device: forest(device * 10) if device % 3 == 2 else detector(device * 10) for device in range(count)}
    write(folder, (Model({"Device": device}, model) for device, model in models.items()), by=["Device"])
    return models


def readings(devices: Sequence[Any], values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"Device": pa.array(devices, kind), "Value": pa.array(values, pa.float64())})


def test_rows_are_scored_by_the_model_of_their_key(tmp_path: Path) -> None:
    models = pumps(tmp_path / "pumps")
    devices = READINGS.integers(0, 6, 500)
    values = READINGS.normal(devices * 10.0, 4)

    found = opened(tmp_path / "pumps").score(readings(devices, values))

    assert found.schema == pa.schema({"anomaly": pa.bool_(), "score": pa.float64()})
    for device, model in models.items():
        rows = np.flatnonzero(devices == device)
        score = found.column("score").to_numpy()[rows]
        np.testing.assert_allclose(score, model.decision_function(values[rows, None]), rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(found.column("anomaly").to_numpy()[rows], model.predict(values[rows, None]) == -1)


def test_a_package_says_what_it_takes_and_gives(tmp_path: Path) -> None:
    written = write(
        tmp_path / "pumps",
        [
            Model({"Site": "north", "Device": 1}, detector(20, 2)),
            Model({"Site": "south", "Device": 1}, detector(30, 2)),
        ],
        by=["Site", "Device"],
        features=["pressure", "flow"],
        name="all pumps",
    )

    ref = resolve(tmp_path / "pumps")
    scorer = create(ref)

    assert (written.models, written.batched, written.whole, written.requires_trust) == (2, 2, 0, False)
    assert (ref.kind, ref.name, ref.entry) == ("packed", "all pumps", FILE)
    assert (scorer.input, tuple(scorer.by), scorer.features) == ("table", ("Site", "Device"), ["pressure", "flow"])
    assert scorer.columns == {"anomaly": "bool", "score": "float64"}
    assert load(ref, "auto").describe() == "2 models (2 batched SVMs) by Site, Device, batch 65536"


def test_numbered_features_may_be_given_names(tmp_path: Path) -> None:
    pumps(tmp_path / "pumps")

    assert create(resolve(tmp_path / "pumps")).features == 1
    assert "assumed the table's 1 numeric column" in resolve(tmp_path / "pumps").assumed[0]
    named = resolve(tmp_path / "pumps", settings={"features": "Value"})
    assert create(named).features == ["Value"]
    assert named.assumed == ()
    with pytest.raises(SpecError, match="2 named"):
        resolve(tmp_path / "pumps", settings={"features": ["Value", "Other"]})


@pytest.mark.parametrize(
    ("packed_as", "given"),
    [
        ([3, 5], pa.array([3, 5, 3])),
        ([3, 5], pa.array([3, 5, 3], pa.int8())),
        ([3, 5], pa.array([3.0, 5.0, 3.0])),
        ([3, 5], pa.array(["3", "5", "3"])),
        ([3, 5], pa.array(["3", "5", "3"]).dictionary_encode()),
        ([3, 5], pa.array([Decimal(3), Decimal(5), Decimal(3)])),
        (["3", "5"], pa.array([3, 5, 3])),
        (["a", "b"], pa.array(["a", "b", "a"], pa.large_string())),
        ([True, False], pa.array([True, False, True])),
        ([0.5, 1.5], pa.array([0.5, 1.5, 0.5])),
        (
            [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)],
            pa.array([datetime.date(2026, 1, 1), datetime.date(2026, 1, 2), datetime.date(2026, 1, 1)]),
        ),
        (
            [datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 2)],  # noqa: DTZ001
            pa.array([1767225600, 1767312000, 1767225600], pa.timestamp("s")).cast(pa.timestamp("ns")),
        ),
    ],
    ids=str,
)
def test_keys_are_compared_by_how_they_are_written(packed_as: list[Any], given: pa.Array, tmp_path: Path) -> None:
    first, second = detector(20), detector(30)
    write(tmp_path, [Model({"Key": packed_as[0]}, first), Model({"Key": packed_as[1]}, second)], by=["Key"])
    scorer = opened(tmp_path)

    found = scorer.score(pa.table({"Key": given, "Value": [20.5, 30.5, 21.5]}))

    expected = [
        first.decision_function([[20.5]]),
        second.decision_function([[30.5]]),
        first.decision_function([[21.5]]),
    ]
    np.testing.assert_allclose(found.column("score").to_numpy(), np.ravel(expected), rtol=1e-9)
    assert [scorer.missing_reason({"Key": value}) for value in given.to_pylist()] == [None, None, None]


def test_a_key_without_a_model_is_told_before_and_while_scoring(tmp_path: Path) -> None:
    pumps(tmp_path)
    scorer = opened(tmp_path)

    found = scorer.score(readings([1, 9, None, 2], [10, 10, 10, 20]))

    assert scorer.missing_reason({"Device": 9}) == "there is no model for Device=9"
    assert scorer.missing_reason({"Device": None}) == "there is no model for Device=null"
    assert PackedScorer(inspect(tmp_path / FILE, {}, trusted=False)).missing_reason({"Device": 1}) is None
    assert isinstance(found, TableResult)
    assert {row: str(error) for row, error in found.errors.items()} == {
        1: "there is no model for Device=9",
        2: "there is no model for Device=null",
    }
    assert found.rows.num_rows == 4
    assert [found.rows.column("score")[row].is_valid for row in (0, 3)] == [True, True]


def test_batches_in_which_no_key_has_a_model_are_nothing_but_errors(tmp_path: Path) -> None:
    pumps(tmp_path)

    found = opened(tmp_path).score(readings(["8", "9"], [1, 2]))

    assert [str(error) for error in found] == ["there is no model for Device=8", "there is no model for Device=9"]


def test_a_row_that_is_no_number_fails_alone(tmp_path: Path) -> None:
    models = pumps(tmp_path)
    devices, values = [0, 1, 2, 2, 0, 1], [1.0, None, 20.0, float("nan"), float("inf"), 12.0]

    found = opened(tmp_path).score(readings(devices, values))

    assert {row: str(error) for row, error in found.errors.items()} == {
        1: "Value is null, which the model does not take",
        4: "Value is inf, which the model does not take",
    }
    for row in (0, 2, 3, 5):  # a forest takes NaN
        expected = models[devices[row]].decision_function([[values[row]]])[0]
        assert found.rows.column("score")[row].as_py() == pytest.approx(expected, rel=1e-9)


def test_text_where_numbers_belong_is_an_error_of_each_row(tmp_path: Path) -> None:
    pumps(tmp_path, 2)

    found = opened(tmp_path).score(pa.table({"Device": [0, 1], "Value": ["high", "low"]}))

    assert [str(error) for error in found.errors.values()] == [
        "the model takes numbers, and is given Value (string)"
    ] * 2


def test_classifiers_and_regressors_are_kept_whole(tmp_path: Path) -> None:
    values = READINGS.normal(size=(60, 2))
    classifiers = {
        name: LogisticRegression().fit(values, np.where(values[:, 0] > level, "high", "low"))
        for name, level in (("a", 0), ("b", 0.5))
    }
    write(tmp_path / "c", [Model({"Line": name}, model) for name, model in classifiers.items()], by=["Line"])
    lines = np.array(["a", "b"])[READINGS.integers(0, 2, 60)]

    scorer = opened(tmp_path / "c")
    found = scorer.score(pa.table({"Line": lines, "x": values[:, 0], "y": values[:, 1]}))

    assert scorer.columns == {"label": "string", "score": "float64"}
    assert scorer.describe() == "2 models (2 whole) by Line, batch 65536"
    for name, model in classifiers.items():
        rows = np.flatnonzero(lines == name)
        assert found.column("label").take(rows).to_pylist() == model.predict(values[rows]).tolist()

    write(tmp_path / "r", [Model({"Line": "a"}, LinearRegression().fit(values, values[:, 0]))], by=["Line"])
    found = opened(tmp_path / "r").score(pa.table({"Line": ["a"], "x": [1.5], "y": [0.0]}))
    assert found.column("prediction").to_pylist() == [pytest.approx(1.5)]


def test_models_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    regressor = DummyRegressor().fit([[1.0]], [1.0])
    cases: dict[str, list[Model]] = {
        "Device=2 takes 2 features, and others take 1": [
            Model({"Device": 1}, detector()),
            Model({"Device": 2}, detector(features=2)),
        ],
        "Device=2 gives prediction": [Model({"Device": 1}, detector()), Model({"Device": 2}, regressor)],
        "Device=1 has two models": [Model({"Device": 1}, detector()), Model({"Device": "1"}, detector())],
        "Device=null: null makes no key": [Model({"Device": None}, detector())],
        "a fact cannot be called svm": [Model({"Device": 1}, detector(), {"svm": 1})],
        "Device is of different types": [Model({"Device": 1}, detector()), Model({"Device": "x"}, detector())],
        "there are no models": [],
    }

    for number, (message, models) in enumerate(cases.items()):
        with pytest.raises(SpecError, match=message):
            write(tmp_path / str(number), models, by=["Device"])
        assert not (tmp_path / str(number)).exists()
    for by in ([], ["Device", "Device"], ["svm"]):
        with pytest.raises(SpecError, match="cannot make a key"):
            write(tmp_path / "by", [Model({"Device": 1, "svm": 1}, detector())], by=by)


def test_models_fitted_with_names_keep_them_and_agree_on_them(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"flow": READINGS.normal(size=50), "heat": READINGS.normal(size=50)})
    batchable, whole = OneClassSVM(nu=0.1).fit(frame), IsolationForest(n_estimators=3).fit(frame)
    swapped = OneClassSVM().fit(frame[["heat", "flow"]])
    write(tmp_path / "a", [Model({"k": 1}, batchable), Model({"k": 2}, whole)], by=["k"])

    scorer = opened(tmp_path / "a")
    found = scorer.score(pa.table({"k": [1, 2], "flow": [0.5, 0.5], "heat": [1.5, 1.5]}))

    row = pandas.DataFrame({"flow": [0.5], "heat": [1.5]})
    assert scorer.features == ["flow", "heat"]
    expected = [batchable.decision_function(row)[0], whole.decision_function(row)[0]]
    np.testing.assert_allclose(found.column("score").to_numpy(), expected, rtol=1e-9)
    with pytest.raises(SpecError, match="k=2 takes heat, flow, and others take flow, heat"):
        write(tmp_path / "b", [Model({"k": 1}, batchable), Model({"k": 2}, swapped)], by=["k"])


def test_facts_about_models_are_columns_of_the_file(tmp_path: Path) -> None:
    models = (Model({"Device": n}, detector(), {"rows": 40 + n, "note": None if n else "new"}) for n in range(3))
    write(tmp_path, models, by=["Device"])

    table = parquet.read_table(tmp_path / FILE)

    assert table.select(["Device", "rows", "note"]).to_pylist()[:2] == [
        {"Device": 0, "rows": 40, "note": "new"},
        {"Device": 1, "rows": 41, "note": None},
    ]
    assert table.column("svm")[0].as_py()["kernel"] == "rbf"


def test_models_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_ROWS", 4)
    model = detector()
    write(tmp_path, (Model({"Device": number}, model) for number in range(10)), by=["Device"])

    assert parquet.ParquetFile(tmp_path / FILE).metadata.num_row_groups == 3
    found = opened(tmp_path).score(readings(range(10), [20.5] * 10))
    assert len(set(found.column("score").to_pylist())) == 1


def test_a_package_whose_models_come_to_an_end_too_early_is_not_written(tmp_path: Path) -> None:
    write(tmp_path, [Model({"Device": 1}, detector())], by=["Device"])
    before = (tmp_path / FILE).read_bytes()

    def broken() -> Any:
        yield Model({"Device": 2}, detector())
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write(tmp_path, broken(), by=["Device"])

    assert sorted(each.name for each in tmp_path.iterdir()) == [FILE, "tally.yaml"]
    assert (tmp_path / FILE).read_bytes() == before


def test_types_that_can_do_more_than_compute_need_trust_twice(tmp_path: Path) -> None:
    model = make_pipeline(FunctionTransformer(np.copy), OneClassSVM()).fit(READINGS.normal(size=(20, 1)))
    models = [Model({"Device": 1}, model)]

    with pytest.raises(UntrustedModelError, match="Device=1"):
        write(tmp_path / "p", models, by=["Device"])
    written = write(tmp_path / "p", models, by=["Device"], trusted=True)

    assert written.requires_trust
    with pytest.raises(UntrustedModelError):
        resolve(tmp_path / "p")
    found = load(resolve(tmp_path / "p", trust=True), "cpu").score(readings([1], [0.5]))
    assert found.column("score").to_pylist() == [pytest.approx(model.decision_function([[0.5]])[0])]


def test_a_model_that_cannot_be_opened_costs_its_own_rows(tmp_path: Path) -> None:
    pumps(tmp_path)
    table = parquet.read_table(tmp_path / FILE)
    contents = [b"junk" if each is not None else None for each in table.column("content").to_pylist()]
    place = table.schema.get_field_index("content")
    parquet.write_table(table.set_column(place, table.schema.field(place), pa.array(contents)), tmp_path / FILE)

    found = opened(tmp_path).score(readings([0, 2, 1, 2], [1, 2, 3, 4]))

    assert list(found.errors) == [1, 3]
    assert "the model of Device=2 cannot be opened" in str(found.errors[1])
    assert [found.rows.column("score")[row].is_valid for row in (0, 2)] == [True, True]


def damage(change: Callable[[pa.Table], pa.Table], path: Path) -> None:
    parquet.write_table(change(parquet.read_table(path)), path)


def described_as(table: pa.Table, **changes: Any) -> pa.Table:
    said = json.loads(table.schema.metadata[b"tally.models"]) | changes
    return table.replace_schema_metadata({b"tally.models": json.dumps(said).encode()})


def test_damaged_files_and_files_of_others_are_told_apart(tmp_path: Path) -> None:
    pumps(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelLoadError, match=message):
            opened(tmp_path)
        path.write_bytes(whole)

    path.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read as Parquet")
    path.write_bytes(whole[:3000] + bytes(2000) + whole[5000:])
    refused("models.parquet")
    parquet.write_table(pa.table({"a": [1]}), path)
    refused("holds no models")
    damage(lambda table: table.replace_schema_metadata({b"tally.models": b"{"}), path)
    refused("does not say what it holds")
    damage(lambda table: described_as(table, version=99), path)
    refused("is of version 99, and this Tally reads version 1")
    damage(lambda table: described_as(table, features=7), path)
    refused("do not have 7 features")
    damage(lambda table: table.drop_columns(["svm"]), path)
    refused("damaged")
    damage(lambda table: pa.concat_tables([table, table[:1]]), path)
    refused("Device=0 has two models")

    def shorter(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[0]["svm"]["coefs"] = rows[0]["svm"]["coefs"][:-1]
        return pa.Table.from_pylist(rows, table.schema)

    damage(shorter, path)
    refused("vectors is not as long as it should be")


def test_wrong_options_are_all_reported(tmp_path: Path) -> None:
    pumps(tmp_path)

    with pytest.raises(SpecError) as caught:
        inspect(tmp_path / FILE, {"batch_size": 0, "colour": "red"}, trusted=False)

    assert len(caught.value.problems) == 2
    with pytest.raises(SpecError, match="not complete"):
        PackedScorer({})


def test_loading_opens_no_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pumps(tmp_path)
    monkeypatch.setattr("skops.io.load", lambda *_, **__: pytest.fail("an estimator was opened"))
    made = []
    monkeypatch.setattr(packed, "BatchedSvms", lambda svms: made.append(svms) or batched_svms.BatchedSvms(svms))

    found = opened(tmp_path).score(readings([0, 1], [1.0, 2.0]))

    assert found.num_rows == 2
    assert len(made) == 1
