"""A server as users start it: ``tally up`` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest

PATIENCE = 120.0
"""Seconds after which something will not happen any more."""

_LENGTHS = """
import time
import tally

class Lengths(tally.Scorer):
    input = "bytes"
    columns = {"length": "int64"}

    def score(self, batch):
        time.sleep(PAUSE)
        if b"bad" in batch:
            raise ValueError(ERROR)
        return [{"length": len(content)} for content in batch]
"""


def lengths(*, pause: float = 0, error: str = "a bad item") -> str:
    """A scorer's code: how long items are; one whose content is ``bad`` is dead, with this error.

    pause: seconds for each batch.
    """
    return _LENGTHS.replace("PAUSE", str(pause)).replace("ERROR", repr(error))


def job(folder: Path, out: str, *, scorer: str = "quick", **fields: Any) -> dict[str, Any]:
    """The fields of a job: what is in the folder's ``in`` is scored into its ``out`` by one worker."""
    return {
        "source": [str(folder / "in")], "model": str(folder / f"{scorer}.py"), "out": str(folder / out), "workers": 1,
        **fields,
    }  # fmt: skip


@dataclass
class Server:
    """A running server. key: of its first admin, empty where there was one before."""

    process: subprocess.Popen[str]
    url: str
    key: str

    def client(self, key: str | None = None) -> httpx2.Client:
        """A client with this key, or that of the first admin."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        return httpx2.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=60)

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(*options: object, log: IO[bytes] | None = None) -> Iterator[Server]:
    """``tally up`` on any free port, in this test's home. log: gets its standard error."""
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "tally", "up", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        key = ""
        for line in process.stdout:
            if found := re.search(r"tly_\S+", line):
                key = found[0]
            if found := re.search(r"http://\S+", line):
                yield Server(process, found[0], key)
                return
        raise AssertionError(f"the server ended with {process.wait()} before it listened")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(
    client: httpx2.Client, job: str, ended: Callable[[dict[str, Any]], object], *, params: dict[str, str] | None = None
) -> dict[str, Any]:
    """The job, once ``ended`` says so of it; without an id, the list of jobs."""
    deadline = time.monotonic() + PATIENCE
    view: dict[str, Any] = {}
    while time.monotonic() < deadline:
        view = client.get(f"/jobs/{job}".rstrip("/"), params=params).raise_for_status().json()
        if ended(view):
            return view
        time.sleep(0.1)
    raise AssertionError(f"this did not happen: {view}")
