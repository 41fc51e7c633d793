"""scikit-learn models: what may be opened, what is refused and why, and that scores are scikit-learn's own."""

from __future__ import annotations

import importlib.util
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import skops.io
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import DBSCAN, KMeans
from sklearn.compose import make_column_transformer
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDOneClassSVM
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import LocalOutlierFactor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, OneClassSVM

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, SpecError, UntrustedModelError
from tally.scorers.base import TableResult
from tally.scorers.tabular.sklearn import SklearnScorer, inspect, open_estimator

RANDOM = np.random.default_rng(7)
X = RANDOM.normal(size=(120, 3))
SIDE = np.where(X[:, 0] > 0, "up", "down")
TABLE = pa.table({name: X[:, place] for place, name in enumerate("abc")})
FRAME = pd.DataFrame({"amount": X[:, 0], "kind": np.where(X[:, 1] > 0, "hot", "cold").astype(object)})
ENCODER = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")


def opened(model: Any, *, trusted: bool = False) -> Any:
    return open_estimator(skops.io.dumps(model), format="skops", trusted=trusted, name="model.skops")


def scorer(folder: Path, model: Any, **options: Any) -> SklearnScorer:
    path = folder / "model.skops"
    skops.io.dump(model, path)
    found = SklearnScorer(inspect(path, options, trusted=False))
    found.load(folder, "cpu")
    return found


def columns(result: Any) -> dict[str, list[Any]]:
    assert isinstance(result, pa.Table)
    return result.to_pydict()


# ------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    "model",
    [
        OneClassSVM(),
        SGDOneClassSVM(),
        IsolationForest(n_estimators=5),
        EllipticEnvelope(),
        LocalOutlierFactor(novelty=True, algorithm="brute"),
        make_pipeline(SimpleImputer(), StandardScaler(), OneClassSVM()),
        RandomForestClassifier(n_estimators=5),
        GradientBoostingClassifier(n_estimators=5),
        HistGradientBoostingClassifier(max_iter=5),
        CalibratedClassifierCV(LogisticRegression()),
        MLPClassifier(hidden_layer_sizes=(4,), max_iter=300, tol=0.1),
        GridSearchCV(RandomForestClassifier(), {"n_estimators": [2, 3]}, cv=2),
        GaussianProcessRegressor(RBF() + WhiteKernel(), optimizer=None),
    ],
    ids=lambda model: type(model).__name__,
)
def test_common_models_open_without_trust_and_predict_the_same(model: Any) -> None:
    model.fit(X, X[:, 0] if isinstance(model, GaussianProcessRegressor) else SIDE)
    assert np.array_equal(opened(model).predict(X), model.predict(X))


def test_types_that_nobody_vouches_for_need_trust() -> None:
    model = LocalOutlierFactor(novelty=True, algorithm="kd_tree").fit(X)
    with pytest.raises(UntrustedModelError, match=r"not known to be safe: .*KDTree\n.*--trust"):
        opened(model)
    assert np.array_equal(opened(model, trusted=True).predict(X), model.predict(X))


def test_a_function_of_ones_own_needs_trust() -> None:
    model = FunctionTransformer(os.path.basename).fit(X)
    with pytest.raises(UntrustedModelError, match=r"model.skops holds a type not known to be safe: posixpath.basename"):
        opened(model)


class _Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib"])
def test_pickles_are_not_opened_without_trust(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(_Harm(tmp_path / "harm")))
    with pytest.raises(UntrustedModelError, match="is a pickle: opening it runs whatever code it carries"):
        inspect(path, {}, trusted=False)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib"])
def test_trusted_pickles_are_scored(tmp_path: Path, suffix: str) -> None:
    model = OneClassSVM(nu=0.2).fit(X)
    path = tmp_path / f"model{suffix}"
    joblib.dump(model, path) if suffix == ".joblib" else path.write_bytes(pickle.dumps(model))
    found = SklearnScorer(inspect(path, {}, trusted=True))
    found.load(tmp_path, "cpu")
    assert columns(found.score(TABLE))["score"] == model.decision_function(X).tolist()


def test_another_version_of_scikit_learn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OneClassSVM().fit(X)
    with monkeypatch.context() as patched:
        patched.setattr("sklearn.base.__version__", "1.2.3")
        skops.io.dump(model, tmp_path / "model.skops")
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    for name in ("model.skops", "model.pkl"):
        assumed = inspect(tmp_path / name, {"features": ["a", "b", "c"]}, trusted=True)["assumed"]
        assert len(assumed) == 1
        assert "saved with scikit-learn 1.2.3, and this is" in assumed[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.skops", b"PK\x03\x04 cut short"),
        ("model.skops", b"no archive at all"),
        ("model.pkl", pickle.dumps(OneClassSVM().fit(X))[:200]),
        ("model.joblib", b"\x80\x04 nonsense"),
    ],
)
def test_damaged_files_are_said_to_be(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"{name} cannot be opened as a .*\n.*copied or downloaded completely"):
        inspect(path, {}, trusted=True)


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no such model file"):
        inspect(tmp_path / "model.skops", {}, trusted=False)
    (tmp_path / "model.pkl").write_bytes(b"cnot_installed_anywhere\nThing\n.")
    with pytest.raises(ModelLoadError, match="needs the module not_installed_anywhere"):
        inspect(tmp_path / "model.pkl", {}, trusted=True)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skops" else found(name))
    with pytest.raises(ModelLoadError, match=r"needs skops, which is not installed\n.*tally-scoring\[sklearn\]"):
        opened(OneClassSVM().fit(X))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pandas" else found(name))
    skops.io.dump(OneClassSVM().fit(pd.DataFrame(X, columns=["a", "b", "c"])), tmp_path / "model.skops")
    with pytest.raises(ModelLoadError, match="needs pandas, which is not installed"):
        inspect(tmp_path / "model.skops", {}, trusted=False)


# --------------------------------------------------------------------------------------------------- trees


def _forest() -> tuple[Any, Any]:
    model = RandomForestRegressor(n_estimators=3).fit(X, X[:, 0])
    return model, model.estimators_[1].tree_


def _boosted() -> tuple[Any, Any]:
    model = GradientBoostingClassifier(n_estimators=3).fit(X, SIDE)
    return make_pipeline(StandardScaler().fit(X), model), model.estimators_[1, 0].tree_


@pytest.mark.parametrize("made", [_forest, _boosted])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("children_left", 10**9, "a child that is not one of them"),
        ("children_right", 0, "or not below its parent"),
        ("children_left", -7, "or not below its parent"),
        ("feature", 3, "a feature that is not one of the 3"),
        ("feature", -2, "a feature that is not one of the 3"),
    ],
)
def test_trees_that_lead_outside_are_refused(made: Any, field: str, value: int, message: str) -> None:
    model, tree = made()
    getattr(tree, field)[0] = value
    with pytest.raises(ModelLoadError, match=message):
        opened(model)


def test_trees_that_expect_more_columns_than_their_owner_are_refused() -> None:
    wide = RandomForestRegressor(n_estimators=2, max_features=None).fit(X, X[:, 2])
    for tree in wide.estimators_:
        tree.n_features_in_ = 2
    with pytest.raises(ModelLoadError, match="a feature that is not one of the 2"):
        opened(wide)


@pytest.mark.parametrize(("field", "value"), [("left", 4_000_000), ("right", 0), ("feature_idx", 99)])
def test_histogram_trees_that_lead_outside_are_refused(field: str, value: int) -> None:
    model = HistGradientBoostingRegressor(max_iter=2).fit(X, X[:, 0])
    model._predictors[0][0].nodes[field][0] = value
    with pytest.raises(ModelLoadError, match="a tree"):
        opened(model)


def test_trees_that_cannot_be_checked_need_trust() -> None:
    model = HistGradientBoostingRegressor(max_iter=2, categorical_features=[0])
    model.fit(np.column_stack([RANDOM.integers(0, 3, 120), X]), X[:, 0])
    with pytest.raises(UntrustedModelError, match=r"not known to be safe: functools\.partial, "):
        opened(model)
    plain = HistGradientBoostingRegressor(max_iter=2).fit(X, X[:, 0])
    plain._predictors[0][0].nodes["is_categorical"][0] = 1
    with pytest.raises(UntrustedModelError, match=r"cannot be checked: .*categorical features\n.*--trust"):
        opened(plain)
    loose = StandardScaler().fit(X)
    loose.hidden_ = [{"deep": RandomForestRegressor(n_estimators=1).fit(X, X[:, 0]).estimators_[0].tree_}]
    with pytest.raises(UntrustedModelError, match="a tree outside any known kind of model"):
        opened(loose)


# ------------------------------------------------------------------------------------------------- options


def test_every_problem_of_the_options_is_reported(tmp_path: Path) -> None:
    skops.io.dump(OneClassSVM().fit(X), tmp_path / "model.skops")
    with pytest.raises(SpecError) as caught:
        inspect(tmp_path / "model.skops", {"metod": "predict", "batch_size": 0, "trusted": True}, trusted=False)
    assert len(caught.value.problems) == 3
    assert "did you mean 'method'" in str(caught.value)
    with pytest.raises(SpecError, match=r"2 named \(a, b\), but model\.skops takes 3"):
        inspect(tmp_path / "model.skops", {"features": "a,b"}, trusted=False)
    with pytest.raises(SpecError, match=r"OneClassSVM in model\.skops has no predict_proba; it has predict, dec"):
        inspect(tmp_path / "model.skops", {"method": "predict_proba"}, trusted=False)
    with pytest.raises(SpecError, match=r"through inspect\(\) of the scorer"):
        SklearnScorer({"file": "model.skops"})


def test_models_that_score_no_new_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.skops"
    skops.io.dump(DBSCAN().fit(X), path)
    with pytest.raises(ModelLoadError, match="a DBSCAN, which has neither predict nor transform"):
        inspect(path, {}, trusted=False)
    skops.io.dump(LocalOutlierFactor(algorithm="brute").fit(X), path)
    with pytest.raises(ModelLoadError, match="novelty=True"):
        inspect(path, {}, trusted=False)
    skops.io.dump({"model": 1}, path)
    with pytest.raises(ModelLoadError, match="holds a dict"):
        inspect(path, {}, trusted=False)


def test_features_are_the_names_that_the_model_was_fitted_with(tmp_path: Path) -> None:
    named = scorer(tmp_path, OneClassSVM().fit(pd.DataFrame(X, columns=["t1", "t2", "t3"])))
    assert named.features == ["t1", "t2", "t3"]
    assert named.options.assumed == ()
    counted = scorer(tmp_path, OneClassSVM().fit(X))
    assert counted.features == 3
    assert "the table's 3 numeric columns in their order" in counted.options.assumed[0]
    assert scorer(tmp_path, OneClassSVM().fit(X), features="a, b, c").features == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(StandardScaler(), OneClassSVM(nu=0.1)),
        IsolationForest(n_estimators=10, n_jobs=-1),
        EllipticEnvelope(),
        LocalOutlierFactor(novelty=True, algorithm="brute"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_detectors_say_anomaly_and_score(tmp_path: Path, model: Any) -> None:
    found = scorer(tmp_path, model.fit(X[:80]))
    result = columns(found.score(TABLE))
    assert result["anomaly"] == (model.predict(X) == -1).tolist()
    assert result["score"] == model.decision_function(X).tolist()
    assert any(result["anomaly"])
    assert found.columns == {"anomaly": "bool", "score": "float64"}


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(),
        RandomForestClassifier(n_estimators=5, n_jobs=-1),
        HistGradientBoostingClassifier(max_iter=5),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("target", [SIDE, X[:, 1] > 0, np.digitize(X[:, 2], [-0.5, 0.5]) * 10])
def test_classifiers_say_label_and_its_probability(tmp_path: Path, model: Any, target: Any) -> None:
    found = scorer(tmp_path, model.fit(X, target))
    result = columns(found.score(TABLE))
    assert result["label"] == [str(each) for each in model.predict(X).tolist()]
    assert result["score"] == pytest.approx(model.predict_proba(X).max(axis=1))
    assert found.columns == {"label": "string", "score": "float64"}


def test_a_classifier_without_probabilities_says_the_label_alone(tmp_path: Path) -> None:
    model = SVC().fit(X, SIDE)
    found = scorer(tmp_path, model)
    assert columns(found.score(TABLE)) == {"label": model.predict(X).tolist()}
    assert found.columns == {"label": "string"}


def test_others_say_prediction(tmp_path: Path) -> None:
    model: Any = LinearRegression().fit(X, X[:, 0])
    found = scorer(tmp_path, model)
    assert columns(found.score(TABLE)) == {"prediction": model.predict(X).tolist()}
    assert found.columns == {"prediction": "float64"}
    model = LinearRegression().fit(X, X[:, :2])
    found = scorer(tmp_path, model)
    assert columns(found.score(TABLE)) == {"prediction": model.predict(X).tolist()}
    assert found.columns == {"prediction": "list<float64>"}
    model = KMeans(2, n_init=1).fit(X)
    found = scorer(tmp_path, model)
    assert columns(found.score(TABLE)) == {"prediction": model.predict(X).tolist()}
    assert found.columns == {"prediction": "int32"}
    model = StandardScaler().fit(X)
    found = scorer(tmp_path, model)
    assert np.array_equal(list(columns(found.score(TABLE)).values()), model.transform(X).T)
    assert list(found.columns or ()) == ["x0", "x1", "x2"]


def test_the_method_can_be_chosen(tmp_path: Path) -> None:
    model: Any = LogisticRegression().fit(X, SIDE)
    found = scorer(tmp_path, model, method="predict_proba")
    assert found.columns == {"probability_down": "float64", "probability_up": "float64"}
    assert np.array_equal(list(columns(found.score(TABLE)).values()), model.predict_proba(X).T)
    model = OneClassSVM().fit(X)
    assert columns(scorer(tmp_path, model, method="predict").score(TABLE)) == {"prediction": model.predict(X).tolist()}
    assert columns(scorer(tmp_path, model, method="score_samples").score(TABLE)) == {
        "score": model.score_samples(X).tolist()
    }


def test_a_row_with_a_value_that_the_model_does_not_take_fails_alone(tmp_path: Path) -> None:
    model = OneClassSVM().fit(X)
    bad = TABLE.set_column(1, "b", pa.array([None, float("nan"), float("inf"), *X[3:, 1]]))
    result = scorer(tmp_path, model).score(bad)
    assert isinstance(result, TableResult)
    assert {place: str(error) for place, error in result.errors.items()} == {
        0: "b is null, which the model does not take",
        1: "b is NaN, which the model does not take",
        2: "b is inf, which the model does not take",
    }
    assert all(isinstance(error, ItemError) and error.stage == "score" for error in result.errors.values())
    assert result.rows.num_rows == len(X)
    assert result.rows["score"].to_pylist()[3:] == model.decision_function(X[3:]).tolist()
    everywhere: Any = scorer(tmp_path, model).score(bad.slice(0, 3))
    assert [type(each) for each in everywhere] == [ItemError] * 3


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        (make_pipeline(StandardScaler(), OneClassSVM()), False),
        (make_pipeline(StandardScaler(), SimpleImputer(), OneClassSVM()), True),
        (HistGradientBoostingClassifier(max_iter=5), True),
        (LogisticRegression(), False),
    ],
)
def test_missing_values_go_to_models_that_take_them(tmp_path: Path, model: Any, takes: bool) -> None:
    model.fit(X, SIDE)
    table = TABLE.set_column(0, "a", pa.array([None, *X[1:, 0]]))
    found = scorer(tmp_path, model)
    assert found.options.nan is takes
    assert isinstance(found.score(table), pa.Table if takes else TableResult)


def test_text_and_numbers_reach_the_model_by_name(tmp_path: Path) -> None:
    model = make_pipeline(ENCODER, RandomForestClassifier(n_estimators=5)).fit(FRAME, SIDE)
    table = pa.table({"amount": X[:, 0], "kind": pa.array(FRAME["kind"].tolist()).dictionary_encode()})
    found = scorer(tmp_path, model)
    assert columns(found.score(table))["label"] == model.predict(FRAME).tolist()
    other = scorer(tmp_path, model, features=["Betrag", "Art"])
    assert columns(other.score(table.rename_columns(["Betrag", "Art"])))["label"] == model.predict(FRAME).tolist()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3], pa.int64()),
        pa.array([1, 2, 3], pa.uint8()),
        pa.array([1.0, 2.0, 3.0], pa.float16()),
        pa.array([1, 2, 3], pa.decimal128(9, 2)),
        pa.chunked_array([[1], [2, 3]]),
    ],
    ids=lambda values: str(values.type),
)
def test_all_numbers_are_numbers(tmp_path: Path, values: Any) -> None:
    model = LinearRegression().fit(X[:, :2], X[:, 2])
    result = scorer(tmp_path, model).score(pa.table({"a": values, "b": [True, False, True]}))
    assert columns(result)["prediction"] == model.predict(np.array([[1.0, 1], [2, 0], [3, 1]])).tolist()


def test_columns_of_the_key_are_not_features(tmp_path: Path) -> None:
    model = OneClassSVM().fit(X)
    keyed = TABLE.add_column(0, "Device", pa.array(["pump"] * len(X)))
    assert columns(scorer(tmp_path, model).score(keyed))["score"] == model.decision_function(X).tolist()


class _Counts(BaseEstimator):
    """Predicts how many threads it may use."""

    def predict(self, rows: Any) -> Any:
        return np.full(len(rows), float(joblib.effective_n_jobs(-1)))


def test_models_use_one_thread(tmp_path: Path) -> None:
    found = scorer(tmp_path, LinearRegression().fit(X, X[:, 0]))
    found.use(_Counts())
    assert set(columns(found.score(TABLE))["prediction"]) == {1.0}


def test_a_score_that_is_no_number_fails_its_row(tmp_path: Path) -> None:
    model = LinearRegression().fit(X, X[:, 0])
    found = scorer(tmp_path, model)
    model.coef_ = np.array([np.nan, 0, 0])
    found.use(model)
    result = found.score(TABLE)
    assert isinstance(result, TableResult)
    assert len(result.errors) == len(X)
    assert str(result.errors[5]) == "the model's prediction is NaN"


def test_what_was_loaded_is_described(tmp_path: Path) -> None:
    found = scorer(tmp_path, make_pipeline(StandardScaler(), OneClassSVM()).fit(X))
    assert found.describe() == "model.skops: StandardScaler + OneClassSVM (detector), 3 features, batch 65536"
    assert tempfile.gettempdir() not in str(found.options.model_dump())


def test_a_model_that_was_looked_at_before_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tally.models import resolve
    from tally.scorers.tabular import sklearn

    path = tmp_path / "model.skops"
    skops.io.dump(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]), path)
    opened = []
    real = sklearn.inspect

    def inspect(*given: Any, **more: Any) -> dict[str, Any]:
        opened.append(given)
        return real(*given, **more)

    monkeypatch.setattr(sklearn, "inspect", inspect)
    first = resolve.resolve(path)
    assert resolve.resolve(path) == first
    assert len(opened) == 1
    assert resolve.resolve(path, settings={"batch_size": 7}).options["batch_size"] == 7
    skops.io.dump(LinearRegression().fit([[0.0, 1.0], [1.0, 0.0]], [0.0, 1.0]), path)
    assert resolve.resolve(path).options["count"] == 2
    assert len(opened) == 3
