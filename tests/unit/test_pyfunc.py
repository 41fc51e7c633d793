"""MLflow models: opened with trust alone, given the columns and types of their signature."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, SpecError, TallyError, UntrustedModelError
from tally.scorers.base import TableResult
from tally.scorers.tabular.pyfunc import PyfuncScorer, inspect

FRAME = pd.DataFrame({"a": [1.5, -2.5, 3.5], "b": [0.0, 1.0, 2.0], "n": [1, 2, 3]})
TABLE = pa.table({"a": [1.5, -2.5, 3.5], "b": [0.0, 1.0, 2.0], "n": [1, 2, 3]})


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        return pytest.importorskip("mlflow.pyfunc", reason="mlflow is not installed (pip install mlflow-skinny)")


def save(mlflow: Any, folder: Path, answer: str, example: Any = FRAME) -> Path:
    """A model whose predict() returns the expression ``answer`` over ``rows``; its signature is the example's."""
    from mlflow.models import infer_signature

    code = folder / "code.py"
    code.write_text(
        "import mlflow, numpy as np, pandas as pd\n"
        "class Model(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        rows = model_input\n"
        f"        return {answer}\n"
        "mlflow.models.set_model(Model())\n"
    )
    path = folder / "model"
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        signature = None if example is None else infer_signature(example)
        mlflow.save_model(path, python_model=str(code), signature=signature, pip_requirements=[])
    return path


def scorer(path: Path, **options: Any) -> PyfuncScorer:
    found = PyfuncScorer(inspect(path, options, trusted=True))
    found.load(path, "cpu")
    return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "pd.DataFrame({'sum': rows['a'] + rows['n'], 'big': rows['a'] > 0})",
            {"sum": [2.5, -0.5, 6.5], "big": [1, 0, 1]},
        ),
        ("rows['a']", {"a": [1.5, -2.5, 3.5]}),
        ("rows['a'].to_numpy()", {"prediction": [1.5, -2.5, 3.5]}),
        ("rows[['a', 'b']].to_numpy()", {"prediction": [[1.5, 0.0], [-2.5, 1.0], [3.5, 2.0]]}),
        ("rows['a'].tolist()", {"prediction": [1.5, -2.5, 3.5]}),
        ("[{'label': 'x'}] * len(rows)", {"label": ["x"] * 3}),
        ("{'twice': (rows['a'] * 2).to_numpy()}", {"twice": [3.0, -5.0, 7.0]}),
    ],
)
def test_answers_become_columns(mlflow: Any, tmp_path: Path, answer: str, expected: dict[str, Any]) -> None:
    found = scorer(save(mlflow, tmp_path, answer))
    assert found.features == ["a", "b", "n"]
    assert found.describe() == "model (MLflow), batch 65536"
    result = found.score(TABLE)
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == expected


def test_columns_get_the_types_of_the_signature(mlflow: Any, tmp_path: Path) -> None:
    found = scorer(save(mlflow, tmp_path, "rows.dtypes.astype(str).tolist()"))
    table = pa.table({"a": [1, 2, 3], "b": pa.array([0, 1, 2], pa.float32()), "n": [1.0, 2.0, 3.0]})
    result = found.score(table)
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == {"prediction": ["float64", "float64", "int64"]}


def test_a_row_that_does_not_fit_the_signature_fails_alone(mlflow: Any, tmp_path: Path) -> None:
    found = scorer(save(mlflow, tmp_path, "rows['n'] * 1.0"))
    result = found.score(pa.table({"a": [None, 1.0, 1.0], "b": [0.0, 1.0, 2.0], "n": [1.0, 2.5, None]}))
    assert isinstance(result, TableResult)
    assert {place: str(error) for place, error in result.errors.items()} == {
        1: "n is 2.5, but the model's signature says long",
        2: "n is null, but the model's signature says long",
    }
    assert all(isinstance(error, ItemError) for error in result.errors.values())
    assert result.rows["n"].to_pylist()[0] == 1.0


def test_a_signature_may_be_an_array(mlflow: Any, tmp_path: Path) -> None:
    found = scorer(save(mlflow, tmp_path, "rows.sum(axis=1)", np.zeros((2, 3), np.float32)))
    assert found.features == 3
    assert "3 numeric columns in their order" in found.options.assumed[0]
    result = found.score(TABLE)
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == {"prediction": [2.5, 0.5, 8.5]}


def test_without_a_signature_the_user_names_the_columns(mlflow: Any, tmp_path: Path) -> None:
    path = save(mlflow, tmp_path, "rows.sum(axis=1).to_numpy()", None)
    assert scorer(path).features is None
    found = scorer(path, features=["a", "b"])
    assert found.features == ["a", "b"]
    result = found.score(TABLE.select(["a", "b"]))
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == {"prediction": [1.5, -1.5, 5.5]}


@pytest.mark.parametrize(
    ("answer", "shown"), [("rows['a'][:2]", "Series of length 2"), ("None", "NoneType for 3 rows")]
)
def test_an_answer_of_another_length_is_refused(mlflow: Any, tmp_path: Path, answer: str, shown: str) -> None:
    with pytest.raises(TallyError, match=f"answered with {shown}"):
        scorer(save(mlflow, tmp_path, answer)).score(TABLE)


def test_a_model_that_cannot_be_opened_says_why(mlflow: Any, tmp_path: Path) -> None:
    path = save(mlflow, tmp_path, "rows")
    code = next(path.glob("*.py"))
    code.write_text("import not_installed_anywhere\n")
    with pytest.raises(ModelLoadError, match="not_installed_anywhere"):
        inspect(path, {}, trusted=True)
    code.unlink()
    with pytest.raises(ModelLoadError, match="cannot be opened by MLflow"):
        inspect(path, {}, trusted=True)


def described(folder: Path, text: str) -> Path:
    (folder / "MLmodel").write_text(text)
    return folder


def test_nothing_is_printed(mlflow: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = scorer(save(mlflow, tmp_path, "rows['a']"))
    capfd.readouterr()
    found.score(TABLE)
    found.load(tmp_path / "model", "cpu")
    assert capfd.readouterr() == ("", "")


def test_models_need_trust(tmp_path: Path) -> None:
    with pytest.raises(UntrustedModelError, match=r"runs whatever code it carries\n.*--trust"):
        inspect(described(tmp_path, "flavors: {python_function: {}}"), {}, trusted=False)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no MLmodel"):
        inspect(tmp_path, {}, trusted=True)
    with pytest.raises(ModelLoadError, match=r"no flavor python_function, .*it has: spark, onnx"):
        inspect(described(tmp_path, "flavors: {spark: {}, onnx: {}}"), {}, trusted=True)
    with pytest.raises(ModelLoadError, match="MLmodel is damaged"):
        inspect(described(tmp_path, "flavors: {"), {}, trusted=True)
    with pytest.raises(SpecError, match="there is no such field; did you mean 'features'"):
        inspect(described(tmp_path, ""), {"featurs": ["a"]}, trusted=True)


def test_mlflow_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.pyfunc", None)
    with pytest.raises(ModelLoadError, match=r"needs mlflow, which is not installed\n.*tally-scoring\[mlflow\]"):
        inspect(described(tmp_path, "flavors: {python_function: {}}"), {}, trusted=True)


def test_a_fraction_in_an_array_of_integers_is_that_rows_error(mlflow: Any, tmp_path: Path) -> None:
    path = save(mlflow, tmp_path, "np.asarray(rows)[:, 0] + np.asarray(rows)[:, 1]", np.array([[1, 2]], np.int64))
    found = scorer(path)
    assert found.options.tensor == "int64"
    result = found.score(pa.table({"a": [1.0, 2.5, None, 4.0], "b": [10, 20, 30, 40]}))
    assert isinstance(result, TableResult)
    assert {row: str(error) for row, error in result.errors.items()} == {
        1: "a is 2.5, but the model takes whole numbers (int64)",
        2: "a is null, which the model does not take",
    }
    assert [result.rows["prediction"].to_pylist()[at] for at in (0, 3)] == [11, 44]
