"""Damaged videos, and what is none: said clearly, frame by frame, and never taken for a shorter video."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from tests.extent import FULL
from tests.videos import frames_of

import tally
from tally.jobs.facade import Jobs

Cli = Callable[..., Any]
SCORERS = Path(__file__).with_name("scorers")
SECONDS = 60.0
MEMORY = 1 << 30
MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
os._exit(os.waitstatus_to_exitcode(status))
"""
"""In a small process: what a process held is never less than what the one held that started it."""

NO_HEADER = "it cannot be opened as a video: Invalid data found when processing input (EBML header parsing failed)"
UNREADABLE = "it cannot be opened as a video: Invalid data found when processing input (error reading header)"

# One dead item each, for the file.
NO_VIDEO = {
    "afl_ffmpeg-h264-bad-ptr-800m.mp4": UNREADABLE,
    "derived_bottle_truncated_40pct.mp4": "(moov atom not found)",
    "exo_full_blocks.mkv": "it has no video stream, only subtitle srt",
    "exo_sample_ac4.mp4": "it has no video stream, only audio",
    "exo_sample_fragmented_clearkey.mp4": UNREADABLE,
    "exo_sample_with_sdt.ts": "it holds no video packets",
    "libwebm_chapters_truncated_chapter_string_2.mkv": "it holds no video packets",
    "libwebm_fixed_lacing_bad_lace_size.mkv": "it holds no video packets",
    "libwebm_projection_float_overflow.webm": "it cannot be opened as a video: Input/output error",
    **{f"libwebmfuzz_{number:02}.webm": NO_HEADER for number in range(0, 16, 2)},
    "moviepy_result.webm": "the file is empty",
    "mp4parse_bipbop_cbcs_video_init.mp4": "it holds no video packets",
}
# How many frames there should be, those that are dead, and how many of them for which reason.
FRAMES: dict[str, tuple[int, list[int], dict[str, int]]] = {
    "afl_ffmpeg-h264-bad-read.mp4": (
        9,
        [*range(9)],
        {"Error splitting the input": 1, "the file ends before it, after 1 of 9 frames": 8},
    ),
    # One keyframe, at the beginning: what is decoded after a damaged picture may depend on it.
    "decord_corrupted.mp4": (
        50,
        [*range(29, 50)],
        {"Error splitting the input": 1, "the decoder had to guess": 1, "it depends on a damaged picture": 19},
    ),
    "exo_invalid-bitstream.webm": (51, [*range(51)], {"Failed to read frame header": 51}),
    "libwebm_accurate_cluster_duration.webm": (4, [*range(4)], {"Invalid start code": 4}),
    "mediabunny_annex-b.mp4": (
        745,
        [*range(5, 745)],
        {"it is missing: the file ends before it, after 5 of 745 frames": 740},
    ),
    # All of its keyframes are damaged.
    "mp4parse_no_timescale.mp4": (
        182,
        [*range(182)],
        {"it cannot be decoded": 14, "the decoder had to guess": 27, "it depends on a damaged picture": 141},
    ),
    "mp4parse_short-cenc.mp4": (10, [*range(10)], {"no frame!": 10}),
    "mp4parse_zero_empty_stsc.mp4": (
        1040,
        [*range(1040)],
        {"Error splitting the input": 1, "it is missing: the file ends before it, after 1 of 1,040 frames": 1039},
    ),
}
# Likewise of the frames before the container ends, which does not tell how many are missing; and how it is known.
CUT: dict[str, tuple[int, list[int], dict[str, int], str]] = {
    "derived_bbb_truncated_25pct.webm": (199, [], {}, "its header says that it lasts 30.003 s, and it ends at 8.294 s"),
    "libwebm_block_ends_beyond_cluster.mkv": (
        1,
        [0],
        {"no keyframe lies before it": 1},
        "its header says that it lasts 9.144 s, and it ends at 1.201 s",
    ),
    "libwebm_invalid_vp9_bitstream-bug_1416.webm": (
        2,
        [0, 1],
        {"Failed to read frame header": 1, "Invalid frame size in a superframe: 12336": 1},
        "its header says that it has 1,060,962 bytes, and it has 12,847: it is cut off",
    ),
}
EVERY = sorted([*NO_VIDEO, *FRAMES, *CUT])
FEW = (
    "afl_ffmpeg-h264-bad-ptr-800m.mp4",
    "decord_corrupted.mp4",
    "derived_bbb_truncated_25pct.webm",
    "libwebmfuzz_00.webm",
    "moviepy_result.webm",
    "mp4parse_zero_empty_stsc.mp4",
)
"""One of each kind, which has a job of its own by default; all have one together."""


def scored(name: str) -> list[int]:
    """The frames that are to have a result."""
    if name in NO_VIDEO:
        return []
    total, dead, *_ = FRAMES.get(name) or CUT[name]
    return sorted({*range(total)} - {*dead})


def check_dead(name: str, dead: dict[str, str]) -> None:
    """dead: the keys of the file's dead items, and why."""
    if name in NO_VIDEO:
        assert list(dead) == [name]
        assert NO_VIDEO[name] in dead[name]
    else:
        total, numbers, reasons, *end = FRAMES.get(name) or CUT[name]
        keys = [f"{name}/{number:06}" for number in numbers]
        if end:
            keys.append(f"{name}/{total:06}-end")
            assert f"from frame {total} on the video is missing: {end[0]}" in dead[keys[-1]]
        assert list(dead) == keys
        found = Counter(reason for error in dead.values() for reason in reasons if reason in error)
        assert found == reasons
    for error in dead.values():
        assert all(line.isprintable() for line in error.splitlines())  # a second one says what to do
        assert 10 < len(error) < 250
        assert "Traceback" not in error


def score(source: Path, out: Path, *more: object) -> tuple[int, str, int]:
    """Score in a process of its own: its exit code, what it said, and the most bytes that it or a worker held."""
    scorer = SCORERS / ("brightness.py" if out.suffix == ".parquet" else "identity.py")
    command = [sys.executable, "-m", "tally", "score", source, "--model", scorer, "--out", out, "--max-dead", "100%"]
    log, held = out.with_name("log"), out.with_name("held")
    with log.open("wb") as file:
        asked = [sys.executable, "-c", MEASURED, held, *command, *more]
        process = subprocess.Popen([*map(str, asked)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        timer = Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        process.wait()
        timer.cancel()
    assert process.returncode >= 0, f"it took longer than {SECONDS:.0f} s: {log.read_text()}"
    return process.returncode, log.read_text(), int(held.read_text()) * 1024


def dead_of(cli: Cli, out: Path) -> dict[str, str]:
    lines = cli("jobs", "dead", out, "--json", "-n", 5000).out.splitlines()
    return {each["key"]: each["error"] for each in map(json.loads, lines)}


def test_every_file_is_tried(data: Path) -> None:
    assert sorted(path.name for path in (data / "hostile" / "video").iterdir()) == EVERY


@pytest.mark.parametrize("name", EVERY if FULL else FEW)
def test_alone(cli: Cli, data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.parquet"
    code, said, held = score(data / "hostile" / "video" / name, out, "--workers", 1)
    assert held < MEMORY
    dead, good = dead_of(cli, out), scored(name)
    check_dead(name, dead)
    if not good:
        assert code == 1
        failed = "the only item failed:" if len(dead) == 1 else f"all {len(dead):,} items failed; the first was"
        assert f"error: {failed} {next(iter(dead))}: " in said
        assert "Traceback" not in said
        assert not out.exists()
        return
    assert code == 0
    assert f"{len(good):,} of {len(good) + len(dead):,} frames scored" in said
    assert f"{len(dead):,} failed" in said
    rows = tally.Job(str(out)).results().to_pylist()
    assert [row["frame"] for row in rows] == good
    assert [row["key"] for row in rows] == [f"{name}/{number:06}" for number in good]


def test_all_together(cli: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, held = score(data / "hostile" / "video", out, "--workers", 2)
    assert code == 0, said
    assert held < MEMORY
    dead = dead_of(cli, out)
    for name in EVERY:
        check_dead(name, {key: error for key, error in dead.items() if key.split("/")[0] == name})
    expected = {name if name.endswith(".mp4") else f"{name}.mp4": len(scored(name)) for name in EVERY if scored(name)}
    assert {path.name: sum(1 for _ in frames_of(path)) for path in out.glob("*.mp4")} == expected
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (manifest["scored"], manifest["dead"]) == (sum(expected.values()), len(dead))
    print(f"{held >> 20} MiB held at most")


@pytest.mark.parametrize("name", ["mediabunny_annex-b.mp4", "decord_corrupted.mp4", "derived_bbb_truncated_25pct.webm"])
def test_strict_refuses(data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.mp4"
    code, said, _ = score(data / "hostile" / "video" / name, out, "--strict", "--size", "320x180")
    assert code == 1
    assert "error: stopped, as --strict asks: " in said
    assert f"the first was {name}/" in said
    assert not out.exists()
    assert Jobs().store.newest(limit=1)[0].state == "failed"
