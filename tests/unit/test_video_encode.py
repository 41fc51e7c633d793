"""Encoding segments: times, sizes, orientation, colours, encoders."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tests.videos import number_in, picture

from tally.errors import ItemError, SpecError
from tally.media.video.colour import HDR, matrix_for, range_for
from tally.media.video.encode import DEFAULTS, FORMATS, Encoder, Encoding, decoding_times
from tally.media.video.encoders import check, encoders
from tally.media.video.metadata import Colour, Video

FACTS = Video(
    "clip.mp4", "", "clip.mp4", 0, 0, "h264", Fraction(1, 25), 0, Fraction(25), 96, 64, (), Fraction(1), Colour(), 20
)  # fmt: skip
LOSSLESS = Encoding("libx264", 0)
COLOUR_BAR = np.repeat(np.array([[[200, 30, 60], [20, 180, 90], [240, 240, 20]]], np.uint8), 32, 1).repeat(64, 0)


def encode(
    video: Video = FACTS, pictures: list[Any] | None = None, encoding: Encoding = LOSSLESS, ticks: Any = range(20)
) -> tuple[bytes, Encoder]:
    shown = [picture(n) for n in range(20)] if pictures is None else pictures
    encoder = Encoder(encoding, video, (shown[0].shape[1], shown[0].shape[0]))
    for array, tick in zip(shown, ticks, strict=False):
        encoder.add(array, tick)
    return encoder.close(), encoder


def read(data: bytes) -> tuple[Any, list[Any]]:
    container = av.open(io.BytesIO(data))
    stream = container.streams.video[0]
    return stream, list(container.decode(stream))


@pytest.mark.parametrize(
    "ticks",
    [[0], [5], [0, 1], [0, 3, 1, 2], [0, 4, 2, 1, 3, 8, 6, 5, 7], [10, 500, 20, 11, 400], [0, 900, 1, 2, 3]],
)
def test_decoding_times(ticks: list[int]) -> None:
    end = max(ticks) + 7
    times = decoding_times(ticks, end)
    assert len(times) == len(ticks)
    assert all(before < after for before, after in pairwise(times))
    assert all(time <= tick for time, tick in zip(times, ticks, strict=True))
    following = min([tick for tick in ticks if tick > ticks[-1]], default=end)
    assert times[-1] + following - ticks[-1] - times[0] >= end - min(ticks)
    if ticks == sorted(ticks):
        assert times == ticks


@pytest.mark.parametrize("base", [Fraction(1, 25), Fraction(1001, 30000), Fraction(1, 23_040_000), Fraction(1, 90_000)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_times_are_exact(base: Fraction, codec: str) -> None:
    ticks = [100 + n * n + 3 * n for n in range(20)]
    data, _ = encode(replace(FACTS, time_base=base), encoding=Encoding(codec), ticks=ticks)
    stream, frames = read(data)
    assert [frame.pts * stream.time_base for frame in frames] == [(tick - ticks[0]) * base for tick in ticks]
    assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(20))


def test_pictures_of_one_segment_come_back() -> None:
    _, frames = read(encode()[0])
    assert [frame.key_frame for frame in frames] == [True] + [False] * 19
    for number, frame in enumerate(frames):
        assert number_in(frame.to_ndarray(format="rgb24")) == number


@pytest.mark.parametrize("matrix", [1, 2, 5, 9])
@pytest.mark.parametrize("colour_range", [0, 1, 2])
def test_colours_are_neither_darker_nor_off(matrix: int, colour_range: int) -> None:
    colour = Colour(colour_range, matrix)
    data, _ = encode(replace(FACTS, colour=colour), [COLOUR_BAR] * 3)
    stream, frames = read(data)
    context = stream.codec_context
    assert (context.colorspace, max(1, context.color_range)) == (matrix, max(1, colour_range))
    found = frames[1].reformat(
        format="rgb24", src_colorspace=matrix_for(colour, 64), src_color_range=range_for(colour),
        dst_color_range=2, interpolation="BICUBIC", threads=1,
    )  # fmt: skip
    for x in (10, 48, 86):
        assert np.abs(found.to_ndarray()[30, x].astype(int) - COLOUR_BAR[30, x]).max() <= 4


def test_colours_that_cannot_be_kept() -> None:
    data, _ = encode(replace(FACTS, colour=Colour(1, 0, 9, 13)))
    context = read(data)[0].codec_context
    assert (context.colorspace, context.color_primaries, context.color_trc) == (5, 9, 13)


@pytest.mark.parametrize("transfer", HDR)
def test_what_was_scored_as_bt709_is_written_as_bt709(transfer: int) -> None:
    data, _ = encode(replace(FACTS, colour=Colour(1, 9, 9, transfer)))
    context = read(data)[0].codec_context
    assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 65536, 0, -65536, 0, 0, 0, 0, 2**30), 3), ((0, -65536, 0, 65536, 0, 0, 0, 0, 2**30), 1),
     ((-65536, 0, 0, 0, -65536, 0, 0, 0, 2**30), 2)],
)  # fmt: skip
def test_pictures_are_turned_back(matrix: tuple[int, ...], turns: int) -> None:
    video = replace(FACTS, matrix=matrix)
    assert video.turns == turns
    _, frames = read(encode(video, [np.rot90(picture(n), turns) for n in range(5)])[0])
    assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(5))


def test_labels_become_grey() -> None:
    _, frames = read(encode(pictures=[np.full((32, 48), 50 * n, np.uint8) for n in range(5)])[0])
    values = [int(frame.to_ndarray(format="rgb24")[4, 4].mean()) for frame in frames]
    assert np.abs(np.array(values) - np.arange(5) * 50).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (33, 48), (48, 33), (33, 33)])
def test_odd_sizes_are_filled_up(size: tuple[int, int]) -> None:
    width, height = size
    last = np.full((height, width, 3), 40, np.uint8)
    last[-1, -1] = 220
    data, encoder = encode(pictures=[last])
    _, (frame,) = read(data)
    assert (frame.width, frame.height) == (width + width % 2, height + height % 2)
    assert encoder.note is not None
    assert f"{width}x{height}" in encoder.note
    assert frame.to_ndarray(format="gray")[-1, -1] > 180


def test_odd_sizes_that_fit() -> None:
    data, encoder = encode(encoding=Encoding("libvpx-vp9"), pictures=[picture(1, 97, 65)])
    assert encoder.note is None
    assert read(data)[1][0].width == 97


def test_pictures_that_are_too_small() -> None:
    with pytest.raises(ItemError, match="libx265 cannot encode pictures of 2x2") as caught:
        Encoder(Encoding("libx265"), FACTS, (2, 2))
    assert caught.value.stage == "write"


@pytest.mark.parametrize(
    "codec",
    [
        "libx264",
        "libx264rgb",
        "libx265",
        "libsvtav1",
        "libvpx-vp9",
        "mpeg4",
        "mpeg2video",
        "mjpeg",
        "ffv1",
        "prores_ks",
    ],
)
def test_encoders_give_equal_headers_and_whole_segments(codec: str) -> None:
    video = replace(FACTS, rate=Fraction(30000, 1001), time_base=Fraction(1, 1000))
    headers = []
    for first in (0, 20, 40):
        ticks = [round(n * 33.4) for n in range(first, first + 20)]
        stream, frames = read(encode(video, [picture(n) for n in range(first, first + 20)], Encoding(codec), ticks)[0])
        assert [frame.pts * stream.time_base * 1000 for frame in frames] == [tick - ticks[0] for tick in ticks]
        assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(first, first + 20))
        assert frames[0].key_frame
        headers.append(stream.codec_context.extradata)
    assert headers[0] == headers[1] == headers[2]


@pytest.mark.parametrize("kind", FORMATS)
def test_encoders_are_listed(kind: str) -> None:
    found = encoders(kind)
    assert DEFAULTS[kind] in found
    assert all(found.values())
    assert "libx265" in found or kind == "webm"
    assert ("libvpx-vp9" in found) == (kind != "mov")
    assert not {"wmv2", "vc2", "rawvideo"} & {*found}  # what they write, nobody can read
    check(Encoding(DEFAULTS[kind]), kind)


@pytest.mark.parametrize(
    ("codec", "crf", "kind", "message"),
    [
        ("libx246", None, "mp4", "no encoder 'libx246' for .mp4; did you mean 'libx26"),
        ("libx264", None, "webm", "no encoder 'libx264' for .webm"),
        ("aac", None, "mp4", "no encoder 'aac'"),
        ("libx264", 52.0, "mp4", "the quality 52 is not on the scale of 'libx264'"),
        ("libvpx-vp9", -1.0, "webm", "the quality -1 is not on the scale"),
        ("ffv1", 3.0, "mp4", "'ffv1' has no scale of quality"),
        (
            "vc2",
            None,
            "mp4",
            "'vc2' does not work on this machine: what it writes to .mp4 files is read as other pictures",
        ),
        (
            "rawvideo",
            None,
            "mkv",
            "'rawvideo' does not work on this machine: trying it for .mkv failed: Invalid argument",
        ),
        ("libvpx-vp9", None, "mov", "'libvpx-vp9' does not work on this machine: trying it for .mov failed"),
        ("h264_v4l2m2m", None, "mp4", "'h264_v4l2m2m' does not work on this machine"),
    ],
)
def test_encoders_that_cannot_be(codec: str, crf: float | None, kind: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check(Encoding(codec, crf), kind)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4", "mjpeg"])
def test_quality_costs_bytes(codec: str) -> None:
    noise = [np.random.default_rng(n).integers(0, 255, (64, 96, 3), np.uint8) for n in range(5)]
    check(Encoding(codec, 2), "mp4")
    sizes = [len(encode(pictures=noise, encoding=Encoding(codec, crf))[0]) for crf in (2, 30)]
    assert sizes[0] > 1.5 * sizes[1]


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux tells how a thread is scheduled")
def test_no_encoder_takes_real_time_priority() -> None:
    before = os.sched_getscheduler(0)
    for kind in ("mp4", "mkv", "webm"):
        encoders(kind)
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            found[thread.name] = os.sched_getscheduler(int(thread.name))
    assert set(found.values()) == {before}
