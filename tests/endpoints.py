"""Endpoints as users start them: ``tally serve`` in a process of its own; and many clients at once."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
from tests.waiting import eventually

PATIENCE = 60.0
"""Seconds after which something will not happen any more."""

ECHO = """
import os
import time
import tally

class Echo(tally.Scorer):
    input = "bytes"
    batch_size = 8

    def score(self, batch):
        time.sleep(PAUSE)
        if b"bad" in batch:
            raise ValueError("a bad item")
        return [{"text": each.decode(), "pid": os.getpid(), "mark": MARK, "batch": len(batch)} for each in batch]
"""


SUMS = """
import tally

class Sums(tally.Scorer):
    input = "table"
    features = ("a", "b")
    columns = {"sum": "float64"}

    def score(self, batch):
        return [{"sum": float(a) + float(b)} for a, b in zip(*batch.to_pydict().values())]
"""

MIRROR = """
import tally

class Mirror(tally.Scorer):
    input = "image"
    output = "image"

    def score(self, batch):
        return [picture[:, ::-1].copy() for picture in batch]
"""


def echo(path: Path, *, pause: float = 0.002, mark: str = "first") -> str:
    """A scorer that returns what it is given, as ``--model`` takes it. mark: stands in each answer."""
    path.write_text(ECHO.replace("PAUSE", str(pause)).replace("MARK", repr(mark)))
    return f"{path}:Echo"


@dataclass
class Answered:
    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Serving:
    """A server of endpoints. log: what it has written so far. grpc: host and port, with ``--grpc-port``."""

    process: subprocess.Popen[str]
    url: str
    _log: Path
    grpc: str = ""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(
        self, path: str, body: bytes | None = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Answered:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answered(response.status, response.read(), found)
        finally:
            connection.close()

    def post(self, path: str, value: Any) -> Answered:
        """A JSON value."""
        return self.ask(path, json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def replicas(self, model: str | None = None) -> list[dict[str, Any]]:
        """The replicas of a model's versions, as the server knows them."""
        models = self.ask("/readyz").json()["models"]
        pools = models[model] if model else next(iter(models.values()))
        return [replica for pool in pools for replica in pool["replicas"]]

    def until(self, condition: Callable[[Serving], object]) -> None:
        """Wait until it holds."""
        eventually(lambda: condition(self), PATIENCE, lambda: self.log)


@contextmanager
def serving(folder: Path, *arguments: object, environment: dict[str, str] | None = None) -> Iterator[Serving]:
    """``tally serve`` on any free port, once all models are loaded."""
    for module in ("httptools", "msgspec", "prometheus_client", "uvloop"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "tally", "serve", "--port", "0", *map(str, arguments)]
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **(environment or {})}
        )
    try:
        assert process.stdout is not None
        grpc = ""
        for line in process.stdout:
            if found := re.search(r"gRPC at (\S+)", line):
                grpc = found[1]
            if found := re.search(r"Serving at (https?://\S+)", line):
                yield Serving(process, found[1], log, grpc)
                break
        else:
            raise AssertionError(f"it ended with {process.wait()} before it served:\n{log.read_text()}")
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@dataclass
class Storm:
    """Clients that send one text after the other, each over its own connection, until they are stopped.

    wrong: answers with status 200 that are not what was asked. broken: requests that got no answer at all.
    refused: connections that the system refused, which is no request lost.
    """

    server: Serving
    path: str = "/score"
    clients: int = 64
    statuses: Counter[int] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    refused: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    """Answers with 200, of each client."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(self.clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a client waits for ever"

    def until_answered(self, count: int) -> None:
        """Wait until so many more requests have been answered with 200."""
        goal = self.statuses[200] + count
        self._until(lambda: self.statuses[200] >= goal)

    def until_begun_anew(self) -> None:
        """Wait until each client has the answer to a request that it had not begun yet."""
        goal = {number: self.answered[number] + 2 for number in range(self.clients)}
        self._until(lambda: all(self.answered[number] >= count for number, count in goal.items()))

    def _until(self, condition: Callable[[], bool]) -> None:
        eventually(condition, PATIENCE, lambda: f"{self}\n{self.server.log}", every=0.01)

    def _client(self, number: int) -> None:
        connection: http.client.HTTPConnection | None = None
        count = 0
        while not self._stop.is_set():
            text = f"{number}.{count}"
            count += 1
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(*self.server.address, timeout=PATIENCE)
                    connection.connect()
            except ConnectionRefusedError:
                with self._lock:
                    self.refused += 1
                connection = None
                self._stop.wait(0.02)
                continue
            except OSError as error:
                with self._lock:
                    self.broken.append(f"connecting: {error!r}")
                connection = None
                continue
            try:
                connection.request("POST", self.path, text.encode())
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.broken.append(repr(error))
                connection.close()
                connection = None
                continue
            with self._lock:
                self.statuses[response.status] += 1
                if response.status == 200:
                    self.answered[number] += 1
                    said = json.loads(body)
                    self.marks[said["mark"]] += 1
                    if said["text"] != text:
                        self.wrong.append(f"{text}: {said}")
            if response.will_close:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()
