"""Clips for tests: small, drawn, and with the frame's number in every picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np

from tally.errors import ItemError
from tally.sources.base import Timings
from tally.sources.video import VideoSource
from tally.testing.sources import Recorder, chunks_of

BITS = 12
WIDTH, HEIGHT = 96, 64
_CELL = WIDTH // BITS


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A gradient that moves with the number, below the number itself: twelve cells, black or white."""
    y, x = np.mgrid[:height, :width]
    array = np.stack([(x * 2 + number * 3) % 256, (y * 3) % 256, np.full_like(x, number * 5 % 256)], axis=-1)
    cell = width // BITS
    for bit in range(BITS):
        array[: height // 4, bit * cell : (bit + 1) * cell] = 255 * (number >> bit & 1)
    return array.astype(np.uint8)


def number_in(array: np.ndarray[Any, Any]) -> int:
    """The number that :func:`picture` drew, read back from a decoded picture ``[height, width, 3]``."""
    height, width = array.shape[:2]
    cell = width / BITS
    middle = array[height // 8, [int((bit + 0.5) * cell) for bit in range(BITS)]].mean(axis=-1)
    return sum(int(value > 128) << bit for bit, value in enumerate(middle))


def frames(source: VideoSource, items: int = 7) -> dict[str, Any]:
    """What every frame of a source gives: its picture and info, or its ItemError."""
    found: dict[str, Any] = {}
    for chunk in chunks_of(source, items):
        keys = source.keys(chunk)
        for batch in source.read(chunk, Recorder(), Timings()):
            found.update((keys[position], error) for position, error in batch.dead)
            found.update(zip(batch.keys, zip(batch.values, batch.info or [], strict=True), strict=True))
    return dict(sorted(found.items()))


def errors(found: dict[str, Any]) -> dict[str, str]:
    """Those of :func:`frames` that have an error."""
    return {key: str(value) for key, value in found.items() if isinstance(value, ItemError)}


def numbers(found: dict[str, Any]) -> list[int]:
    """The numbers in the pictures of :func:`frames`."""
    return [number_in(value[0]) for value in found.values() if not isinstance(value, ItemError)]


def write_clip(
    path: Path,
    count: int = 40,
    *,
    codec: str = "libx264",
    rate: int = 25,
    gop: int = 12,
    bframes: int = 2,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    degrees: int = 0,
    aspect: Fraction | None = None,
    sound: float = 0.0,
    audio: str = "aac",
    options: dict[str, str] | None = None,
    first: int = 0,
) -> Path:
    """Write a clip. ticks: the frames' times in ``time_base``; None: one every 1/rate. first: the number in the first
    frame's picture.

    sound: seconds of a rising tone, none if 0. degrees: of the display matrix, counter-clockwise.
    """
    base = time_base or Fraction(1, rate)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(codec, rate=rate)
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        video.time_base = video.codec_context.time_base = base
        video.gop_size = gop
        video.max_b_frames = bframes
        video.options = {"sc_threshold": "0", **(options or {})}
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if degrees:
            video.set_display_rotation(degrees)
        tone: Any = container.add_stream(audio, rate=48000, layout="stereo") if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + number, *size), format="rgb24")
            frame.pts = ticks[number] if ticks is not None else number
            frame.time_base = base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if tone is not None:
            _write_tone(container, tone, sound)
    return path


def _write_tone(container: Any, stream: Any, seconds: float) -> None:
    length = 1024
    for start in range(0, int(seconds * 48000), length):
        time = (np.arange(start, start + length) / 48000).astype(np.float32)
        wave = 0.3 * np.sin(2 * np.pi * (220 + 110 * time) * time)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, -wave]).astype(np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        for each in [frame] if stream.format.name == "fltp" else _resampled(stream, frame):
            container.mux(stream.encode(each))
    container.mux(stream.encode(None))


def _resampled(stream: Any, frame: av.AudioFrame) -> list[av.AudioFrame]:
    return av.AudioResampler(format=stream.format.name, layout="stereo", rate=48000).resample(frame)


# -- looking at videos ---------------------------------------------------------------------------------


def frames_of(path: Path) -> Iterator[av.VideoFrame]:
    """The frames that the main video stream decodes to, as FFmpeg gives them."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def time_of(frame: av.VideoFrame) -> Fraction:
    """Seconds."""
    assert frame.pts is not None
    return frame.pts * Fraction(frame.time_base)


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet: its bytes, when it is to be heard, and for how long, in seconds. tick: what times are counted in."""

    data: bytes
    time: Fraction
    duration: Fraction
    tick: Fraction


def sound_of(path: Path) -> list[list[Packet]]:
    """The packets of each audio stream."""
    with av.open(str(path), metadata_errors="ignore") as container:
        found: dict[int, list[Packet]] = {stream.index: [] for stream in container.streams.audio}
        for packet in container.demux(container.streams.audio) if found else ():
            if packet.size:
                tick = Fraction(packet.time_base)
                assert packet.pts is not None
                found[packet.stream_index].append(
                    Packet(bytes(packet), packet.pts * tick, packet.duration * tick, tick)
                )
    return list(found.values())


def assert_same_video(path: Path, expected: Path) -> None:
    """Both decode to the same pictures, bit for bit, at the same times, and have the same sound."""
    with closing(frames_of(path)) as found, closing(frames_of(expected)) as wanted:
        for number, (one, other) in enumerate(zip_longest(found, wanted)):
            assert one is not None, f"{path.name} ends before frame {number}"
            assert other is not None, f"{path.name} goes on after frame {number}"
            assert time_of(one) == time_of(other), f"{path.name}, frame {number}"
            assert np.array_equal(one.to_ndarray(), other.to_ndarray()), f"{path.name}, frame {number}"
    assert sound_of(path) == sound_of(expected)


def psnr(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio of two pictures of bytes, in dB; 99 where they are equal."""
    error = np.square(one.astype(np.int16) - other.astype(np.int16), dtype=np.int32).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0
