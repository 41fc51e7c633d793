"""Many clients at an endpoint while replicas die and hang, models change, and servers end.

No answer is wrong, and no request is lost but those that a dead replica had been given: they are answered 503 or 504.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path

import psutil
import pytest
from tests.endpoints import Serving, Storm, echo, serving

FULL = os.environ.get("TALLY_TEST_FULL") == "1"
GIVEN = 16
"""Requests that a replica has been given at most: two batches of 8, as scoring one takes longer than 10 ms."""
PAUSE = 0.02


def busy(server: Serving) -> bool:
    """Whether all replicas have been given requests."""
    replicas = server.replicas()
    return bool(replicas) and all(each["state"] == "ready" and each["requests"] for each in replicas)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 503), (signal.SIGSTOP, 504)])
def test_a_replica_that_dies_or_hangs_costs_what_it_had_been_given(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    model = echo(tmp_path / "echo.py", pause=PAUSE)
    with serving(tmp_path, f"echo={model}", "--replicas", 2) as server, Storm(server) as storm:
        storm.until_answered(500)
        server.until(busy)
        victim = server.replicas()[0]["pid"]
        os.kill(victim, number)
        server.until(lambda it: victim not in [each["pid"] for each in it.replicas()])
        server.until(lambda it: len(it.replicas()) == 2 and busy(it))
        storm.until_answered(500)
        figures = server.ask("/metrics").body.decode()
    assert storm.wrong == []
    assert storm.broken == []
    assert set(storm.statuses) <= {200, status}
    assert 1 <= storm.statuses[status] <= GIVEN
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE
    how = {503: "died", 504: "hung"}[status]
    assert f'tally_endpoint_replicas_lost_total{{how="{how}",model="echo",version="1"}} 1.0' in figures


def test_all_replicas_die(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py", pause=PAUSE)
    with serving(tmp_path, f"echo={model}", "--replicas", 2) as server, Storm(server, clients=16) as storm:
        storm.until_answered(200)
        for each in server.replicas():
            os.kill(each["pid"], signal.SIGKILL)
        storm.until_answered(200)
        assert server.ask("/healthz").status == 200
    assert storm.wrong == []
    assert storm.broken == []
    assert set(storm.statuses) <= {200, 503}
    assert storm.statuses[503] <= 2 * GIVEN


def test_a_new_version_takes_over_without_a_lost_request(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py", mark="old")
    with serving(tmp_path, f"echo={model}", "--replicas", 2) as server, Storm(server) as storm:
        storm.until_answered(500)
        echo(tmp_path / "echo.py", mark="new")
        before = {each["pid"] for each in server.replicas()}
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda it: not before & {each["pid"] for each in it.replicas()})
        storm.until_answered(2 * storm.clients)  # those that were on their way
        storm.marks.clear()
        storm.until_answered(500)
        assert set(storm.marks) == {"new"}
    assert storm.wrong == []
    assert storm.broken == []
    assert set(storm.statuses) == {200}


def test_a_version_that_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}") as server, Storm(server, clients=8) as storm:
        storm.until_answered(100)
        (tmp_path / "echo.py").write_text("import no_such_module\n")
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda it: "is served as before" in it.log)
        storm.until_answered(100)
        assert "no_such_module" in server.log
    assert storm.broken == []
    assert set(storm.statuses) == {200}


def test_the_end_loses_no_request(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}", "--drain", "3s") as server, Storm(server) as storm:
        storm.until_answered(500)
        server.process.terminate()
        assert server.process.wait(30) == 0
        server_replicas_left = [
            each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or ())
        ]
    assert server_replicas_left == []
    assert storm.wrong == []
    assert storm.broken == []
    assert set(storm.statuses) == {200}


def test_replicas_end_when_their_server_is_killed(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}", "--replicas", 2) as server:
        pids = [each["pid"] for each in server.replicas()]
        server.process.kill()
        server.process.wait()
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(30)
            assert not psutil.pid_exists(pid)


def test_requests_that_are_given_up_cost_nothing_and_spoil_no_batch(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    count = 10_000 if FULL else 1_500
    with serving(tmp_path, f"echo={model}", "--max-queue", 256) as server:
        for at in range(count):
            with socket.create_connection(server.address) as client:
                client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n" + b"%05d" % at)
                # As a client that is killed: the kernel sends a reset.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.until(lambda it: it.ask("/readyz").json()["models"]["echo"][0]["waiting"] == 0)
        with Storm(server) as storm:
            storm.until_answered(500)
        assert set(storm.statuses) == {200}
        assert storm.wrong == storm.broken == []
        server.until(lambda it: all(each["requests"] == 0 for each in it.replicas()))


def test_many_idle_connections_and_half_requests_stop_nobody(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    count = 8_000 if FULL else 800
    with serving(tmp_path, f"echo={model}") as server, contextlib.ExitStack() as stack:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        for at in range(count):
            client = stack.enter_context(socket.create_connection(server.address))
            client.sendall((b"", b"POST /sc", b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")[at % 3])
        with Storm(server, clients=8) as storm:
            storm.until_answered(200)
        assert set(storm.statuses) == {200}
        assert process.memory_info().rss - before < 20_000 * count + (32 << 20)


def flood(client: socket.socket) -> None:
    """Send a body that has no end."""
    while True:
        client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def test_bodies_that_are_too_large_are_refused_and_not_kept(tmp_path: Path) -> None:
    model = echo(tmp_path / "echo.py")
    with serving(tmp_path, f"echo={model}", "--max-body", 1) as server:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        with socket.create_connection(server.address) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n" + b"x" * 1000)
            assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(server.address) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(OSError):  # what is sent after the refusal is forgotten, for a second
                flood(client)
        assert process.memory_info().rss - before < 48 << 20
        assert server.ask("/score", b"fine").status == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03" * 100,
        b"GET\r\n\r\n",
        b"POST /score HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /score HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /score HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    ],
)
def test_garbage_is_refused_and_costs_only_its_connection(echoing: Serving, garbage: bytes) -> None:
    with socket.create_connection(echoing.address, timeout=30) as client:
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(65536):
                answer += more
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")), answer
    assert echoing.ask("/score", b"fine").json()["text"] == "fine"


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("echo")
    with serving(folder, f"echo={echo(folder / 'echo.py')}") as server:
        yield server
