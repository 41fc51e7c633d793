"""Encoding pictures into a segment: a run of frames as an MP4 that decodes without anything before it.

Encoders see frames at even steps; afterwards each packet gets its frame's own time. So every time base and every
spacing of frames is kept exactly, whatever units an encoder counts in.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ItemError
from tally.media.video.colour import UNSPECIFIED, matrix_for, range_for, scored
from tally.media.video.container import error_text
from tally.media.video.metadata import Video

if TYPE_CHECKING:
    from av.video.stream import VideoStream

FORMATS = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "webm": "webm"}
"""Kinds of videos that can be written, and FFmpeg's names for their containers."""

DEFAULTS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9"}
"""The encoder for each kind of video."""

_SEGMENTS = ("mp4", "mov")
_GOP_SECONDS = 10
_GOP_FRAMES = 250
_FULL_RANGE = 2
_BITS_PER_PIXEL = 0.15  # for encoders without a quality scale


@dataclass(frozen=True, slots=True)
class Encoding:
    """How pictures are encoded. codec: FFmpeg's name of an encoder. crf: its quality; None: the default."""

    codec: str
    crf: float | None = None


@dataclass(frozen=True, slots=True)
class _Scale:
    """An encoder's quality scale: the name of its option, its best and worst value, and the default."""

    option: str
    low: float
    high: float
    default: float


@dataclass(frozen=True, slots=True)
class _Settings:
    scale: _Scale | None
    options: Mapping[str, str] = field(default_factory=dict)


# Speed and size were compared on one thread, as every core has a worker: docs/discussion/measurements.md
_SETTINGS = {
    "libx264": _Settings(_Scale("crf", 0, 51, 20), {"preset": "veryfast"}),
    "libx264rgb": _Settings(_Scale("crf", 0, 51, 20), {"preset": "veryfast"}),
    "libx265": _Settings(
        _Scale("crf", 0, 51, 23),
        {"preset": "veryfast", "x265-params": "log-level=none:info=0:open-gop=0:pools=none:frame-threads=1"},
    ),
    "libsvtav1": _Settings(_Scale("crf", 1, 63, 30), {"preset": "10", "svtav1-params": "lp=1"}),
    "libvpx-vp9": _Settings(_Scale("crf", 0, 63, 30), {"deadline": "realtime", "cpu-used": "5"}),
}
_HARDWARE = {
    "_nvenc": _Settings(_Scale("cq", 1, 51, 23), {"rc": "vbr"}),
    "_qsv": _Settings(_Scale("global_quality", 1, 51, 23)),
    "_amf": _Settings(_Scale("qp", 0, 51, 22), {"rc": "cqp"}),
}
HARDWARE = (*_HARDWARE, "_videotoolbox", "_v4l2m2m")
"""Endings of the names of encoders that need hardware."""

_OLD = frozenset({"mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "mjpeg"})


def settings(codec: str) -> _Settings:
    if codec in _OLD:
        return _Settings(_Scale("q", 1, 31, 3))
    hardware = next((found for suffix, found in _HARDWARE.items() if codec.endswith(suffix)), None)
    return hardware or _SETTINGS.get(codec, _Settings(None))


def segment_format(codec: str) -> str | None:
    return next((format_ for format_ in _SEGMENTS if codec in _supported(format_)), None)


_known: dict[str, set[str]] = {}


def _supported(container: str) -> set[str]:
    if container not in _known:
        import av

        with av.open(io.BytesIO(), "w", format=container) as opened:
            _known[container] = opened.supported_codecs
    return _known[container]


class Encoder:
    """Encodes one segment. Used by one thread.

    size: width and height of the pictures, upright.
    note: how the pictures had to be changed, or None.
    Raises ItemError if the encoder cannot take pictures of that size.
    """

    def __init__(self, encoding: Encoding, video: Video, size: tuple[int, int]) -> None:
        import av
        from av.video.reformatter import Interpolation, VideoReformatter

        self._video, self._encoding = video, encoding
        self._reformatter = VideoReformatter()
        # Without accurate rounding, everything gets a little darker.
        self._interpolation = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
        width, height = reversed(size) if video.turns % 2 else size
        self.note: str | None = None
        self._pad = (0, 0)
        try:
            self._stream = self._open(width, height)
        except (av.FFmpegError, ValueError) as error:
            self._pad = (width % 2, height % 2)
            if not any(self._pad):
                raise self._refused(width, height, error) from None
            try:
                self._stream = self._open(width + self._pad[0], height + self._pad[1])
            except (av.FFmpegError, ValueError) as again:
                raise self._refused(width, height, again) from None
            self.note = (
                f"{video.key}: {encoding.codec} holds even sizes only: pictures of {width}x{height} were made "
                f"{width + self._pad[0]}x{height + self._pad[1]} by repeating the last row or column"
            )
        self._ticks: list[int] = []
        self._packets: list[Any] = []
        self._base = self._stream.codec_context.time_base
        self._new_frame()

    def add(self, picture: np.ndarray[Any, np.dtype[np.uint8]], tick: int) -> None:
        """Encode a picture, ``uint8[h, w, 3]`` RGB or ``uint8[h, w]``, upright, to be shown at ``tick``."""
        if picture.ndim == 2:
            picture = np.repeat(picture[:, :, None], 3, axis=2)
        if self._video.turns:
            picture = np.rot90(picture, -self._video.turns)
        if any(self._pad):
            picture = np.pad(picture, ((0, self._pad[1]), (0, self._pad[0]), (0, 0)), mode="edge")
        self._pixels[...] = picture
        frame = self._reformatter.reformat(
            self._given,
            format=self._format,
            dst_colorspace=self._matrix,
            src_color_range=_FULL_RANGE,
            dst_color_range=self._range,
            interpolation=self._interpolation,
            threads=1,
        )
        context = self._stream.codec_context
        frame.colorspace, frame.color_range = context.colorspace, context.color_range
        frame.pts, frame.time_base = len(self._ticks), self._base
        self._ticks.append(tick)
        self._packets += self._stream.encode(frame)
        if frame is self._given:  # the encoder may still look at it
            self._new_frame()

    def _new_frame(self) -> None:
        """A frame in RGB; ``self._pixels`` is its memory."""
        import av

        width, height = self._stream.width, self._stream.height
        self._given = av.VideoFrame(width, height, "rgb24")
        plane: Any = self._given.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        self._pixels = rows[:, : 3 * width].reshape(height, width, 3)

    def close(self) -> bytes:
        """The segment as a file's content. Its times are relative to the first frame's."""
        self._packets += self._stream.encode(None)
        ticks = [self._ticks[packet.pts] - self._ticks[0] for packet in self._packets]
        with self._container as container:
            for packet, tick, dts in zip(self._packets, ticks, decoding_times(ticks), strict=True):
                packet.pts, packet.dts, packet.duration = tick, dts, 0
                packet.time_base = self._video.time_base
                container.mux(packet)
        return self._buffer.getvalue()

    def _open(self, width: int, height: int) -> VideoStream:
        import av
        from av.codec.context import Flags

        self._buffer = io.BytesIO()
        self._container = av.open(
            self._buffer,
            "w",
            format=segment_format(self._encoding.codec) or _SEGMENTS[0],
            container_options={"video_track_timescale": str(self._video.time_base.denominator)},
        )
        chosen, codec = settings(self._encoding.codec), self._encoding.codec
        os.environ.setdefault("SVT_LOG", "1")  # or SVT-AV1 prints its settings for every segment
        scale, options = chosen.scale, dict(chosen.options)
        quality = self._encoding.crf if self._encoding.crf is not None else scale and scale.default
        if scale is not None and scale.option in ("crf", "cq"):
            options[scale.option] = f"{quality:g}"
        elif scale is not None and scale.option == "qp":
            options |= {"qp_i": f"{quality:g}", "qp_p": f"{quality:g}"}
        rate = self._rate()
        stream: VideoStream = self._container.add_stream(codec, rate=rate, options=options)  # type: ignore[assignment]
        context, colour = stream.codec_context, scored(self._video.colour)
        stream.width, stream.height = width, height
        stream.pix_fmt = self._format = _pixel_format(codec)
        context.time_base, context.framerate = 1 / rate, rate
        context.thread_count = 1
        context.gop_size = max(1, min(_GOP_FRAMES, round(rate * _GOP_SECONDS)))
        if codec not in _OLD:  # those make no B-frames unless asked to
            context.flags |= Flags.closed_gop
        if scale is None:
            context.bit_rate = int(width * height * rate * _BITS_PER_PIXEL)
        elif scale.option == "q":
            context.qmin = context.qmax = round(quality or scale.low)
        elif scale.option == "global_quality":
            context.global_quality = round(quality or 0)
        self._matrix, self._range = matrix_for(colour, height), range_for(colour)
        if self._format.startswith("yuvj") or av.VideoFormat(self._format).is_rgb:
            self._range = _FULL_RANGE
        context.sample_aspect_ratio = self._video.aspect
        # What the source does not state stays unstated, unless the encoding decides it.
        stated = colour.matrix in (UNSPECIFIED, self._matrix)
        context.colorspace = colour.matrix if stated else self._matrix
        context.color_range = self._range if self._range == _FULL_RANGE else colour.range
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        with _same_priority():
            context.open()
        return stream

    def _rate(self) -> Fraction:
        """Frames per second, within what encoders accept; it only guides how many bits are spent."""
        import av

        rate = min(max(self._video.rate, Fraction(1)), Fraction(240))
        if allowed := av.Codec(self._encoding.codec, "w").frame_rates:
            known = [Fraction(each.numerator, each.denominator) for each in allowed]
            return min(known, key=lambda each: abs(each - rate))
        return 1 / (1 / rate).limit_denominator(60_000)  # MPEG-4 allows up to 65,535

    def _refused(self, width: int, height: int, error: Exception) -> ItemError:
        return ItemError(
            f"{self._encoding.codec} cannot encode pictures of {width}x{height}: {error_text(error)}",
            stage="write",
            hint="Choose another encoder with --codec, or another size.",
        )


def _pixel_format(codec: str) -> str:
    import av
    from av.codec.codec import find_best_pix_fmt_of_list

    known = [each.name for each in av.Codec(codec, "w").video_formats or []]
    for name in ("yuvj420p",) if codec == "mjpeg" else ("yuv420p", "nv12", "yuv422p10le"):
        if name in known or not known:
            return name
    best, _ = find_best_pix_fmt_of_list(known, "rgb24")
    return best.name if best is not None else known[0]


def decoding_times(ticks: Sequence[int], end: int | None = None) -> list[int]:
    """Decoding times for packets in the order of decoding that are shown at ``ticks``: ascending, none after its tick.

    Each is the time of the frame that is shown :func:`delay` frames earlier.
    end: when the last frame's time ends. The packets last until then in both orders, as MP4 adds up durations in the
        order of decoding.
    Decoding times before the first frame's time are one tick apart. Frames should be more than :func:`delay` ticks
    apart: FFmpeg's MP4 muxer takes the smallest distance between a negative decoding time and its tick for the first's.
    """
    order, late = sorted(ticks), delay(ticks)
    if not late:
        return order
    rest = order[: len(order) - late]
    last = order.index(ticks[-1])
    shown = [*order[1:], order[-1] + 1 if end is None else end]
    ahead = max(late, shown[-1] - (shown[last] - order[last]) - rest[-1])
    return [order[0] - ahead + index for index in range(late)] + rest


def delay(ticks: Sequence[int]) -> int:
    """By how many packets, at most, the order of decoding lags behind that of presentation."""
    rank = {tick: index for index, tick in enumerate(sorted(ticks))}
    return max((index - rank[tick] for index, tick in enumerate(ticks)), default=0)


@contextmanager
def _same_priority() -> Iterator[None]:
    """Threads of this process keep their scheduling while the context lasts.

    Where it may, SVT-AV1 takes real-time priority, for its threads and for the one that opens it. Whatever this process
    started afterwards would inherit that, and could keep everything else from running.
    """
    threads = Path("/proc/self/task")
    if not threads.is_dir():  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in threads.iterdir():
            with suppress(OSError):  # it has ended
                if os.sched_getscheduler(int(thread.name)) != policy:
                    os.sched_setscheduler(int(thread.name), policy, parameters)
