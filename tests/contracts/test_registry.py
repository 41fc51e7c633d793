"""The model registry on SQLite and PostgreSQL, in folders and buckets, and its command line."""

from __future__ import annotations

import getpass
import json
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from tests.objectstores import Service, moto_s3
from tests.services import postgres_database

from tally.cli.models import models
from tally.database.connect import connect
from tally.database.tables import metadata
from tally.errors import ModelChangedError, ModelError
from tally.models.load import load
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.testing.registry import SCRIPT, ContentContract, RegistryContract

pytestmark = pytest.mark.usefixtures("restored")


class Sqlite:
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[sa.Engine]:
        engine = connect(f"sqlite:///{tmp_path}/registry.db")
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def database() -> Iterator[sa.Engine]:
    with postgres_database() as url:
        engine = connect(url)
        yield engine
        engine.dispose()


class Postgres:
    @pytest.fixture
    def engine(self, database: sa.Engine) -> sa.Engine:
        with database.begin() as connection:
            for each in reversed(metadata.sorted_tables):
                connection.execute(sa.delete(each))
        return database


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with moto_s3() as service:
        yield service


class Bucket:
    @pytest.fixture
    def root(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> str:
        service.enter(monkeypatch)
        return f"{service.make(f'models-{secrets.token_hex(6)}')}/of/the/team"


class TestSqlite(Sqlite, RegistryContract, ContentContract): ...


class TestPostgres(Postgres, RegistryContract, ContentContract): ...


class TestSqliteAndS3(Sqlite, Bucket, ContentContract): ...


class TestPostgresAndS3(Postgres, Bucket, ContentContract): ...


class TestPlainEngine(RegistryContract):
    """Nothing depends on how the job store sets its connections up."""

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[sa.Engine]:
        engine = sa.create_engine(f"sqlite:///{tmp_path}/registry.db", connect_args={"timeout": 30})
        metadata.create_all(engine)
        yield engine
        engine.dispose()


# the command line


@pytest.fixture
def tally_models() -> Callable[..., str]:
    def run(*arguments: str, exit_code: int = 0) -> str:
        result = CliRunner().invoke(models, arguments, catch_exceptions=False, standalone_mode=False)
        assert (result.return_value or 0) == exit_code, result.output
        return result.output

    return run


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "score.py"
    path.write_text(SCRIPT.format(number=1))
    return path


def test_a_model_from_adding_to_removing(tally_models: Callable[..., str], script: Path) -> None:
    assert "no models yet; add one with" in tally_models("list")
    output = tally_models("add", "faces", str(script), "--alias", "production", "--metric", "ap=0.5", "--note", "by=me")
    assert "added models:/faces/1" in output
    assert "tally score SOURCE --model models:/faces@production" in output
    assert "note: AZUREML_MODEL_DIR" in output
    assert "has this content already: nothing was added" in tally_models("add", "faces", str(script))
    script.write_text(SCRIPT.format(number=2))
    assert "added models:/faces/2" in tally_models("add", "faces", str(script), "--set", "batch_size=4")

    assert "now version 2" in tally_models("alias", "faces", "production", "2")
    assert "version 1 again" in tally_models("rollback", "faces", "production")
    lines = tally_models("list").splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "ALIASES", "KIND", "SIZE", "ADDED", "HASH"]
    assert lines[1].split()[:4] == ["faces", "1", "production", "script"]
    shown = tally_models("show", "faces")
    assert "metrics      ap 0.5" in shown
    assert re.search(rf"production  1 +rollback +{re.escape(getpass.getuser())}", shown)
    described = json.loads(tally_models("show", "faces", "--json"))
    assert described["versions"][0]["metadata"] == {"by": "me", "metrics": {"ap": 0.5}}
    assert [each["action"] for each in described["history"]] == ["set", "set", "rollback"]
    tally_models("alias", "faces", "passing", "2")
    assert "passing is removed; it was version 2" in tally_models("unalias", "faces", "passing")
    listed = [json.loads(line) for line in tally_models("list", "--json").splitlines()]
    assert [each["uri"] for each in listed] == ["models:/faces/1", "models:/faces/2"]

    with pytest.raises(ModelError, match="faces@production points at it"):
        tally_models("remove", "faces", "1")
    assert "removed models:/faces/2" in tally_models("remove", "faces", "2", "--yes")


def test_verify_tells_which(tally_models: Callable[..., str], script: Path) -> None:
    tally_models("add", "faces", str(script))
    script.write_text(SCRIPT.format(number=2))
    tally_models("add", "faces", str(script))
    assert tally_models("verify").count("ok ") == 2
    changed = Path(open_registry().get("models:/faces/2").location, "score.py")
    changed.unlink()
    assert "CHANGED model models:/faces/2" in tally_models("verify", "faces", exit_code=1)
    assert "ok " in tally_models("verify", "faces", "1")


def test_a_registered_model_is_checked_on_every_use(tally_models: Callable[..., str], script: Path) -> None:
    tally_models("add", "faces", str(script), "--alias", "production")
    ref = resolve("models:/faces@production")
    assert (ref.name, ref.version, ref.kind) == ("faces", 1, "script")
    assert ref.hash == open_registry().get("models:/faces/1").hash
    assert load(ref, "cpu").score(["a"]) == [{"prediction": 1}]
    added = ref.location / "score.py"
    added.chmod(0o644)
    added.write_text(SCRIPT.format(number=2))
    with pytest.raises(ModelChangedError, match="since the job began"):
        load(ref, "cpu")
    with pytest.raises(ModelChangedError, match="the registry's copy was changed"):
        resolve("models:/faces")
