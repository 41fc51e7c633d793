"""Many models in one Parquet file: one row for each key, thousands of them loaded in milliseconds.

One-class SVMs, with or without a StandardScaler before them, are kept as numbers and scored together (see
``batched_svms.py``); opening them runs no code. Any other scikit-learn model is kept whole, in skops' format.

Columns of the file: those of the key; ``svm``, a struct of the fields of
:class:`~tally.scorers.per_key.batched_svms.Svm`, lists flattened row by row; ``content``, a skops file's bytes, where
``svm`` is null; and whatever else was noted about each model. The schema's metadata says which columns make the key,
the features, and the columns of results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tally.errors import ModelLoadError, SpecError, TallyError, UntrustedModelError
from tally.models.base import Kind
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer, Window
from tally.scorers.per_key.batched_svms import KERNELS, BatchedSvms, Integers, Svms, parameters
from tally.scorers.per_key.keys import DETECTOR, KeyIndex, ModelPerKey, columns_differ, key_of, shown, whole
from tally.scorers.tabular import tables
from tally.scorers.tabular.sklearn import open_estimator, scorer_of
from tally.storage import failure, publish

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "models.parquet"

_METADATA = b"tally.models"
_VERSION = 1
_RESERVED = ("svm", "content")
_ROWS = 4096
"""Models in a row group."""
_NUMBERS = ("gamma", "coef0", "intercept")
_LISTS = ("mean", "scale", "vectors", "coefs")


@dataclass(frozen=True, slots=True)
class Model:
    """One model to pack.

    key: column to value. estimator: fitted, of scikit-learn. facts: more columns about it, such as the number of rows
    that it was fitted to: the same names for all models.
    """

    key: Mapping[str, Any]
    estimator: Any
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """What :func:`write` wrote. batched: SVMs kept as numbers; whole: models kept in skops' format."""

    folder: Path
    batched: int
    whole: int
    requires_trust: bool

    @property
    def models(self) -> int:
        return self.batched + self.whole


# ----------------------------------------------------------------------------------------------------- writing


def write(
    folder: Path,
    models: Iterable[Model],
    *,
    by: Sequence[str],
    features: Sequence[str] | int | None = None,
    window: Window | None = None,
    name: str | None = None,
    trusted: bool = False,
) -> Written:
    """Write a model package of many models; they are taken from ``models`` and written as they come.

    by: the columns of the key. features: names of the columns that every model takes, or how many there are;
    taken from the first model by default.
    window: what readings are gathered over first; features are what is made of it.
    name: of the package; the folder's by default.
    trusted: models may hold types that do more than compute; scoring then needs trust too.
    Nothing is written unless all is well. Raises SpecError (a key twice, models that do not fit together),
    UntrustedModelError, StorageError.
    """
    there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with publish.whole(folder / FILE) as part:
                written = _write(Path(part), folder, iter(models), _Packer(tuple(by), features, window, trusted))
            described: dict[str, Any] = {"name": name or folder.absolute().name, "file": FILE}
            if written.requires_trust:
                described["requires_trust"] = True
            (folder / "tally.yaml").write_text(yaml.safe_dump(described, sort_keys=False), "utf-8")
        finally:
            if not there:
                with suppress(OSError):
                    folder.rmdir()  # if nothing is in it
    except TallyError:
        raise
    except OSError as error:
        raise failure("write", str(folder), error) from error
    return written


def _write(
    path: Path,
    folder: Path,
    models: Iterator[Model],
    packer: _Packer,
) -> Written:
    import pyarrow as pa
    from pyarrow import parquet

    by = packer.by
    if not by or len(set(by)) < len(by) or set(by) & set(_RESERVED):
        raise SpecError(
            f"by: {', '.join(by) or 'no column'} cannot make a key",
            hint=f"Name one or more columns, each once, and none {' or '.join(_RESERVED)}.",
        )
    writer = None
    try:
        while batch := [packer.row(each) for each in islice(models, _ROWS)]:
            if writer is None:
                schema = packer.schema(batch)
                writer = parquet.ParquetWriter(path, schema, compression="lz4", use_dictionary=False)
            try:
                writer.write_table(pa.Table.from_pylist(batch, schema))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise SpecError(f"keys or facts of models are of different types: {error}") from None
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise SpecError("there are no models to pack")
    return Written(folder, packer.batched, packer.whole, packer.requires_trust)


class _Packer:
    """Turns models into rows of the file, and checks that they fit together."""

    def __init__(
        self, by: tuple[str, ...], features: Sequence[str] | int | None, window: Window | None, trusted: bool
    ) -> None:
        self.by, self.features, self.window, self.trusted = by, features, window, trusted
        self.columns: Mapping[str, str] | None = None
        self.batched = self.whole = 0
        self.requires_trust = False
        self._seen: set[Any] = set()

    def row(self, model: Model) -> dict[str, Any]:
        key = key_of(self.by, model.key)
        name = shown(self.by, [model.key.get(each) for each in self.by])
        if key is None:
            raise SpecError(f"{name}: null makes no key")
        if key in self._seen:
            raise SpecError(f"{name} has two models", hint="Keys are compared by how their values are written.")
        self._seen.add(key)
        if wrong := [each for each in model.facts if each in (*_RESERVED, *self.by)]:
            raise SpecError(f"{name}: a fact cannot be called {wrong[0]}")
        self.features = agreed_features(self.features, model.estimator, name)
        svm = parameters(model.estimator)
        columns: Mapping[str, str] | None = DETECTOR
        content = None
        if svm is None:
            content = self._content(model.estimator, name)
            columns = scorer_of(model.estimator, self.features).columns
            self.whole += 1
        else:
            self.batched += 1
        if problem := columns_differ(columns, self.columns, name):
            raise SpecError(problem)
        self.columns = self.columns or columns
        return {
            **{each: model.key[each] for each in self.by},
            "svm": None if svm is None else {each.name: _plain(getattr(svm, each.name)) for each in fields(svm)},
            "content": content,
            **model.facts,
        }

    def _content(self, estimator: Any, name: str) -> bytes:
        import skops.io

        content: bytes = skops.io.dumps(estimator)
        try:
            open_estimator(content, format="skops", trusted=False, name=name)
        except UntrustedModelError:
            if not self.trusted:
                raise
            self.requires_trust = True
        return content

    def schema(self, rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
        import pyarrow as pa

        numbers = pa.list_(pa.float64())
        svm = pa.struct(
            [pa.field("kernel", pa.string()), pa.field("degree", pa.int64())]
            + [pa.field(name, pa.float64()) for name in _NUMBERS]
            + [pa.field(name, numbers) for name in _LISTS]
        )
        kinds: dict[str, Any] = {"svm": svm, "content": pa.binary()}
        for name in rows[0]:
            if name not in kinds:
                try:
                    kinds[name] = pa.array([row.get(name) for row in rows]).type
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise SpecError(f"{name} is of different types: {error}") from None
        described = {
            "version": _VERSION,
            "by": self.by,
            "features": self.features,
            "columns": None if self.columns is None else dict(self.columns),
            "window": None if self.window is None else asdict(self.window),
        }
        return pa.schema([(name, kinds[name]) for name in rows[0]], {_METADATA: json.dumps(described).encode()})


def _plain(value: Any) -> Any:
    return value.reshape(-1) if isinstance(value, np.ndarray) else value


def agreed_features(features: Sequence[str] | int | None, estimator: Any, name: str) -> Sequence[str] | int | None:
    """The features of all models so far, and of one more. Raises SpecError if they do not agree."""
    names = getattr(estimator, "feature_names_in_", None)
    count = getattr(estimator, "n_features_in_", None)
    if names is not None:
        names = [str(each) for each in names]
    if features is None:
        return names or count
    if isinstance(features, int):
        if count is not None and count != features:
            raise SpecError(f"{name} takes {count} features, and others take {features}")
        return features
    if names is not None and names != list(features):
        raise SpecError(f"{name} takes {', '.join(names)}, and others take {', '.join(features)}")
    if count is not None and count != len(features):
        raise SpecError(f"{name} takes {count} features, and others take {len(features)}: {', '.join(features)}")
    return features


# ----------------------------------------------------------------------------------------------------- scoring


class PackedOptions(tables.TableOptions):
    """Options of a packed scorer, as :func:`inspect` completes them.

    path: the Parquet file. by, count, names, columns, window: what it says about itself.
    """

    path: str
    by: list[str]
    names: list[str] | None = None
    count: int | None = None
    columns: dict[str, str] | None = None
    window: Window | None = None
    trusted: bool = False
    assumed: tuple[str, ...] = ()


def inspect(path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
    """Look into a file of models, and fill in every option that was left out.

    Returns options (JSON-able) for :class:`PackedScorer`. Raises SpecError with every problem, ModelLoadError.
    """
    if problems := tables.TableOptions.problems_in(options):
        raise SpecError([f"{path.name}: {each}" for each in problems])
    given = tables.TableOptions.model_validate(dict(options))
    described = _described(path)
    features = described["features"]
    names = features if isinstance(features, list) else None
    count = len(features) if isinstance(features, list) else features
    assumed = []
    if given.features is not None:
        tables.check_count(given.features, count, path.name)
    elif names is None and count is not None:
        assumed.append(tables.assumed_features(count, "the models were"))
    found = PackedOptions(
        **given.model_dump(),
        path=str(path.absolute()),
        by=described["by"],
        names=names,
        count=count,
        columns=described["columns"],
        window=described.get("window"),
        trusted=trusted,
        assumed=tuple(assumed),
    )
    return found.model_dump(mode="json")


class PackedKind(Kind):
    """Many models in one Parquet file."""

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path, options, trusted=trusted)

    def create(self, ref: ModelRef) -> Scorer:
        return PackedScorer({**ref.options, "path": str(ref.location / ref.entry)})


class PackedScorer(ModelPerKey):
    """Scores tables with the models of one file; options as :func:`inspect` returns them.

    One-class SVMs give ``anomaly`` and ``score`` (the decision function); others give what
    :class:`tally.scorers.tabular.sklearn.SklearnScorer` gives for them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = PackedOptions.complete(options)
        super().__init__(
            by=self.options.by,
            features=self.options.features or self.options.names or self.options.count,
            columns=self.options.columns,
            batch_size=self.options.batch_size,
        )
        self.window = self.options.window

    @cached_property
    def _keys(self) -> frozenset[tuple[str, ...]]:
        table = _read(Path(self.options.path), self.options.by)
        index = KeyIndex([whole(table.column(name)) for name in self.options.by])
        return frozenset(index)

    def missing_reason(self, key: Mapping[str, Any]) -> str | None:
        found = key_of(self.by, key)
        if found is not None and found in self._keys:
            return None
        return f"there is no model for {shown(self.by, [key[name] for name in self.by])}"

    def load(self, artifacts: Path, device: str) -> None:
        """Read the models. Raises ModelLoadError."""
        from tally.arrays import truths_of

        path = artifacts / Path(self.options.path).name
        table = _read(path, [*self.options.by, *_RESERVED])
        try:
            self._index = KeyIndex([whole(table.column(name)) for name in self.by])
            if twice := self._index.twice():
                raise ModelLoadError(f"{path}: {shown(self.by, twice)} has two models")
            self._contents = whole(table.column("content"))
            svms = whole(table.column("svm"))
            valid = truths_of(svms.is_valid())
            self._places = np.where(valid, np.cumsum(valid) - 1, -1)
            self._svms = BatchedSvms(_unpacked(svms.drop_null())) if valid.any() else None
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path} is damaged: {error}") from None
        if self._svms is not None and self.options.count != self._svms.models.vectors.shape[1]:
            raise ModelLoadError(f"{path} is damaged: its models do not have {self.options.count} features")

    def _find(self, keys: Sequence[pa.Array]) -> Integers:
        return self._index.find(keys)

    def _batched(self, present: Integers) -> tuple[BatchedSvms | None, Integers]:
        return self._svms, self._places

    def _open(self, number: int) -> Scorer:
        name = shown(self.by, self._index.key(number))
        content = self._contents[number].as_py()
        if content is None:
            raise ModelLoadError(f"the model of {name} is not in the file")
        estimator = open_estimator(content, format="skops", trusted=self.options.trusted, name=f"the model of {name}")
        scorer = scorer_of(estimator, self.features)
        if problem := columns_differ(scorer.columns, self.columns, name):
            raise ModelLoadError(problem)
        return scorer

    def describe(self) -> str:
        batched = 0 if self._svms is None else len(self._svms)
        whole = len(self._index) - batched
        parts = [f"{batched:,} batched SVM{'' if batched == 1 else 's'}"] * bool(batched) + [f"{whole:,} whole"] * bool(
            whole
        )
        return f"{len(self._index):,} models ({', '.join(parts)}) by {', '.join(self.by)}, batch {self.batch_size}"


def _described(path: Path) -> dict[str, Any]:
    """What a file of models says about itself."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ModelLoadError(
            f"{path} cannot be read as Parquet: {error}", hint="Was it copied or downloaded completely?"
        ) from None
    if _METADATA not in metadata:
        raise ModelLoadError(
            f"{path} holds no models: it is some other Parquet file",
            hint="'tally models pack' and 'tally train anomaly' write files of models.",
        )
    try:
        described: dict[str, Any] = json.loads(metadata[_METADATA])
        version, features = described["version"], described["features"]
        sound = all(isinstance(each, str) for each in [*described["by"], *(described["columns"] or ())])
    except (ValueError, KeyError, TypeError):
        raise ModelLoadError(f"{path} is damaged: it does not say what it holds") from None
    if version != _VERSION:
        raise ModelLoadError(f"{path} is of version {version}, and this Tally reads version {_VERSION}")
    if not sound or not described["by"] or not (features is None or isinstance(features, (int, list))):
        raise ModelLoadError(f"{path} is damaged: it does not say what it holds")
    return described


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:  # read_table() would import pyarrow.dataset, which takes long
            return file.read(list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ModelLoadError(
            f"{path} cannot be read: {error}", hint="Was it copied or downloaded completely?"
        ) from None


def _unpacked(svms: pa.StructArray) -> Svms:
    """Structs as arrays, without looking at models one by one. Raises ValueError if they do not fit together."""
    from pyarrow import compute

    from tally.arrays import numbers_of, scalar_of, texts_of

    def flat(name: str) -> Any:
        return numbers_of(svms.field(name).flatten())

    models = len(svms)
    counts = numbers_of(compute.list_value_length(svms.field("coefs")))
    widths = numbers_of(compute.list_value_length(svms.field("mean")))
    features = int(widths[0])
    for name, lengths in (("mean", features), ("scale", features), ("vectors", counts * features)):
        if (numbers_of(compute.list_value_length(svms.field(name))) != lengths).any():
            raise ValueError(f"{name} is not as long as it should be")
    kernel = compute.index_in(svms.field("kernel"), texts_of(KERNELS))
    kernel = kernel.fill_null(scalar_of(-1, kernel.type))
    return Svms(
        kernel=numbers_of(kernel).astype(np.int64),
        degree=numbers_of(svms.field("degree")).astype(np.int64),
        **{name: numbers_of(svms.field(name)) for name in _NUMBERS},
        mean=flat("mean").reshape(models, features),
        scale=flat("scale").reshape(models, features),
        vectors=flat("vectors").reshape(-1, features),
        coefs=flat("coefs"),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
    )
