"""Joining segments into the finished video: their packets unchanged, with the sound of the source.

Segments, and a video that an earlier generation finished, consist of closed groups of pictures. They are sorted by the
time of their first picture, and all decoding times are set anew, as those of a segment ignore its neighbours. Two
passes are made over the packets, one for times and one for content, so memory holds only some numbers per frame.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tally.errors import ItemError, JobError, SourceChangedError, StorageAwayError, StorageError
from tally.media.video import webp
from tally.media.video.container import Input, error_text, open_video
from tally.media.video.encode import FORMATS, decoding_times, delay
from tally.media.video.metadata import PICTURES, Video
from tally.media.video.tracks import Timed, Track, describe_stream, plain, seconds, tracks
from tally.storage import key_of, open_store

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_MOV = ("mp4", "mov")
_SILENT = (PICTURES, webp.CODEC)  # they hold nothing but pictures
_ASPECT = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")  # these codecs store the shape of pixels
_TIMESCALE = 2**31 - 1  # the maximum of MP4
# Metadata of the file, not of its content.
_TECHNICAL = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "duration"})


@dataclass(frozen=True, slots=True)
class Segment:
    """Encoded frames in a file of this machine. start: the tick of its first frame; None: as in the file."""

    path: Path
    start: int | None = None


class _Group(NamedTuple):
    """A group of pictures: its first tick, its segment, and the ticks of its packets in the order of decoding."""

    tick: int
    segment: int
    ticks: list[int]


def join(target: Path, kind: str, video: Video, segments: Sequence[Segment], *, audio: bool = True) -> list[str]:
    """Write the video to ``target``; returns notes on what differs from the source.

    kind: a key of :data:`FORMATS`. audio: False leaves the sound out.
    Raises StorageError if the source has changed or cannot be read (with audio only), JobError if the segments do not
    fit together.
    """
    import av

    notes: list[str] = []
    groups = _groups(segments, video)
    fine = _subticks(groups)
    with ExitStack() as stack:
        reading = None if video.codec in _SILENT else _source(stack, video, notes, needed=audio)
        source = reading.container if reading is not None else None
        options = _options(kind, video.time_base.denominator * fine, source)
        out = stack.enter_context(av.open(str(target), "w", format=FORMATS[kind], container_options=options))
        first = stack.enter_context(_open(segments[0]))
        stream = _video_stream(out, first, video, source)
        if (lost := _lost_aspect(kind, video, stream)) is not None:
            notes.append(lost)
        others: list[Track] = []
        if source is not None:
            others = tracks(source, out, kind, video, notes, audio=audio)
            _describe(out, source, video.start * video.time_base)
        pictures = _pictures(segments, groups, fine, video, stream)
        for _, packet in heapq.merge(
            pictures, _packets(reading, others, notes, needed=audio), key=lambda each: each[0]
        ):
            out.mux(packet)
    return [f"{video.key}: {note}" for note in notes]


# -- pictures ------------------------------------------------------------------------------------------


def _open(segment: Segment) -> InputContainer:
    import av

    # A segment's times are relative to its first frame; its edit list is ignored.
    options = {} if segment.start is None else {"ignore_editlist": "1"}
    try:
        return av.open(str(segment.path), options=options)
    except (av.FFmpegError, ValueError) as error:
        raise StorageError(f"cannot read {segment.path}: {error_text(error)}") from None


def _demux(container: InputContainer) -> Iterator[Packet[Any]]:
    return (packet for packet in container.demux(container.streams.video[0]) if packet.size)


def _groups(segments: Sequence[Segment], video: Video) -> list[_Group]:
    """All groups of pictures, in the order of their times."""
    found: list[_Group] = []
    headers: dict[bytes, Path] = {}
    sizes = set()
    for index, segment in enumerate(segments):
        begin = len(found)
        with _open(segment) as container:
            context = container.streams.video[0].codec_context
            sizes.add((context.width, context.height))
            scale = plain(container.streams.video[0].time_base / video.time_base)  # type: ignore[operator]
            if context.extradata:
                headers.setdefault(bytes(context.extradata), segment.path)
            for packet in _demux(container):
                assert packet.pts is not None
                tick = round(packet.pts * scale)
                if packet.is_keyframe:
                    found.append(_Group(tick, index, []))
                if len(found) == begin:
                    raise StorageError(f"{segment.path} is damaged: it does not begin with a keyframe")
                found[-1].ticks.append(tick)
        if segment.start is not None and len(found) > begin:
            ahead = segment.start - min(min(group.ticks) for group in found[begin:])
            found[begin:] = [
                _Group(tick + ahead, index, [each + ahead for each in ticks]) for tick, _, ticks in found[begin:]
            ]
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise JobError(
            f"the pictures of {video.key} differ in size ({listed}), and a video has one size",
            hint="Return pictures of one size from the scorer, or write frames as pictures: --frames png",
        )
    if len(headers) > 1:
        raise JobError(
            f"the parts of {video.key} were encoded with different settings (the headers of "
            f"{' and '.join(str(path.name) for path in list(headers.values())[:2])} differ)",
            hint="Encoders of different machines or versions do not mix: score it again with --overwrite.",
        )
    found.sort()
    for group, following in pairwise(found):
        if max(group.ticks) >= min(following.ticks):
            raise JobError(
                f"two parts of {video.key} hold the frame at {float(following.tick * video.time_base):.3f} s"
            )
    return found


def _subticks(groups: Sequence[_Group]) -> int:
    """Into how many parts a tick must be divided to make room for decoding times; see :func:`decoding_times`."""
    ticks = [tick for group in groups for tick in group.ticks]
    gap = min((after - before for before, after in pairwise(sorted(ticks))), default=1)
    return delay(ticks) // gap + 1


def _pictures(
    segments: Sequence[Segment], groups: Sequence[_Group], fine: int, video: Video, stream: VideoStream
) -> Iterator[Timed]:
    base = video.time_base / fine
    ticks = [tick * fine for group in groups for tick in group.ticks]
    ordered = sorted(ticks)
    end = max(video.end * fine, ordered[-1] + 1)
    ends = dict(zip(ordered, [*ordered[1:], end], strict=True))
    times = iter(zip(ticks, decoding_times(ticks, end), strict=True))
    last = {group.segment: position for position, group in enumerate(groups)}
    with ExitStack() as stack:
        opened: dict[int, tuple[InputContainer, Iterator[Packet[Any]]]] = {}
        for position, group in enumerate(groups):
            if group.segment not in opened:
                container = stack.enter_context(_open(segments[group.segment]))
                opened[group.segment] = container, _demux(container)
            container, packets = opened[group.segment]
            for _ in group.ticks:
                packet = next(packets)
                packet.pts, packet.dts = next(times)
                packet.time_base, packet.duration = base, ends[packet.pts] - packet.pts
                packet.stream = stream
                yield seconds(packet.dts, base), packet
            if last[group.segment] == position:
                container.close()
                del opened[group.segment]


def _video_stream(
    out: OutputContainer, first: InputContainer, video: Video, source: InputContainer | None
) -> VideoStream:
    template = first.streams.video[0]
    stream = out.add_stream_from_template(template, opaque=True)
    stream.time_base = video.time_base
    stream.codec_context.framerate = video.rate
    stream.codec_context.sample_aspect_ratio = video.aspect
    if template.codec_context.name == "hevc" and out.format.name in _MOV:
        stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other
    if video.matrix:
        stream.set_display_matrix(video.matrix)
    if source is not None:
        describe_stream(stream, source.streams[video.stream])
    return stream


def _lost_aspect(kind: str, video: Video, stream: VideoStream) -> str | None:
    """A note if neither the codec nor the container can store that pixels are not square."""
    if video.aspect == 1 or kind in _MOV or stream.codec_context.name in _ASPECT:
        return None
    return (
        f"pixels of {video.aspect.numerator}:{video.aspect.denominator} are shown as squares: "
        f".{kind} files with this codec cannot store their shape"
    )


# -- the source ----------------------------------------------------------------------------------------


def _source(stack: ExitStack, video: Video, notes: list[str], *, needed: bool) -> Input | None:
    place = f"{key_of(video.root)}/{key_of(video.name)}"
    hint = "The sound comes from it: restore it and resume the job, or score it again."
    try:
        store = open_store(video.root)
        size, mark = store.marked(video.name)
        if size != video.size:
            raise StorageError(
                f"{place} has changed since it was scored: it had {video.size:,} bytes, and has {size:,} now", hint=hint
            )
        try:
            store.check_mark(video.name, video.mark)
        except SourceChangedError:
            raise StorageError(f"{place} has changed since it was scored: it was written anew", hint=hint) from None
        return stack.enter_context(open_video(video.root, video.name, (size, mark)))
    except (StorageError, ItemError) as error:
        if not needed:
            notes.append(
                f"titles, chapters and subtitles are missing, because the source cannot be read ({error.message})"
            )
            return None
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"the sound of {video.key} cannot be read: {error.message}",
            hint="Restore the file and resume the job.",
        ) from None


def _options(kind: str, scale: int, source: InputContainer | None) -> dict[str, str]:
    """Options of the container: exact times, the index first, the same bytes in every run."""
    options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}  # sound may begin before the pictures do
    if kind in _MOV:
        rates = [stream.codec_context.sample_rate for stream in source.streams.audio] if source is not None else []
        whole = math.lcm(scale, *(rate for rate in rates if rate))
        options |= {
            "movflags": "+faststart",
            "video_track_timescale": str(scale),
            "movie_timescale": str(whole if whole <= _TIMESCALE else scale),
        }
    return options


def _describe(out: OutputContainer, source: InputContainer, shift: Fraction) -> None:
    """Titles and chapters."""
    out.metadata.update({name: text for name, text in source.metadata.items() if name not in _TECHNICAL})
    chapters = source.chapters()
    for chapter in chapters:
        base = chapter["time_base"]
        if base is not None:
            chapter["start"] -= round(shift / base)
            chapter["end"] -= round(shift / base)
    if chapters:
        out.set_chapters(chapters)


def _packets(source: Input | None, others: Sequence[Track], notes: list[str], *, needed: bool) -> Iterator[Timed]:
    """The packets of the other streams, up to where the source cannot be read."""
    import av

    if source is None or not others:
        return
    by_stream = {track.source.index: track for track in others}
    for stream in source.streams:
        if stream.index not in by_stream:
            stream.discard = av.stream.Discard.all
    try:
        for packet in source.packets([track.source for track in others]):
            yield from by_stream[packet.stream.index].take(packet)
    except StorageError as error:
        if needed or isinstance(error, StorageAwayError):
            raise
        notes.append(f"subtitles end where the source could not be read any more ({error.message})")
    except (av.FFmpegError, OSError) as error:
        notes.append(f"the file is damaged: sound and subtitles end where reading failed ({error_text(error)})")
    for track in others:
        yield from track.end()
