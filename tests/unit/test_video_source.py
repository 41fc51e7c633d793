"""Frames of videos: every one that the container promises, in order, with its time; and what is said of the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tests.videos import HEIGHT, WIDTH, errors, frames, number_in, numbers, picture, write_clip

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, StorageError
from tally.media.video import container as containers
from tally.media.video import probe as probing
from tally.media.video.damage import Judge
from tally.media.video.encode import Encoder, Encoding
from tally.media.video.metadata import Colour, Video, pack, unpack
from tally.media.video.probe import Prober
from tally.sources.base import Chunk, ChunkLimit, Timings
from tally.sources.video import VideoSource
from tally.storage import Store, open_store, ranges
from tally.storage.buckets import ObjectStore
from tally.testing.sources import Recorder, chunks_of

# -- every frame, in order -----------------------------------------------------------------------------

PAUSES = [*range(0, 38, 2), 300]
"""As of a screen that is recorded: the last picture is shown for long."""
VFR = [0, 7, 9, 30, 31, 33, 70, 71, 90, 91, 92, 110, 140, 141, 142, 143, 170, 171, 172, 199]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mp4", {"bframes": 0, "gop": 1}),
        ("a.mp4", {"bframes": 3, "gop": 1000}),
        ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "b": "200k"}}),
        ("a.ts", {}),
        ("a.avi", {"codec": "mpeg4", "bframes": 2}),
        ("a.avi", {"codec": "mjpeg", "bframes": 0, "options": {"strict": "unofficial"}}),
        ("a.mov", {"time_base": Fraction(1, 600), "ticks": VFR}),
        ("a.mp4", {"bframes": 3, "time_base": Fraction(1, 600), "ticks": PAUSES}),
        ("a.mkv", {"bframes": 3, "time_base": Fraction(1, 60), "ticks": PAUSES}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_every_frame_comes_once_in_order(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    count = 20 if "ticks" in options else 40
    path = write_clip(tmp_path / name, count, **{"codec": "libx264", **options})
    found = frames(VideoSource.describe([str(path)]))
    assert list(found) == [f"{name}/{number:06}" for number in range(count)]
    assert errors(found) == {}
    assert numbers(found) == list(range(count))
    infos = [info for _, info in found.values()]
    assert [info["frame"] for info in infos] == list(range(count))
    assert {info["video"] for info in infos} == {name}
    tick = float(options.get("time_base", 0.04))
    expected = [number * tick for number in options.get("ticks", range(count))]
    times = np.array([info["time"] for info in infos])
    assert np.abs(times - times[0] - np.array(expected)).max() <= 0.001  # Matroska counts milliseconds


def test_times_of_a_transport_stream_count_from_its_beginning(tmp_path: Path) -> None:
    found = frames(VideoSource.describe([str(write_clip(tmp_path / "a.ts", 5))]))
    assert [info["time"] for _, info in found.values()] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
def test_any_range_decodes_to_the_same_pictures_as_the_whole(tmp_path: Path, codec: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else None
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mkv", 50, codec=codec, options=options))])
    whole = {key: value[0] for key, value in frames(source, 1000).items()}
    for items in (1, 5, 13):
        assert all(np.array_equal(value[0], whole[key]) for key, value in frames(source, items).items())


@pytest.mark.parametrize(
    ("order", "most"), [(range(10), 60), (range(1, 10, 2), 60), ([3, 1, 2, 2, 9, 0, 5], 300), ([0, 2, 1, 2], 60)]
)
def test_a_chunk_goes_on_where_the_one_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Sequence[int], most: int
) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 60, gop=1000))])
    whole = frames(source, 1000)
    given: list[int] = []
    real = Judge.given

    def noted(judge: Judge, position: int, packet: Any) -> None:
        given.append(position)
        real(judge, position, packet)

    monkeypatch.setattr(Judge, "given", noted)
    chunks = chunks_of(source, 6)
    for at in order:
        batches = [*source.read(chunks[at], Recorder(), Timings())]
        found = {key: value for batch in batches for key, value in zip(batch.keys, batch.values, strict=True)}
        assert [*found] == source.keys(chunks[at])
        assert all(np.array_equal(value, whole[key][0]) for key, value in found.items())
    assert len(given) <= most


def test_every_nth_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 20)
    found = frames(VideoSource.describe([str(path)], every=6), 2)
    assert list(found) == [f"a.mp4/{number:06}" for number in (0, 6, 12, 18)]
    assert numbers(found) == [0, 6, 12, 18]
    assert [info["time"] for _, info in found.values()] == [0.0, 0.24, 0.48, 0.72]


@pytest.mark.parametrize("degrees", [0, 90, -90, 180])
def test_pictures_are_upright(tmp_path: Path, degrees: int) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 3, degrees=degrees))])
    [chunk] = chunks_of(source, 10)
    video = Video.from_json(chunk.payload["video"])
    upright = (WIDTH, HEIGHT) if degrees in (0, 180) else (HEIGHT, WIDTH)
    assert (video.width, video.height) == upright
    [batch] = [batch for batch in source.read(chunk, Recorder(), Timings()) if batch.keys][:1]
    picture = batch.values[0]
    assert picture.shape == (upright[1], upright[0], 3)
    assert number_in(np.rot90(picture, -degrees // 90)) == 0


def test_frames_are_scaled_and_keep_their_shape_on_the_screen(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3, degrees=-90, aspect=Fraction(4, 3))
    source = VideoSource.describe([str(path)], size=(128, 64))  # it was 64x96
    [chunk] = chunks_of(source, 10)
    video = Video.from_json(chunk.payload["video"])
    # Stored pixels were 96x64 with 4:3; stored as 64x128 now, each is 1.5 as wide and half as high.
    assert (video.width, video.height, video.aspect) == (128, 64, Fraction(4, 3) * Fraction(96, 64) * Fraction(128, 64))
    [batch, *_] = source.read(chunk, Recorder(), Timings())
    assert batch.values[0].shape == (64, 128, 3)


@pytest.mark.parametrize("degrees", [0, -90])
@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(4, 3)], ids=str)
@pytest.mark.parametrize("fit", ["contain", "cover"])
@pytest.mark.parametrize("size", [(120, 120), (160, 40)], ids=str)
def test_frames_fit_into_a_size_with_their_shape(
    tmp_path: Path, size: tuple[int, int], fit: str, aspect: Fraction, degrees: int
) -> None:
    """A white video: bars are black, and lie where the shape on the screen says."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        stream.set_display_rotation(degrees)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    source = VideoSource.describe([str(path)], size=size, fit=fit)
    [chunk] = chunks_of(source, 10)
    video = Video.from_json(chunk.payload["video"])
    assert (video.width, video.height, video.aspect) == (*size, 1)
    [(picture, _)] = frames(source).values()
    assert picture.shape == (size[1], size[0], 3)
    white = picture.min(axis=2) > 128
    shape = Fraction(WIDTH, HEIGHT) * aspect
    shape = 1 / shape if degrees else shape
    if fit == "cover":
        assert white.all()
        return
    wide, high = min(size[0], round(size[1] * shape)), min(size[1], round(size[0] / shape))
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    assert abs(len(columns) - wide) <= 1
    assert abs(len(rows) - high) <= 1
    assert abs(rows[0] - (size[1] - 1 - rows[-1])) <= 1  # in the middle
    assert abs(columns[0] - (size[0] - 1 - columns[-1])) <= 1


def test_what_covers_is_cut_on_both_sides(tmp_path: Path) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 3))], size=(HEIGHT, HEIGHT), fit="cover")
    whole = VideoSource.describe([str(tmp_path / "a.mp4")])
    for (cut, _), (all_of_it, _) in zip(frames(source).values(), frames(whole).values(), strict=True):
        side = (WIDTH - HEIGHT) // 2
        assert np.array_equal(cut, all_of_it[:, side : side + HEIGHT])


@pytest.mark.parametrize(
    ("size", "expected"), [((48, -1), (48, 32)), ((50, -1), (50, 34)), ((-1, 99), (148, 99)), ((5, -1), (5, 4))]
)
def test_one_side_keeps_the_shape(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 1, aspect=Fraction(4, 3)))], size=size)
    [chunk] = chunks_of(source, 10)
    video = Video.from_json(chunk.payload["video"])
    assert (video.width, video.height, video.aspect) == (*expected, Fraction(4, 3))
    assert next(iter(frames(source).values()))[0].shape == (*reversed(expected), 3)


def write_interlaced(path: Path, count: int = 8) -> Path:
    """A bar that moves: frame n has it at 6 * n in odd lines, which come first as x264 says, and 3 pixels further in
    even ones, a moment later."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
        for number in range(count):
            array = np.zeros((64, 96, 3), np.uint8)
            for line in range(64):
                at = 6 * number + 3 * (1 - line % 2)
                array[line, at : at + 12] = 255
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_interlaced_frames_are_kept_or_deinterlaced_and_it_is_said(tmp_path: Path) -> None:
    path = write_interlaced(tmp_path / "a.mp4")
    for asked, said in ((False, "--deinterlace takes those of one"), (True, "with the lines of its first moment")):
        source = VideoSource.describe([str(path)], deinterlace=asked)
        found = frames(source, 3)
        assert errors(found) == {}
        assert said in (source.remark() or "")
        for number, (shown, _) in enumerate(found.values()):
            begins = np.argmax(shown[8:56, :, 1] > 128, axis=1)  # of each line
            apart = np.abs(begins[1:] - begins[:-1]).mean()
            assert (apart < 1) == asked, number
            assert abs(begins[1::2].mean() - 6 * number) <= 1
    # A frame is the same whatever chunk it is in.
    one, other = (frames(VideoSource.describe([str(path)], deinterlace=True), items) for items in (2, 100))
    assert all(np.array_equal(value[0], other[key][0]) for key, value in one.items())


SPACING = [40, 80, 120]


def write_animation(path: Path, count: int = 20) -> Path:
    first, *others = [Image.fromarray(picture(number)) for number in range(count)]
    durations = [SPACING[number % 3] for number in range(count)]
    more = {"lossless": True} if path.suffix == ".webp" else {}
    form = {".apng": "PNG", ".png": "PNG"}.get(path.suffix)
    first.save(path, form, save_all=True, append_images=others, duration=durations, **more)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.apng", "a.png", "a.webp"])
def test_animations_are_videos(tmp_path: Path, name: str) -> None:
    path = write_animation(tmp_path / name)
    whole = frames(VideoSource.describe([str(path)]), 100)
    assert numbers(whole) == list(range(20))
    expected = np.cumsum([0, *(SPACING[number % 3] for number in range(19))]) / 1000
    assert [info["time"] for _, info in whole.values()] == pytest.approx(expected)
    assert all(np.abs(value[0].astype(int) - picture(number)).max() < 40 for number, value in enumerate(whole.values()))
    # Frames hold what changes alone: from any range on, they are still whole.
    parts = frames(VideoSource.describe([str(path)]), 3)
    assert all(np.array_equal(value[0], whole[key][0]) for key, value in parts.items())
    small = frames(VideoSource.describe([str(path)], size=(48, 48), fit="contain", every=5))
    assert [value[0].shape for value in small.values()] == [(48, 48, 3)] * 4


@pytest.mark.parametrize("name", ["a.gif", "a.apng", "a.webp"])
def test_animations_that_are_cut_off(tmp_path: Path, name: str) -> None:
    data = write_animation(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    found = frames(VideoSource.describe([str(tmp_path / name)]))
    there = numbers(found)
    assert there == list(range(len(there)))
    assert 8 <= len(there) < 20
    good = [value[0] for value in found.values() if not isinstance(value, ItemError)]
    assert all(np.abs(each.astype(int) - picture(number)).max() < 40 for number, each in enumerate(good))
    lost = errors(found)
    assert len(lost) == 20 - len(there) if name == "a.apng" else list(lost)[-1].endswith("-end")
    assert all("cut off" in text or "missing" in text or "cannot be decoded" in text for text in lost.values())


def test_a_folder_gives_its_animations(tmp_path: Path) -> None:
    for name in ("a.gif", "b.apng", "c.webp"):
        write_animation(tmp_path / name, 2)
    write_clip(tmp_path / "d.mp4", 1)
    source = VideoSource.describe([str(tmp_path)])
    assert [key.split("/")[0] for key in frames(source)] == ["a.gif", "a.gif", "b.apng", "b.apng", "d.mp4"]
    assert "1 file passed over, not videos by their name: .webp 1" in (source.remark() or "")


def test_colours_come_out_as_they_went_in(tmp_path: Path) -> None:
    colours = [(200, 30, 40), (20, 200, 60), (30, 60, 220)]
    for matrix in ("bt709", "smpte170m"):
        path = tmp_path / f"{matrix}.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1"})
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv444p"
            number = {"bt709": 1, "smpte170m": 6}[matrix]
            stream.codec_context.colorspace, stream.codec_context.color_range = number, 1
            for colour in colours:
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
                converted = frame.reformat(format="yuv444p", dst_colorspace=number, dst_color_range=1)
                container.mux(stream.encode(converted))
            container.mux(stream.encode(None))
        found = frames(VideoSource.describe([str(path)]))
        seen = [value[0].mean(axis=(0, 1)) for value in found.values()]
        assert np.abs(np.array(seen) - np.array(colours)).max() < 3


@pytest.mark.parametrize(("transfer", "signals"), [(16, (0, 0.5807, 0.7518)), (18, (0, 0.75, 1))])
def test_hdr_is_told_and_brought_down(tmp_path: Path, transfer: int, signals: tuple[float, ...]) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 9, 9, transfer
        for share in signals:  # of the brightest signal
            frame = av.VideoFrame(96, 64, "yuv420p10le")
            for plane, stored in zip(frame.planes, (64 + round(876 * share), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, stored, np.uint16).tobytes())
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = VideoSource.describe([str(path)])
    [chunk] = chunks_of(source, 100)
    assert "a.mp4 is HDR: its brightness and colours are brought down" in (source.remark() or "")
    seen = [value[0].mean() for value in frames(source).values()]
    assert seen == pytest.approx([0, 217, 255], abs=3)  # black, reference white, and the peak
    colour = Video.from_json(chunk.payload["video"]).colour
    assert colour == Colour(1, 9, 9, transfer)
    encoder = Encoder(Encoding("libx264"), Video.from_json(chunk.payload["video"]), (96, 64))
    encoder.add(picture(0), 0)
    with av.open(BytesIO(encoder.close())) as written:  # as it is joined
        context = written.streams.video[0].codec_context
        tags = context.color_range, context.colorspace, context.color_primaries, context.color_trc
        assert tags == (1, 1, 1, 1)


# -- what is damaged -----------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_a_matroska_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "a.mkv", 200, gop=25, bframes=0), 0.5)
    found = frames(VideoSource.describe([str(path)]), 50)
    *good, last = found
    assert numbers(found) == list(range(len(good)))
    assert 50 < len(good) < 150
    assert last == f"a.mkv/{len(good):06}-end"
    assert "its header says that it lasts 8.000 s, and it ends at" in str(found[last])


def test_an_mp4_that_is_cut_off_tells_every_missing_frame(tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "a.mp4", 100, bframes=0, options={"movflags": "faststart"}), 1)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    path = cut(tmp_path / "b.mp4", 0.6)
    found = frames(VideoSource.describe([str(path)]), 30)
    assert list(found) == [f"b.mp4/{number:06}" for number in range(100)]
    told = errors(found)
    good = 100 - len(told)
    assert 20 < good < 90
    assert numbers(found) == list(range(good))
    assert list(told)[-1] == "b.mp4/000099"
    assert "the file ends before it" in told["b.mp4/000099"]


def test_a_damaged_packet_costs_its_frames_and_no_others(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 30, gop=1, bframes=0)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        packet = bytes(packets[10])
    content = bytearray(path.read_bytes())
    position = content.find(packet)
    content[position : position + len(packet)] = bytes(len(packet))
    path.write_bytes(content)
    found = frames(VideoSource.describe([str(path)]))
    assert list(found) == [f"a.mkv/{number:06}" for number in range(30)]
    assert list(errors(found)) == ["a.mkv/000010"]
    assert numbers(found) == [*range(10), *range(11, 30)]


@pytest.mark.parametrize("first", [13, 3])
def test_frames_before_the_first_keyframe_are_told(tmp_path: Path, first: int) -> None:
    write_clip(tmp_path / "whole.ts", 40, gop=20, bframes=0)
    with av.open(str(tmp_path / "whole.ts")) as source, av.open(str(tmp_path / "a.ts"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size and number >= first:
                packet.stream = stream
                copy.mux(packet)
    found = frames(VideoSource.describe([str(tmp_path / "a.ts")]))
    lost = 20 - first
    assert list(found) == [f"a.ts/{number:06}" for number in range(40 - first)]
    assert list(errors(found)) == [f"a.ts/{number:06}" for number in range(lost)]
    assert numbers(found) == list(range(20, 40))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.mp4", b"", "the file is empty"),
        ("a.mp4", b"no video at all, just words" * 50, "cannot be opened as a video"),
        ("a.mkv", b"\x1aE\xdf\xa3" + bytes(100), "cannot be opened as a video"),
    ],
)
def test_what_is_no_video_costs_itself(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    write_clip(tmp_path / "z.mp4", 3)
    found = frames(VideoSource.describe([str(tmp_path)]))
    assert list(found) == [name, "z.mp4/000000", "z.mp4/000001", "z.mp4/000002"]
    assert said in str(found[name])
    assert numbers(found) == [0, 1, 2]


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    found = frames(VideoSource.describe([str(tmp_path / "a.mp4")]))
    assert errors(found) == {"a.mp4": "it has no video stream, only audio aac"}


def test_a_video_that_is_gone_costs_its_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 5)
    source = VideoSource.describe([str(path)])
    [chunk] = chunks_of(source, 10)
    path.unlink()
    [*batches] = source.read(chunk, Recorder(), Timings())
    dead = [(position, error.stage) for batch in batches for position, error in batch.dead]
    assert dead == [(position, "read") for position in range(5)]


def test_folders_without_videos_are_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        SourceNotFoundError, match=r"the only file in .* the name of a video \(\.txt 1\)\n.*give a glob: '.*/\*\*/\*'"
    ):
        VideoSource.describe([str(tmp_path)])


# -- chunks --------------------------------------------------------------------------------------------


def test_chunks_end_at_a_keyframe_where_one_is_near(tmp_path: Path) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 60, gop=20))])
    assert [chunk.count for chunk in chunks_of(source, 22)] == [20, 20, 20]
    assert [chunk.count for chunk in chunks_of(source, 15)] == [15, 15, 10, 15, 5]
    assert [chunk.count for chunk in chunks_of(source, 1000)] == [60]


def test_the_last_chunks_are_smaller_where_workers_share_a_video(tmp_path: Path) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 60, gop=100))])
    chunks = [*source.plan(None, 0, lambda: ChunkLimit(10, 1 << 40, slots=2))]
    assert [chunk.count for chunk in chunks] == [10, 10, 10, 7, 5, 4, 3, 2, 2, 2, 2, 2, 1]
    few = [*source.plan(None, 0, lambda: ChunkLimit(1, 1 << 40, slots=2))]
    assert [chunk.count for chunk in few] == [1] * 60


def test_planning_goes_on_inside_a_video_and_before_its_missing_end(tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "a.mkv", 200, gop=25, bframes=0), 0.5)
    source = VideoSource.describe([str(path)])
    chunks = chunks_of(source, 40)
    for at, chunk in enumerate(chunks):
        assert chunks_of(source, 40, after=chunk.cursor, first=chunk.first + chunk.count) == chunks[at + 1 :]


def test_dead_frames_that_are_near_are_replayed_together(tmp_path: Path) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 200, gop=20))])
    chunks = chunks_of(source, 50)
    whole = source.combine(chunks)
    singles = [source.slice(whole[0], number, number + 1) for number in (3, 4, 10, 190)]
    near, far = source.combine(singles)
    assert source.keys(near) == [f"a.mp4/{number:06}" for number in (3, 4, 10)]
    for chunk, expected in ((near, [3, 4, 10]), (far, [190])):
        batches = [*source.read(chunk, Recorder(), Timings())]
        assert [number_in(value) for batch in batches for value in batch.values] == expected


def test_numbers_are_packed() -> None:
    for given in ([], [5], [0, 1, 2, 3], [10, 20, 30, 35, 36, 37, 1], [3, 3, 3], [-5, 0, 5]):
        assert unpack(pack(given)) == given
    assert pack(range(0, 3000, 3)) == [0, [3, 999]]


def test_what_is_known_of_a_video_survives_json() -> None:
    video = Video(
        "a/é.mp4",
        "/in",
        os.fsdecode(b"\xe9.mp4"),
        7,
        1,
        "h264",
        Fraction(1, 90000),
        9,
        Fraction(30000, 1001),
        4,
        3,
        (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30),
        Fraction(4, 3),
        Colour(1, 9, 9, 16),
        100,
    )
    assert Video.from_json(video.to_json()) == video
    assert video.turns == 3


# -- in a bucket ---------------------------------------------------------------------------------------

FRAGMENTS = {"movflags": "empty_moov", "frag_duration": "1600000"}
FORMS = [
    ("a.mp4", {}),
    ("a.mp4", {"movflags": "faststart"}),
    ("a.mp4", FRAGMENTS),
    ("a.mkv", {}),
    ("a.webm", {}),
    ("a.ts", {}),
]
"""Containers, and options of theirs: an MP4's index at its end, at its beginning, in parts."""


@pytest.fixture
def bucket() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


def noise(path: Path, count: int, options: dict[str, str], gop: int = 20) -> Path:
    """A clip of which each picture takes a few thousand bytes, beside sound."""
    chance = np.random.default_rng(0)
    webm = path.suffix == ".webm"
    with av.open(str(path), "w", options=options) as container:
        video: Any = container.add_stream("libvpx" if webm else "mpeg4", rate=25)
        video.width, video.height, video.pix_fmt, video.gop_size = 96, 64, "yuv420p", gop
        video.bit_rate = 4_000_000
        video.options = {"deadline": "realtime", "cpu-used": "8"} if webm else {}
        sound: Any = container.add_stream("libopus" if webm else "aac", rate=48000, layout="stereo")
        length = sound.codec_context.frame_size or 960
        heard = 0
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(chance.integers(0, 256, (64, 96, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
            while heard < (number + 1) * 1920:
                wave = np.zeros((1 if webm else 2, (2 if webm else 1) * length), np.int16 if webm else np.float32)
                kind = "s16" if webm else "fltp"
                tone = av.AudioFrame.from_ndarray(wave, format=kind, layout="stereo")
                tone.sample_rate, tone.pts, tone.time_base = 48000, heard, Fraction(1, 48000)
                container.mux(sound.encode(tone))
                heard += length
        container.mux([*video.encode(None), *sound.encode(None)])
    return path


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_a_late_chunk_reads_its_own_bytes_and_few_others(
    tmp_path: Path, bucket: Store, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str]
) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    path = noise(tmp_path / name, 320, options)
    bucket.upload(name, path)
    asked: list[tuple[int, int]] = []
    read_range = ObjectStore.read_range

    def counting(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        asked.append((start, length))
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", counting)
    source = VideoSource.describe([bucket.url])
    chunks = chunks_of(source, 40)
    size = path.stat().st_size
    assert size > 1_000_000
    assert sum(length for _, length in asked) < 1.2 * size  # looked at once
    assert len(chunks) >= 8
    read = []
    for chunk in chunks:
        asked.clear()
        [*batches] = source.read(chunk, Recorder(), Timings())
        assert sum(len(batch.values) for batch in batches) == chunk.count
        read.append(sum(length for _, length in asked))
    assert max(read[1:]) < 0.35 * size, read
    local = VideoSource.describe([str(path)])
    for mine, other in ((chunks[-1], chunks_of(local, 40)[-1]),):
        pictures = [value for batch in source.read(mine, Recorder(), Timings()) for value in batch.values]
        wanted = [value for batch in local.read(other, Recorder(), Timings()) for value in batch.values]
        assert np.array_equal(pictures, wanted)


def test_a_video_without_an_index_is_fetched_once(
    tmp_path: Path, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    monkeypatch.setattr(containers, "_MAX_SEEKS", 3)
    monkeypatch.setattr(containers, "_header_blocks", {})
    path = noise(tmp_path / "a.mp4", 100, FRAGMENTS)
    local, remote = both(path, bucket)
    assert list(local) == list(remote)
    assert all(np.array_equal(local[key][0], remote[key][0]) for key in local)
    source = VideoSource.describe([bucket.url])
    [chunk] = chunks_of(source, 100)
    with monkeypatch.context() as patched:
        down(patched, 0)
        [*batches] = source.read(chunk, Recorder(), Timings())
    assert sum(len(batch.values) for batch in batches) == 100  # nothing was asked for
    bucket.upload("a.mp4", noise(path, 99, FRAGMENTS))
    monkeypatch.setattr(containers, "_downloads", {})
    [*batches] = source.read(chunk, Recorder(), Timings())
    assert sum(len(batch.dead) for batch in batches) == 100


def both(path: Path, bucket: Store) -> list[dict[str, Any]]:
    """What a file gives, from this machine and from a bucket."""
    bucket.upload(path.name, path)
    return [frames(VideoSource.describe([place])) for place in (str(path), f"{bucket.url}/{path.name}")]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts", "a.avi", "a.mpg"])
def test_a_bucket_gives_the_frames_that_a_folder_does(tmp_path: Path, bucket: Store, name: str) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4", "a.mpg": "mpeg2video"}.get(name, "libx264")
    local, remote = both(write_clip(tmp_path / name, 40, codec=codec), bucket)
    assert list(local) == list(remote)
    assert numbers(remote) == list(range(40))
    for (one, info), (other, more) in zip(local.values(), remote.values(), strict=True):
        assert np.array_equal(one, other)
        assert info == more


@pytest.mark.parametrize(
    "name", ["cut.mkv", "cut.mp4", "head.mp4", "words.mp4", "nothing.mp4", "zeros.ts", "holes.mkv"]
)
def test_what_is_damaged_in_a_bucket_is_told_as_in_a_folder(tmp_path: Path, bucket: Store, name: str) -> None:
    path = tmp_path / name
    if name == "words.mp4":
        path.write_bytes(b"no video at all, just words" * 50)
    elif name == "nothing.mp4":
        path.write_bytes(b"")
    elif name == "zeros.ts":
        path.write_bytes(bytes(5000))
    elif name == "holes.mkv":
        write_clip(path, 100, gop=5, bframes=0)
        content = bytearray(path.read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        path.write_bytes(content)
    else:
        fast = FRAGMENTS if name == "cut.mp4" else {}
        cut(noise(path, 60, fast), 0.6)
    local, remote = both(path, bucket)
    assert errors(local) == errors(remote) != {}
    assert list(local) == list(remote)


def down(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The storage fails after so many requests."""
    read_range = ObjectStore.read_range
    left = iter(range(after))

    def failing(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        if next(left, None) is None:
            raise StorageError(f"cannot read {self.url}/{name}: the network is down")
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", failing)


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_a_failing_storage_is_no_damaged_video(
    tmp_path: Path, bucket: Store, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str]
) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    bucket.upload(name, noise(tmp_path / name, 100, options))
    source = VideoSource.describe([bucket.url])
    chunks = chunks_of(source, 50)
    reason = f"cannot read {bucket.url}/{name}: the network is down"
    for after in (0, 1, 2, 5, 20):
        monkeypatch.setattr(containers, "_header_blocks", {})
        with monkeypatch.context() as patched:
            down(patched, after)
            [failed] = chunks_of(source, 50)
            assert (failed.count, failed.payload["failed"]) == (1, reason)
        with monkeypatch.context() as patched:
            down(patched, min(after, 5))
            [*batches] = source.read(chunks[1], Recorder(), Timings())
            dead = [error for batch in batches for _, error in batch.dead]
            assert {(error.stage, error.message) for error in dead} == {("read", reason)}
            assert sum(len(batch.values) for batch in batches) + len(dead) == chunks[1].count
    assert all(not batch.dead for batch in source.read(chunks[1], Recorder(), Timings()))


def test_a_video_that_is_replaced_costs_its_frames(
    tmp_path: Path, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.upload("a.mp4", write_clip(tmp_path / "a.mp4", 20))
    source = VideoSource.describe([bucket.url])
    [chunk] = chunks_of(source, 20)
    monkeypatch.setattr(containers, "_header_blocks", {})  # as in another process
    bucket.upload("a.mp4", write_clip(tmp_path / "a.mp4", 20, gop=3))
    [*batches] = source.read(chunk, Recorder(), Timings())
    dead = [error for batch in batches for _, error in batch.dead]
    assert len(dead) == 20
    assert {error.message for error in dead} == {f"{bucket.url}/a.mp4 has changed since the job was planned"}


def test_a_video_that_changes_while_it_is_read_costs_the_chunk(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 60)
    source = VideoSource.describe([str(path)])
    [chunk] = chunks_of(source, 60)
    scorer = Recorder()
    scorer.batch_size = 4
    batches = source.read(chunk, scorer, Timings())
    assert len(next(batches).values) == 4
    write_clip(path.with_name("b.mp4"), 60, gop=3).replace(path)
    with pytest.raises(SourceChangedError, match=r"a\.mp4 has changed"):
        list(batches)


# -- looking at videos in a process of its own ---------------------------------------------------------


@pytest.fixture
def prober() -> Iterator[Prober]:
    prober = Prober()
    yield prober
    prober.close()


@pytest.fixture
def look(prober: Prober, tmp_path: Path) -> Callable[[], Any]:
    write_clip(tmp_path / "a.mp4", 3)
    return lambda: prober("a.mp4", str(tmp_path), "a.mp4")


def test_a_crash_while_looking_costs_that_video_alone(prober: Prober, look: Callable[[], Any]) -> None:
    assert len(look().ticks) == 3
    assert prober._process is not None
    os.kill(prober._process.pid, signal.SIGKILL)
    prober._process.wait()
    with pytest.raises(ItemError, match=r"crashed FFmpeg \(exit code -9\)"):
        look()
    assert len(look().ticks) == 3


def test_looking_for_ever_costs_that_video_alone(
    prober: Prober, look: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(look().ticks) == 3
    assert prober._process is not None
    os.kill(prober._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(probing, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(ItemError, match="took longer than"):
        look()
    monkeypatch.undo()
    assert len(look().ticks) == 3


def test_the_process_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3)
    with subprocess.Popen(
        [sys.executable, "-m", probing.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(["a.mp4", str(tmp_path), "a.mp4", path.stat().st_size, ""]) + "\n")
        process.stdin.flush()
        assert "ticks" in json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_chunk_of_a_failed_video_can_be_cut(tmp_path: Path) -> None:
    source = VideoSource.describe([str(write_clip(tmp_path / "a.mp4", 3))])
    failed = Chunk(0, 4, {"key": "a.mp4", "failed": "gone", "numbers": pack(range(3, 7))})
    assert source.keys(source.slice(failed, 1, 3)) == ["a.mp4/000004", "a.mp4/000005"]
    assert source.combine([failed, failed]) == [failed, failed]
    assert next(source.plan(None, 0, lambda: ChunkLimit(8, 1))).count == 3
