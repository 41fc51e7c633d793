"""Items that are frames of videos that are kept as numbered pictures: ``frame_%04d.png``, or a folder of them.

The numbers in the names order the pictures, and a number that is missing between others is a dead item, so that the
pictures around it keep their times. Each picture stands alone: a chunk is a run of them, and nothing is decoded twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice, pairwise
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, SpecError, StorageAwayError, TallyError
from tally.media import images
from tally.media.video.decode import resized
from tally.media.video.frame import FrameInfo
from tally.media.video.metadata import PICTURES, Colour, Video, pack, unpack
from tally.scorers.base import Input, Item, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.listing import Listing
from tally.sources.patterns import Pattern, is_pattern, numbered, parse
from tally.sources.reading import AHEAD, LOCAL_THREADS, REMOTE_THREADS, FileReader, read_ahead
from tally.storage import CHANGED_HINT, Entry, key_of, name_from_json, name_to_json, open_store

if TYPE_CHECKING:
    from tally.sources.locations import Location

USUAL_RATE = Fraction(25)
"""Pictures per second where nothing says it."""

_COMBINE = 512
_LOOKED_AT = 16
"""So many pictures are looked at, at most, for the size of all."""


class _Picture(NamedTuple):
    """One of a series. after: what stands behind the number in its name. digits: how many that has."""

    number: int
    entry: Entry
    after: str
    digits: int

    def numbered(self, number: int) -> str:
        """The name of another one of the series."""
        end = len(self.entry.name) - len(self.after)
        return f"{self.entry.name[: end - self.digits]}{number:0{self.digits}}{self.after}"


class _Series(NamedTuple):
    """The pictures of one video, by their numbers. place: index of their location. pattern: of their names.

    pictures: one for each frame; without a mark where there is none of its number.
    """

    key: str
    place: int
    pattern: str
    pictures: list[Entry]


@dataclass(frozen=True)
class SequenceSource(Source):
    """Numbered pictures as frames of videos. Make it with :meth:`describe`; small, immutable, picklable.

    patterns: globs of the listing, each with the pattern that it stands for. rate: pictures per second; None: nothing
    says it, and :data:`USUAL_RATE` is taken. every, size, fit: as in :class:`VideoSource`.
    """

    accepts: ClassVar = frozenset[Input]({"image", "frame"})
    unit: ClassVar = "frames"
    media: ClassVar = "video"

    listing: Listing
    patterns: tuple[tuple[str, Pattern], ...] = ()
    rate: Fraction | None = None
    every: int = 1
    size: tuple[int, int] | None = None
    fit: str = "stretch"
    told: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def columns(self) -> Mapping[str, str]:
        return {"video": "string", "frame": "int64", "time": "float64"}

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        *,
        rate: Fraction | None = None,
        every: int = 1,
        size: tuple[int, int] | None = None,
        fit: str = "stretch",
        without: str | None = None,
    ) -> SequenceSource:
        """The source of the series at ``uris``: patterns (``frames/frame_%04d.png``), and folders. In each of those,
        and of those below, the pictures are one video. A glob takes some of a folder's pictures.

        A video's key is its folder's, or what stands before the number in a pattern; that of a frame has its number
        from 0 in six digits, as those of videos.
        Raises SourceNotFoundError if one of the locations gives no numbered picture, SpecError if a folder holds
        several series, StorageError if it cannot be read.
        """
        parsed = {uri: parse(uri) for uri in uris if is_pattern(uri)}
        listing = Listing.of([parsed[uri][0] if uri in parsed else uri for uri in uris], "image", without=without)
        patterns = tuple((glob.rpartition("/")[2], pattern) for glob, pattern in parsed.values())
        source = cls(listing, patterns, rate, every, size, fit)
        series = source._series()
        if not series:
            if uris[0] in parsed:
                raise SourceNotFoundError(f"no picture has a name such as {key_of(uris[0])}")
            raise SourceNotFoundError(
                f"{key_of(uris[0])} holds no numbered pictures",
                hint="The names of a video's pictures hold their number: frame_0001.png. Leave --fps out to score each "
                "picture for itself.",
            )
        keys = [each.key for each in series]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise SpecError(f"two videos would be named {twice!r}", hint="Start a job for each.")
        return source

    # -- planning ----------------------------------------------------------------------------------

    def _series(self) -> list[_Series]:
        """What there is by now, in the order of keys within each location."""
        self.listing.passed.clear()
        self.told.clear()
        found: list[_Series] = []
        for place, location in enumerate(self.listing.locations):
            pattern = dict(self.patterns).get(location.pattern or "")
            folders: dict[str, dict[str, list[_Picture]]] = {}
            unnumbered: list[str] = []
            for entry in self.listing.entries(place):
                folder, _, name = entry.name.rpartition("/")
                parts = numbered(name) if pattern is None else pattern.parts(name)
                if parts is None:
                    if pattern is None:
                        unnumbered.append(entry.name)
                    continue
                before, number, after = parts
                folders.setdefault(folder, {}).setdefault(f"{before}%d{after}", []).append(
                    _Picture(number, entry, after, len(name) - len(before) - len(after))
                )
            if unnumbered:
                pictures = "1 picture" if len(unnumbered) == 1 else f"{len(unnumbered):,} pictures"
                self.told.append(f"{pictures} passed over, without a number: {key_of(unnumbered[0])}")
            for folder, groups in sorted(folders.items()):
                where = f"{location.within}{folder}".rstrip("/")
                if len(groups) > 1:
                    listed = ", ".join(f"{name} ({len(each):,})" for name, each in sorted(groups.items())[:4])
                    raise SpecError(
                        f"{key_of(where)} holds {len(groups)} series of pictures: {listed}",
                        hint="Name one of them by a pattern, such as left_%04d.png; or leave --fps out.",
                    )
                [(named, series)] = groups.items()
                found.append(self._ordered(_key(location, folder, pattern), place, f"{where}/{named}", series))
        return found

    def _ordered(self, key: str, place: int, pattern: str, pictures: list[_Picture]) -> _Series:
        pictures.sort()
        numbers = [each.number for each in pictures]
        for one, other in pairwise(pictures):
            if one.number == other.number:
                raise SpecError(f"{key_of(one.entry.name)} and {key_of(other.entry.name)} have the same number")
        step = gcd(*(number - numbers[0] for number in numbers)) or 1
        count = (numbers[-1] - numbers[0]) // step + 1
        if count > 2 * len(pictures):
            gaps = f"wide gaps (from {numbers[0]} to {numbers[-1]})"
            self.told.append(f"{key} is numbered with {gaps}: its pictures follow one another")
            return _Series(key, place, pattern, [each.entry for each in pictures])
        by_number = {each.number: each.entry for each in pictures}
        frames = [
            by_number.get(number) or Entry(pictures[0].numbered(number), 0)
            for number in range(numbers[0], numbers[-1] + 1, step)
        ]
        return _Series(key, place, pattern, frames)

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        series = self._series()
        start = 0
        if after is not None:
            key, start, mark = json.loads(after)
            at = next((index for index, each in enumerate(series) if each.key == key), None)
            if at is None or _mark(series[at].pictures[:start]) != mark:
                raise SourceChangedError(
                    f"pictures of {key} that are planned already are not what they were", hint=CHANGED_HINT
                )
            series = series[at:]
        for each in series:
            for chunk in self._video(each, start, first, limit):
                yield chunk
                first += chunk.count
            start = 0

    def _video(self, series: _Series, start: int, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        location = self.listing.locations[series.place]

        def cursor(stop: int) -> str:
            return json.dumps([series.key, stop, _mark(series.pictures[:stop])])

        count = len(series.pictures)
        numbers = range(-(-start // self.every) * self.every, count, self.every)
        if not numbers:
            return
        try:
            width, height = _size(location, series.pictures)
            rate = self.rate or USUAL_RATE
            colour, square = Colour(), Fraction(1)
            video = Video(
                *(series.key, location.root, series.pattern, 0, 0, PICTURES, 1 / rate, 0, rate / self.every),
                *(width, height, (), square, colour, count),
            )
            if self.size is not None:
                video = video.scaled(self.size, self.fit)
        except StorageAwayError:
            raise
        except TallyError as error:
            location.check_root()
            yield Chunk(first, 1, {"key": series.key, "failed": error.message, "hint": error.hint}, cursor(count))
            return
        while numbers:
            most = limit().items
            taken, numbers = numbers[:most], numbers[most:]
            chosen = [series.pictures[number] for number in taken]
            payload = {
                "key": series.key,
                "place": series.place,
                "video": video.to_json(),
                "original": [width, height],
                "step": self.every,
                "numbers": pack(taken),
                "names": [name_to_json(each.name) for each in chosen],
                "marks": [each.mark for each in chosen],
            }
            yield Chunk(first, len(taken), payload, cursor(numbers[0] if numbers else count))
            first += len(taken)

    def indivisible(self) -> str | None:
        """See :meth:`Source.indivisible`."""
        return "its pictures are the frames of videos, which are not cut"

    def several(self) -> bool:
        return len(self._series()) > 1

    def remark(self) -> str | None:
        said = [self.listing.remark()]
        if self.rate is None:
            said.append(f"{USUAL_RATE} pictures are taken for a second; --fps says how many there are")
        return "; ".join(each for each in [*said, *self.told] if each) or None

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> list[str]:
        key = chunk.payload["key"]
        return [f"{key}/{number:06d}" for number in unpack(chunk.payload["numbers"])] if _is_read(chunk) else [key]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        payload = dict(chunk.payload)
        if _is_read(chunk):
            payload["numbers"] = pack(unpack(payload["numbers"])[start:stop])
            payload |= {name: payload[name][start:stop] for name in ("names", "marks")}
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. What is there by now is scored."""
        combined: list[Chunk] = []
        for chunk in map(self.unmarked, chunks):
            before = combined[-1] if combined else None
            if before is not None and _follows(before, chunk):
                numbers = unpack(before.payload["numbers"]) + unpack(chunk.payload["numbers"])
                joined = {name: before.payload[name] + chunk.payload[name] for name in ("names", "marks")}
                payload = {**before.payload, **joined, "numbers": pack(numbers)}
                combined[-1] = Chunk(before.first, before.count + chunk.count, payload, chunk.cursor)
            else:
                combined.append(chunk)
        return combined

    def unmarked(self, chunk: Chunk) -> Chunk:
        """See :meth:`Source.unmarked`."""
        return replace(chunk, payload={**chunk.payload, "marks": [""] * chunk.count}) if _is_read(chunk) else chunk

    # -- reading -----------------------------------------------------------------------------------

    def ahead(self, batch_size: int) -> int:
        return AHEAD * max(batch_size, LOCAL_THREADS if self.listing.local else REMOTE_THREADS)

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        if not _is_read(chunk):
            error = ItemError(chunk.payload["failed"], stage="read", hint=chunk.payload.get("hint"))
            yield Batch(0, 1, dead=[(0, error)])
            return
        payload = chunk.payload
        location = self.listing.locations[payload["place"]]
        video, numbers = Video.from_json(payload["video"]), unpack(payload["numbers"])
        infos = [FrameInfo(video, number, number, payload["step"]) for number in numbers]
        names = [name_from_json(each) for each in payload["names"]]
        original = payload["original"][0], payload["original"][1]
        reader = _Frames(location, names, self.keys(chunk), payload["marks"], scorer, infos, original)
        threads = LOCAL_THREADS if open_store(location.root).is_local else REMOTE_THREADS
        batches: Any = read_ahead(reader, scorer.batch_size, threads, timings)
        with closing(batches):
            for batch in batches:
                batch.info = [infos[position] for position in batch.positions]
                yield batch


class _Frames(FileReader):
    """Reads pictures of one series, each of which is to have the size of all."""

    def __init__(
        self,
        location: Location,
        names: Sequence[str],
        keys: Sequence[str],
        marks: Sequence[str],
        scorer: Scorer,
        infos: Sequence[FrameInfo],
        original: tuple[int, int],
    ) -> None:
        store = open_store(location.root)
        super().__init__(location, store, names, keys, marks, "image", scorer)
        self._infos, self._original = infos, original

    def item(self, position: int, value: Any) -> Item:
        """See :meth:`Reader.item`."""
        frame, decoding = self._infos[position], self._scorer.decoding
        array, info = images.decode(
            value, max_pixels=decoding.max_pixels, background=decoding.background, tell=self._scorer.assume
        )
        found = info["width"], info["height"]
        if found != self._original:
            raise ItemError(
                "it is a picture of {}x{}, and the others of its video have {}x{}".format(*found, *self._original),
                stage="decode",
                hint="Make the pictures of a video one size.",
            )
        array = resized(array, frame.source)
        height, width = array.shape[:2]
        more = {"width": width, "height": height, "frame": frame["frame"], "time": frame["time"]}
        return Item(self.keys[position], array, more)


def _key(location: Location, folder: str, pattern: Pattern | None) -> str:
    prefix = key_of(location.prefix)
    if pattern is not None and (name := pattern.before.rstrip("_-. ")):
        folder = f"{folder}/{name}".strip("/")
    return (prefix + key_of(folder)).strip("/") or key_of(location.root.rstrip("/").rpartition("/")[2]) or "frames"


def _size(location: Location, pictures: Sequence[Entry]) -> tuple[int, int]:
    """The size of the first picture that can be decoded: that of all. Raises ItemError if none of the first can."""
    store = open_store(location.root)
    failed: TallyError | None = None
    for entry in islice(pictures, _LOOKED_AT):
        try:
            _, info = images.decode(store.read(entry.name, mark=entry.mark), (1, 1))
        except StorageAwayError:
            raise
        except TallyError as error:
            failed = failed or error
            continue
        return info["width"], info["height"]
    assert failed is not None
    raise ItemError(f"none of its first pictures can be decoded: {failed.message}", stage="decode", hint=failed.hint)


def _mark(pictures: Sequence[Entry]) -> str:
    """What tells these pictures from others."""
    digest = hashlib.blake2b(digest_size=8)
    for each in pictures:
        digest.update(f"{key_of(each.name)}\0{each.mark}\0".encode())
    return digest.hexdigest()


def _is_read(chunk: Chunk) -> bool:
    """Whether a chunk's frames are read: the video is not dead as a whole."""
    return "numbers" in chunk.payload


def _follows(before: Chunk, chunk: Chunk) -> bool:
    """Whether dead frames of one video can be replayed together."""
    one, other = before.payload, chunk.payload
    if not (_is_read(before) and _is_read(chunk)) or one["key"] != other["key"]:
        return False
    return unpack(one["numbers"])[-1] < unpack(other["numbers"])[0] and before.count + chunk.count <= _COMBINE
