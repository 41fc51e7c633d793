"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kafka import MockKafka, mock_kafka
from tests.objectstores import Service, azurite, azurite_queues, moto_s3
from tests.servicebus import ServiceBus, service_bus

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and so would whatever a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup has it ignored


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes longest begins first: at the end, the other processes would wait for it. Those with Ray before all
    # others: the first process has them, and what it is at work on nobody takes from it.
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, "faults" not in item.path.parts))


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading a model's code changes in this process is undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(os.environ, "AZUREML_MODEL_DIR", "")


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models, photos and hostile files; not part of the repository."""
    path = Path(os.environ.get("TALLY_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (path / "images").is_dir():
        pytest.skip(f"no test data at {path}; set TALLY_TEST_DATA to the folder that holds images/ and models/")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder (jobs, registry) of the test's own."""
    path = tmp_path / "tally-home"
    monkeypatch.setenv("TALLY_HOME", str(path))
    monkeypatch.delenv("TALLY_DATABASE", raising=False)
    return path


@dataclass(frozen=True)
class Ran:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The ``tally`` command in this process, with nobody at the keyboard."""

    def run(*arguments: object) -> Ran:
        from tally.cli.main import main

        monkeypatch.setattr(sys, "argv", ["tally", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Service]:
    """An S3 service for this process's tests; each takes a bucket of its own."""
    with moto_s3() as service:
        yield service


@pytest.fixture(scope="session")
def azure_server() -> Iterator[Service]:
    """An Azure Blob service for this process's tests; each takes a container of its own."""
    with azurite() as service:
        yield service


@pytest.fixture(scope="session")
def azure_queue_server() -> Iterator[Service]:
    """An Azure Queue service for this process's tests; each takes a queue of its own."""
    with azurite_queues() as service:
        yield service


@pytest.fixture(scope="session")
def service_bus_server() -> Iterator[ServiceBus]:
    """A Service Bus for this process's tests; each takes a queue of its own."""
    with service_bus() as service:
        yield service


@pytest.fixture(scope="session")
def kafka_cluster() -> Iterator[MockKafka]:
    """A Kafka cluster for this process's tests; each takes a topic of its own."""
    with mock_kafka() as cluster:
        yield cluster


@pytest.fixture
def s3(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, which this test's clients reach."""
    s3_server.enter(monkeypatch)
    return s3_server.make(f"test-{uuid.uuid4().hex}")


@pytest.fixture
def azure(azure_server: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new container, which this test's clients reach."""
    azure_server.enter(monkeypatch)
    return azure_server.make(f"test-{uuid.uuid4().hex}")
