"""Videos on the command line: what comes out, and what is said where it cannot be done."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.videos import HEIGHT, WIDTH, assert_same_video, frames_of, number_in, picture, sound_of, time_of, write_clip

from tally.jobs.facade import Jobs

Cli = Callable[..., Any]

IDENTITY = """
import tally


class Identity(tally.Scorer):
    output = "image"

    def score(self, batch):
        return batch
"""
SIZES = """
import tally


class Sizes(tally.Scorer):
    columns = {"width": "int64", "height": "int64"}

    def score(self, batch):
        return [{"width": each.shape[1], "height": each.shape[0]} for each in batch]
"""
DETECTOR = """
import tally


class Detector(tally.Scorer):
    input = "frame"

    def score(self, batch):
        return [[{"xmin": 30, "ymin": 30, "xmax": 60, "ymax": 50, "label": "", "score": None}] for _ in batch]
"""
FLAKY = """
from pathlib import Path

import tally


class Flaky(tally.Scorer):
    output = "image"
    mended = Path(__file__).with_name("mended")

    def prepare(self, item):
        if item.info["frame"] % 7 in (3, 4) and not self.mended.exists():
            raise ValueError("not today")
        return item.value

    def score(self, batch):
        return batch
"""
SLOW = """
import time
from pathlib import Path

import tally


class Slow(tally.Scorer):
    output = "image"
    batch_size = 4
    fast = Path(__file__).with_name("fast")

    def score(self, batch):
        if not self.fast.exists():
            time.sleep(0.1 * len(batch))
        return batch
"""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Two seconds, 50 frames, with sound."""
    return write_clip(tmp_path / "clip.mp4", 50, sound=2.0)


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    def write(code: str) -> Path:
        path = tmp_path / "scorer.py"
        path.write_text(code)
        return path

    return write


@pytest.fixture
def score(cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """``tally score`` with one worker; returns what the command answered."""
    return lambda *arguments: cli("score", *arguments, "--workers", 1)


def numbers(path: Path) -> list[int]:
    return [number_in(frame.to_ndarray(format="rgb24")) for frame in frames_of(path)]


def times(path: Path) -> list[Fraction]:
    return [time_of(frame) for frame in frames_of(path)]


def heard(path: Path) -> list[tuple[bytes, Fraction]]:
    """Content and time of the packets of the one audio stream."""
    [packets] = sound_of(path)
    return [(packet.data, packet.time) for packet in packets]


# -- rows ----------------------------------------------------------------------------------------------


def test_a_row_for_every_frame(score: Cli, model: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "a.mp4", 20)
    write_clip(tmp_path / "in" / "b.mkv", 10, size=(64, 48))
    ran = score(tmp_path / "in", "--model", model(SIZES), "--out", tmp_path / "rows.csv")
    assert ran.code == 0, ran.err
    assert "30 of 30 frames scored" in ran.err
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "video", "frame", "time", "width", "height"]
    expected = [("a.mp4", number, WIDTH, HEIGHT) for number in range(20)]
    expected += [("b.mkv", number, 64, 48) for number in range(10)]
    assert [(row["video"], int(row["frame"]), int(row["width"]), int(row["height"])) for row in rows] == expected
    assert [row["key"] for row in rows] == [f"{video}/{number:06}" for video, number, *_ in expected]
    assert [float(row["time"]) for row in rows] == pytest.approx([number / 25 for _, number, *_ in expected], abs=1e-3)


@pytest.mark.parametrize("parts", [1, 3])
def test_recordings_in_one_file_stay_in_step_with_their_sound(
    score: Cli, model: Any, tmp_path: Path, parts: int
) -> None:
    clip = write_clip(tmp_path / "clip.ts", 25, sound=1.0, audio="mp2")
    clip.write_bytes(clip.read_bytes() * parts)
    ran = score(clip, "--model", model(IDENTITY), "--out", tmp_path / "out.mp4", "--crf", 1)
    assert ran.code == 0, ran.err
    assert ("warning: clip.ts is made of several recordings" in ran.err) == (parts > 1)
    assert numbers(tmp_path / "out.mp4") == [*range(25)] * parts
    begins = [each for number, each in enumerate(times(tmp_path / "out.mp4")) if number % 25 == 0]
    [sound] = sound_of(tmp_path / "out.mp4")
    each = len(sound) // parts
    heard = [sound[number * each].time for number in range(parts)]
    # The sound of a part begins where its pictures do, within a packet of sound.
    assert all(abs((one - begins[0]) - (other - heard[0])) < 0.03 for one, other in zip(begins, heard, strict=True))


def test_windows_media_with_its_sound(score: Cli, model: Any, tmp_path: Path) -> None:
    silent, clip = write_clip(tmp_path / "silent.wmv", 25, codec="wmv2", bframes=0), tmp_path / "clip.wmv"
    with av.open(str(silent)) as source, av.open(str(clip), "w") as out:
        pictures = out.add_stream_from_template(source.streams.video[0])
        sound: Any = out.add_stream("wmav2", rate=44100, layout="mono")
        sound.codec_context.bit_rate = 64_000
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                out.mux(packet)
        for at in range(0, 43 * 1024, 1024):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 44100, at, Fraction(1, 44100)
            out.mux(sound.encode(tone))
        out.mux(sound.encode(None))
    ran = score(clip, "--model", model(IDENTITY), "--out", tmp_path / "out.mp4")
    assert ran.code == 0, ran.err
    assert "audio stream 1 (wmav2) was converted to aac" in ran.err
    assert numbers(tmp_path / "out.mp4") == [*range(25)]
    [heard] = sound_of(tmp_path / "out.mp4")
    assert 0.8 < heard[-1].time + heard[-1].duration < 1.2


def test_some_frames_of_a_size(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    ran = score(clip, "--model", model(SIZES), "--out", tmp_path / "out", "--every", 20, "--size", "48x40")
    assert ran.code == 0, ran.err
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (f"clip.mp4/{number:06}", "clip.mp4", number, number / 25, 48, 40) for number in (0, 20, 40)
    ]


# -- videos --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [("out.mp4", "h264", "aac"), ("out.mov", "h264", "aac"), ("out.mkv", "h264", "aac"), ("out.webm", "vp9", "opus")],
)
def test_kinds_of_videos(score: Cli, model: Any, clip: Path, tmp_path: Path, name: str, codec: str, sound: str) -> None:
    ran = score(clip, "--model", model(IDENTITY), "--out", tmp_path / name)
    assert ran.code == 0, ran.err
    assert numbers(tmp_path / name) == list(range(50))
    assert [round(each, 3) for each in map(float, times(tmp_path / name))] == [number / 25 for number in range(50)]
    with av.open(str(tmp_path / name)) as container:
        assert [stream.codec_context.codec.canonical_name for stream in container.streams] == [codec, sound]
    if sound == "aac":
        assert [data for data, _ in heard(tmp_path / name)] == [data for data, _ in heard(clip)]
    else:
        assert "clip.mp4: audio stream 1 (aac) was converted to opus: .webm files cannot hold it" in ran.err


def test_every_nth_frame_without_sound(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    command = (clip, "--model", model(IDENTITY), "--out", out, "--every", 10, "--size", "192x128", "--no-audio")
    ran = score(*command, "--codec", "libx265", "--crf", 20)
    assert ran.code == 0, ran.err
    assert numbers(out) == [0, 10, 20, 30, 40]
    assert times(out) == [Fraction(number, 25) for number in (0, 10, 20, 30, 40)]
    with av.open(str(out)) as container:
        [stream] = container.streams
        assert (stream.codec_context.name, stream.width, stream.height) == ("hevc", 192, 128)
        assert stream.duration * stream.time_base == 2


def test_a_folder_of_videos(score: Cli, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_clip(folder / "a.mp4", 10, sound=0.4)
    write_clip(folder / "deep" / "a.mkv", 20)
    ran = score(folder, "--model", model(IDENTITY), "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert numbers(tmp_path / "out" / "a.mp4") == list(range(10))
    assert numbers(tmp_path / "out" / "deep" / "a.mkv.mp4") == list(range(20))


def test_frames_as_pictures(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames"
    ran = score(clip, "--model", model(IDENTITY), "--out", out, "--frames", "jpg", "--every", 25)
    assert ran.code == 0, ran.err
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg"))
    assert files == ["clip.mp4/000000.jpg", "clip.mp4/000025.jpg"]
    for path, number in zip(files, (0, 25), strict=True):
        with Image.open(out / path) as image:
            assert (image.format, image.size) == ("JPEG", (WIDTH, HEIGHT))
            assert number_in(np.asarray(image)) == number
    rows = pq.read_table(out / "part-00000.parquet").to_pylist()
    assert [row["file"] for row in rows] == files
    assert [(row["video"], row["frame"], row["time"]) for row in rows] == [("clip.mp4", 0, 0.0), ("clip.mp4", 25, 1.0)]


def test_boxes_are_drawn(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.mp4"
    ran = score(clip, "--model", model(DETECTOR), "--out", out, "--overlay", "--crf", 0)
    assert ran.code == 0, ran.err
    assert numbers(out) == list(range(50))
    for before, after in zip(frames_of(clip), frames_of(out), strict=True):
        change = np.abs(luma(before) - luma(after))
        assert change[30:50, 30:60].max() > 30  # the box's frame
        assert change[33:47, 33:57].max() < 12
        change[27:53, 27:63] = 0
        assert change.max() < 12  # no more than converting to RGB and back takes
    assert heard(out) == heard(clip)


def luma(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    return frame.to_ndarray(format="gray").astype(int)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (32, 24)).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clip.mp4", "--codec", "libx246"], ["no encoder 'libx246'", "did you mean 'libx26", "There are ", "libx264"]),
        (["clip.mp4", "--crf", "99"], ["the quality 99 is not on the scale of 'libx264'", "from 0 (best) to 51"]),
        (["clip.mp4", "--size", "big"], ["size: ", "a width and a height such as 640x360", "'big'"]),
        (["clip.mp4", "--every", "0"], ["every: ", "(given: 0)"]),
        (["clip.mp4", "--frames", "bmp"], ["frames: ", "'bmp'"]),
        (["clip.mp4", "photo.png"], ["clip.mp4 is a video and", "photo.png a picture", "a job for each"]),
        (["photo.png", "--every", "2"], ["every: is for videos only"]),
        (["photo.png", "--size", "8x8"], ["size: is for videos only"]),
        (["photo.png", "--frames", "jpg"], ["frames: is for videos only"]),
        (["photo.png", "--codec", "libx264"], ["codec: is for videos only"]),
        (["photo.png", "--crf", "20"], ["crf: is for videos only"]),
        (["photo.png", "--no-audio"], ["audio: is for videos only"]),
        (["clip.mp4", "--frames", "jpg", "--crf", "20"], ["crf: is for videos that are written"]),
        (["clip.mp4", "--size", "16384x16384"], ["size: is more than 128 million pixels"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and value[0][-4:] in (".mp4", ".png") else "",
)
def test_what_cannot_be_done(
    score: Cli, model: Any, clip: Path, photo: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    places = [tmp_path / each if (tmp_path / each).exists() else each for each in arguments]
    ran = score(*places, "--model", model(IDENTITY), "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    for each in words:
        assert each in ran.err
    assert not (tmp_path / "out").exists()
    assert Jobs().store.newest() == []


@pytest.mark.parametrize("given", ["names", "folder", "glob"])
def test_several_videos_do_not_fit_into_one_file(score: Cli, model: Any, tmp_path: Path, given: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    clips = [write_clip(folder / name, 5) for name in ("a.mp4", "b.mp4")]
    source = {"names": clips, "folder": [folder], "glob": [folder / "*.mp4"]}[given]
    ran = score(*source, "--model", model(IDENTITY), "--out", tmp_path / "out" / "all.mp4")
    assert (ran.code, ran.out) == (2, "")
    assert "the source holds several videos, and" in ran.err
    assert "Give a folder" in ran.err
    assert not (tmp_path / "out").exists()


def test_codecs_are_listed(cli: Cli) -> None:
    ran = cli("score", "--codec", "list")
    assert ran.code == 0
    names = [line.split()[0] for line in ran.out.splitlines()]
    assert names[0] == "CODEC"
    assert {"libx264", "libx265", "libvpx-vp9"} <= set(names)


# -- again, and going on -------------------------------------------------------------------------------


def test_dead_frames_are_replayed_into_the_video(cli: Cli, score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    assert score(clip, "--model", model(IDENTITY), "--out", whole, "--crf", 0).code == 0
    ran = score(clip, "--model", model(FLAKY), "--out", out, "--crf", 0)
    assert ran.code == 0, ran.err
    failing = [number for number in range(50) if number % 7 in (3, 4)]
    assert f"{50 - len(failing)} of 50 frames scored" in ran.err
    lines = cli("jobs", "dead", out).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"clip.mp4/{number:06}" for number in failing]
    assert all("not today" in line for line in lines)
    assert numbers(out) == sorted({*range(50)} - {*failing})
    assert times(out) == [time for number, time in enumerate(times(clip)) if number not in failing]

    (tmp_path / "mended").touch()
    ran = cli("jobs", "retry", out, "--dead")
    assert ran.code == 0, ran.err
    assert numbers(out) == list(range(50))
    assert_same_video(out, whole)
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.done, record.dead) == ("finished", 50, 0)


def test_interrupted_resumed_and_asked_for_again(cli: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    command = ("score", clip, "--model", model(SLOW), "--crf", 0, "--workers", 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "tally", *map(str, command), "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "0/50 frames" not in line and "/50 frames" in line:
            break  # some are done
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    record = Jobs().store.newest(limit=1)[0]
    assert process.returncode == 130, said
    assert f"tally jobs resume {record.id}" in said
    assert (record.state, 0 < record.done < 50, out.exists()) == ("interrupted", True, False)

    (tmp_path / "fast").touch()
    ran = cli(*command, "--out", out)
    assert ran.code == 1
    assert f"job {record.id} is this same job, and was interrupted" in ran.err
    ran = cli("jobs", "resume", record.id)
    assert ran.code == 0, ran.err
    assert numbers(out) == list(range(50))
    assert cli(*command, "--out", whole).code == 0
    assert_same_video(out, whole)

    ran = cli(*command, "--out", out)
    assert ran.code == 1
    assert f"job {record.id} already did this same job and finished on" in ran.err


def test_what_a_mixed_folder_is_taken_for(score: Cli, model: Any, clip: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / clip.name).write_bytes(clip.read_bytes())
    for name in ("one.jpg", "two.jpg"):
        (folder / name).write_bytes(photo.read_bytes())
    ran = score(folder, "--model", model(IDENTITY), "--out", tmp_path / "pictures")
    assert ran.code == 0, ran.err
    assert "1 file passed over, not images by their name: .mp4 1; --media video scores videos" in ran.err
    assert sorted(each.name for each in (tmp_path / "pictures").glob("*.jpg")) == ["one.jpg", "two.jpg"]
    ran = score(folder, "--model", model(SIZES), "--out", tmp_path / "asked.csv", "--media", "video")
    assert ran.code == 0, ran.err
    assert "50 of 50 frames scored" in ran.err
    for out, more in (("one.mp4", []), ("few", ["--every", "5"])):
        ran = score(folder, "--model", model(IDENTITY), "--out", tmp_path / out, *more)
        assert ran.code == 0, ran.err
        assert "frames scored" in ran.err


@pytest.mark.parametrize("names", [["anything.jpg"], ["cover.jpg", "b/Folder.jpg"]], ids=len)
def test_videos_with_their_covers_are_videos(
    score: Cli, model: Any, photo: Path, tmp_path: Path, names: list[str]
) -> None:
    folder = tmp_path / "album"
    (folder / "b").mkdir(parents=True)
    write_clip(folder / "b" / "clip.mp4", 5)
    for name in names:
        (folder / name).write_bytes(photo.read_bytes())
    for out, more, count in (("taken.csv", [], 5), ("asked.csv", ["--media", "image"], len(names))):
        ran = score(folder, "--model", model(SIZES), "--out", tmp_path / out, *more)
        assert ran.code == 0, ran.err
        assert len((tmp_path / out).read_text().splitlines()) == 1 + count
        assert ("passed over, not videos by their name: .jpg" in ran.err) == (not more)
        assert ("--media image scores pictures" in ran.err) == (not more)


def test_media_that_cannot_be(score: Cli, model: Any, clip: Path, photo: Path, tmp_path: Path) -> None:
    photo = photo.rename(tmp_path / "photo.jpg")  # a PNG may be an animation
    for source, media, code, said in (
        (clip, "image", SIZES, "media: image is asked for, and " + str(clip) + " is a video"),
        (photo, "video", SIZES, "media: video is asked for, and " + str(photo) + " is a picture"),
        (clip, "table", DETECTOR, "media: table is asked for, and the model needs frames"),
        (clip, "film", SIZES, "media: "),
    ):
        ran = score(source, "--media", media, "--model", model(code), "--out", tmp_path / "out")
        assert ran.code == 2
        assert said in ran.err, ran.err


@pytest.mark.parametrize(
    ("name", "more"),
    [("a.gif", []), ("a.webp", []), ("a.png", ["--media", "video"]), ("'*.apng'", ["--media", "video"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_animation_becomes_a_video(score: Cli, model: Any, tmp_path: Path, name: str, more: list[str]) -> None:
    first, *others = [Image.fromarray(picture(number)) for number in range(8)]
    path = tmp_path / name.strip("'").replace("*", "a")
    form = None if path.suffix in (".gif", ".webp") else "PNG"
    first.save(path, form, save_all=True, append_images=others, duration=50)
    out = tmp_path / "out.mp4"
    ran = score(tmp_path / name.strip("'"), *more, "--model", model(IDENTITY), "--out", out, "--crf", 1)
    assert ran.code == 0, ran.err
    assert numbers(out) == list(range(8))
    assert times(out) == [number * Fraction(1, 20) for number in range(8)]
    # Without a word about videos, it is a picture.
    ran = score(path, "--model", model(SIZES), "--out", tmp_path / "rows.csv")
    assert "1 of 1 items scored" in ran.err


# -- numbered pictures ---------------------------------------------------------------------------------


def write_pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(folder / name)
    return folder


@pytest.mark.parametrize("form", ["folder", "pattern", "glob"])
def test_numbered_pictures_are_a_video(score: Cli, model: Any, tmp_path: Path, form: str) -> None:
    folder = write_pictures(tmp_path / "walk", [f"frame_{number}.png" for number in range(95, 115)])
    (folder / "notes.png").write_bytes((folder / "frame_95.png").read_bytes())
    source = {"folder": folder, "pattern": folder / "frame_%d.png", "glob": f"{folder}/f*.png"}[form]
    out = tmp_path / "out" / "walk.mp4"
    ran = score(source, "--model", model(IDENTITY), "--out", out, "--fps", "30000/1001", "--crf", 1, "--batch-size", 3)
    assert ran.code == 0, ran.err
    assert numbers(out) == list(range(20))
    assert times(out) == [number * Fraction(1001, 30000) for number in range(20)]
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        assert container.duration == pytest.approx(20 * 1001 / 30000 * 1e6, abs=1000)
    assert ("1 picture passed over, without a number: notes.png" in ran.err) == (form == "folder")


def test_each_folder_of_numbered_pictures_is_a_video(score: Cli, model: Any, tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b/c", 4)):
        write_pictures(tmp_path / "in" / name, [f"{number:03}.png" for number in range(count)])
    ran = score(tmp_path / "in", "--fps", 10, "--model", model(SIZES), "--out", tmp_path / "rows.csv")
    assert ran.code == 0, ran.err
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [(row["key"], row["video"], row["frame"], float(row["time"])) for row in csv.DictReader(file)]
    expected = [(name, number) for name, count in (("a", 3), ("b/c", 4)) for number in range(count)]
    assert rows == [(f"{name}/{number:06}", name, str(number), number / 10) for name, number in expected]


def test_numbered_pictures_that_are_missing_or_not_right(cli: Cli, score: Cli, model: Any, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "walk", [f"{number:04}.png" for number in range(12)])
    (folder / "0003.png").unlink()
    (folder / "0005.png").write_bytes((folder / "0005.png").read_bytes()[:60])
    Image.new("RGB", (30, 20)).save(folder / "0007.png")
    out = tmp_path / "out.mp4"
    ran = score(folder / "%04d.png", "--model", model(IDENTITY), "--out", out, "--crf", 1, "--max-dead", 1)
    assert ran.code == 0, ran.err
    assert "25 pictures are taken for a second; --fps says how many there are" in ran.err
    lost = [3, 5, 7]
    assert numbers(out) == [number for number in range(12) if number not in lost]
    assert times(out) == [Fraction(number, 25) for number in range(12) if number not in lost]
    missing, damaged, small = cli("jobs", "dead", out).out.splitlines()
    assert missing.startswith("walk/000003\tread\tcannot read ")
    assert missing.endswith("walk/0003.png: there is no such file or folder")
    assert damaged.startswith("walk/000005\tdecode\t")
    assert "it is a picture of 30x20, and the others of its video have 96x64" in small

    for number in (3, 5):
        Image.fromarray(picture(number)).save(folder / f"{number:04}.png")
    ran = cli("jobs", "retry", out, "--dead")
    assert "11 of 12 frames scored" in ran.err
    assert numbers(out) == [number for number in range(12) if number != 7]


def test_numbered_pictures_are_scaled(score: Cli, model: Any, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "walk", [f"{number}.png" for number in range(6)])
    out = tmp_path / "out.mp4"
    ran = score(
        *(folder, "--fps", 5, "--every", 2, "--size", "96x96", "--fit", "contain"),
        *("--model", model(IDENTITY), "--out", out, "--crf", 1),
    )
    assert ran.code == 0, ran.err
    shown = [frame.to_ndarray(format="rgb24") for frame in frames_of(out)]
    assert {each.shape for each in shown} == {(96, 96, 3)}
    assert [number_in(each[16:80]) for each in shown] == [0, 2, 4]
    assert all(each[:14].max() < 30 and each[82:].max() < 30 for each in shown)
    assert times(out) == [Fraction(number, 5) for number in (0, 2, 4)]


def test_pictures_that_are_no_one_video(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "two", ["left_1.png", "left_2.png", "right_1.png"])
    plain = write_pictures(tmp_path / "plain", ["a.png", "b.png"])
    twice = write_pictures(tmp_path / "twice", ["1.png", "01.png"])
    for source, more, said in (
        (folder, ["--fps", 5], "holds 2 series of pictures: left_%d.png (2), right_%d.png (1)"),
        (plain, ["--fps", 5], "holds no numbered pictures"),
        (twice, ["--fps", 5], "01.png and 1.png have the same number"),
        (clip, ["--fps", 5], "is for numbered pictures, and " + str(clip) + " has times of its own"),
        (folder, ["--fps", "0"], "fps: should be pictures per second, such as 25 or 30000/1001"),
        (folder / "%d_%d.png", [], "counts twice"),
        (folder / "%04d.png", [], "no picture has a name such as "),
    ):
        ran = score(source, *more, "--model", model(IDENTITY), "--out", tmp_path / "out.mp4")
        assert ran.code != 0
        assert said in ran.err, ran.err
    ran = score(folder / "left_%d.png", "--fps", 5, "--model", model(IDENTITY), "--out", tmp_path / "out.mp4")
    assert ran.code == 0, ran.err
    assert numbers(tmp_path / "out.mp4") == [0, 1]


def test_rows_are_no_video(score: Cli, model: Any, clip: Path, tmp_path: Path) -> None:
    for more, said in (
        (["--out", "rows.mp4"], "rows.mp4 is a video"),
        (["--out", "rows", "--frames", "png"], "--frames"),
    ):
        ran = score(clip, "--model", model(DETECTOR), *more)
        assert ran.code == 2
        assert said in ran.err
        assert "--overlay draws" in ran.err
    ran = score(clip, "--model", model(DETECTOR), "--out", "rows.csv", "--no-audio")
    assert "audio: is for videos that are written" in ran.err
