"""Damaged videos: a frame that counts as good has the picture and the number that it has in the intact file."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tests.videos import errors, frames, numbers, write_clip

from tally.errors import ItemError, TallyError
from tally.media.video.probe import Timeline, probe
from tally.sources.video import VideoSource

DEPENDS = "it depends on a damaged picture"
DAMAGED = "it is damaged: parts of it are missing"
GAP = "pictures are missing before this frame"
CUT = "it is cut off"
MISSING = "it is missing: the file is damaged where it was"

# What each file gives: how many frames are good, and how many dead items there are for which reason.
FOUND: dict[str, tuple[int, dict[str, int]]] = {
    "anim.gif": (20, {}),
    "anim.webp": (10, {}),
    "bbb_keyframe_damaged.mp4": (147, {DAMAGED: 1, DEPENDS: 92}),
    "c60.avi": (38, {"after 38 of 75 frames": 37}),
    "c60.mj.avi": (42, {"after 42 of 75 frames": 33}),
    "c60.wmv": (48, {"its header says that it has 151,313 bytes, and it has 90,787": 1}),
    "clip.mp4": (75, {}),
    "concat.ts": (100, {}),
    "concat.vob": (150, {}),
    "derived_bitflips200.mp4": (0, {DAMAGED: 25, DEPENDS: 4, "Error splitting the input": 1}),
    "inter.mp4": (50, {}),
    "libwebm_matroska_doctype.mkv": (0, {"it does not say how its video is encoded": 1}),
    "multi.mkv": (75, {}),
    "neg1.mkv": (150, {}),
    "real_cut60.avi": (30, {"after 30 of 103 frames": 73}),
    "reschange.ts": (50, {}),
    "start5.mkv": (150, {}),
    "wmv2.wmv": (75, {}),
}
PECULIAR = {
    "concat.ts": "made of several recordings",
    "concat.vob": "made of several recordings",
    "inter.mp4": "interlaced",
    "reschange.ts": "of several sizes: pictures of 320x240 are scaled to 160x120",
}


@pytest.mark.parametrize("name", FOUND)
def test_every_found_file(data: Path, name: str) -> None:
    source = VideoSource.describe([str(data / "found" / "video" / name)])
    found = frames(source, 16)
    good, reasons = FOUND[name]
    dead = errors(found)
    assert Counter(reason for error in dead.values() for reason in reasons if reason in error) == reasons
    assert (len(found) - len(dead), len(dead)) == (good, sum(reasons.values()))
    times = [value[1]["time"] for value in found.values() if not isinstance(value, ItemError)]
    steps = Counter(round(after - before, 3) for before, after in pairwise(times))
    if good and name not in ("bbb_keyframe_damaged.mp4", "concat.ts", "concat.vob"):
        assert max(steps) <= 0.1  # one after the other, at an even rate
    if name.startswith("concat"):
        assert min(steps) == 0.04
        assert steps[0.04] == good - 2
    assert (source.remark() or "").find(PECULIAR.get(name, "")) >= 0
    assert (source.remark() is None) == (name not in PECULIAR)


def test_every_found_file_is_tried(data: Path) -> None:
    assert {path.name for path in (data / "found" / "video").iterdir()} == {*FOUND}


def test_a_file_that_begins_before_zero_keeps_its_pace(data: Path) -> None:
    found = frames(VideoSource.describe([str(data / "found" / "video" / "neg1.mkv")]))
    assert [value[1]["time"] for value in found.values()] == pytest.approx([n / 25 for n in range(150)], abs=1e-3)


# -- cut at any byte -----------------------------------------------------------------------------------

FORMS = {
    "a.mp4": {"codec": "libx264", "options": {}, "movflags": "faststart"},
    "a.mkv": {"codec": "libx264"},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.avi": {"codec": "mpeg4"},
    "m.avi": {"codec": "mjpeg", "bframes": 0, "options": {"strict": "unofficial"}},
    "a.ts": {"codec": "libx264"},
    "a.wmv": {"codec": "wmv2", "bframes": 0},
}
COUNT = 24
TRIES = 60


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def clip(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A clip, and what its frames give."""
    path = folder / name
    how = dict(FORMS[name])
    flags = how.pop("movflags", None)
    if not path.exists():
        write_clip(path, COUNT, gop=8, **how)  # type: ignore[arg-type]
        if flags is not None:
            before = path.rename(folder / f"before-{name}")
            with av.open(str(before)) as source, av.open(str(path), "w", options={"movflags": str(flags)}) as out:
                stream = out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
    return path, {key.rpartition("/")[2]: value for key, value in frames(VideoSource.describe([str(path)])).items()}


def looked_at(path: Path) -> Timeline | None:
    try:
        return probe(path.name, str(path.parent), path.name)
    except TallyError:
        return None


@pytest.mark.parametrize("name", FORMS)
def test_a_video_cut_at_any_byte(clips: Path, tmp_path: Path, name: str) -> None:
    path, intact = clip(clips, name)
    content = path.read_bytes()
    damaged = tmp_path / name
    seen: Counter[str] = Counter()
    for at in np.random.default_rng(0).choice(np.arange(1, len(content)), TRIES, replace=False):
        damaged.write_bytes(content[:at])
        timeline = looked_at(damaged)
        if timeline is None:
            seen["refused"] += 1
            continue
        # A transport stream promises nothing: it may end anywhere.
        assert timeline.cut is not None or len(timeline.ticks) + timeline.lost == COUNT or name == "a.ts", at
        if at % 3 == 0:  # decoding takes the most time
            for key, value in good(damaged).items():
                assert np.array_equal(value[0], intact[key][0]), (at, key)
                seen["good"] += 1
        seen["said"] += 1
    assert seen["good"] > 20
    assert seen["said"] > TRIES / 4


def good(path: Path) -> dict[str, Any]:
    """The good frames of a video by their number, six digits."""
    found = frames(VideoSource.describe([str(path)]), 1000)
    return {key.rpartition("/")[2]: value for key, value in found.items() if not isinstance(value, ItemError)}


# -- damaged in the middle -----------------------------------------------------------------------------


def packets_of(path: Path) -> list[tuple[bytes, bool]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(bytes(packet), packet.is_keyframe) for packet in container.demux(stream) if packet.size]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_what_depends_on_a_damaged_keyframe_is_dead_until_the_next(
    clips: Path, tmp_path: Path, name: str, group: int
) -> None:
    path, intact = clip(clips, name)
    content = bytearray(path.read_bytes())
    keyframe = [data for data, key in packets_of(path) if key][group]
    end = content.index(keyframe[-60:]) + 60
    content[end - 60 : end] = bytes(60)
    damaged = tmp_path / name
    damaged.write_bytes(content)
    found = good(damaged)
    bad = range(group * 8, group * 8 + 8)
    assert not {f"{number:06}" for number in bad} & {*found}
    assert len(found) >= COUNT - 8 - 4  # the pictures before it that are decoded after it depend on it, too
    assert all(np.array_equal(value[0], intact[key][0]) for key, value in found.items())


def test_a_damaged_picture_costs_itself_alone_where_each_is_a_keyframe(clips: Path, tmp_path: Path) -> None:
    path, intact = clip(clips, "m.avi")
    content = bytearray(path.read_bytes())
    picture = packets_of(path)[9][0]
    at = content.index(picture)
    content[at + len(picture) // 2 : at + len(picture)] = bytes(len(picture) - len(picture) // 2)
    damaged = tmp_path / "m.avi"
    damaged.write_bytes(content)
    found = good(damaged)
    assert {*intact} - {*found} == {"000009"}
    assert all(np.array_equal(value[0], intact[key][0]) for key, value in found.items())


@pytest.mark.parametrize("name", ["a.mkv", "m.avi"])
def test_pictures_that_a_reader_skips_are_told(clips: Path, tmp_path: Path, name: str) -> None:
    path, intact = clip(clips, name)
    content = bytearray(path.read_bytes())
    first, last = packets_of(path)[8][0], packets_of(path)[10][0]
    begin = content.index(first) - 10
    end = content.index(last, begin) + len(last)
    content[begin:end] = bytes(end - begin)
    damaged = tmp_path / name
    damaged.write_bytes(content)
    found = frames(VideoSource.describe([str(damaged)]))
    told = [key for key, error in errors(found).items() if GAP in error or "from frame" in error or MISSING in error]
    if name == "m.avi":  # its index tells which
        assert told == [f"{name}/{number:06}" for number in (8, 9, 10)]
        assert len(found) == COUNT
    else:  # the reader finds no more
        assert {key.rpartition("-")[2] for key in told} == {"end"}
    pictures = {round(value[1]["time"], 3): value[0] for value in intact.values()}
    for value in found.values():
        if not isinstance(value, ItemError):
            assert np.array_equal(value[0], pictures[round(value[1]["time"], 3)])


def taken_out(content: bytes, rng: np.random.Generator) -> bytes:
    """Without some bytes among the packets, before the index."""
    begin, end = content.index(b"movi") + 4, content.index(b"idx1")
    length = int(rng.integers(1, (end - begin) // 8))
    at = int(rng.integers(begin, end - length))
    return content[:at] + content[at + length :]


@pytest.mark.parametrize("name", ["a.avi", "m.avi"])
@pytest.mark.parametrize("also", ["", "twice", "without its index"])
def test_frames_behind_missing_bytes_keep_their_numbers(clips: Path, tmp_path: Path, name: str, also: str) -> None:
    """Or are dead, where no index tells them. Every frame of the intact file is an item."""
    path, intact = clip(clips, name)
    damaged = tmp_path / name
    count = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        content = taken_out(path.read_bytes(), rng)
        if also == "twice":
            content = taken_out(content, rng)
        elif also:
            content = content[: content.index(b"idx1")]
        damaged.write_bytes(content)
        found = frames(VideoSource.describe([str(damaged)]), 1000)
        if {*found} == {name}:  # damaged at its beginning: nothing is certain
            assert also == "without its index"
            continue
        assert {key.rpartition("/")[2] for key in found} == {*intact}
        for key, value in good(damaged).items():
            assert np.array_equal(value[0], intact[key][0]), (seed, key)
            assert value[1]["time"] == pytest.approx(intact[key][1]["time"], abs=1e-6)
            count += 1
    assert count > COUNT


def test_a_timeline_survives_json(clips: Path) -> None:
    path, _ = clip(clips, "a.ts")
    timeline = looked_at(path)
    assert timeline is not None
    assert Timeline.from_json(json.loads(json.dumps(timeline.to_json()))).to_json() == timeline.to_json()


# -- recordings that follow one another ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_recordings_that_follow_one_another(tmp_path: Path, name: str) -> None:
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    one = write_clip(tmp_path / name, 20, codec=codec, gop=8, sound=0.8, audio="mp2")
    two = tmp_path / f"two-{name}"
    two.write_bytes(one.read_bytes() * 3)
    source = VideoSource.describe([str(two)])
    found = frames(source)
    assert errors(found) == {}
    assert numbers(found) == [*range(20)] * 3
    times = [value[1]["time"] for value in found.values()]
    assert all(0.039 < after - before < 0.1 for before, after in pairwise(times))
    assert "made of several recordings" in (source.remark() or "")
