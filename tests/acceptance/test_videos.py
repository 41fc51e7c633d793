"""Real videos through a scorer that changes nothing: what comes out is what went in, frame by frame."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from tests.extent import FULL
from tests.videos import assert_same_video, frames_of, psnr, sound_of, time_of

import tally
from tally.media.video.colour import HDR
from tally.media.video.tone import toned
from tally.sources.video import VideoSource

Cli = Callable[..., Any]
IDENTITY = Path(__file__).with_name("scorers") / "identity.py"

# Frames that decode, as the MANIFEST.md beside the files has them; of several video streams, those of the largest.
FRAMES = {
    "decord_flipping_a_pancake.mkv": 310,
    "exo_sample.mp4": 30,
    "exo_sample_with_increasing_timestamps_320w_240h.mp4": 932,
    "exo_sample_with_increasing_timestamps_360p.mp4": 512,
    "imageio_cockatoo.mp4": 280,
    "intel_bottle-detection.mp4": 1189,
    "intel_car-detection.mp4": 377,
    "intel_one-by-one-person-detection.mp4": 1394,
    "mediabunny_video-h265.mp4": 300,
    "mmaction2_demo_skeleton.mp4": 72,
    "moviepy_big_buck_bunny_0_30.webm": 720,
    "moviepy_chaplin.mp4": 241,
    "torchcodec_nasa_13013.mp4": 390,
    "decord_unordered.mov": 4,
    "decord_video_180.mov": 3,
    "decord_video_270.mov": 3,
    "decord_video_90.mov": 3,
    "exo_bear-vp9-odd-dimensions.webm": 30,
    "exo_dolbyVision-hdr.MOV": 4,
    "exo_portrait_4k60.mp4": 18,
    "exo_roadtrip-vp92-10bit.webm": 72,
    "exo_sample.avi": 96,
    "exo_sample.flv": 30,
    "exo_sample_av1.mp4": 30,
    "exo_sample_h263.ts": 25,
    "exo_sample_partially_fragmented.mp4": 30,
    "exo_sample_with_srt.mkv": 30,
    "exo_video_1.mp4": 23,
    "exo_video_desks.3gp": 71,
    "mediabunny_cursed-vfr.mp4": 63,
    "mediabunny_no-initial-keyframe.ts": 15,
    "mediabunny_rotate-buck-bunny.mp4": 45,
    "mediabunny_sar_2x1.mp4": 150,
    "mmaction2_test.avi": 164,
    "moviepy_bitmap.mp4": 5,
    "moviepy_fire2.mp4": 25,
    "moviepy_no_duration.webm": 74,
    "mp4parse_white.mp4": 300,
    "torchcodec_av1_video.mkv": 125,
    "torchcodec_h264_10bits.mp4": 30,
    "torchcodec_h265_10bits.mp4": 30,
}
LONG = (
    "exo_sample_with_increasing_timestamps_320w_240h.mp4",
    "exo_sample_with_increasing_timestamps_360p.mp4",
    "intel_bottle-detection.mp4",
    "intel_car-detection.mp4",
    "intel_one-by-one-person-detection.mp4",
)
"""Plain files that differ from others only by their length: left out, unless ``TALLY_TEST_FULL=1``."""
if not FULL:
    FRAMES = {name: count for name, count in FRAMES.items() if name not in LONG}
SOUND_ONLY = ("exo_sample_opus.mp4", "mp4parse_opus_audioinit.mp4")
UNREACHABLE = 63
"""Frames of no-initial-keyframe.ts before its first keyframe."""

QUALITY = 30.0
"""PSNR in dB that no frame falls below at the default quality: below it, loss begins to be seen."""
ADTS = 7
"""Bytes of the header that AAC has in MPEG-TS, and not in MP4."""


def output_of(name: str) -> str:
    return name if name.endswith(".mp4") else f"{name}.mp4"


@pytest.fixture(scope="session")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one job over all files; its state is in ``home``, its videos are in ``out``."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # there is one such job, whichever process of the tests needs it first
        shared = shared.parent
    folder = shared / "identity"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "log").exists():
            (folder / "videos").mkdir()
            for kind in ("plain", "odd"):
                for path in (data / "video" / kind).iterdir():
                    if FULL or path.name not in LONG:
                        (folder / "videos" / path.name).symlink_to(path)
            command = ["score", folder / "videos", "--model", IDENTITY, "--out", folder / "out", "--workers", "2"]
            done = subprocess.run(
                [sys.executable, "-m", "tally", *command],
                env={**os.environ, "TALLY_HOME": str(folder / "home")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
                check=False,
            )
            (folder / "log").write_text(done.stdout)
    assert (folder / "out" / "_SUCCESS").exists(), (folder / "log").read_text()
    return folder


# -- every file ----------------------------------------------------------------------------------------


def test_every_file_has_an_outcome(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_HOME", str(job / "home"))
    assert {path.name for path in (job / "videos").iterdir()} == {*FRAMES, *SOUND_ONLY}
    assert {path.name for path in (job / "out").glob("*.mp4")} == {output_of(name) for name in FRAMES}
    record = tally.Job(str(job / "out")).record
    dead = {each["key"]: (each["stage"], each["error"]) for each in tally.Job(record.id).dead().to_pylist()}
    for name in SOUND_ONLY:
        assert dead.pop(name) == ("read", "it has no video stream, only audio opus")
    assert list(dead) == [f"mediabunny_no-initial-keyframe.ts/{number:06}" for number in range(UNREACHABLE)]
    for stage, error in dead.values():
        assert (stage, error) == (
            "decode",
            "it cannot be decoded: the decoder gave no picture for it; a keyframe before it is missing",
        )
    said = (job / "log").read_text()
    for note in (
        "exo_bear-vp9-odd-dimensions.webm: libx264 holds even sizes only: pictures of 161x121 were made 162x122",
        "moviepy_bitmap.mp4: libx264 holds even sizes only: pictures of 1x1 were made 2x2",
        "exo_sample_with_srt.mkv: subtitle stream 2 (subrip) was converted to mov_text: .mp4 files cannot hold it",
        "torchcodec_nasa_13013.mp4: video stream 0 (h264) was left out",
    ):
        assert note in said
    assert (record.items, record.dead) == (sum(FRAMES.values()) + UNREACHABLE + 2, UNREACHABLE + 2)


@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_at_its_time(job: Path, name: str) -> None:
    source, result = job / "videos" / name, job / "out" / output_of(name)
    begin = beginning(source)
    times, expected, alike, length = [], [], [], Fraction(0)
    for before, after in zip_longest(frames_of(source), frames_of(result)):
        assert before is not None, f"frame {len(times)} is one more than the source has"
        assert after is not None, f"frame {len(times)} is missing"
        times.append(time_of(after))
        expected.append(time_of(before) - begin)
        alike.append(likeness(before, after))
        length = (before.duration or 0) * Fraction(before.time_base)
    print(f"{name}: PSNR {min(alike):.1f} dB at the lowest, {np.mean(alike):.1f} dB on average")
    assert len(times) == FRAMES[name]
    # FFmpeg guesses the times in an AVI: those of B-frames go back and forth. Its pictures come in the right order.
    assert times == sorted(expected)
    assert min(alike) > QUALITY

    assert looks(result) == looks(source)
    average = (times[-1] - times[0]) / (len(times) - 1)
    with av.open(str(result)) as container:
        [stream] = container.streams.video
        end = (stream.start_time + stream.duration) * Fraction(stream.time_base)
    assert abs(end - (times[-1] + (length or average))) <= average


@pytest.mark.parametrize("name", FRAMES)
def test_sound_is_untouched(job: Path, name: str) -> None:
    source, result = job / "videos" / name, job / "out" / output_of(name)
    begin = beginning(source)
    header = ADTS if name.endswith(".ts") else 0
    for before, after in zip(sound_of(source), sound_of(result), strict=True):
        assert [packet.data for packet in after] == [packet.data[header:] for packet in before]
        for packet, copy in zip(before, after, strict=True):
            assert abs(copy.time - (packet.time - begin)) <= packet.tick
        # A hundredth of a second is less than any frame of these videos takes.
        assert abs(after[-1].time + after[-1].duration - (before[-1].time + before[-1].duration - begin)) < 0.01


# -- order, by content ---------------------------------------------------------------------------------

SMALL = (480, 270)


def test_the_numbers_in_the_pictures_come_in_order(cli: Cli, data: Path, tmp_path: Path) -> None:
    source = data / "video" / "plain" / "mediabunny_video-h265.mp4"
    ran = cli(*("score", source, "--model", IDENTITY, "--out", tmp_path / "out.mp4"), *("--size", "480x270", "-w", 2))
    assert ran.code == 0, ran.err
    read = Digits([digits(frame) for _, frame in zip(range(10), frames_of(source), strict=False)])
    assert [read(frame) for frame in frames_of(tmp_path / "out.mp4")] == list(range(300))


def digits(frame: av.VideoFrame) -> list[np.ndarray[Any, Any]]:
    """The shapes of the large digits at the left, each ``bool[height, width]``."""
    white = luma(frame.reformat(*SMALL, format="yuvj420p"))[74:146, 50:245] > 200
    inked = np.flatnonzero(white.any(axis=0))
    parts = np.split(inked, np.flatnonzero(np.diff(inked) > 1) + 1)
    return [white[:, part[0] : part[-1] + 1] for part in parts if len(part) > 6]


class Digits:
    """Reads numbers by the shapes that the first ten pictures show alone."""

    def __init__(self, first: list[list[np.ndarray[Any, Any]]]) -> None:
        self._shapes = [self._scaled(shape) for [shape] in first]

    def __call__(self, frame: av.VideoFrame) -> int:
        number = 0
        for shape in map(self._scaled, digits(frame)):
            number = 10 * number + int(np.argmin([np.abs(shape - known).mean() for known in self._shapes]))
        return number

    @staticmethod
    def _scaled(shape: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        columns = np.linspace(0, shape.shape[1] - 1, 24).round().astype(int)
        return shape[:, columns].astype(float)


# -- seams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [(), ("--crf", 0)], ids=["default", "lossless"])
def test_many_parts_are_as_one(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: tuple[object, ...]
) -> None:
    monkeypatch.setattr(VideoSource, "chunk_seconds", 0.0)  # every chunk is one batch
    source = data / "video" / "plain" / "intel_car-detection.mp4"
    command = ("score", source, "--model", IDENTITY, "--size", "320x180", *quality)
    for name, workers, batch in (("one.mp4", 1, 1000), ("many.mp4", 2, 8)):
        ran = cli(*command, "--out", tmp_path / name, "--workers", workers, "--batch-size", batch)
        assert ran.code == 0, ran.err
    one, many = tmp_path / "one.mp4", tmp_path / "many.mp4"
    keys = [keyframes(path) for path in (one, many)]
    assert keys[0] <= 4  # 30 seconds
    assert keys[1] >= 377 / 8
    if quality:
        assert_same_video(many, one)
        return
    shown = [frames_of(source), frames_of(one), frames_of(many)]
    alike = []
    for original, whole, joined in zip(*shown, strict=True):
        assert time_of(joined) == time_of(whole) == time_of(original)
        alike.append(psnr(luma(joined), luma(whole)))
    print(f"PSNR {min(alike):.1f} dB at the lowest, {np.mean(alike):.1f} dB on average")
    assert len(alike) == 377
    assert min(alike) > 36
    assert sound_of(many) == sound_of(one)


def keyframes(path: Path) -> int:
    return sum(frame.key_frame for frame in frames_of(path))


# -- looking at a video --------------------------------------------------------------------------------


def beginning(path: Path) -> Fraction:
    """Where the clock of a transport stream begins, in seconds; other formats' begins at 0."""
    with av.open(str(path), metadata_errors="ignore") as container:
        if container.format.name != "mpegts":
            return Fraction(0)
        return min(stream.start_time * Fraction(stream.time_base) for stream in container.streams)


def looks(path: Path) -> dict[str, object]:
    """What says how stored pictures are to be shown. What limits a range to is its default."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream: Any = container.streams.best("video")
        frame = next(container.decode(stream))
        turned = [memoryview(bytes(each)).cast("i")[:5] for each in frame.side_data if each.type == Type.DISPLAYMATRIX]
        return {
            "size": (frame.width + frame.width % 2, frame.height + frame.height % 2),  # H.264 has even ones only
            "aspect": stream.sample_aspect_ratio or 1,
            "matrix": turned,
            "colour": (1, 1, 1, 1)
            if frame.color_trc in HDR
            else (frame.color_range or 1, frame.colorspace, frame.color_primaries, frame.color_trc),
        }


def likeness(one: av.VideoFrame, other: av.VideoFrame) -> float:
    """PSNR in dB of the luma of as many lines as there is time for."""
    if one.color_trc in HDR:
        stored = one.reformat(format="rgb48le", src_colorspace=9, dst_color_range=2).to_ndarray()
        picture = av.VideoFrame.from_ndarray(toned(stored, one.color_trc, one.color_primaries), format="rgb24")
        one = picture.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
    height, width = one.height, one.width
    step = max(1, height // 240)
    return psnr(luma(one)[:height:step, :width], luma(other)[:height:step, :width])


def luma(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    """``uint8[height, width]``."""
    assert frame.format.name.startswith("yuv")
    deep = frame.format.components[0].bits > 8
    plane = frame.planes[0]
    array = np.frombuffer(plane, np.uint16 if deep else np.uint8).reshape(frame.height, -1)[:, : frame.width]
    return array >> 2 if deep else array
