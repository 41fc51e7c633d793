"""Workers on a Ray cluster.

Each slot is an actor that reserves what one worker needs. The actor holds a local engine of one slot, which runs
the tasks in a child process: so a crash, a hang or too much memory costs the same, and leaves the same traces, as on
one machine. The actor only passes bytes on, in both directions.

Tasks and results describe chunks and how they ended, in some kilobytes each. Ray carries messages of up to 100 KiB
inside its calls, and larger ones through its object store, which works too. Items never travel through Ray.

Three threads: the supervisor decides; the *caller* makes every call into Ray, because a call may hang while the
cluster's head is away; the *monitor* checks whether it is.
"""

from __future__ import annotations

import logging
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tally.engines import logs
from tally.engines.base import Limits
from tally.engines.local import MEMORY_SHARE
from tally.engines.ray.connection import connect, disconnect
from tally.engines.ray.host import Host, News, versions
from tally.engines.supervised import Slot, SupervisedEngine, Task
from tally.errors import ClusterLostError, TallyError, WorkerCrashedError, WorkerError

INLINE_BYTES = 100_000
"""The most that Ray sends inside a call; larger values go through its object store."""
LOST_SECONDS = 40.0
"""How long the head may be away before everything fails. Ray itself ends a process whose head is away for 60 s."""
HEAD_CHECK_SECONDS = 2.0
"""Seconds between checks of the head."""
ENDING_SECONDS = 10.0
"""How long a worker on another node may take to end in order."""
START_SECONDS = 5.0
"""How long a worker may take to start before that is worth a remark."""
FAILED_STARTS = 3
"""After this many workers in a row were lost while they started, each further loss fails one task."""


class _Slot(Slot):
    """One actor, which starts once a node has room for it.

    requested: when it was asked for (``time.monotonic()``). begun: whether its worker has been started.
    discarded: whether its answers no longer matter. tasks: how many it was given.
    """

    def __init__(self) -> None:
        self.actor: Any = None
        self.node = "a node that is not known yet"
        self.requested = time.monotonic()
        self.begun = self.discarded = False
        self.tasks = 0

    @property
    def ready(self) -> bool:
        return self.begun


class RayEngine(SupervisedEngine[_Slot]):
    """See :mod:`tally.engines.ray.engine`.

    Each worker reserves one CPU by default.

    The cluster is the one that Ray is connected to in this process, or that Ray's own rules lead to
    (``RAY_ADDRESS``, ``ray start`` on this machine). If there is none, a Ray is started for this process.
    """

    def __init__(
        self,
        *,
        cpus: float | None = None,
        gpus: float | None = None,
        memory: int | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(cpus=cpus, gpus=gpus, memory=memory, resources=resources)
        self._cpus = 1.0 if cpus is None else cpus
        needs = {"CPU": self._cpus, "GPU": gpus or 0, "memory": memory or 0, **(resources or {})}
        self._needs: dict[str, float] = {name: amount for name, amount in needs.items() if amount}
        self._ray: Any = None
        self._ours = False
        self._remark: str | None = None

    # Called by the engine's user.

    def start(
        self,
        setup: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        slots: int,
        limits: Limits,
        log: Path | None = None,
    ) -> None:
        self._connect()
        packed = pickle.dumps((setup, args))
        self._setup = packed if len(packed) < INLINE_BYTES else self._ray.put(packed)
        self._limits, self._log = limits, log
        self._ending: dict[_Slot, float] = {}
        self._failed_starts, self._not_before = 0, 0.0
        self._asked_why, self._remark = 0.0, None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._make_calls, args=(self._calls,), name="tally-ray-calls", daemon=True).start()
        head = self._ray.get_runtime_context().gcs_address
        threading.Thread(target=self._watch_head, args=(head, self._ended), name="tally-ray-head", daemon=True).start()
        self._launch(slots)

    @property
    def host(self) -> str | None:
        self._connect()
        return str(self._ray.util.get_node_ip_address())

    def default_slots(self) -> int:
        """As many as the cluster's nodes have room for now; at least one."""
        self._connect()
        return max(1, sum(_room(node, self._needs) for node in self._nodes()))

    def default_memory(self, slots: int) -> int | None:
        """A worker's part of :data:`~tally.engines.local.MEMORY_SHARE` of the smallest node that has room for one."""
        self._connect()
        shares = [
            node["memory"] * MEMORY_SHARE / min(slots, room)
            for node in self._nodes()
            if node.get("memory") and (room := _room(node, self._needs))
        ]
        return int(min(shares)) if shares else None

    def remark(self) -> str | None:
        return self._remark

    def stop(self, *, kill: bool = False) -> None:
        if self._thread is not None:
            super().stop(kill=kill)
            self._ended.set()
            self._calls.put(None)
        if self._ours and self._ray is not None:
            disconnect(self._ray)
            self._ours = False
        self._ray = None

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        if self._ray is not None:
            return
        self._ray, self._ours = connect()

    # In the supervisor's thread.

    def _fit(self) -> None:
        idle = sorted((slot for slot in self._slots if slot.task is None), key=lambda slot: slot.begun)
        for slot in idle[: max(0, len(self._slots) - self._wanted)]:
            self._remove(slot)
        if time.monotonic() < self._not_before:
            return
        while len(self._slots) < self._wanted:
            slot = _Slot()
            self._slots.append(slot)
            self._calls.put(partial(self._create, slot))

    def _remove(self, slot: _Slot, *, kill: bool = False, lost: bool = False) -> None:
        """End the actor: one that has begun may clean up first, and an event tells when it has."""
        self._slots.remove(slot)
        slot.discarded = True
        if slot.begun and not lost:
            self._ending[slot] = time.monotonic() + ENDING_SECONDS
            self._call("ended", slot, "end", kill)
        else:
            self._calls.put(partial(self._destroy, slot))

    def _give(self, slot: _Slot, task: Task) -> None:
        slot.tasks += 1
        backlog = None if task.reports is None else task.reports.backlog
        self._call("news", slot, "run", slot.tasks, task.packed, task.reports is not None, backlog)

    def _ask_to_stop(self, slot: _Slot) -> None:
        self._call("asked", slot, "stop", slot.tasks, slot.stop_seconds)

    def _grace(self) -> float:
        return ENDING_SECONDS  # the node kills its worker itself, if it can

    def _kill(self, slot: _Slot) -> None:
        if (task := slot.vacate()) is not None:
            task.future.set_exception(slot.stopped())
        self._remove(slot, lost=True)

    def _handle(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("facts", slot, outcome) if not slot.discarded:
                if (error := outcome.exception()) is None:
                    self._check(outcome.result())
                    slot.node = outcome.result()["node"]
                    self._call("begun", slot, "begin", self._setup, self._limits, self._threads, bool(self._log))
                else:
                    self._lost_at_start(slot, error)
            case ("begun", slot, outcome) if not slot.discarded:
                if (error := outcome.exception()) is None:
                    slot.begun, self._failed_starts = True, 0
                else:
                    self._lost_at_start(slot, error)
            case ("news", slot, outcome):
                self._settle(slot, outcome)
            case ("ended", slot, outcome):
                if self._ending.pop(slot, None) is not None:
                    if outcome.exception() is None:
                        self._append_to_log(outcome.result())
                    self._calls.put(partial(self._destroy, slot))
            case ("remark", text):
                self._remark = text
            case ("head", error):
                raise error

    @property
    def _threads(self) -> int:
        return max(1, int(self._cpus))

    def _settle(self, slot: _Slot, outcome: Future[News]) -> None:
        if (error := outcome.exception()) is not None:
            if (task := slot.vacate()) is not None:
                task.future.set_exception(self._explain(slot, error))
            if not slot.discarded:
                self._remove(slot, lost=True)
            return
        reports, answer = outcome.result()
        if slot.task is not None:
            slot.task.receive(reports)
        if answer is None:
            if slot.task is not None:
                self._call("news", slot, "more")
            return
        ok, data, text, output = answer
        self._append_to_log(output)
        if (task := slot.vacate()) is None:
            return
        if text is not None:
            task.deliver(task.future, ok, data, text)
        else:
            task.future.set_exception(pickle.loads(data))  # noqa: S301 - from the engine on the node

    def _lost_at_start(self, slot: _Slot, error: BaseException) -> None:
        """A worker was lost before it could be given a task: no task's fault, unless it keeps happening."""
        self._raise_if_permanent(error)
        self._remove(slot, lost=True)
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            self._not_before = time.monotonic() + 1
            while self._waiting:
                future = self._waiting.popleft().future
                if future.set_running_or_notify_cancel():
                    future.set_exception(self._explain(slot, error))
                    break

    def _check(self, facts: Mapping[str, str]) -> None:
        """Raises TallyError if the node has other versions than this process."""
        here = versions()
        other = [f"{name} {facts[name]} there, {here[name]} here" for name in here if facts[name] != here[name]]
        if other:
            raise TallyError(
                f"the node {facts['node']} does not have the coordinator's versions: {'; '.join(other)}",
                hint="Every node of the cluster needs the same image, or the same packages as where the job starts.",
            )

    def _raise_if_permanent(self, error: BaseException) -> None:
        """Raises TallyError for a failure that every other worker would have too."""
        text = str(error)
        if getattr(error, "actor_init_failed", False) or "No module named" in text:
            reasons = [line.strip() for line in text.splitlines() if "Error: " in line]
            raise TallyError(
                f"a node of the cluster cannot start a worker of Tally: {reasons[-1] if reasons else _one_line(error)}",
                hint="Every node needs the coordinator's version: "
                f"pip install 'tally-scoring[ray]=={versions()['Tally']}'",
            )
        if type(error).__name__ in ("RuntimeEnvSetupError", "ActorUnschedulableError"):
            raise TallyError(f"the cluster cannot start a worker: {_one_line(error)}")

    def _explain(self, slot: _Slot, error: BaseException) -> WorkerError:
        name = type(error).__name__
        if name == "OutOfMemoryError":
            return WorkerCrashedError(
                f"the worker on the node {slot.node} was ended, because the node ran out of memory",
                hint="Reserve what a worker needs with --memory, so that fewer of them share a node.",
            )
        if name == "NodeDiedError" or "node has died" in str(error) or "node died" in str(error).lower():
            return WorkerCrashedError(f"the node {slot.node} was lost, and the worker with it")
        if name == "ActorUnavailableError":
            return WorkerCrashedError(f"the worker on the node {slot.node} can no longer be reached")
        return WorkerCrashedError(f"the worker on the node {slot.node} was lost: {_one_line(error)}")

    def _watch(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, deadline in self._ending.items() if now > deadline]:
            del self._ending[slot]
            self._calls.put(partial(self._destroy, slot))
        late = sum(not slot.begun and now - slot.requested > START_SECONDS for slot in self._slots)
        if not late:
            self._remark = None
        elif now - self._asked_why > START_SECONDS:
            self._asked_why = now
            self._calls.put(partial(self._explain_delay, late, len(self._slots)))

    def _append_to_log(self, output: bytes) -> None:
        if output and self._log is not None:
            with suppress(OSError), self._log.open("ab") as file:
                file.write(output)
            logs.bound(self._log)

    def _end(self, *, kill: bool) -> None:
        for slot in list(self._slots):
            if (task := slot.vacate()) is not None:
                task.future.set_exception(WorkerCrashedError("the engine was stopped"))
            self._remove(slot, kill=kill)
        done = threading.Event()
        deadline = time.monotonic() + ENDING_SECONDS  # workers answer without a head, too
        while self._ending and time.monotonic() < deadline:
            with suppress(queue.Empty):
                match self._events.get(timeout=max(0, deadline - time.monotonic())):
                    case ("submit", submitted):
                        submitted.future.cancel()
                    case ("ended" | "news", *_) as event:
                        self._handle(event)
        for slot in self._ending:
            self._calls.put(partial(self._destroy, slot))
        self._calls.put(done.set)
        done.wait(max(0, deadline - time.monotonic()))

    def _call(self, event: str, slot: _Slot, method: str, *arguments: Any) -> None:
        """Call the actor; an event of that name brings its answer or failure."""
        self._calls.put(partial(self._invoke, event, slot, method, arguments))

    # In the caller's thread.

    def _make_calls(self, calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (call := calls.get()) is not None:
            try:
                call()
            except Exception as error:
                logging.getLogger(__name__).debug("a call into Ray failed", exc_info=error)

    def _create(self, slot: _Slot) -> None:
        if slot.discarded:
            return
        needs = dict(self._needs)
        options = {
            "num_cpus": needs.pop("CPU", 0),
            "num_gpus": needs.pop("GPU", 0),
            "memory": needs.pop("memory", None),
            "resources": needs,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 3,
        }
        try:
            slot.actor = self._ray.remote(Host).options(**options).remote()
        except Exception as error:
            self._post("facts", slot, _failed_with(error))
        else:
            self._invoke("facts", slot, "facts", ())

    def _invoke(self, event: str, slot: _Slot, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            outcome = getattr(slot.actor, method).remote(*arguments).future()
        except Exception as error:
            outcome = _failed_with(error)
        outcome.add_done_callback(partial(self._post, event, slot))

    def _post(self, event: str, slot: _Slot, outcome: Future[Any]) -> None:
        self._events.put((event, slot, outcome))

    def _destroy(self, slot: _Slot) -> None:
        if slot.actor is not None:
            self._ray.kill(slot.actor)
            slot.actor = None

    def _explain_delay(self, late: int, slots: int) -> None:
        free, total = self._ray.available_resources(), self._ray.cluster_resources()
        nodes = self._ray._private.state.available_resources_per_node()
        text = None
        if not any(_room(node, self._needs) for node in nodes.values()):  # otherwise it is only starting
            text = (
                f"{late} of {slots} workers have not started: each needs {_amounts(self._needs, self._needs)}; "
                f"the cluster has {_amounts(total, self._needs)}, of which {_amounts(free, self._needs)} are free"
            )
        self._events.put(("remark", text))

    # In the monitor's thread.

    def _watch_head(self, head: str, ended: threading.Event) -> None:
        host, _, port = head.rpartition(":")
        seen = time.monotonic()
        while not ended.wait(HEAD_CHECK_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_CHECK_SECONDS).close()
                seen = time.monotonic()
            except OSError as error:
                if time.monotonic() - seen > LOST_SECONDS:
                    lost = ClusterLostError(
                        f"the head of the Ray cluster, {head}, has been away for {LOST_SECONDS:g} s: {error}",
                        hint="The job can be resumed once the cluster is back; what was committed is kept.",
                    )
                    self._events.put(("head", lost))
                    return


def _room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers the node has room for; if they need nothing, one for each CPU."""
    needs = needs or {"CPU": 1.0}
    return int(min(node.get(name, 0) / amount + 1e-6 for name, amount in needs.items()))


def _amounts(found: Mapping[str, float], names: Mapping[str, float]) -> str:
    def amount(name: str) -> str:
        value = found.get(name, 0)
        return f"{value / 2**30:.3g} GiB memory" if name == "memory" else f"{value:g} {name}"

    return ", ".join(map(amount, names)) or "nothing"


def _one_line(error: BaseException) -> str:
    """Ray's description of an error, in one line."""
    facts = ("class_name:", "actor_id:", "pid:", "namespace:", "ip:")
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(facts)]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


def _failed_with(error: BaseException) -> Future[Any]:
    outcome: Future[Any] = Future()
    outcome.set_exception(error)
    return outcome
