"""Models of tables on real readings, against answers worked out independently of the scorers."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import skops.io
from onnx import numpy_helper
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from tally.scorers.tabular.onnx import OnnxTableScorer, inspect, takes_table
from tally.scorers.tabular.sklearn import SklearnScorer
from tally.scorers.tabular.sklearn import inspect as inspect_sklearn


@pytest.fixture(scope="module")
def readings(data: Path) -> dict[str, list[float]]:
    """Values in order, by ``device_tag``."""
    found: dict[str, list[float]] = defaultdict(list)
    with (data / "sensors" / "azure_iot" / "sensor_data.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[f"{row['Device']}_{row['Tag']}"].append(float(row["Value"]))
    return found


def device_model(data: Path, key: str) -> Path:
    device, tag = key.split("_")
    return data / "models" / "sensor_ocsvm" / f"device{device}_tag{tag}.onnx"


def loaded(path: Path, **options: Any) -> OnnxTableScorer:
    assert takes_table(path)
    scorer = OnnxTableScorer(inspect(path, options))
    scorer.load(path.parent, "cpu")
    return scorer


def decision(path: Path, value: float) -> float:
    """The model's formula, one reading at a time, from the numbers in its file."""
    weights = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    scaled = (value - weights["mean"].item()) * weights["inv"].item()
    total = weights["ic"].item()
    for vector, share in zip(weights["sv"].ravel().tolist(), weights["dc"].ravel().tolist(), strict=True):
        total += share * math.exp(weights["ng"].item() * (scaled - vector) ** 2)
    return total


def test_device_models_give_the_known_number_of_anomalies(data: Path, readings: dict[str, list[float]]) -> None:
    reference = json.loads((data / "models" / "sensor_ocsvm" / "reference.json").read_text())
    assert len(reference) == 15
    assert reference.keys() == readings.keys()
    for key, known in reference.items():
        path = device_model(data, key)
        scorer = loaded(path)
        assert scorer.columns == {"anomaly": "bool", "score": "float64"}
        result = scorer.score(pa.table({"Value": readings[key]}))
        assert isinstance(result, pa.Table)
        assert result.num_rows == known["n"]
        anomalies = result["anomaly"].to_pylist()
        assert sum(anomalies) == known["anomalies"], key
        assert anomalies == [score < 0 for score in result["score"].to_pylist()]
        for row in range(0, known["n"], 50):
            assert result["score"][row].as_py() == pytest.approx(
                decision(path, readings[key][row]), rel=1e-9, abs=1e-15
            )


def test_one_reading_at_a_time_and_all_at_once_are_the_same(data: Path, readings: dict[str, list[float]]) -> None:
    scorer = loaded(device_model(data, "3_2"))
    values = readings["3_2"][:40]
    whole = scorer.score(pa.table({"Value": values}))
    assert isinstance(whole, pa.Table)
    single = [scorer.score(pa.table({"Value": [value]})) for value in values]
    assert pa.concat_tables(single).to_pydict() == whole.to_pydict()


def test_iris_is_told_apart(data: Path) -> None:
    path = data / "models" / "tabular" / "iris.onnx"
    flowers = pa.table(
        {
            "sepal_length": [5.1, 7.0, 6.3],
            "sepal_width": [3.5, 3.2, 3.3],
            "petal_length": [1.4, 4.7, 6.0],
            "petal_width": [0.2, 1.4, 2.5],
        }
    )
    scorer = loaded(path, labels=["setosa", "versicolor", "virginica"])
    assert scorer.features == 4
    result = scorer.score(flowers)
    assert isinstance(result, pa.Table)
    assert result["label"].to_pylist() == ["setosa", "versicolor", "virginica"]
    assert result["index"].to_pylist() == [0, 1, 2]
    assert min(result["score"].to_pylist()) > 0.9


def test_a_fitted_pipeline_scores_real_readings_as_scikit_learn_does(
    tmp_path: Path, readings: dict[str, list[float]]
) -> None:
    values = np.array(readings["1_1"])[:, None]
    model = make_pipeline(StandardScaler(), OneClassSVM(nu=0.01)).fit(values[:600])
    skops.io.dump(model, tmp_path / "model.skops")
    scorer = SklearnScorer(inspect_sklearn(tmp_path / "model.skops", {}, trusted=False))
    scorer.load(tmp_path, "cpu")
    result = scorer.score(pa.table({"Value": values[:, 0]}))
    assert isinstance(result, pa.Table)
    assert result["score"].to_pylist() == model.decision_function(values).tolist()
    assert result["anomaly"].to_pylist() == (model.predict(values) == -1).tolist()
