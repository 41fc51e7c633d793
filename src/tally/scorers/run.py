"""Scoring without a job: values in, results out, and an item that fails costs no other item its result.

Jobs read items before this and write results after it; endpoints put a queue before it. No database, source or sink
takes part, and for pictures no Arrow either.

Threads: :func:`prepare` may run in several threads at once. :func:`score` and :func:`run` of one scorer are for one
thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import ItemError, SpecError, TallyError, error_line, raised_at
from tally.scorers.base import Item, Result, Scorer, TableResult
from tally.storage import file_name, temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Part:
    """Results of ``count`` items that follow each other.

    results: a sequence with one result per item, or a ``pyarrow.Table`` with one row per item.
    errors: position to what went wrong there; what ``results`` holds at such a position means nothing.
    """

    count: int
    results: Any
    errors: Mapping[int, ItemError] = field(default_factory=dict)

    def to_list(self) -> list[Result]:
        """One result per item; the ItemError of each that failed."""
        found = self.results.to_pylist() if hasattr(self.results, "to_pylist") else list(self.results)
        for position, error in self.errors.items():
            found[position] = error
        return found


def configured(scorer: Scorer, *, overlay: bool = False, batch_size: int | None = None) -> Scorer:
    """The scorer as a job or an endpoint asks for it. overlay: its rows are drawn onto the pictures.

    Raises SpecError if its results cannot be drawn.
    """
    if overlay:
        from tally.scorers.vision.overlay import Overlay

        scorer = Overlay(scorer)
    if batch_size is not None:
        scorer.batch_size = batch_size
    return scorer


def run(scorer: Scorer, items: Sequence[Any] | pa.Table) -> list[Result]:
    """Score items in batches: one result per item, in the same order; the ItemError of each that failed.

    items: an :class:`Item` or bare value each. A file's content (``bytes``) or a ``Path`` is right for every scorer but
    those of tables; for pictures, ``uint8[height, width, 3]`` too. For a scorer of tables a ``pyarrow.Table``, each
    row an item; columns that it does not take are left out.
    Raises SpecError if the table lacks a column, TallyError if the scorer does not return one result per item.
    """
    size = scorer.batch_size
    results: list[Result] = []
    if scorer.input == "table":
        table = _columns(scorer, items)
        for start in range(0, table.num_rows, size):
            batch = table.slice(start, size)
            results += _results(scorer, batch, batch.num_rows)
        return results
    for start in range(0, len(items), size):
        with _given(scorer, items[start : start + size], start) as batch:
            prepared = [prepare(scorer, item) if isinstance(item, Item) else item for item in batch]
            good = [value for value in prepared if not isinstance(value, ItemError)]
            scored = iter(_results(scorer, good, len(good)) if good else [])
            results += [value if isinstance(value, ItemError) else next(scored) for value in prepared]
    return results


def prepare(scorer: Scorer, item: Item) -> Any:
    """What the scorer makes of one item, or its ItemError (stage ``decode`` or ``prepare``).

    item: its value is what the scorer's ``input`` says; of pictures, it may be the file's content.
    """
    try:
        item = _fitting(scorer, item)
    except ItemError as error:
        return error.bare()
    try:
        return scorer.prepare(item)
    except TallyError as error:
        return ItemError(error.message, stage="prepare", hint=error.hint)
    except Exception as error:
        return ItemError(error_line(error), stage="prepare")


def score(scorer: Scorer, values: Any, count: int) -> list[Part]:
    """The results of a batch in parts, in order. If scoring raises, the batch is halved until the items that raise
    alone are found.

    values: a sequence of prepared values, or a ``pyarrow.Table``; ``count`` items of it.
    Raises TallyError if the scorer does not return one result per item.
    """
    try:
        results: Any = scorer.score(values)
    except Exception as error:
        if count == 1:
            return [Part(1, [None], {0: item_error(error)})]
        half = count // 2
        return [
            *score(scorer, values[:half], half),
            *score(scorer, values[half:], count - half),
        ]
    errors: Mapping[int, Exception] = {}
    if isinstance(results, TableResult):
        results, errors = results.rows, results.errors
    if hasattr(results, "num_rows"):
        _check_length(scorer, results.num_rows, count)
    else:
        # A mapping has a length too: somebody returned one row instead of a list of them.
        if not hasattr(results, "__len__") or isinstance(results, (Mapping, str, bytes)):
            raise TallyError(
                f"{type(scorer).__name__}.score returned {type(results).__name__}, "
                "not a sequence with one result per item"
            )
        _check_length(scorer, len(results), count)
        errors = {index: result for index, result in enumerate(results) if isinstance(result, Exception)}
    return [Part(count, results, {index: item_error(error) for index, error in errors.items()})]


def item_error(error: Exception) -> ItemError:
    """What scoring raised, as the error of one item; of an exception that is not ours, with the line that raised it."""
    if isinstance(error, ItemError):
        return error.bare()
    if isinstance(error, TallyError):
        return ItemError(error.message, hint=error.hint)
    place = raised_at(error)
    return ItemError(f"{error_line(error)} ({place})" if place else error_line(error))


def _results(scorer: Scorer, values: Any, count: int) -> list[Result]:
    return [result for part in score(scorer, values, count) for result in part.to_list()]


def _check_length(scorer: Scorer, given: int, count: int) -> None:
    if given != count:
        raise TallyError(
            f"{type(scorer).__name__}.score returned {given} results for {count} items",
            hint="Return one result per item, in the same order; an exception object for an item that failed.",
        )


@contextmanager
def _given(scorer: Scorer, items: Sequence[Any], first: int) -> Iterator[list[Item | ItemError]]:
    """The values as items, files read, or, for a scorer of paths, contents written to files until the end."""
    found = [each if isinstance(each, Item) else Item(str(at), each) for at, each in enumerate(items, first)]
    if scorer.input != "path":
        yield [_read(item) if isinstance(item.value, Path) else item for item in found]
    elif not any(isinstance(item.value, (bytes, bytearray, memoryview)) for item in found):
        yield [*found]
    else:
        with temporary.folder("items") as folder:
            yield [_written(item, folder / str(at)) for at, item in enumerate(found)]


def _read(item: Item) -> Item | ItemError:
    try:
        return replace(item, value=item.value.read_bytes())
    except OSError as error:
        return ItemError(f"cannot read {item.value}: {error.strerror or error}", stage="read")


def _written(item: Item, folder: Path) -> Item:
    if not isinstance(item.value, (bytes, bytearray, memoryview)):
        return item
    folder.mkdir()
    name = file_name(item.key).replace("\0", "")
    path = folder / ("item" if name in ("", ".", "..") else name)
    path.write_bytes(item.value)
    return replace(item, value=path)


def _fitting(scorer: Scorer, item: Item) -> Item:
    """The item with its value as the scorer's ``input`` says: pictures are decoded. Raises ItemError."""
    value, wanted = item.value, scorer.input
    if wanted in ("image", "frame"):
        if isinstance(value, (bytes, bytearray, memoryview)):
            from tally.media import images  # with NumPy, which scorers of other values may not need

            picture, info = images.decode(bytes(value), scorer.size)
            return Item(item.key, picture, {**info, **item.info})
        fits = hasattr(value, "shape") and value.dtype == "uint8" and len(value.shape) == 3 and value.shape[2] == 3
        takes = "a picture: a file's content, or uint8[height, width, 3]"
    elif wanted == "path":
        fits, takes = isinstance(value, (str, Path)), "the path of a file"
    else:
        fits, takes = isinstance(value, (bytes, bytearray, memoryview)), "a file's content (bytes)"
    if not fits:
        kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise ItemError(f"{type(scorer).__name__} takes {takes}, not {kind}", stage="prepare")
    return item


def _columns(scorer: Scorer, table: Any) -> pa.Table:
    """The columns that the scorer takes: those of its key, then the features."""
    if not hasattr(table, "column_names"):
        raise SpecError(f"{type(scorer).__name__} takes a pyarrow.Table, not {type(table).__name__}")
    names: list[str] = table.column_names
    others = [name for name in names if name not in scorer.by]
    features = others if scorer.features is None or isinstance(scorer.features, int) else list(scorer.features)
    if isinstance(scorer.features, int) and len(others) != scorer.features:
        raise SpecError(f"the model takes {scorer.features} columns, and there are {len(others)}: {', '.join(others)}")
    wanted = dict.fromkeys([*scorer.by, *features])
    if missing := [name for name in wanted if name not in names]:
        raise SpecError(
            [f"the model takes a column {name!r}{did_you_mean(name, names)}" for name in missing],
            hint=f"There are {', '.join(names)}.",
        )
    return table.select(list(wanted))
