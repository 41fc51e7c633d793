"""Items that a list names: files of this machine, objects in buckets and files of the web, mixed.

A chunk's payload holds the references themselves, so that any worker reads exactly those, and of files of this machine
the marks that they had. What is in a bucket or on the web is what it is when it is read.

Where this process may not connect to private addresses, whoever wrote the list is not thereby let into this machine:
a file must lie below the folder that relative references begin in.
"""

from __future__ import annotations

import base64
import io
import json
import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tally import network
from tally.errors import (
    ItemError,
    SourceNotFoundError,
    SpecError,
    StorageAwayError,
    StorageError,
    TallyError,
    error_line,
)
from tally.masking import HIDDEN, mask
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.listing import is_video
from tally.sources.lists import ItemList, Page
from tally.sources.reading import AHEAD, REMOTE_THREADS, Reader, read_ahead
from tally.sources.sql.factory import is_sql
from tally.storage import (
    LocalStore,
    is_url,
    is_web,
    key_of,
    local_of,
    name_from_json,
    name_to_json,
    open_store,
    temporary,
    web,
)

_COMBINE = 4096
_SHOWN = 5
"""Keys that are named where several items have the same."""
_LISTS = ("references", "keys", "marks", "errors")
"""What a payload holds of each item."""


@dataclass(frozen=True)
class ReferenceSource(Source):
    """Make it with :meth:`describe`; small, immutable, picklable.

    items: the list. base: path or URL of the folder that relative references begin in. confined: files of this machine
    must lie in that folder.
    """

    accepts: ClassVar = frozenset[Input]({"image", "bytes", "path"})

    items: ItemList
    input: Input
    base: str
    confined: bool = False

    @classmethod
    def describe(
        cls,
        items: ItemList,
        input: Input,  # noqa: A002  # the scorer's word
        *,
        base: str | None = None,
    ) -> ReferenceSource:
        """The source of what the list names. base: where relative references begin; by default, the list's folder.

        Raises SpecError if references cannot be given as ``input``.
        """
        cls.check(input)
        base = base.rstrip("/") if base is not None else items.place.rpartition("/")[0]
        return cls(items, input, base or "/", network.ALLOWED in os.environ)

    @classmethod
    def check(cls, input: Input) -> None:  # noqa: A002
        """Raises SpecError if references cannot be given as ``input``."""
        if input not in cls.accepts:
            what = {"table": "tables", "frame": "frames of videos"}.get(input, input)
            raise SpecError(
                f"items: a list names pictures and files, and the model is given {what}",
                hint="Name the tables or videos themselves as the source.",
            )

    @property
    def columns(self) -> Mapping[str, str]:
        """See :attr:`Source.columns`."""
        return self.items.columns

    def located(self, work: str | None) -> ReferenceSource:
        """See :meth:`Source.located`."""
        return replace(self, items=self.items.located(work))

    def indivisible(self) -> str | None:
        """See :meth:`Source.indivisible`."""
        return self.items.indivisible()

    def remark(self) -> str | None:
        """See :meth:`Source.remark`."""
        return self.items.remark()

    def prepare(self) -> None:
        """Make the list ready, and check that no two items have the same key. Raises SpecError."""
        self.items.prepare()
        hashes = array("q")
        for page in self.items.pages():
            hashes.extend(map(hash, page.keys))
        if not hashes:
            raise SourceNotFoundError(f"nothing to score: {key_of(self.items.place)} names no items")
        import numpy as np

        found = np.sort(np.frombuffer(hashes, np.int64))
        twice = {int(each) for each in found[1:][found[1:] == found[:-1]]}
        if twice:
            self._refuse(twice)

    def _refuse(self, twice: set[int]) -> None:
        """Raises SpecError that names the keys of these hashes that several items have."""
        counts: Counter[str] = Counter()
        for page in self.items.pages():
            counts.update(key for key in page.keys if hash(key) in twice)
        several = [(key, count) for key, count in counts.items() if count > 1]
        if not several:
            return  # two keys of one hash
        shown = ", ".join(f"{key!r} ({count:,} times)" for key, count in several[:_SHOWN])
        more = f" and {len(several) - _SHOWN:,} others" if len(several) > _SHOWN else ""
        hidden = " What follows ? in a URL may be a secret, and is not in its key." if HIDDEN in shown else ""
        raise SpecError(
            f"items: in {key_of(self.items.place)} several items have the same key: {shown}{more}",
            hint=f"Name each item once, or say with --key which column tells them apart.{hidden}",
        )

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        """See :meth:`Source.plan`. The cursor says which page a chunk ends in, and after how many of its items."""
        at, offset = (None, 0) if after is None else json.loads(after)
        for page in self.items.pages(at):
            while offset < len(page.keys):
                bound = limit()
                stop = min(offset + bound.items, len(page.keys))
                resolved: list[str | ItemError] = []
                marks: list[str] = []
                total = 0
                for reference in page.references[offset:stop]:
                    place = self._resolved(reference)
                    size, mark = _looked_up(place)
                    if resolved and total + size > bound.bytes:
                        break
                    total += size
                    resolved.append(place)
                    marks.append(mark)
                stop = offset + len(resolved)
                yield self._chunk(page, offset, stop, resolved, marks, first)
                first += stop - offset
                offset = stop
            offset = 0

    def _chunk(
        self, page: Page, start: int, stop: int, places: Sequence[str | ItemError], marks: list[str], first: int
    ) -> Chunk:
        keys = [key_of(key) for key in page.keys[start:stop]]
        payload: dict[str, Any] = {
            "references": ["" if isinstance(each, ItemError) else name_to_json(each) for each in places],
            "keys": keys,
        }
        if any(marks):
            payload["marks"] = marks
        errors = [[each.message, each.hint] if isinstance(each, ItemError) else None for each in places]
        if any(errors):
            payload["errors"] = errors
        if page.kept is not None:
            payload["kept"] = _packed(page.kept.slice(start, stop - start))
        return Chunk(first, stop - start, payload, json.dumps([page.at, stop]))

    def _resolved(self, reference: str | ItemError) -> str | ItemError:
        """Where a reference leads: an absolute path or a URL; or why it may not be read."""
        if isinstance(reference, ItemError):
            return reference
        if "://" in reference and is_url(reference):
            if reference[:7].lower() != "file://":
                return reference
            try:
                path = local_of(reference)
            except TallyError as error:
                return ItemError(error.message, stage="read", hint=error.hint)
        elif is_sql(self.base) and not reference.startswith("/"):
            return ItemError(f"{reference!r} is relative, and a database has no folder (base names one)", stage="read")
        elif is_url(self.base) and not reference.startswith("/"):
            scheme, _, rest = self.base.partition("://")
            joined = posixpath.normpath(f"/{rest}/{reference}")
            if not joined.startswith(f"/{rest.split('/')[0]}/"):
                return ItemError(f"{reference!r} leads out of the bucket of {self.base}", stage="read")
            return f"{scheme}://{joined[1:]}"
        else:
            path = posixpath.join(self.base, reference)
        path = posixpath.normpath(path)
        if self.confined and (is_url(self.base) or not Path(path).resolve().is_relative_to(Path(self.base).resolve())):
            return ItemError(
                f"{key_of(reference)} is not below {key_of(self.base)}",
                stage="read",
                hint="On a server, a list names files below its own folder (or base), in buckets and of the web.",
            )
        return path

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> list[str]:
        """See :meth:`Source.keys`."""
        found: list[str] = chunk.payload["keys"]
        return found

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """See :meth:`Source.slice`."""
        return self.choose(chunk, range(chunk.count)[start:stop])[0]

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """See :meth:`Source.choose`."""
        payload: dict[str, Any] = {
            name: [values[position] for position in positions]
            for name, values in chunk.payload.items()
            if name in _LISTS
        }
        if (kept := chunk.payload.get("kept")) is not None:
            payload["kept"] = _packed(_unpacked(kept).take(list(positions)))
        return [Chunk(chunk.first + positions[0], len(positions), payload, chunk.cursor)]

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. Files are read as they are by now."""
        combined: list[Chunk] = []
        group: list[Chunk] = []
        for chunk in [*chunks, None]:
            if group and (chunk is None or sum(each.count for each in group) + chunk.count > _COMBINE):
                combined.append(_joined(group))
                group = []
            if chunk is not None:
                group.append(chunk)
        return combined

    def unmarked(self, chunk: Chunk) -> Chunk:
        """See :meth:`Source.unmarked`."""
        payload = {name: value for name, value in chunk.payload.items() if name != "marks"}
        return replace(chunk, payload=payload)

    def info(self, chunk: Chunk) -> list[dict[str, Any]] | None:
        """See :meth:`Source.info`."""
        kept = chunk.payload.get("kept")
        found: list[dict[str, Any]] | None = None if kept is None else _unpacked(kept).to_pylist()
        return found

    # -- reading -----------------------------------------------------------------------------------

    def ahead(self, batch_size: int) -> int:
        """See :meth:`Source.ahead`."""
        return AHEAD * max(batch_size, REMOTE_THREADS)

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        """See :meth:`Source.read`."""
        references = [name_from_json(each) for each in chunk.payload["references"]]
        marks = chunk.payload.get("marks") or [""] * chunk.count
        errors = chunk.payload.get("errors") or [None] * chunk.count
        reader = _ReferenceReader(references, marks, errors, self.keys(chunk), self.input, scorer)
        info = self.info(chunk)
        threads = REMOTE_THREADS if any(map(is_url, references)) else 2
        batches = read_ahead(reader, scorer.batch_size, threads, timings)
        try:
            for batch in batches:
                if info is not None:
                    batch.info = [info[position] for position in batch.positions]
                yield batch
        finally:
            batches.close()  # type: ignore[attr-defined]


class _ReferenceReader(Reader):
    """Reads from wherever each reference leads."""

    def __init__(
        self,
        references: Sequence[str],
        marks: Sequence[str],
        errors: Sequence[tuple[str, str | None] | None],
        keys: Sequence[str],
        input: Input,  # noqa: A002
        scorer: Scorer,
    ) -> None:
        super().__init__(keys, scorer)
        self._references, self._marks, self._errors, self._input = references, marks, errors, input
        self._local = LocalStore("/")

    def open(self) -> None:
        """Make the folder for downloads, if remote files are given as paths."""
        if self._input == "path" and any(map(is_url, self._references)):
            self._folder = temporary.make("items")

    def fetch(self, position: int) -> Any:
        """See :meth:`Reader.fetch`."""
        if (error := self._errors[position]) is not None:
            raise ItemError(error[0], stage="read", hint=error[1])
        place = self._references[position]
        if self._input == "image" and is_video(place.partition("?")[0]):
            raise ItemError(
                "a list names pictures, and this is a video", stage="read", hint="Name videos themselves as the source."
            )
        try:
            if not is_url(place):
                return self._file(place[1:], self._marks[position])
            if is_web(place):
                return self._of_the_web(position, place)
            root, _, name = place.rpartition("/")
            store = open_store(root)
            if self._input != "path":
                return store.read(name)
            target = self._target(position, name)
            store.download(name, target)
            return target
        except (StorageAwayError, ItemError):
            raise
        except TallyError as failed:
            raise ItemError(failed.message, stage="read", hint=failed.hint) from None
        except Exception as failed:
            raise ItemError(mask(error_line(failed)), stage="read") from None

    def _file(self, name: str, mark: str) -> Any:
        mark = mark or self._local.marked(name)[1]  # it may be written at this moment
        return self._local.local_path(name, mark=mark) if self._input == "path" else self._local.read(name, mark=mark)

    def _of_the_web(self, position: int, url: str) -> Any:
        try:
            if self._input != "path":
                content = io.BytesIO()
                web.fetch(url, content)
                return content.getvalue()
            name = url.partition("#")[0].partition("?")[0].rstrip("/").rpartition("/")[2]
            target = self._target(position, name or "file")
            with target.open("wb") as file:
                web.fetch(url, file)
            return target
        except StorageError as failed:  # also if its server is away: those of the others may not be
            raise ItemError(failed.message, stage="read", hint=failed.hint) from None

    def settle(self, batch: Batch) -> None:
        """See :meth:`Reader.settle`."""
        if self._input == "path":
            for position in batch.positions:
                place, mark = self._references[position], self._marks[position]
                if mark and not is_url(place):
                    try:
                        self._local.check_mark(place[1:], mark)
                    except SourceNotFoundError:  # what was read of it before was right
                        pass
        super().settle(batch)


def _looked_up(place: str | ItemError) -> tuple[int, str]:
    """The size in bytes and the mark of a file of this machine; of another, nothing is known before it is read."""
    if isinstance(place, ItemError) or place[0] != "/" or not os.path.exists(place):  # noqa: PTH110  # quick
        return 0, ""
    try:
        return _ROOT.marked(place[1:])
    except (TallyError, OSError):
        return 0, ""  # reading it will say what is wrong


_ROOT = LocalStore("/")


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    payload: dict[str, Any] = {
        name: [value for chunk in chunks for value in chunk.payload[name]] for name in ("references", "keys")
    }
    errors = [each for chunk in chunks for each in chunk.payload.get("errors") or [None] * chunk.count]
    if any(errors):
        payload["errors"] = errors
    if "kept" in chunks[0].payload:
        import pyarrow as pa

        tables = [_unpacked(chunk.payload["kept"]) for chunk in chunks]
        payload["kept"] = _packed(pa.concat_tables(tables, promote_options="permissive"))
    return Chunk(chunks[0].first, sum(chunk.count for chunk in chunks), payload, chunks[-1].cursor)


def _packed(table: Any) -> str:
    """A table as text: Arrow's own stream, which keeps its types."""
    import pyarrow as pa

    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    return base64.b64encode(out.getvalue()).decode()


def _unpacked(text: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(base64.b64decode(text)).read_all()
