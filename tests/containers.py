"""Containers: an image is built from ``deploy/Containerfile`` and run by podman, as root.

Nothing is fetched but packages: the base is made by debootstrap, in place of the image that a registry has.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.services import require
from tests.waiting import eventually

import tally

REPOSITORY = Path(__file__).resolve().parent.parent
CONTAINERFILE = REPOSITORY / "deploy" / "Containerfile"
BASE = "localhost/tally-test-base"
PATIENCE = 120.0
"""Seconds after which something will not happen any more."""


def call(*command: object, **options: Any) -> str:
    """What the command prints. Fails with what it said if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def require_podman() -> None:
    """Skip the test, saying so, where containers cannot be run; see :func:`tests.services.require`."""
    tools = ("podman", "buildah", "runc", "debootstrap")
    missing = [name for name in tools if shutil.which(name) is None]
    require(f"{', '.join(missing)} (apt-get install {' '.join(tools)})", not missing)
    require("root", os.geteuid() == 0)


@cache
def base() -> str:
    """A base for images: Debian with Python, from this machine's mirror. It is kept."""
    if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode:
        with tempfile.TemporaryDirectory(prefix="tally-base-") as folder:
            include = "--include=python3,python3-venv,ca-certificates,binutils"
            call("debootstrap", "--variant=minbase", include, "bookworm", folder, *_mirror())
            for each in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
                shutil.rmtree(Path(folder, each), ignore_errors=True)
            call("sh", "-c", f"tar -C {shlex.quote(folder)} -c . | podman import --quiet - {BASE}")
    return BASE


def _mirror() -> list[str]:
    """Where this machine's packages come from; debootstrap's own choice if that is not known."""
    files = [Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")]
    lines = [line for each in files if each.exists() for line in each.read_text().splitlines()]
    text = " ".join(each for each in lines if not each.lstrip().startswith("#"))  # a snapshot, often, that is no mirror
    return [word for word in text.split() if word.startswith(("http://", "https://"))][:1]


@cache
def image(*arguments: str) -> str:
    """The image of this tree, by its name. arguments: ``NAME=VALUE``, for the build; layers are kept."""
    tag = f"localhost/tally-test:{'-'.join(each.partition('=')[2].replace(',', '-') for each in arguments) or 'cpu'}"
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as pip:
        pip.write(_pip_configuration())
        pip.flush()
        given = [f"BASE={base()}", f"COMMIT={call('git', 'rev-parse', 'HEAD', cwd=REPOSITORY)}", *arguments]
        call(
            "buildah", "bud", "--isolation", "chroot", "--layers", "--network", "host",
            *(f"--volume={each}:{each}:ro" for each in _local_places()), "--secret", f"id=pip,src={pip.name}",
            *(f"--build-arg={each}" for each in given), "-f", CONTAINERFILE, "-t", tag, REPOSITORY,
        )  # fmt: skip
    return tag


def _pip_settings() -> dict[str, str]:
    """What pip is told on this machine: where its index is."""
    lines = call(sys.executable, "-m", "pip", "config", "list").splitlines()
    found = (each.partition("=") for each in lines)
    return {name.rpartition(".")[2]: value.strip("'\"") for name, _, value in found}


def _pip_configuration() -> str:
    left_out = ("constraint",)  # those of this machine's own environment
    return "[global]\n" + "".join(f"{n} = {v}\n" for n, v in _pip_settings().items() if n not in left_out)


def _local_places() -> list[str]:
    """Files and folders of this machine that pip is told to read."""
    words = " ".join(_pip_settings().values()).replace("\\n", " ").split()
    return [each for each in dict.fromkeys(words) if each.startswith("/") and Path(each).exists()]


@dataclass(frozen=True)
class Container:
    """A container that runs."""

    name: str

    @property
    def log(self) -> str:
        done = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def kill(self, signal: str = "KILL") -> None:
        call("podman", "kill", "--signal", signal, self.name)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return int(call("podman", "wait", self.name, timeout=PATIENCE))

    def run(self, *command: object) -> str:
        """What a command within prints."""
        return call("podman", "exec", self.name, *command)


@contextmanager
def running(image: str, *command: object, options: tuple[str, ...] = ()) -> Iterator[Container]:
    """A container as the documentation runs one: the root is read-only, and there are no capabilities."""
    hardened = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host")
    name = call("podman", "run", "--detach", *hardened, *options, image, *command)
    try:
        yield Container(name)
    finally:
        call("podman", "rm", "--force", "--time", "0", "--volumes", name)


@contextmanager
def volume() -> Iterator[str]:
    """A new, empty volume, by its name."""
    name = call("podman", "volume", "create")
    try:
        yield name
    finally:
        call("podman", "volume", "rm", "--force", name)


def until(condition: Callable[[], object], told: Callable[[], str]) -> None:
    """Wait until it holds. told: what to say if it does not come to that."""
    eventually(condition, PATIENCE, told, every=0.1)


VERSION = str(tally.__version__)


@dataclass(frozen=True)
class Network:
    """A network of this machine's own, for containers that find each other by name: one address for each name.

    addresses: by name. hosts: of a client that is outside.
    """

    prefix: str
    addresses: dict[str, str]

    def mode(self, name: str) -> str:
        """What podman is told for the container of that name."""
        return f"ns:/run/netns/{self.prefix}-{name}"


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """A bridge, and a namespace on it for each name; podman's own networks need more than every machine has."""
    prefix = f"tally{secrets.token_hex(2)}"
    subnet = f"10.89.{secrets.randbelow(200) + 20}"
    addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, 2)}
    call("ip", "link", "add", prefix, "type", "bridge")
    try:
        call("ip", "address", "add", f"{subnet}.1/24", "dev", prefix)
        call("ip", "link", "set", prefix, "up")
        for number, (name, address) in enumerate(addresses.items()):
            space, end = f"{prefix}-{name}", f"{prefix}v{number}"
            call("ip", "netns", "add", space)
            call("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", space)
            call("ip", "link", "set", end, "master", prefix, "up")
            call("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                call("ip", "-n", space, "link", "set", device, "up")
            call("ip", "-n", space, "route", "add", "default", "via", f"{subnet}.1")
        yield Network(prefix, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", f"{prefix}-{name}"], check=False, capture_output=True)
        call("ip", "link", "delete", prefix)


_POSTGRES = """#!/bin/sh
# As the image of its makers does where nothing is there yet.
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb -D "$PGDATA" -U "$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" -A scram-sha-256 --locale=C -E UTF8
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE ${POSTGRES_DB:-$POSTGRES_USER}" | postgres --single -D "$PGDATA" postgres
fi
exec postgres -D "$PGDATA" -c listen_addresses='*'
"""

_SERVICES = """
FROM {base} AS base
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql wget

FROM base AS postgres
COPY entry /usr/local/bin/entry
RUN usermod --uid 999 postgres && groupmod --gid 999 postgres && mkdir -p /var/lib/postgresql/data \
    && chown -R 999:999 /var/lib/postgresql /var/run/postgresql && ln -s /usr/lib/postgresql/*/bin /opt/postgresql
ENV PATH=/opt/postgresql:$PATH PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
USER 999:999
ENTRYPOINT ["entry"]

FROM base AS seaweedfs
COPY weed /usr/bin/weed
VOLUME /data
ENTRYPOINT ["weed"]
"""


@cache
def service(name: str) -> str:
    """An image with the real service, in place of the one that its makers publish. name: postgres, seaweedfs."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    require("weed (make .venv/test-containers.stamp)", weed is not None)
    tag = f"localhost/tally-test-{name}"
    with tempfile.TemporaryDirectory(prefix="tally-service-") as folder:
        Path(folder, "Containerfile").write_text(_SERVICES.format(base=base()))
        Path(folder, "entry").write_text(_POSTGRES)
        Path(folder, "entry").chmod(0o755)
        shutil.copy(str(weed), folder)
        build = ("buildah", "bud", "--isolation", "chroot", "--layers", "--network", "host")
        call(*build, "--target", name, "-t", tag, folder)
    return tag
