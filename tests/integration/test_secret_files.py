"""Secrets that are changed in a mounted folder count without a restart."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.server import running
from tests.services import private_postgres

from tally import processes
from tally.config import credentials, settings
from tally.database.connect import connect
from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.server.auth.keys import KeyStore
from tally.storage import open_store


def test_a_password_that_is_changed_counts_for_the_next_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLY_SECRETS", str(tmp_path))
    with private_postgres() as server:
        admin = sa.create_engine(server.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql("CREATE ROLE one LOGIN SUPERUSER")
            connection.exec_driver_sql("CREATE ROLE two LOGIN SUPERUSER")
        admin.dispose()
        url = sa.make_url(server.url)

        def give(user: str) -> None:
            text = url.set(username=user, drivername="postgresql").render_as_string(hide_password=False)
            (tmp_path / "TALLY_DATABASE").write_text(text)

        def who() -> str:
            engine.dispose()  # as when connections are cut
            with engine.connect() as connection:
                return str(connection.exec_driver_sql("SELECT current_user").scalar())

        give("one")
        engine = connect(settings().database)
        assert who() == "one"
        give("two")
        assert who() == "two"
        engine.dispose()


def test_a_key_for_the_first_admin_may_be_given(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has nobody who reads what it prints."""
    text = f"tly_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
    (tmp_path / "TALLY_ADMIN_KEY").write_text(text + "\n")
    monkeypatch.setenv("TALLY_SECRETS", str(tmp_path))
    with running("--host", "0.0.0.0") as server:
        with server.client(text) as client:
            assert client.get("/keys").json()[0]["name"] == "first admin"
        keys = KeyStore(Jobs().store.engine)
        assert keys.add_given("again", "admin", text).name == "first admin"  # another server was faster
        with pytest.raises(SpecError, match="a key is tly_") as refused:
            keys.add_given("wrong", "admin", text[:-1])
        assert text[:-1] not in str(refused.value)


def test_keys_of_buckets_may_be_files(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("TALLY_SECRETS", str(tmp_path))
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("testing\n")
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("of a variable that is set")
    assert credentials("AWS_") == {"AWS_SECRET_ACCESS_KEY": "testing"}
    store = open_store(s3)
    store.write("a", b"content")
    assert store.read("a") == b"content"
    workers = processes.environment()
    assert (workers["AWS_ACCESS_KEY_ID"], workers["AWS_SECRET_ACCESS_KEY"]) == ("testing", "testing")
    assert "TALLY_SECRETS" not in workers
