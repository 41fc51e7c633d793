"""Videos as a job's output: which files there are, holes, retries, wrong results."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.videos import number_in, picture, write_clip

from tally.errors import SpecError, StorageError
from tally.media.video.frame import FrameInfo
from tally.media.video.metadata import Colour, Video
from tally.sinks.base import Output
from tally.sinks.factory import sink_for
from tally.sinks.query import query
from tally.sinks.video import VideoSink
from tally.sources.base import Chunk
from tally.sources.video import VideoSource
from tally.testing.sinks import DEAD, FACTS, files_under


@pytest.fixture
def clip(tmp_path: Path) -> Video:
    """30 frames with sound."""
    (tmp_path / "source/a").mkdir(parents=True)
    path = write_clip(tmp_path / "source/a/clip.mp4", 30, sound=1.2)
    return Video(
        "a/clip.mp4", str(tmp_path / "source"), "a/clip.mp4", path.stat().st_size, 0, "h264", Fraction(1, 25), 0,
        Fraction(25), 96, 64, (), Fraction(1), Colour(), 30,
    )  # fmt: skip


def sink_at(out: Path, **options: Any) -> VideoSink:
    sink = sink_for(str(out), output="video", **options)
    assert isinstance(sink, VideoSink)
    return sink


def chunk(numbers: range) -> Chunk:
    return Chunk(numbers[0], len(numbers), {})


def write(sink: VideoSink, name: str, video: Video, numbers: range, dead: tuple[int, ...] = ()) -> Output:
    """Score the frames of these numbers, of which the dead ones never come."""
    writer = sink.open(name, chunk(numbers))
    for number in numbers:
        if number not in dead:
            info = FrameInfo(video, number, number, numbers.step)
            assert writer.add([f"{video.key}#{number}"], [picture(number)], [info]) == []
    return writer.close()


def numbers_in(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = []
        for frame in container.decode(stream):
            number = number_in(frame.to_ndarray(format="rgb24"))
            assert frame.pts * stream.time_base == Fraction(number, 25)
            found.append(number)
        return found


@pytest.mark.parametrize("out", ["styled.mp4", "styled.mov", "styled.mkv", "styled.m4v", "folder"])
def test_one_video(tmp_path: Path, clip: Video, out: str) -> None:
    sink = sink_at(tmp_path / "out" / out)
    sink.check(VideoSource.describe([f"{clip.root}/{clip.name}"]))
    sink.claim("job-1")
    outputs = [write(sink, "b", clip, range(12, 30)), write(sink, "a", clip, range(12))]
    assert [output.rows for output in outputs] == [18, 12]
    assert json.loads(json.dumps(outputs[0].facts)) == outputs[0].facts
    manifest = sink.finalize(outputs, DEAD, FACTS)
    place = tmp_path / "out" / out
    path = place / "a/clip.mp4" if out == "folder" else place
    (file,) = manifest["files"]
    assert file == {
        "path": str(path.relative_to(place if out == "folder" else place.parent)),
        "key": "a/clip.mp4",
        "rows": 30,
        "bytes": path.stat().st_size,
    }
    assert manifest["output"] == "video"
    assert manifest["format"] == {"folder": "mp4", "styled.m4v": "mp4"}.get(out, out[-3:])
    assert manifest["counts"] == {"files": 1, "rows": 30, "bytes": file["bytes"], "dead": 1}
    assert manifest["notes"] == []
    if not out.endswith("mkv"):
        assert numbers_in(path) == list(range(30))
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    dead = place / "_dead.parquet" if out == "folder" else place.with_name("styled.dead.parquet")
    assert pq.read_table(dead)["key"].to_pylist() == ["broken"]
    assert not [name for name in files_under(tmp_path / "out") if "tally/" in name]


def test_without_sound(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4", audio=False)
    sink.claim("job-1")
    sink.finalize([write(sink, "a", clip, range(3))], [], FACTS)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_every_second_frame(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4")
    sink.claim("job-1")
    outputs = [write(sink, "a", clip, range(0, 16, 2)), write(sink, "b", clip, range(16, 30, 2))]
    assert [len(output.files) for output in outputs] == [1, 1]
    sink.finalize(outputs, [], FACTS)
    assert numbers_in(tmp_path / "out.mp4") == list(range(0, 30, 2))


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_frames_that_are_scored_later(tmp_path: Path, clip: Video, kind: str) -> None:
    sink = sink_at(tmp_path / f"out.{kind}")
    sink.claim("job-1")
    first = write(sink, "a", clip, range(30), dead=(0, 9, 10, 20, 29))
    assert first.files == ["attempts/a.mp4", "attempts/a+1.mp4", "attempts/a+2.mp4"]
    assert (first.rows, first.facts["starts"]) == (25, [1, 11, 21])
    sink.finalize([first], DEAD, FACTS)
    sink.claim("job-1")
    some = write(sink, "b", clip, range(9, 11))
    manifest = sink.finalize([some], [], {**FACTS, "generation": 1})
    assert [file["rows"] for file in manifest["files"]] == [27]
    sink.claim("job-1")
    rest = [write(sink, name, clip, range(n, n + 1)) for name, n in (("c", 0), ("d", 20), ("e", 29))]
    manifest = sink.finalize(rest, [], {**FACTS, "generation": 2})
    assert manifest["counts"] == {"files": 1, "rows": 30, "bytes": manifest["files"][0]["bytes"], "dead": 0}

    whole = sink_at(tmp_path / f"whole.{kind}")
    whole.claim("job-2")
    whole.finalize([write(whole, "a", clip, range(30))], [], FACTS)
    if kind == "mp4":
        assert numbers_in(tmp_path / "out.mp4") == numbers_in(tmp_path / "whole.mp4") == list(range(30))
    with av.open(str(tmp_path / f"out.{kind}")) as one, av.open(str(tmp_path / f"whole.{kind}")) as other:
        sounds = [[bytes(p) for p in each.demux(each.streams.audio[0])] for each in (one, other)]
    assert sounds[0] == sounds[1]


def test_many_videos(tmp_path: Path, clip: Video) -> None:
    videos = [
        replace(clip, key=key) for key in ("a/clip.mp4", "a/clip.avi", "a/clip.avi.mp4", "../x.mov", "b.mp4/c.m4v")
    ]
    sink = sink_at(tmp_path / "out")
    sink.claim("job-1")
    manifest = sink.finalize([write(sink, str(n), video, range(2)) for n, video in enumerate(videos)], [], FACTS)
    names = {file["key"]: file["path"] for file in manifest["files"]}
    assert names["a/clip.mp4"] == "a/clip.mp4"
    assert names["a/clip.avi"] == "a/clip.avi.mp4"
    assert names["a/clip.avi.mp4"].startswith("a/clip.avi-")
    assert names["../x.mov"].startswith("x.mov-")
    assert names["b.mp4/c.m4v"].startswith("b.mp4_/c-")
    assert len(set(names.values())) == 5
    assert all(numbers_in(tmp_path / "out" / name) == [0, 1] for name in names.values())

    sink.claim("job-1")
    new = [write(sink, "x", videos[2], range(2, 4)), write(sink, "y", replace(clip, key="late.mp4"), range(3))]
    manifest = sink.finalize(new, [], {**FACTS, "generation": 1})
    assert {file["key"]: file["path"] for file in manifest["files"]} == {**names, "late.mp4": "late.mp4"}
    assert [file["rows"] for file in manifest["files"]] == [2, 2, 4, 2, 2, 3]
    assert numbers_in(tmp_path / "out" / names["a/clip.avi.mp4"]) == [0, 1, 2, 3]


def test_several_videos_do_not_fit_into_one_file(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4")
    sink.claim("job-1")
    outputs = [write(sink, "a", clip, range(2)), write(sink, "b", replace(clip, key="b.mp4"), range(2))]
    with pytest.raises(SpecError, match=r"holds 2 videos \('a/clip.mp4', 'b.mp4' ...\), and .*out.mp4 is one file"):
        sink.finalize(outputs, [], FACTS)


def test_wrong_results(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4")
    sink.claim("job-1")
    writer = sink.open("a", chunk(range(5)))
    results = [picture(0), {"label": "cat"}, picture(2, 48, 32), picture(3).astype(np.float32), picture(4)]
    infos = [FrameInfo(clip, n, n) for n in range(5)]
    failed = writer.add([str(n) for n in range(5)], results, infos)
    assert [index for index, _ in failed] == [1, 2, 3]
    assert "the scorer returned dict" in failed[0][1].message
    assert "a picture of 48x32 after one of 96x64" in failed[1][1].message
    assert "an array of float32" in failed[2][1].message
    assert {error.stage for _, error in failed} == {"write"}
    output = writer.close()
    assert (output.rows, len(output.files)) == (2, 2)
    sink.finalize([output], [], FACTS)
    assert numbers_in(tmp_path / "out.mp4") == [0, 4]


def test_sizes_that_the_encoder_refuses_or_fills_up(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "small.mp4", codec="libx265")
    sink.claim("job-1")
    info = [FrameInfo(clip, 0, 0)]
    writer = sink.open("a", chunk(range(2)))
    ((_, error),) = writer.add(["0"], [np.zeros((2, 2, 3), np.uint8)], info)
    assert "libx265 cannot encode pictures of 2x2" in error.message
    assert writer.close() == Output()
    sink.release()

    sink = sink_at(tmp_path / "odd.mp4")
    sink.claim("job-1")
    writer = sink.open("a", chunk(range(2)))
    assert writer.add(["0"], [np.zeros((33, 35, 3), np.uint8)], info) == []
    (note,) = sink.finalize([writer.close()], [], FACTS)["notes"]
    assert "pictures of 35x33 were made 36x34" in note


def test_what_could_not_be_read_leaves_no_segment(tmp_path: Path) -> None:
    sink = sink_at(tmp_path / "out")
    sink.claim("job-1")
    writer = sink.open("a", Chunk(0, 1, {"failed": "cut off"}))
    assert writer.close() == Output()
    sink.open("b", Chunk(0, 1, {"failed": "cut off"})).abort()
    manifest = sink.finalize([Output()], DEAD, FACTS)
    assert manifest["files"] == []
    assert manifest["counts"]["dead"] == 1


def test_a_source_that_is_gone_can_be_restored(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4")
    sink.claim("job-1")
    output = write(sink, "a", clip, range(3))
    source = tmp_path / "source/a/clip.mp4"
    source.rename(tmp_path / "elsewhere.mp4")
    with pytest.raises(StorageError, match=r"clip\.mp4: there is no such file"):
        sink.finalize([output], [], FACTS)
    (tmp_path / "elsewhere.mp4").rename(source)
    sink.finalize([output], [], FACTS)
    assert numbers_in(tmp_path / "out.mp4") == [0, 1, 2]


def test_there_are_no_rows(tmp_path: Path, clip: Video) -> None:
    sink = sink_at(tmp_path / "out.mp4")
    sink.claim("job-1")
    output = write(sink, "a", clip, range(2))
    for outputs in ([output], []):
        with pytest.raises(SpecError, match="holds video, and no rows"):
            query(sink, outputs, "select 1")
    sink.finalize([output], [], FACTS)
    with pytest.raises(SpecError, match="holds video, and no rows"):
        query(sink, [], "select 1")
