"""Sound and subtitles of a video: copied, or converted if the output cannot hold them."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from tally.media.video.clock import Clock
from tally.media.video.container import error_text
from tally.media.video.encode import FORMATS
from tally.media.video.metadata import Video

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet

_SOUND = {"mp4": "aac", "mov": "aac", "mkv": "aac", "webm": "libopus"}
_BITS_PER_CHANNEL = 96_000
# Longer gaps become silence; shorter ones are rounding by the container.
_RESAMPLER = {"async": "1", "min_hard_comp": "0.05"}
_TEXT = {"mp4": "mov_text", "mov": "mov_text", "mkv": "subrip", "webm": "webvtt"}
_STYLES = b"""[Script Info]\r
ScriptType: v4.00+\r
PlayResX: 384\r
PlayResY: 288\r
\r
[V4+ Styles]\r
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, \
Encoding\r
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1\r
\r
[Events]\r
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\r
"""
"""What FFmpeg's encoders of subtitles have to know, in its own form: white letters at the bottom."""
_TAGS = ("language", "title", "handler_name")

_MILLISECOND = Fraction(1, 1000)

Timed: TypeAlias = "tuple[float, Packet[Any]]"
"""A packet, and the second at which it is to be decoded."""


def tracks(
    source: InputContainer,
    out: OutputContainer,
    kind: str,
    video: Video,
    notes: list[str],
    *,
    audio: bool,
) -> list[Track]:
    """Streams of ``out`` for those of the source that it can hold; the others are noted.

    Their times are those of the video: see :class:`Video`.
    """
    from av.stream import Disposition

    found: list[Track] = []
    stream: Any
    for stream in source.streams:
        name = f"{stream.type} stream {stream.index} ({_codec(stream)})"
        if stream.index == video.stream or (stream.type == "audio" and not audio):
            continue
        if name.endswith("(bin_data)") and source.chapters():
            continue  # the chapters' names
        if stream.type == "video":
            reason = "is a cover picture" if stream.disposition & Disposition.attached_pic else "was not scored"
            notes.append(f"{name} was left out: it {reason}")
        elif stream.type not in ("audio", "subtitle") or stream.codec_context is None:
            notes.append(f"{name} was left out")
        elif _can_hold(stream, kind):
            found.append(Copied(stream, out, video, notes))
        elif stream.type == "subtitle" and _is_text(stream):
            found.append(Texts(stream, out, _TEXT[kind], video, notes))
            notes.append(f"{name} was converted to {_TEXT[kind]}: .{kind} files cannot hold it")
        elif stream.type == "subtitle":
            notes.append(f"{name} was left out: .{kind} files cannot hold it")
        elif not stream.codec_context.sample_rate:
            notes.append(f"{name} was left out: .{kind} files cannot hold it, and it cannot be decoded")
        else:
            found.append(Converted(stream, out, _SOUND[kind], video, notes))
            notes.append(f"{name} was converted to {_codec(found[-1].stream)}: .{kind} files cannot hold it")
    return found


def seconds(ticks: int, base: Fraction) -> float:
    """``float(ticks * base)``, in a tenth of the time."""
    return ticks * base.numerator / base.denominator


def plain(value: Fraction) -> Any:
    """The same number, as an ``int`` where it is whole: those are ten times as fast."""
    return value.numerator if value.denominator == 1 else value


def describe_stream(stream: Any, original: Any) -> None:
    """Give a stream the language, title and role of the original."""
    stream.metadata.update({name: original.metadata[name] for name in _TAGS if name in original.metadata})
    stream.disposition = original.disposition


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return str(context.codec.canonical_name) if context is not None else str(stream.name or "unknown")


def _can_hold(stream: Any, kind: str) -> bool:
    """Whether that kind of file can hold the stream. Tried out, as a format's list of codecs promises too much."""
    import av

    if kind == "mp4" and _codec(stream).startswith("pcm_"):
        return False  # allowed by the standard since 2020, but hardly any player plays it
    try:
        with av.open(io.BytesIO(), "w", format=FORMATS[kind]) as container:
            container.add_stream_from_template(stream, opaque=True)
            container.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


class Track(ABC):
    """One stream on its way from the source to the finished video."""

    def __init__(self, source: Any, stream: Any, video: Video, notes: list[str]) -> None:
        self.source, self.stream = source, stream
        self._shift, self._notes = video.start * video.time_base, notes
        self._clock = Clock(source.time_base)
        self._joints = [0, *(round(each * video.time_base / source.time_base) for each in video.joints)]
        describe_stream(stream, source)

    def take(self, packet: Packet[Any]) -> Iterator[Timed]:
        """The packets to write for a packet of the source."""
        if len(self._joints) == 1:
            return self._take(packet)
        self._clock.is_set_back(packet)
        ahead = self._joints[min(self._clock.part, len(self._joints) - 1)]
        if ahead and packet.pts is not None:
            packet.pts += ahead
        if ahead and packet.dts is not None:
            packet.dts += ahead
        return self._take(packet)

    @abstractmethod
    def _take(self, packet: Packet[Any]) -> Iterator[Timed]:
        """See :meth:`take`; its times go on where recordings follow one another."""

    def end(self) -> Iterator[Timed]:
        """The packets that are left to write."""
        return iter(())

    def _timed(self, packet: Packet[Any], base: Fraction) -> Timed:
        """base: of the packet's times."""
        assert packet.dts is not None
        packet.stream = self.stream
        return seconds(packet.dts, base), packet


class Copied(Track):
    """Packets unchanged.

    If the source counts time more coarsely than in samples (Matroska: in milliseconds), sound is timed by its samples,
    or it would stutter. No packet moves by more than the source's rounding.
    """

    def __init__(self, source: Any, out: OutputContainer, video: Video, notes: list[str]) -> None:
        super().__init__(source, out.add_stream_from_template(source, opaque=True), video, notes)
        context = source.codec_context
        rate = context.sample_rate if source.type == "audio" else 0
        self._samples = context.frame_size if rate and source.time_base != Fraction(1, rate) else 0
        self._base = Fraction(1, rate) if self._samples else source.time_base
        self._scale, self._late = (plain(each / self._base) for each in (source.time_base, self._shift))
        self._next: int | None = None
        self._last: int | None = None
        # MP4 may cut the last packet short, which the packet itself does not say.
        exact = "mp4" in source.container.format.name and None not in (source.start_time, source.duration)
        self._end = source.start_time + source.duration if exact and not self._samples else None

    def _take(self, packet: Packet[Any]) -> Iterator[Timed]:
        given = packet.pts if packet.pts is not None else packet.dts
        if not packet.size or (given is None and self._next is None):
            return
        tick = self._next
        if given is not None:
            exact = given * self._scale - self._late
            if not self._samples or tick is None or abs(exact - tick) > self._scale:
                tick = round(exact)
        assert tick is not None
        if self._last is not None and tick <= self._last:
            tick = self._last + 1  # a clock that went back
        packet.pts = packet.dts = self._last = tick
        packet.duration = self._samples or packet.duration
        if self._end is not None and tick < self._end:
            packet.duration = min(packet.duration, self._end - tick)
        packet.time_base = self._base
        self._next = tick + (packet.duration or 1)
        yield self._timed(packet, self._base)


class Converted(Track):
    """Sound that is decoded and encoded again."""

    def __init__(self, source: Any, out: OutputContainer, codec: str, video: Video, notes: list[str]) -> None:
        import av

        given = source.codec_context
        rates = av.Codec(codec, "w").audio_rates or [given.sample_rate]
        rate = min((each for each in rates if each >= given.sample_rate), default=max(rates))
        stream: Any = out.add_stream(codec, rate=rate)
        super().__init__(source, stream, video, notes)
        context = stream.codec_context
        context.layout = _layout(codec, rate, given.layout)
        context.bit_rate = _BITS_PER_CHANNEL * context.layout.nb_channels
        context.time_base = Fraction(1, rate)
        context.thread_count = given.thread_count = 1
        context.open()
        self._resampler = av.AudioResampler(
            context.format, context.layout, rate, context.frame_size or None, options=_RESAMPLER
        )
        self._failed = False
        self._next: Fraction | None = None

    def _take(self, packet: Packet[Any]) -> Iterator[Timed]:
        import av

        try:
            frames: Any = packet.decode()
        except (av.FFmpegError, ValueError) as error:
            if not self._failed:
                self._notes.append(f"audio stream {self.source.index} is damaged: {error_text(error)}")
            self._failed = True
            return
        for frame in frames:
            if frame.pts is None and self._next is not None:  # what a decoder had left at the end
                frame.pts = round(self._next / frame.time_base)
            if frame.pts is not None:
                self._next = frame.pts * frame.time_base + Fraction(frame.samples, frame.sample_rate)
            yield from self._encoded(self._resampler.resample(frame))

    def end(self) -> Iterator[Timed]:
        """See :meth:`Track.end`."""
        yield from self._encoded(self._resampler.resample(None))
        yield from self._encoded([None])

    def _encoded(self, frames: Sequence[AudioFrame | None]) -> Iterator[Timed]:
        for frame in frames:
            for packet in self.stream.encode(frame):
                late = round(self._shift / packet.time_base)
                packet.pts, packet.dts = packet.pts - late, packet.dts - late
                yield self._timed(packet, packet.time_base)


class Texts(Track):
    """Subtitles of letters in another form: bold and italics stay, other styles are those of players."""

    def __init__(self, source: Any, out: OutputContainer, codec: str, video: Video, notes: list[str]) -> None:
        stream: Any = out.add_stream(codec)
        super().__init__(source, stream, video, notes)
        context = stream.codec_context
        context.subtitle_header = _STYLES
        stream.time_base = context.time_base = _MILLISECOND
        self._failed = False
        self._last = -1

    def _take(self, packet: Packet[Any]) -> Iterator[Timed]:
        import av

        if not packet.size or packet.pts is None:
            return
        try:
            given = self.source.codec_context.decode2(packet)
            if given is None or not len(given):
                return  # the end of the one before, where they are not overlapping
            coded = self.stream.codec_context.encode_subtitle(given)
        except (av.FFmpegError, ValueError) as error:
            if not self._failed:
                self._notes.append(f"subtitle stream {self.source.index} is damaged: {error_text(error)}")
            self._failed = True
            return
        start = round((packet.pts * packet.time_base - self._shift) / _MILLISECOND)
        coded.pts = coded.dts = self._last = max(start, self._last + 1)
        coded.duration = round((packet.duration or 0) * packet.time_base / _MILLISECOND)
        coded.time_base = _MILLISECOND
        yield self._timed(coded, _MILLISECOND)


def _is_text(stream: Any) -> bool:
    """Whether subtitles are letters, and not pictures of them."""
    from av.codec.codec import Properties

    return bool(stream.codec_context.codec.properties & Properties.TEXT_SUB.value)


def _layout(codec: str, rate: int, layout: Any) -> str:
    """The source's channels, or two where the encoder does not take them."""
    import av

    if layout.nb_channels <= 2:
        return "mono" if layout.nb_channels == 1 else "stereo"
    trial: Any = av.CodecContext.create(codec, "w")
    try:
        trial.sample_rate, trial.layout = rate, layout.name
        trial.open()
    except (av.FFmpegError, ValueError):
        return "stereo"
    return str(layout.name)
