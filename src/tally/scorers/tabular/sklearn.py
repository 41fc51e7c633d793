"""Scores tables with scikit-learn models: skops files, and pickles that are trusted.

:func:`inspect` looks at a model once, when a job is described, and fills in every option that was left out.
:class:`SklearnScorer` takes those options to the workers and scores.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from tally.errors import ModelLoadError, ModelNotFoundError, SpecError, UntrustedModelError
from tally.models.base import Kind as ModelKind
from tally.models.inspected import inspected_before
from tally.models.reference import ModelRef
from tally.optional import needed
from tally.scorers.base import Results, Scorer
from tally.scorers.tabular import tables
from tally.scorers.tabular.trees import TYPES, UncheckedTreeError, check_trees

if TYPE_CHECKING:
    import pyarrow as pa

Format: TypeAlias = Literal["skops", "joblib", "pickle"]

FORMATS: Mapping[str, Format] = {".skops": "skops", ".joblib": "joblib", ".pkl": "pickle", ".pickle": "pickle"}
"""File suffixes."""

_KERNELS = (
    *("ConstantKernel", "WhiteKernel", "RBF", "Matern", "RationalQuadratic", "ExpSineSquared", "DotProduct"),
    *("Sum", "Product", "Exponentiation", "CompoundKernel"),
)
HARMLESS = (
    # Trees are checked one by one; see trees.py.
    *TYPES,
    # What skops does not trust by itself, although it is plain arithmetic on attributes that Python checks.
    "numpy.dtype",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    *(f"sklearn.gaussian_process.kernels.{name}" for name in _KERNELS),
    "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
    "sklearn.multiclass._ConstantPredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn._loss.loss.HalfTweedieLoss",
    "sklearn._loss.loss.HalfTweedieLossIdentity",
    # What a search for parameters leaves behind.
    "sklearn.metrics._scorer._PassthroughScorer",
    *(f"sklearn.model_selection._split.{name}" for name in ("KFold", "StratifiedKFold", "TimeSeriesSplit")),
    # Functions that only fit() calls, and then on the caller's own data.
    "numpy.mean",
    *(f"sklearn.feature_selection._univariate_selection.{name}" for name in ("f_classif", "f_regression", "chi2")),
)
"""Types that a skops file may hold without anyone's trust, besides those that skops vouches for."""


def open_estimator(source: Path | bytes, *, format: Format, trusted: bool, name: str) -> Any:  # noqa: A002
    """The estimator in a file, or in the content of one.

    trusted: run the code that a pickle carries, or make objects of any type that a skops file names.
    name: what messages call it. Raises ModelNotFoundError, ModelLoadError, UntrustedModelError.
    """
    return _opened(source, format, trusted, name)[0]


def _opened(source: Path | bytes, kind: Format, trusted: bool, name: str) -> tuple[Any, list[str]]:
    """The estimator, and a sentence for each thing that the user should know about it."""
    if kind != "skops" and not trusted:
        raise UntrustedModelError(
            f"{name} is a pickle: opening it runs whatever code it carries",
            hint="If you know who made it, give --trust. Better: save the model with skops.io.dump(), or export it "
            "to ONNX.",
        )
    _require("skops" if kind == "skops" else "sklearn", name)
    if isinstance(source, Path) and not source.is_file():
        raise ModelNotFoundError(f"{name}: there is no such model file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if kind == "skops":
                found = _skops(source, trusted, name)
            elif kind == "joblib":
                import joblib

                found = joblib.load(source if isinstance(source, Path) else io.BytesIO(source))
            else:
                found = pickle.loads(source.read_bytes() if isinstance(source, Path) else source)  # noqa: S301
        except (ModelLoadError, UntrustedModelError):
            raise
        except ModuleNotFoundError as error:
            module = str(error.name).partition(".")[0]
            if module == "sklearn" or module.startswith("_"):  # compiled parts of scikit-learn move between versions
                import sklearn

                raise ModelLoadError(
                    f"{name} was saved with another version of scikit-learn, which had a module {error.name}; here is "
                    f"{sklearn.__version__}",
                    hint=_TOO_OLD,
                ) from None
            raise ModelLoadError(
                f"{name} needs the module {error.name}, which is not installed",
                hint=f"Install {module!r} into the environment that runs Tally.",
            ) from None
        except Exception as error:
            raise _unreadable(error, kind, name, caught) from error
    return found, _remarks(caught)


def _require(module: str, name: str) -> None:
    from importlib.util import find_spec

    with needed(f"{name} needs", "sklearn", ModelLoadError):
        for each in ("sklearn", module):
            if find_spec(each) is None:
                raise ModuleNotFoundError(name=each)


def _skops(source: Path | bytes, trusted: bool, name: str) -> Any:
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    def content() -> Any:
        return source if isinstance(source, Path) else io.BytesIO(source)

    if trusted:
        return skops.io.load(content(), trusted=skops.io.get_untrusted_types(file=content()))
    try:
        found = skops.io.load(content(), trusted=list(HARMLESS))
    except UntrustedTypesFoundException:
        types = sorted(set(skops.io.get_untrusted_types(file=content())) - set(HARMLESS))
        raise UntrustedModelError(
            f"{name} holds {'a type' if len(types) == 1 else 'types'} not known to be safe: {', '.join(types)}",
            hint="If you know who made it, give --trust.",
        ) from None
    try:
        check_trees(found)
    except UncheckedTreeError as error:
        raise UntrustedModelError(
            f"{name} holds what cannot be checked: {error}", hint="If you know who made it, give --trust."
        ) from None
    return found


_TOO_OLD = (
    "A version of scikit-learn opens what it has saved itself, and few others. Fit the model again with the version "
    "that is here; or, where the version is installed that saved it, export it to ONNX with skl2onnx."
)
"""No file helps that the old version writes anew: this one opens it no better."""


def _versions(caught: Sequence[warnings.WarningMessage]) -> str | None:
    """The scikit-learn version that a model was saved with, if it is not this one."""
    from sklearn.exceptions import InconsistentVersionWarning

    for each in caught:
        if isinstance(each.message, InconsistentVersionWarning):
            return str(each.message.original_sklearn_version)
    return None


def _remarks(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    import sklearn

    version = _versions(caught)
    if version is None:
        return []
    versions = f"scikit-learn {version}, and this is {sklearn.__version__}"
    return [f"the model was saved with {versions}: its predictions may differ"]


def _unreadable(error: Exception, kind: Format, name: str, caught: Sequence[warnings.WarningMessage]) -> ModelLoadError:
    import sklearn

    version = _versions(caught)
    reason = re.sub(r"\s+", " ", str(error)).strip()[:300]
    made = f"; it was saved with scikit-learn {version}, and this is {sklearn.__version__}" if version else ""
    return ModelLoadError(
        f"{name} cannot be opened as a {kind} file: {type(error).__name__}{': ' if reason else ''}{reason}{made}",
        hint=_TOO_OLD
        if version
        else "Was it copied or downloaded completely, and saved with a version of scikit-learn like this one "
        f"({sklearn.__version__})?",
    )


# ----------------------------------------------------------------------------------------------- inspection

Kind: TypeAlias = Literal["detector", "classifier", "regressor", "clusterer", "transformer", "model"]
Method: TypeAlias = Literal["auto", "predict", "predict_proba", "decision_function", "score_samples", "transform"]


class _Given(tables.TableOptions):
    """What a user may say; see :class:`SklearnOptions`."""

    method: Method = "auto"


class SklearnOptions(_Given):
    """Options of a scikit-learn scorer, as :func:`inspect` completes them.

    method: what is asked of the model. auto: ``anomaly, score`` of a detector, ``label, score`` of a classifier,
        ``prediction`` of others. predict: ``prediction``. predict_proba: a column for each class.
        decision_function, score_samples: ``score``, or a column for each class. transform: a column for each output.
    file, format: the model's file name inside the artifacts folder, and what it is. trusted: see
        :func:`open_estimator`.
    names: the columns that the model was fitted with. count: how many there were. nan: whether it takes NaN.
    """

    file: str
    format: Format
    kind: Kind
    trusted: bool = False
    names: list[str] | None = None
    count: int | None = None
    nan: bool = False
    columns: dict[str, str] | None = None
    assumed: tuple[str, ...] = ()


def inspect(path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
    """Open a model once, and fill in every option that was left out.

    Returns options (JSON-able) for :class:`SklearnScorer`; ``assumed`` in them has one sentence for each thing that
    the user should know. Raises SpecError with every problem, ModelNotFoundError, ModelLoadError,
    UntrustedModelError.
    """
    file_format = FORMATS.get(path.suffix.lower(), "joblib")  # pickles of any name; joblib reads plain ones too
    if problems := _Given.problems_in(options):
        raise SpecError([f"{path.name}: {each}" for each in problems])
    given = _Given.model_validate(dict(options))
    model, assumed = _opened(path, file_format, trusted, str(path))
    kind = _kind(model)
    _check_methods(model, kind, given.method, path)
    names, count = _features(model)
    if names is not None:
        _require("pandas", str(path))
    if given.features is not None:
        tables.check_count(given.features, count, path.name)
    elif names is None and count is not None:
        assumed.append(tables.assumed_features(count, "the model was"))
    elif names is None:
        assumed.append("features were not given: assumed all columns of the table (--set features=...)")
    found = SklearnOptions(
        **given.model_dump(),
        file=path.name,
        format=file_format,
        kind=kind,
        trusted=trusted,
        names=names,
        count=count,
        nan=_takes_nan(model)[0],
        assumed=tuple(assumed),
    )
    found = found.model_copy(update={"columns": _columns(model, found)})
    return found.model_dump(mode="json")


def _kind(model: Any) -> Kind:
    from sklearn import base

    try:
        if base.is_outlier_detector(model):
            return "detector"
        if base.is_classifier(model):
            return "classifier"
        if base.is_regressor(model):
            return "regressor"
        if base.is_clusterer(model):
            return "clusterer"
    except (AttributeError, TypeError):  # not made with scikit-learn's base class
        pass
    if not hasattr(model, "predict") and hasattr(model, "transform"):
        return "transformer"
    return "model"


_NEEDED: Mapping[Kind, str] = {"detector": "decision_function", "transformer": "transform"}


def _check_methods(model: Any, kind: Kind, method: Method, path: Path) -> None:
    """Raises ModelLoadError or SpecError if the model cannot do what is asked of it."""
    needed = _NEEDED.get(kind, "predict") if method == "auto" else method
    if callable(getattr(model, needed, None)):
        return
    able = [name for name in get_args(Method)[1:] if callable(getattr(model, name, None))]
    what = type(_last(model)).__name__
    if method != "auto":
        raise SpecError(f"method: {what} in {path.name} has no {method}; it has {', '.join(able) or 'none of them'}")
    if not able:
        raise ModelLoadError(
            f"{path} holds a {what}, which has neither predict nor transform",
            hint="A DBSCAN or the like only labels what it was fitted to; a LocalOutlierFactor scores new rows when "
            "it was made with novelty=True.",
        )
    raise ModelLoadError(
        f"{path} holds a {what} without {needed}",
        hint=f"Choose with --set method=... what it is asked for: {', '.join(able)}. "
        "A LocalOutlierFactor scores new rows when it was made with novelty=True.",
    )


def _last(model: Any) -> Any:
    """The estimator at the end of pipelines and searches."""
    while True:
        if hasattr(model, "best_estimator_"):
            model = model.best_estimator_
        elif getattr(model, "steps", None) and hasattr(model, "named_steps"):
            model = model.steps[-1][1]
        else:
            return model


def _features(model: Any) -> tuple[list[str] | None, int | None]:
    """Names, and number, of the columns that the model was fitted with, as far as it knows them."""
    names = getattr(model, "feature_names_in_", None)
    count = getattr(model, "n_features_in_", None)
    if names is not None:
        return [str(name) for name in names], len(names)
    return None, None if count is None else int(count)


def _takes_nan(model: Any) -> tuple[bool, bool]:
    """Whether a model takes NaN, and whether what comes out of it has none any more. If in doubt, yes: a batch that
    fails is divided until the rows that fail stand alone."""
    from sklearn.utils import get_tags

    if hasattr(model, "best_estimator_"):
        return _takes_nan(model.best_estimator_)
    if hasattr(model, "named_steps"):
        for step in (step for _, step in model.steps if step is not None and not isinstance(step, str)):
            takes, clears = _takes_nan(step)
            if not takes or clears:
                return takes, clears
        return True, False
    if hasattr(model, "transformers_"):
        inner = [step for _, step, _ in model.transformers_ if not isinstance(step, str)]
        takes = any(_takes_nan(step)[0] for step in inner)
        return takes, takes
    try:
        takes = bool(get_tags(model).input_tags.allow_nan)
    except (AttributeError, TypeError):
        return True, False
    return takes, type(model).__name__.endswith(("Imputer", "MissingIndicator"))


def _columns(model: Any, options: SklearnOptions) -> dict[str, str] | None:
    """The types of the result's columns, from a row of zeros where they cannot be told otherwise."""
    if options.method == "auto" and options.kind == "detector":
        return {"anomaly": "bool", "score": "float64"}
    if options.method == "auto" and options.kind == "classifier" and _classes(model) is not None:
        score = {"score": "float64"} if hasattr(model, "predict_proba") else {}
        return {"label": "string", **score}
    if options.count is None:
        return None
    import pyarrow as pa

    try:
        zeros = _given(np.zeros((1, options.count)), options.names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tables.type_names(pa.table(_answer(model, zeros, options.kind, options.method)))
    except Exception:
        return None  # it wants other values than zeros


# -------------------------------------------------------------------------------------------------- scoring


def scorer_of(model: Any, features: Sequence[str] | int | None) -> SklearnScorer:
    """A scorer of an estimator that is open already, for the columns ``features``."""
    names, count = _features(model)
    options = SklearnOptions(
        file="",
        format="skops",
        kind=_kind(model),
        names=names,
        count=count,
        nan=_takes_nan(model)[0],
        features=None if features is None or isinstance(features, int) else list(features),
    )
    options = options.model_copy(update={"columns": _columns(model, options)})
    scorer = SklearnScorer(options.model_dump())
    scorer.use(model)
    return scorer


@functools.cache
def _thread_pools() -> Any:
    """What limits the threads of numeric libraries: looking for these takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class SklearnKind(ModelKind):
    """scikit-learn models in skops files and pickles."""

    reads_files = False

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        # Opening a model imports all of scikit-learn, which takes seconds.
        return inspected_before(
            path,
            options,
            trusted=trusted,
            distributions=("scikit-learn", "skops"),
            inspect=lambda: inspect(path, options, trusted=trusted),
        )

    def create(self, ref: ModelRef) -> Scorer:
        return SklearnScorer(ref.options)


class SklearnScorer(Scorer):
    """Scores tables with a scikit-learn model; options as :func:`inspect` returns them.

    Uses one thread, whatever the model asks for: the workers are what runs in parallel.
    """

    input = "table"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = SklearnOptions.complete(options)
        self.batch_size = self.options.batch_size
        self.features = self.options.features or self.options.names or self.options.count
        self.columns = self.options.columns
        self._model: Any = None

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model. Raises ModelLoadError, UntrustedModelError."""
        path = artifacts / self.options.file
        if self.options.names:
            _require("pandas", str(path))
        model = open_estimator(path, format=self.options.format, trusted=self.options.trusted, name=str(path))
        self.use(model)

    def use(self, model: Any) -> None:
        """Score with an estimator that is open already."""
        self._model = model

    def score(self, table: pa.Table) -> Results:
        """Score the rows of a table; a row with a value that the model does not take is an error of its own."""
        import pyarrow as pa
        from joblib import parallel_config

        table = tables.features_of(table, self.features)
        values = tables.matrix(table) if tables.is_numeric(table) else None
        errors = tables.unusable(table, values, nan=self.options.nan)
        count = table.num_rows
        if len(errors) == count:
            return tables.results(None, errors, count)
        if errors:
            good = tables.without(errors, count)
            values, table = (None, table.filter(good)) if values is None else (values[good], table)
        if values is not None:
            given = _given(values, self.options.names)
        else:
            given = tables.frame(table.rename_columns(self.options.names) if self.options.names else table)
        with warnings.catch_warnings(), parallel_config(backend="sequential"), _thread_pools().limit(limits=1):
            warnings.simplefilter("ignore")
            answer = _answer(self._model, given, self.options.kind, self.options.method)
        return tables.results(pa.table(answer), errors, count)

    def describe(self) -> str:
        names = [type(step).__name__ for _, step in getattr(self._model, "steps", [("", self._model)])]
        features = (
            f"{self.options.count} feature{'' if self.options.count == 1 else 's'}, " if self.options.count else ""
        )
        return f"{self.options.file}: {' + '.join(names)} ({self.options.kind}), {features}batch {self.batch_size}"

    def close(self) -> None:
        self._model = None


def _given(values: tables.Array, names: Sequence[str] | None) -> Any:
    """A matrix as the model was fitted: with names or without."""
    if names is None:
        return values
    import pandas

    return pandas.DataFrame(values, columns=list(names), copy=False)


def _answer(model: Any, given: Any, kind: Kind, method: Method) -> dict[str, Any]:
    """Result columns (Arrow arrays), one value for each row of ``given``."""
    if method == "auto":
        if kind == "detector":
            # What predict() says as well, for half the work. Of SVMs, libsvm counts the border to the anomalies.
            score = np.asarray(model.decision_function(given), np.float64).reshape(-1)
            last = model.steps[-1][1] if hasattr(model, "steps") else model
            anomaly = ~(score > 0) if type(last).__name__ == "OneClassSVM" else score < 0
            return {"anomaly": tables.column(anomaly), "score": tables.column(score)}
        classes = _classes(model) if kind == "classifier" else None
        if classes is not None:
            return _labels(model, classes, given)
        method = "transform" if kind == "transformer" else "predict"
    values = getattr(model, method)(given)
    if hasattr(values, "toarray"):  # sparse
        values = values.toarray()
    values = np.asarray(values)
    if method == "predict":
        return {"prediction": tables.column(values)}
    if values.ndim == 1 or values.shape[1] == 1:
        return {"output" if method == "transform" else "score": tables.column(values)}
    if method == "transform":
        names = _output_names(model, values.shape[1])
    else:
        prefix = "probability" if method == "predict_proba" else "score"
        classes = _classes(model)
        names = [f"{prefix}_{each}" for each in (range(values.shape[1]) if classes is None else classes.tolist())]
    if len(names) != values.shape[1]:  # decisions between pairs of classes
        names = [f"score_{number}" for number in range(values.shape[1])]
    return {name: tables.column(values[:, index]) for index, name in enumerate(names)}


def _classes(model: Any) -> tables.Array | None:
    """The classes ``[n]``, in order; None of a model that says none, or predicts several things at once."""
    classes = getattr(model, "classes_", None)
    return None if classes is None or isinstance(classes, list) else np.asarray(classes)


def _labels(model: Any, classes: tables.Array, given: Any) -> dict[str, Any]:
    """The predicted class as text, and its probability if the model gives one."""
    from sklearn.ensemble._forest import ForestClassifier

    from tally.arrays import array_of, texts_of

    shares = np.asarray(model.predict_proba(given)) if hasattr(model, "predict_proba") else None
    if shares is not None and isinstance(model, ForestClassifier):
        chosen = shares.argmax(axis=1)  # as its predict(), which is twice the work
    else:
        chosen = np.searchsorted(classes, model.predict(given))
    found = {"label": texts_of([str(each) for each in classes.tolist()]).take(array_of(chosen))}
    if shares is not None:
        found["score"] = tables.column(shares[np.arange(len(chosen)), chosen].astype(np.float64))
    return found


def _output_names(model: Any, count: int) -> list[str]:
    try:
        return [str(name) for name in model.get_feature_names_out()]
    except (AttributeError, ValueError, TypeError):
        return [f"output_{number}" for number in range(count)]
