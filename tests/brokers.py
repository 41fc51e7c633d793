"""Real brokers, and what can be done to them."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports
from tests.services import require

PATIENCE = 60.0


class BrokerUnderTest(ABC):
    """A broker with one queue of the test's own. url: what users write."""

    url: str

    @abstractmethod
    def hurt(self) -> None:
        """Something happens to it that happens to brokers. It is back afterwards."""


class OwnRedis(BrokerUnderTest):
    """A Redis server of the test's own, which may be killed. It writes each command to its disk."""

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self._folder, [self.port] = folder, free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0/items{suffix}"
        self._start()

    def _start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        command = [program, "--port", str(self.port), "--dir", str(self._folder), "--bind", "127.0.0.1", "--save", ""]
        options = ["--appendonly", "yes", "--appendfsync", "always", "--logfile", "redis.log"]
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        listening(self.port)

    def hurt(self) -> None:
        """``kill -9``, and a new start."""
        self.close()
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class CutRabbit(BrokerUnderTest):
    """The RabbitMQ of this machine, behind a proxy that cuts connections: other tests use it, too."""

    def __init__(self) -> None:
        self._name = f"tally-test-{secrets.token_hex(6)}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.url = f"amqp://127.0.0.1:{self._listener.getsockname()[1]}/{self._name}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", 5672))
                self._pairs.append((client, server))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=_relay, args=(one, other), daemon=True).start()

    def hurt(self) -> None:
        """Every connection is reset."""
        pairs, self._pairs = self._pairs, []
        for each in (each for pair in pairs for each in pair):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        import pika

        self._listener.close()
        self.hurt()
        with pika.BlockingConnection() as connection:
            channel = connection.channel()
            for each in (self._name, f"{self._name}.dead"):
                channel.queue_delete(each)


def _relay(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError), one, other:
        while content := one.recv(65536):
            other.sendall(content)
        other.shutdown(socket.SHUT_RDWR)


def listening(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nobody listens on port {port}"
        time.sleep(0.02)


KINDS: Sequence[str] = ("rabbitmq", "redis-stream", "redis-list")


@contextmanager
def broker(kind: str, folder: Path) -> Iterator[BrokerUnderTest]:
    """A broker of this kind; skipped where it is not there."""
    if kind == "rabbitmq":
        with contextlib.closing(socket.socket()) as probe:
            require("RabbitMQ", probe.connect_ex(("127.0.0.1", 5672)) == 0)
        with contextlib.closing(CutRabbit()) as rabbit:
            yield rabbit
    else:
        require("Redis (redis-server)", shutil.which("redis-server") is not None)
        with contextlib.closing(OwnRedis(folder, "?kind=list&lock=2" if kind == "redis-list" else "?lock=2")) as redis:
            yield redis
