"""Lists of items: a table with a column of references, or a text with one on each line.

A list is read a page at a time, and planning goes on at any page: memory is flat however long the list is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.masking import mask
from tally.media.images import suffixes
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit, Timings
from tally.sources.listing import is_table
from tally.sources.sql.factory import is_sql
from tally.sources.sql.source import SqlSource
from tally.sources.tables.formats import format_of
from tally.sources.tables.source import TableSource
from tally.storage import Store, is_url, key_of, open_store
from tally.text import did_you_mean

PAGE = 8192
"""Rows that are read of a table at once."""
_FORM = "--items names a file with one path or URL on each line, or a table."
_PAGE_BYTES = 1 << 19
"""Bytes that are read of a text at once, to the end of a line."""
_NAMES = ("image", "path", "file", "filename", "file_name", "filepath", "url", "uri", "reference", "item")
"""What columns of references are called, where a list does not say which one it is."""


@dataclass(frozen=True, slots=True)
class Page:
    """Items that follow each other. at: what :meth:`ItemList.pages` takes to begin with this page.

    references: of each item, or why it has none. keys: of each. kept: a ``pyarrow.Table`` of the kept columns, with a
    row for each item; None if there are none.
    """

    at: Any
    references: Sequence[str | ItemError]
    keys: Sequence[str]
    kept: Any = None


class ItemList(ABC):
    """Small and picklable; nothing is read before it is asked for.

    place: path or URL of the list.
    """

    place: str

    @property
    def columns(self) -> Mapping[str, str]:
        """The kept columns: name to Arrow type name."""
        return {}

    def located(self, work: str | None) -> ItemList:
        """See :meth:`tally.sources.base.Source.located`."""
        return self

    def prepare(self) -> None:  # noqa: B027  # most lists are read as they are
        """See :meth:`tally.sources.base.Source.prepare`."""

    def indivisible(self) -> str | None:
        """See :meth:`tally.sources.base.Source.indivisible`."""
        return None

    def remark(self) -> str | None:
        """See :meth:`tally.sources.base.Source.remark`."""
        return None

    @abstractmethod
    def pages(self, at: Any = None) -> Iterator[Page]:
        """The pages from ``at`` on (None: from the start). Raises SourceChangedError if the list has changed."""


def open_list(
    place: str,
    *,
    item_column: str | None = None,
    key: str | None = None,
    keep: Sequence[str] = (),
    where: str | None = None,
    csv: Mapping[str, Any] | None = None,
    query: str | None = None,
) -> ItemList:
    """The list at a path or URL: a table by its name, a database, or else a text with one reference on each line.

    item_column: the column of references; found by its name, or as the only one. key: the column of the items' keys,
    else they are the references. keep, where, csv: as for tables. query: of a database.
    Raises SpecError with what is wrong, SourceNotFoundError, StorageError.
    """
    name = place.rpartition("/")[2]
    of: Callable[..., TableSource]
    if is_sql(place):
        of = partial(SqlSource.of, place, query)
        return TableList.describe(place, of, item_column=item_column, key=key, keep=keep, where=where)
    if is_table(name) or format_of(name) == "json" or csv:
        of = partial(TableSource.describe, [place], csv=csv, exact=True)
        return TableList.describe(place, of, item_column=item_column, key=key, keep=keep, where=where)
    if asked := [said for said, given in _asked(item_column, key, keep, where) if given]:
        raise SpecError(
            f"{asked[0]}: {key_of(place)} is taken for a text with one reference on each line, which has no columns",
            hint="Lists with columns are .csv, .parquet or .jsonl files; --csv header=true reads any other as CSV.",
        )
    store, inner = _parted(place)
    try:
        size, mark = store.marked(inner)
    except SourceNotFoundError:
        raise SourceNotFoundError(
            f"there is no list {key_of(place)}",
            hint=_FORM,
        ) from None
    if not size:
        raise SourceNotFoundError(
            f"the list {key_of(place)} is empty",
            hint=_FORM,
        )
    return TextList(place, mark)


def _asked(*given: Any) -> list[tuple[str, Any]]:
    return list(zip(("item_column", "key", "keep", "where"), given, strict=True))


def _parted(place: str) -> tuple[Store, str]:
    folder, _, name = place.rpartition("/")
    return open_store(folder or "/"), name


@dataclass(frozen=True)
class TextList(ItemList):
    """A text with one reference on each line; blank lines count for nothing. mark: of its content."""

    place: str
    mark: str

    def pages(self, at: Any = None) -> Iterator[Page]:
        """See :meth:`ItemList.pages`. ``at`` is the number of a byte, and of the line that begins there."""
        store, name = _parted(self.place)
        at = at or [0, 0]
        with store.local_path(name, mark=self.mark).open("rb") as file:
            file.seek(at[0])
            while lines := file.readlines(_PAGE_BYTES):
                references, keys = [], []
                number = at[1]
                for line in lines:
                    number += 1
                    if reference := _text_of(line, first=number == 1):
                        references.append(reference)
                        keys.append(f"{name}/{number}")
                found, keys = _with_keys(references, None, keys)
                if found:
                    yield Page(at, found, keys)
                at = [at[0] + sum(map(len, lines)), number]
        store.check_mark(name, self.mark)


def _text_of(line: bytes, *, first: bool) -> str:
    if first:
        line = line.removeprefix(b"\xef\xbb\xbf")
    return line.decode("utf-8", "surrogateescape").strip(" \t\r\n")


def _with_keys(
    references: Sequence[str], given: Sequence[str | None] | None, places: Sequence[str]
) -> tuple[list[str | ItemError], list[str]]:
    """The references, or why they are none, and the items' keys.

    given: keys of a column; without, the references are, without secrets. places: where in the list each item stands,
    which is the key of what has no other.
    """
    found: list[str | ItemError] = list(references)
    if given is not None:
        keys = [place if key is None else key for key, place in zip(given, places, strict=True)]
    elif _PLAIN.fullmatch("\n".join(references)):
        return found, list(references)
    else:
        keys = [each if _PLAIN.fullmatch(each) else key_of(mask(each)) for each in references]
    for n, each in enumerate(references):
        if "\0" in each or len(each) > _LONGEST:
            found[n] = ItemError(f"{each[:80]!r} is no reference to a file", stage="read")
            keys[n] = places[n]
    return found, keys


_PLAIN = re.compile(r"(?:[\w./+: -]{0,1000}(?:\n|$))*")
"""References, one on each line, that hold no secret, and are what any database takes."""
_LONGEST = 8192
"""Characters that a reference may have."""


@dataclass(frozen=True)
class TableList(ItemList):
    """A table with a column of references. rows: the table, whose features are the references and keys."""

    place: str
    rows: TableSource
    item_column: str
    key: str | None

    @classmethod
    def describe(
        cls,
        place: str,
        of: Callable[..., TableSource],
        *,
        item_column: str | None,
        key: str | None,
        keep: Sequence[str],
        where: str | None,
    ) -> TableList:
        """See :func:`open_list`. of: makes the table of some columns."""
        if item_column is None:
            item_column = _found(place, of(features=None).features)
        features = list(dict.fromkeys([item_column, *([] if key is None else [key])]))
        try:
            rows = of(features=features, keep=keep, where=where)
        except SpecError:
            columns = of(features=None).features
            for said, name in (("item_column", item_column), ("key", key)):
                if name is not None and name not in columns:
                    raise SpecError(
                        f"{said}: {key_of(place)} has no column {name!r}{did_you_mean(name, columns)}",
                        hint=_there(columns),
                    ) from None
            raise
        return cls(place, rows, item_column, key)

    @property
    def columns(self) -> Mapping[str, str]:
        return self.rows.columns

    def located(self, work: str | None) -> ItemList:
        return replace(self, rows=self.rows.located(work))

    def prepare(self) -> None:
        self.rows.prepare()

    def indivisible(self) -> str | None:
        return self.rows.indivisible()

    def remark(self) -> str | None:
        return self.rows.remark()

    def pages(self, at: Any = None) -> Iterator[Page]:
        """See :meth:`ItemList.pages`. ``at`` is the rows' own cursor."""
        scorer = Scorer()
        scorer.input, scorer.batch_size = "table", PAGE
        for chunk in self.rows.plan(at, 0, lambda: ChunkLimit(PAGE, 1 << 50)):
            for batch in self.rows.read(chunk, scorer, Timings()):
                if page := self._page(at, batch, self.rows.keys(chunk)):
                    yield page
            at = chunk.cursor

    def _page(self, at: Any, batch: Any, row_keys: Sequence[str]) -> Page | None:
        import pyarrow as pa

        found: list[str | ItemError] = []
        keys: list[str] = []
        kept = batch.info
        if len(batch.keys):
            values = _texts(batch.values.column(self.item_column))
            given = None if self.key is None else _texts(batch.values.column(self.key))
            places = batch.keys.to_pylist()
            found, keys = _with_keys([each or "" for each in values], given, places)
            for n, value in enumerate(values):
                if not value:
                    found[n] = ItemError(f"the column {self.item_column} is empty there", stage="read")
                elif given is not None and not given[n]:
                    found[n] = ItemError(f"the column {self.key} is empty there", stage="read")
                else:
                    continue
                keys[n] = places[n]
            if kept is not None and self.item_column in kept.column_names and given is None and keys != values:
                # What a URL carries to be let in is not for results.
                index = kept.schema.get_field_index(self.item_column)
                shown = [None if each is None else mask(each) for each in values]
                kept = kept.set_column(index, self.item_column, pa.array(shown, pa.string()))
        if batch.dead:
            for position, error in batch.dead:
                found.append(error)
                keys.append(row_keys[position])
            if self.columns:
                lines = pa.table({name: pa.nulls(len(batch.dead)) for name in self.columns})
                kept = lines if kept is None else pa.concat_tables([kept, lines], promote_options="permissive")
        return Page(at, found, keys, kept) if found else None


def _texts(column: Any) -> list[str | None]:
    """The values of a column as text."""
    return [each if each is None or type(each) is str else str(each) for each in column.to_pylist()]


def _found(place: str, columns: Sequence[str]) -> str:
    """The column of references. Raises SpecError where it is not clear which one that is."""
    if len(columns) == 1:
        if is_url(columns[0]) or Path(columns[0]).suffix.lower() in suffixes():
            raise SpecError(
                f"the first line of {key_of(place)} is taken for the name of its column, and {columns[0]!r} looks like "
                "an item",
                hint="Without names of columns: --csv header=false, or call it .txt. If it is a name: --item-column "
                f"{columns[0]!r}",
            )
        return columns[0]
    likely = [name for name in columns if name.lower() in _NAMES]
    if len(likely) == 1:
        return likely[0]
    why = f"{' and '.join(likely)} could be it" if likely else "none is called so"
    raise SpecError(
        f"it is not clear which column of {key_of(place)} holds the references: {why}",
        hint=f"Say it: --item-column NAME. {_there(columns)}",
    )


def _there(columns: Sequence[str]) -> str:
    return f"There are {', '.join(columns[:20])}{' ...' if len(columns) > 20 else ''}"
