"""Figures of a job's results, drawn with matplotlib. Each is a ``matplotlib.figure.Figure``, which notebooks show."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tally.errors import SpecError, StorageError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.notebooks.view import item_pictures
from tally.optional import needed
from tally.sql import sql_name, sql_text
from tally.text import did_you_mean, expanded, visible

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

Truth: TypeAlias = "Mapping[str, str] | Callable[[str], str] | str | Path"

ACROSS = 4
"""Pictures beside each other in a gallery."""
MOST_PICTURES = 64
MOST_LINES = 8
"""Series in one timeline."""
MOST_ROWS = 2_000_000
"""In one timeline."""
MOST_POINTS = 5000
"""Of one series; beyond that, each stretch of time is drawn as its lowest and highest value."""
MOST_LABELS = 30
"""Of a confusion matrix: those with the most items; the others are one."""
OTHERS = "(others)"


def _plots() -> Any:
    """matplotlib.pyplot: its import has notebooks show figures. Raises SpecError."""
    with needed("drawing needs", "notebook"):
        return import_module("matplotlib.pyplot")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    plots = _plots()
    figure, axes = plots.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    plots.close(figure)  # it is returned; open ones would be shown a second time
    return figure, axes


def gallery(jobs: Jobs, record: JobRecord, *, limit: int, where: str | None) -> Figure:
    """Pictures with what was found in them. See :meth:`tally.Job.gallery`."""
    if not 1 <= limit <= MOST_PICTURES:
        raise SpecError(f"limit: 1 to {MOST_PICTURES} pictures, not {limit}")
    from PIL import Image

    shown = item_pictures(jobs, record, limit=limit, where=where, side=300)
    if not shown:
        raise SpecError(
            f"job {record.id} has no pictures to show" + ("" if where is None else f" where {where}"),
            hint="Its items are no pictures, or they are not where they were, or nothing is scored yet.",
        )
    down = -(-len(shown) // ACROSS)
    figure, axes = _figure(down, min(ACROSS, len(shown)), 3.0 * min(ACROSS, len(shown)), 2.7 * down)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (key, jpeg) in zip(axes.flat, shown, strict=False):
        axis.imshow(Image.open(io.BytesIO(jpeg)))
        axis.set_title(_text(key), fontsize=8)
    return figure


def timeline(
    jobs: Jobs, record: JobRecord, *, value: str | None, time: str | None, by: Sequence[str] | None, where: str | None
) -> Figure:
    """Values over time, anomalies marked. See :meth:`tally.Job.timeline`."""
    columns = _types(jobs, record)
    time = _column("time", time, columns, _is_time, "time")
    groups = _series(record, columns) if by is None else list(by)
    for group in groups:
        if group not in columns:
            raise SpecError(f"by: there is no column {group!r}{did_you_mean(group, columns)}")
    taken = {time, *groups, "frame"}
    value = _column("value", value, {n: t for n, t in columns.items() if n not in taken}, _is_number, "score")
    flag = "anomaly" if _is_flag(columns.get("anomaly")) else None
    condition = "" if where is None else f"where {where}"
    parts = [f"{sql_text(f'{each} ')} || coalesce({sql_name(each)}::varchar, '')" for each in groups]
    group = " || ', ' || ".join(parts) or "''"
    chosen = (
        f"with chosen as (select {group} as series, {sql_name(time)} as moment, {sql_name(value)}::double as value, "  # noqa: S608
        f"{sql_name(flag) if flag else 'false'} as flag from results {condition}) "
    )
    # Those with the most anomalies; so many are few enough to be counted.
    found = jobs.query(
        record.id,
        chosen + "select series, count(*) over () as several from chosen where moment is not null group by 1 "  # noqa: S608
        f"order by count(*) filter (flag) desc, 1 limit {MOST_LINES}",
    )
    if not found.num_rows:
        raise SpecError(f"job {record.id} has no rows to draw" + ("" if where is None else f" where {where}"))
    shown = sorted(found.column("series").to_pylist())
    among = ", ".join(map(sql_text, shown))
    rows = jobs.query(
        record.id,
        chosen + f"select * from chosen where moment is not null and series in ({among}) order by moment",  # noqa: S608
        limit=MOST_ROWS + 1,
    )
    if rows.num_rows > MOST_ROWS:
        raise SpecError(f"more than {MOST_ROWS:,} rows are too many to draw", hint="Choose some: where=...")
    more = found.column("several")[0].as_py() - len(shown)
    figure, axes = _figure(len(shown), 1, 10.0, 1.2 + 1.5 * len(shown))
    for axis, name in zip(axes.flat, shown, strict=True):
        _draw_line(axis, rows, name, value)
    if any(each.collections for each in axes.flat):
        next(each for each in axes.flat if each.collections).legend(loc="upper right", fontsize=8)
    axes.flat[-1].set_xlabel(time)
    if more:
        figure.suptitle(f"{more:,} more are not drawn: choose with where=...", fontsize=9)
    return figure


def _series(record: JobRecord, columns: Mapping[str, Any]) -> list[str]:
    """The columns that tell one series from another: the job's key, that of its model, or the video."""
    groups = record.spec.get("by") or record.model.get("options", {}).get("by") or ["video"]
    return [each for each in groups if each in columns]


def _draw_line(axis: Any, rows: pa.Table, name: str, value: str) -> None:
    import pyarrow.compute as pc

    mine = rows.filter(pc.equal(rows.column("series"), name))
    at, values = mine.column("moment").to_numpy(), mine.column("value").to_numpy()
    marked = mine.column("flag").fill_null(False).to_numpy()
    kept = _outline(values) if len(values) > MOST_POINTS else slice(None)
    axis.plot(at[kept], values[kept], linewidth=0.8)
    if marked.any():
        axis.scatter(at[marked], values[marked], color="tab:red", s=14, zorder=3, label="anomaly")
    axis.set_ylabel(value, fontsize=8)
    if name:
        axis.set_title(_text(name), fontsize=8, loc="left")


def _outline(values: Any) -> Any:
    """Indices of the lowest and the highest value of each of many stretches, in order, so that no peak is lost."""
    import numpy as np

    edges = np.linspace(0, len(values), MOST_POINTS // 2 + 1).astype(int)
    stretches = [(begin, values[begin:end]) for begin, end in pairwise(edges) if end > begin]
    filled = [(begin, np.where(np.isnan(part), np.inf, part), np.where(np.isnan(part), -np.inf, part))
              for begin, part in stretches]  # fmt: skip
    found = {begin + int(index) for begin, low, high in filled for index in (low.argmin(), high.argmax())}
    return np.array(sorted(found))


def confusion(jobs: Jobs, record: JobRecord, truth: Truth, *, predicted: str) -> Figure:
    """True labels against predicted ones. See :meth:`tally.Job.confusion`."""
    columns = _types(jobs, record)
    if predicted not in columns:
        raise SpecError(f"predicted: there is no column {predicted!r}{did_you_mean(predicted, columns)}")
    best = "order by score desc" if "score" in columns else ""
    rows = jobs.query(
        record.id,
        f"select key, first({sql_name(predicted)}::varchar {best}) as label, count(*) as rows "  # noqa: S608
        "from results group by key order by key",
    )
    if not best and (several := [key for key, count in _two(rows, "key", "rows") if count > 1]):
        raise SpecError(
            f"predicted: {several[0]!r} has several rows and no column score: which of them counts is not known"
        )
    true, text = _truth(truth), _texts(columns[predicted])
    pairs = [(true(key), label) for key, label in _two(rows, "key", "label")]
    known = [(text(actual), label and text(label)) for actual, label in pairs if actual is not None]
    if not known:
        raise SpecError(
            f"truth: none of the {len(pairs):,} keys has a label in it"
            + (f", not {pairs and rows.column('key')[0].as_py()!r}" if pairs else "")
        )
    counts = Counter((actual, "(none)" if label is None else label) for actual, label in known)
    return _matrix(counts, len(pairs) - len(known), predicted)


def _texts(kind: Any) -> Callable[[Any], str]:
    """How true and predicted values are written, so that equal ones are: ``True`` is ``true``, and ``1`` is ``1.0``."""
    import pyarrow.types as types

    if types.is_boolean(kind):
        return lambda value: str(value).lower()
    if types.is_floating(kind):
        return _number
    return str


def _number(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return str(int(number)) if number.is_integer() else str(number)


def _matrix(counts: Counter[tuple[str, str]], unknown: int, predicted: str) -> Figure:
    import numpy as np

    total = Counter[str]()
    for (actual, label), count in counts.items():
        total.update({actual: count} if actual == label else {actual: count, label: count})
    most = sorted(name for name, _ in total.most_common(MOST_LABELS))
    names = [*most, OTHERS] if len(total) > len(most) else most
    at = {name: index for index, name in enumerate(names)}
    grid = np.zeros((len(names), len(names)), int)
    for (actual, label), count in counts.items():
        grid[at.get(actual, len(most)), at.get(label, len(most))] += count
    right = sum(count for (actual, label), count in counts.items() if actual == label)
    side = 2.5 + 0.45 * len(names)
    figure, axes = _figure(1, 1, side, side)
    axis = axes[0, 0]
    axis.imshow(grid, cmap="Blues")
    for row, column in zip(*np.nonzero(grid), strict=True):
        dark = grid[row, column] > grid.max() / 2
        axis.text(column, row, f"{grid[row, column]:,}", ha="center", va="center", color="w" if dark else "k")
    for ticks in (axis.set_xticks, axis.set_yticks):
        ticks(range(len(names)), [_text(name) for name in names], fontsize=8)
    axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel(predicted)
    axis.set_ylabel("truth")
    number = sum(counts.values())
    axis.set_title(
        f"{right:,} of {number:,} right ({right / number:.1%})" + (f"; {unknown:,} without truth" if unknown else ""),
        fontsize=9,
    )
    return figure


def _truth(truth: Truth) -> Callable[[str], str | None]:
    if isinstance(truth, Mapping):
        return truth.get
    if callable(truth):
        return truth
    if truth == "folder":
        return lambda key: key.split("/")[-2] if "/" in key else None
    path = expanded(truth)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := {"key", "label"} - set(reader.fieldnames or ()):
                raise SpecError(f"truth: {path} has no column {', '.join(sorted(missing))}")
            return {row["key"]: row["label"] for row in reader}.get
    except OSError as error:
        raise StorageError(
            f"truth: cannot read {path}: {error.strerror}",
            hint="Give a CSV file with the columns key and label, a mapping, a function of the key, or 'folder'.",
        ) from error


def _types(jobs: Jobs, record: JobRecord) -> dict[str, Any]:
    """The type of each column of the results."""
    return {field.name: field.type for field in jobs.query(record.id, "from results", limit=0).schema}


def _two(table: pa.Table, one: str, other: str) -> list[tuple[Any, Any]]:
    return list(zip(table.column(one).to_pylist(), table.column(other).to_pylist(), strict=True))


def _column(
    what: str, asked: str | None, columns: Mapping[str, Any], fits: Callable[[str, Any], bool], usual: str
) -> str:
    """The column that is meant: the one asked for, the usual one, or the only one that fits. Raises SpecError."""
    if asked is not None:
        if asked not in columns:
            raise SpecError(f"{what}: there is no column {asked!r}{did_you_mean(asked, columns)}")
        if not fits(asked, columns[asked]):
            raise SpecError(f"{what}: the column {asked!r} is {columns[asked]}, which is not drawn over time")
        return asked
    fitting = [name for name, kind in columns.items() if fits(name, kind)]
    if len(fitting) == 1:
        return fitting[0]
    if usual in fitting:
        return usual
    there = f"there are {', '.join(fitting)}" if fitting else f"none of {', '.join(columns)} is one"
    raise SpecError(
        f"{what}: say which column, with {what}=...; {there}",
        hint="Columns of the input are in the results if the job has kept them: keep=[...]." if not fitting else None,
    )


def _is_time(name: str, kind: Any) -> bool:
    import pyarrow.types as types

    # Rows of frames say the second of the video.
    return bool(types.is_timestamp(kind) or types.is_date(kind) or (name == "time" and types.is_floating(kind)))


def _is_number(name: str, kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _is_flag(kind: Any) -> bool:
    import pyarrow.types as types

    return kind is not None and bool(types.is_boolean(kind))


def _text(name: str) -> str:
    """A name as it is: matplotlib would take two dollar signs for mathematics."""
    return visible(name).replace("$", r"\$")
