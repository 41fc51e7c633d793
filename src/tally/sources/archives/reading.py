"""Reading members of an archive ahead of scoring: neighbours by one request, those of a compressed tar in order."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tally.errors import ItemError, StorageAwayError, TallyError, error_line
from tally.scorers.base import Input, Scorer
from tally.sources.archives.members import Form, Unpacked, opened
from tally.sources.locations import Location
from tally.sources.reading import FileReader
from tally.storage import Store, temporary

_GAP = 64 * 2**10
"""Bytes between two members that are read with them, rather than asked for apart."""
_BLOCK = 8 * 2**20
"""The most bytes that are read at once, unless one member has more."""
MAX_SIDECAR = 2**20

Span = Sequence[int]
"""See :class:`tally.sources.archives.members.Member`."""


_Loaded: TypeAlias = "dict[tuple[int, ...], bytes | ItemError]"


class MemberReader(FileReader):
    """The reader of one chunk's members.

    spans: of each item; None where it is dead, which ``errors`` then tells why. beside: for each column that is kept,
    the span of each item's member, or None where it has none.
    """

    def __init__(
        self,
        location: Location,
        store: Store,
        archive: str,
        mark: str,
        form: Form,
        keys: Sequence[str],
        spans: Sequence[Span | None],
        errors: Mapping[int, str],
        beside: Mapping[str, Sequence[Span | None]],
        input: Input,  # noqa: A002  # the scorer's word
        scorer: Scorer,
    ) -> None:
        super().__init__(location, store, [archive] * len(keys), keys, [mark] * len(keys), input, scorer)
        self.info: dict[int, dict[str, str | None]] = {}
        """The columns of each item that was read."""
        self._archive, self._mark, self._form = archive, mark, form
        self._spans, self._errors, self._beside = spans, errors, beside
        self._mine = threading.local()  # .loaded: what the run of this thread has read
        self._lock = threading.Lock()
        self._passed: _Loaded = {}
        self._shared = {tuple(span) for each in beside.values() for span in each if span is not None}
        self._file: Any = None
        self._unpacked: Unpacked | None = None

    def open(self) -> None:
        """Make the folder of members that are given as paths. :meth:`close` removes it."""
        if self._input == "path":
            self._folder = temporary.make("items")

    def close(self) -> None:
        super().close()
        for each in (self._unpacked, self._file):
            if each is not None:
                each.close()

    def run(self, start: int, stop: int) -> tuple[list[Any], float, float, int]:
        began = time.perf_counter()
        wanted = sorted({tuple(span) for position in range(start, stop) for span in self._of(position)})
        try:
            if self._form in ("tar", "zip"):
                self._mine.loaded = self._load(wanted)
            else:
                self._mine.loaded = self._load_in_order(wanted)
        except StorageAwayError:
            raise
        except TallyError as error:
            self._location.check_root()
            self._mine.loaded = _failed(wanted, error)
        loaded = time.perf_counter() - began
        try:
            values, reading, decoding, held = super().run(start, stop)
        finally:
            self._mine.loaded = {}
        return values, reading + loaded, decoding, held

    def _of(self, position: int) -> list[Span]:
        """Where an item's member and those beside it are."""
        spans = (self._spans[position], *(each[position] for each in self._beside.values()))
        return [span for span in spans if span is not None] if position not in self._errors else []

    # -- from anywhere -----------------------------------------------------------------------------

    def _load(self, wanted: Sequence[tuple[int, ...]]) -> _Loaded:
        loaded: _Loaded = {}
        at = 0
        while at < len(wanted) and not self.closed:
            begin, end, stop = wanted[at][0], sum(wanted[at][:2]), at + 1
            while stop < len(wanted) and wanted[stop][0] - end <= _GAP and sum(wanted[stop][:2]) - begin <= _BLOCK:
                end = max(end, sum(wanted[stop][:2]))
                stop += 1
            group, at = wanted[at:stop], stop
            try:
                data = memoryview(self._store.read_range(self._archive, begin, end - begin, mark=self._mark))
            except StorageAwayError:
                raise
            except TallyError as error:
                self._location.check_root()
                loaded |= _failed(group, error)
                continue
            for span in group:
                loaded[span] = self._content(data[span[0] - begin : sum(span[:2]) - begin], span)
        return loaded

    def _content(self, data: memoryview, span: tuple[int, ...]) -> bytes | ItemError:
        if len(data) < span[1]:
            return ItemError("the archive ends within it", stage="read")
        return bytes(data) if self._form == "tar" else _unzipped(data, *span[2:])

    # -- in order ----------------------------------------------------------------------------------

    def _load_in_order(self, wanted: Sequence[tuple[int, ...]]) -> _Loaded:
        """Read on to the last that is wanted. What other runs want of what is passed is kept for them."""
        if not wanted:
            return {}
        with self._lock:
            if self._unpacked is None:
                size = self._store.marked(self._archive)[0]
                self._file = opened(self._store, self._archive, size, self._mark)
                self._unpacked = Unpacked(self._file, self._form)
                every = {tuple(span) for position in range(len(self._spans)) for span in self._of(position)}
                self._upcoming = sorted(every, reverse=True)
            while self._upcoming and self._upcoming[-1] <= wanted[-1] and not self.closed:
                start, size = self._upcoming[-1]
                self._unpacked.seek(start)
                data = self._unpacked.read(size)
                self._passed[start, size] = (
                    data if len(data) == size else ItemError("the archive ends within it", stage="read")
                )
                self._upcoming.pop()
            loaded = {span: self._passed[span] for span in wanted if span in self._passed}
            for span in wanted:
                if span not in self._shared:
                    self._passed.pop(span, None)
            return loaded

    # -- one item ----------------------------------------------------------------------------------

    def fetch(self, position: int) -> Any:
        if position in self._errors:
            raise ItemError(self._errors[position], stage="read")
        try:
            span = self._spans[position]
            assert span is not None
            columns = {name: self._text(name, spans[position]) for name, spans in self._beside.items()}
            content = self._taken(span)
            self.info[position] = columns
            return self.handed(position, content)
        except TallyError:
            raise
        except Exception as error:
            raise ItemError(error_line(error), stage="read") from None

    def _taken(self, span: Span) -> bytes:
        found: bytes | ItemError = self._mine.loaded[tuple(span)]
        if isinstance(found, ItemError):
            raise ItemError(found.message, stage="read", hint=found.hint)
        return found

    def _text(self, name: str, span: Span | None) -> str | None:
        if span is None:
            return None
        try:
            return self._taken(span).decode()
        except UnicodeDecodeError:
            raise ItemError(f"what belongs to it as .{name} is no text in UTF-8", stage="read") from None


def _failed(spans: Sequence[tuple[int, ...]], error: TallyError) -> _Loaded:
    return {span: ItemError(error.message, stage="read", hint=error.hint) for span in spans}


def _unzipped(data: memoryview, size: int, packed: int, method: int, checksum: int) -> bytes | ItemError:
    """The content of a ZIP's member, from its own header on."""
    if bytes(data[:4]) != b"PK\x03\x04":
        return ItemError("it is not where the archive's directory says", stage="read")
    start = 30 + sum(struct.unpack("<HH", data[26:30]))
    raw = data[start : start + packed]
    if len(raw) < packed:
        return ItemError("it reaches into the next one: the archive is damaged", stage="read")
    if method == 0:
        content = bytes(raw)
    else:
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unpacking.decompress(raw, size + 1)
        except zlib.error as error:
            return ItemError(f"its compressed content is damaged: {error}", stage="read")
    if len(content) != size or zlib.crc32(content) != checksum:
        return ItemError("its content is not what the archive's directory says: it is damaged", stage="read")
    return content
