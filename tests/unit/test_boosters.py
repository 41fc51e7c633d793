"""Boosted trees in their libraries' own files: the same answers as of the library itself, missing values included."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tally.errors import ItemError, ModelLoadError, SpecError, UntrustedModelError
from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.run import run

pd: Any = pytest.importorskip("pandas")
NAMES = ["heat", "load", "age"]


def rows(count: int = 120, seed: int = 0) -> Any:
    """A DataFrame of three columns in which some values are missing."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, 3))
    values[random.random(values.shape) < 0.1] = np.nan
    return pd.DataFrame(values, columns=NAMES)


def classes(frame: Any, count: int) -> np.ndarray[Any, Any]:
    edges = np.linspace(-1, 1, count + 1)[1:-1]
    return np.digitize(np.nan_to_num(frame["heat"].to_numpy()) + np.nan_to_num(frame["load"].to_numpy()), edges)


def scored(path: Path, frame: Any, **options: Any) -> list[Any]:
    ref = resolve(path, settings=options)
    scorer = load(ref, "cpu")
    return run(scorer, pa.Table.from_pandas(frame, preserve_index=False))


def fitted(library: str, folder: Path, frame: Any, target: Any, *, kind: str = "Classifier") -> tuple[Path, Any]:
    """A model file of the library, and the model itself."""
    if library == "xgboost":
        xgboost = pytest.importorskip("xgboost")
        model = getattr(xgboost, f"XGB{kind}")(n_estimators=6, max_depth=3, n_jobs=1, enable_categorical=True)
        model.fit(frame, target)
        model.save_model(folder / "model.json")
        return folder / "model.json", model
    if library == "lightgbm":
        lightgbm = pytest.importorskip("lightgbm")
        model = getattr(lightgbm, f"LGBM{kind}")(
            n_estimators=6, num_leaves=5, min_child_samples=5, n_jobs=1, verbose=-1
        )
        model.fit(frame, target)
        model.booster_.save_model(folder / "model.txt")
        return folder / "model.txt", model
    catboost = pytest.importorskip("catboost")
    texts = [name for name in frame.columns if str(frame[name].dtype) == "category"]
    model = getattr(catboost, f"CatBoost{kind}")(
        iterations=6, depth=3, thread_count=1, verbose=0, allow_writing_files=False, cat_features=texts or None
    )
    model.fit(frame, target)
    model.save_model(str(folder / "model.cbm"))
    return folder / "model.cbm", model


LIBRARIES = ["xgboost", "lightgbm", "catboost"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [2, 3])
def test_classes_and_their_probabilities(library: str, count: int, tmp_path: Path) -> None:
    frame = rows()
    path, model = fitted(library, tmp_path, frame, classes(frame, count))
    shuffled = frame[["age", "heat", "load"]]  # columns go by their names
    found = scored(path, shuffled)
    shares = model.predict_proba(frame)
    assert [row["label"] for row in found] == [str(each) for each in shares.argmax(axis=1)]
    np.testing.assert_allclose([row["score"] for row in found], shares.max(axis=1), atol=1e-6)
    whole = scored(path, frame, method="predict_proba", labels=[f"c{at}" for at in range(count)])
    np.testing.assert_allclose([[row[f"probability_c{at}"] for at in range(count)] for row in whole], shares, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_numbers_infinity_and_columns_that_are_not_there(library: str, tmp_path: Path) -> None:
    frame = rows()
    path, model = fitted(library, tmp_path, frame, np.nan_to_num(frame["heat"]) * 3, kind="Regressor")
    found = scored(path, frame)
    np.testing.assert_allclose([row["prediction"] for row in found], model.predict(frame), atol=1e-6)
    frame.loc[4, "age"] = np.inf
    frame.loc[5, "age"] = 1e300
    found = scored(path, frame)
    dead = [at for at, row in enumerate(found) if isinstance(row, ItemError)]
    assert dead == ([4] if library == "lightgbm" else [4, 5])  # the others keep numbers in 32 bits
    with pytest.raises(SpecError, match="age"):
        scored(path, frame.rename(columns={"age": "years"}))
    with pytest.raises(SpecError, match=r"labels: model\.\w+ does not tell classes apart"):
        resolve(path, settings={"labels": ["a", "b"]})


@pytest.mark.parametrize("library", LIBRARIES)
def test_categories_by_name(library: str, tmp_path: Path) -> None:
    frame = rows()
    kinds = np.array(["pump", "fan", "belt"])[np.random.default_rng(2).integers(0, 3, len(frame))]
    frame["kind"] = pd.Categorical(kinds)
    path, model = fitted(library, tmp_path, frame, ((kinds == "fan") ^ (classes(frame, 2) == 1)).astype(int))
    texts = frame.assign(kind=kinds)
    found = scored(path, texts)
    np.testing.assert_allclose([row["score"] for row in found], model.predict_proba(frame).max(axis=1), atol=1e-6)
    texts.loc[3, "kind"] = None
    missing = scored(path, texts)[3]
    assert isinstance(missing, ItemError) == (library == "catboost")  # CatBoost knows no missing category


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_without_names_take_columns_in_their_order(library: str, tmp_path: Path) -> None:
    frame = rows()
    values = frame.to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, model = fitted(
            library, tmp_path, pd.DataFrame(values) if library == "catboost" else values, classes(frame, 2)
        )
    ref = resolve(path)
    assert "assumed the table's 3 numeric columns in their order" in ref.assumed[0]
    if library == "xgboost":
        np.testing.assert_allclose(
            [row["score"] for row in scored(path, frame)], model.predict_proba(values).max(axis=1), atol=1e-6
        )


def test_trees_after_the_best_are_not_used(tmp_path: Path) -> None:
    xgboost: Any = pytest.importorskip("xgboost")
    frame, other = rows(), rows(60, 1)
    model = xgboost.XGBClassifier(n_estimators=200, early_stopping_rounds=2, learning_rate=0.9, n_jobs=1)
    model.fit(frame, classes(frame, 2), eval_set=[(other, 1 - classes(other, 2))], verbose=False)
    assert model.best_iteration < 5
    model.save_model(tmp_path / "model.ubj")
    found = scored(tmp_path / "model.ubj", frame)
    np.testing.assert_allclose([row["score"] for row in found], model.predict_proba(frame).max(axis=1), atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_damaged_files_name_who_wrote_them(library: str, tmp_path: Path) -> None:
    frame = rows()
    path, _ = fitted(library, tmp_path, frame, classes(frame, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match=r"cannot be opened by \w+ \d+\.\d+") as caught:
        resolve(path)
    assert len(caught.value.message) < 700
    if library == "xgboost":
        described = json.loads(whole)
        described["learner"]["gradient_booster"]["model"]["trees"] = {}
        path.write_text(json.dumps({**described, "version": [9, 8, 7]}))
        with pytest.raises(ModelLoadError, match=r"It was written by XGBoost 9\.8\.7") as caught:
            resolve(path)
        assert "xgboost==9.8.7" in str(caught.value.hint)


def test_a_pickle_of_any_name_is_opened_for_who_trusts_it(tmp_path: Path) -> None:
    joblib: Any = pytest.importorskip("joblib")
    from sklearn.linear_model import LogisticRegression

    frame = rows().fillna(0.0)
    model = LogisticRegression().fit(frame, classes(frame, 2))
    path = tmp_path / "model_1_1"
    joblib.dump(model, path)
    with pytest.raises(UntrustedModelError, match="is a pickle"):
        resolve(path)
    ref = resolve(path, trust=True)
    assert ref.kind == "sklearn"
    found = run(load(ref, "cpu"), pa.Table.from_pandas(frame, preserve_index=False))
    np.testing.assert_allclose([row["score"] for row in found], model.predict_proba(frame).max(axis=1), atol=1e-9)
