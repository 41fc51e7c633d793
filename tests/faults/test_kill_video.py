"""A video job is killed at random moments, again and again; its video equals that of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
from tests.extent import FULL
from tests.faults.storms import SCORERS, storm, tally
from tests.forms import animation, numbered
from tests.videos import assert_same_video, frames_of, number_in, time_of, write_clip

from tally.jobs.facade import Jobs

FRAMES = 500 if FULL else 120
KILLS = 20 if FULL else 3


def score(clip: Path, out: Path, *more: object) -> list[str]:
    return tally(
        *("score", clip, "--model", SCORERS / "slow_pictures.py", "--out", out, "--crf", 0, "--workers", 2, *more)
    )


OTHERS = pytest.mark.skipif(not FULL, reason="the same again: TALLY_TEST_FULL=1")


@pytest.mark.parametrize(
    "form", ["pictures", "gif", pytest.param("apng", marks=OTHERS), pytest.param("webp", marks=OTHERS)]
)
def test_kills_change_nothing_of_pictures_as_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Numbered pictures, and an animation: both by two workers, killed, resumed, and as if undisturbed."""
    count = FRAMES // 4
    if form == "pictures":
        source = tmp_path / "clip"
        source.mkdir()
        for name, content in numbered(count).items():
            (source / name).write_bytes(content)
    else:
        source = tmp_path / f"clip.{form}"
        source.write_bytes(animation("png" if form == "apng" else form, count))
    more = ["--fps", 25] if form == "pictures" else ["--media", "video"]
    calm = tmp_path / "calm" / "out.mp4"
    subprocess.run(score(source, calm, *more, "-q"), check=True, timeout=120)

    monkeypatch.setenv("PACE", "0.06")
    out = tmp_path / "stormy" / "out.mp4"
    storm(score(source, out, *more), out, kills=KILLS if FULL else 2, seed=2, log=tmp_path / "log")

    assert_same_video(out, calm)
    assert [number_in(255 - frame.to_ndarray(format="rgb24")) for frame in frames_of(out)] == list(range(count))
    assert [time_of(frame) for frame in frames_of(out)] == [Fraction(number, 25) for number in range(count)]
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", count, count, 0)


@pytest.mark.parametrize("seed", [1])
def test_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", FRAMES, gop=40, sound=FRAMES / 25)
    calm = tmp_path / "calm" / "out.mp4"
    subprocess.run(score(clip, calm, "-q"), check=True, timeout=120)

    monkeypatch.setenv("PACE", "0.06")
    out = tmp_path / "stormy" / "out.mp4"
    storm(score(clip, out), out, kills=KILLS, seed=seed, log=tmp_path / "log")

    assert_same_video(out, calm)
    assert [number_in(255 - frame.to_ndarray(format="rgb24")) for frame in frames_of(out)] == list(range(FRAMES))
    assert [time_of(frame) for frame in frames_of(out)] == [time_of(frame) for frame in frames_of(clip)]
    assert sorted(os.listdir(out.parent)) == sorted(os.listdir(calm.parent))  # no parts are left
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", FRAMES, FRAMES, 0)
