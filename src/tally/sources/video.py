"""Items that are frames of videos.

A chunk is a range of frames, cut at a keyframe if one is near. It holds all that a worker needs to decode exactly
these frames: their numbers and times, the positions of their packets, and the keyframes to begin at.

If a video changes while a job is at it, its frames that are not scored yet are dead items, so that the results never
mix frames of two videos.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

from tally.errors import ItemError, SourceNotFoundError, StorageAwayError, TallyError
from tally.media.video.decode import decode
from tally.media.video.frame import FrameInfo
from tally.media.video.metadata import Video, pack, unpack
from tally.media.video.probe import DEINTERLACED, INTERLACED, Key, Prober, Timeline
from tally.scorers.base import Input, Item, Scorer
from tally.scorers.run import prepare
from tally.sources.base import Batch, Chunk, ChunkLimit, Timings
from tally.sources.listing import ListedSource, Listing, nothing
from tally.sources.locations import Location
from tally.sources.reading import AHEAD, AHEAD_BYTES
from tally.storage import key_of, name_from_json, name_to_json, open_store

_SNAP = 0.6
"""The share of a chunk that may be left out so that it ends before a keyframe."""
_MISSING = 4096
"""The most missing frames in one chunk."""
_COMBINE = 512
_LEAST = 4
"""The last chunks of a video are smaller than others, and at least a part of so many."""
_AFTER_GAPS = -1
"""The frame in a cursor that stands behind a video's gaps, and before its frames."""
_NEAR = 64
"""Frames at most this far apart are replayed together: decoding those between costs little."""


@dataclass(frozen=True)
class VideoSource(ListedSource):
    """Frames of videos as images. Make it with :meth:`describe`; small, immutable, picklable.

    every: take frames 0, every, 2 * every ... of each video.
    size, fit: (width, height) in pixels, upright, that frames are scaled to, and how: see :meth:`Video.scaled`. None:
        as they are.
    deinterlace: interlaced frames show one moment.
    peculiar: what was found in planning that a user should know, and the keys of the videos that it is true of.
    """

    accepts: ClassVar = frozenset[Input]({"image", "frame"})
    unit: ClassVar = "frames"
    media: ClassVar = "video"
    chunk_seconds: ClassVar = 4.0  # decoding begins at a keyframe, which may be far before the chunk

    listing: Listing
    every: int = 1
    size: tuple[int, int] | None = None
    fit: str = "stretch"
    deinterlace: bool = False
    peculiar: dict[str, list[str]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def columns(self) -> Mapping[str, str]:
        return {"video": "string", "frame": "int64", "time": "float64"}

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        *,
        every: int = 1,
        size: tuple[int, int] | None = None,
        fit: str = "stretch",
        deinterlace: bool = False,
        without: str | None = None,
    ) -> VideoSource:
        """The source of all videos at ``uris``: folders, files and globs, paths or URLs.

        A frame's key is the video's, a slash, and the frame's number from 0 in six digits or more; a video's
        key is as a file's. without: the job's own output, as for files.
        Raises SourceNotFoundError if one of the locations is missing or gives no video, StorageError if it cannot
        be read.
        """
        return cls(Listing.of(uris, "video", without=without, sizes=False), every, size, fit, deinterlace)

    def indivisible(self) -> str | None:
        """See :meth:`Source.indivisible`. A video is decoded by one."""
        if len(self.listing.locations) > 1:
            return "videos are shared out between the names of one folder or glob"
        return None if self.several() else "it is one video, which is not cut"

    # -- planning ----------------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        self.listing.passed.clear()
        self.peculiar.clear()
        began, last, frame, *mark = (0, None, None) if after is None else json.loads(after)
        name = None if last is None else name_from_json(last)
        found = after is not None
        prober = Prober()
        try:
            for index in range(began, len(self.listing.locations)):
                entries = self.listing.entries(index, name if index == began else None)
                if index == began and name is not None and frame is not None:
                    for chunk in self._video(prober, index, name, frame, first, limit, *mark):
                        yield chunk
                        first += chunk.count
                for entry in entries:
                    for chunk in self._video(prober, index, entry.name, 0, first, limit):
                        yield chunk
                        first += chunk.count
                    found = True
        finally:
            prober.close()
        if not (found or self.listing.is_part):
            raise nothing(self.listing.locations[0], self.listing.passed, self.listing.kind)

    def _video(
        self,
        prober: Prober,
        index: int,
        name: str,
        start: int,
        first: int,
        limit: Callable[[], ChunkLimit],
        mark: str = "",
    ) -> Iterator[Chunk]:
        """The chunks of one video from the frame ``start`` on. mark: that the frames before it were planned from."""
        location = self.listing.locations[index]
        key = location.prefix + key_of(name)

        def cursor(frame: int | None) -> str:
            return json.dumps([index, name_to_json(name), frame, timeline.video.mark if frame is not None else ""])

        try:
            open_store(location.root).check_mark(name, mark)
            timeline = prober(key, location.root, name)
            scaled = self._scaled(timeline.video)
        except StorageAwayError:
            raise
        except TallyError as error:
            location.check_root()
            payload: dict[str, Any] = {"key": key, "failed": error.message, "hint": error.hint}
            if start > 0:
                payload["from"] = start
            yield Chunk(first, 1, payload, cursor(None))
            return
        for remark in timeline.remarks:
            told = DEINTERLACED if remark == INTERLACED and self.deinterlace else remark
            self.peculiar.setdefault(told, []).append(key)
        timeline = replace(timeline, video=scaled)
        if timeline.gaps and start == 0:
            text = "pictures are missing before this frame, it is not known how many: the file is damaged there"
            payload = {"key": key, "failed": text, "gaps": [*timeline.gaps]}
            yield Chunk(first, len(timeline.gaps), payload, cursor(_AFTER_GAPS))
            first += len(timeline.gaps)
        start = max(start, 0)
        numbers = range(start, len(timeline.ticks), self.every)
        while numbers:
            count = self._cut(numbers, _share(limit(), len(numbers)), timeline.keys)
            taken, numbers = numbers[:count], numbers[count:]
            more = numbers[0] if numbers else len(timeline.ticks) if _ends_early(timeline) else None
            yield Chunk(first, count, self._payload(timeline, taken), cursor(more))
            first += count
        start = max(start, len(timeline.ticks))
        if timeline.lost:
            total = len(timeline.ticks) + timeline.lost
            why = timeline.cut or "the file ends before it"
            text = f"it is missing: {why}, after {len(timeline.ticks):,} of {total:,} frames"
            missing = range(-(-start // self.every) * self.every, total, self.every)
            while missing:
                taken, missing = missing[:_MISSING], missing[_MISSING:]
                payload = {"key": key, "failed": text, "numbers": pack(taken)}
                yield Chunk(first, len(taken), payload, cursor(missing[0] if missing else None))
                first += len(taken)
        elif timeline.cut is not None:
            text = f"from frame {start:,} on the video is missing: {timeline.cut}"
            yield Chunk(first, 1, {"key": key, "failed": text, "from": start}, cursor(None))

    def _cut(self, numbers: range, most: int, keys: Sequence[Key]) -> int:
        """How many of the frames the next chunk takes; it ends before a keyframe if one is near."""
        if len(numbers) <= most:
            return len(numbers)
        at = bisect_right(keys, numbers[most], key=lambda key: key.number) - 1
        if at >= 0 and keys[at].number > numbers[0]:
            short = bisect_right(numbers, keys[at].number - 1)
            if short >= most * (1 - _SNAP):
                return short
        return most

    def _payload(self, timeline: Timeline, numbers: range) -> dict[str, Any]:
        keys = timeline.keys
        # Also the one before the nearest: see decode().
        begin = max(0, bisect_right(keys, numbers[0], key=lambda key: key.number) - 2)
        end = bisect_right(keys, numbers[-1], key=lambda key: key.number)
        video = timeline.video
        packets = [timeline.packets[number] for number in numbers]
        return {
            "key": video.key,
            "video": video.to_json(),
            "step": self.every,
            "numbers": pack(numbers),
            "ticks": pack([timeline.ticks[number] for number in numbers]),
            "packets": pack(packets),
            "keys": [list(key) for key in keys[begin:end]],
            "damaged": pack(_between(timeline.damaged, keys[begin].packet if end else 0, max(packets))),
        }

    def _scaled(self, video: Video) -> Video:
        video = replace(video, rate=video.rate / self.every, deinterlaced=self.deinterlace)
        return video if self.size is None else video.scaled(self.size, self.fit)

    def several(self) -> bool:
        return self.listing.several()

    def remark(self) -> str | None:
        said = [self.listing.remark()]
        for remark, keys in self.peculiar.items():
            said.append(
                f"{keys[0]} is {remark}" if len(keys) == 1 else f"{len(keys):,} videos are {remark} ({keys[0]} ...)"
            )
        return "; ".join(each for each in said if each) or None

    # -- chunks ------------------------------------------------------------------------------------

    def keys(self, chunk: Chunk) -> list[str]:
        payload = chunk.payload
        key = payload["key"]
        if "gaps" in payload:
            return [f"{key}/{number:06d}-gap" for number in payload["gaps"]]
        if "from" in payload:
            return [f"{key}/{payload['from']:06d}-end"]
        return [f"{key}/{number:06d}" for number in unpack(payload["numbers"])] if "numbers" in payload else [key]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        payload = dict(chunk.payload)
        for name in ("numbers", "ticks", "packets"):
            if name in payload:
                payload[name] = pack(unpack(payload[name])[start:stop])
        if "gaps" in payload:
            payload["gaps"] = payload["gaps"][start:stop]
        if "keys" in payload:
            numbers = unpack(payload["numbers"])
            known = [key[0] for key in payload["keys"]]
            begin = max(0, bisect_right(known, numbers[0]) - 2)
            payload["keys"] = payload["keys"][begin : bisect_right(known, numbers[-1])]
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """See :meth:`Source.choose`."""
        whole = self.slice(chunk, positions[0], positions[-1] + 1)
        payload = dict(whole.payload)
        for name in payload.keys() & {"numbers", "ticks", "packets"}:
            values = unpack(payload[name])
            payload[name] = pack([values[at - positions[0]] for at in positions])
        if "gaps" in payload:
            payload["gaps"] = [payload["gaps"][at - positions[0]] for at in positions]
        return [Chunk(whole.first, len(positions), payload, chunk.cursor)]

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        combined: list[Chunk] = []
        for chunk in chunks:
            before = combined[-1] if combined else None
            if before is not None and _are_near(before, chunk):
                payload = dict(before.payload)
                for name in ("numbers", "ticks", "packets"):
                    payload[name] = pack(unpack(payload[name]) + unpack(chunk.payload[name]))
                damaged = {*unpack(before.payload.get("damaged", [])), *unpack(chunk.payload.get("damaged", []))}
                payload["damaged"] = pack(sorted(damaged))
                payload["keys"] = payload["keys"] + [key for key in chunk.payload["keys"] if key not in payload["keys"]]
                combined[-1] = Chunk(before.first, before.count + chunk.count, payload, chunk.cursor)
            else:
                combined.append(chunk)
        return combined

    # -- reading -----------------------------------------------------------------------------------

    def ahead(self, batch_size: int) -> int:
        return AHEAD * batch_size

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        keys = self.keys(chunk)
        size = scorer.batch_size
        if "failed" in chunk.payload:
            error = ItemError(chunk.payload["failed"], stage="read", hint=chunk.payload.get("hint"))
            for start in range(0, chunk.count, size):
                stop = min(start + size, chunk.count)
                yield Batch(start, stop, dead=[(position, error) for position in range(start, stop)])
            return
        video, numbers = Video.from_json(chunk.payload["video"]), unpack(chunk.payload["numbers"])
        step = chunk.payload["step"]
        infos = [FrameInfo(video, *each, step) for each in zip(numbers, unpack(chunk.payload["ticks"]), strict=True)]
        room = AHEAD_BYTES // (3 * video.width * video.height)
        location = next((each for each in self.listing.locations if each.root == video.root), None)
        ahead = _Ahead(chunk, scorer, keys, infos, max(1, min(self.ahead(size), room)), location)
        decoding = 0.0
        try:
            for start in range(0, chunk.count, size):
                batch = Batch(start, min(start + size, chunk.count), info=[])
                assert batch.info is not None
                for position in range(start, batch.stop):
                    value = ahead.next()
                    if isinstance(value, ItemError):
                        batch.dead.append((position, value))
                        continue
                    batch.keys.append(keys[position])
                    batch.values.append(value)
                    batch.positions.append(position)
                    batch.info.append(infos[position])
                if batch.stop == chunk.count:
                    ahead.finish()
                timings.decode += ahead.decoding - decoding
                decoding = ahead.decoding
                yield batch
        finally:
            ahead.stop()


class _Ahead(threading.Thread):
    """Decodes and prepares a chunk's frames while the consumer is busy, a bounded number ahead of it."""

    def __init__(
        self,
        chunk: Chunk,
        scorer: Scorer,
        keys: Sequence[str],
        infos: Sequence[FrameInfo],
        ahead: int,
        location: Location | None,
    ) -> None:
        super().__init__(name="tally-decode", daemon=True)
        self.decoding = 0.0  # seconds, of reading too
        self._chunk, self._scorer, self._location = chunk, scorer, location
        self._keys, self._infos = keys, infos
        self._values: queue.Queue[Any] = queue.Queue(ahead)
        self._stopping = threading.Event()
        self.start()

    def next(self) -> Any:
        """The next frame's prepared value, or its ItemError."""
        value = self._values.get()
        if isinstance(value, _Failure):
            raise value.error
        return value

    def finish(self) -> None:
        """All frames were taken. Raises SourceChangedError if the video is not what they were planned from."""
        assert self.next() is _END

    def stop(self) -> None:
        """Stop working; returns when nothing runs any more."""
        self._stopping.set()
        while self.is_alive():
            with suppress(queue.Empty):
                self._values.get_nowait()
            self.join(0.005)

    def run(self) -> None:
        try:
            for value in chain(self._frames(), [_END]):
                self._values.put(value)
                if self._stopping.is_set():
                    return
        except BaseException as error:
            self._values.put(_Failure(error))

    def _frames(self) -> Iterator[Any]:
        packets = unpack(self._chunk.payload["packets"])
        keys = [Key(*key) for key in self._chunk.payload["keys"]]
        damaged = unpack(self._chunk.payload.get("damaged", []))
        video = Video.from_json(self._chunk.payload["video"])
        begin = bisect_right([key.number for key in keys], self._infos[0].number)
        began = time.perf_counter()
        done = 0
        try:
            for picture in decode(video, packets, keys[:begin], damaged):
                value: Any = picture
                if not isinstance(picture, ItemError):
                    value = self._prepare(done, picture)
                done += 1
                self.decoding += time.perf_counter() - began
                yield value
                began = time.perf_counter()
        except StorageAwayError:
            raise
        except TallyError as error:  # it cannot be opened any more
            self._check_root()
            failure = ItemError(error.message, stage="read", hint=error.hint)
            yield from [failure] * (len(packets) - done)
            return
        # Of an object in a bucket, each answer has told the mark.
        if (store := open_store(video.root)).is_local:
            try:
                store.check_mark(video.name, video.mark)
            except SourceNotFoundError:  # what was read of it was right
                self._check_root()

    def _check_root(self) -> None:
        if self._location is not None:
            self._location.check_root()

    def _prepare(self, position: int, picture: Any) -> Any:
        height, width = picture.shape[:2]
        frame = self._infos[position]
        info = {"width": width, "height": height, "frame": frame["frame"], "time": frame["time"]}
        return prepare(self._scorer, Item(self._keys[position], picture, info))


_END = object()
"""Follows the last value."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended the thread."""

    error: BaseException


def _share(limit: ChunkLimit, left: int) -> int:
    """How many of a video's last frames a chunk may hold: less and less, so that all workers end at about one time."""
    if limit.slots == 1:
        return limit.items
    return max(1, min(limit.items, max(limit.items // _LEAST, left // (2 * limit.slots))))


def _between(positions: Sequence[int], first: int, last: int) -> Sequence[int]:
    """Those of ascending positions that are not before the first, and not after the last."""
    return positions[bisect_left(positions, first) : bisect_right(positions, last)]


def _ends_early(timeline: Timeline) -> bool:
    return bool(timeline.lost) or timeline.cut is not None


def _are_near(before: Chunk, chunk: Chunk) -> bool:
    first, second = before.payload, chunk.payload
    if first["key"] != second["key"] or "keys" not in first or "keys" not in second:
        return False
    gap = unpack(second["numbers"])[0] - unpack(first["numbers"])[-1]
    return 0 < gap <= _NEAR * first["step"] and before.count + chunk.count <= _COMBINE
