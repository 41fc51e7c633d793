"""Decoding chosen frames exactly, from the keyframe before them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tally.errors import ItemError
from tally.media.video import webp
from tally.media.video.colour import HDR, matrix_for, range_for
from tally.media.video.container import Input, error_text, open_video
from tally.media.video.damage import STRICT, Judge, Judged
from tally.media.video.metadata import Video
from tally.media.video.probe import Key
from tally.media.video.tone import toned
from tally.storage import open_store

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

Picture: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

BEGINNING = Key(0, 0, None, None)
_FULL_RANGE = 2
_BEHIND = 32
"""So many packets behind the last one that is wanted, a decoder is asked for all that it has: none holds back more."""


def decode(
    video: Video, packets: Sequence[int], keys: Sequence[Key], damaged: Collection[int] = ()
) -> Iterator[Picture | ItemError]:
    """One picture, or the reason why there is none, for each chosen frame, in order.

    packets: positions of the frames' packets in the video stream (see ``Timeline``), in the order of presentation;
        negative for frames that are missing.
    keys: keyframes at or before the first frame, the nearest last. Decoding begins at the nearest; if its first
        picture is damaged, at one before it, for some streams need a run-up. Empty: the stream's beginning.
    damaged: positions of packets that are known to be damaged.
    Pictures are ``uint8[height, width, 3]`` RGB, upright, of the video's size.
    Raises what :func:`open_video` raises, and StorageError when the storage fails.
    """
    if video.codec == webp.CODEC:
        yield from _of_animation(video, packets)
        return
    starts: list[Key | _Run] = [*reversed(keys)] or [BEGINNING]
    with suppress(IndexError):
        kept = _kept.pop()
        if not damaged and kept.leads_to(video, keys, packets):
            starts.insert(0, kept)
        else:
            kept.close()
    for left, start in zip(reversed(range(len(starts))), starts, strict=True):
        run = start if isinstance(start, _Run) else _Run(video, start, damaged)
        sound = False
        try:
            found = run.pictures(packets)
            first = next(found)
            if left and isinstance(first, ItemError):
                continue
            yield first
            yield from found
            sound = run.sound
            return
        finally:
            if sound:
                _kept[:] = [run]
            else:
                run.close()


def _of_animation(video: Video, packets: Sequence[int]) -> Iterator[Picture | ItemError]:
    content = open_store(video.root).read(video.name, mark=video.mark)
    wanted, given = set(packets), 0
    for position, each in enumerate(webp.pictures(content, max(packets))):
        failed = isinstance(each, ItemError)
        if position in wanted and not failed:
            given += 1
            yield resized(each, video)
        if failed:  # the ones behind it build on it
            yield from [each] * (len(packets) - given)


class _Run:
    """A video that is decoded from a keyframe on, for as many chunks as go on where the one before ended. For one
    thread at a time; close it.

    sound: nothing went wrong, and it has not come to its end.
    """

    def __init__(self, video: Video, key: Key, damaged: Collection[int]) -> None:
        from av.video.reformatter import VideoReformatter

        self.sound = not damaged
        self._video = video
        self._container, packets = _open_at(video, key)
        self._judge, self._converter = Judge(video.codec, key, damaged), VideoReformatter()
        self._failed: dict[int, str] = {}
        self._position, self._last = -1, -1
        self._frames = self._decoded(packets)

    def leads_to(self, video: Video, keys: Sequence[Key], packets: Sequence[int]) -> bool:
        """Whether these pictures of the video are still to come, as far as is known, and no keyframe is nearer."""
        nearest = max((key.packet for key in keys), default=0)
        return video == self._video and nearest <= self._position < max(packets)

    def pictures(self, packets: Sequence[int]) -> Iterator[Picture | ItemError]:
        """See :func:`decode`."""
        wanted = {position: index for index, position in enumerate(packets)}
        self._last = max(packets)
        due = 0
        for position, frame, error in self._frames:
            self.sound &= error is None
            index = wanted.get(position, -1)
            if index < due:
                continue  # before the wanted ones, or between them
            for lost in range(due, index):
                self.sound = False
                yield _lost(packets[lost], self._failed)
            due = index + 1
            yield error or _picture(frame, self._video, self._converter)
            if due == len(packets):
                self.sound &= not self._failed
                return
        self.sound = False
        for lost in range(due, len(packets)):
            yield _lost(packets[lost], self._failed)

    def _decoded(self, packets: Iterator[tuple[int, Packet[Any]]]) -> Iterator[Judged]:
        """Frames in the order of presentation, with their packets' positions.

        The position takes the place of the presentation time inside the decoder, so no frame is taken for another.
        """
        import av

        context: Any = self._container.streams[self._video.stream].codec_context
        judge = self._judge
        try:
            for position, packet in packets:
                if position > self._last + _BEHIND:
                    break  # a frame needs only packets before its own
                self._position = position
                judge.given(position, packet)
                packet.pts = packet.dts = position
                try:
                    decoded = context.decode(packet)
                except (av.FFmpegError, ValueError) as error:
                    self._failed[position] = error_text(error)
                    judge.failed(position)
                    continue
                for frame in decoded:
                    yield from judge.shown(frame.pts, frame)
        except av.FFmpegError as error:  # nothing can be read after this
            reason = f"reading it failed: {error_text(error)}"
            self._failed.update((lost, reason) for lost in range(self._position + 1, self._last + 1))
        try:
            for frame in context.decode(None):
                yield from judge.shown(frame.pts, frame)
        except av.FFmpegError:
            pass
        yield from judge.end()

    def close(self) -> None:
        self._container.close()


_kept: list[_Run] = []
"""What the last chunk was decoded with, if it may go on: from the keyframe on, all would have to be decoded again."""


def _open_at(video: Video, key: Key) -> tuple[Input, Iterator[tuple[int, Packet[Any]]]]:
    """The container, and the video stream's packets from the keyframe's on, with their positions."""
    container = _open(video)
    if key.packet and key.dts is not None:
        _prime(container, video)
        first = _seek(container, video, key)
        packets = _nonempty(container.packets(container.streams[video.stream]))
        if first is not None:
            return container, enumerate(chain([first], packets), key.packet)
        container.close()  # seeking does not work in this container: read from its beginning
        container = _open(video)
    packets = _nonempty(container.packets(container.streams[video.stream]))
    return container, ((position, packet) for position, packet in enumerate(packets) if position >= key.packet)


def _open(video: Video) -> Input:
    container = open_video(video.root, video.name, (video.size, video.mark) if video.mark else None)
    if video.stream >= len(container.streams):
        container.close()
        raise ItemError("the file has changed since the job began", stage="read")
    context: Any = container.streams[video.stream].codec_context
    context.thread_count = 1  # there is a worker for every core
    if video.codec in STRICT:
        context.options = {**context.options, "err_detect": STRICT[video.codec]}
    return container


def _prime(container: Input, video: Video) -> None:
    """Decode the stream's first packet, for 4:4:4 H.264: only it names the version of x264 that made the stream,
    and FFmpeg corrects a fault of old versions."""
    import av

    stream: Any = container.streams[video.stream]
    if video.codec != "h264" or "444" not in (stream.codec_context.pix_fmt or ""):
        return
    try:
        stream.codec_context.decode(next(_nonempty(container.packets(stream))))
    except (av.FFmpegError, StopIteration):
        return


def _seek(container: Input, video: Video, key: Key) -> Packet[Any] | None:
    """The keyframe's packet, if seeking leads to it; the next packet is the one that follows it."""
    import av

    assert key.dts is not None
    stream = container.streams[video.stream]
    try:
        container.seek(key.dts, stream=stream)
        for packet in container.packets(stream):
            if (packet.pts, packet.dts) == (key.pts, key.dts):
                return packet
            if packet.dts is not None and packet.dts > key.dts:
                return None
    except av.FFmpegError:
        pass
    return None


def _nonempty(packets: Iterable[Packet[Any]]) -> Iterator[Packet[Any]]:
    """All packets but the empty one at the end."""
    return (packet for packet in packets if packet.size or packet.dts is not None or packet.pts is not None)


def _picture(frame: VideoFrame, video: Video, converter: VideoReformatter) -> Picture | ItemError:
    turns, hdr = video.turns, video.colour.transfer in HDR
    left, top, width, height = video.placed or (0, 0, video.width, video.height)
    if turns % 2:
        width, height = height, width
    try:
        if video.deinterlaced and frame.interlaced_frame:
            frame = _deinterlaced(frame)
        array: Any = converter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb48le" if hdr else "rgb24",
            src_colorspace=matrix_for(video.colour, frame.height),
            src_color_range=range_for(video.colour),
            dst_color_range=_FULL_RANGE,
            interpolation="BICUBIC",
            threads=1,
        ).to_ndarray()
    except (OSError, ValueError) as error:
        return ItemError(f"its picture cannot be converted to RGB: {error_text(error)}", stage="decode")
    if hdr:
        array = toned(array, video.colour.transfer, video.colour.primaries)
    if turns:
        array = np.ascontiguousarray(np.rot90(array, turns))
    return put(array, left, top, video) if video.placed else array


def _deinterlaced(frame: VideoFrame) -> VideoFrame:
    """The frame with the lines of its first moment, and others made of them. It takes no other frame for that, so
    that a frame is the same whatever chunk it is in."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25), name="in"
    )
    spatial = graph.add("estdif", "mode=frame:parity=auto:deint=all")
    sink = graph.add("buffersink")
    source.link_to(spatial)
    spatial.link_to(sink)
    graph.configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()  # type: ignore[return-value]


def resized(picture: Picture, video: Video) -> Picture:
    """A picture that is no frame of FFmpeg's, at the video's size."""
    left, top, width, height = video.placed or (0, 0, video.width, video.height)
    if picture.shape[:2] != (height, width):
        from PIL import Image

        picture = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    return put(picture, left, top, video) if video.placed else picture


def put(picture: Picture, left: int, top: int, video: Video) -> Picture:
    """A picture of the video's size that has this one at a place; what is outside is cut off, and the rest is black."""
    found = np.zeros((video.height, video.width, 3), np.uint8)
    inside = picture[max(0, -top) : max(0, -top) + video.height, max(0, -left) : max(0, -left) + video.width]
    found[max(0, top) :, max(0, left) :][: inside.shape[0], : inside.shape[1]] = inside
    return found


def _lost(position: int, failed: Mapping[int, str]) -> ItemError:
    if position < 0:
        return ItemError("it is missing: the file is damaged where it was", stage="read")
    reason = failed.get(position) or "the decoder gave no picture for it; a keyframe before it is missing"
    return ItemError(f"it cannot be decoded: {reason}", stage="decode")
