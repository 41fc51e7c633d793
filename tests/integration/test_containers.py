"""The image of Tally, built and run, and the file for compose. Building takes minutes: with ``TALLY_TEST_FULL=1``."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import secrets
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from packaging.requirements import Requirement
from tests import containers
from tests.containers import CONTAINERFILE, REPOSITORY, VERSION, Container, until
from tests.ports import free_ports
from tests.server import job, lengths
from tests.server import until as until_job
from tests.services import postgres_database

from tally.deploy import container as recipe
from tally.deploy.spec import SENSITIVE
from tally.masking import has_secret

FULL = os.environ.get("TALLY_TEST_FULL") == "1"
built = pytest.mark.skipif(not FULL, reason="an image is built and run with TALLY_TEST_FULL=1")

COMPOSE = REPOSITORY / "deploy" / "compose.yaml"
ITEMS = 60
SIZE = 700_000_000
"""Bytes that the default image may have."""
START_SECONDS = 0.5


def instructions() -> list[list[str]]:
    """The Containerfile's, of each of its stages. Lines that go on are one."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", CONTAINERFILE.read_text("utf-8"))).splitlines()
    stages: list[list[str]] = [[]]
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("FROM "):
            stages.append([])
        stages[-1].append(line)
    return stages


# -- what is written -----------------------------------------------------------------------------------


def test_images_begin_with_one_base_and_say_this_version() -> None:
    before, build, final = instructions()
    assert before == [f"ARG BASE={recipe.PYTHON}"]
    assert [each[0].split()[1] for each in (build, final)] == ["${BASE}", "${BASE}"]
    assert f"ARG VERSION={VERSION}" in final
    assert f"tally:{VERSION}" in {each["image"] for each in compose()["services"].values()}


@pytest.mark.parametrize("before", ["", "server,", "server,postgres,"])
@pytest.mark.parametrize("after", ["", ",ray"])
def test_an_image_for_cpus_with_pytorch_has_its_build_for_cpus(before: str, after: str) -> None:
    """PyPI's has CUDA with it: several GB."""
    (step,) = [each for stage in instructions() for each in stage if "${TORCH_INDEX:+" in each]
    patterns = re.search(r'case "\$\{ACCELERATOR\},\$\{EXTRAS\}," in (.*?)\)', step)
    assert patterns is not None
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for name, packages in extras.items():
        wanted = any(re.match(r"torch\b", each) for each in packages)
        for accelerator in ("cpu", "cuda"):
            word = f"{accelerator},{before}{name}{after},"
            taken = any(fnmatch.fnmatchcase(word, each.strip()) for each in patterns[1].split("|"))
            assert taken is (wanted and accelerator == "cpu"), word


def test_the_image_runs_tally_as_nobody_in_particular_and_installs_nothing_itself() -> None:
    final = instructions()[-1]
    assert [each for each in final if each.startswith(("USER", "ENTRYPOINT"))] == [
        "USER 10001:10001",
        'ENTRYPOINT ["dumb-init", "--single-child", "--", "tally"]',
    ]
    assert not [each for each in final if re.search(r"\b(pip|apt-get)\b", each)]
    assert {each.split()[1] for each in final if each.startswith("COPY")} == {"--from=build"}


def test_the_packages_of_images_are_pinned() -> None:
    lines = (REPOSITORY / "deploy" / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(each.split("==") for each in lines if not each.startswith("#"))
    [extras] = [found[1].split(",") for each in lines if (found := re.search(r"'\.\[(.*)\]'", each))]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = map(Requirement, chain(project["dependencies"], *(project["optional-dependencies"][e] for e in extras)))
    wrong = [
        str(each)
        for each in wanted
        if (version := pinned.get(each.name.lower().replace("_", "-"))) is None or version not in each.specifier
    ]
    assert wrong == []


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
    return found


def test_compose_is_what_its_specification_says() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    parsed = compose_spec.PyCompose.from_json(json.dumps(compose()))
    assert set(parsed.service_names()) == {"server", "ray-head", "ray-worker", "postgres", "seaweedfs"}
    mistaken = compose()
    mistaken["services"]["server"]["healthchek"] = mistaken["services"]["server"].pop("healthcheck")
    with pytest.raises(ValueError, match="healthchek"):
        compose_spec.PyCompose.from_json(json.dumps(mistaken))


@pytest.mark.parametrize("name", compose()["services"])
def test_a_service_is_checked_pinned_and_closed(name: str) -> None:
    service = compose()["services"][name]
    assert service["healthcheck"]["test"][0] == "CMD", "no shell"
    assert re.search(r":\d[\w.-]*$", service["image"])
    assert all(each.startswith("127.0.0.1:") for each in service.get("ports", ()))
    assert all(each["condition"] == "service_healthy" for each in service.get("depends_on", {}).values())
    if "build" in service:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_secrets_are_files_and_stand_nowhere_else(tmp_path: Path) -> None:
    read = compose()
    for service in read["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not has_secret(value), name
            assert value.startswith("/run/secrets") or not SENSITIVE.search(name), name
        for each in service.get("secrets", ()):
            assert (each if isinstance(each, str) else each["source"]) in read["secrets"]
    (tmp_path / "make_secrets.py").write_text((REPOSITORY / "deploy" / "make_secrets.py").read_text("utf-8"))
    first, made = (_made(tmp_path) for _ in range(2))
    assert first == made, "what is there stays"
    assert set(made) == {each["file"] for each in read["secrets"].values()}
    assert made["secrets/database-password"] in made["secrets/database-url"]
    assert made["secrets/s3-key"] in made["secrets/s3.json"]
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0


def test_a_secret_that_is_not_whole_is_not_used(tmp_path: Path) -> None:
    """As of a disk that was full, or an editor that ends files with a line break."""
    (tmp_path / "make_secrets.py").write_text((REPOSITORY / "deploy" / "make_secrets.py").read_text("utf-8"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "database-password").write_text("hunter2\n")
    assert _made(tmp_path)["secrets/database-url"] == "postgresql://tally:hunter2@postgres/tally"
    (tmp_path / "secrets" / "s3-key").write_text("")
    with pytest.raises(SystemExit, match=r"s3-key is empty: remove it"):
        _made(tmp_path)


def _made(folder: Path) -> dict[str, str]:
    runpy.run_path(str(folder / "make_secrets.py"), run_name="__main__")
    return {f"secrets/{each.name}": each.read_text() for each in (folder / "secrets").iterdir()}


# -- what runs -----------------------------------------------------------------------------------------


@contextmanager
def server(
    image: str, home: str, folder: Path, *, database: str = "", root: str = "/data"
) -> Iterator[tuple[Container, httpx2.Client]]:
    """A container with ``tally up``, and a client for it. home: its volume. folder: is there as ``/data``."""
    (port,) = free_ports(1)
    key = folder / "secrets" / "TALLY_ADMIN_KEY"
    if not key.exists():
        key.parent.mkdir()
        key.write_text(f"tly_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}")
    if database:
        (folder / "secrets" / "TALLY_DATABASE").write_text(database)
    options = (
        f"--volume={home}:/var/lib/tally",
        f"--volume={folder}:/data",
        f"--volume={folder}/secrets:/run/secrets:ro",
        "--env=TALLY_SECRETS=/run/secrets",
    )
    with containers.running(
        image, "up", "--host", "0.0.0.0", "--port", port, "--root", root, options=options
    ) as container:
        headers = {"Authorization": f"Bearer {key.read_text()}"}
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers, timeout=60) as client:
            until(lambda: "Tally is at" in container.log, lambda: container.log)
            yield container, client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What containers see as ``/data``, and whose files are their user's."""
    (tmp_path / "in").mkdir()
    for number in range(ITEMS):
        (tmp_path / "in" / f"{number:03}").write_bytes(b"x" * number)
    (tmp_path / "slow.py").write_text(lengths(pause=0.2))
    for each in (tmp_path, *tmp_path.rglob("*")):
        os.chown(each, 10001, 10001)
    return tmp_path


@built
def test_the_image_is_small_starts_fast_and_says_what_is_in_it() -> None:
    containers.require_podman()
    image = containers.image()
    [found] = json.loads(containers.call("podman", "image", "inspect", image))
    assert found["Size"] < SIZE
    labels = found["Labels"]
    assert labels["org.opencontainers.image.version"] == VERSION
    commit = containers.call("git", "rev-parse", "HEAD", cwd=REPOSITORY)
    assert labels["org.opencontainers.image.revision"] == commit
    options = ("--entrypoint=python",)
    with containers.running(image, "-c", "import time; time.sleep(600)", options=options) as container:
        assert container.run("tally", "--version") == f"tally {VERSION} ({commit[:9]})"
        listed = json.loads(container.run("cat", "/opt/tally/sbom.cdx.json"))["components"]
        there = container.run("python", "-c", _PACKAGES).split()
        assert {f"{each['name']}=={each['version']}" for each in listed} == set(there)
        assert float(container.run("python", "-c", _START)) < START_SECONDS
        assert json.loads(container.run("python", "-c", _WRITABLE)) == {
            "/": False,
            "/opt/tally": False,
            "/var/lib/tally": True,
            "/tmp": True,
        }
        assert container.run("sh", "-c", "command -v pip gcc cc strip || echo none") == "none"


_PACKAGES = """
import importlib.metadata, sysconfig
found = importlib.metadata.distributions(path=[sysconfig.get_path('purelib')])
print(*(f'{each.name}=={each.version}' for each in found))
"""
_START = """
import subprocess, time
def once():
    begun = time.perf_counter()
    subprocess.run(['tally', '--help'], check=True, capture_output=True)
    return time.perf_counter() - begun
print(min(once() for _ in range(10)))
"""
_WRITABLE = """
import json, tempfile
def may(folder):
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
print(json.dumps({each: may(each) for each in ('/', '/opt/tally', '/var/lib/tally', '/tmp')}))
"""


@built
def test_a_job_goes_on_in_the_next_container(folder: Path) -> None:
    """The first is killed, with everything in it."""
    containers.require_podman()
    image = containers.image()
    with containers.volume() as home:
        with server(image, home, folder) as (container, client):
            page = client.get(client.base_url.join("/login"))
            assert page.status_code == 200
            assert "<form" in page.text
            fields = job(Path("/data"), "out", scorer="slow", workers=2, batch_size=1)
            started = client.post("/jobs", json=fields).raise_for_status().json()["id"]
            until_job(client, started, lambda view: view["done"] >= 5)
            workers = container.run("python", "-c", _WORKERS)
            container.kill()
            assert container.wait() == 137
        with server(image, home, folder) as (container, client):
            ended = until_job(client, started, lambda view: view["state"] == "finished")
            rows = client.get(f"/jobs/{started}/rows", params={"limit": 1000}).json()["rows"]
            until(lambda: container.run("python", "-c", _ZOMBIES) == "0", lambda: container.log)
    assert workers == "2"
    assert (ended["done"], ended["rows"], ended["dead"]) == (ITEMS, ITEMS, 0)
    assert Counter(each["length"] for each in rows) == Counter(range(ITEMS))


_WORKERS = "import psutil; print(sum('--multiprocessing-fork' in each.cmdline() for each in psutil.process_iter()))"
_ZOMBIES = "import psutil; print(sum(each.status() == 'zombie' for each in psutil.process_iter()))"


@built
def test_a_server_that_is_stopped_loses_no_request_and_another_takes_its_job(folder: Path) -> None:
    """Two servers with one database and one volume, as behind a proxy that asks the other when one refuses."""
    containers.require_podman()
    image = containers.image()
    with containers.volume() as home, postgres_database() as url:
        database = url.replace("postgresql+psycopg", "postgresql")
        with (
            server(image, home, folder, database=database) as (first, at_first),
            server(image, home, folder, database=database) as (_, at_second),
        ):
            fields = job(Path("/data"), "out", scorer="slow", workers=2, batch_size=1)
            started = at_first.post("/jobs", json=fields).raise_for_status().json()["id"]
            until_job(at_second, started, lambda view: view["done"] >= 5)
            driver = at_second.get(f"/jobs/{started}").json()["driver"]
            load = Load([at_first, at_second], f"/jobs/{started}")
            with load:
                until(lambda: load.answered >= 200, lambda: str(load))
                first.kill("TERM")
                assert first.wait() in (0, 143)
                before = load.answered
                until(lambda: load.answered >= before + 200, lambda: str(load))
            ended = until_job(at_second, started, lambda view: view["state"] == "finished")
    assert load.lost == []
    assert (ended["done"], ended["rows"], ended["dead"]) == (ITEMS, ITEMS, 0)
    assert ended["driver"] != driver


class Load:
    """Clients that ask servers in turn until stopped. One that refuses connections or says 503 is passed over.

    answered: requests that were. lost: those that were sent and got no answer.
    """

    def __init__(self, clients: list[httpx2.Client], path: str, *, threads: int = 8) -> None:
        self.answered, self.refused, self.lost = 0, 0, list[str]()
        self._clients, self._path, self._stop = clients, path, threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(threads)]

    def __repr__(self) -> str:
        return f"{self.answered} answered, {self.refused} refused, lost: {self.lost}"

    def __enter__(self) -> None:
        for each in self._threads:
            each.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()

    def _ask(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            client = self._clients[turn % len(self._clients)]
            turn += 1
            try:
                status = client.get(self._path, headers={"Connection": "close"}).status_code
            except httpx2.ConnectError:
                status = 503
            except httpx2.HTTPError as error:
                with self._lock:
                    self.lost.append(repr(error))
                continue
            with self._lock:
                self.answered += status == 200
                self.refused += status == 503
                if status not in (200, 503):
                    self.lost.append(str(status))
