"""Keys, sessions, roles and throttling, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database.connect import connect
from tally.database.tables import api_keys, sessions
from tally.errors import SpecError

pytest.importorskip("fastapi")

from tally.server.auth.keys import KeyNotFoundError, KeyStore, csrf_token
from tally.server.auth.roles import Principal
from tally.server.auth.throttle import FREE_FAILURES, Throttle


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    sqlite = f"sqlite:///{tmp_path / 'tally.db'}"
    engine = connect(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres"))
    yield engine
    engine.dispose()


@pytest.fixture
def keys(engine: sa.Engine) -> KeyStore:
    return KeyStore(engine)


def test_a_key_proves_who_it_is_until_it_is_revoked(keys: KeyStore) -> None:
    key, text = keys.add("ada", "operator")
    found = keys.principal(text)
    assert found == Principal("ada", "operator", key.id)
    assert keys.get(key.id).used_at is not None
    for wrong in (
        text[:-1] + ("A" if text[-1] != "A" else "B"),
        f"tly_{key.id}_{'x' * 43}",
        "tly_",
        "",
        text + "x",
        "é",
    ):
        assert keys.principal(wrong) is None
    assert keys.revoke(key.id).state == "revoked"
    assert keys.principal(text) is None
    with pytest.raises(KeyNotFoundError):
        keys.revoke("000000000000")


def test_the_database_does_not_hold_the_secret(keys: KeyStore, engine: sa.Engine) -> None:
    _, text = keys.add("ada", "admin")
    cookie = keys.log_in(keys.principal(text))  # type: ignore[arg-type]
    with engine.connect() as connection:
        held = str([tuple(row) for table in (api_keys, sessions) for row in connection.execute(sa.select(table))])
    assert text.split("_", 2)[2] not in held
    assert cookie not in held


def test_a_key_expires(keys: KeyStore, engine: sa.Engine) -> None:
    key, text = keys.add("ada", "viewer", days=1)
    assert keys.principal(text) is not None
    with engine.begin() as connection:
        connection.execute(sa.update(api_keys).where(api_keys.c.id == key.id).values(expires_at=1.0))
    assert keys.principal(text) is None
    assert keys.get(key.id).state == "expired"


def test_a_session_ends_with_its_key_its_time_and_at_log_out(keys: KeyStore, engine: sa.Engine) -> None:
    key, text = keys.add("ada", "viewer")
    principal = keys.principal(text)
    assert principal is not None
    first, second, third = (keys.log_in(principal) for _ in range(3))
    assert keys.of_session(first) == principal
    keys.log_out(first)
    assert keys.of_session(first) is None
    with engine.begin() as connection:
        connection.execute(sa.update(sessions).values(expires_at=1.0))
    assert keys.of_session(second) is None
    third = keys.log_in(principal)
    keys.revoke(key.id)
    assert keys.of_session(third) is None
    assert keys.of_session("nothing") is None


@pytest.mark.parametrize(
    ("name", "role", "days", "said"),
    [
        ("", "viewer", None, "a key's name"),
        ("a\nb", "viewer", None, "a key's name"),
        ("ada", "owner", None, "there is no role 'owner'"),
        ("ada", "viewer", 0, "expires"),
        ("ada", "viewer", float("nan"), "expires"),
    ],
)
def test_what_a_key_may_not_be(tmp_path: Path, name: str, role: str, days: float | None, said: str) -> None:
    keys = KeyStore(connect(f"sqlite:///{tmp_path / 'tally.db'}"))
    with pytest.raises(SpecError, match=said):
        keys.add(name, role, days=days)  # type: ignore[arg-type]


def test_roles_include_those_before_them() -> None:
    assert [Principal("a", "operator", "1").may(role) for role in ("viewer", "operator", "admin")] == [
        True,
        True,
        False,
    ]


def test_csrf_tokens_belong_to_their_session() -> None:
    assert csrf_token("a") == csrf_token("a") != csrf_token("b")


def test_guessing_becomes_slower_and_is_forgiven() -> None:
    now = [0.0]
    throttle = Throttle(clock=lambda: now[0])
    for _ in range(FREE_FAILURES):
        throttle.failed("1.2.3.4")
        assert throttle.wait("1.2.3.4") == 0
    waits = []
    for _ in range(12):
        throttle.failed("1.2.3.4")
        waits.append(throttle.wait("1.2.3.4"))
        now[0] += waits[-1]
    assert waits[:3] == [2, 4, 8]
    assert max(waits) == 300
    assert throttle.wait("5.6.7.8") == 0
    throttle.succeeded("1.2.3.4")
    throttle.failed("1.2.3.4")
    assert throttle.wait("1.2.3.4") == 0
