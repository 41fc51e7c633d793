"""Scorers that do what no scorer should: the blame falls on the one item, or on the worker, and on nobody else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import tally
from tally.engines import logs
from tally.errors import JobError
from tally.testing.engines import until

Cli = Callable[..., Any]
CHAOS = Path(__file__).with_name("scorers") / "chaos.py"

# What of poison2.py gives a row after all.
ROWS = "nan,inf,nul,nulcol,emptycol,dt,set,np0d,mixed,dupcase,none"
NO_ROWS = "hugeint,selfrow,obj,badrepr,baditems,badlen,gen,none_,str,surr,intcol,dec,cplx,npobj,key"
RAISED = (
    "sysexit,sysexit0,kbd,base,genexit,asynccancel,futcancel,badstr,hugestr,recursion,memerr,oserr,stopiter,excgroup"
)


@pytest.fixture
def chaos(data: Path) -> Path:
    folder = data / "found" / "chaos"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(5 * number, 5 * number + 100, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def dead_of(job: tally.Job) -> dict[str, str]:
    return {row["key"]: row["error"] for row in job.dead().to_pylist()}


@pytest.mark.parametrize("how", ["inplace", "sort", "clear"])
def test_a_scorer_that_changes_its_batch(
    chaos: Path, pictures: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_PICTURE", str(pictures / "007.png"))
    job = tally.score(pictures, chaos / "mutate.py", tmp_path / "out", settings={"how": how}, workers=1, quiet=True)
    assert list(dead_of(job)) == ["007.png"]
    means = {row["key"]: row["mean"] for row in job.results().to_pylist()}
    scale = 255 if how == "inplace" else 1
    assert means == pytest.approx(
        {each.name: np.asarray(Image.open(each)).mean() / scale for each in pictures.iterdir() if each.stem != "007"}
    )


def test_whatever_an_item_raises(chaos: Path, pictures: Path, tmp_path: Path) -> None:
    hows = [*RAISED.split(","), *["none"] * 6]
    options = {"file": str(chaos / "poison.py"), "name": "Poison", "hows": ",".join(hows)}
    job = tally.score(pictures, CHAOS, tmp_path / "out", settings=options, workers=1, max_dead="100%", quiet=True)
    bad = [f"{at:03}.png" for at, how in enumerate(hows) if how != "none"]
    assert sorted(dead_of(job)) == bad
    assert {row["key"] for row in job.results().to_pylist()} == {each.name for each in pictures.iterdir()} - {*bad}


@pytest.mark.parametrize("hows", [ROWS, NO_ROWS], ids=["rows", "none"])
def test_whatever_an_item_gives_as_its_result(chaos: Path, pictures: Path, tmp_path: Path, hows: str) -> None:
    all_of_them = [*hows.split(","), *["none"] * 20][:20]
    options = {"file": str(chaos / "poison2.py"), "name": "Poison2", "hows": ",".join(all_of_them)}
    job = tally.score(pictures, CHAOS, tmp_path / "out", settings=options, workers=1, max_dead="100%", quiet=True)
    bad = [f"{at:03}.png" for at, how in enumerate(all_of_them) if how in NO_ROWS.split(",")]
    assert sorted(dead_of(job)) == bad
    assert {row["key"] for row in job.results().to_pylist()} == {each.name for each in pictures.iterdir()} - {*bad}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("init_exit", "making the scorer failed: SystemExit: 0"),
        ("load_exit", "load() failed: SystemExit: 0 (load_exit"),
    ],
)
def test_leaving_while_the_model_is_loaded(
    chaos: Path, pictures: Path, tmp_path: Path, cli: Cli, name: str, said: str
) -> None:
    ran = cli("score", pictures, "--model", chaos / f"{name}.py", "--out", tmp_path / "out.csv", "--workers", "1")
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out.csv").exists()


def test_leaving_while_an_item_is_prepared(chaos: Path, pictures: Path, tmp_path: Path) -> None:
    for each in pictures.iterdir():
        each.rename(each.with_suffix(".jpg"))  # the name that it looks for
    job = tally.score(pictures, chaos / "prep_exit.py", tmp_path / "out", workers=1, quiet=True)
    assert dead_of(job) == {"007.jpg": "SystemExit: 1"}


@pytest.mark.parametrize("name", ["pool", "pool_fork", "joblib_par"])
def test_scripts_have_pools_of_processes(data: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    script = data / "found" / "scripts" / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"there is no {script}")
    job = tally.score(pictures, script, tmp_path / "out", workers=1, quiet=True)
    rows = job.results().to_pylist()
    assert {row["key"] for row in rows} == {each.name for each in pictures.iterdir()}
    assert {value for row in rows for name, value in row.items() if name != "key"} == {16}


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from tally.cli.main import main
sys.argv[0] = "tally"
main()
"""


def test_leaked_descriptors_are_the_workers_fault(chaos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(120):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03}.png")
    job = [folder, "--model", chaos / "fdleak.py", "--out", tmp_path / "out.csv", "--workers", "1"]
    script = LIMITED.format(files=72)
    ran = subprocess.run([sys.executable, "-c", script, "score", *job], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "120 of 120 items scored" in ran.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 121


def test_leaked_memory_is_the_workers_fault(chaos: Path, pictures: Path, tmp_path: Path) -> None:
    job = tally.score(
        pictures,
        chaos / "memleak.py",
        tmp_path / "out",
        settings={"mib": 100, "pause": 0.4},
        memory="900MiB",
        workers=1,
        quiet=True,
    )
    assert dead_of(job) == {}
    assert len(job.results().to_pylist()) == 20


def test_workers_are_replaced_in_time(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(
        "import os, tally\nclass Who(tally.Scorer):\n    batch_size = 1\n    columns = {'pid': 'int64'}\n"
        "    def score(self, batch): return [{'pid': os.getpid()} for _ in batch]\n"
    )
    job = tally.score(pictures, tmp_path / "who.py", tmp_path / "out", worker_items=5, workers=1, quiet=True)
    counted = Counter(row["pid"] for row in job.results().to_pylist())
    assert sum(counted.values()) == 20
    assert max(counted.values()) < 10


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("segv", "killed by SIGSEGV"),
        ("sleep", "longer than its time limit of 2 s"),
        ("exit0", "exit code 0"),
        ("stop", "was stopped, by a signal or a debugger, for 10 times its time limit of 2 s"),
    ],
)
def test_an_item_that_ends_or_stops_its_worker(
    chaos: Path, pictures: Path, tmp_path: Path, how: str, reason: str
) -> None:
    settings = {"how": how, "at": "007.png"}
    job = tally.score(
        pictures,
        chaos / "poison.py",
        tmp_path / "out",
        settings=settings,
        batch_size=1,
        timeout=2,
        workers=1,
        quiet=True,
    )
    [(key, error)] = dead_of(job).items()
    assert (key, reason in error) == ("007.png", True), error
    assert len(job.results().to_pylist()) == 19


def test_a_noisy_script_has_a_log_of_bounded_size(data: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    script = data / "found" / "scripts" / "noisy.py"
    if not script.is_file():
        pytest.skip(f"there is no {script}")
    job = tally.score(pictures, script, tmp_path / "out", workers=1, quiet=True)
    assert len(job.results().to_pylist()) == 20
    log = home / "logs" / f"{job.id}.log"
    assert logs.HEAD_BYTES < log.stat().st_size <= logs.MOST_BYTES
    assert log.read_bytes().startswith(b"init says hello")
    assert b"MiB left out]" in log.read_bytes()


def test_children_that_stay_end_with_their_worker(chaos: Path, pictures: Path, tmp_path: Path, home: Path) -> None:
    with pytest.raises(JobError, match="longer than its time limit of 1 s"):
        tally.score(pictures / "007.png", chaos / "childhang.py", tmp_path / "out", timeout=1, workers=1, quiet=True)
    left = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "779"]]
    assert [each for each in left if each.environ().get("TALLY_HOME") == str(home)] == []


def test_memory_of_children_counts(chaos: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the processes it started held"):
        tally.score(
            pictures / "007.png", chaos / "childmem.py", tmp_path / "out", memory="500MiB", workers=1, quiet=True
        )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("args_init", [], None),
        ("beside/score", [], None),
        ("shadow/random", [], None),
        ("chdir", [], None),
        ("npy", [], None),
        ("df", [], None),
        ("args", [], "importing it failed: SystemExit: 2"),
        ("rel/score", [], "attempted relative import with no known parent package"),
        ("asyn", ["--set", "form=mini_batch"], "run() returned a value of type coroutine"),
        ("stdin", [], "BdbQuit"),
    ],
)
def test_scripts(data: Path, pictures: Path, tmp_path: Path, cli: Cli, name: str, options: Any, said: Any) -> None:
    script = data / "found" / "scripts" / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"there is no {script}")
    ran = cli("score", pictures, "--model", script, "--out", tmp_path / "out.csv", "--workers", 1, *options)
    assert "Traceback" not in ran.err
    if said is None:
        assert ran.code == 0, ran.err
        assert len((tmp_path / "out.csv").read_text().splitlines()) == 21
    else:
        assert ran.code == 1
        assert said in ran.err


SLOW = """
import os, time, tally
class Slow(tally.Scorer):
    batch_size = 1
    columns = {"m": "float64"}
    def score(self, batch):
        open(os.environ["TALLY_HOME"] + "/scoring", "w").close()
        time.sleep(0.1)
        return [{"m": float(p.mean())} for p in batch]
"""


@pytest.mark.parametrize("how", ["SIGHUP", "stopped"])
def test_a_closed_terminal_and_a_stopped_job(pictures: Path, tmp_path: Path, home: Path, how: str, cli: Cli) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = [pictures, "--model", tmp_path / "slow.py", "--out", tmp_path / "out.csv", "--workers", "1"]
    job = subprocess.Popen(
        [sys.executable, "-m", "tally", "score", *command, "--timeout", "1"], process_group=0, stderr=subprocess.PIPE
    )
    until(lambda: (home / "scoring").exists(), "the first item")
    if how == "SIGHUP":
        os.killpg(job.pid, signal.SIGHUP)
        _, said = job.communicate(timeout=60)
        assert b"is interrupted" in said
        assert cli("jobs", "resume", tmp_path / "out.csv").code == 0
    else:
        workers = psutil.Process(job.pid).children(recursive=True)
        for each in (*workers, psutil.Process(job.pid)):
            each.suspend()
        time.sleep(3)  # three times the limit
        for each in (psutil.Process(job.pid), *workers):
            each.resume()
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 21
    assert not (tmp_path / "out.dead.csv").exists()


def test_a_debugger_left_in_where_ray_has_been_used(
    pictures: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", "ray.util.rpdb._driver_set_trace")  # as ray.init() does
    (tmp_path / "asks.py").write_text(
        "def init(): pass\ndef run(mini_batch):\n    breakpoint()\n    return mini_batch\n"
    )
    ran = cli("score", pictures, "--model", tmp_path / "asks.py", "--out", tmp_path / "out.csv", "--workers", 1)
    assert ran.code == 1
    assert "BdbQuit" in ran.err


PRINTS = """
import os, tally
class Prints(tally.Scorer):
    columns = {"m": "float64"}
    def score(self, batch):
        for number in (1, 2):
            os.write(number, b"printed")
        assert os.read(0, 1) == b""
        return [{"m": float(p.mean())} for p in batch]
"""


def test_standard_streams_that_the_caller_has_closed(pictures: Path, tmp_path: Path, home: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    command = [sys.executable, "-m", "tally", "score", pictures, "--model", tmp_path / "prints.py"]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command, "--out", tmp_path / "out.csv", "--workers", "1"]
    assert subprocess.run(closed, timeout=100).returncode == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 21
    for each in home.rglob("*"):
        assert not each.is_file() or each.suffix == ".log" or b"printed" not in each.read_bytes(), each


@pytest.mark.parametrize(
    "what", ["jobs list", "query out.csv 'select 1'", "score --items - --model tally:shapes --out no"]
)
def test_a_command_whose_standard_streams_are_closed(what: str, pictures: Path, tmp_path: Path, home: Path) -> None:
    run = [sys.executable, "-m", "tally", "score", pictures, "--model", "tally:shapes", "--out", tmp_path / "out.csv"]
    subprocess.run([*run, "--limit", "1", "--workers", "1"], check=True, capture_output=True, timeout=100)
    command = [sys.executable, "-m", "tally", *shlex.split(what)]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command], cwd=tmp_path, stderr=subprocess.PIPE, timeout=100
    )
    empty = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=100
    )
    assert (closed.returncode, closed.stderr) == (empty.returncode, empty.stderr)
    assert b"a fault in Tally" not in closed.stderr


WRITES = """
import os, tally
class Writes(tally.Scorer):
    columns = {"m": "float64"}
    log = None
    def score(self, batch):
        self.log = self.log or open(os.environ["WRITTEN"], "w")
        self.log.write(f"scored {len(batch)}\\n")
        return [{"m": float(p.mean())} for p in batch]
    def close(self):
        self.log.write("closed\\n")
"""


def test_what_a_scorer_has_written_and_not_closed(
    pictures: Path, tmp_path: Path, home: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRITTEN", str(tmp_path / "written"))
    (tmp_path / "writes.py").write_text(WRITES)
    ran = cli(
        "score", pictures, "--model", tmp_path / "writes.py", "--out", tmp_path / "out.csv", "--workers", 1, "-b", 20
    )
    assert ran.code == 0, ran.err
    assert (tmp_path / "written").read_text().splitlines() == ["scored 20", "closed"]


@pytest.mark.parametrize(("what", "code"), [("nosuch", 2), ("jobs show nosuch", 1), ("jobs list --until never", 2)])
def test_errors_that_cannot_be_written(what: str, code: int, home: Path) -> None:
    command = [sys.executable, "-m", "tally", *what.split()]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stderr=full, timeout=100).returncode == code
