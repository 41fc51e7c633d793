"""Items that are members of archives: tars, compressed ones, and ZIPs, on this machine or in a bucket.

A chunk's payload says where its members lie within one archive, and the mark that the archive had: a worker reads
these bytes and no others, except of a compressed tar, which it reads from its beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.media import images
from tally.scorers.base import Input, Scorer
from tally.sources.archives.members import Form, Member, hidden, members, stem_and_kind
from tally.sources.archives.reading import MAX_SIDECAR, MemberReader
from tally.sources.base import Batch, Chunk, ChunkLimit, Media, Timings
from tally.sources.listing import ListedSource, Listing
from tally.sources.locations import count_suffixes
from tally.sources.reading import AHEAD, LOCAL_THREADS, REMOTE_THREADS, read_ahead
from tally.storage import Entry, key_of, name_from_json, name_to_json, open_store
from tally.text import did_you_mean

_LOOKED_AT = 10_000
"""Members of the first archive that are looked at for what there is to keep."""
_COMBINE = 4096


@dataclass(frozen=True, slots=True)
class _Item:
    """name: of the member; None for what is wrong with the archive as a whole. beside: spans of kept columns."""

    name: str | None
    size: int = 0
    span: tuple[int, ...] | None = None
    error: str = ""
    beside: tuple[tuple[int, ...] | None, ...] = ()


@dataclass(frozen=True)
class ArchiveSource(ListedSource):
    """Members of archives as images, bytes or paths. Make it with :meth:`describe`; small, immutable, picklable.

    keep: kinds of members that belong to an item, such as ``json`` for ``000001.json`` beside ``000001.jpg``, whose
    text its rows carry in a column of that name.
    """

    accepts: ClassVar = frozenset[Input]({"image", "bytes", "path"})
    media: ClassVar[Media | None] = "archive"

    listing: Listing
    input: Input
    keep: tuple[str, ...] = ()
    _passed: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        input: Input,  # noqa: A002  # the scorer's word
        *,
        keep: Sequence[str] = (),
        without: str | None = None,
    ) -> ArchiveSource:
        """The source of all members of the archives at ``uris``: folders, files, globs and numbered files
        (``shard-{000000..000999}.tar``), paths or URLs.

        Of pictures, members with a picture's suffix are taken; else all that are not kept. Keys are those of files,
        then the member's name: ``shard.tar/a/1.jpg``. keep: as above; ``*`` for all that the first archive has.

        Raises as :meth:`tally.sources.files.FileSource.describe`; SpecError if there is nothing to keep of that name.
        """
        source = cls(Listing.of(uris, "archive", without=without), input)
        return replace(source, keep=source._kept(tuple(keep))) if keep else source

    @property
    def columns(self) -> dict[str, str]:
        return dict.fromkeys(self.keep, "string")

    def _kept(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The columns that are asked for, if the first archive has them."""
        location = self.listing.locations[0]
        entry = next(self.listing.entries(0))
        kinds: dict[str, None] = {}
        try:
            found = members(open_store(location.root), *_known(entry))[1]
            for member in islice(found, _LOOKED_AT):
                if not hidden(member.name) and not _is_picture(member.name) and (kind := stem_and_kind(member.name)[1]):
                    kinds[kind] = None
        except ItemError:
            pass  # it will be among the dead
        there = sorted(kinds)
        if asked == ("*",):
            asked = tuple(there)
        for name in asked:
            if name not in kinds:
                shown = ", ".join(there) or "nothing"
                raise SpecError(
                    f"keep: no member of {key_of(location.within + entry.name)} is called ….{name}"
                    f"{did_you_mean(name, there)} (beside pictures there are {shown})",
                    hint="What is kept of archives are the members that share a picture's name up to its first dot.",
                )
        return asked

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        self._passed.clear()
        found = after is not None
        for index, entry, skip in self.listing.remaining(after):
            for chunk in self._chunks(index, entry, skip, first, limit):
                yield chunk
                first += chunk.count
                found = True
        if not (found or self.listing.is_part):
            raise self._nothing()

    def _chunks(
        self, index: int, entry: Entry, skip: int, first: int, limit: Callable[[], ChunkLimit]
    ) -> Iterator[Chunk]:
        form, items = self._items(index, entry)
        position = skip
        part: list[_Item] = []
        total, bound = 0, None

        def chunk() -> Chunk:
            payload = self._payload(index, entry, form, part)
            cursor = self.listing.cursor(index, entry, position)
            return Chunk(first, len(part), payload, cursor)

        for item in islice(items, skip, None):
            if bound is None:
                bound = limit()
            # A compressed archive is read from its beginning for each chunk: as few as can be.
            if part and form in ("tar", "zip") and total + item.size > bound.bytes:
                yield chunk()
                first += len(part)
                part, total, bound = [], 0, limit()
            part.append(item)
            position += 1
            total += item.size
            if len(part) >= bound.items:
                yield chunk()
                first += len(part)
                part, total, bound = [], 0, None
        if part:
            yield chunk()

    def _payload(self, index: int, entry: Entry, form: Form, items: Sequence[_Item]) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "place": index,
            "archive": name_to_json(entry.name),
            "mark": entry.mark,
            "form": form,
            "members": [item.name for item in items],
            "spans": [None if item.span is None else list(item.span) for item in items],
        }
        if any(item.error for item in items):
            payload["errors"] = [item.error for item in items]
        if self.keep:
            nothing = (None,) * len(self.keep)
            payload["beside"] = [
                [None if span is None else list(span) for span in item.beside or nothing] for item in items
            ]
        return payload

    def _items(self, index: int, entry: Entry) -> tuple[Form, Iterator[_Item]]:
        store = open_store(self.listing.locations[index].root)
        try:
            form, found = members(store, *_known(entry))
        except ItemError as error:
            return "tar", iter([_Item(None, error=_whole(error))])
        return form, self._named_once(self._grouped(found) if self.keep else self._alone(found))

    def _alone(self, found: Iterator[Member]) -> Iterator[_Item]:
        try:
            for member in found:
                if self._takes(member):
                    yield _Item(member.name, member.size, member.span, member.refused)
        except ItemError as error:
            yield _Item(None, error=_whole(error))

    def _grouped(self, found: Iterator[Member]) -> Iterator[_Item]:
        """Items with what belongs to them, wherever in the archive it lies."""
        taken: list[Member] = []
        beside: dict[tuple[str, str], Member] = {}
        broken: ItemError | None = None
        try:
            for member in found:
                stem, kind = stem_and_kind(member.name)
                if kind in self.keep and not hidden(member.name):
                    beside[stem, kind] = member
                elif self._takes(member):
                    taken.append(member)
        except ItemError as error:
            broken = error
        for member in taken:
            stem = stem_and_kind(member.name)[0]
            others = [beside.get((stem, kind)) for kind in self.keep]
            why = member.refused or next(filter(None, map(_unfit, others)), "")
            if broken is not None and None in others:
                why = why or "the archive is damaged, and what belongs to it may have been behind the damage"
            spans = tuple(None if other is None else other.span for other in others)
            yield _Item(member.name, member.size, member.span, why, spans)
        if broken is not None:
            yield _Item(None, error=_whole(broken))

    def _takes(self, member: Member) -> bool:
        name = member.name
        if hidden(name):
            return False
        if self.input == "image" and not _is_picture(name):
            dot = name.rfind(".")
            self._passed[name[dot:].lower() if dot > name.rfind("/") + 1 else ""] += 1
            return False
        return True

    def _named_once(self, items: Iterator[_Item]) -> Iterator[_Item]:
        seen: Counter[str] = Counter()
        for item in items:
            if item.name is None:
                yield item
                continue
            name = key_of(item.name)
            seen[name] += 1
            if (times := seen[name]) > 1:
                error = f"the archive has {name!r} more than once: the first is scored, and this is number {times}"
                yield replace(item, name=f"{name}#{times}", error=item.error or error)
            else:
                yield item if name == item.name else replace(item, name=name)

    def _nothing(self) -> SourceNotFoundError:
        location = self.listing.locations[0]
        where = key_of(location.within + location.names[0]) if location.names else key_of(location.root)
        what = "pictures" if self.input == "image" else "files"
        shown = f", but {count_suffixes(self._passed)}" if self._passed else ""
        return SourceNotFoundError(f"the archives at {where} hold no {what}{shown}", hint="hidden files are not taken")

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> list[str]:
        location, payload = self.listing.locations[chunk.payload["place"]], chunk.payload
        archive = location.prefix + key_of(name_from_json(payload["archive"]))
        return [archive if name is None else f"{archive}/{name}" for name in payload["members"]]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        payload = dict(chunk.payload)
        for name in _LISTS & payload.keys():
            payload[name] = payload[name][start:stop]
        return Chunk(chunk.first + start, len(payload["members"]), payload, chunk.cursor)

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """See :meth:`Source.choose`."""
        payload = dict(chunk.payload)
        for name in _LISTS & payload.keys():
            payload[name] = [payload[name][at] for at in positions]
        return [Chunk(chunk.first + positions[0], len(positions), payload, chunk.cursor)]

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. Members of one archive are read together, if it is what it was."""
        combined: list[Chunk] = []
        for chunk in chunks:
            before = combined[-1] if combined else None
            if (
                before is not None
                and _same_archive(before.payload, chunk.payload)
                and before.count + chunk.count <= _COMBINE
            ):
                combined.pop()
                payload = {**before.payload}
                for name in _LISTS & payload.keys():
                    payload[name] = before.payload[name] + chunk.payload[name]
                chunk = Chunk(before.first, before.count + chunk.count, payload, chunk.cursor)
            combined.append(chunk)
        return combined

    def several(self) -> bool:
        return True

    def remark(self) -> str | None:
        total = sum(self._passed.values())
        if not total:
            return self.listing.remark()
        what = "1 member of archives" if total == 1 else f"{total:,} members of archives"
        kept = f"; {', '.join(f'.{name}' for name in self.keep)} are columns" if self.keep else ""
        return f"{what} passed over, not images by their name: {count_suffixes(self._passed)}{kept}"

    def ahead(self, batch_size: int) -> int:
        return AHEAD * max(batch_size, LOCAL_THREADS if self.listing.local else REMOTE_THREADS)

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        payload = chunk.payload
        location = self.listing.locations[payload["place"]]
        store = open_store(location.root)
        beside = payload.get("beside", [])
        reader = MemberReader(
            location,
            store,
            name_from_json(payload["archive"]),
            payload["mark"],
            payload["form"],
            self.keys(chunk),
            payload["spans"],
            {at: error for at, error in enumerate(payload.get("errors", ())) if error},
            {name: [spans[at] for spans in beside] for at, name in enumerate(self.keep)},
            self.input,
            scorer,
        )
        streamed = payload["form"] in ("gzip", "zstd")
        threads = LOCAL_THREADS if store.is_local or streamed else REMOTE_THREADS
        batches: Any = read_ahead(reader, scorer.batch_size, threads, timings)
        with closing(batches):
            for batch in batches:
                if self.keep:
                    batch.info = [reader.info.pop(int(position)) for position in batch.positions]
                yield batch


_LISTS = frozenset({"members", "spans", "errors", "beside"})
"""What a payload has one of for each item."""


def _same_archive(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] == other[name] for name in one.keys() - _LISTS)


def _known(entry: Entry) -> tuple[str, int, str]:
    return entry.name, entry.size, entry.mark


def _is_picture(name: str) -> bool:
    dot = name.rfind(".")
    return dot > name.rfind("/") + 1 and name[dot:].lower() in images.suffixes()


def _unfit(member: Member | None) -> str:
    """Why what belongs to an item cannot be its column."""
    if member is None:
        return ""
    if member.size > MAX_SIDECAR:
        return f"{key_of(member.name)!r}, which is kept, has {member.size:,} bytes, and {MAX_SIDECAR:,} are the most"
    return f"{key_of(member.name)!r}, which is kept: {member.refused}" if member.refused else ""


def _whole(error: ItemError) -> str:
    hint = error.hint or "Mend it, and score it again with --overwrite."
    return f"the archive is not scored beyond here: {error.message}. {hint}"
