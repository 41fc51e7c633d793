"""Object stores of this machine that tests start: moto's S3, Azurite's Blob service."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.ports import free_ports
from tests.services import require

REPOSITORY = Path(__file__).resolve().parent.parent

# What Azurite's documentation gives to everybody.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_SECRETS = ("AWS_", "AZURE_", "GOOGLE_", "AZURITE_")


@dataclass(frozen=True)
class Service:
    """A running object store.

    url: of the server. scheme: of the URLs that lead to it ("s3"). environment: what its clients read; secrets
    of the caller's own are not in it.
    """

    url: str
    scheme: str
    environment: dict[str, str] = field(repr=False)

    def through(self, url: str) -> Service:
        """The same service, reached at another address: a proxy's."""
        return Service(url, self.scheme, {key: value.replace(self.url, url) for key, value in self.environment.items()})

    def enter(self, monkeypatch: pytest.MonkeyPatch, *beside: Service) -> None:
        """Clients of this process, and of its children, use this service (and those beside it) until the test ends."""
        from tally.storage import buckets

        for name in list(os.environ):
            if name.startswith(_SECRETS):
                monkeypatch.delenv(name)
        for service in (self, *beside):
            for name, value in service.environment.items():
                monkeypatch.setenv(name, value)
        # Clients are kept, and belong to the service that was used before.
        monkeypatch.setattr(buckets, "_clients", {})
        monkeypatch.setattr(buckets, "_reached", set())

    def make(self, bucket: str) -> str:
        """A new bucket or container. Returns its URL."""
        if self.scheme == "s3":
            request = urllib.request.Request(f"{self.url}/{bucket}", method="PUT")
            urllib.request.urlopen(request, timeout=30).close()
        else:
            _make_container(self.url, bucket)
        return f"{self.scheme}://{bucket}"


@contextmanager
def moto_s3() -> Iterator[Service]:
    """An empty S3 service: moto's server, ended afterwards. Buckets are made by :meth:`Service.make`."""
    require("moto (pip install 'moto[server]')", find_spec("moto") is not None)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {
        "AWS_ENDPOINT": url,
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # Pages are short, so that few objects make many pages.
    with _running(command, f"{url}/moto-api/", {"MOTO_S3_DEFAULT_MAX_KEYS": "100"}):
        yield Service(url, "s3", environment)


@contextmanager
def azurite() -> Iterator[Service]:
    """An empty Azure Blob service: Azurite, ended afterwards. Containers are made by :meth:`Service.make`.

    The program is ``$TALLY_TEST_AZURITE``, ``azurite-blob`` on the PATH, or what ``npm install --prefix
    build/azurite azurite`` installed.
    """
    with _azurite("blob") as url:
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURITE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
            "AZURE_STORAGE_ENDPOINT": url,
            "AZURE_ALLOW_HTTP": "true",
        }
        yield Service(url, "az", environment)


@contextmanager
def azurite_queues() -> Iterator[Service]:
    """An empty Azure Queue service, of the same Azurite."""
    with _azurite("queue") as url:
        settings = f"AccountName={AZURITE_ACCOUNT};AccountKey={AZURITE_KEY};QueueEndpoint={url}"
        yield Service(url, "azure-queue", {"AZURE_STORAGE_CONNECTION_STRING": settings})


@contextmanager
def _azurite(service: str) -> Iterator[str]:
    """One of Azurite's services, ended afterwards: its account's URL."""
    program = azurite_program(service)
    require("Azurite (npm install --prefix build/azurite azurite)", program is not None)
    assert program
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}"
    with tempfile.TemporaryDirectory(prefix="azurite-", ignore_cleanup_errors=True) as folder:
        command = [program, f"--{service}Host", "127.0.0.1", f"--{service}Port", str(port), "--location", folder]
        # Without checks of the API's version: Azurite lags behind the clients.
        command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        with _running(command, f"{url}?comp=list"):
            yield url


def azurite_program(service: str = "blob") -> str | None:
    """Where one of Azurite's services is, or None."""
    name = f"azurite-{service}"
    if named := os.environ.get("TALLY_TEST_AZURITE"):  # of its Blob service; the others lie beside it
        found = shutil.which(named)
        return found and shutil.which(Path(found).with_name(name))
    return shutil.which(name) or shutil.which(REPOSITORY / f"build/azurite/node_modules/.bin/{name}")


@contextmanager
def _running(command: Sequence[str], answers: str, more: dict[str, str] | None = None) -> Iterator[None]:
    """A server, from when it answers this URL (with whatever status) to the end."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=os.environ | (more or {}))
        try:
            deadline = time.monotonic() + 120
            while not _answers(answers):
                if process.poll() is not None or time.monotonic() > deadline:
                    told.seek(0)
                    pytest.fail(f"{command[0]} did not come up:\n{told.read().decode(errors='replace')}")
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    pass
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def _make_container(url: str, name: str) -> None:
    """PUT with a signature of ours: obstore makes no containers."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{key}:{value}\n" for key, value in headers.items())
    # The account is there twice: once as itself, once as the first part of the path.
    resource = f"/{AZURITE_ACCOUNT}/{AZURITE_ACCOUNT}/{name}\nrestype:container"
    text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\n{signed}{resource}"
    digest = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {AZURITE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers["Content-Length"] = "0"
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=30).close()
