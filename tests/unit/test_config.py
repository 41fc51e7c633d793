"""Settings come from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tally.config import settings, variable
from tally.errors import (
    SpecError,
)


def test_settings_come_from_the_environment_when_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().home == home
    assert settings().database == f"sqlite:///{home}/tally.db"
    monkeypatch.setenv("TALLY_DATABASE", "postgresql+psycopg://me:s3:cr/t@db/tally")
    assert settings().database.endswith("@db/tally")
    assert "s3" not in repr(settings())
    assert "postgresql+psycopg://me:***@db/tally" in repr(settings())


def test_a_folder_of_secrets_stands_in_for_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_SECRETS", str(tmp_path / "secrets"))
    assert variable("TALLY_QUEUE_PASSWORD") is None
    (tmp_path / "secrets").mkdir()
    (tmp_path / "outside").write_text("no")
    (tmp_path / "secrets" / "TALLY_DATABASE").write_text("postgresql://tally:one@db/tally\n")
    assert settings().database == "postgresql://tally:one@db/tally"
    (tmp_path / "secrets" / "TALLY_DATABASE").write_text("postgresql://tally:two@db/tally\n")
    assert settings().database == "postgresql://tally:two@db/tally"
    assert variable("../outside") is None
    assert variable(str(tmp_path / "outside")) is None
    monkeypatch.setenv("TALLY_DATABASE", "postgresql://tally:three@db/tally")
    assert settings().database.partition("@")[0].endswith("three")
    (tmp_path / "secrets" / "TALLY_WEBHOOK_SECRET").mkdir()
    with pytest.raises(SpecError, match="TALLY_WEBHOOK_SECRET"):
        variable("TALLY_WEBHOOK_SECRET")


def test_settings_report_all_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TALLY_DATABASE", "mysql://me:secret@db/x")
    with pytest.raises(SpecError) as caught:
        settings()
    assert len(caught.value.problems) == 2
    assert "secret" not in str(caught.value)


def test_an_at_sign_in_the_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the password would be taken for the host, and shown as that."""
    monkeypatch.setenv("TALLY_DATABASE", "postgresql://me:one/two@three@db:5432/tally")
    with pytest.raises(SpecError, match="%40") as refused:
        settings()
    assert "two" not in str(refused.value)
    assert "three" not in str(refused.value)
    monkeypatch.setenv("TALLY_DATABASE", "postgresql://me:one%40two@db:5432/tally")
    assert settings().database.endswith("/tally")
