"""Connecting: the schema is what the tables say, and what cannot be opened is told plainly."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait as connection_wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from tests.extent import FULL
from tests.postgres import PrivatePostgres
from tests.services import CUT_LISTENERS, postgres_database, private_postgres

from tally.database import connect as connecting
from tally.database import migrate, tables
from tally.database.clock import now
from tally.database.connect import connect
from tally.database.migrate import HEAD
from tally.database.notify import listen
from tally.database.waiting import LONGEST_PAUSE, Patience, pause
from tally.errors import DatabaseAwayError, StorageError
from tally.jobs.chunks import Done
from tally.jobs.store import CHANNEL, JobStore
from tally.models.registry import Registry
from tally.sinks.base import Output
from tally.triggers.store import ScheduleStore

READING = {"reading": True}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with nothing in it."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield f"sqlite:///{tmp_path / 'new' / 'folder' / 'tally.db'}"
        else:
            yield stack.enter_context(postgres_database())


@pytest.fixture
def opened() -> Iterator[Callable[[str], sa.Engine]]:
    """``connect``, with the engines disposed of after the test."""
    with ExitStack() as stack:

        def opened(url: str) -> sa.Engine:
            engine = connect(url)
            stack.callback(engine.dispose)
            return engine

        yield opened


def test_the_migrated_schema_is_that_of_the_tables(url: str, opened: Callable[[str], sa.Engine]) -> None:
    with opened(url).connect().execution_options(**READING) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []
        assert context.get_current_revision() == HEAD


def made_by(url: str, revision: str) -> None:
    """A database as an earlier version of Tally left it: a job with chunks, half done, and a registered model."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
    if url.startswith("sqlite"):
        Path(str(sa.make_url(url).database)).parent.mkdir(parents=True)
    earlier = sa.create_engine(url)
    with earlier.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        then = sa.MetaData()
        then.reflect(connection)
        payload = zlib.compress(b'{"names":["a","b","c"]}')
        held = {"job_id": "job", "generation": 0, "count": 3, "attempts": 1, "losses": 0}
        done = {**held, "first": 0, "state": "done", "attempt": "a", "payload": None}
        output = {"files": ["a.parquet"], "rows": 3, "bytes": 9, "facts": {}}
        for table, values in {
            "jobs": {
                "id": "job", "fingerprint": "", "spec": {}, "model": {}, "state": "interrupted", "wanted": "run",
                "remarks": [], "generation": 0, "created_at": 1.0, "planned": 1, "items": 6, "done": 3, "dead": 0,
                "rows": 3, "bytes": 9, "usage": {},
            },
            "model_versions": {
                "name": "m", "version": 1, "hash": "sha256:", "kind": "onnx", "bytes": 1, "facts": {},
                "created_at": 1.0,
            },
            "model_aliases": {"name": "m", "alias": "production", "version": 1},
        }.items():  # fmt: skip
            connection.execute(sa.insert(then.tables[table]).values(**values))
        connection.execute(sa.insert(then.tables["chunks"]).values(**done, output=output))
        connection.execute(sa.insert(then.tables["chunks"]).values(**held, first=3, state="running", payload=payload))
        if revision >= "0002":
            connection.execute(
                sa.insert(then.tables["schedules"]).values(
                    name="hourly", template={}, file="", cron="0 * * * *", timezone="UTC", overlap="skip",
                    catch_up="none", paused=0, created_at=1.0, planned_until=1.0,
                )
            )  # fmt: skip
    earlier.dispose()


@pytest.mark.parametrize("revision", ["0001", "0002", "0003"])
def test_an_earlier_schema_is_brought_up_to_date_with_what_is_in_it(
    url: str, revision: str, opened: Callable[[str], sa.Engine]
) -> None:
    made_by(url, revision)
    line = "import sys; from tally.database.connect import connect; connect(sys.argv[1]).dispose()"
    processes = [subprocess.Popen([sys.executable, "-c", line, url], stderr=subprocess.PIPE) for _ in range(2)]
    assert [(each.communicate(timeout=60)[1], each.returncode) for each in processes] == [(b"", 0)] * 2
    store = JobStore(opened(url))
    lease = store.acquire("job", seconds=60)
    assert lease is not None
    _, (taken,) = store.commit(lease, take=9)
    assert (taken.chunk.first, taken.chunk.payload, taken.attempts) == (3, {"names": ["a", "b", "c"]}, 2)
    store.commit(lease, done=[Done(taken.id, taken.attempt, 3, Output(["b.parquet"], rows=3))])
    assert store.get("job").done == 6
    assert [each.files for each in store.outputs("job")] == [["a.parquet"], ["b.parquet"]]
    assert Registry(store.engine, Path()).get("models:/m@production").version == 1
    assert [each.name for each in ScheduleStore(store.engine).all()] == (["hourly"] if revision >= "0002" else [])


@pytest.mark.parametrize("revision", ["0001", "0002", "0003"])
def test_fresh_equals_migrated(url: str, revision: str, tmp_path: Path, opened: Callable[[str], sa.Engine]) -> None:
    def described(engine: sa.Engine) -> dict[str, Any]:
        look = sa.inspect(engine)
        return {
            table: (
                sorted((each["name"], str(each["type"]), each["nullable"], each["default"]) for each in columns),
                # The condition of a partial index is an object, whose text is what it says.
                sorted(
                    str({**each, "dialect_options": {n: str(o) for n, o in each.get("dialect_options", {}).items()}})
                    for each in look.get_indexes(table)
                ),
                sorted(str(each) for each in look.get_foreign_keys(table)),
                sorted(str(each) for each in look.get_unique_constraints(table)),
                look.get_pk_constraint(table),
            )
            for table in look.get_table_names()
            if (columns := look.get_columns(table))
        }

    made_by(url, revision)
    with ExitStack() as stack:
        fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
        if not url.startswith("sqlite"):
            fresh = stack.enter_context(postgres_database())
        engine = opened(fresh)
        assert described(opened(url)) == described(engine)
        engine.dispose()


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_connecting_again_does_without_alembic(url: str, opened: Callable[[str], sa.Engine]) -> None:
    opened(url)
    line = (
        "import sys; from tally.database.connect import connect; engine = connect(sys.argv[1]); engine.dispose(); "
        "print([name for name in sys.modules if name.split('.')[0] == 'alembic'])"
    )
    run = subprocess.run([sys.executable, "-c", line, url], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"


def test_many_processes_may_be_the_first(url: str, opened: Callable[[str], sa.Engine]) -> None:
    line = "import sys; from tally.database.connect import connect; connect(sys.argv[1]).dispose()"
    processes = [
        subprocess.Popen([sys.executable, "-c", line, url], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [(each.communicate(timeout=60)[1], each.returncode) for each in processes] == [("", 0)] * 4
    with opened(url).connect().execution_options(**READING) as connection:
        assert connection.scalars(sa.text("SELECT version_num FROM alembic_version")).all() == [HEAD]


def test_the_clock_is_the_databases(url: str, opened: Callable[[str], sa.Engine]) -> None:
    with opened(url).connect().execution_options(**READING) as connection:
        first, second = (connection.scalar(sa.select(now())) for _ in range(2))
        unix = {"sqlite": "SELECT unixepoch()", "postgresql": "SELECT extract(epoch FROM clock_timestamp())"}
        reference = float(connection.scalar(sa.text(unix[connection.dialect.name])))
    assert isinstance(first, float)
    assert first <= second
    assert abs(second - reference) < 60


def test_a_newer_schema_is_refused(url: str, opened: Callable[[str], sa.Engine]) -> None:
    with opened(url).begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="'9999', which this version of Tally does not know") as refused:
        connect(url)
    assert "upgrade Tally" in str(refused.value)


def test_sqlite_is_ready_for_several_processes(tmp_path: Path, opened: Callable[[str], sa.Engine]) -> None:
    with opened(f"sqlite:///{tmp_path / 'tally.db'}").connect().execution_options(**READING) as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(sa.text("PRAGMA busy_timeout")) == 30_000


def test_a_database_that_fails_later_is_told_plainly(tmp_path: Path, opened: Callable[[str], sa.Engine]) -> None:
    engine = opened(f"sqlite:///{tmp_path / 'tally.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE chunks"))
    with pytest.raises(StorageError, match=r"tally\.db failed: no such table: chunks"):
        JobStore(engine).counts("x")


# What cannot be opened -------------------------------------------------------------------------------


def test_no_such_server() -> None:
    url = "postgresql+psycopg://somebody:open-sesame@127.0.0.1:1/tally"
    with pytest.raises(
        StorageError, match=r"cannot open the database postgresql\+psycopg://somebody:\*\*\*@"
    ) as refused:
        connect(url)
    assert "open-sesame" not in str(refused.value)
    assert refused.value.hint is not None


def test_a_server_that_refuses_us() -> None:
    with postgres_database() as url:
        stranger = sa.make_url(url).set(username="nobody_at_all", password="open-sesame")
        with pytest.raises(StorageError, match="nobody_at_all") as refused:
            connect(stranger.render_as_string(hide_password=False))
        with pytest.raises(StorageError, match='"no_such_database" does not exist') as unknown:
            connect(sa.make_url(url).set(database="no_such_database").render_as_string(hide_password=False))
    assert "open-sesame" not in str(refused.value)
    assert not isinstance(refused.value, DatabaseAwayError), "waiting does not help"
    assert not isinstance(unknown.value, DatabaseAwayError)


def test_the_short_form_of_the_url(opened: Callable[[str], sa.Engine]) -> None:
    with postgres_database() as url:
        engine = opened(url.replace("postgresql+psycopg://", "postgresql://"))
        assert engine.driver == "psycopg"
        engine.dispose()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"pip install 'tally-scoring\[postgres\]'"):
        connect("postgresql://somebody:open-sesame@127.0.0.1:1/tally")


def test_passwords_in_the_query_are_not_shown() -> None:
    with pytest.raises(DatabaseAwayError) as refused:
        connect("postgresql://somebody@127.0.0.1:1/tally?password=open-sesame&sslpassword=open-sesame")
    assert "open-sesame" not in str(refused.value)
    assert "open-sesame" not in repr(refused.value)


# A server that comes and goes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def private() -> Iterator[PrivatePostgres]:
    with private_postgres(max_connections=8) as server:
        yield server


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_connections_that_were_cut_are_replaced(
    private: PrivatePostgres, end: str, opened: Callable[[str], sa.Engine]
) -> None:
    store = JobStore(opened(private.url))
    job = store.create(fingerprint="f", spec={}, model={}, output={"place": "out"})
    with store.engine.begin() as one, store.engine.begin() as other:
        one.execute(sa.select(1)), other.execute(sa.select(1))  # two in the pool
    getattr(private, end)()
    with pytest.raises(DatabaseAwayError, match="is away") as away:
        store.get(job.id)
    assert away.value.hint is not None
    with pytest.raises(DatabaseAwayError):
        connect(private.url)
    private.start()
    assert store.get(job.id).id == job.id
    private.restart()
    store.request(job.id, "pause")
    assert store.get(job.id).wanted == "pause"


def test_cut_off_inside_of_a_transaction(private: PrivatePostgres, opened: Callable[[str], sa.Engine]) -> None:
    engine = opened(private.url)
    with engine.connect() as connection:
        connection.execute(sa.select(1))
        private.restart()
        with pytest.raises(DatabaseAwayError, match="terminating connection"):
            connection.execute(sa.select(1))
    with engine.connect() as connection:
        assert connection.scalar(sa.select(1)) == 1


def test_too_many_clients(private: PrivatePostgres, opened: Callable[[str], sa.Engine]) -> None:
    store = JobStore(opened(private.url))
    store.engine.dispose()
    plain = sa.create_engine(private.url, poolclass=sa.NullPool)
    with ExitStack() as stack:
        with suppress(sa.exc.OperationalError):
            for _ in range(10):
                stack.enter_context(plain.connect())
        with pytest.raises(DatabaseAwayError, match="clients"):
            store.newest()
    assert store.newest() is not None


def test_who_is_stopped_in_a_transaction_holds_up_nobody(
    private: PrivatePostgres, opened: Callable[[str], sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "IDLE_SECONDS", 0.5)
    store, other = JobStore(opened(private.url)), JobStore(opened(private.url))
    job = store.create(fingerprint="f", spec={}, model={}, output={"place": "out"})
    with store.engine.connect() as connection:
        connection.execute(sa.select(tables.jobs.c.id).where(tables.jobs.c.id == job.id).with_for_update())
        other.request(job.id, "cancel")  # waits until the server has ended it
        with pytest.raises(DatabaseAwayError):
            connection.execute(sa.select(1))


def test_patience(private: PrivatePostgres, opened: Callable[[str], sa.Engine]) -> None:
    store, said, tries = JobStore(opened(private.url)), [], 0
    patience = Patience(said.append)

    def look() -> int:
        nonlocal tries
        tries += 1
        if tries == 4:
            private.start()
        return len(store.newest())

    patience(lambda: len(store.newest()))
    assert said == []
    private.stop()
    assert patience(look) >= 0
    assert tries == 4
    assert len(said) == 2
    assert said[0].startswith("the database is away (")
    assert said[0].endswith("; the job waits")
    assert said[1] == "the database is back"
    private.stop()
    patience.give_up(0)
    with pytest.raises(DatabaseAwayError):
        patience(lambda: store.newest())
    private.start()
    assert isinstance(patience(store.newest), list), "once it is there, nobody has to give up"


def test_pauses_grow_and_differ() -> None:
    pauses = [[pause(tries) for tries in range(200)] for _ in range(5)]
    assert all(0 < each <= LONGEST_PAUSE for some in pauses for each in some)
    assert max(some[0] for some in pauses) < min(some[10] for some in pauses)
    assert len({each for some in pauses for each in some}) > 900


def test_what_is_notified_is_heard(url: str, opened: Callable[[str], sa.Engine]) -> None:
    store = JobStore(opened(url))
    job = store.create(fingerprint="f", spec={}, model={}, output={"place": "out"})
    listener = listen(store.engine, CHANNEL)
    if url.startswith("sqlite"):
        assert listener is None
        return
    assert listener is not None
    assert listener.received() == []
    store.request(job.id, "pause")
    assert connection_wait([listener], 30) == [listener]
    assert listener.received() == [job.id]
    with store.engine.begin() as connection:
        connection.exec_driver_sql(CUT_LISTENERS)
    with pytest.raises(Exception, match="terminat"):  # noqa: PT012 - its end comes after what the server says of it
        while connection_wait([listener], 30):
            assert listener.received() == []
    listener.close()


@pytest.mark.parametrize("content", [b"this is no database, but long enough to be one" * 100, b"\x00" * 4096])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tally.db"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"cannot open the database .*tally\.db"):
        connect(f"sqlite:///{path}")
    assert path.read_bytes() == content


def test_a_folder_in_the_place_of_the_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open the database"):
        connect(f"sqlite:///{tmp_path}")


def test_a_file_in_the_place_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder of the database"):
        connect(f"sqlite:///{tmp_path / 'home' / 'tally.db'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot open the database"):
            connect(f"sqlite:///{tmp_path / 'tally.db'}")
        with pytest.raises(StorageError, match="cannot make the folder"):
            connect(f"sqlite:///{tmp_path / 'home' / 'tally.db'}")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(StorageError, match="cannot make the folder of the database"):
        connect("sqlite:////proc/tally/tally.db")


@pytest.mark.parametrize("url", ["", "tally.db", "postgresql+nodriver://me:open-sesame@host/tally", "oracle9://h/t"])
def test_urls_that_mean_nothing(url: str) -> None:
    with pytest.raises(StorageError) as refused:
        connect(url)
    assert "open-sesame" not in str(refused.value)
    assert refused.value.hint is not None


def test_many_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    program = "import sys; from tally.database.connect import connect; connect(sys.argv[1])"
    for number in range(3 if FULL else 1):
        url = f"sqlite:///{tmp_path}/{number}.db"
        command = [sys.executable, "-c", program, url]
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        assert [(each.communicate(timeout=60)[1], each.returncode) for each in processes] == [(b"", 0)] * 4


def test_a_database_that_nobody_uses_any_more_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "tally.db"
    for _ in range(5):
        with connect(f"sqlite:///{file}").connect() as connection:
            assert connection.scalar(sa.select(1)) == 1
    del connection
    gc.collect()
    opened = [each.path for each in psutil.Process().open_files()]
    assert not [each for each in opened if each.startswith(str(file))]


def test_a_process_that_ends_leaves_no_log_of_sqlite_behind(tmp_path: Path) -> None:
    file = tmp_path / "tally.db"
    code = "import sys; from tally import garbage; from tally.database.connect import connect; "
    code += "kept = connect(sys.argv[1]); garbage.leave(0)"
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{file}"], check=True, timeout=60)
    assert [each.name for each in tmp_path.iterdir()] == ["tally.db"]
