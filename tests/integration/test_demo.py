"""What ``make demo`` and the quickstart do, command by command, as a user would type it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

COUNT = 48
MODULE = [sys.executable, "-m", "tally"]
SCORE = [*MODULE, "score", "pictures", "--model", "tally:shapes", "--out", "predictions"]


@dataclass
class Demo:
    """A finished job in ``folder``; ``truth`` maps each picture's key to its label."""

    folder: Path
    truth: dict[str, str]

    def run(self, *command: str | Path) -> str:
        return run(self.folder, *command)


def execute(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder``, with nobody at the keyboard; jobs are kept under it."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "TALLY_HOME": str(folder / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run(folder: Path, *command: str | Path) -> str:
    """Standard output of a command that must succeed."""
    done = execute(folder, *command)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    run(folder, *MODULE, "simulate", "pictures", "--out", "pictures", "--count", str(COUNT), "--labels", "truth.csv")
    run(folder, *SCORE)
    with (folder / "truth.csv").open(newline="") as file:
        truth = {row["key"]: row["label"] for row in csv.DictReader(file)}
    return Demo(folder, truth)


def test_every_picture_is_named_once_and_rightly(demo: Demo) -> None:
    predictions = demo.folder / "predictions"
    assert (predictions / "_SUCCESS").exists()
    rows = [
        row
        for part in sorted(predictions.glob("*.parquet"))
        for row in pq.read_table(part, columns=["key", "label"]).to_pylist()
    ]
    assert sorted(row["key"] for row in rows) == sorted(demo.truth)
    right = sum(row["label"] == demo.truth[row["key"]] for row in rows)
    assert right >= 0.9 * COUNT


def test_the_result_answers_questions(demo: Demo) -> None:
    answer = demo.run(
        *MODULE,
        "query",
        "predictions",
        "select label, count(*) as pictures, count(*) filter (starts_with(key, label || '-')) as right_ones "
        "from results group by 1 order by 1",
    )
    rows = list(csv.DictReader(answer.splitlines()))
    assert [row["label"] for row in rows] == sorted(set(demo.truth.values()))
    assert sum(int(row["pictures"]) for row in rows) == COUNT
    assert sum(int(row["right_ones"]) for row in rows) >= 0.9 * COUNT


def test_a_second_time_into_the_same_folder_is_not_silently_done_again(demo: Demo) -> None:
    before = {path: path.stat().st_mtime_ns for path in (demo.folder / "predictions").rglob("*")}
    again = execute(demo.folder, *SCORE)
    assert again.returncode != 0
    assert "Traceback" not in again.stderr
    assert "--overwrite" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (demo.folder / "predictions").rglob("*")}

    execute(demo.folder, *SCORE, "--overwrite").check_returncode()
    assert (demo.folder / "predictions" / "_SUCCESS").exists()


def test_the_clip_is_restyled_and_keeps_times_and_sound(tmp_path: Path) -> None:
    run(tmp_path, *MODULE, "simulate", "clip", "--out", "clip.mp4", "--seconds", "1")
    ran = execute(tmp_path, *MODULE, "score", "clip.mp4", "--model", "tally:strokes", "--out", "styled.mp4")
    assert ran.returncode == 0, ran.stderr
    assert "25 of 25 frames scored" in ran.stderr
    before, after = content(tmp_path / "clip.mp4"), content(tmp_path / "styled.mp4")
    assert after[0] == before[0]  # times
    assert after[1] == before[1] != []  # sound
    changed = [np.abs(a.astype(int) - b).mean() for a, b in zip(after[2], before[2], strict=True)]
    assert min(changed) > 10


def content(path: Path) -> tuple[list[float], list[bytes], list[np.ndarray]]:
    """Times of frames, packets of sound, and pictures."""
    with av.open(str(path)) as container:
        sound = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        container.seek(0)
        frames = list(container.decode(video=0))
    return [float(frame.time) for frame in frames], sound, [frame.to_ndarray(format="rgb24") for frame in frames]


def test_the_demo_command_kills_its_job_and_has_it_go_on(tmp_path: Path) -> None:
    command = [*MODULE, "demo", "shown", "--count", "400", "--kill"]
    done = execute(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    typed = [" ".join(line.split()[1:3]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert typed == ["tally simulate", "tally score", "kill -9", "tally jobs", "tally query", "tally query"]
    assert "rows,pictures\n400,400\n" in done.stdout
    assert "400 of 400 items scored" in done.stderr
    assert "resource_tracker" not in done.stderr
    again = execute(tmp_path, *command)
    assert again.returncode == 2
    assert "shown is there already, with something in it" in again.stderr
