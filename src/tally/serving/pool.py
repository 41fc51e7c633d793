"""The replicas of one version of a model, and the queue before them. Everything here runs in the server's event loop.

Requests wait here, in one queue, until a replica has room: it is given what it can score next while it scores, and no
more. So the death of a replica costs the requests that it was given, and no others.

A replica that dies is noticed as its socket closes. One that hangs does not answer pings and uses no processor; one
that computes for long uses it, and has until the requests' timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import psutil

from tally.errors import ModelLoadError
from tally.models.reference import ModelRef
from tally.processes import command, environment
from tally.serving.messages import (
    Answer,
    Batch,
    Call,
    Cancel,
    Description,
    Failed,
    Loaded,
    Ping,
    Pong,
    Stop,
    ToReplica,
    for_server,
    framed,
)
from tally.serving.metrics import PoolMetrics
from tally.serving.protocols.base import RequestError
from tally.serving.settings import Limits

log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
"""Seconds between two looks at replicas and at what waits."""
SILENT_SECONDS = 0.6
"""A replica that has not answered a ping for so long is given nothing more."""
STABLE_SECONDS = 10.0
"""A replica that was ready for so long is replaced at once; others after a pause that grows."""
LONGEST_PAUSE = 30.0
BATCHES_AHEAD = 2
"""A replica is given so many batches' worth of requests: one that is scored, and what is decoded meanwhile."""
SECONDS_AHEAD = 0.01
"""Of a model that scores quickly, so many seconds' worth: it would else wait for the server."""

_ids = itertools.count(1)


class Pending:
    """A request that waits for its answer. deadline: ``time.monotonic()``.

    done: gets the answer, or the RequestError, once. Never after :meth:`Pool.abandon`.
    """

    __slots__ = ("call", "deadline", "done", "over", "replica")

    def __init__(
        self,
        protocol: str,
        body: bytes,
        parameters: dict[str, str],
        deadline: float,
        done: Callable[[Answer | RequestError], None],
    ) -> None:
        self.call = Call(next(_ids), protocol, body, parameters, time.monotonic())
        self.deadline = deadline
        self.done = done
        self.over = False
        self.replica: Replica | None = None

    def finish(self, outcome: Answer | RequestError) -> None:
        if not self.over:
            self.over = True
            self.done(outcome)


class Replica(asyncio.Protocol):
    """One process, as the server sees it. state: starting, ready, ending (is given nothing more), or gone."""

    def __init__(self, pool: Pool, process: subprocess.Popen[bytes]) -> None:
        self.pool, self.process = pool, process
        self.state: Literal["starting", "ready", "ending", "gone"] = "starting"
        self.since = self.heard = time.monotonic()
        self.given: dict[int, Pending] = {}
        self.description: Description | None = None
        self.silent = False
        self.hung = False
        self.failure: Failed | None = None
        self.answered = time.monotonic()
        self._batch_seconds = SECONDS_AHEAD
        self._used = -1.0
        self._used_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._frames = for_server()
        self._outgoing: list[bytes] = []

    # -- the socket -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=1 << 26)

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        self.silent = False
        try:
            for message in self._frames.feed(data):
                match message:
                    case Answer():
                        self._answer(message)
                    case Batch():
                        self._batch_seconds += 0.2 * (message.seconds - self._batch_seconds)
                        self.pool.metrics.batch(message)
                    case Pong():
                        pass
                    case Loaded():
                        self._loaded(message.description)
                    case Failed():
                        self.failure = message
        except Exception:
            log.exception("replica %d of %s cannot be understood", self.process.pid, self.pool)
            self.kill()
            return
        self.pool.dispatch()

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.lost(self)

    def send(self, message: ToReplica) -> None:
        """Send it with all others of this turn of the event loop."""
        if not self._outgoing:
            self.pool.loop.call_soon(self._flush)
        self._outgoing.append(framed(message))

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    # -- calls ------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many calls more it may be given."""
        if self.state != "ready" or self.silent:
            return 0
        assert self.description is not None
        ahead = 1 if self.description.responds else self.description.max_batch
        batches = max(BATCHES_AHEAD, min(SECONDS_AHEAD / max(self._batch_seconds, 1e-4), 16))
        return min(int(batches * ahead), 4096) - len(self.given)

    def give(self, pending: Pending) -> None:
        if not self.given:
            self.answered = time.monotonic()
        pending.replica = self
        self.given[pending.call.id] = pending
        self.send(pending.call)

    def _answer(self, answer: Answer) -> None:
        self.answered = self.heard
        pending = self.given.pop(answer.id, None)
        if pending is not None:
            pending.finish(answer)
        if self.state == "ending" and not self.given:
            self.send(Stop())

    def _loaded(self, description: Description) -> None:
        if self.state == "starting":
            self.state, self.description, self.since = "ready", description, time.monotonic()
            self.pool.became_ready(self)

    # -- its end ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Give it nothing more; it ends once it has answered what it was given."""
        if self.state == "starting":
            self.kill()
        elif self.state == "ready":
            self.state = "ending"
            if not self.given:
                self.send(Stop())

    def kill(self) -> None:
        """End it now, with what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def look(self, now: float) -> None:
        """Ask whether it is alive, and kill it if it hangs."""
        if self.state == "starting":
            if now - self.since > self.pool.limits.load_timeout:
                self.failure = Failed(f"loading took longer than {self.pool.limits.load_timeout:g} s")
                self.kill()
            return
        self.send(Ping())
        if now - self.heard > SILENT_SECONDS:
            self.silent = True
            if self._idles(now):
                log.warning("replica %d of %s hangs: it is replaced", self.process.pid, self.pool)
                self.hung = True
                self.kill()
                self.pool.lost(self)
                return
        else:
            self._used = -1.0
        if self.given and now - self.answered > self.pool.limits.timeout + 1:
            log.warning("replica %d of %s has not answered for too long: it is replaced", self.process.pid, self.pool)
            self.hung = True
            self.kill()

    def _idles(self, now: float) -> bool:
        """Whether it is stopped; or has used no processor since a while ago, and none of its threads wants any."""
        try:
            process = psutil.Process(self.process.pid)
            if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                return True
            times = process.cpu_times()
        except psutil.Error:
            return False  # it is gone, and the socket will say so
        used = times.user + times.system
        if used != self._used or _wants_processor(self.process.pid):
            self._used, self._used_at = used, now
            return False
        return now - self._used_at >= SILENT_SECONDS


def _wants_processor(pid: int) -> bool:
    """Whether a thread is running, waits for a processor on a busy machine, or for a disk. Only known on Linux."""
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if file.read_text("utf-8", "replace").rpartition(")")[2].split()[0] in "RD":
                return True
    return False


class Pool:
    """Starts replicas, keeps as many as wanted, and hands them what waits. Used in the event loop only.

    changed: called when a replica comes or goes.
    """

    def __init__(
        self,
        name: str,
        version: str,
        ref: ModelRef,
        limits: Limits,
        *,
        metrics: PoolMetrics,
        changed: Callable[[], None],
    ) -> None:
        self.name, self.version, self.ref, self.limits = name, version, ref, limits
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self.replicas: list[Replica] = []
        self.description: Description | None = None
        self.failure: Failed | None = None
        self.least, self.most = limits.replicas
        self.wanted = max(self.least, 0)
        self._changed = changed
        self._queue: deque[Pending] = deque()
        self._queued = 0
        self._closing = False
        self._failures = 0
        self._start_at = 0.0
        self._crowded = 0
        self._used_at = time.monotonic()
        self._ready = asyncio.Event()
        self._empty = asyncio.Event()
        self._ticking = self.loop.create_task(self._tick())

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"

    # -- requests ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """How many replicas answer; one that computes without a word counts, until it is known to hang."""
        return sum(each.state == "ready" for each in self.replicas)

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica."""
        return self._queued

    @property
    def working(self) -> int:
        """Requests that replicas have been given."""
        return sum(len(each.given) for each in self.replicas)

    def submit(self, pending: Pending) -> None:
        """Have a replica answer it. It is refused at once if too many wait, or no replica can come."""
        self._used_at = pending.call.arrived
        if self.limits.payloads is not None:
            pending.call.sampled = random.random() < self.limits.payload_share  # noqa: S311 - no secret
        if self._queued >= self.limits.max_queue:
            text = f"{self.name} is busy: {self._queued} requests wait already"
            pending.finish(RequestError(429, text, **{"Retry-After": "1"}))
            return
        if self.failure is not None and self.least > 0 and not self.replicas_alive:
            pending.finish(self._no_replica())
            return
        if not self.replicas and self.wanted == 0 and not self._closing:
            self.wanted = 1
            self._fit()
        self._queue.append(pending)
        self._queued += 1
        self.dispatch()

    @property
    def replicas_alive(self) -> bool:
        """Whether there are any that answer or may soon."""
        return any(each.state in ("starting", "ready") for each in self.replicas)

    def _no_replica(self) -> RequestError:
        why = f": {self.failure.message}" if self.failure is not None else ""
        return RequestError(503, f"{self.name} has no replica{why}", **{"Retry-After": "1"})

    def abandon(self, pending: Pending) -> None:
        """Nobody waits for it any more: if it has not been scored, it is not."""
        if pending.over:
            return
        pending.over = True
        replica = pending.replica
        if replica is None:
            self._queued -= 1
        elif replica.given.get(pending.call.id) is pending:
            replica.send(Cancel(pending.call.id))

    def dispatch(self) -> None:
        """Hand what waits to replicas that have room, the least busy first."""
        queue = self._queue
        while queue:
            if queue[0].over:
                queue.popleft()
                continue
            best, room = None, 0
            for each in self.replicas:
                if (free := each.room) > room:
                    best, room = each, free
            if best is None:
                return
            self._queued -= 1
            best.give(queue.popleft())

    # -- replicas ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the replicas, and wait until one is ready. Raises ModelLoadError."""
        self._fit()
        if self.wanted == 0:
            return
        await self._ready.wait()
        if self.failure is not None:
            raise ModelLoadError(self.failure.message, hint=self.failure.hint)

    def resize(self, least: int, most: int) -> None:
        """Keep so many replicas from now on."""
        self.least, self.most = least, most
        self.wanted = min(max(self.wanted, least), most)
        self._fit()

    async def close(self, seconds: float) -> None:
        """Answer what waits, then end the replicas; those that take longer are killed."""
        self._closing = True
        until = time.monotonic() + seconds
        while (self._queued or self.working) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.wanted = 0
        for pending in self._queue:
            pending.finish(RequestError(503, f"{self.name} is ending", **{"Retry-After": "1"}))
        self._queue.clear()
        self._queued = 0
        for each in list(self.replicas):
            each.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(1.0, until - time.monotonic())):
                while self.replicas:
                    self._empty.clear()
                    await self._empty.wait()
        self._ticking.cancel()
        for each in list(self.replicas):
            each.kill()

    def became_ready(self, replica: Replica) -> None:
        """A replica has loaded its model."""
        self.description, self.failure = replica.description, None
        for sentence in replica.description.assumed if replica.description and not self._ready.is_set() else ():
            log.warning("%s: %s", self, sentence)
        self._ready.set()
        self._changed()

    def lost(self, replica: Replica) -> None:
        """A replica is gone: what it was given is answered, and another takes its place."""
        if replica.state == "gone":
            return
        was, replica.state = replica.state, "gone"
        self.replicas.remove(replica)
        now = time.monotonic()
        status, what = (504, "hung") if replica.hung else (503, "died")
        for pending in replica.given.values():
            pending.finish(RequestError(status, f"the replica of {self.name} that had this request {what}"))
        replica.given.clear()
        if was in ("starting", "ready") and not self._closing:
            self.metrics.lost(what)
            stable = was == "ready" and now - replica.since >= STABLE_SECONDS
            self._failures = 0 if stable else self._failures + 1
            pause = (
                0.0
                if stable or (was == "ready" and self._failures == 1)
                else min(0.1 * 2**self._failures, LONGEST_PAUSE)
            )
            self._start_at = now + pause
            if was == "starting":
                self.failure = replica.failure or Failed("a replica ended while it loaded its model; the log says more")
                self._ready.set()
            elif replica.failure is not None:
                log.error("replica %d of %s ended: %s", replica.process.pid, self, replica.failure.message)
            else:
                log.warning("replica %d of %s %s", replica.process.pid, self, what)
            if not pause:
                self.loop.call_soon(self._fit)
        self._empty.set()
        self._changed()

    def _fit(self) -> None:
        """Start or end replicas until there are as many as wanted."""
        if self._closing:
            return
        alive = [each for each in self.replicas if each.state in ("starting", "ready")]
        if len(alive) < self.wanted and time.monotonic() >= self._start_at:
            for _ in range(self.wanted - len(alive)):
                try:
                    self.replicas.append(self._spawn())
                except OSError as error:
                    self.failure = Failed(f"no process can be started: {error}")
                    self._start_at = time.monotonic() + 1.0
                    self._ready.set()
                    break
        for each in sorted(alive, key=lambda r: (r.state == "ready", len(r.given)))[: len(alive) - self.wanted]:
            each.end()

    def _spawn(self) -> Replica:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                command("tally.serving.replica", str(theirs.fileno())),
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment(),
                start_new_session=True,
            )
        given = {
            "name": self.name,
            "version": self.version,
            "model": self.ref.to_dict(),
            "device": self.limits.device,
            "max_batch": self.limits.max_batch,
            "max_delay": self.limits.max_delay,
            "threads": self.limits.threads,
            "payloads": self.limits.payloads,
            "decoding": asdict(self.limits.decoding),
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(given).encode() + b"\n")
        replica = Replica(self, process)
        ours.setblocking(False)
        self.loop.create_task(self._connect(replica, ours))
        threading.Thread(target=self._wait, args=(process,), daemon=True).start()
        return replica

    async def _connect(self, replica: Replica, ours: socket.socket) -> None:
        await self.loop.create_unix_connection(lambda: replica, sock=ours)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()  # so that it leaves no zombie; its socket tells that it is gone

    # -- time -------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                now = time.monotonic()
                for each in list(self.replicas):
                    each.look(now)
                self._expire(now)
                self._scale(now)
                self._fit()
            except Exception:  # replicas have to be looked after, whatever has happened
                log.exception("looking at the replicas of %s", self)

    def _expire(self, now: float) -> None:
        if len(self._queue) > 2 * self._queued + 64:  # most of it has been abandoned
            self._queue = deque(each for each in self._queue if not each.over)
        for pending in self._late(now):
            replica = pending.replica
            if replica is None:
                self._queued -= 1
            else:
                replica.send(Cancel(pending.call.id))
            seconds = now - pending.call.arrived
            pending.finish(RequestError(504, f"{self.name} has not answered within {seconds:.1f} s"))

    def _late(self, now: float) -> Iterator[Pending]:
        yield from [each for each in self._queue if not each.over and now > each.deadline]
        for replica in self.replicas:
            yield from [each for each in replica.given.values() if not each.over and now > each.deadline]

    def _scale(self, now: float) -> None:
        """More replicas while requests wait, fewer when none come."""
        if self.most <= self.least or self._closing:
            return
        starting = any(each.state == "starting" for each in self.replicas)
        self._crowded = self._crowded + 1 if self._queued and not starting else 0
        if self._crowded >= 3 and self.wanted < self.most:
            self._crowded = 0
            self.wanted += 1
        elif self.wanted > self.least and now - self._used_at > self.limits.idle and not self._queued:
            self.wanted = self.least


def facts(pool: Pool) -> dict[str, Any]:
    """What the pool is like now, for people."""
    return {
        "version": pool.version,
        "model": str(pool.ref),
        "hash": pool.ref.hash,
        "replicas": [
            {"pid": each.process.pid, "state": "silent" if each.silent else each.state, "requests": len(each.given)}
            for each in pool.replicas
        ],
        "wanted": pool.wanted,
        "ready": pool.ready,
        "waiting": pool.waiting,
        "failure": None if pool.failure is None else pool.failure.message,
    }
