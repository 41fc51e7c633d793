"""One model for each device and sensor, on real readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from tally.models.load import load
from tally.models.resolve import resolve


@pytest.fixture(scope="module")
def readings(data: Path) -> pa.Table:
    """Device, Tag and Value of each reading."""
    path = data / "sensors" / "azure_iot" / "sensor_data.csv"
    if not path.is_file():
        pytest.skip(f"no readings at {path}")
    return csv.read_csv(path).select(["Device", "Tag", "Value"])


def keys(table: pa.Table) -> list[tuple[int, int]]:
    pairs = table.select(["Device", "Tag"]).group_by(["Device", "Tag"]).aggregate([])
    return sorted((row["Device"], row["Tag"]) for row in pairs.to_pylist())


def of_key(table: pa.Table, device: int, tag: int) -> np.ndarray:
    """The rows of one key."""
    return np.flatnonzero((table.column("Device").to_numpy() == device) & (table.column("Tag").to_numpy() == tag))


def test_fifteen_models_find_the_anomalies_that_they_found_originally(data: Path, readings: pa.Table) -> None:
    folder = data / "models" / "sensor_ocsvm"
    expected = json.loads((folder / "reference.json").read_text())
    ref = resolve(f"{folder}/device{{Device}}_tag{{Tag}}.onnx", by=("Device", "Tag"))

    scorer = load(ref, "cpu")
    found: Any = scorer.score(readings)

    assert scorer.columns == {"anomaly": "bool", "score": "float64"}
    counts = {}
    for device, tag in keys(readings):
        anomalies = found.column("anomaly").to_numpy()[of_key(readings, device, tag)]
        counts[f"{device}_{tag}"] = (len(anomalies), int(anomalies.sum()))
    assert counts == {key: (each["n"], each["anomalies"]) for key, each in expected.items()}


@pytest.mark.parametrize("options", [{}, {"kernel": "linear"}, {"gamma": 0.01, "nu": 1e-4}], ids=str)
def test_packed_models_of_real_readings_decide_as_sklearn(
    options: dict[str, Any], readings: pa.Table, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import OneClassSVM

    from tally.scorers.per_key.packed import Model, write

    values = readings.column("Value").to_numpy()[:, None]
    models = {}
    for device, tag in keys(readings):
        early = of_key(readings, device, tag)[:400]
        models[device, tag] = make_pipeline(StandardScaler(), OneClassSVM(**{"nu": 0.05, **options})).fit(values[early])
    fitted = (Model({"Device": device, "Tag": tag}, model) for (device, tag), model in models.items())
    write(tmp_path, fitted, by=["Device", "Tag"], features=["Value"])

    found: Any = load(resolve(tmp_path), "cpu").score(readings)

    for (device, tag), model in models.items():
        rows = of_key(readings, device, tag)
        score = found.column("score").to_numpy()[rows]
        floor = 1e-14 * np.abs(model[-1].dual_coef_).sum()
        if options.get("kernel") == "linear":
            floor *= np.abs(model[0].transform(values[rows])).max() * np.abs(model[-1].support_vectors_).max()
        np.testing.assert_allclose(score, model.decision_function(values[rows]), rtol=1e-9, atol=floor)
        np.testing.assert_array_equal(found.column("anomaly").to_numpy()[rows], model.predict(values[rows]) == -1)
