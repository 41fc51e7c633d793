"""Scoring without a job: values in, results out, and an item that fails costs no other item its result.

Jobs read items before this and write results after it; endpoints put a queue before it. No database, source or sink
takes part, and for pictures no Arrow either.

Threads: :func:`prepare` may run in several threads at once. :func:`score` and :func:`run` of one scorer are for one
thread at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tally.errors import (
    ItemError,
    ModelRefutedError,
    SpecError,
    TallyError,
    error_line,
    is_interrupt,
    raised_at,
)
from tally.media import images
from tally.media.images import Decoding
from tally.scorers import declared
from tally.scorers.base import Item, Result, Scorer, TableResult
from tally.storage import file_name, temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

Anew: TypeAlias = Callable[[int, int], AbstractContextManager[Any]]
"""The values ``start <= p < stop`` of a batch as they were before it was scored, for as long as the context lasts.

A scorer may change what it is given, whether it then raises or not, so nothing that it was given is scored again.
Entering raises ItemError where one of the values can no longer be had.
"""


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


def configured(
    scorer: Scorer,
    *,
    overlay: bool = False,
    thumbnails: int | None = None,
    batch_size: int | None = None,
    decoding: Decoding | None = None,
) -> Scorer:
    """The scorer as a job or an endpoint asks for it. overlay: its rows are drawn onto the pictures. thumbnails: a
    small picture of each item comes with its result, of so many pixels. decoding: how pictures are decoded.

    Raises ModelLoadError if it declares what no scorer may, SpecError if its results cannot be drawn, or it gives no
    rows for several pictures of a file.
    """
    declared.check(scorer)
    if overlay:
        from tally.scorers.vision.overlay import Overlay

        scorer = Overlay(scorer)
    if thumbnails is not None:
        from tally.scorers.vision.thumbnails import Thumbnails

        scorer = Thumbnails(scorer, thumbnails)
    if batch_size is not None:
        scorer.batch_size = batch_size
    if decoding is not None and decoding.pages == "all":
        from tally.scorers.vision.pages import Pages

        scorer = Pages(scorer)
    if decoding is not None:
        scorer.decoding = decoding
    return scorer


def memory_of(scorer: Scorer) -> Callable[[], None]:
    """What has the scorer forget all that items show it from now on.

    For scorers of Tally's own, which keep that in plain attributes: how many values still have to bear out what the
    model was taken for, what was assumed, whether softmax is applied.
    """
    around = getattr(scorer, "scorer", None)  # of one that is around another
    inner = None if around is None else memory_of(around)
    before = dict(vars(scorer))

    def forget() -> None:
        vars(scorer).clear()
        vars(scorer).update(before)
        if inner is not None:
            inner()

    return forget


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
        table = columns(scorer, items)
        for start in range(0, table.num_rows, size):
            batch = table.slice(start, size)
            results += _results(scorer, copied(batch, 0, batch.num_rows), batch.num_rows, copies_of(batch))
        return results
    found = [each if isinstance(each, Item) else Item(str(at), each) for at, each in enumerate(items)]
    for start in range(0, len(found), size):
        results += _run(scorer, found[start : start + size])
    return results


def _run(scorer: Scorer, items: Sequence[Item]) -> list[Result]:
    """The results of one batch."""
    with _prepared(scorer, items) as prepared:
        return finish(scorer, items, prepared)


def finish(scorer: Scorer, items: Sequence[Item], prepared: Sequence[Any]) -> list[Result]:
    """The results of one batch: one for each item; the ItemError of each that failed.

    prepared: what :func:`prepare` made of each item. Items are prepared again where scoring raised.
    """
    good = [at for at, value in enumerate(prepared) if not isinstance(value, ItemError)]

    @contextmanager
    def anew(start: int, stop: int) -> Iterator[list[Any]]:
        with _prepared(scorer, [items[at] for at in good[start:stop]]) as values:
            for value in values:
                if isinstance(value, ItemError):
                    raise value
            yield values

    scored = iter(_results(scorer, [prepared[at] for at in good], len(good), anew) if good else [])
    return [value if isinstance(value, ItemError) else next(scored) for value in prepared]


@contextmanager
def _prepared(scorer: Scorer, items: Sequence[Item]) -> Iterator[list[Any]]:
    """What the scorer makes of each item, or its ItemError. It never changes the caller's values."""
    with _given(scorer, items) as given:
        yield [prepare(scorer, item) if isinstance(item, Item) else item for item in given]


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
    except BaseException as error:
        if is_interrupt(error):
            raise
        return ItemError(error_line(error), stage="prepare")


def score(scorer: Scorer, values: Any, count: int, anew: Anew) -> list[Part]:
    """The results of a batch in parts, in order. If scoring raises, the batch is halved until the items that raise
    alone are found.

    values: a sequence of prepared values, or a ``pyarrow.Table``; ``count`` items of it. anew: the halves of it.
    Raises TallyError if the scorer does not return one result per item; ModelRefutedError, which is no item's fault.
    """
    return _scored(scorer, values, 0, count, anew)


def _scored(scorer: Scorer, values: Any, start: int, stop: int, anew: Anew) -> list[Part]:
    try:
        results, errors = _results_of(scorer.score(values))
    except ModelRefutedError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        return _halved(scorer, start, stop, error, anew)
    _check(scorer, results, stop - start)
    return [Part(stop - start, results, errors)]


def _halved(scorer: Scorer, start: int, stop: int, error: BaseException, anew: Anew) -> list[Part]:
    if stop - start == 1:
        return [Part(1, [None], {0: item_error(error)})]
    middle = (start + stop) // 2
    return [*_again(scorer, start, middle, anew), *_again(scorer, middle, stop, anew)]


def _again(scorer: Scorer, start: int, stop: int, anew: Anew) -> list[Part]:
    try:
        with anew(start, stop) as values:
            return _scored(scorer, values, start, stop, anew)
    except ItemError as error:
        return _halved(scorer, start, stop, error, anew)


def copies_of(values: Any) -> Anew:
    """Copies of values that nobody changes."""

    @contextmanager
    def anew(start: int, stop: int) -> Iterator[Any]:
        yield copied(values, start, stop)

    return anew


def copied(values: Any, start: int, stop: int) -> Any:
    """A copy of ``values[start:stop]`` that shares no memory with it. values: a sequence, or a ``pyarrow.Table``."""
    if hasattr(values, "num_rows"):
        return values.take(list(range(start, stop)))
    return copy.deepcopy(values[start:stop])


def _results_of(returned: Any) -> tuple[Any, Mapping[int, ItemError]]:
    """The results that a scorer returned, and the errors among them, by position. Raises what they raise."""
    errors: Mapping[int, BaseException] = {}
    if isinstance(returned, TableResult):
        returned, errors = returned.rows, returned.errors
    elif hasattr(returned, "__len__") and not _is_one(returned) and not hasattr(returned, "num_rows"):
        if not isinstance(returned, (list, tuple)) and not hasattr(returned, "dtype"):
            returned = list(returned)  # of somebody's own class
        errors = {index: result for index, result in enumerate(returned) if isinstance(result, BaseException)}
    return returned, {index: item_error(error) for index, error in errors.items()}


def _is_one(returned: Any) -> bool:
    # A mapping has a length too: somebody returned one row instead of a list of them.
    return isinstance(returned, (Mapping, str, bytes))


def _check(scorer: Scorer, results: Any, count: int) -> None:
    """Raises TallyError if it is not one result per item."""
    if hasattr(results, "num_rows"):
        given = results.num_rows
    elif hasattr(results, "__len__") and not _is_one(results):
        given = len(results)
    else:
        raise TallyError(
            f"{type(scorer).__name__}.score returned {type(results).__name__}, not a sequence with one result per item"
        )
    if given != count:
        raise TallyError(
            f"{type(scorer).__name__}.score returned {given} results for {count} items",
            hint="Return one result per item, in the same order; an exception object for an item that failed.",
        )


def item_error(error: BaseException) -> ItemError:
    """What scoring raised, as the error of one item; of an exception that is not ours, with the line that raised it."""
    if isinstance(error, ItemError):
        return error.bare()
    if isinstance(error, TallyError):
        return ItemError(error.message, hint=error.hint)
    place = raised_at(error)
    return ItemError(f"{error_line(error)} ({place})" if place else error_line(error))


def _results(scorer: Scorer, values: Any, count: int, anew: Anew) -> list[Result]:
    return [result for part in score(scorer, values, count, anew) for result in part.to_list()]


@contextmanager
def _given(scorer: Scorer, items: Sequence[Item]) -> Iterator[list[Item | ItemError]]:
    """The items with files read, or, for a scorer of paths, contents written to files until the end."""
    if scorer.input != "path":
        yield [_read(item) if isinstance(item.value, Path) else _own(item) for item in items]
    elif not any(isinstance(item.value, (bytes, bytearray, memoryview)) for item in items):
        yield [*items]
    else:
        with temporary.folder("items") as folder:
            yield [_written(item, folder / str(at)) for at, item in enumerate(items)]


def _own(item: Item) -> Item:
    """The item with a value that the caller does not share, if it can be changed."""
    if isinstance(item.value, (bytearray, memoryview)):
        return replace(item, value=bytes(item.value))
    return replace(item, value=item.value.copy()) if hasattr(item.value, "shape") else item


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
            decoding = scorer.decoding
            if decoding.pages == "all":
                return item  # it goes through them itself
            picture, info = images.decode(
                bytes(value),
                scorer.size,
                max_pixels=decoding.max_pixels,
                background=decoding.background,
                tell=scorer.assume,
            )
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


def columns(scorer: Scorer, table: Any) -> pa.Table:
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
