"""Thousands of one-class SVMs, scored in batches.

Every kernel is brought into one form. With rows and support vectors extended by two columns, one product of matrices
gives what the kernel's function is applied to::

    rbf      exp(-gamma |x - v|²)        exp([x, |x|², 1] · [2v, -1, -|v|²])       x and v centred, times sqrt(gamma)
    poly     (gamma x·v + coef0)^degree  power([x, |x|², 1] · [gamma v, 0, coef0])
    sigmoid  tanh(gamma x·v + coef0)     tanh (the same)
    linear   x·v                         [x, |x|², 1] · [w, 0, 0], w the sum of all vectors times their coefficients

Rows are sorted by model and cut into tiles: up to ``_TILE`` rows of one model. Tiles of about equal numbers of rows
and vectors are padded and worked on in blocks that fit into the processor's cache, so that Python is called once for
a block, not for a model.

Accuracy: libsvm takes the difference of row and vector before it squares, and adds up vector by vector. The expanded
square rounds differently: by about 1e-16 gamma (|x|² + |v|²). Centred vectors keep that small; models with vectors
too far apart for it take the difference as libsvm does. Where a decision is so near to 0 that rounding could turn its
sign, it is computed again in libsvm's own order, so that ``decision > 0`` is what scikit-learn predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

KERNELS = ("linear", "poly", "rbf", "sigmoid")

_TILE = 128
"""Rows in a tile, at most."""

_BLOCK = 1 << 18
"""Numbers in a block, about: pairs of row and vector, or rows times features. 2 MiB of float64."""

_SIZES = np.array(sorted({1, 2, 3, *(step << i for i in range(29) for step in (4, 5, 6, 7))}))
"""Numbers of rows and of vectors are rounded up to one of these: by an eighth on average."""

_NEAR = 1e-9
"""A decision is computed again if it is smaller than this share of what its terms can add up to: far above the error
of rounding, which is about 1e-15 of it, and rare."""

_SPREAD = 100.0
"""gamma |v|² up to which squares may be expanded; exponents then err by less than about 1e-13."""

_FAR = 1e100
"""Rows are as good as infinitely far from here on, and their squares are still finite."""


@dataclass(frozen=True, slots=True)
class Svm:
    """One one-class SVM on k features with s support vectors, and the scaling before it.

    vectors: float64[s, k]. coefs: float64[s]. mean, scale: float64[k]; (x - mean) / scale is what the SVM is given.
    """

    kernel: str
    gamma: float
    coef0: float
    degree: int
    intercept: float
    mean: Floats
    scale: Floats
    vectors: Floats
    coefs: Floats


@dataclass(frozen=True, slots=True)
class Svms:
    """The same of m models, t support vectors together; :class:`Svm` says what is what.

    kernel: int64[m], positions in ``KERNELS``. gamma, coef0, intercept: float64[m]. degree: int64[m].
    mean, scale: float64[m, k]. vectors: float64[t, k]. coefs: float64[t]. Model i has the vectors
    ``offsets[i]:offsets[i + 1]`` (int64[m + 1]), and at least one.
    """

    kernel: Integers
    gamma: Floats
    coef0: Floats
    degree: Integers
    intercept: Floats
    mean: Floats
    scale: Floats
    vectors: Floats
    coefs: Floats
    offsets: Integers

    def __post_init__(self) -> None:
        models, features = self.mean.shape
        counts = np.diff(self.offsets)
        given = {
            "kernel": self.kernel.shape == (models,) and np.isin(self.kernel, range(len(KERNELS))).all(),
            "degree": self.degree.shape == (models,) and (self.degree >= 0).all(),
            "scale": self.scale.shape == (models, features) and (self.scale != 0).all(),
            "vectors": self.vectors.shape == (len(self.coefs), features),
            "offsets": self.offsets.shape == (models + 1,)
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.coefs)
            and (counts > 0).all(),
        }
        for name in ("gamma", "coef0", "intercept"):
            given[name] = getattr(self, name).shape == (models,)
        for name in ("gamma", "coef0", "intercept", "mean", "scale", "vectors", "coefs"):
            given[name] = bool(given.get(name, True)) and bool(np.isfinite(getattr(self, name)).all())
        if wrong := [name for name, right in given.items() if not right]:
            raise ValueError(f"parameters of one-class SVMs do not fit together: {', '.join(sorted(wrong))}")

    @classmethod
    def of(cls, models: Sequence[Svm]) -> Svms:
        """Put models (at least one, all of the same number of features) one after another."""
        return cls(
            kernel=np.array([KERNELS.index(each.kernel) for each in models]),
            gamma=np.array([each.gamma for each in models], np.float64),
            coef0=np.array([each.coef0 for each in models], np.float64),
            degree=np.array([each.degree for each in models]),
            intercept=np.array([each.intercept for each in models], np.float64),
            mean=np.stack([each.mean for each in models]),
            scale=np.stack([each.scale for each in models]),
            vectors=np.concatenate([each.vectors for each in models]),
            coefs=np.concatenate([each.coefs for each in models]),
            offsets=np.cumsum([0, *(len(each.coefs) for each in models)]),
        )


def parameters(estimator: Any) -> Svm | None:
    """The parameters of a fitted OneClassSVM, or of a pipeline of a StandardScaler and one; None for anything else."""
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import OneClassSVM

    steps = [step for _, step in estimator.steps] if type(estimator) is Pipeline else [estimator]
    steps = [step for step in steps if step is not None and step != "passthrough"]
    kinds = [type(step) for step in steps]
    if kinds not in ([OneClassSVM], [StandardScaler, OneClassSVM]):
        return None
    svm = steps[-1]
    if svm.kernel not in KERNELS or getattr(svm, "_sparse", True) or not len(svm.support_vectors_):
        return None
    vectors = np.asarray(svm.support_vectors_, np.float64)
    mean, scale = np.zeros(vectors.shape[1]), np.ones(vectors.shape[1])
    if len(steps) == 2:
        # What sklearn.preprocessing.StandardScaler.transform goes by.
        mean = np.asarray(steps[0].mean_, np.float64) if steps[0].with_mean else mean
        scale = np.asarray(steps[0].scale_, np.float64) if steps[0].with_std else scale
    return Svm(
        kernel=svm.kernel,
        gamma=float(svm._gamma),
        coef0=float(svm.coef0),
        degree=int(svm.degree),
        intercept=float(svm.intercept_[0]),
        mean=mean,
        scale=scale,
        vectors=vectors,
        coefs=np.asarray(svm.dual_coef_, np.float64).reshape(-1),
    )


class BatchedSvms:
    """Many one-class SVMs, ready to score. Not changed by scoring, so threads may share one."""

    def __init__(self, models: Svms) -> None:
        self.models = models
        features = models.vectors.shape[1]
        first, counts = models.offsets[:-1], np.diff(models.offsets)
        owner = np.repeat(np.arange(len(counts)), counts)
        linear, poly, rbf = (models.kernel == KERNELS.index(name) for name in ("linear", "poly", "rbf"))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            middle = np.add.reduceat(models.vectors, first) / counts[:, None]
            apart = models.vectors - middle[owner]
            squares = np.einsum("ij,ij->i", apart, apart)
            spread = np.maximum.reduceat(squares, first) * np.abs(models.gamma)
            expanded = rbf & (models.gamma >= 0) & (spread <= _SPREAD)
            # Of each model: rows are moved by this and then multiplied by that.
            self._centre = np.where(expanded[:, None], middle, 0.0)
            self._factor = np.sqrt(np.where(expanded, models.gamma, 1.0))
            # The vectors, extended.
            self._vectors = np.zeros((len(owner), features + 2))
            near, other = expanded[owner], ~rbf[owner]
            scaled = apart[near] * self._factor[owner[near], None]
            self._vectors[near, :features] = 2 * scaled
            self._vectors[near, features] = -1
            self._vectors[near, features + 1] = -np.einsum("ij,ij->i", scaled, scaled)
            self._vectors[other, :features] = models.vectors[other] * models.gamma[owner[other], None]
            self._vectors[other, features + 1] = models.coef0[owner[other]]
            self._coefs = models.coefs
            self._first, self._count = first, counts
            self._merge(linear)
            # What the terms of a decision can add up to: weight (reach |x| + base) ^ degree.
            self._weight = np.add.reduceat(np.abs(models.coefs), first)
            longest = np.sqrt(np.maximum.reduceat(np.einsum("ij,ij->i", models.vectors, models.vectors), first))
            self._reach = np.where(linear, longest, np.where(poly, np.abs(models.gamma) * longest, 0.0))
            self._base = np.where(poly, np.abs(models.coef0), np.where(linear, 0.0, 1.0))
        degree = np.where(poly, models.degree, 1)
        forms, self._form = np.unique((degree * 2 + expanded) * len(KERNELS) + models.kernel, return_inverse=True)
        kinds = ((*divmod(each // len(KERNELS), 2), KERNELS[each % len(KERNELS)]) for each in forms.tolist())
        self._forms = [(kernel, power, expands == 1) for power, expands, kernel in kinds]
        self._size = np.searchsorted(_SIZES, self._count)

    def _merge(self, linear: NDArray[np.bool_]) -> None:
        """Let each linear model have one vector: the sum of its vectors times their coefficients."""
        if not linear.any():
            return
        features, models = self.models.vectors.shape[1], self.models
        merged = np.add.reduceat(models.vectors * models.coefs[:, None], models.offsets[:-1])[linear]
        end = len(self._vectors)
        self._vectors = np.concatenate([self._vectors, np.zeros((len(merged), features + 2))])
        self._vectors[end:, :features] = merged
        self._coefs = np.concatenate([self._coefs, np.ones(len(merged))])
        self._first = np.where(linear, end + np.cumsum(linear) - 1, self._first)
        self._count = np.where(linear, 1, self._count)

    def __len__(self) -> int:
        return len(self.models.gamma)

    def decision(self, rows: Floats, model: Integers) -> Floats:
        """The decision function of each row under its model: float64[n]; an anomaly is where it is not above 0.

        rows: float64[n, k], unscaled. model: int64[n], which model each row belongs to, in any order; scoring is
        fastest where rows of one model are together. Rows with NaN or infinity, also after scaling, give NaN.
        """
        found = np.empty(len(rows))
        if not len(rows):
            return found
        close: list[Integers] = []
        order = None if (model[1:] >= model[:-1]).all() else np.argsort(model, kind="stable")
        tiles = _Tiles.of(model if order is None else model[order])
        bucket = (self._form[tiles.model] * len(_SIZES) + self._size[tiles.model]) * len(_SIZES) + tiles.size
        for which in _runs(bucket):
            form = self._forms[self._form[tiles.model[which[0]]]]
            height, width = int(_SIZES[tiles.size[which[0]]]), int(_SIZES[self._size[tiles.model[which[0]]]])
            step = max(1, _BLOCK // (height * max(width, rows.shape[1])))
            for start in range(0, len(which), step):
                block = which[start : start + step]
                last = tiles.count[block, None] - 1
                places = tiles.start[block, None] + np.minimum(np.arange(height), last)
                places = places if order is None else order[places]
                decisions, near = self._score(form, rows[places], tiles.model[block], width)
                found[places] = decisions
                if near.any():
                    close.append(places[near])
        if close:
            self._again(rows, model, np.unique(np.concatenate(close)), found)
        return found

    def _score(
        self, form: tuple[str, int, bool], rows: Floats, model: Integers, width: int
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Decisions float64[b, h] of rows float64[b, h, k] of the models int64[b], and which of them need care."""
        kernel, degree, expanded = form
        models = self.models
        last = self._count[model, None] - 1
        places = np.arange(width)
        which = self._first[model, None] + np.minimum(places, last)
        coefs = np.where(places <= last, self._coefs[which], 0.0)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rows = (rows - models.mean[model, None]) / models.scale[model, None]
            finite = np.isfinite(rows).all(axis=2)
            if kernel == "rbf" and not expanded:
                values = _squares(rows, models.vectors, which) * -models.gamma[model, None, None]
                np.exp(values, out=values)
                reach: Any = 0.0
            else:
                values, norm = self._product(rows, model, which)
                reach = norm * self._reach[model, None]
                if kernel == "rbf":
                    np.exp(values, out=values)
                elif kernel == "sigmoid":
                    np.tanh(values, out=values)
                elif kernel == "poly":
                    values = _power(values, degree)
            found = np.matmul(values, coefs[:, :, None])[:, :, 0]
            found += models.intercept[model, None]
            terms = self._weight[model, None] * (reach + self._base[model, None]) ** degree
            near = np.abs(found) <= _NEAR * (terms + np.abs(models.intercept[model, None]))
        found[~finite] = np.nan
        return found, near & finite

    def _product(self, rows: Floats, model: Integers, which: Integers) -> tuple[Floats, Floats]:
        """The extended rows times the extended vectors, float64[b, h, w], and the lengths of the rows."""
        features = rows.shape[2]
        extended = np.empty((*rows.shape[:2], features + 2))
        moved = extended[:, :, :features]
        np.subtract(rows, self._centre[model, None], out=moved)
        moved *= self._factor[model, None, None]
        np.clip(moved, -_FAR, _FAR, out=moved)
        norm = np.einsum("bhk,bhk->bh", moved, moved)
        extended[:, :, features] = norm
        extended[:, :, features + 1] = 1
        return np.matmul(extended, self._vectors[which].transpose(0, 2, 1)), np.sqrt(norm)

    def _again(self, rows: Floats, model: Integers, near: Integers, found: Floats) -> None:
        """Compute the decisions of the rows ``near`` once more, each different row once, as libsvm does."""
        known: dict[tuple[int, bytes], float] = {}
        for place in near.tolist():
            key = (int(model[place]), rows[place].tobytes())
            if key not in known:
                known[key] = _as_libsvm(self.models, key[0], rows[place])
            found[place] = known[key]


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Rows sorted by model, cut: ``count`` rows from ``start`` on, all of ``model``, padded to ``_SIZES[size]``;
    int64[t]."""

    model: Integers
    start: Integers
    count: Integers
    size: Integers

    @classmethod
    def of(cls, model: Integers) -> _Tiles:
        starts = np.flatnonzero(np.concatenate([[True], model[1:] != model[:-1]]))
        counts = np.diff(starts, append=len(model))
        tiles = -(-counts // _TILE)
        run = np.repeat(np.arange(len(starts)), tiles)
        behind = (np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * _TILE
        count = np.minimum(counts[run] - behind, _TILE)
        return cls(model[starts[run]], starts[run] + behind, count, np.searchsorted(_SIZES, count))


def _runs(values: Integers) -> list[Integers]:
    """The positions of equal values, a set for each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)


def _squares(rows: Floats, vectors: Floats, which: Integers) -> Floats:
    """|row - vector|² of all pairs, float64[b, h, w], one feature after another."""

    def square(feature: int) -> Floats:
        apart: Floats = rows[:, :, feature, None] - vectors[which, feature][:, None, :]
        apart *= apart
        return apart

    total = square(0)
    for feature in range(1, rows.shape[2]):
        total += square(feature)
    return total


def _power(values: Floats, degree: int) -> Floats:
    """values ** degree by repeated squaring, which is faster than numpy's power and what libsvm does."""
    found = np.ones_like(values)
    while degree:
        if degree % 2:
            found *= values
        degree //= 2
        if degree:
            values = values * values
    return found


def _as_libsvm(models: Svms, number: int, row: Floats) -> float:
    """One decision in libsvm's order of operations (svm_predict_values and Kernel::k_function of
    https://github.com/scikit-learn/scikit-learn/blob/main/sklearn/svm/src/libsvm/svm.cpp)."""
    row = (row - models.mean[number]) / models.scale[number]
    span = slice(models.offsets[number], models.offsets[number + 1])
    gamma, coef0, degree = float(models.gamma[number]), float(models.coef0[number]), int(models.degree[number])
    kernel = KERNELS[models.kernel[number]]

    vectors = models.vectors[span]
    if kernel == "rbf":
        apart = row - vectors
        values = [math.exp(-gamma * square) for square in _dots(apart, apart)]
    else:
        values = _dots(np.broadcast_to(row, vectors.shape), vectors)
        if kernel == "sigmoid":
            values = [math.tanh(gamma * value + coef0) for value in values]
        elif kernel == "poly":
            values = _power(gamma * np.array(values) + coef0, degree).tolist()
    total = 0.0
    for coef, value in zip(models.coefs[span].tolist(), values, strict=True):
        total += coef * value
    return total + float(models.intercept[number])


def _dots(left: Floats, right: Floats) -> list[float]:
    """The dot product of each pair of rows, each by BLAS's ddot as in libsvm: its order of adding up is its own."""
    if left.shape[1] == 1:
        products: list[float] = (left * right)[:, 0].tolist()
        return products
    return [float(a @ b) for a, b in zip(left, right, strict=True)]
