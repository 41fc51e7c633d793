"""Jobs whose coordinator runs inside a Ray cluster, started and followed by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.clusters import Cluster, alive
from tests.conftest import Ran
from tests.databases import database, execute, in_table
from tests.extent import FULL
from tests.forms import FORMS, SCRIPT
from tests.integration.test_forms import written
from tests.retraining import backbone, photos
from tests.waiting import wait_for

from tally.engines.ray.cluster import find
from tally.errors import ClusterLostError, SpecError, TallyError
from tally.jobs import cluster as remote
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.store import JobRecord
from tally.training.sweeps.store import SweepStore

LONG = pytest.mark.skipif(not FULL, reason="each command on a cluster takes ten seconds: TALLY_TEST_FULL=1")
ITEMS = 120
HELD = 60
PATIENCE = 240.0
"""Seconds for what needs new processes of Ray: other tests keep this machine busy, and each takes it many seconds."""
SCORER = f"""
import time
from pathlib import Path
from tally import Scorer

GATE = Path(__file__).with_name("gate")

class Held(Scorer):
    '''Scores items from {HELD} on when the file "gate" is there; while it waits, there is "gate.waiting".'''
    input = "bytes"
    batch_size = 2

    def score(self, batch):
        numbers = [int(each) for each in batch]
        while max(numbers) >= {HELD} and not GATE.exists():
            GATE.with_suffix(".waiting").touch()
            time.sleep(0.05)
        return [{{"n": number}} for number in numbers]
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=0, head_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(ITEMS):
        (folder / f"{number:03d}.bin").write_text(str(number))
    (tmp_path / "held.py").write_text(SCORER)
    return folder


@pytest.fixture
def gate(items: Path) -> Iterator[Path]:
    """A job over the items does not end before this file is there."""
    path = items.with_name("gate")
    yield path
    path.touch()  # the cluster is not to be kept busy by what went wrong


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a client of the cluster. No job of the test outlives it: the next one needs the workers."""
    from ray.job_submission import JobSubmissionClient

    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in cluster.client_env.items():
        monkeypatch.setenv(name, value)
    yield
    client = JobSubmissionClient(cluster.dashboard)
    for job in client.list_jobs():
        if job.submission_id is not None and not job.status.is_terminal():
            client.stop_job(job.submission_id)


def start(cluster: Cluster, items: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tally", "score", str(items), "--model", f"{items.parent / 'held.py'}:Held"]
    command += ["--out", str(out), "--engine", "ray", *(options or ("--address", cluster.dashboard))]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True)


def only_job() -> JobRecord | None:
    found = Jobs().store.newest()
    assert len(found) <= 1
    return found[0] if found else None


def scored(out: Path) -> list[int]:
    """The results, once it is sure that they are all there, once each."""
    manifest = json.loads((out / "_manifest.json").read_text())
    assert sorted(each.name for each in out.iterdir()) == sorted(
        [each["path"] for each in manifest["files"]] + ["_SUCCESS", "_manifest.json"]
    )
    import pyarrow.parquet as pq

    return sorted(pq.read_table([out / each["path"] for each in manifest["files"]])["n"].to_pylist())


def coordinators(cluster: Cluster, job: str) -> list[psutil.Process]:
    found = []
    for process in cluster.processes():
        try:
            if process.cmdline()[1:6] == ["-P", "-m", "tally", "coordinate", job]:
                found.append(process)
        except psutil.Error:
            pass
    return found


def has_another(coordinator: psutil.Process) -> bool:
    """Whether the job is driven, and not by this one."""
    record = only_job()
    return record is not None and record.alive and record.owner_pid != coordinator.pid


def await_gate(gate: Path, command: subprocess.Popen[str], out: Path) -> None:
    """Until a worker waits at the gate, and others were through before it."""

    def held() -> bool:
        record = only_job()
        return record is not None and record.done > 0 and gate.with_suffix(".waiting").exists()

    wait_for(held, command, PATIENCE, told=out.with_suffix(".log").read_text)


@pytest.mark.ray
@pytest.mark.usefixtures("here")
class TestJobsInACluster:
    def test_the_command_may_be_killed(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.dashboard)
        command = start(cluster, items, out, "--workers", "1..2")
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
        await_gate(gate, command, out)
        command.kill()
        command.wait()
        record = only_job()
        assert record is not None
        assert record.alive
        assert record.spec["address"] == cluster.dashboard  # as if it had been said
        gate.touch()
        ran: Ran = cli("jobs", "watch", record.id)
        assert ran.code == 0, ran.err
        assert scored(out) == list(range(ITEMS))
        with pytest.raises(StopIteration):
            next(each for each in coordinators(cluster, record.id) if alive(each) and not _ends(each))

    def test_a_late_answer_begins_no_second_coordinator(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ray.job_submission import JobSubmissionClient

        from tally.engines.ray.cluster import Cluster as Client

        gate.touch()
        submit = Client.submit

        def late(client: Client, *args: Any) -> None:
            submit(client, *args)
            raise ClusterLostError("no answer within 10 s")

        monkeypatch.setattr(Client, "submit", late)
        ran: Ran = cli(
            "score", items, "--model", f"{tmp_path / 'held.py'}:Held", "--out", tmp_path / "out", "--engine", "ray",
            "--address", cluster.dashboard,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        record = only_job()
        assert record is not None
        begun = [each.submission_id or "" for each in JobSubmissionClient(cluster.dashboard).list_jobs()]
        assert len([each for each in begun if record.id in each]) == 1, begun
        assert "another one continues" not in ran.err
        assert scored(tmp_path / "out") == list(range(ITEMS))

    def test_another_coordinator_goes_on_for_a_lost_one(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        command = start(cluster, items, out)
        log = tmp_path / "out.log"
        losses = 2 if FULL else 1
        for _ in range(losses):
            await_gate(gate, command, out)
            record = only_job()
            assert record is not None
            (coordinator,) = coordinators(cluster, record.id)
            coordinator.kill()
            wait_for(lambda: not alive(coordinator), command, told=log.read_text)  # noqa: B023
            wait_for(lambda: has_another(coordinator), command, PATIENCE, told=log.read_text)  # noqa: B023
            gate.with_suffix(".waiting").unlink()
        gate.touch()
        assert command.wait(PATIENCE) == 0, log.read_text()
        assert log.read_text().count("another one continues") == losses
        assert scored(out) == list(range(ITEMS))

    def test_parts_of_a_split_job_are_jobs_of_the_cluster(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path
    ) -> None:
        """And where the coordinator of one is lost, another one goes on with it."""
        out, log = tmp_path / "out", tmp_path / "out.log"
        words = ["--address", cluster.dashboard, "--split", "2", "--workers", "2"]
        command = start(cluster, items, out, *words)

        wait_for(gate.with_suffix(".waiting").exists, command, PATIENCE, told=log.read_text)
        jobs = Jobs()
        record = only_job()
        assert record is not None
        (lost,) = coordinators(cluster, jobs.store.parts(record.id)[1].id)
        lost.kill()
        wait_for(lambda: not alive(lost), command, told=log.read_text)
        gate.touch()
        assert command.wait(PATIENCE) == 0, log.read_text()
        assert scored(out) == list(range(ITEMS))
        record = jobs.get(record.id)
        assert (record.state, record.done, record.dead) == ("finished", ITEMS, 0)

    def test_somebody_else_may_cancel(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path, cli: Any
    ) -> None:
        out = tmp_path / "out"
        command = start(cluster, items, out)
        await_gate(gate, command, out)
        record = only_job()
        assert record is not None
        assert cli("jobs", "cancel", record.id).code == 0
        assert command.wait(PATIENCE) == 1
        assert f"job {record.id} is cancelled" in (tmp_path / "out.log").read_text()
        assert not list(out.rglob("*"))

    @LONG
    def test_stopped_by_the_means_of_ray_it_is_interrupted(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path
    ) -> None:
        from ray.job_submission import JobSubmissionClient

        out = tmp_path / "out"
        command = start(cluster, items, out)
        log = tmp_path / "out.log"
        await_gate(gate, command, out)
        client = JobSubmissionClient(cluster.dashboard)
        (name,) = [each.submission_id for each in client.list_jobs() if each.status == "RUNNING"]
        assert name is not None
        client.stop_job(name)
        assert command.wait(PATIENCE) == 130, log.read_text()
        record = only_job()
        assert record is not None
        assert (record.state, record.alive) == ("interrupted", False)
        assert f"tally jobs resume {record.id}" in log.read_text()
        gate.touch()
        again = start(cluster, items, out, "--address", cluster.dashboard, "--resume")
        assert again.wait(PATIENCE) == 0, log.read_text()
        assert scored(out) == list(range(ITEMS))

    @LONG
    def test_interrupting_the_command_leaves_the_job(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        command = start(cluster, items, out)
        log = tmp_path / "out.log"
        await_gate(gate, command, out)
        command.send_signal(signal.SIGINT)
        assert command.wait(PATIENCE) == 130, log.read_text()
        record = only_job()
        assert record is not None
        assert (record.state, record.alive) == ("running", True)
        assert f"job {record.id} continues in the cluster" in log.read_text()
        (coordinator,) = coordinators(cluster, record.id)
        gate.touch()
        coordinator.wait(PATIENCE)
        assert scored(out) == list(range(ITEMS))

    def test_dead_items_are_replayed_in_the_cluster(
        self, cluster: Cluster, items: Path, gate: Path, tmp_path: Path, cli: Any
    ) -> None:
        gate.touch()
        (items / "007.bin").write_text("seven")
        out = tmp_path / "out"
        assert start(cluster, items, out).wait(PATIENCE) == 0, (tmp_path / "out.log").read_text()
        record = only_job()
        assert record is not None
        assert record.dead == 1
        (items / "007.bin").write_text("7")
        ran: Ran = cli("jobs", "retry", record.id, "--dead")
        assert ran.code == 0, ran.err
        assert scored(out) == list(range(ITEMS))

    @LONG
    def test_from_one_database_into_another(self, cluster: Cluster, tmp_path: Path, cli: Any) -> None:
        (tmp_path / "twice.py").write_text(
            "import tally\n\n\nclass Twice(tally.Scorer):\n    input = 'table'\n    features = ('n',)\n"
            "    columns = {'twice': 'int64'}\n\n    def score(self, batch):\n"
            "        return [{'twice': 2 * n} for n in batch['n'].to_pylist()]\n"
        )
        (tmp_path / "into").mkdir()
        with database("sqlite", tmp_path) as source, database("duckdb", tmp_path / "into") as into:
            execute(source, "CREATE TABLE t (id INT, n INT)", "INSERT INTO t VALUES (7, 1), (8, 2), (9, 3)")
            ran: Ran = cli(
                "score", f"{source}#t", "--key", "id", "--model", f"{tmp_path / 'twice.py'}:Twice",
                "--out", tmp_path / "out", "--push", f"{into}#found", "--engine", "ray", "--address", cluster.dashboard,
            )  # fmt: skip
            assert ran.code == 0, ran.err
            assert in_table(into, "SELECT key, twice FROM found ORDER BY 1") == [("7", 2), ("8", 4), ("9", 6)]

    @LONG
    @pytest.mark.parametrize("name", FORMS)
    def test_every_form_gives_what_it_gives_here(self, cluster: Cluster, tmp_path: Path, cli: Any, name: str) -> None:
        form = FORMS[name]
        place = written(str(tmp_path / "in"), form.files())
        (tmp_path / "held.py").write_text(SCRIPT)
        found = []
        for engine in (["local"], ["ray", "--address", cluster.dashboard]):
            out = tmp_path / f"{engine[0]}.jsonl"
            ran: Ran = cli(
                "score", *form.words(place), "--model", f"{tmp_path}/held.py:Held", "--out", out, "--engine", *engine,
            )  # fmt: skip
            assert ran.code == 0, ran.err
            found.append(out.read_text().splitlines())
        assert found[0] == found[1]
        assert len(found[0]) == form.count

    def test_what_makes_the_job_fail_is_told(self, cluster: Cluster, items: Path, tmp_path: Path, cli: Any) -> None:
        for path in items.iterdir():
            path.write_text("x")
        model = f"{tmp_path / 'held.py'}:Held"
        ran: Ran = cli(
            "score", items, "--model", model, "--out", tmp_path / "out", "--engine", "ray",
            "--address", cluster.dashboard, "--strict",
        )  # fmt: skip
        assert ran.code == 1
        assert "stopped, as --strict asks" in ran.err
        assert "tally jobs" in ran.err

    def test_other_versions_are_refused(
        self, cluster: Cluster, items: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import tally

        monkeypatch.setattr(tally, "__version__", "0.0.9")
        ran: Ran = cli(
            "score", items, "--model", f"{tmp_path / 'held.py'}:Held", "--out", tmp_path / "out",
            "--engine", "ray", "--address", cluster.dashboard,
        )  # fmt: skip
        assert ran.code == 1
        assert "before it had the job" in ran.err
        assert "and the command that started the job has tally 0.0.9" in ran.err
        assert "Install the same versions on both sides" in ran.err

    def test_another_ray_is_refused_before_anything_is_started(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        found = find(cluster.dashboard)
        assert found is not None
        found.check()
        monkeypatch.setattr(ray, "__version__", "2.0.0")
        with pytest.raises(TallyError, match=r"runs Ray .*, and here is Ray 2\.0\.0") as refused:
            found.check()
        assert "pip install 'ray[default]==" in (refused.value.hint or "")


def _ends(process: psutil.Process) -> bool:
    try:
        process.wait(PATIENCE)
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.ray
@pytest.mark.skipif(not FULL, reason="a small storm kills a head, too: TALLY_TEST_FULL=1")
def test_a_lost_head_pauses_the_job_until_it_is_back(
    items: Path, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(nodes=1, cpus=1, head_cpus=0) as cluster:
        for name, value in cluster.client_env.items():
            monkeypatch.setenv(name, value)
        out, log = tmp_path / "out", tmp_path / "out.log"
        command = start(cluster, items, out)
        await_gate(gate, command, out)
        cluster.kill_head()
        wait_for(lambda: "does not answer" in log.read_text(), command, told=log.read_text)
        gate.touch()
        cluster.start_head()
        assert command.wait(PATIENCE) == 0, log.read_text()
        assert "it is back" in log.read_text()
        assert scored(out) == list(range(ITEMS))


@pytest.mark.ray
@pytest.mark.skipif(not FULL, reason="two sweeps on a cluster take minutes: TALLY_TEST_FULL=1")
@pytest.mark.usefixtures("here")
def test_a_sweep_on_a_cluster_gives_what_it_gives_here(cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Its bottlenecks, too, are computed there; scripts log over the network."""
    pictures, network = photos(tmp_path / "photos"), backbone(tmp_path / "backbone.onnx")
    words = ["sweep", "retrain", "--image_dir", pictures, "--backbone", network, "--how_many_training_steps", 100]
    words += ["-p", "learning_rate=0.01,0.1,1", "--sampler", "grid", "--parallel", 2]
    script = tmp_path / "code" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import sys, tally\n"
        "with tally.training.run() as run:\n"
        "    run.log('loss', float(sys.argv[2]))\n"
        "    assert tally.__file__ and run.parameters['x'] == float(sys.argv[2])\n"
    )
    found = []
    for engine in ("ray", "local"):
        cache = ["--bottleneck_dir", tmp_path / engine]
        for each in ([*words, *cache], ["sweep", "script", script, "-p", "x=1,2", "--metric", "loss", "--trials", 2]):
            ran = cli(*each, "--engine", engine)
            assert ran.code == 0, ran.err
            trials = SweepStore.open().trials(SweepStore.open().list().sweeps[0].id)
            found.append([(trial.state, trial.parameters, trial.value, trial.step) for trial in trials])
    assert found[:2] == found[2:]
    assert [len(each) for each in found] == [3, 2] * 2


@pytest.mark.ray
def test_without_a_cluster_one_is_started_for_the_job(
    items: Path, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.touch()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tally", "score", str(items), "--model", f"{tmp_path / 'held.py'}:Held"]
    ran = subprocess.run(
        [*command, "--out", str(out), "--engine", "ray", "--workers", "1..2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "one is started on this machine" in ran.stderr
    assert scored(out) == list(range(ITEMS))


def test_which_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert remote.cluster_for(make(source="a", model="m", out="o")) is None
    given = remote.cluster_for(make(source="a", model="m", out="o", engine="ray", address="http://head:8265/"))
    assert given is not None
    assert given.address == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find() is None
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://other:443")
    found = find()
    assert found is not None
    assert found.address == "https://other:443"


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find("http://127.0.0.1:9")
    assert found is not None
    with pytest.raises(ClusterLostError, match=r"http://127.0.0.1:9 does not answer: connection refused") as lost:
        found.check()
    assert "tally doctor" in (lost.value.hint or "")


def test_fields_of_clusters_need_the_engine() -> None:
    for fields in ({"address": "http://head:8265"}, {"gpus": 0.5}, {"cpus": 2}, {"resources": {"tpu": 1}}):
        with pytest.raises(SpecError, match=f"{next(iter(fields))}: needs engine: ray"):
            make(source="a", model="m", out="o", **fields)
    with pytest.raises(SpecError, match="a part of one"):
        make(source="a", model="m", out="o", engine="ray", gpus=1.5)
    with pytest.raises(SpecError, match="such as http://HEAD:8265"):
        make(source="a", model="m", out="o", engine="ray", address="head:6379")
    spec = make(source="a", model="m", out="o", engine="ray", workers="4..64", cpus=1, gpus=0.25, memory="2GiB")
    assert (spec.workers, spec.cpus, spec.gpus, spec.memory) == ((4, 64), 1.0, 0.25, 2 * 2**30)


@pytest.mark.parametrize(
    ("database", "told"),
    [
        ("postgresql://tally@db/tally", True),
        ("postgresql://tally:hunter2@db/tally", False),
        ("postgresql://db/tally?user=tally&password=hunter2", False),
    ],
)
def test_no_secret_is_told_to_the_cluster(monkeypatch: pytest.MonkeyPatch, database: str, told: bool) -> None:
    monkeypatch.setenv("TALLY_DATABASE", database)
    environment = remote._environment()
    assert ("TALLY_DATABASE" in environment) == told
    assert "hunter2" not in json.dumps(environment)
