"""Train an anomaly detector for each key of a table of readings, and package all of them in one file.

Readings are grouped by key out of core, and keys are trained in parallel. A model depends only on the readings of its
key, the options and the seed. The package appears at once when training has ended.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tally.database import foreign
from tally.engines.base import Engine, Limits
from tally.errors import (
    ModelError,
    OutputExistsError,
    SourceNotFoundError,
    SpecError,
    StorageError,
    WorkerError,
)
from tally.masking import mask
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.optional import needed
from tally.scorers.base import Window
from tally.sources.sql.factory import is_sql, parted
from tally.storage import failure
from tally.training.promotion import Promoted, Promotion
from tally.training.runs.store import PACKAGE
from tally.training.runs.tracking import Run, emptied

if TYPE_CHECKING:
    from tally.scorers.per_key.packed import Model
    from tally.sources.tables.source import TableSource

Matrix = np.ndarray[Any, np.dtype[np.float64]]

METRICS = (
    "keys", "rows", "rows_left_out", "rows_used", "rows_anomalous", "keys_failed", "anomalous_share", "seconds",
)  # fmt: skip
"""What a training measures."""
MIN_ROWS = 10
"""Usable rows that a key needs."""
TASK_ROWS, TASK_KEYS = 200_000, 64
"""The most rows and keys in one task. A key with more rows is a task of its own."""
READ_ROWS = 1 << 20
"""Rows of a key that are read at once."""
TOLERANCE = 1e-7
"""Tolerance of the solver. With scikit-learn's 1e-3, a model with --nu 0.01 calls 22 % of normally distributed values
anomalous, and has eight times as many support vectors."""
MAX_ITERATIONS = 1_000_000
"""Iterations of the solver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is trained. nu: the share of the training rows that may be anomalous."""

    kind: Literal["ocsvm", "isolation-forest"] = "ocsvm"
    nu: float = 0.01
    gamma: float | Literal["scale", "auto"] = "scale"
    max_rows: int = 2000
    seed: int = 1

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.nu <= 0.5:
            found.append(f"--nu: more than 0, at most 0.5, not {self.nu:g}")
        if not isinstance(self.gamma, str) and not 0 < self.gamma < float("inf"):
            found.append(f"--gamma: scale, auto, or a number above 0, not {self.gamma:g}")
        if self.max_rows < MIN_ROWS:
            found.append(f"--max-rows: at least {MIN_ROWS}, not {self.max_rows}")
        if self.seed < 0:
            found.append(f"--seed: 0 or more, not {self.seed}")
        return found

    def fit(self, values: Matrix, seed: int) -> Any:
        """A fitted scikit-learn pipeline for ``float64[rows, features]`` without NaN."""
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if self.kind == "isolation-forest":
            from sklearn.ensemble import IsolationForest

            return IsolationForest(contamination=self.nu, random_state=seed).fit(values)
        import warnings

        from sklearn.svm import OneClassSVM

        detector = OneClassSVM(nu=self.nu, gamma=self.gamma, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
        pipeline = make_pipeline(StandardScaler(), detector)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about too many iterations: the boundary is corrected below
            pipeline.fit(values)
        _correct_boundary(pipeline, values)
        return pipeline


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one key: ``rows`` rows of the grouped source, beginning with ``first``."""

    key: Mapping[str, Any]
    first: int
    rows: int

    def __str__(self) -> str:
        from tally.scorers.per_key.keys import shown

        return shown([*self.key], [*self.key.values()])


@dataclass(frozen=True, slots=True)
class Fitted:
    """The result for one key: a model, or the reason why there is none.

    left_out: rows with a value that is missing or not finite. used: rows that it was trained with.
    anomalous: how many of these the model calls anomalous.
    """

    group: Group
    model: Any = None
    reason: str | None = None
    left_out: int = 0
    used: int = 0
    anomalous: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Progress: ``done`` of ``of`` keys, their number of rows, and how many keys failed to get a model.

    The first step, with nothing done, means that the rows are grouped.
    """

    done: int
    of: int
    rows: int
    failed: int


@dataclass(frozen=True, slots=True)
class Trained:
    """facts: the package's metrics and origin. failed: keys without a model, and why."""

    facts: dict[str, Any]
    failed: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training. Raises SpecError with every problem, OutputExistsError.

    sources: files of readings, globs, folders, URLs; or one database, with a table (``#TABLE``) or ``?query=``.
    by: the columns of the key. values: the columns to train with. out: folder of the package, which must not exist;
    None: that of the run (:func:`train`). time, window, aggregate: readings are aggregated over ``window`` seconds
    first. time_unit, timezone, path_columns: as of :meth:`tally.sources.tables.source.TableSource.describe`. where: a
    condition in SQL. csv: how to read CSV. workers: processes; None: one for each core.
    """

    sources: tuple[str, ...]
    by: tuple[str, ...]
    values: tuple[str, ...]
    out: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)
    time: str | None = None
    time_unit: str | None = None
    timezone: str | None = None
    window: float | None = None
    aggregate: tuple[str, ...] = ("mean",)
    path_columns: str | None = None
    where: str | None = None
    csv: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None

    file = "models.parquet"

    def __post_init__(self) -> None:
        problems = self.recipe.problems()
        problems += [f"--{name}: names no column" for name in ("by", "values") if not getattr(self, name)]
        if both := sorted({*self.by} & {*self.values}):
            problems.append(f"--value: {', '.join(both)} is a column of --by too")
        if self.window is not None and self.time is None:
            problems.append("--window: needs the column of timestamps, --time")
        if self.time_unit not in (None, "s", "ms", "us", "ns"):
            problems.append(f"--time-unit: s, ms, us or ns, not {self.time_unit!r}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"--workers: at least 1, not {self.workers}")
        problems += self._problems_of_databases()
        if problems:
            raise SpecError([each.replace("--values", "--value") for each in problems])
        if self.out is not None and self.out.exists():
            raise OutputExistsError(f"{self.out} is there already", hint="Choose another folder, or remove it first.")

    def _problems_of_databases(self) -> list[str]:
        databases = [each for each in self.sources if is_sql(each)]
        problems = []
        if databases and len(self.sources) > 1:
            problems.append(f"source: {mask(databases[0])} is a database, and there are others: give it alone")
        if databases:
            given = [name for name in ("csv", "path-columns") if getattr(self, name.replace("-", "_"))]
            problems += [f"--{name}: is for files, and the source is a database" for name in given]
        for each in databases:
            try:
                foreign.check(parted(each)[0].partition("#")[0])
            except ValueError as error:
                problems.append(f"source: {error}")
        return problems

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that the models are trained with: ``values``, or with a window their aggregates."""
        if self.window is None:
            return self.values
        made = [f"{value}_{how}" for how in self.aggregate if how != "count" for value in self.values]
        return (*made, *(["count"] if "count" in self.aggregate else []))

    def run(
        self, listen: Callable[[Step], None] = lambda step: None, say: Callable[[str], None] = lambda line: None
    ) -> Trained:
        """Train, and write the package.

        Raises ModelError if no key could be trained, SourceNotFoundError where there are no rows at all, SpecError and
        StorageError from the source.
        """
        assert self.out is not None
        _check_library()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        except OSError as error:
            raise failure("write", str(self.out), error) from error
        try:
            return self._run(self.out, partial, listen, say)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise failure("write", str(self.out), error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _run(self, out: Path, partial: Path, listen: Callable[[Step], None], say: Callable[[str], None]) -> Trained:
        from tally.engines.local import LocalEngine
        from tally.scorers.per_key.keys import key_of
        from tally.scorers.per_key.packed import write
        from tally.sources.sql.source import SqlSource
        from tally.sources.tables.source import TableSource

        begun = monotonic()
        asked: dict[str, Any] = {
            "features": self.features,
            "by": self.by,
            "where": self.where,
            "time": self.time,
            "time_unit": self.time_unit,
            "timezone": self.timezone,
            "window": self.window,
            "aggregate": self.aggregate,
        }
        if is_sql(self.sources[0]):
            source: TableSource = SqlSource.of(*parted(self.sources[0]), **asked)
        else:
            files: dict[str, Any] = {
                "csv": self.csv,
                "path_columns": self.path_columns,
                "without": str(partial.absolute()),
            }
            source = TableSource.describe(self.sources, **asked, **files)
        source = source.located(str((partial / "rows").absolute()))
        totals = {"keys": 0, "rows": 0, "rows_left_out": 0, "rows_used": 0, "rows_anomalous": 0}
        engine = LocalEngine()
        slots = self.workers or engine.default_slots()
        # Workers import what they need while rows are grouped.
        engine.start(_setup, (source, self), slots=slots, limits=Limits(memory=engine.default_memory(slots)))
        try:
            source.prepare()
            if unread := source.unread:
                first = source.bad_lines(0, 1)[0]["error"]
                say(f"{unread:,} lines that cannot be read are left out, the first: {first}")
            if remark := source.remark():
                say(remark)
            groups = [Group(*each) for each in source.groups()]
            if not groups:
                raise SourceNotFoundError(
                    "there are no rows to train with" + (f" for which {self.where} holds" if self.where else "")
                )
            keyless = [group for group in groups if key_of(self.by, group.key) is None]
            failed = {str(group): "null makes no key" for group in keyless}
            totals["rows"] = sum(group.rows for group in keyless)
            tasks = _tasks([group for group in groups if group not in keyless])
            listen(Step(0, len(groups), 0, len(failed)))
            models = self._models(_outcomes(engine, tasks, ahead=4 * slots), totals, failed, len(groups), listen)
            if (one := next(models, None)) is None:
                shown = "".join(f"\n  {key}: {reason}" for key, reason in islice(failed.items(), 5))
                raise ModelError(f"none of {len(groups):,} keys could be trained{shown}")
            package = partial / "package"
            window = (
                None if self.window is None else Window(self.time or "", self.window, self.aggregate, self.timezone)
            )
            write(package, chain([one], models), by=self.by, features=self.features, window=window, name=out.name)
        finally:
            engine.stop(kill=True)
        package.rename(out)
        return self._trained(totals, failed, monotonic() - begun)

    def _models(
        self,
        outcomes: Iterator[Fitted],
        totals: dict[str, int],
        failed: dict[str, str],
        keys: int,
        listen: Callable[[Step], None],
    ) -> Iterator[Model]:
        """The models among the outcomes; all outcomes are counted in ``totals`` and ``failed``."""
        from tally.scorers.per_key.packed import Model

        for fitted in outcomes:
            totals["rows"] += fitted.group.rows
            totals["rows_left_out"] += fitted.left_out
            if fitted.reason is not None:
                failed[str(fitted.group)] = fitted.reason
            else:
                totals["keys"] += 1
                totals["rows_used"] += fitted.used
                totals["rows_anomalous"] += fitted.anomalous
                facts = {"rows": fitted.group.rows, "used": fitted.used, "anomalous": fitted.anomalous}
                yield Model(fitted.group.key, fitted.model, facts)
            listen(Step(totals["keys"] + len(failed), keys, totals["rows"], len(failed)))

    def _trained(self, totals: Mapping[str, int], failed: Mapping[str, str], seconds: float) -> Trained:
        import sklearn

        facts: dict[str, Any] = {
            "metrics": {
                **totals,
                "keys_failed": len(failed),
                "anomalous_share": round(totals["rows_anomalous"] / totals["rows_used"], 6),
                "seconds": round(seconds, 2),
            },
            "trained": {
                "source": [*self.sources],
                "by": [*self.by],
                "features": [*self.features],
                **{name: getattr(self, name) for name in ("time", "window", "where") if getattr(self, name)},
                **({"aggregate": [*self.aggregate]} if self.window else {}),
                "kind": self.recipe.kind,
                "nu": self.recipe.nu,
                **({"gamma": self.recipe.gamma} if self.recipe.kind == "ocsvm" else {}),
                "max_rows": self.recipe.max_rows,
                "seed": self.recipe.seed,
                "sklearn": sklearn.__version__,
            },
        }
        return Trained(facts, failed)


def train(
    training: Training,
    run: Run,
    promotion: Promotion,
    *,
    listen: Callable[[Step], None] = lambda step: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Trained, Promoted, Path]:
    """Train as a run, and register the package, whose folder is the last that is returned.

    May be repeated in a run whose process was killed.
    """
    if training.out is None:
        training = replace(training, out=emptied(run.folder / PACKAGE))
    trained, out = training.run(listen, say), training.out
    assert out is not None
    figures = trained.facts["metrics"]
    run.log({name: value for name, value in figures.items() if isinstance(value, (int, float))}, step=0)
    facts = trained.facts | {"run": run.id}
    promoted = promotion.conclude(run, lambda name: open_registry().add(name, resolve(out), metadata=facts))
    return trained, promoted, out


# -- in the workers ----------------------------------------------------------------------------------


def _setup(source: TableSource, training: Training) -> tuple[TableSource, Training]:
    _check_library()
    return source, training


def _fit(state: tuple[TableSource, Training], groups: Sequence[Group]) -> list[Fitted]:
    """Train some keys, one after another."""
    source, training = state
    first, rows = groups[0].first, groups[-1].first + groups[-1].rows - groups[0].first

    def values(start: int, rows: int) -> Matrix:
        table = source.group_table(start, rows)
        return np.stack([table[name].cast("float64").to_numpy() for name in training.features], axis=1)

    # Opening the file for each key would take longer than training it.
    whole = values(first, rows) if rows <= READ_ROWS else None

    def reader(group: Group) -> Callable[[int, int], Matrix]:
        if whole is None:
            return lambda at, rows: values(group.first + at, rows)
        start = group.first - first
        return lambda at, rows: whole[start + at : start + at + rows]

    return [fit_key(group, reader(group), training.recipe) for group in groups]


def fit_key(group: Group, read: Callable[[int, int], Matrix], recipe: Recipe) -> Fitted:
    """Train the model of one key.

    read: for a position in the group and a number of rows, their values ``float64[rows, features]``, NaN if missing.
    """
    seed = zlib.crc32(str(group).encode("utf-8", "backslashreplace"), recipe.seed & 0xFFFFFFFF)
    try:
        values, usable = sample(read, group.rows, recipe.max_rows, seed)
        left_out = group.rows - usable
        if usable < MIN_ROWS:
            reason = f"{usable} usable rows, and at least {MIN_ROWS} are needed"
            return Fitted(group, reason=reason, left_out=left_out)
        model = recipe.fit(values, seed)
        anomalous = int((model.predict(values) < 0).sum())
    except Exception as error:  # a fault in the data of one key must not stop the others
        return Fitted(group, reason=f"{type(error).__name__}: {error}")
    return Fitted(group, model, left_out=left_out, used=len(values), anomalous=anomalous)


def sample(read: Callable[[int, int], Matrix], rows: int, limit: int, seed: int) -> tuple[Matrix, int]:
    """At most ``limit`` usable rows, spread evenly; and how many rows are usable.

    Rows are divided into ``limit`` runs of equal length, and one row is drawn at random from each, so that periodic
    data are sampled at every phase. For ``read`` see :func:`fit_key`. Memory does not grow with ``rows``.
    """
    random = np.random.default_rng(seed)
    runs = np.linspace(0, rows, min(rows, limit) + 1).astype(np.int64)
    kept, usable = [], 0
    first = 0
    while first < len(runs) - 1:
        last = max(first + 1, int(np.searchsorted(runs, runs[first] + READ_ROWS, "right")) - 1)
        values = read(int(runs[first]), int(runs[last] - runs[first]))
        there = np.flatnonzero(np.isfinite(values).all(axis=1))
        usable += len(there)
        bounds = np.searchsorted(there, runs[first : last + 1] - runs[first])
        counts = np.diff(bounds)
        drawn = bounds[:-1] + (random.random(len(counts)) * counts).astype(np.int64)
        kept.append(values[there[drawn[counts > 0]]])
        first = last
    return np.concatenate(kept), usable


def _correct_boundary(pipeline: Any, values: Matrix) -> None:
    """Move the decision boundary so that at most a share ``nu`` of the training rows is outside.

    That is what nu means. But values that repeat (a sensor that rests, or never changes) lie exactly on the boundary,
    where rounding would decide for all of them at once.
    """
    detector = pipeline[-1]
    decisions = np.sort(pipeline.decision_function(values))
    short = -decisions[int(detector.nu * len(values))]
    margin = 1e-9 * float(np.abs(detector.dual_coef_).sum())
    if short + margin > 0:
        detector._intercept_ = detector._intercept_ + (short + margin)
        detector.intercept_ = detector.intercept_ + (short + margin)
        detector.offset_ = detector.offset_ - (short + margin)


# -- in the coordinator ------------------------------------------------------------------------------


def _tasks(groups: Sequence[Group]) -> list[list[Group]]:
    """Tasks: runs of adjacent keys, large enough to be worth a message."""
    tasks: list[list[Group]] = []
    rows = 0
    for group in groups:
        rows += group.rows
        apart = tasks and tasks[-1][-1].first + tasks[-1][-1].rows != group.first
        if not tasks or apart or rows > TASK_ROWS or len(tasks[-1]) == TASK_KEYS:
            tasks.append([])
            rows = group.rows
        tasks[-1].append(group)
    return tasks


def _outcomes(engine: Engine, tasks: Sequence[Sequence[Group]], ahead: int) -> Iterator[Fitted]:
    """The outcome of each key, in order. ahead: how many tasks are submitted beyond the one that is waited for."""
    waiting: deque[tuple[Sequence[Group], Future[list[Fitted]]]] = deque()
    for task in tasks:
        waiting.append((task, engine.submit(_fit, task)))
        if len(waiting) > ahead:
            yield from _outcome(engine, *waiting.popleft())
    while waiting:
        yield from _outcome(engine, *waiting.popleft())


def _outcome(engine: Engine, task: Sequence[Group], future: Future[list[Fitted]]) -> Iterator[Fitted]:
    """The outcomes of a task. If its worker was lost, its keys are tried one by one to find the cause."""
    try:
        yield from future.result()
    except WorkerError as error:
        if len(task) == 1:
            yield Fitted(task[0], reason=error.message)
            return
        for group, alone in [(group, engine.submit(_fit, [group])) for group in task]:
            yield from _outcome(engine, [group], alone)


def _check_library() -> None:
    with needed("training needs", "sklearn", ModelError):
        import sklearn.svm  # noqa: F401
