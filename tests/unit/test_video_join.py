"""Joining segments with the source's sound into a finished video."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tests.videos import number_in, picture, write_clip

from tally.errors import JobError, StorageError
from tally.media.video.encode import Encoder, Encoding
from tally.media.video.join import Segment, join
from tally.media.video.metadata import Colour, Video
from tally.storage import open_store, ranges
from tally.storage.buckets import ObjectStore

LOSSLESS = Encoding("libx264", 0)
COUNT = 30


def facts(path: Path, ticks: Sequence[int] = range(COUNT), **changes: Any) -> Video:
    last = ticks[-1] + (ticks[-1] - ticks[-2] if len(ticks) > 1 else 1)
    video = Video(
        "a/clip.mp4", str(path.parent), path.name, path.stat().st_size if path.exists() else 0, 0, "h264",
        Fraction(1, 25), 0, Fraction(25), 96, 64, (), Fraction(1), Colour(), last,
    )  # fmt: skip
    return replace(video, **changes)


def segments(
    folder: Path,
    video: Video,
    runs: Sequence[range],
    ticks: Sequence[int] = range(COUNT),
    encoding: Encoding = LOSSLESS,
    size: tuple[int, int] = (96, 64),
) -> list[Segment]:
    """One for each run of frame numbers."""
    made = []
    for run in runs:
        encoder = Encoder(encoding, video, size)
        for number in run:
            encoder.add(picture(number, *size), ticks[number])
        path = folder / f"{len(list(folder.glob('segment-*')))}.mp4"
        path = path.with_name(f"segment-{path.name}")
        path.write_bytes(encoder.close())
        made.append(Segment(path, ticks[run[0]]))
    return made


def shown(path: Path) -> list[tuple[Fraction, int, bytes]]:
    """Time, drawn number and content of every frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [
            (frame.pts * stream.time_base, number_in(frame.to_ndarray(format="rgb24")), bytes(frame.planes[0]))
            for frame in container.decode(stream)
        ]


def sound(path: Path, stream: int = 0) -> list[tuple[Fraction, Fraction, bytes]]:
    """Time, duration and content of every audio packet."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.audio[stream]) if packet.size]
        return [(p.pts * p.time_base, p.duration * p.time_base, bytes(p)) for p in packets]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """30 frames and 1.3 seconds of sound."""
    return write_clip(tmp_path / "clip.mp4", COUNT, sound=1.3)


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "silent.mp4", 5)


TIMES = {
    "even": (Fraction(1, 25), list(range(COUNT))),
    "25000": (Fraction(1, 25_000), [n * 1000 for n in range(COUNT)]),
    "ntsc": (Fraction(1001, 30_000), list(range(7, COUNT + 7))),
    "variable": (Fraction(1, 90_000), [5000 + 3000 * n + 37 * n * n for n in range(COUNT)]),
    "fine": (Fraction(1, 23_040_000), [1 + 767_849 * n + (n % 3) * 1001 for n in range(COUNT)]),
    "gaps": (Fraction(1, 1000), [n * 33 + (n // 7) * 4000 for n in range(COUNT)]),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", ["mp4", "mov"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_every_time_is_exact(tmp_path: Path, silent: Path, times: str, kind: str, codec: str) -> None:
    base, ticks = TIMES[times]
    video = facts(silent, ticks, time_base=base)
    parts = segments(tmp_path, video, [range(1), range(1, 13), range(13, 30)], ticks, Encoding(codec))
    assert join(tmp_path / "out", kind, video, parts) == []
    found = shown(tmp_path / "out")
    assert [time for time, _, _ in found] == [tick * base for tick in ticks]
    assert [number for _, number, _ in found] == list(range(COUNT))
    with av.open(str(tmp_path / "out")) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        assert stream.duration is not None
        assert stream.duration * stream.time_base == (video.end - ticks[0]) * base
        times_given = [packet.dts for packet in container.demux(stream) if packet.dts is not None]
        assert times_given == sorted(set(times_given))


@pytest.mark.parametrize("kind", ["mkv", "webm"])
def test_matroska_counts_milliseconds(tmp_path: Path, silent: Path, kind: str) -> None:
    base, ticks = TIMES["variable"]
    video = facts(silent, ticks, time_base=base, aspect=Fraction(12, 11))
    codec = {"mkv": "libx264", "webm": "libvpx-vp9"}[kind]
    parts = segments(tmp_path, video, [range(13), range(13, 30)], ticks, Encoding(codec))
    notes = join(tmp_path / "out", kind, video, parts)
    assert [number for _, number, _ in shown(tmp_path / "out")] == list(range(COUNT))
    for (time, _, _), tick in zip(shown(tmp_path / "out"), ticks, strict=True):
        assert abs(time - tick * base) <= Fraction(1, 2000)
    assert [note.startswith("a/clip.mp4: pixels of 12:11 are shown as squares") for note in notes] == [True][
        : kind == "webm"
    ]


def test_segments_leave_no_seam(tmp_path: Path, silent: Path) -> None:
    video = facts(silent)
    whole = segments(tmp_path, video, [range(30)])
    pieces = segments(tmp_path, video, [range(n, n + 1) for n in range(5)] + [range(5, 8), range(8, 30)])
    join(tmp_path / "whole", "mp4", video, whole)
    join(tmp_path / "pieces", "mp4", video, pieces[::-1])
    assert shown(tmp_path / "whole") == shown(tmp_path / "pieces")


def test_the_same_bytes_every_time(tmp_path: Path, clip: Path) -> None:
    video = facts(clip)
    parts = segments(tmp_path, video, [range(12), range(12, 30)])
    for kind in ("mp4", "mkv"):
        for name in ("one", "two"):
            join(tmp_path / name, kind, video, parts)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("times", ["even", "variable"])
def test_what_was_missing_is_put_in(tmp_path: Path, clip: Path, times: str) -> None:
    base, ticks = TIMES[times]
    video = facts(clip, ticks, time_base=base)
    some = segments(tmp_path, video, [range(3), range(5, 15), range(16, 28)], ticks)
    rest = segments(tmp_path, video, [range(3, 5), range(15, 16), range(28, 30)], ticks)
    join(tmp_path / "whole.mp4", "mp4", video, [*some, *rest])
    for kind in ("mp4", "mkv"):
        first, then = tmp_path / f"first.{kind}", tmp_path / f"then.{kind}"
        join(first, kind, video, some)
        assert [number for _, number, _ in shown(first)] == [*range(3), *range(5, 15), *range(16, 28)]
        join(then, kind, video, [Segment(first), *rest])
        assert sound(then) == sound(first)
        found, expected = shown(then), shown(tmp_path / "whole.mp4")
        assert [each[1:] for each in found] == [each[1:] for each in expected]
        if kind == "mp4":
            assert found == expected


def test_a_frame_given_twice(tmp_path: Path, silent: Path) -> None:
    video = facts(silent)
    with pytest.raises(JobError, match=r"two parts of a/clip.mp4 hold the frame at 0.200 s"):
        join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(10), range(5, 15)]))


def test_pictures_of_two_sizes(tmp_path: Path, silent: Path) -> None:
    video = facts(silent)
    parts = segments(tmp_path, video, [range(5)]) + segments(tmp_path, video, [range(5, 9)], size=(48, 32))
    with pytest.raises(JobError, match=r"differ in size \(48x32 and 96x64\)"):
        join(tmp_path / "out", "mp4", video, parts)


def test_segments_of_two_settings(tmp_path: Path, silent: Path) -> None:
    video = facts(silent)
    other = replace(video, colour=Colour(2, 1, 1, 1))
    parts = segments(tmp_path, video, [range(5)]) + segments(tmp_path, other, [range(5, 9)])
    with pytest.raises(JobError, match="different settings"):
        join(tmp_path / "out", "mp4", video, parts)


def test_a_segment_that_is_gone(tmp_path: Path, silent: Path) -> None:
    video = facts(silent)
    parts = segments(tmp_path, video, [range(5)])
    parts[0].path.unlink()
    with pytest.raises(StorageError, match=r"cannot read .*segment-0"):
        join(tmp_path / "out", "mp4", video, parts)


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("mov", "libx265"), ("mkv", "libx264"), ("mp4", "libsvtav1")]
)
def test_orientation_shape_and_colours(tmp_path: Path, silent: Path, kind: str, codec: str) -> None:
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    video = facts(silent, matrix=matrix, aspect=Fraction(12, 11), colour=Colour(2, 5, 5, 6))
    encoder = Encoder(Encoding(codec), video, (64, 96))
    for number in range(3):
        encoder.add(np.rot90(picture(number), video.turns), number)
    (tmp_path / "segment.mp4").write_bytes(encoder.close())
    assert join(tmp_path / "out", kind, video, [Segment(tmp_path / "segment.mp4", 0)]) == []
    with av.open(str(tmp_path / "out")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        context = stream.codec_context
        assert [number_in(frame.to_ndarray(format="rgb24")) for frame in frames] == [0, 1, 2]
        assert (frames[0].width, frames[0].height, frames[0].rotation) == (96, 64, -90)
        assert stream.sample_aspect_ratio == Fraction(12, 11)
        assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (2, 5, 5, 6)


# -- sound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mov"])
def test_sound_is_copied(tmp_path: Path, clip: Path, kind: str) -> None:
    video = facts(clip)
    assert join(tmp_path / "out", kind, video, segments(tmp_path, video, [range(12), range(12, 30)])) == []
    assert sound(clip)[0][0] < 0  # what the encoder needed to begin
    before, after = sound(clip), sound(tmp_path / "out")
    assert [(time, content) for time, _, content in after] == [(time, content) for time, _, content in before]
    assert [duration for _, duration, _ in after[:-1]] == [duration for _, duration, _ in before[:-1]]
    with av.open(str(clip)) as source, av.open(str(tmp_path / "out")) as out:
        assert out.streams.audio[0].duration == source.streams.audio[0].duration


@pytest.mark.parametrize(
    ("audio", "name"), [("aac", "c.mkv"), ("libopus", "c.webm"), ("mp3", "c.avi"), ("flac", "c.mkv"), ("ac3", "c.mkv")]
)
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_sound_of_other_containers_is_copied(tmp_path: Path, audio: str, name: str, kind: str) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "mpeg4"
    source = write_clip(tmp_path / name, COUNT, codec=codec, bframes=0, sound=1.3, audio=audio, options={})
    video = facts(source)
    assert join(tmp_path / "out", kind, video, segments(tmp_path, video, [range(30)])) == []
    before, after = sound(source), sound(tmp_path / "out")
    assert [content for _, _, content in after] == [content for _, _, content in before]
    with av.open(str(source)) as container:
        tick = container.streams.audio[0].time_base or Fraction(1)
    for (time, _, _), (now, _, _) in zip(before, after, strict=True):
        assert abs(now - time) <= max(tick, Fraction(1, 1000))
    if kind == "mp4" and audio == "aac":
        assert {duration for _, duration, _ in after} == {Fraction(1024, 48000)}


def test_mpeg_ts_begins_anywhere(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "clip.ts", COUNT, sound=1.3)
    with av.open(str(source)) as container:
        start = min(stream.start_time or 0 for stream in container.streams)
        first = container.streams.video[0].start_time or 0
    assert start > 0
    ticks = [first - start + 3600 * n for n in range(COUNT)]
    video = facts(source, ticks, time_base=Fraction(1, 90_000), start=start)
    assert join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(30)], ticks)) == []
    before, after = sound(source), sound(tmp_path / "out")
    assert [content for _, _, content in after] == [content[7:] for _, _, content in before]  # less ADTS headers
    for (time, _, _), (now, _, _) in zip(before, after, strict=True):
        assert abs(now - (time - Fraction(start, 90_000))) <= Fraction(1, 48_000)
    assert [time for time, _, _ in shown(tmp_path / "out")] == [Fraction(tick, 90_000) for tick in ticks]


@pytest.mark.parametrize(
    ("audio", "kind", "expected"), [("pcm_s16le", "mp4", "aac"), ("aac", "webm", "opus"), ("libopus", "mov", "aac")]
)
def test_sound_is_converted_where_it_has_to_be(tmp_path: Path, audio: str, kind: str, expected: str) -> None:
    source = write_clip(tmp_path / "clip.mkv", COUNT, sound=1.3, audio=audio)
    video = facts(source)
    encoding = Encoding("libvpx-vp9" if kind == "webm" else "libx264")
    (note,) = join(tmp_path / "out", kind, video, segments(tmp_path, video, [range(30)], encoding=encoding))
    given = audio.removeprefix("lib")
    assert note == (f"a/clip.mp4: audio stream 1 ({given}) was converted to {expected}: .{kind} files cannot hold it")
    with av.open(str(tmp_path / "out")) as container:
        (stream,) = container.streams.audio
        assert stream.codec_context.codec.canonical_name == expected
        tones = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)])
    assert len(tones) / 48_000 == pytest.approx(1.3, abs=0.06)
    assert 0.15 < np.sqrt((tones[4800:43200].astype(float) ** 2).mean()) < 0.25  # a sine of 0.3
    assert [number for _, number, _ in shown(tmp_path / "out")] == list(range(COUNT))


def test_silence_is_kept_where_sound_is_missing(tmp_path: Path) -> None:
    """Sound begins a second late, and has a hole."""
    whole = write_clip(tmp_path / "whole.mkv", COUNT, sound=1.3, audio="pcm_s16le")
    source = tmp_path / "holes.mkv"
    with av.open(str(whole)) as given, av.open(str(source), "w") as out:
        streams = [out.add_stream_from_template(stream, opaque=True) for stream in given.streams]
        for packet in given.demux():
            if packet.size and (packet.stream.type == "video" or not 400 <= (packet.pts or 0) < 800):
                packet.pts = (packet.pts or 0) + (1000 if packet.stream.type == "audio" else 0)
                packet.dts = packet.pts if packet.stream.type == "audio" else packet.dts
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    video = facts(source)
    assert len(join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(30)]))) == 1
    with av.open(str(tmp_path / "out")) as container:
        stream = container.streams.audio[0]
        loud: dict[int, float] = {}
        for frame in container.decode(stream):
            loud[int(frame.time * 10)] = float(np.abs(frame.to_ndarray()).mean())
    assert min(loud) >= 9
    assert all(loud[tenth] > 0.1 for tenth in (11, 12, 13, 19, 21))
    assert all(loud[tenth] < 0.01 for tenth in (15, 16, 17))


def test_no_sound_at_all(tmp_path: Path, silent: Path, clip: Path) -> None:
    for source, audio in ((silent, True), (clip, False)):
        video = facts(source)
        assert join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(5)]), audio=audio) == []
        with av.open(str(tmp_path / "out")) as container:
            assert [stream.type for stream in container.streams] == ["video"]


def test_a_source_that_has_changed(tmp_path: Path, clip: Path) -> None:
    video = facts(clip)
    parts = segments(tmp_path, video, [range(5)])
    content = clip.read_bytes()
    for change, message in (
        (lambda: clip.write_bytes(content + b" "), "clip.mp4 has changed since it was scored"),
        (lambda: clip.write_bytes(bytes(len(content))), "the sound of a/clip.mp4 cannot be read"),
        (clip.unlink, "there is no such file"),
    ):
        change()
        with pytest.raises(StorageError, match=message):
            join(tmp_path / "out", "mp4", video, parts)
        (note,) = join(tmp_path / "out", "mp4", video, parts, audio=False)
        assert "titles, chapters and subtitles are missing" in note
        assert len(shown(tmp_path / "out")) == 5


def test_sound_that_is_damaged(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", COUNT, sound=1.3)
    source = tmp_path / "cut.mkv"
    source.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    video = facts(source)
    join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(30)]))
    found, expected = sound(tmp_path / "out"), sound(whole)
    assert 5 < len(found) < len(expected)
    assert [content for _, _, content in found] == [content for _, _, content in expected[: len(found)]]
    assert len(shown(tmp_path / "out")) == COUNT


# -- what stands beside --------------------------------------------------------------------------------


def test_titles_languages_chapters_and_subtitles(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "words.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nGood evening\n")
    source = tmp_path / "rich.mp4"
    with av.open(str(clip)) as given, av.open(str(tmp_path / "words.srt")) as words, av.open(str(source), "w") as out:
        out.metadata["title"] = "The evening"
        out.set_chapters(
            [{"id": 0, "start": 0, "end": 500, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
             {"id": 1, "start": 500, "end": 1200, "time_base": Fraction(1, 1000), "metadata": {"title": "Two"}}]
        )  # fmt: skip
        streams: list[Any] = [out.add_stream_from_template(stream, opaque=True) for stream in given.streams]
        text: Any = out.add_mux_stream("mov_text")
        text.time_base = Fraction(1, 1000)
        text.metadata["language"] = "deu"
        streams[1].metadata["language"] = "fra"
        for packet in given.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
        for line in words.demux():
            if line.size:
                content = bytes(line)
                subtitle = av.Packet(len(content).to_bytes(2, "big") + content)
                subtitle.pts = subtitle.dts = 100
                subtitle.duration, subtitle.time_base, subtitle.stream = 800, Fraction(1, 1000), text
                out.mux(subtitle)
    video = facts(source)
    assert join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(30)])) == []
    with av.open(str(tmp_path / "out")) as container:
        assert container.metadata["title"] == "The evening"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["One", "Two"]
        first = container.chapters()[1]
        assert first["start"] * (first["time_base"] or 0) == Fraction(1, 2)
        assert [stream.type for stream in container.streams][:3] == ["video", "audio", "subtitle"]
        assert [stream.language for stream in container.streams][1:3] == ["fra", "deu"]
        (line,) = [p for p in container.demux(container.streams.subtitles[0]) if p.size and bytes(p)[2:]]
        assert b"Good evening" in bytes(line)
        assert (line.pts * line.time_base, line.duration * line.time_base) == (Fraction(1, 10), Fraction(4, 5))
    notes = join(tmp_path / "out", "mkv", video, segments(tmp_path, video, [range(30)]))
    assert any(
        "subtitle stream 2 (mov_text) was converted to subrip: .mkv files cannot hold it" in note for note in notes
    )
    assert subtitles(tmp_path / "out") == [("deu", Fraction(1, 10), Fraction(4, 5), b"Good evening")]


def subtitles(path: Path) -> list[tuple[str | None, Fraction, Fraction, bytes]]:
    """Language, time, duration and content of each, without those that only end one."""
    with av.open(str(path)) as container:
        streams = container.streams.subtitles
        return [
            (packet.stream.language, packet.pts * packet.time_base, packet.duration * packet.time_base, bytes(packet))
            for packet in container.demux(streams)
            if packet.size and packet.pts is not None and bytes(packet) != b"\0\0"
        ]


@pytest.mark.parametrize(
    ("kind", "codec", "first", "second"),
    [
        ("mp4", "mov_text", b"\0\x0cGood evening\0\0\0\x16styl", b"\0\x06L'oeil"),
        ("mov", "mov_text", b"\0\x0cGood evening\0\0\0\x16styl", b"\0\x06L'oeil"),
        ("webm", "webvtt", b"Good <i>evening</i>", b"L'oeil"),
        ("mkv", "subrip", b"Good <i>evening</i>", b"L'oeil"),
    ],
)
def test_subtitles_are_kept_in_the_form_that_the_file_can_hold(
    tmp_path: Path, clip: Path, kind: str, codec: str, first: bytes, second: bytes
) -> None:
    (tmp_path / "words.srt").write_text(
        "1\n00:00:00,100 --> 00:00:00,500\nGood <i>evening</i>\n\n2\n00:00:00,600 --> 00:00:00,900\nL'oeil\n"
    )
    source = tmp_path / "rich.mkv"
    with av.open(str(clip)) as given, av.open(str(tmp_path / "words.srt")) as words, av.open(str(source), "w") as out:
        pictures: Any = out.add_stream_from_template(given.streams.video[0], opaque=True)
        text: Any = out.add_stream_from_template(words.streams[0], opaque=True)
        text.metadata["language"] = "fra"
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                out.mux(packet)
        for packet in words.demux():
            if packet.size:
                packet.stream = text
                out.mux(packet)
    video = facts(source)
    encoding = Encoding("libvpx-vp9") if kind == "webm" else LOSSLESS
    notes = join(tmp_path / "out", kind, video, segments(tmp_path, video, [range(30)], encoding=encoding))
    assert any("was converted to " + codec in note for note in notes if "subtitle" in note) == (kind != "mkv")
    one, two = subtitles(tmp_path / "out")
    assert one[:3] == ("fra", Fraction(1, 10), Fraction(2, 5))
    assert two[:3] == ("fra", Fraction(3, 5), Fraction(3, 10))
    assert one[3].startswith(first)
    assert two[3] == second


def test_other_pictures_are_left_out(tmp_path: Path, clip: Path) -> None:
    source = tmp_path / "two.mkv"
    with av.open(str(clip)) as given, av.open(str(source), "w") as out:
        streams: dict[str, Any] = {s.type: out.add_stream_from_template(s, opaque=True) for s in given.streams}
        second: Any = out.add_stream("mpeg4", rate=25)
        second.width, second.height = 32, 32
        out.add_attachment("font.ttf", "font/ttf", b"letters")
        for packet in given.demux():
            if packet.size:
                packet.stream = streams[packet.stream.type]
                out.mux(packet)
        out.mux(second.encode(av.VideoFrame.from_ndarray(picture(0, 32, 32), "rgb24").reformat(format="yuv420p")))
        out.mux(second.encode(None))
    video = facts(source)
    notes = join(tmp_path / "out", "mp4", video, segments(tmp_path, video, [range(30)]))
    assert notes == [
        "a/clip.mp4: video stream 2 (mpeg4) was left out: it was not scored",
        "a/clip.mp4: attachment stream 3 (font.ttf) was left out",
    ]
    with av.open(str(tmp_path / "out")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_an_error(tmp_path: Path, clip: Path) -> None:
    video = facts(clip)
    with pytest.raises(OSError, match=r"[Nn]o space"):
        join(Path("/dev/full"), "mkv", video, segments(tmp_path, video, [range(5)]))


# -- the source in a bucket ----------------------------------------------------------------------------


@pytest.fixture
def remote(clip: Path, monkeypatch: pytest.MonkeyPatch) -> Video:
    """The clip in a bucket, of which little is read at once."""
    monkeypatch.setattr(ranges, "BLOCK", 1024)
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.upload("clip.mp4", clip)
    size, mark = store.marked("clip.mp4")
    return facts(clip, root=store.url, size=size, mark=mark)


def test_the_sound_of_a_clip_in_a_bucket(tmp_path: Path, clip: Path, remote: Video) -> None:
    for name, video in (("a.mp4", facts(clip)), ("b.mp4", remote)):
        said = join(tmp_path / name, "mp4", video, segments(tmp_path, video, [range(COUNT)]))
        assert said == []
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_source_in_a_bucket_that_was_replaced(tmp_path: Path, clip: Path, remote: Video) -> None:
    parts = segments(tmp_path, remote, [range(COUNT)])
    open_store(remote.root).write("clip.mp4", clip.read_bytes()[::-1])
    with pytest.raises(StorageError, match=r"clip\.mp4 has changed since it was scored: it was written anew"):
        join(tmp_path / "a.mp4", "mp4", remote, parts)
    [note] = join(tmp_path / "a.mp4", "mp4", remote, parts, audio=False)
    assert "titles, chapters and subtitles are missing" in note


@pytest.mark.parametrize("after", [0, 3, 8])
def test_a_storage_that_fails_while_the_sound_is_read(
    tmp_path: Path, remote: Video, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    parts = segments(tmp_path, remote, [range(COUNT)])
    left = iter(range(after))
    read_range = ObjectStore.read_range

    def failing(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        if next(left, None) is None:
            raise StorageError(f"cannot read {self.url}/{name}: the network is down")
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", failing)
    with pytest.raises(StorageError, match="the network is down"):
        join(tmp_path / "a.mp4", "mp4", remote, parts)
