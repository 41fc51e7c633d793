"""A video job is killed at random moments, again and again; its video equals that of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from tests.faults.test_kill import SCORERS, kill, start, tally, workers_of
from tests.videos import assert_same_video, frames_of, number_in, time_of, write_clip

from tally.jobs.launch import open_store

FRAMES = 500
KILLS = 20


def score(clip: Path, out: Path, *more: object) -> list[str]:
    return tally(
        *("score", clip, "--model", SCORERS / "slow_pictures.py", "--out", out, "--crf", 0, "--workers", 2, *more)
    )


@pytest.mark.parametrize("seed", [1])
def test_twenty_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", FRAMES, gop=40, sound=FRAMES / 25)
    calm = tmp_path / "calm" / "out.mp4"
    subprocess.run(score(clip, calm, "-q"), check=True, timeout=120)

    monkeypatch.setenv("PACE", "0.06")
    log = tmp_path / "log"
    dice = random.Random(seed)
    out = tmp_path / "stormy" / "out.mp4"
    process = start(score(clip, out), log)
    kills = {"worker": 0, "coordinator": 0, "everything": 0}
    deadline = time.monotonic() + 300
    while sum(kills.values()) < KILLS and time.monotonic() < deadline:
        try:
            process.wait(timeout=dice.uniform(0.05, 1.0))
        except subprocess.TimeoutExpired:
            pass
        if process.poll() is not None:
            if out.exists():
                break
            process = start(score(clip, out, "--resume"), log)
            continue
        workers = workers_of(process)
        victim = dice.choices(["worker", "coordinator", "everything"], weights=[4, 1, 1])[0]
        if victim == "worker" and workers:
            kill(dice.choice(workers).pid)
        elif victim == "coordinator":
            kill(process.pid)
        else:
            for each in [*workers, process]:
                kill(each.pid)
        kills[victim] += 1
    monkeypatch.setenv("PACE", "0")
    process.wait(timeout=120)
    for _ in range(3):
        if out.exists():
            break
        subprocess.run(score(clip, out, "--resume", "-q"), check=True, timeout=120)
    print(f"kills: {kills}")

    assert out.exists(), log.read_text()
    assert_same_video(out, calm)
    assert [number_in(255 - frame.to_ndarray(format="rgb24")) for frame in frames_of(out)] == list(range(FRAMES))
    assert [time_of(frame) for frame in frames_of(out)] == [time_of(frame) for frame in frames_of(clip)]
    assert sorted(os.listdir(out.parent)) == sorted(os.listdir(calm.parent))  # no parts are left
    record = open_store().newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", FRAMES, FRAMES, 0)
    assert sum(kills.values()) == KILLS, "the job was over before it was disturbed enough"
