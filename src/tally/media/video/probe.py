"""Probing a video before it is scored: its metadata, and every frame that its container promises.

Packets are read, not decoded; each frame that they promise must come out. Only one picture is decoded, for metadata
that no header has. In containers without presentation times (AVI) all are decoded, for their order.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tally import processes
from tally.errors import ItemError, SourceChangedError, StorageAwayError, StorageError, TallyError
from tally.media.video import animations, webp
from tally.media.video.avi import CHUNK_HEADER, Entry, intact_until, moved_index, ordinals
from tally.media.video.clock import Clock
from tally.media.video.colour import HDR
from tally.media.video.container import Input, error_text, open_video, video_stream
from tally.media.video.metadata import Colour, Video, pack, unpack
from tally.media.video.promise import Reader, promised
from tally.storage import open_store

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

END_SECONDS = 0.5
"""How much earlier than its header says a container may end: headers are rounded, and count hidden frames."""

PATIENCE_SECONDS = 120.0
PATIENCE_BYTES_PER_SECOND = 2e6
"""How long probing may take: PATIENCE_SECONDS, and the video's size divided by PATIENCE_BYTES_PER_SECOND."""

STORAGE_SECONDS = 600.0
"""How much longer it may take in a bucket until something has been read. A store that does not answer raises an error
before that."""
_MAX_REREADS = 4
"""A video in a bucket of which more than this many times its size was read gets no more time: FFmpeg is in a loop."""
_REPORT_BYTES = 2**20

_KINDS: tuple[type[TallyError], ...] = (StorageAwayError, SourceChangedError, StorageError, TallyError)
"""The class that a failure travels as between processes: the first that fits."""
_UNTIMED = frozenset({"avi"})
_UNKNOWN_RATE = Fraction(25)
_ADDITION: Final = "matroska_block_additional"
_USUAL = 50
"""So many gaps between the last frames tell what is usual."""
_SLOWEST = Fraction(1, 1001)
INTERLACED = (
    "interlaced: each frame is scored as it is stored, with the lines of two moments; --deinterlace takes those of one"
)
DEINTERLACED = "interlaced: each frame is scored with the lines of its first moment, and those between are made of them"
"""What is said of such videos."""
_WHOLE = "fetched whole, once for each machine: its server does not give parts of it"
_TRANSPARENT = "partly transparent: transparency is dropped"


class Key(NamedTuple):
    """A keyframe: its frame number, its packet's position in the stream, and that packet's times."""

    number: int
    packet: int
    pts: int | None
    dts: int | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A video's frames in the order of presentation; a frame's number is its index.

    ticks: presentation times (see :class:`Video`), strictly ascending.
    packets: the position of each frame's packet in the stream, which is in the order of decoding; negative for frames
        that are known to be missing.
    keys: keyframes, where decoding can begin, ascending.
    lost: how many frames the container's index or header lists after the last one that could be read.
    cut: why the video ends too early, if the number of missing frames is not known, or it does not simply end.
    damaged: positions of packets that the container knows to be damaged, ascending.
    gaps: numbers of frames before which pictures are missing, it is not known how many.
    remarks: what a user should know of the video: that it is interlaced, say.
    """

    video: Video
    ticks: list[int]
    packets: list[int]
    keys: list[Key]
    lost: int = 0
    cut: str | None = None
    damaged: Sequence[int] = ()
    gaps: Sequence[int] = ()
    remarks: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` is its inverse."""
        return {
            "video": self.video.to_json(),
            "ticks": pack(self.ticks),
            "packets": pack(self.packets),
            "keys": self.keys,
            "lost": self.lost,
            "cut": self.cut,
            "damaged": pack(self.damaged),
            "gaps": [*self.gaps],
            "remarks": [*self.remarks],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        """The timeline that :meth:`to_json` described."""
        return cls(
            Video.from_json(data["video"]),
            unpack(data["ticks"]),
            unpack(data["packets"]),
            [Key(*key) for key in data["keys"]],
            data["lost"],
            data["cut"],
            unpack(data["damaged"]),
            data["gaps"],
            data["remarks"],
        )


class _Packet(NamedTuple):
    """part: how often the clock was set back before it. damaged: the container says so. at: its place in the file.
    size: in bytes."""

    position: int
    pts: int | None
    dts: int | None
    duration: int
    key: bool
    part: int
    damaged: bool
    at: int | None
    size: int


def probe(
    key: str,
    root: str,
    name: str,
    known: tuple[int, str] | None = None,
    on_fetched: Callable[[int], None] | None = None,
) -> Timeline:
    """Probe one video. known, on_fetched: see :func:`open_video`.

    Raises ItemError if there is nothing to score, StorageError if it cannot be read.
    """
    store = open_store(root)
    size, mark = known = known or store.marked(name)
    reader: Reader = lambda start, length: store.read_range(name, start, length, mark=mark)  # noqa: E731
    if (animated := webp.animation(reader, size)) is not None:
        content = store.read(name, mark=mark)
        return _of_animation(animated, content, key=key, root=root, name=name, size=size, mark=mark)
    with _messages() as messages, open_video(root, name, known, on_fetched) as opened:
        container, stream = opened.container, video_stream(opened.container)
        format_name = container.format.name
        index = [Entry(entry.pos, entry.size) for entry in stream.index_entries]  # reading adds to it
        read = _demux(opened, stream)
        packets, picture = read.packets, read.picture
        skipped = any(each[1] == container.format.name for each in messages)
        if not packets:
            raise ItemError(f"it holds no video packets{f' ({read.problem})' if read.problem else ''}", stage="read")
        if not (picture or (stream.codec_context.width and stream.codec_context.height)):
            raise ItemError("none of its pictures can be decoded, and it does not say their size", stage="read")
        untimed = _is_untimed(container, stream, packets)
        whole = promised(container.format.name, reader)
        cut = read.problem or _cut(container, read) or _short(size, whole) or animations.cut(format_name, reader, size)
        if cut is not None and packets[-1].damaged and len(packets) > 1:
            packets.pop()  # the file ends in it
        found = _found(stream, index, packets, reader, size, whole) if container.format.name == "avi" else None
        if found is not None:
            packets = found.packets
            cut = None if found.numbers else found.broken or cut
        lost = _lost(container, stream, packets, cut is not None) if found is None or found.broken else found.lost
        if (listed := animations.listed(format_name, reader)) is not None:
            lost = max(0, listed - len(packets))
        if format_name in animations.FORMATS:  # whatever it says of the others, they change the ones before them
            packets = [each._replace(key=each.position == 0) for each in packets]
        # All that is promised is there, however long its last pictures are shown.
        listed_all = "mp4" in format_name.split(",") and len(index) >= len(packets)
        whole_file = whole is not None and size >= whole
        complete = (listed_all or whole_file) and cut is None and not lost and not skipped
        video = _metadata(container, stream, picture, key=key, root=root, name=name, size=size, mark=mark)
        video = replace(video, joints=_joints(read, video.time_base))
        holes: list[int] = []
        damaged = _damaged(container, packets)
        remarks = _remarks(stream, read)
        if not store.gives_parts(name):
            remarks.append(_WHOLE)
        depth = stream.codec_context.reorder_depth
    rank = None
    if untimed:
        with open_video(root, name, known, on_fetched) as opened:
            rank = _order_by_decoding(opened, packets)
        if found is not None and found.numbers:  # decoders give late what they had before a gap
            behind = [number - at for at, number in enumerate(found.numbers)]
            rank = {
                each.position: rank[each.position] + len(packets) * gaps
                for each, gaps in zip(packets, behind, strict=True)
            }
    if skipped and not untimed:
        holes += _skipped(partial(open_video, root, name, known, on_fetched, format=format_name), video.stream)
    if holes and holes[-1] > packets[-1].position and not lost:
        cut = cut or "the file is damaged behind its last picture"
    known_keys = {packet.position for packet in packets if packet.key}
    damaged = sorted({*damaged, *(hole for hole in holes if hole not in known_keys)})
    timeline = _timeline(video, packets, rank, seekable=found is None or not found.numbers)
    dropped = 0
    if not complete:
        timeline, dropped = _without_doubtful(timeline, depth if lost or cut is not None else None)
    if dropped and not lost:
        cut = cut or "the pictures before the last ones are missing: it is cut off"
    lost = lost and lost + dropped
    gaps = [number for number, packet in enumerate(timeline.packets) if packet in holes]
    if found is not None and found.numbers:
        damaged = sorted({*damaged, *_beside_gaps(found, _lateness(timeline))})
        timeline = _with_missing(timeline, found)
        lost = len(found.times) - len(timeline.ticks)
    cut = None if lost and (found is None or not found.broken) else cut
    return replace(timeline, lost=lost, cut=cut, damaged=damaged, gaps=gaps, remarks=remarks)


def _of_animation(found: webp.Animation, content: bytes, **names: Any) -> Timeline:
    if not found.ticks:
        raise ItemError("it is an animation without a frame" + (f": {found.cut}" if found.cut else ""), stage="read")
    video = Video(
        **names,
        stream=0,
        codec=webp.CODEC,
        time_base=found.time_base,
        start=0,
        rate=_UNKNOWN_RATE,
        width=found.width,
        height=found.height,
        matrix=(),
        aspect=Fraction(1),
        colour=Colour(),
        end=found.end,
    )
    remarks = [_TRANSPARENT] if webp.is_transparent(content) else []
    packets = list(range(len(found.ticks)))
    keys = [Key(0, 0, None, None)]
    return Timeline(
        replace(video, rate=_rate(found.ticks, video)), found.ticks, packets, keys, cut=found.cut, remarks=remarks
    )


# -- reading packets -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    """What reading all packets of a video gives.

    packets: of shown frames. picture: the first that could be decoded. problem: why reading ended too early.
    spans: when each part begins and ends, in seconds of its own clock, over all streams.
    restarts: how often the clock of each stream was set back. sizes: of the first picture of each part but the first.
    additions: whether a picture has a second one beside it: its transparency.
    """

    packets: list[_Packet] = field(default_factory=list)
    picture: VideoFrame | None = None
    problem: str | None = None
    spans: list[tuple[float, float]] = field(default_factory=list)
    restarts: dict[int, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    additions: bool = False


def _demux(opened: Input, stream: VideoStream) -> _Read:
    import av

    found = _Read()
    position = 0
    codec = stream.codec_context.name
    stream.codec_context.thread_count = 1
    clocks = {each.index: Clock(each.time_base) for each in opened.streams if each.time_base}
    look: Any = None
    try:
        for packet in opened.packets():
            if packet.dts is None and packet.pts is None and packet.size == 0:
                continue  # the end
            clock = clocks.get(packet.stream_index)
            set_back = clock is not None and clock.is_set_back(packet)
            if clock is not None:
                _extend(found.spans, clock, packet)
            if packet.stream_index != stream.index:
                continue
            part = clock.part if clock is not None else 0
            if is_shown(codec, packet):
                times = packet.pts, packet.dts, packet.duration or 0
                found.packets.append(
                    _Packet(position, *times, packet.is_keyframe, part, packet.is_corrupt, packet.pos, packet.size)
                )
                found.additions = found.additions or (not position and packet.has_sidedata(_ADDITION))
            position += 1
            if set_back:
                look = av.CodecContext.create(codec, "r")
            if found.picture is None:
                found.picture = _first(packet.decode)
            elif look is not None and (picture := _first(partial(look.decode, packet))) is not None:
                found.sizes.append((picture.width, picture.height))
                look = None
    except StorageError:
        raise
    except (av.FFmpegError, OSError) as error:
        found.problem = f"reading it failed after {position:,} video packets: {error_text(error)}"
    if found.picture is None and position:
        found.picture = _first(lambda: stream.codec_context.decode(None))
    found.restarts = {index: clock.part for index, clock in clocks.items()}
    return found


@contextmanager
def _messages() -> Iterator[list[Any]]:
    """FFmpeg's errors in this thread: level, name of what has it, text.

    A reader that comes upon damage says so, and goes on behind it: nothing else tells that packets are missing.
    """
    import av

    level, skipping = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skipping)


def _skipped(opening: Callable[[], Input], index: int) -> list[int]:
    """The positions of packets before which the reader skipped damage; the one after the last for damage at the end."""
    import av

    holes = []
    position = told = 0
    try:
        with _messages() as messages, opening() as opened:
            name = opened.container.format.name
            told = len(messages)
            for _ in opened.packets(opened.streams[index]):
                if any(each[1] == name for each in messages[told:]):
                    holes.append(position)
                told = len(messages)
                position += 1
        if any(each[1] == name for each in messages[told:]):
            holes.append(position)
    except (av.FFmpegError, ItemError, IndexError):
        pass  # it was read before; what can be known is known
    return holes


@dataclass(frozen=True, slots=True)
class _Found:
    """What is left of an AVI from which pictures are missing.

    packets: those whose number is known; their times are those of the intact file. numbers: of each, in the order of
    decoding. times: of each picture in the intact file, present or missing. strays: positions of packets that may be
    anything. broken: why nothing is known from some place on.
    """

    packets: list[_Packet]
    numbers: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    strays: list[int] = field(default_factory=list)
    broken: str | None = None

    @property
    def lost(self) -> int:
        """How many are missing after the last one that is there."""
        return len(self.times) - 1 - self.numbers[-1]


def _found(
    stream: VideoStream,
    entries: list[Entry],
    packets: list[_Packet],
    read: Reader,
    size: int,
    promised: int | None,
) -> _Found | None:
    """What is left of an AVI; None if no picture is missing between others. Raises ItemError if nothing is certain."""
    missing = 0
    if len(entries) < len(packets) or len(entries) < stream.frames:  # FFmpeg found none, and made one up
        entries = moved_index(read, size, promised, stream.index)
        missing = (promised or size) - size
    pictures = [number for number, entry in enumerate(entries) if entry.length]
    if entries and len(pictures) == len(packets) and not missing:
        return None
    if not entries:
        until = intact_until(read, size)
        kept = [packet for packet in packets if (packet.at or 0) - CHUNK_HEADER < until]
        if len(kept) == len(packets):
            return None
        reason = "bytes are missing in the middle of the file, and no index tells which pictures follow"
        if not kept:
            raise ItemError(f"{reason}: it is damaged at its beginning", stage="read")
        return _Found(kept, broken=reason)
    places = ordinals(entries, [Entry((each.at or 0) - CHUNK_HEADER, each.size) for each in packets], missing)
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    ahead = min(stamps, default=0) - min((packet.dts or 0 for packet in packets), default=0) if stamps else 0
    ordinal = {place: number for number, place in enumerate(pictures)}
    placed = [(packet, place) for packet, place in zip(packets, places, strict=True) if place is not None]
    if not placed:
        raise ItemError("none of its pictures is where its index has them: it is damaged", stage="read")
    return _Found(
        [packet._replace(pts=None, dts=place + ahead) for packet, place in placed],
        [ordinal[place] for _, place in placed],
        [place + ahead for place in pictures],
        [packet.position for packet, place in zip(packets, places, strict=True) if place is None],
    )


def _beside_gaps(found: _Found, lateness: int) -> set[int]:
    """Positions of packets that may lack bytes, or whose picture's place depends on one that is missing.

    lateness: by how many pictures the orders of decoding and of presentation differ.
    """
    positions = {*found.strays}
    for at, (before, after) in enumerate(pairwise(zip(found.packets, found.numbers, strict=True)), 1):
        if after[1] != before[1] + 1 or after[0].position != before[0].position + 1:
            positions |= {packet.position for packet in found.packets[max(0, at - 1 - lateness) : at]}
            if not after[0].key:
                positions.add(after[0].position)
    return positions


def _with_missing(timeline: Timeline, found: _Found) -> Timeline:
    """The timeline with a frame for each that is missing between others."""
    numbers = sorted(found.numbers)[: len(timeline.ticks)]
    ticks = [time - found.times[numbers[0]] + timeline.ticks[0] for time in found.times[: numbers[-1] + 1]]
    packets = [-1 - number for number in range(len(ticks))]
    for number, packet in zip(numbers, timeline.packets, strict=True):
        packets[number] = packet
    keys = [key._replace(number=numbers[key.number]) for key in timeline.keys]
    video = replace(timeline.video, rate=_rate(ticks, timeline.video))
    return replace(timeline, video=video, ticks=ticks, packets=packets, keys=keys)


def _extend(spans: list[tuple[float, float]], clock: Clock, packet: Packet[Any]) -> None:
    at = packet.pts if packet.pts is not None else packet.dts
    if at is None:
        return
    while len(spans) <= clock.part:
        spans.append((math.inf, -math.inf))
    begin, end = spans[clock.part]
    spans[clock.part] = min(begin, at * clock.tick), max(end, (at + (packet.duration or 0)) * clock.tick)


def _first(decode: Callable[[], Iterable[Any]]) -> VideoFrame | None:
    import av

    try:
        return next(iter(decode()), None)
    except (av.FFmpegError, ValueError):
        return None


def is_shown(codec: str, packet: Packet[Any]) -> bool:
    """Whether a packet's picture is shown. An edit list may cut it off; VP8 and VP9 have packets that only serve to
    decode others, as their headers say (RFC 6386, section 9.1; VP9 bitstream specification, section 6.2)."""
    if packet.is_discard or packet.size == 0:
        return False
    if codec not in ("vp8", "vp9") or packet.is_keyframe:
        return True
    data = memoryview(packet)
    first = data[0]
    if codec == "vp8":
        return bool(first >> 4 & 1)
    if data[-1] & 0xE0 == 0xC0 or first >> 6 != 2:  # a superframe shows its last one; without the marker, no VP9
        return True
    bit = 3 if first >> 4 & 3 != 3 else 2  # after the frame marker and the profile: show_existing_frame
    return bool(first >> bit & 1) or bool(first >> (bit - 2) & 1)


def _is_untimed(container: InputContainer, stream: VideoStream, packets: list[_Packet]) -> bool:
    """Whether the container has no order of presentation, and the codec may show pictures in another order than that
    of their packets. FFmpeg guesses times for AVI, wrongly where two B-frames follow each other."""
    from av.codec.codec import Properties

    codec: Any = stream.codec_context.codec
    may_differ = codec.properties & Properties.REORDER.value
    timed = not set(container.format.name.split(",")) & _UNTIMED and all(packet.pts is not None for packet in packets)
    return bool(may_differ) and not timed


def _damaged(container: InputContainer, packets: Sequence[_Packet]) -> list[int]:
    """The packets that are damaged. In streams that a parser cuts into packets (MPEG-TS), a gap in the data is told of
    the one before the damaged one; where one stream follows another, the gap is none."""
    parsed = _is_stream(container)
    joints = {packet.position for before, packet in pairwise(packets) if packet.part != before.part}
    found = set()
    for packet in packets:
        at = packet.position
        if packet.damaged and not (parsed and joints & {at + 1, at + 2}):
            found |= {at, at + 1} if parsed else {at}
    return sorted(found)


def _joints(read: _Read, time_base: Fraction) -> tuple[int, ...]:
    """What to add to the times of each part but the first, so that it begins where the one before it ends."""
    ahead, joints = 0.0, []
    for (_, end), (begin, _) in pairwise(read.spans):
        ahead += end - begin
        joints.append(round(ahead / time_base))
    return tuple(joints)


def _remarks(stream: VideoStream, read: _Read) -> list[str]:
    found = []
    picture = read.picture
    if picture is not None and picture.interlaced_frame:
        found.append(INTERLACED)
    if picture is not None and int(picture.color_trc) in HDR:
        found.append(
            "HDR: its brightness and colours are brought down to those of other videos (BT.709); "
            "a video that is written is no HDR"
        )
    if (read.additions and stream.metadata.get("alpha_mode") == "1") or (
        picture is not None and _is_transparent(picture)
    ):
        found.append(_TRANSPARENT)
    others = {size for size in read.sizes if picture is not None and size != (picture.width, picture.height)}
    if others and picture is not None:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(others))
        found.append(f"of several sizes: pictures of {listed} are scaled to {picture.width}x{picture.height}")
    if len(read.spans) > 1:
        found.append("made of several recordings, whose clock begins anew: they are taken one after the other")
    if len({count for index, count in read.restarts.items() if index == stream.index or count}) > 1:
        found.append("of streams whose clocks begin anew in different places: sound may not fit the pictures")
    return found


def _is_transparent(picture: VideoFrame) -> bool:
    if not any(each.is_alpha for each in picture.format.components):
        return False
    return bool((picture.to_ndarray(format="rgba")[:, :, 3] < 255).any())


def _lost(container: InputContainer, stream: VideoStream, packets: list[_Packet], cut: bool) -> int:
    """How many frames an MP4's index, or the header of an AVI that was cut off, lists beyond those that are there."""
    formats = container.format.name.split(",")
    if "mp4" in formats:
        return max(0, sum(not entry.is_discard for entry in stream.index_entries) - len(packets))
    return max(0, stream.frames - len(packets)) if cut and "avi" in formats else 0


def _cut(container: InputContainer, read: _Read) -> str | None:
    """Why the container counts as cut off: it ends before the time that its header states. None if it does not."""
    import av

    if container.duration is None or _is_stream(container) or len(read.spans) != 1:
        return None
    [(_, end)] = read.spans
    stated = container.duration / av.time_base
    if "matroska" not in container.format.name:  # there, it is the time of the end
        stated += max(0.0, (container.start_time or 0) / av.time_base)
    if end >= stated - END_SECONDS:
        return None
    return f"its header says that it lasts {stated:.3f} s, and it ends at {max(end, 0):.3f} s: it is cut off"


def _short(size: int, promised: int | None) -> str | None:
    """Why the file counts as cut off, by its size. None if it does not."""
    if promised is None or size >= promised:
        return None
    return f"its header says that it has {promised:,} bytes, and it has {size:,}: it is cut off"


def _is_stream(container: InputContainer) -> bool:
    """Whether it is made to be sent (MPEG-TS): without an index, and with a clock that may start anywhere."""
    from av.format import Flags

    return bool(Flags(container.format.flags) & Flags.ts_discont)


def _order_by_decoding(opened: Input, packets: list[_Packet]) -> dict[int, int]:
    """The rank of each packet's picture in the decoder's output; packets without one stay behind the one before."""
    import av

    shown: list[int] = []
    stream = video_stream(opened.container)
    stream.codec_context.thread_count = 1
    for position, packet in enumerate(opened.packets(stream)):
        if packet.size and position > packets[-1].position:
            continue  # the file ends in it
        if packet.size:
            packet.pts = packet.dts = position
        try:
            shown += [frame.pts for frame in packet.decode() if frame.pts is not None]
        except av.FFmpegError:
            continue
    ranks = {position: rank for rank, position in enumerate(dict.fromkeys(shown))}
    latest = -1
    places = []
    for each in packets:
        rank = ranks.get(each.position)
        latest = max(latest, latest if rank is None else rank)
        places.append(((latest, 1) if rank is None else (rank, 0), each.position))
    return {position: rank for rank, (_, position) in enumerate(sorted(places))}


# -- putting it together -------------------------------------------------------------------------------


def _timeline(video: Video, packets: list[_Packet], rank: dict[int, int] | None, *, seekable: bool = True) -> Timeline:
    tick = 1 / (video.rate * video.time_base)  # ticks per frame

    def at(packet: _Packet) -> int | None:
        time = packet.pts if packet.pts is not None else packet.dts
        return None if time is None else time - video.start + (video.joints[packet.part - 1] if packet.part else 0)

    times = [at(packet) for packet in packets]
    if rank is None:
        order = sorted(range(len(packets)), key=lambda index: (times[index] or 0, packets[index].position))
    else:
        order = sorted(range(len(packets)), key=lambda index: rank[packets[index].position])
    ordered = [packets[index] for index in order]
    ticks: list[int] = []
    for time in _filled([times[index] for index in order], tick):
        # Two pictures at the same moment could not both be shown.
        ticks.append(max(time, ticks[-1] + 1) if ticks else time)
    if ticks[0] < 0:  # players begin with the first picture, too
        video = replace(video, start=video.start + ticks[0], end=video.end - ticks[0])
        ticks = [each - ticks[0] for each in ticks]
    seekable = seekable and not video.joints  # a time that comes twice is no place
    keys = [
        Key(number, packet.position, packet.pts, packet.dts if seekable else None)
        for number, packet in enumerate(ordered)
        if packet.key
    ]
    end = ticks[-1] + (ordered[-1].duration or (ticks[-1] - ticks[-2] if len(ticks) > 1 else max(1, round(tick))))
    if ticks[-1] < video.end < end:  # an edit list cuts the last picture short
        end = video.end
    return Timeline(
        replace(video, end=end, rate=_rate(ticks, video)), ticks, [packet.position for packet in ordered], keys
    )


def _rate(ticks: Sequence[int], video: Video) -> Fraction:
    """Frames per second, as they come: headers are often far from it."""
    if len(ticks) < 2:
        return video.rate
    return max(_SLOWEST, ((len(ticks) - 1) / ((ticks[-1] - ticks[0]) * video.time_base)).limit_denominator(1001))


def _lateness(timeline: Timeline) -> int:
    """By how many pictures the order of presentation is behind that of decoding."""
    order = sorted(timeline.packets)
    return max(bisect_left(order, packet) - number for number, packet in enumerate(timeline.packets))


def _without_doubtful(timeline: Timeline, depth: int | None) -> tuple[Timeline, int]:
    """The timeline without its last frames, if pictures may be missing between them; and how many these are.

    Pictures are stored in the order of decoding: where a file is cut off, some that are shown earlier are missing, and
    it is not known how many. depth: by how many pictures the decoder says that the two orders differ, of a file that is
    known to be cut off. If it is not known (None), a gap between the last times tells it.
    """
    ticks, packets = timeline.ticks, timeline.packets
    late = _lateness(timeline)
    keep = max(0, len(ticks) - max(late, depth or 0))
    if depth is None and late:
        gaps = [after - before for before, after in pairwise(ticks)]
        usual = gaps[max(0, keep - _USUAL) : keep - 1]
        most = 1.5 * max(usual, default=math.inf)
        keep = next((number + 1 for number, gap in enumerate(gaps[keep - 1 :], keep - 1) if gap > most), len(ticks))
    if keep == len(ticks):
        return timeline, 0
    keys = [key for key in timeline.keys if key.number < keep]
    video = replace(timeline.video, end=max(1, ticks[keep]))
    return replace(timeline, video=video, ticks=ticks[:keep], packets=packets[:keep], keys=keys), len(ticks) - keep


def _filled(times: Sequence[int | None], tick: Fraction) -> list[int]:
    """Ascending times in the order of presentation; those that are missing lie evenly between the others.

    times: as the packets have them. Some containers have them in another order, and they are sorted.
    """
    known = [index for index, time in enumerate(times) if time is not None]
    values = sorted(time for time in times if time is not None)
    if not known:
        return [round(index * tick) for index in range(len(times))]
    filled = [values[0] - round((known[0] - index) * tick) for index in range(known[0])]
    for (index, value), (following, next_value) in pairwise(zip(known, values, strict=True)):
        if following == index + 1:
            filled.append(value)
            continue
        step = Fraction(next_value - value, following - index)
        filled += [value + round(each * step) for each in range(following - index)]
    return filled + [values[-1] + round(each * tick) for each in range(len(times) - known[-1])]


def _metadata(container: InputContainer, stream: VideoStream, picture: VideoFrame | None, **names: Any) -> Video:
    import av

    context = stream.codec_context
    time_base = _fraction(stream.time_base) or Fraction(1, av.time_base)
    start = 0
    if _is_stream(container) and container.start_time is not None:
        start = round(Fraction(container.start_time, av.time_base) / time_base)
    seen = context if picture is None else picture
    matrix = _matrix(picture)
    width, height = seen.width, seen.height
    video = Video(
        **names,
        stream=stream.index,
        codec=context.name,
        time_base=time_base,
        start=start,
        rate=_fraction(stream.average_rate) or _fraction(stream.guessed_rate) or _UNKNOWN_RATE,
        width=width,
        height=height,
        matrix=matrix,
        aspect=_fraction(stream.sample_aspect_ratio) or _fraction(context.sample_aspect_ratio) or Fraction(1),
        colour=Colour(int(seen.color_range), int(seen.colorspace), int(seen.color_primaries), int(seen.color_trc)),
        end=(stream.start_time or 0) - start + (stream.duration or 0),
    )
    return replace(video, width=height, height=width) if video.turns % 2 else video


def _fraction(value: Any) -> Fraction | None:
    return Fraction(value.numerator, value.denominator) if value else None


def _matrix(picture: VideoFrame | None) -> tuple[int, ...]:
    from av.sidedata.sidedata import Type

    if picture is None:
        return ()
    side_data: list[Any] = list(picture.side_data)
    data = next((each for each in side_data if each.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return ()
    numbers = memoryview(bytes(data)).cast("i").tolist()
    # A damaged matrix has no meaning, and players ignore it.
    unit = 1 << 16
    a, b, _, c, d = numbers[:5]
    return tuple(numbers) if max(map(abs, (a, b, c, d))) <= unit and a * d != b * c else ()


# -- in a process of its own ---------------------------------------------------------------------------


class Prober:
    """Probes videos in a process of its own, so that a file that crashes FFmpeg, or keeps it busy for ever, costs
    that file and not the job. For one thread; close it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, key: str, root: str, name: str) -> Timeline:
        """See :func:`probe`. Raises ItemError also if it takes too long or crashes."""
        store = open_store(root)
        size, mark = store.marked(name)
        if root.startswith("memory:"):  # which no other process sees
            return probe(key, root, name, (size, mark))
        seconds = PATIENCE_SECONDS + size / PATIENCE_BYTES_PER_SECOND
        waiting = seconds + (0 if store.is_local else STORAGE_SECONDS)
        if self._process is None:
            inherited = processes.environment()  # and this very Tally
            paths = [str(Path(__file__).parents[2]), inherited.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                processes.command(__spec__.name),
                env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is for the coordinator
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(waiting, stop)
        timer.start()
        try:
            process.stdin.write(json.dumps([key, root, name, size, mark]) + "\n")
            process.stdin.flush()
            while (answer := process.stdout.readline()).startswith("+"):
                if int(answer) <= _MAX_REREADS * size:  # time for the network does not count
                    timer.cancel()
                    timer = threading.Timer(waiting, stop)
                    timer.start()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            code = process.wait()
            self.close()
            if late.is_set():
                raise ItemError(f"probing it took longer than {seconds:.0f} s", stage="read")
            raise ItemError(f"probing it crashed FFmpeg (exit code {code}): it is damaged", stage="read")
        store.check_mark(name, mark)  # was it one and the same all the time?
        found = json.loads(answer)
        if "error" in found:
            kind = next(each for each in _KINDS if each.__name__ == found["kind"])
            if issubclass(kind, StorageError):
                raise kind(found["error"], hint=found["hint"])
            raise ItemError(found["error"], stage="read", hint=found["hint"])
        return Timeline.from_json(found)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # it ended before it read a request
                    if pipe is not None:
                        pipe.close()


def _serve() -> None:
    """Answer each line of JSON by one, after lines such as ``+1048576``: the bytes read from a bucket so far."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    reported = 0

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the parent is gone, and FFmpeg may be busy for long

    def report(fetched: int) -> None:
        nonlocal reported
        if fetched < reported or fetched >= reported + _REPORT_BYTES:
            reported = fetched
            print(f"+{fetched}", flush=True)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            key, root, name, size, mark = json.loads(requests.get())
            reported = 0
            answer = probe(key, root, name, (size, mark), report).to_json()
        except TallyError as error:
            kind = next(each for each in _KINDS if isinstance(error, each))
            answer = {"error": error.message, "hint": error.hint, "kind": kind.__name__}
        except Exception as error:
            message = f"it cannot be probed: {type(error).__name__}: {error}"
            answer = {"error": message, "hint": None, "kind": TallyError.__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
