"""An hour of video through ``tally score``: how fast, and how much memory at the beginning, at the end, and joining.

    python benchmarks/video_hour.py [--seconds 3600] [--size 320x180] [--interval 1]

The clip is drawn (10 seconds of it, repeated), has sound, and goes through a model that costs next to nothing. A tenth
of it is run first: what grows with the length shows in the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from _machine import TALLY, colour_model, drawn_clip, environment, introduce, repeat_clip, scratch, settle

CAVEATS = """
RSS counts memory that processes share (libraries, the files that a process maps) once for each of them; PSS divides it
among them. Both are sampled; what lasts for less than the interval may be missed.

The phases are those of the job's lines of progress: "first tenth" begins with the command, and "finalizing" is from the
last frame to the end of the job: segments are joined, the sound is copied.

coordinator: the command itself. worker: the largest of them. helper: the process in which the planner looks at videos.
"""
PHASES = ("first tenth", "between", "last tenth", "finalizing")
ROLES = ("coordinator", "worker", "helper")
PROGRESS = re.compile(r"([\d,]+)/([\d,]+) \w+")
FINISHED = re.compile(r"job \w+ finished: ")
FPS = 25
MEGA, MEBI = 1e6, 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="length of the clip")
    parser.add_argument("--size", default="320x180", help="of the frames, WxH")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks at the memory")
    given = parser.parse_args()
    introduce(f"video of {given.seconds:,} seconds, {given.size}, {FPS} frames per second", CAVEATS)
    with scratch() as folder:
        os.environ.update(environment(folder / "home"))
        subprocess.run([*TALLY, "jobs", "list"], check=True, capture_output=True)
        drawn, model = drawn_clip(folder / "drawn.mp4", given.size), colour_model(folder / "colour.onnx")
        for seconds in (given.seconds / 10, given.seconds):
            clip = folder / "clip.mp4"
            began = time.monotonic()
            frames = repeat_clip(drawn, clip, round(seconds * FPS))
            took = time.monotonic() - began
            settle()
            report(Job(clip, model, given.interval), frames, f"made in {took:.1f} s")


class Job(threading.Thread):
    """Runs ``tally score``, and looks at the memory of its processes until it ends.

    peaks: phase and role to RSS and PSS in bytes. at: when each phase began. done: how many frames were done then.
    """

    def __init__(self, clip: Path, model: Path, interval: float) -> None:
        super().__init__(daemon=True)
        self.clip, self.out, self.interval = clip, clip.with_name("out.mp4"), interval
        command = [*TALLY, "score", clip, "--model", model, "--task", "restyle", "--out", self.out, "--overwrite"]
        self.peaks: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
        self.phase, self.ended = PHASES[0], threading.Event()
        self.at, self.done = {self.phase: time.monotonic()}, {self.phase: 0}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.start()
        self._follow()
        self.manifest = json.loads(Path(f"{self.out}.manifest.json").read_text())

    def _follow(self) -> None:
        said = []
        assert self.process.stdout is not None
        with self.process:
            for line in self.process.stdout:
                said.append(line)
                if match := PROGRESS.match(line):
                    done, total = (int(number.replace(",", "")) for number in match.groups())
                    self._enter(3 if done == total else 2 if 10 * done >= 9 * total else 1, done)
                elif FINISHED.match(line):
                    self.at["end"] = time.monotonic()
                    self.ended.set()
        self.ended.set()
        self.join()
        if self.process.returncode or "end" not in self.at:
            raise SystemExit(f"tally score failed (exit code {self.process.returncode}):\n{''.join(said)}")

    def _enter(self, number: int, done: int) -> None:
        self.phase = PHASES[number]
        self.at.setdefault(self.phase, time.monotonic())
        self.done.setdefault(self.phase, done)

    def run(self) -> None:
        root = psutil.Process(self.process.pid)
        while not self.ended.wait(self.interval):
            phase = self.phase
            try:
                processes = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    role = _role(process, root)
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                if role is not None:
                    rss, pss = self.peaks[phase, role]
                    self.peaks[phase, role] = max(rss, memory.rss), max(pss, getattr(memory, "pss", 0))


def _role(process: psutil.Process, root: psutil.Process) -> str | None:
    if process == root:
        return "coordinator"
    line = " ".join(process.cmdline())
    return "helper" if "tally.media.video.probe" in line else "worker" if "spawn_main" in line else None


def report(job: Job, frames: int, made: str) -> None:
    at, usage, out = job.at, job.manifest["usage"], job.manifest["counts"]
    whole = at["end"] - at["first tenth"]
    steady = (frames - job.done["between"]) / (at["finalizing"] - at["between"])
    print(f"{frames:,} frames, {frames / FPS:,.0f} s, {job.clip.stat().st_size / MEGA:.1f} MB, {made}")
    print(f"  scored {job.manifest['scored']:,}, failed {job.manifest['dead']:,}, out {out['bytes'] / MEGA:.1f} MB")
    print(f"  whole process  {whole:.1f} s, {frames / whole:.1f} frames/s")
    print(f"  steady state   {steady:.1f} frames/s, from the first tenth to the last frame")
    print(f"  finalizing     {at['end'] - at['finalizing']:.1f} s")
    print(
        f"  workers        {usage['worker_seconds']:.1f} s in {usage['chunks']:.0f} chunks: "
        + ", ".join(f"{stage} {usage[stage]:.1f} s" for stage in ("decode", "score", "write"))
    )
    print("  peaks, RSS (PSS) in MiB" + "".join(f"{phase:>20}" for phase in PHASES))
    for role in ROLES:
        cells = [job.peaks.get((phase, role)) for phase in PHASES]
        shown = [f"{cell[0] / MEBI:.1f} ({cell[1] / MEBI:.1f})" if cell else "-" for cell in cells]
        print(f"  {role:23}" + "".join(f"{cell:>20}" for cell in shown))
    print(flush=True)


if __name__ == "__main__":
    main()
