"""ONNX models of tables: what they take, what their outputs mean, and rows that fail alone."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper, numpy_helper

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, ModelRefutedError, SpecError
from tally.scorers.base import TableResult
from tally.scorers.tabular.onnx import OnnxTableScorer, inspect, takes_table

FLOAT, DOUBLE, INT, TEXT = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.STRING
Info = tuple[str, int, list[Any]]

TABLE = pa.table({"a": [1.0, -2.0, 3.0], "b": [10.0, 20.0, 30.0]})


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def model(
    folder: Path, nodes: list[onnx.NodeProto], given: list[Info], outputs: list[Any], **weights: np.ndarray[Any, Any]
) -> Path:
    """Write a model. Outputs are as inputs (name, type, shape), or ready-made value infos."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in given],
        [helper.make_tensor_value_info(*each) if isinstance(each, tuple) else each for each in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def scorer(path: Path, **options: Any) -> OnnxTableScorer:
    found = OnnxTableScorer(inspect(path, options))
    found.load(path.parent, "cpu")
    return found


def columns(result: Any) -> dict[str, list[Any]]:
    assert isinstance(result, pa.Table)
    return result.to_pydict()


def logits(folder: Path, batch: Any = "n") -> Path:
    """Scores of three classes: a, b and 0."""
    weights = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    return model(
        folder, [node("MatMul", "x w", "y")], [("x", FLOAT, [batch, 2])], [("y", FLOAT, [batch, 3])], w=weights
    )


def detector(folder: Path, label: str = "label", score: str = "scores") -> Path:
    """Score is a; label is -1 where it is negative, else 1, or as ``anomaly`` 1 and 0."""
    bad, good = (1, 0) if label == "anomaly" else (-1, 1)
    nodes = [
        node("Gather", "x first", score, axis=1),
        node("Less", f"{score} zero", "below"),
        node("Where", "below bad good", label),
    ]
    weights = {
        "first": np.array([0]),
        "zero": np.array(0.0),
        "bad": np.array(bad),
        "good": np.array(good),
    }
    outputs = [(label, INT, ["n", 1]), (score, DOUBLE, ["n", 1])]
    return model(folder, nodes, [("x", DOUBLE, ["n", 2])], outputs, **weights)


# ------------------------------------------------------------------------------------------ what goes in


def test_models_of_tables_are_told_from_those_of_pictures(tmp_path: Path) -> None:
    assert takes_table(logits(tmp_path))
    picture = model(tmp_path, [node("Relu", "x", "y")], [("x", FLOAT, ["n", 3, 8, 8])], [("y", FLOAT, ["n", 3, 8, 8])])
    assert not takes_table(picture)
    with pytest.raises(ModelLoadError, match=r"takes x: float32 of 4 axes"):
        inspect(picture, {})
    with pytest.raises(ModelNotFoundError):
        takes_table(tmp_path / "none.onnx")


def test_one_matrix_takes_the_numeric_columns_in_their_order(tmp_path: Path) -> None:
    found = scorer(logits(tmp_path))
    assert found.features == 2
    assert found.options.assumed == (
        "features were not given: assumed the table's 2 numeric columns in their order (--set features=...)",
    )
    assert columns(found.score(TABLE)) == {"y": [[1.0, 10.0, 0.0], [-2.0, 20.0, 0.0], [3.0, 30.0, 0.0]]}
    assert found.columns == {"y": "list<float32>"}
    keyed = TABLE.add_column(0, "Device", pa.array(["p", "q", "r"]))
    assert columns(found.score(keyed)) == columns(found.score(TABLE))


def test_an_input_for_each_column_is_a_feature_by_name(tmp_path: Path) -> None:
    nodes = [node("Cast", "count", "c", to=DOUBLE), node("Mul", "value c", "total"), node("Identity", "kind", "same")]
    given: list[Info] = [("value", DOUBLE, ["n", 1]), ("count", INT, ["n", 1]), ("kind", TEXT, ["n"])]
    path = model(tmp_path, nodes, given, [("total", DOUBLE, ["n", 1]), ("same", TEXT, ["n"])])
    found = scorer(path)
    assert found.features == ["value", "count", "kind"]
    assert found.options.assumed == ()
    assert found.columns == {"total": "float64", "same": "string"}
    table = pa.table({"value": [0.5, 2.0], "count": [4, 2**40], "kind": ["a", "b"]})
    assert columns(found.score(table)) == {"total": [2.0, 2.0**41], "same": ["a", "b"]}
    with pytest.raises(ItemError, match="count is string, but the model takes numbers"):
        found.score(table.set_column(1, "count", pa.array(["x", "y"])))
    with pytest.raises(SpecError, match=r"features: 2 named \(a, b\), but model\.onnx takes 3"):
        inspect(path, {"features": ["a", "b"]})


def test_whole_numbers_are_not_rounded(tmp_path: Path) -> None:
    path = model(tmp_path, [node("Identity", "id", "same")], [("id", INT, ["n", 1])], [("same", INT, ["n", 1])])
    assert columns(scorer(path).score(pa.table({"id": [2**62 + 1, -5]}))) == {"same": [2**62 + 1, -5]}


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_model_fixed_to_a_number_of_rows_is_given_as_many(tmp_path: Path, batch: int) -> None:
    free = columns(scorer(logits(tmp_path)).score(TABLE))
    assert columns(scorer(logits(tmp_path, batch)).score(TABLE)) == free


def test_a_row_with_a_value_that_the_model_does_not_take_fails_alone(tmp_path: Path) -> None:
    bad = TABLE.set_column(1, "b", pa.array([None, 20.0, float("inf")]))
    result = scorer(logits(tmp_path)).score(bad)
    assert isinstance(result, TableResult)
    assert {place: str(error) for place, error in result.errors.items()} == {
        0: "b is null, which the model does not take",
        2: "b is inf, which the model does not take",
    }
    assert result.rows["y"].to_pylist()[1] == [-2.0, 20.0, 0.0]
    assert result.rows.num_rows == 3


def test_missing_values_go_to_a_model_that_takes_them(tmp_path: Path) -> None:
    nodes = [node("IsNaN", "x", "y")]
    path = model(tmp_path, nodes, [("x", DOUBLE, ["n", 1])], [("y", TensorProto.BOOL, ["n", 1])])
    table = pa.table({"a": [1.0, None]})
    assert columns(scorer(path, nan=True).score(table)) == {"y": [False, True]}
    assert isinstance(scorer(path).score(table), TableResult)


# ------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize(("label", "score"), [("label", "scores"), ("anomaly", "decision")])
def test_detectors_look_alike(tmp_path: Path, label: str, score: str) -> None:
    found = scorer(detector(tmp_path, label, score))
    assert found.options.task == "detect"
    assert found.columns == {"anomaly": "bool", "score": "float64"}
    assert columns(found.score(TABLE)) == {"anomaly": [False, True, False], "score": [1.0, -2.0, 3.0]}


def test_detectors_outputs_can_be_had_as_they_are(tmp_path: Path) -> None:
    found = scorer(detector(tmp_path), task="values")
    assert columns(found.score(TABLE)) == {"label": [1, -1, 1], "scores": [1.0, -2.0, 3.0]}
    assert found.columns == {"label": "int64", "scores": "float64"}


@pytest.mark.parametrize("options", [{"task": "classify"}, {"labels": ["low", "high", "none"]}])
def test_scores_of_classes_become_label_and_probability(tmp_path: Path, options: dict[str, Any]) -> None:
    found = scorer(logits(tmp_path), **options)
    result = columns(found.score(pa.table({"a": [3.0, 0.0], "b": [0.0, 2.0]})))
    names = options.get("labels", ["0", "1", "2"])
    assert result["label"] == names[:2]
    assert result["index"] == [0, 1]
    assert result["score"] == pytest.approx([np.exp(3) / (np.exp(3) + 2), np.exp(2) / (np.exp(2) + 2)])
    assert found.columns == {"label": "string", "index": "int64", "score": "float64"}


def test_probabilities_stay_as_they_are(tmp_path: Path) -> None:
    softmaxed = [node("MatMul", "x w", "l"), node("Softmax", "l", "y", axis=1)]
    weights = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    path = model(tmp_path, softmaxed, [("x", FLOAT, ["n", 2])], [("y", FLOAT, ["n", 3])], w=weights)
    found = scorer(path, task="classify")
    assert columns(found.score(TABLE))["score"] == pytest.approx([0.99983, 1, 1], abs=1e-4)
    assert found.assumed == ()
    found = scorer(logits(tmp_path), task="classify", softmax="never")
    assert columns(found.score(TABLE))["score"] == [10.0, 20.0, 30.0]


def test_labels_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("low\nhigh\nnone\n")
    assert columns(scorer(logits(tmp_path), labels="names.txt").score(TABLE))["label"] == ["high", "high", "high"]


def linear_classifier(folder: Path, *, maps: bool) -> Path:
    """As converters of scikit-learn write them: the label, and a tensor or a map with a probability for each class."""
    classifier = node(
        "LinearClassifier",
        "x",
        "label shares",
        domain="ai.onnx.ml",
        classlabels_strings=["cold", "hot"],
        coefficients=[-1.0, 0.0, 1.0, 0.0],
        intercepts=[0.0, 0.0],
        multi_class=1,
        post_transform="SOFTMAX",
    )
    if not maps:
        outputs: list[Any] = [("label", TEXT, ["n"]), ("shares", FLOAT, ["n", 2])]
        return model(folder, [classifier], [("x", FLOAT, ["n", 2])], outputs)
    zipped = node("ZipMap", "shares", "output_probability", domain="ai.onnx.ml", classlabels_strings=["cold", "hot"])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TEXT, helper.make_tensor_type_proto(FLOAT, [])))
    outputs = [("label", TEXT, ["n"]), helper.make_value_info("output_probability", kind)]
    return model(folder, [classifier, zipped], [("x", FLOAT, ["n", 2])], outputs)


@pytest.mark.parametrize("maps", [False, True])
def test_converted_classifiers_say_label_and_its_probability(tmp_path: Path, maps: bool) -> None:
    found = scorer(linear_classifier(tmp_path, maps=maps))
    assert found.columns == {"label": "string", "score": "float64"}
    result = columns(found.score(TABLE))
    assert result["label"] == ["hot", "cold", "hot"]
    assert result["score"] == pytest.approx([1 / (1 + np.exp(-2 * a)) for a in (1, 2, 3)])


def test_an_output_that_is_no_number_fails_its_row(tmp_path: Path) -> None:
    path = model(tmp_path, [node("Sqrt", "x", "root")], [("x", DOUBLE, ["n", 1])], [("root", DOUBLE, ["n", 1])])
    result = scorer(path).score(pa.table({"a": [4.0, -1.0]}))
    assert isinstance(result, TableResult)
    assert {place: str(error) for place, error in result.errors.items()} == {1: "the model's root is NaN"}
    assert result.rows["root"].to_pylist()[0] == 2.0


def test_an_output_without_a_value_for_each_row_is_refused(tmp_path: Path) -> None:
    nodes = [node("ReduceMean", "x", "mean", axes=[0])]
    found = scorer(model(tmp_path, nodes, [("x", FLOAT, ["n", 2])], [("mean", FLOAT, [1, 2])]))
    with pytest.raises(ItemError, match="output mean has no value for each of the 3 rows"):
        found.score(TABLE)


# ------------------------------------------------------------------------------------------------ options


def test_every_problem_of_the_options_is_reported(tmp_path: Path) -> None:
    path = logits(tmp_path)
    with pytest.raises(SpecError) as caught:
        inspect(path, {"tusk": "classify", "batch_size": 0, "softmax": "maybe"})
    assert len(caught.value.problems) == 3
    assert "did you mean 'task'" in str(caught.value)
    with pytest.raises(SpecError, match=r"labels: 2 names, but model\.onnx has 3 classes"):
        inspect(path, {"labels": ["low", "high"]})
    with pytest.raises(SpecError, match=r"is no detector, .*it gives y \(float32, 3 for each row\)"):
        inspect(path, {"task": "detect"})
    with pytest.raises(SpecError, match=r"model\.onnx does not classify"):
        inspect(detector(tmp_path), {"labels": ["a", "b"]})
    with pytest.raises(SpecError, match=r"through inspect\(\) of the scorer"):
        OnnxTableScorer({"file": "model.onnx"})


# -------------------------------------------------------------------------------- whole numbers, and distances


@pytest.mark.parametrize(("kind", "beyond"), [(INT, None), (TensorProto.INT8, 200.0), (TensorProto.UINT8, -1.0)])
def test_a_fraction_for_a_whole_number_is_that_rows_error(tmp_path: Path, kind: int, beyond: float | None) -> None:
    path = model(tmp_path, [node("Identity", "a", "same")], [("a", kind, ["n", 1])], [("same", kind, ["n", 1])])
    given = pa.table({"a": [1.0, 2.5, 3.0] + ([] if beyond is None else [beyond])})
    result = scorer(path).score(given)
    assert isinstance(result, TableResult)
    assert result.rows["same"].to_pylist()[::2][:2] == [1, 3]
    assert str(result.errors[1]).startswith("a is 2.5, but the model takes whole numbers (")
    assert sorted(result.errors) == ([1] if beyond is None else [1, 3])


def test_a_decimal_fraction_is_no_whole_number_either(tmp_path: Path) -> None:
    path = model(tmp_path, [node("Identity", "a", "same")], [("a", INT, ["n", 1])], [("same", INT, ["n", 1])])
    given = pa.table({"a": pa.array([Decimal("1.5"), Decimal("2.0")])})
    result = scorer(path).score(given)
    assert isinstance(result, TableResult)
    assert (list(result.errors), result.rows["same"].to_pylist()[1]) == ([0], 2)


def clusters(folder: Path) -> Path:
    """As converters of scikit-learn write k-means: the nearest centre, and the distance from each."""
    nodes = [node("ArgMin", "d", "label", axis=1, keepdims=0), node("Abs", "y", "d"), node("Identity", "d", "scores")]
    nodes = [node("MatMul", "x w", "y"), nodes[1], nodes[0], nodes[2]]
    outputs = [("label", INT, ["n"]), ("scores", FLOAT, ["n", 3])]
    weights = np.array([[1, 2, 0], [1, 0, 2]], np.float32)
    return model(folder, nodes, [("x", FLOAT, ["n", 2])], outputs, w=weights)


def test_distances_of_a_cluster_model_are_no_probabilities(tmp_path: Path) -> None:
    found = scorer(clusters(tmp_path))
    assert found.options.task == "values"
    assert columns(found.score(TABLE))["label"] == [1, 1, 1]
    with pytest.raises(ModelRefutedError, match="says the class with the lowest score: scores are distances, say"):
        scorer(clusters(tmp_path), task="classify").score(TABLE)


def test_softmax_is_settled_once_and_said(tmp_path: Path) -> None:
    found = scorer(logits(tmp_path), task="classify")
    assert [line for line in found.assumed if line.startswith("softmax is applied")]
    small = columns(found.score(pa.table({"a": [0.75], "b": [0.25]})))  # in 0..1 by chance, and adding up to 1
    assert small["score"] == pytest.approx([np.exp(0.75) / (np.exp(0.75) + np.exp(0.25) + 1)])
    shares = scorer(linear_classifier(tmp_path, maps=False))
    assert shares.assumed == ()
