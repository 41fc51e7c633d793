"""Connecting: the schema is what the tables say, and what cannot be opened is told plainly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from tests.services import postgres_database

from tally.errors import StorageError
from tally.jobs import database, tables
from tally.jobs.database import HEAD, connect, now
from tally.jobs.store import JobStore
from tally.models import tables as model_tables
from tally.triggers import tables as trigger_tables

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
        metadata = sa.MetaData()
        for each in (tables.metadata, model_tables.metadata, trigger_tables.metadata):
            for table in each.sorted_tables:
                table.to_metadata(metadata)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD


def test_an_earlier_schema_is_brought_up_to_date_with_what_is_in_it(
    url: str, opened: Callable[[str], sa.Engine]
) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    if url.startswith("sqlite"):
        Path(str(sa.make_url(url).database)).parent.mkdir(parents=True)
    earlier = sa.create_engine(url)
    with earlier.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        assert not sa.inspect(connection).has_table("schedules")
        connection.execute(
            sa.insert(tables.jobs).values(
                id="job", fingerprint="", spec={}, model={}, state="finished", wanted="run", remarks=[], generation=0,
                created_at=1.0, planned=1, items=3, done=3, dead=0, rows=3, bytes=0, usage={},
            )
        )  # fmt: skip
    earlier.dispose()
    engine = opened(url)
    assert JobStore(engine).get("job").done == 3
    with engine.connect().execution_options(**READING) as connection:
        assert {"schedules", "schedule_runs", "alerts"} <= set(sa.inspect(connection).get_table_names())


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_connecting_again_does_without_alembic(url: str, opened: Callable[[str], sa.Engine]) -> None:
    opened(url)
    line = (
        "import sys; from tally.jobs.database import connect; engine = connect(sys.argv[1]); engine.dispose(); "
        "print([name for name in sys.modules if name.split('.')[0] == 'alembic'])"
    )
    run = subprocess.run([sys.executable, "-c", line, url], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"


def test_many_processes_may_be_the_first(url: str, opened: Callable[[str], sa.Engine]) -> None:
    line = "import sys; from tally.jobs.database import connect; connect(sys.argv[1]).dispose()"
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
    assert "open-sesame" not in str(refused.value)


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
    program = "import sys; from tally.jobs.database import connect; connect(sys.argv[1])"
    for number in range(3):
        url = f"sqlite:///{tmp_path}/{number}.db"
        command = [sys.executable, "-c", program, url]
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        assert [(each.communicate(timeout=60)[1], each.returncode) for each in processes] == [(b"", 0)] * 4
