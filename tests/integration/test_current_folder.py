"""Somebody else's folder is scored from within: nothing in it runs, whatever it is called."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.videos import write_clip

HOST = """
import os, pickle, signal
from multiprocessing import resource_tracker
from tally.engines.base import Limits
from tally.engines.ray.host import Host

host = Host()
host.begin(pickle.dumps((str, ("PYTHONSAFEPATH",))), Limits(), 1, False)
_, (good, answer, *_) = host.run(1, pickle.dumps((os.getenv, ())), False, None)
assert good and pickle.loads(answer) is None, "a worker is not told of the safe path"
tracker = resource_tracker._resource_tracker._pid
os.kill(tracker, signal.SIGKILL)  # as Ray does before it ends the process
os.waitid(os.P_PID, tracker, os.WEXITED | os.WNOWAIT)
host.end(False)
"""

COMMAND = str(Path(sys.executable).with_name("tally"))
SEEN = "seen-"

SCORER = """
import atexit, os, pathlib, sys, tally

class Bright(tally.Scorer):
    columns = {"mean": "float64"}

    def score(self, batch):
        found = {name.partition(".")[0] for name, each in sys.modules.items() if getattr(each, "__file__", None)}
        names = sorted(name for name in found if not name.startswith("tally_script"))
        pathlib.Path(os.environ["SEEN"], f"seen-{os.getpid()}").write_text("\\n".join(names))
        return [{"mean": float(each.mean())} for each in batch]
"""

DECOY = """
import sys
told = [__file__, sys.orig_argv]
for pid in ("self", open("/proc/self/stat").read().rpartition(")")[2].split()[1]):
    told.append(open(f"/proc/{{pid}}/cmdline").read())
open({ran!r}, "a").write(repr(told) + chr(10))
"""


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A folder of pictures, and of modules that must not run: named as Python's own and as all that are installed."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 12), (number * 80, 0, 0)).save(folder / f"{number}.png")
    known = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "tally", "sitecustomize"}
    for name in known:
        if name.isidentifier() and name != "__main__":
            (folder / f"{name}.py").write_text(DECOY.format(ran=str(tmp_path / "ran")))
    return folder


def run(decoys: Path, home: Path, *command: str, **variables: str) -> None:
    """Run the command in the folder; no decoy runs."""
    environment = {**os.environ, "TALLY_HOME": str(home), "SEEN": str(decoys.parent), **variables}
    done = subprocess.run(
        command, cwd=decoys, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    ran = decoys.parent / "ran"
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0, done.stderr


def seen(decoys: Path, *, complete: bool = True) -> None:
    """A worker has scored, and there was a decoy of each module that it had."""
    above = decoys.parent
    used = {name for seen in above.glob(f"{SEEN}*") for name in seen.read_text().split()}
    assert {"pickle", "multiprocessing", "numpy", "tally"} <= used, "a worker has scored"
    if complete:
        assert [name for name in used if not (decoys / f"{name}.py").exists()] == []


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "tally"]], ids=["tally", "python -m tally"])
def test_nothing_in_the_current_folder_runs(command: list[str], decoys: Path, home: Path, tmp_path: Path) -> None:
    if "-m" in command:  # Python itself looks there for what it needs to find Tally
        program = "import pkgutil, runpy, sys, tally; print(*sys.modules)"
        early = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
        for name in early.stdout.split():
            (decoys / f"{name}.py").unlink(missing_ok=True)
    scorer = tmp_path / "model" / "scorer.py"
    scorer.parent.mkdir()
    scorer.write_text(SCORER)
    run(decoys, home, *command, "score", ".", "--model", str(scorer), "--out", "../out", "--workers", "1")
    seen(decoys, complete="-m" not in command)


def test_nor_in_the_processes_of_a_schedule(decoys: Path, home: Path, tmp_path: Path) -> None:
    """The driver of a run, the process that probes videos, and the workers."""
    write_clip(decoys / "clip.mp4", 10)
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "job.yaml").write_text(
        "source: pictures/clip.mp4\nmodel: scorer.py\nout: out/{interval_start_utc:%Y-%m-%dT%H}\nworkers: 1\n"
    )
    run(decoys, home, COMMAND, "schedule", "add", "hourly", "../job.yaml", "--cron", "0 * * * *")
    hour = ("--from", "2026-01-01T00:00", "--to", "2026-01-01T01:00")
    run(decoys, home, COMMAND, "schedule", "backfill", "hourly", *hour)
    seen(decoys)


@pytest.mark.ray
def test_nor_in_workers_on_a_cluster(decoys: Path, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "scorer.py").write_text(SCORER)
    model = str(tmp_path / "scorer.py")
    options = ("--engine", "ray", "--workers", "1", "--out", "../out")
    run(decoys, home, COMMAND, "score", ".", "--model", model, *options, RAY_ADDRESS="local")
    seen(decoys)


@pytest.mark.ray
def test_nor_in_the_process_of_an_actor_that_ray_ends(decoys: Path, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "host.py").write_text(HOST)  # Ray's own processes import from the folder of a script, too
    run(decoys, home, sys.executable, "../actor/host.py")
