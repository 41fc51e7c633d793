"""Scores tables with boosted trees, in the files that their own libraries write.

A library's file has a :class:`Booster`, which opens a model and predicts; the rest is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from tally.errors import ItemError, ModelLoadError, SpecError, TallyError, error_line
from tally.models import kinds
from tally.models.base import Kind
from tally.models.inspected import inspected_before
from tally.models.labels import read_labels
from tally.models.reference import ModelRef
from tally.optional import needed
from tally.scorers.base import Results, Scorer
from tally.scorers.tabular import tables
from tally.scorers.tabular.tables import Array

if TYPE_CHECKING:
    import pyarrow as pa

Method = Literal["auto", "predict", "predict_proba"]


class Booster(ABC):
    """An open model.

    names: of the columns that it was trained with, or None where they had none. count: how many there were.
    texts: which of them hold categories, which may be texts. missing_texts: whether these may be missing.
    classes: their names, where it tells classes apart. dtype: NumPy's name of the type in which it keeps numbers.
    """

    names: Sequence[str] | None
    count: int
    texts: Sequence[int] = ()
    missing_texts: bool = True
    classes: Sequence[str] | None = None
    dtype: str = "float64"

    @abstractmethod
    def predict(self, given: Any) -> Array:
        """``[rows]`` or ``[rows, outputs]``; of classes, ``[rows, classes]`` probabilities.

        given: ``float64[rows, columns]``, NaN where a value is missing; where ``texts`` is not empty, a
        ``pandas.DataFrame``, in which such a column holds texts, or None.
        """


class _Given(tables.TableOptions):
    """What a user may say; see :class:`BoosterOptions`."""

    method: Method = "auto"
    labels: str | list[str] | None = None


class BoosterOptions(_Given):
    """Options of a scorer of boosted trees, as :func:`inspect` completes them.

    method: auto: ``label, score`` of a classifier, ``prediction`` of others. predict: ``prediction``, a class's name
        too. predict_proba: a column for each class.
    labels: names of the classes, or a file of them. names, count, texts, classes: see :class:`Booster`.
    """

    file: str
    names: list[str] | None = None
    count: int
    texts: tuple[int, ...] = ()
    classes: list[str] | None = None
    assumed: tuple[str, ...] = ()


class BoosterKind(Kind):
    """Models of one library.

    library: its module. distributions: what pip may call it. title: as it calls itself.
    """

    reads_files = False
    library: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

    def open(self, path: Path) -> Booster:
        """Open a model. What the library raises says what is wrong with the file."""
        raise NotImplementedError

    def opened(self, path: Path) -> Booster:
        """Open a model. Raises ModelLoadError."""
        with needed(f"{path} needs", kinds.extra_of(self.name), ModelLoadError):
            library = import_module(self.library)
        try:
            return self.open(path)
        except TallyError:
            raise
        except Exception as error:
            here, wrote = library.__version__, self.wrote(path)
            other = wrote if wrote != here else None
            by = f" It was written by {self.title} {wrote}." if wrote else ""
            raise ModelLoadError(
                f"{path} cannot be opened by {self.title} {here}: {error_line(error)[:300]}.{by}",
                hint=f"Install {self.library}=={other}, or save the model again with this version."
                if other
                else "Was it copied or downloaded completely?",
            ) from None

    def wrote(self, path: Path) -> str | None:
        """The version of the library that wrote a file, as far as that is told without opening it."""
        return None

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        if problems := _Given.problems_in(options):
            raise SpecError([f"{path.name}: {each}" for each in problems])
        return inspected_before(
            path,
            options,
            trusted=trusted,
            distributions=self.distributions,
            inspect=lambda: _inspected(self, path, _Given.model_validate(dict(options))),
        )

    def create(self, ref: ModelRef) -> Scorer:
        return BoosterScorer(ref.options, self)


def _inspected(kind: BoosterKind, path: Path, given: _Given) -> dict[str, Any]:
    model = kind.opened(path)
    classes = None if model.classes is None else list(model.classes)
    assumed = []
    labels = read_labels(path.parent / given.labels) if isinstance(given.labels, str) else given.labels
    if labels is not None:
        if classes is None:
            raise SpecError(f"labels: {path.name} does not tell classes apart")
        if len(labels) != len(classes):
            raise SpecError(f"labels: {len(labels)} names, but {path.name} has {len(classes)} classes")
        classes = labels
    if given.method == "predict_proba" and classes is None:
        raise SpecError(f"method: {path.name} does not tell classes apart, and gives no probabilities")
    if given.features is not None:
        tables.check_count(given.features, model.count, path.name)
    elif model.names is None:
        assumed.append(tables.assumed_features(model.count, "the model was"))
    return BoosterOptions(
        **given.model_dump(exclude={"labels"}),
        labels=labels,
        file=path.name,
        names=None if model.names is None else list(model.names),
        count=model.count,
        texts=tuple(model.texts),
        classes=classes,
        assumed=tuple(assumed),
    ).model_dump(mode="json")


class BoosterScorer(Scorer):
    """Scores tables with boosted trees; options as :meth:`BoosterKind.inspect` returns them. Uses one thread."""

    input = "table"

    def __init__(self, options: Mapping[str, Any], kind: BoosterKind) -> None:
        self.options = BoosterOptions.complete(options)
        self._kind = kind
        self.batch_size = self.options.batch_size
        self.features = self.options.features or self.options.names or self.options.count
        self.classes = self.options.classes
        self.columns = self._columns()
        self._model: Booster | None = None

    def _columns(self) -> dict[str, str] | None:
        classes, method = self.options.classes, self.options.method
        if classes is None:
            return None  # one number, or several: seen when there are results
        if method == "auto":
            return {"label": "string", "score": "float64"}
        if method == "predict":
            return {"prediction": "string"}
        return {f"probability_{name}": "float64" for name in classes}

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model. Raises ModelLoadError."""
        self._model = self._kind.opened(artifacts / self.options.file)

    def score(self, table: pa.Table) -> Results:
        """Score the rows of a table; a row with a value that the model does not take is an error of its own."""
        import pyarrow as pa

        assert self._model is not None
        table = tables.features_of(table, self.features)
        errors = self._refused(table)
        count = table.num_rows
        if len(errors) == count:
            return tables.results(None, errors, count)
        if errors:
            good = tables.without(errors, count)
            table = table.filter(good)
        if self.options.texts:
            given = tables.frame(table.rename_columns(self.options.names) if self.options.names else table)
        else:
            given = tables.matrix(table)
        return tables.results(pa.table(self._answer(self._model.predict(given))), errors, count)

    def _refused(self, table: pa.Table) -> dict[int, ItemError]:
        numbers = table.select([at for at in range(table.num_columns) if at not in self.options.texts])
        if not tables.is_numeric(numbers):
            text = next(name for name in numbers.column_names if not tables.is_numeric(numbers.select([name])))
            raise ItemError(f"{text} is {table.schema.field(text).type}, but the model takes numbers")
        assert self._model is not None
        errors = tables.unusable(numbers, tables.matrix(numbers), nan=True)
        errors |= tables.beyond_type(numbers, [self._model.dtype] * numbers.num_columns)
        if not self._model.missing_texts and self.options.texts:
            errors |= tables.unusable(table.select(list(self.options.texts)), None, nan=False)
        return errors

    def _answer(self, found: Array) -> dict[str, Any]:
        import pyarrow as pa

        classes = self.options.classes
        if classes is None:
            return {"prediction": tables.column(found)}
        shares = np.asarray(found, np.float64)
        if self.options.method == "predict_proba":
            return {f"probability_{name}": tables.column(shares[:, at]) for at, name in enumerate(classes)}
        best = shares.argmax(axis=1)
        label = pa.array(classes).take(pa.array(best))
        if self.options.method == "predict":
            return {"prediction": label}
        return {"label": label, "score": tables.column(shares[np.arange(len(best)), best])}

    def describe(self) -> str:
        what = f"{len(self.options.classes)} classes" if self.options.classes else "numbers"
        columns = f"{self.options.count} feature{'' if self.options.count == 1 else 's'}"
        return f"{self.options.file} ({self._kind.title}), {columns}, {what}, batch {self.batch_size}"

    def close(self) -> None:
        self._model = None
