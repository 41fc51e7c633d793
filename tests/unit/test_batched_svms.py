"""Batched one-class SVMs beside scikit-learn's own."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import RobustScaler, StandardScaler
from sklearn.svm import OneClassSVM

from tally.scorers.per_key import batched_svms
from tally.scorers.per_key.batched_svms import BatchedSvms, Svms, parameters

KERNELS: dict[str, dict[str, Any]] = {
    "rbf": {},
    "rbf, narrow": {"gamma": 40.0},
    "linear": {"kernel": "linear"},
    "poly 2": {"kernel": "poly", "degree": 2},
    "poly 3": {"kernel": "poly", "degree": 3, "coef0": 1.0},
    "poly 5": {"kernel": "poly", "degree": 5, "coef0": 0.5},
    "sigmoid": {"kernel": "sigmoid", "coef0": 0.1},
}
SIZES = (3, 30, 200, 900)


def fitted(rows: int, features: int, scaled: str, kernel: str, seed: int = 0) -> Any:
    """A model of readings around 20, or of standardised ones where nothing scales them."""
    values = np.random.default_rng(seed).normal(size=(rows, features))
    svm = OneClassSVM(nu=0.2, **KERNELS[kernel])
    if scaled == "bare":
        return svm.fit(values)
    scaler = StandardScaler(with_mean=scaled != "std only", with_std=scaled != "mean only")
    return make_pipeline(scaler, svm).fit(values * 1.5 + (20 if scaler.with_mean else 0))


def probes(models: list[Any], features: int, scaled: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for the models, in no order: near and far ones, and support vectors, which lie on the boundary."""
    random = np.random.default_rng(7)
    rows = [random.normal(size=(count, features)) * 2.5]
    which = [random.integers(0, len(models), count)]
    if scaled in ("scaled", "mean only"):
        rows[0] = rows[0] * 1.5 + 20
    for number, model in enumerate(models):
        svm = model[-1] if isinstance(model, Pipeline) else model
        vectors = svm.support_vectors_[:15]
        rows.append(vectors if svm is model else model[0].inverse_transform(vectors))
        which.append(np.full(len(vectors), number))
    order = random.permutation(sum(map(len, rows)))
    return np.concatenate(rows)[order], np.concatenate(which)[order]


def assert_like_sklearn(models: list[Any], rows: np.ndarray, which: np.ndarray) -> None:
    """Decision values within 1e-9 of scikit-learn's, or within what rounding does to a sum of such terms."""
    svms = Svms.of([parameters(model) for model in models])  # type: ignore[misc]
    found = BatchedSvms(svms).decision(rows, which)
    for number, model in enumerate(models):
        here = which == number
        if not here.any():
            continue
        expected = model.decision_function(rows[here])
        floor = 1e-14 * reach(svms, number, rows[here])
        assert (np.abs(found[here] - expected) <= 1e-9 * np.abs(expected) + floor).all()
        np.testing.assert_array_equal(~(found[here] > 0), model.predict(rows[here]) == -1)


def reach(svms: Svms, number: int, rows: np.ndarray) -> Any:
    """What the absolute values of a decision's terms can add up to, for each row."""
    mine = slice(svms.offsets[number], svms.offsets[number + 1])
    weight = np.abs(svms.coefs[mine]).sum()
    kernel = batched_svms.KERNELS[svms.kernel[number]]
    if kernel in ("rbf", "sigmoid"):
        return weight
    lengths = np.linalg.norm((rows - svms.mean[number]) / svms.scale[number], axis=1)
    product = lengths * np.linalg.norm(svms.vectors[mine], axis=1).max()
    if kernel == "linear":
        return weight * product
    return weight * (svms.gamma[number] * product + abs(svms.coef0[number])) ** svms.degree[number]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scaled", ["bare", "scaled"])
@pytest.mark.parametrize("features", [1, 2, 7, 50])
def test_models_of_very_different_sizes_decide_as_sklearn(features: int, scaled: str, kernel: str) -> None:
    models = [fitted(rows, features, scaled, kernel, seed=rows) for rows in SIZES]

    assert_like_sklearn(models, *probes(models, features, scaled, 400))


def test_one_support_vector_and_thousands_in_one_call() -> None:
    large = OneClassSVM(nu=0.6, gamma=0.5).fit(np.random.default_rng(0).normal(size=(3000, 3)))
    single = OneClassSVM(nu=0.01).fit(np.ones((20, 3)))
    assert len(large.support_vectors_) > 1700
    assert len(single.support_vectors_) == 1

    assert_like_sklearn([large, single], *probes([large, single], 3, "bare", 300))


@pytest.mark.parametrize("scaled", ["mean only", "std only"])
def test_a_scaler_may_leave_out_mean_or_deviation(scaled: str) -> None:
    models = [fitted(rows, 3, scaled, "rbf", seed=rows) for rows in SIZES]

    assert_like_sklearn(models, *probes(models, 3, scaled, 300))


def test_all_kernels_meet_in_one_call() -> None:
    models = [
        fitted(rows, 2, scaled, kernel) for kernel in KERNELS for scaled in ("bare", "scaled") for rows in (5, 40)
    ]

    assert_like_sklearn(models, *probes(models, 2, "bare", 2000))


@pytest.mark.parametrize(("tile", "block"), [(1, 1), (3, 64), (128, 1 << 18)])
def test_cutting_into_tiles_and_blocks_changes_nothing(tile: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_svms, "_TILE", tile)
    monkeypatch.setattr(batched_svms, "_BLOCK", block)
    models = [fitted(rows, 2, "scaled", "rbf", seed=rows) for rows in (3, 17, 60)]

    assert_like_sklearn(models, *probes(models, 2, "scaled", 333))


def test_one_support_vector_decides_exactly_at_its_place() -> None:
    model = make_pipeline(StandardScaler(), OneClassSVM(nu=0.01, gamma=0.01)).fit(np.full((50, 1), 20.25))
    assert len(model[-1].support_vectors_) == 1
    rows = np.array([[20.25], [20.26], [20.24], [1e6]])

    assert_like_sklearn([model], rows, np.zeros(4, int))
    found = BatchedSvms(Svms.of([parameters(model)])).decision(rows, np.zeros(4, int))  # type: ignore[list-item]
    np.testing.assert_array_equal(found, model.decision_function(rows))


def test_what_lies_on_the_boundary_is_computed_in_libsvms_own_order() -> None:
    for features in (1, 2, 7, 50):
        for kernel in KERNELS:
            model = fitted(200, features, "scaled", kernel)
            svms = Svms.of([parameters(model)])  # type: ignore[list-item]
            rows = np.random.default_rng(1).normal(20, 2, (40, features))
            found = [batched_svms._as_libsvm(svms, 0, row) for row in rows]

            # The compiler of libsvm may fuse a product and a sum where the machine can.
            np.testing.assert_allclose(found, model.decision_function(rows), rtol=1e-12)


def test_models_fitted_to_float32_decide_as_sklearn() -> None:
    values = np.random.default_rng(3).normal(20, 3, (200, 4)).astype(np.float32)
    models = [make_pipeline(StandardScaler(), OneClassSVM(nu=0.1)).fit(values), OneClassSVM(nu=0.1).fit(values)]

    assert_like_sklearn(models, values[:50].astype(np.float64), np.arange(50) % 2)


def test_values_far_from_zero_keep_their_digits() -> None:
    values = 1e7 + np.random.default_rng(3).normal(0, 0.01, (200, 2))
    models = [OneClassSVM(nu=0.1, gamma=gamma).fit(values) for gamma in (1e3, 1e5, "scale")]

    assert_like_sklearn(models, values[:60] + 0.001, np.arange(60) % 3)


def test_rows_out_of_this_world_are_decided_without_warnings() -> None:
    models = [fitted(100, 2, "bare", kernel) for kernel in ("rbf", "rbf, narrow", "sigmoid")]
    rows = np.array([[1e200, -1e200], [1e150, 0], [0, -1e308]]).repeat(3, axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BatchedSvms(Svms.of([parameters(model) for model in models])).decision(rows, np.arange(9) % 3)  # type: ignore[misc]

    for row, number, value in zip(rows, np.arange(9) % 3, found, strict=True):
        with np.errstate(all="ignore"):
            assert value == pytest.approx(models[number].decision_function(row[None])[0], rel=1e-12)
        assert value <= 0 or models[number].predict(row[None])[0] == 1


def test_rows_that_are_not_finite_give_nan_and_leave_their_neighbours_alone() -> None:
    models = [fitted(100, 2, "scaled", kernel) for kernel in ("rbf", "linear", "poly 3")]
    rows = np.random.default_rng(5).normal(20, 2, (90, 2))
    which = np.arange(90) % 3
    clean = BatchedSvms(Svms.of([parameters(model) for model in models])).decision(rows, which)  # type: ignore[misc]
    rows[4, 1], rows[11, 0], rows[30] = np.nan, np.inf, -np.inf

    found = BatchedSvms(Svms.of([parameters(model) for model in models])).decision(rows, which)  # type: ignore[misc]

    assert np.flatnonzero(np.isnan(found)).tolist() == [4, 11, 30]
    kept = ~np.isnan(found)
    np.testing.assert_allclose(found[kept], clean[kept], rtol=1e-12)


def test_no_rows_give_no_decisions() -> None:
    svms = BatchedSvms(Svms.of([parameters(fitted(10, 3, "bare", "rbf"))]))  # type: ignore[list-item]

    assert svms.decision(np.empty((0, 3)), np.empty(0, np.int64)).shape == (0,)


def test_a_thousand_models_are_not_a_thousand_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [parameters(fitted(rows, 1, "scaled", "rbf", seed=rows)) for rows in range(20, 60)]
    svms = BatchedSvms(Svms.of([few[number % 40] for number in range(1000)]))  # type: ignore[misc]
    calls = []
    score = BatchedSvms._score
    monkeypatch.setattr(BatchedSvms, "_score", lambda *given: calls.append(1) or score(*given))

    svms.decision(np.random.default_rng(0).normal(20, 3, (20_000, 1)), np.arange(20_000) // 20)

    assert len(calls) < 50


@pytest.mark.parametrize(
    "model",
    [
        IsolationForest(n_estimators=3),
        make_pipeline(RobustScaler(), OneClassSVM()),
        make_pipeline(StandardScaler(), PCA(1), OneClassSVM()),
        OneClassSVM(kernel="precomputed"),
        OneClassSVM(kernel=lambda a, b: a @ b.T),
    ],
    ids=["forest", "other scaler", "more steps", "precomputed", "function"],
)
def test_what_cannot_be_batched_is_said_to_be_none(model: Any) -> None:
    values = np.random.default_rng(0).normal(size=(20, 20))

    assert parameters(model.fit(values @ values.T)) is None


def test_sparse_training_cannot_be_batched() -> None:
    sparse = pytest.importorskip("scipy.sparse")

    assert parameters(OneClassSVM().fit(sparse.csr_array(np.eye(5)))) is None


def test_a_model_that_is_not_fitted_cannot_be_batched() -> None:
    assert parameters(OneClassSVM()) is None


def test_parameters_that_do_not_fit_together_are_refused() -> None:
    good = Svms.of([parameters(fitted(10, 3, "scaled", "rbf"))])  # type: ignore[list-item]
    fields = {name: getattr(good, name) for name in Svms.__dataclass_fields__}

    for name, value in {
        "offsets": np.array([0, 99]),
        "vectors": good.vectors[:-1],
        "gamma": np.array([np.nan]),
        "kernel": np.array([17]),
        "scale": np.zeros((1, 3)),
        "degree": np.array([-1]),
    }.items():
        with pytest.raises(ValueError, match=name):
            Svms(**{**fields, name: value})
