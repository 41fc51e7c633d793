"""One model file for each key, and packing such files."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skops")

import joblib
import skops.io
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from tally.errors import ModelLoadError, ModelNotFoundError, SpecError, UntrustedModelError
from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.per_key import files as per_key_files
from tally.scorers.per_key.files import PerKeyFilesScorer, inspect, pack
from tally.scorers.per_key.templates import find, read_key

NAMES = "{Device}_{Tag}.skops"


def detector(level: float = 20) -> Any:
    values = np.random.default_rng(int(level)).normal(level, 2, (40, 1))
    return make_pipeline(StandardScaler(), OneClassSVM(nu=0.1)).fit(values)


def forest(level: float = 20) -> Any:
    values = np.random.default_rng(int(level)).normal(level, 2, (40, 1))
    return IsolationForest(n_estimators=5, random_state=0).fit(values)


def save(folder: Path, devices: int = 3) -> dict[tuple[int, str], Any]:
    """Models of devices 1, 2, ... with the tags heat (detectors) and flow (forests)."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for device in range(1, devices + 1):
        models[device, "heat"], models[device, "flow"] = detector(device * 10), forest(device * 10)
    for (device, tag), model in models.items():
        skops.io.dump(model, folder / f"{device}_{tag}.skops")
    return models


def opened(template: str, by: tuple[str, ...] = ("Device", "Tag"), *, trusted: bool = False) -> PerKeyFilesScorer:
    folder, files = find(template, by)
    options = inspect(Path(template).relative_to(folder).as_posix(), by, folder, files, {}, trusted=trusted)
    scorer = PerKeyFilesScorer(options)
    scorer.load(folder, "cpu")
    return scorer


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# ----------------------------------------------------------------------------------------------------- finding


def test_files_are_found_by_a_template(tmp_path: Path) -> None:
    touched(tmp_path, "3_5.skops", "10_1.skops", "3.skops", "3_5.onnx", "sub/1_1.skops", ".3_5.skops", "1_2_3.skops")

    assert find(f"{tmp_path}/{NAMES}", ("Device", "Tag")) == (tmp_path, ("10_1.skops", "1_2_3.skops", "3_5.skops"))


def test_placeholders_stand_for_folders_too(tmp_path: Path) -> None:
    touched(tmp_path, "north/m/7/model.onnx", "south/m/7/model.onnx", "south/x/7/model.onnx", "south/m/7/other.onnx")

    folder, files = find(f"{tmp_path}/{{site}}/m/{{Device}}/model.onnx", ("Device", "site"))

    assert (folder, files) == (tmp_path, ("north/m/7/model.onnx", "south/m/7/model.onnx"))


def test_a_placeholder_used_twice_has_one_value(tmp_path: Path) -> None:
    touched(tmp_path, "a/model_a.skops", "a/model_b.skops")

    assert find(f"{tmp_path}/{{x}}/model_{{x}}.skops", ("x",))[1] == ("a/model_a.skops",)


def test_names_that_look_like_patterns_are_plain_names(tmp_path: Path) -> None:
    touched(tmp_path, "a+b [1]/(7).skops", "aab 1/(7).skops")

    assert find(f"{tmp_path}/a+b [1]/({{x}}).skops", ("x",))[1] == ("(7).skops",)


def test_placeholders_and_columns_have_to_be_the_same(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        find(f"{tmp_path}/{{Device}}_{{Tga}}.skops", ("Device", "Tag"))

    assert len(caught.value.problems) == 2
    assert "{Tga} is no column of the key" in caught.value.problems[0]
    assert "the column Tag of the key chooses no model" in caught.value.problems[1]


def test_no_file_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model file matches"):
        find(f"{tmp_path}/{NAMES}", ("Device", "Tag"))
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        find(f"{tmp_path}/nowhere/{NAMES}", ("Device", "Tag"))


def test_a_key_is_read_from_a_name_only_if_there_is_one_way_to_read_it() -> None:
    assert read_key("{a}/{b}_x.skops", "north/5_x.skops") == ("north", "5")
    with pytest.raises(SpecError, match="pump_1_heat"):
        read_key("{a}_{b}.skops", "pump_1_heat.skops")


# ----------------------------------------------------------------------------------------------------- scoring


def test_rows_are_scored_by_the_file_of_their_key(tmp_path: Path) -> None:
    models = save(tmp_path / "models")
    random = np.random.default_rng(0)
    devices = random.integers(1, 4, 400)
    tags = np.array(["heat", "flow"])[random.integers(0, 2, 400)]
    values = random.normal(devices * 10.0, 4)

    ref = resolve(f"{tmp_path}/models/{NAMES}", by=("Device", "Tag"))
    scorer = load(ref, "auto")
    found: Any = scorer.score(pa.table({"Device": devices, "Tag": tags, "Value": values}))

    assert (ref.kind, scorer.features, tuple(scorer.by)) == ("keyed", 1, ("Device", "Tag"))
    assert scorer.describe() == "6 model files by Device, Tag, batch 65536"
    assert found.schema == pa.schema({"anomaly": pa.bool_(), "score": pa.float64()})
    for (device, tag), model in models.items():
        rows = np.flatnonzero((devices == device) & (tags == tag))
        score = found.column("score").to_numpy()[rows]
        np.testing.assert_allclose(score, model.decision_function(values[rows, None]), rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(found.column("anomaly").to_numpy()[rows], model.predict(values[rows, None]) == -1)


def test_a_key_without_a_file_says_which_file_is_missing(tmp_path: Path) -> None:
    save(tmp_path / "models")
    scorer = opened(f"{tmp_path}/models/{NAMES}")

    assert scorer.missing_reason({"Device": 3, "Tag": "heat"}) is None
    assert scorer.missing_reason({"Device": 3.0, "Tag": "heat"}) is None
    assert scorer.missing_reason({"Device": 9, "Tag": "heat"}) == "there is no model models/9_heat.skops"
    assert scorer.missing_reason({"Device": None, "Tag": None}) == "Device and Tag is null, which chooses no model"
    found: Any = scorer.score(pa.table({"Device": [1.0, 9.0, None], "Tag": ["heat"] * 3, "Value": [1.0] * 3}))
    assert [str(found.errors[row]) for row in (1, 2)] == [
        "there is no model models/9_heat.skops",
        "Device is null, which chooses no model",
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [(3, "3"), (3.0, "3"), (2.5, "2.5"), ("a b", "a b"), (True, "true"), (datetime.date(2026, 1, 2), "2026-01-02")],
    ids=str,
)
def test_values_are_written_into_names_as_people_write_them(value: Any, name: str, tmp_path: Path) -> None:
    skops.io.dump(detector(), tmp_path / f"{name}.skops")
    scorer = opened(f"{tmp_path}/{{key}}.skops", ("key",))

    found: Any = scorer.score(pa.table({"key": [value, value], "Value": [20.0, 21.0]}))

    assert scorer.missing_reason({"key": value}) is None
    assert found.num_rows == 2


def test_values_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "models")
    skops.io.dump(detector(), tmp_path / "1_heat.skops")
    scorer = opened(f"{tmp_path}/models/{NAMES}")

    for device in ("../1", str(tmp_path / "1"), "./1", "x/../1"):
        assert "there is no model" in str(scorer.missing_reason({"Device": device, "Tag": "heat"}))
        found: Any = scorer.score(pa.table({"Device": [device], "Tag": ["heat"], "Value": [1.0]}))
        assert "there is no model" in str(found[0])


def test_a_file_that_cannot_be_opened_costs_its_own_rows(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "2_heat.skops").write_bytes(b"PK junk")
    skops.io.dump(LinearRegression().fit([[1.0]], [1.0]), tmp_path / "2_flow.skops")
    skops.io.dump(OneClassSVM().fit([[1.0, 2.0]]), tmp_path / "3_heat.skops")
    scorer = opened(f"{tmp_path}/{NAMES}")

    devices, tags = [1, 2, 2, 3, 1, 2], ["heat", "heat", "flow", "heat", "flow", "heat"]
    found: Any = scorer.score(pa.table({"Device": devices, "Tag": tags, "Value": [10.0] * 6}))

    assert sorted(found.errors) == [1, 2, 3, 5]
    assert "2_heat.skops cannot be opened" in str(found.errors[1])
    assert "2_flow.skops gives prediction" in str(found.errors[2])
    assert "3_heat.skops takes 2 features, and others take 1" in str(found.errors[3])
    assert [found.rows.column("score")[row].is_valid for row in (0, 4)] == [True, True]


def test_a_first_file_that_cannot_be_opened_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "1_flow.skops").write_bytes(b"PK junk")
    folder, files = find(f"{tmp_path}/{NAMES}", ("Device", "Tag"))

    options = inspect(NAMES, ("Device", "Tag"), folder, files, {}, trusted=False)

    assert "1_flow.skops cannot be opened" in options["assumed"][0]
    for each in tmp_path.iterdir():
        each.write_bytes(b"PK junk")
    with pytest.raises(ModelLoadError, match="none of the 6 models can be opened"):
        inspect(NAMES, ("Device", "Tag"), folder, files, {}, trusted=False)


def test_pickles_need_trust(tmp_path: Path) -> None:
    (tmp_path / "1.pkl").write_bytes(pickle.dumps(detector()))
    joblib.dump(detector(), tmp_path / "1.joblib")

    for suffix in ("pkl", "joblib"):
        template = f"{tmp_path}/{{Device}}.{suffix}"
        with pytest.raises(UntrustedModelError):
            opened(template, ("Device",))
        found: Any = opened(template, ("Device",), trusted=True).score(pa.table({"Device": [1], "Value": [20.0]}))
        assert found.num_rows == 1


def test_models_are_opened_once_and_only_when_their_key_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    scorer = opened(f"{tmp_path}/{NAMES}")
    asked: list[str] = []
    real = per_key_files.open_model
    monkeypatch.setattr(
        per_key_files, "open_model", lambda folder, file, *a, **k: asked.append(file) or real(folder, file, *a, **k)
    )

    table = pa.table({"Device": [1, 2, 1, 2], "Tag": ["heat", "heat", "flow", "heat"], "Value": [10.0] * 4})
    for _ in range(3):
        scorer.score(table)

    assert sorted(asked) == ["1_flow.skops", "1_heat.skops", "2_heat.skops"]


def test_more_models_than_are_kept_open_are_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_key_files, "OPEN_MODELS", 2)
    models = save(tmp_path)
    scorer = opened(f"{tmp_path}/{NAMES}")

    for device, tag in [*models, *models]:
        found: Any = scorer.score(pa.table({"Device": [device], "Tag": [tag], "Value": [12.0]}))
        expected = models[device, tag].decision_function([[12.0]])[0]
        assert found.column("score")[0].as_py() == pytest.approx(expected, rel=1e-9)


# ----------------------------------------------------------------------------------------------------- packing


def test_packed_files_score_as_the_files_do(tmp_path: Path) -> None:
    save(tmp_path / "models")
    table = pa.table({"Device": [1, 2, 3] * 4, "Tag": ["heat"] * 6 + ["flow"] * 6, "Value": np.arange(12) * 3.0})

    written = pack(f"{tmp_path}/models/{NAMES}", ("Device", "Tag"), tmp_path / "packed", name="pumps")

    assert (written.batched, written.whole) == (3, 3)
    found: Any = load(resolve(tmp_path / "packed"), "cpu").score(table)
    assert found.equals(opened(f"{tmp_path}/models/{NAMES}").score(table))
    keys = pa.parquet.read_table(tmp_path / "packed" / "models.parquet", columns=["Device", "Tag"])
    assert keys.schema.types == [pa.int64(), pa.string()]


def test_everything_that_cannot_be_packed_is_listed_and_nothing_written(tmp_path: Path) -> None:
    save(tmp_path / "models")
    for name in ("1_flow", "3_heat"):
        (tmp_path / "models" / f"{name}.skops").write_bytes(b"PK junk")

    with pytest.raises(ModelLoadError) as caught:
        pack(f"{tmp_path}/models/{NAMES}", ("Device", "Tag"), tmp_path / "packed")

    assert "2 of 6 models cannot be packed" in str(caught.value)
    assert "1_flow.skops" in str(caught.value)
    assert "3_heat.skops" in str(caught.value)
    assert not (tmp_path / "packed").exists()


def test_numbers_with_leading_zeros_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("007", "8"):
        skops.io.dump(detector(), tmp_path / f"{name}.skops")

    pack(f"{tmp_path}/{{Device}}.skops", ("Device",), tmp_path / "packed")

    scorer: Any = load(resolve(tmp_path / "packed"), "cpu")
    assert [scorer.missing_reason({"Device": value}) is None for value in ("007", 8, 7)] == [True, True, False]


def test_the_command_packs_and_registers(tmp_path: Path, cli: Callable[..., Any]) -> None:
    save(tmp_path / "models")
    out = tmp_path / "pumps"

    ran = cli("models", "pack", f"{tmp_path}/models/{NAMES}", "--by", "Device,Tag", "--out", out, "--name", "pumps")

    assert ran.code == 0
    assert f"packed 6 models into {out}: 3 batched SVMs, 3 kept whole" in ran.out
    assert "added models:/pumps/1" in ran.out
    assert "--model models:/pumps" in ran.err
    assert resolve("models:/pumps").kind == "packed"


def test_the_command_takes_a_template_from_where_it_is(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "models")
    monkeypatch.chdir(tmp_path)

    assert cli("models", "pack", f"models/{NAMES}", "--by", "Device,Tag", "--out", "pumps").code == 0
    assert sorted(os.listdir("pumps")) == ["models.parquet", "tally.yaml"]
    ran = cli("models", "pack", f"models/{NAMES}", "--by", "Device", "--out", "others")
    assert ran.code != 0
    assert "{Tag} is no column of the key" in ran.err
