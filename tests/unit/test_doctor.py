"""``tally doctor``: what is there, what is not, and what never answers."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.conftest import REPOSITORY
from tests.objectstores import Service
from tests.services import postgres_database, require

from tally.cli import doctor
from tally.database.connect import connect
from tally.database.migrate import HEAD
from tally.errors import StorageError, TallyError
from tally.health import checks, services
from tally.health.checks import Skip, Warn

Cli = Callable[..., Any]
NAMES = [
    *("python", "extras", "home", "temporary files", "database", "registry", "object stores", "ray"),
    *("models", "pictures", "videos", "tables", "workers"),
]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's settings, and no cluster that somebody else has started here."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "RAY_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "error")  # set by the check, and taken back after the test


@pytest.fixture
def mute() -> Iterator[str]:
    """``host:port`` of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """``host:port`` where nobody is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "ANSWER_SECONDS", 0.3)


def lines(ran: Any) -> dict[str, tuple[str, str]]:
    """Outcome and text by the check's name."""
    found: dict[str, tuple[str, str]] = {}
    for line in ran.out.splitlines():
        if line[:5].strip():
            name = line[6:22].strip()
            found[name] = line[:5].strip(), line[23:]
        else:
            outcome, text = found[name]
            found[name] = outcome, f"{text}\n{line[23:]}"
    return found


# -- as a whole --------------------------------------------------------------------------------------------------------


def test_each_check_is_named_and_what_is_not_there_says_how_it_would_be(cli: Cli, home: Path) -> None:
    ran = cli("doctor")
    found = lines(ran)
    assert ran.code == 0, ran.out
    assert list(found) == NAMES
    assert {outcome for outcome, _ in found.values()} <= {"ok", "warn", "-"}
    assert str(home) in found["home"][1]
    assert "AWS_ACCESS_KEY_ID" in found["object stores"][1]
    assert found["database"] == ("ok", f"sqlite:///{home}/tally.db, which is not there yet: it is made at first use")
    assert not (home / "tally.db").exists(), "it only looks"


def test_a_home_that_cannot_be(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "file" / "below"))
    ran = cli("doctor")
    found = lines(ran)
    assert ran.code == 1
    for name in ("home", "database"):
        assert found[name][0] == "FAIL"
        assert "Set TALLY_HOME to a folder that can be written to." in found[name][1]
    assert "Error:" not in ran.out
    assert found["models"][0] == "ok"


def test_whatever_hangs_does_not_hang_it(
    cli: Cli, mute: str, hasty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TALLY_DATABASE", f"postgresql://somebody:geheim@{mute}/tally")
    monkeypatch.setenv("AWS_ENDPOINT", f"http://{mute}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("RAY_ADDRESS", f"http://{mute}")
    ran = cli("doctor", "s3://bucket/photos", tmp_path)
    found = lines(ran)
    assert ran.code == 1
    assert found["database"][0] == found["s3://"][0] == found["ray"][0] == "FAIL"
    assert "timeout" in found["database"][1]
    for name in ("s3://", "ray"):
        assert f"http://{mute} does not answer within" in found[name][1]
    assert found["place"] == ("ok", f"{tmp_path}: list: ok, read: not tried, nothing is there, {UNTRIED}")
    assert found["workers"][0] == "ok"
    assert "geheim" not in ran.out + ran.err


def test_a_check_that_never_ends_is_left_behind(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(doctor, "REMOTE_SECONDS", 0.1)
    stuck = doctor.Check("stuck", lambda: str(never.wait()), remote=True)
    monkeypatch.setattr(doctor, "_checks", lambda *args, **options: [stuck, doctor.Check("next", lambda: "fine")])
    ran = cli("doctor")
    never.set()
    assert ran.code == 1
    assert ran.out.splitlines() == [
        "FAIL  stuck            no answer within 0.1 s",
        "ok    next             fine",
    ]


def test_extras_are_those_of_the_distribution() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra, distributions in checks.EXTRAS.items():
        assert set(distributions) <= {re.split(r"[\[>=<]", each)[0] for each in declared[extra]}
    assert checks.EXTRAS.keys() == declared.keys() - {"testing"}


def test_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"psycopg": "3.2.1", "scikit-learn": "1.7.0"}
    monkeypatch.setattr(checks, "version_of", there.get)
    text = checks.extras()
    assert "postgres (psycopg 3.2.1)" in text
    missing = [each for each in checks.EXTRAS if each != "postgres"]  # of sklearn, a half is missing
    assert f"pip install 'tally-scoring[{','.join(missing)}]'" in text


# -- database ----------------------------------------------------------------------------------------------------------


def test_sqlite_is_described_and_not_touched(home: Path) -> None:
    connect(f"sqlite:///{home}/tally.db").dispose()
    assert re.fullmatch(rf"sqlite:///{home}/tally.db, SQLite [\d.]+, schema current", services.database())
    with closing(sqlite3.connect(home / "tally.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '0001'")
        database.commit()
        assert f"schema 0001, will be migrated to {HEAD}" in services.database()
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    with pytest.raises(StorageError, match=r"schema '9999'.*\n.*upgrade Tally"):
        services.database()


def test_a_database_that_another_process_keeps_locked(home: Path, hasty: None) -> None:
    connect(f"sqlite:///{home}/tally.db").dispose()
    with closing(sqlite3.connect(home / "tally.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            services.database()


def test_sqlite_on_a_network_file_system(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(f"sqlite:///{home}/tally.db").dispose()
    monkeypatch.setattr(services, "_network", lambda path: "nfs4")  # which file systems there are is the machine's
    with pytest.raises(Warn, match=r"network file system \(nfs4\).*TALLY_DATABASE=postgresql"):
        services.database()


def test_file_systems_are_told_by_the_innermost_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Mount:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    mounts = [Mount("/", "ext4"), Mount("/nowhere", "nfs4"), Mount("/nowhere/inner", "ext4"), Mount("/f", "fuse.sshfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)  # noqa: A006
    assert services._network(Path("/nowhere/tally.db")) == "nfs4"
    assert services._network(Path("/nowhere/inner/tally.db")) is None
    assert services._network(Path("/f/tally.db")) == "fuse.sshfs"
    assert services._network(Path("/nowhere-else/tally.db")) is None


def test_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres_database() as url:
        monkeypatch.setenv("TALLY_DATABASE", url)
        assert services.database().endswith("no schema yet: it is made at first use")
        engine = connect(url)
        try:
            assert re.search(r", PostgreSQL [\d.]+, schema current$", services.database())
            monkeypatch.setattr(services, "CLOCK_SECONDS", -1.0)
            with pytest.raises(Warn, match=r"its clock is 0 s (ahead of|behind) this machine's"):
                services.database()
            name = sa.make_url(url).database
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            with pytest.raises(StorageError, match="cannot be written to: it is read-only"):
                services.database()
        finally:
            engine.dispose()


def test_postgresql_that_is_not_there(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_DATABASE", f"postgresql://somebody:geheim@{nobody}/tally")
    with pytest.raises(StorageError, match="refused") as raised:
        services.database()
    assert "somebody:***@" in str(raised.value)
    assert "geheim" not in str(raised.value)


# -- storage -----------------------------------------------------------------------------------------------------------

UNTRIED = "write: not tried without --write"


def enter(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.enter(monkeypatch)
    assert [name for name, _ in services.object_stores()] == [f"{service.scheme}://"]


def look_around(service: Service) -> None:
    from tally.storage import open_store

    url = service.make(f"tally-doctor-{uuid.uuid4().hex}")
    ((_, check),) = services.object_stores()
    assert check() == f"{services._endpoint(service.scheme)} answers and accepts the credentials"
    assert services.place(f"{url}/new") == f"{url}/new: list: ok, read: not tried, nothing is there, {UNTRIED}"
    assert services.place(f"{url}/new", write=True).endswith("write: ok (written, read, deleted)")
    assert not list(open_store(url).list()), "nothing is left"
    open_store(url).write("photos/a.jpg", b"a")
    assert services.place(f"{url}/photos") == f"{url}/photos: list: ok, read: ok (a.jpg), {UNTRIED}"
    assert services.place(f"{url}/photos/a.jpg") == f"{url}/photos/a.jpg: list: ok, read: ok (a.jpg), {UNTRIED}"
    with pytest.raises(StorageError) as raised:
        services.place(f"{service.scheme}://tally-no-such-bucket", write=True)
    assert re.search(r"no right to list, write, or it is not there\n  list .*\n  read .*\n  write ", str(raised.value))


def test_s3(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(s3_server, monkeypatch)
    look_around(s3_server)


def test_azure(azure_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(azure_server, monkeypatch)
    look_around(azure_server)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm90IHRoZSBrZXk=")
    ((_, check),) = services.object_stores()
    with pytest.raises(StorageError, match=r"answers, and refuses the credentials \(Auth"):
        check()


def test_a_service_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering({}, status=503) as url:
        monkeypatch.setenv("AWS_ENDPOINT", url)
        ((_, check),) = services.object_stores()
        with pytest.raises(StorageError, match="answers with HTTP status 503"):
            check()


def test_a_service_without_conditional_writes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tally.storage import open_store

    store = open_store("memory://doctor")
    write = store.write
    monkeypatch.setattr(store, "write", lambda name, data, exclusive: write(name, data))
    assert services._write(store) == (False, services._TWICE)
    assert not list(store.list())


def test_google_credentials_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    ((name, check),) = services.object_stores()
    assert name == "gs://"
    with pytest.raises(StorageError, match=r"names '/no/such/key.json', which cannot be read"):
        check()


def test_an_azure_place_without_an_account() -> None:
    with pytest.raises(StorageError, match="AZURE_STORAGE_ACCOUNT_NAME is not set"):
        services.place("az://container/photos")


def test_places_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert services.place(str(tmp_path)) == f"{tmp_path}: list: ok, read: ok (a.txt), {UNTRIED}"
    assert services.place(str(tmp_path / "a.txt")) == f"{tmp_path}/a.txt is a file, and can be read"
    with pytest.raises(Warn, match="is not there; as an output it would be made"):
        services.place(str(tmp_path / "new"))
    assert services.place(str(tmp_path), write=True).endswith("write: ok (written, read, deleted)")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_registry_of_a_team(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        services.registry(write=False)
        == f"{home}/models, which is not there yet: the first model that is added makes it"
    )
    (home / "models").mkdir(parents=True)
    assert services.registry(write=False) == f"{home}/models can be read and written"
    monkeypatch.setenv("TALLY_DATABASE", "postgresql://host/tally")
    with pytest.raises(Warn, match="only this machine's, while the database is shared: see TALLY_REGISTRY"):
        services.registry(write=False)
    monkeypatch.setenv("TALLY_REGISTRY", "memory://team/models")
    assert services.registry(write=True).startswith("memory://team/models: list: ok")


# -- cluster -----------------------------------------------------------------------------------------------------------


class answering:
    """A web server that gives these answers as JSON, by path; in its place a real one would need a cluster."""

    def __init__(self, answers: dict[str, Any], *, status: int = 200, token: str | None = None) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer, code = answers.get(self.path, {}), status
                if token is not None and self.path.startswith("/api"):
                    given = self.headers.get("Authorization")
                    code = 401 if given is None else 200 if given == f"Bearer {token}" else 403
                body = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def cluster_of(version: str) -> dict[str, Any]:
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 4.0, "memory": 2.0**33}},
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**34}},
        {"state": "DEAD", "resources_total": {"CPU": 8.0}},
    ]
    return {
        "/api/version": {"version": "4", "ray_version": version, "ray_commit": ""},
        "/api/v0/nodes?detail=true": {"result": True, "msg": "", "data": {"result": {"result": nodes}}},
    }


def test_a_cluster_that_answers() -> None:
    ours = checks.version_of("ray")
    assert ours is not None
    with answering(cluster_of(ours)) as url:
        text = services.ray(url, needed=True)
    assert f"{ours}; {url} answers and runs the same; 2 nodes, 12 CPUs, 1 GPUs, 24.0 GiB memory" in text
    assert "is seen when a job begins" in text


def test_a_cluster_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(cluster_of("2.1.0")) as url, pytest.raises(TallyError, match=r"runs Ray 2\.1\.0"):
        services.ray(url, needed=True)


def test_a_cluster_that_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        answering({}, token="geheim") as url,
        pytest.raises(TallyError, match="does not let this command in") as raised,
    ):
        services.ray(url, needed=True)
    assert "RAY_AUTH_TOKEN" in str(raised.value)


def test_a_cluster_that_is_not_there(nobody: str, mute: str, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=rf"http://{nobody} cannot be reached: connection refused"):
        services.ray(f"http://{nobody}", needed=False)
    with pytest.raises(StorageError, match=rf"http://{mute} does not answer within"):
        services.ray(f"http://{mute}", needed=False)
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(StorageError, match=rf"{nobody} cannot be reached"):
        services.ray(None, needed=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(TallyError, match="Ray Client is not used"):
        services.ray(None, needed=False)


@pytest.mark.ray
def test_a_cluster_that_was_not_stopped_and_is_gone(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(nobody)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(Warn, match=rf"a cluster was started on this machine, but: {nobody} cannot be reached"):
        services.ray(None, needed=False)
    with pytest.raises(TallyError, match=rf"{nobody} cannot be reached"):
        services.ray(None, needed=True)


def test_a_real_cluster_that_wants_a_token(tmp_path: Path) -> None:
    require("Ray", checks.version_of("ray") is not None)
    from tests.clusters import Cluster

    def doctor_says(token: str | None) -> str:
        """In a process of its own: Ray's library reads its settings once."""
        given = {} if token is None else {"RAY_AUTH_TOKEN": token}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        program = "import sys; from tally.health import services; print(services.ray(sys.argv[1], needed=True))"
        done = subprocess.run(
            [sys.executable, "-c", program, cluster.dashboard],
            env={**kept, **given, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + done.stderr

    with Cluster(nodes=0, head_cpus=2, token="x" * 40) as cluster:
        text = doctor_says("x" * 40)
        assert f"{cluster.dashboard} answers and runs the same; " in text
        assert "does not let this command in" in doctor_says("y" * 40)
        assert "RAY_AUTH_TOKEN" in doctor_says(None)
        assert "x" * 40 not in text


def test_no_cluster_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no cluster is found" in services.ray(None, needed=True)
    monkeypatch.setattr(services, "version_of", lambda name: None)
    with pytest.raises(Skip, match=r"pip install 'tally-scoring\[ray\]'"):
        services.ray(None, needed=False)
    with pytest.raises(TallyError, match="Ray is not installed"):
        services.ray(None, needed=True)
