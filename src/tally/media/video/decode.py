"""Decoding chosen frames exactly, from the keyframe before them."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tally.errors import ItemError
from tally.media.video.colour import matrix_for, range_for
from tally.media.video.container import Input, error_text, open_video
from tally.media.video.damage import STRICT, Judge, Judged
from tally.media.video.metadata import Video
from tally.media.video.probe import Key

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

Picture: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

BEGINNING = Key(0, 0, None, None)
_FULL_RANGE = 2


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
    *others, last = [*reversed(keys)] or [BEGINNING]
    for key in others:
        found = _decode(video, packets, key, damaged)
        first = next(found)
        if not isinstance(first, ItemError):
            yield first
            yield from found
            return
        found.close()
    yield from _decode(video, packets, last, damaged)


def _decode(video: Video, packets: Sequence[int], key: Key, damaged: Collection[int]) -> Generator[Picture | ItemError]:
    wanted = {position: index for index, position in enumerate(packets)}
    failed: dict[int, str] = {}
    due = 0
    container, found = _open_at(video, key)
    judge = Judge(video.codec, key, damaged)
    with container:
        for position, frame, error in _frames(container, video, found, max(packets), judge, failed):
            index = wanted.get(position, -1)
            if index < due:
                continue  # before the wanted ones, or between them
            for lost in range(due, index):
                yield _lost(packets[lost], failed)
            due = index + 1
            yield error or _picture(frame, video)
    for lost in range(due, len(packets)):
        yield _lost(packets[lost], failed)


def _frames(
    container: Input,
    video: Video,
    packets: Iterator[tuple[int, Packet[Any]]],
    last: int,
    judge: Judge,
    failed: dict[int, str],
) -> Iterator[Judged]:
    """Frames in the order of presentation, with their packets' positions.

    The position takes the place of the presentation time inside the decoder, so no frame is taken for another.
    """
    import av

    context: Any = container.streams[video.stream].codec_context
    position = -1
    try:
        for position, packet in packets:
            if position > last:
                break  # a frame needs only packets before its own
            judge.given(position, packet)
            packet.pts = packet.dts = position
            try:
                decoded = context.decode(packet)
            except (av.FFmpegError, ValueError) as error:
                failed[position] = error_text(error)
                judge.failed(position)
                continue
            for frame in decoded:
                yield from judge.shown(frame.pts, frame)
    except av.FFmpegError as error:  # nothing can be read after this
        failed.update((lost, f"reading it failed: {error_text(error)}") for lost in range(position + 1, last + 1))
    try:
        for frame in context.decode(None):
            yield from judge.shown(frame.pts, frame)
    except av.FFmpegError:
        pass
    yield from judge.end()


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


def _picture(frame: VideoFrame, video: Video) -> Picture | ItemError:
    turns = video.turns
    width, height = (video.height, video.width) if turns % 2 else (video.width, video.height)
    try:
        array: Any = frame.reformat(
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=matrix_for(video.colour, frame.height),
            src_color_range=range_for(video.colour),
            dst_color_range=_FULL_RANGE,
            interpolation="BICUBIC",
            threads=1,
        ).to_ndarray()
    except (OSError, ValueError) as error:
        return ItemError(f"its picture cannot be converted to RGB: {error_text(error)}", stage="decode")
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _lost(position: int, failed: Mapping[int, str]) -> ItemError:
    if position < 0:
        return ItemError("it is missing: the file is damaged where it was", stage="read")
    reason = failed.get(position) or "the decoder gave no picture for it; a keyframe before it is missing"
    return ItemError(f"it cannot be decoded: {reason}", stage="decode")
