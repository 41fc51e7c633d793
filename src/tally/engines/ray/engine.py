"""Workers on a Ray cluster.

Each slot is an actor that reserves what one worker needs. The actor holds a local engine of one slot, which runs
the tasks in a child process: what a crash, a hang or too much memory costs, and what is known about it afterwards,
is the same as on one machine. The actor only hands bytes on, in both directions.

Tasks and results are descriptions of chunks and of what became of them, some kilobytes each: Ray carries messages
of up to 100 KiB inside its calls, and larger ones by way of its object store, which works and is not what it is
for here. Items never travel through Ray.

Three threads: the supervisor decides; the *caller* makes every call into Ray, because a call may hang for as long as
the cluster's head is away; the *lookout* looks whether it is.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tally.engines.base import Limits, Reports
from tally.engines.local import MEMORY_SHARE, LocalEngine, PackedTask, new_folder
from tally.engines.mailbox import Inbox
from tally.engines.ray.cluster import require
from tally.engines.supervised import Slot, SupervisedEngine, Task
from tally.errors import ClusterLostError, TallyError, WorkerCrashedError, WorkerError
from tally.storage import mask

INLINE_BYTES = 100_000
"""What Ray sends inside a call; more it puts into its object store."""
STORE_BYTES = 200 * 2**20
"""Size of the object store of a Ray that is started here; items do not go through it."""
LOST_SECONDS = 40.0
"""How long the head may be away before everything fails. Ray itself ends a process whose head is away for 60 s."""
KNOCK_SECONDS = 2.0
"""How often the head is looked for."""
ENDING_SECONDS = 10.0
"""How long a worker on another node may take to end in order."""
LEAVING_SECONDS = 120.0
"""How long Ray may take to disconnect, before this process can be connected to a cluster again."""
ROOM_SECONDS = 5.0
"""After which a worker that does not start is worth a remark."""
FALSE_STARTS = 3
"""So many workers in a row may be lost while they start; then that is the failure of a task each."""
SAID_BYTES = 256 * 1024
"""How much of what a worker printed during one task is carried to the log."""


# -- on a node -------------------------------------------------------------------------------------

_Answer = tuple[bool, bytes, str | None, bytes]
"""Whether it went well; the pickled result or exception; the latter's traceback, or None where the worker was lost;
what it printed meanwhile."""

_News = tuple[list[bytes], _Answer | None]
"""Pickled reports of a task, and its answer once it has ended."""


class _Run:
    """A task on its node. Used by one thread, except for :meth:`wake`."""

    def __init__(self, task: bytes, reports: Reports | None) -> None:
        self.task = PackedTask(Future(), task, reports, on_reports=self.wake)
        self.task.future.add_done_callback(self.wake)
        self._inbox: Inbox | None = None
        self._woken = threading.Event()

    def wake(self, cause: Inbox | Future[Any]) -> None:
        """There may be reports, or it has ended."""
        if isinstance(cause, Inbox):
            self._inbox = cause
        self._woken.set()

    def news(self) -> tuple[list[bytes], bool]:
        """Wait until there are reports, or it has ended; those that were given before are received by now."""
        while True:
            if self._inbox is not None:
                self._inbox.release()
            self._woken.wait()
            self._woken.clear()
            ended = self.task.future.done()  # looked at first: after it, nothing comes
            reports = self._inbox.read() if self._inbox is not None else []
            if reports or ended:
                return reports, ended


class _Host:
    """The actor: a local engine of one slot. ``end`` and ``stop`` may be called while ``run`` or ``more`` runs."""

    def facts(self) -> dict[str, str]:
        """The first call, and one that has to be understood by every version: what is here."""
        import ray

        where = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return {**_versions(), "node": f"{socket.gethostname()} ({address}, {where[:8]})"}

    def begin(self, setup: bytes, memory: int | None, threads: int, logged: bool) -> None:
        folder = new_folder()
        self._log = folder / "worker.log" if logged else None
        self._read = 0
        self._engine = LocalEngine()
        self._engine.start_packed(setup, folder, threads, slots=1, limits=Limits(memory=memory), log=self._log)

        self._lock = threading.Lock()  # calls that run at once may overtake each other
        self._number = 0
        self._to_stop = (0, 0.0)

    def run(self, number: int, task: bytes, reports: bool, backlog: int | None) -> _News:
        """Run a task, until it reports something or ends. number: of the tasks that this worker is given."""
        with self._lock:
            self._run = _Run(task, Reports(_not_here, backlog) if reports else None)
            self._engine.submit_packed(self._run.task)
            self._number = number
            if self._to_stop[0] == number:
                self._engine.stop_task(self._run.task.future, seconds=self._to_stop[1])
        return self.more()

    def more(self) -> _News:
        """Go on with the task, until it reports something or ends; what it reported before is received."""
        reports, ended = self._run.news()
        if not ended:
            return reports, None
        try:
            return reports, (*self._run.task.future.result(), self._said())
        except Exception as error:
            return reports, (False, pickle.dumps(error), None, self._said())

    def stop(self, number: int, seconds: float) -> None:
        """Stop that task, if it has not ended."""
        with self._lock:
            self._to_stop = (number, seconds)
            if self._number == number:
                self._engine.stop_task(self._run.task.future, seconds=seconds)

    def end(self, kill: bool) -> bytes:
        log, self._log = self._log, None
        file = log.open("rb") if log is not None and log.exists() else None
        self._engine.stop(kill=kill)  # and its folder is gone
        if file is None:
            return b""
        with file:
            return _tail(file.fileno(), self._read)[0]

    def _said(self) -> bytes:
        if self._log is None or not self._log.exists():
            return b""
        with self._log.open("rb") as file:
            said, self._read = _tail(file.fileno(), self._read)
        return said


def _not_here(report: Any) -> None:
    raise AssertionError("reports are received where the task was submitted")


def _tail(file: int, start: int) -> tuple[bytes, int]:
    """What the file holds from there on, its beginning left out where it is much; and where it ends."""
    end = os.fstat(file).st_size
    skipped = max(0, end - start - SAID_BYTES)
    said = os.pread(file, end - start - skipped, start + skipped)
    return (b"[%d bytes left out]\n" % skipped if skipped else b"") + said, end


def _versions() -> dict[str, str]:
    import ray

    from tally import __version__

    return {"Tally": __version__, "Python": platform.python_version(), "Ray": ray.__version__}


# -- in the coordinator ----------------------------------------------------------------------------


class _Slot(Slot):
    """One actor; it is there once its node has room for it."""

    def __init__(self) -> None:
        self.actor: Any = None
        self.node = "a node that is not known yet"
        self.asked = time.monotonic()
        self.begun = False
        self.over = False
        """Whether nothing is wanted of it any more."""
        self.tasks = 0
        """How many it was given."""

    @property
    def ready(self) -> bool:
        return self.begun


class RayEngine(SupervisedEngine[_Slot]):
    """See :mod:`tally.engines.ray.engine`.

    Each worker reserves one CPU, if nothing is said.

    The cluster is the one that Ray is connected to in this process, or that Ray's own rules lead to
    (``RAY_ADDRESS``, ``ray start`` on this machine); without any, a Ray is started for this process.
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
        self._false_starts, self._not_before = 0, 0.0
        self._inquired, self._remark = 0.0, None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._over = threading.Event()
        threading.Thread(target=self._make_calls, args=(self._calls,), name="tally-ray-calls", daemon=True).start()
        head = self._ray.get_runtime_context().gcs_address
        threading.Thread(target=self._look_out, args=(head, self._over), name="tally-ray-head", daemon=True).start()
        self._launch(slots)

    def default_slots(self) -> int:
        """As many as the cluster's nodes have room for now; at least one."""
        self._connect()
        return max(1, sum(_fits(node, self._needs) for node in self._nodes()))

    def default_memory(self, slots: int) -> int | None:
        """A worker's part of :data:`~tally.engines.local.MEMORY_SHARE` of the smallest node that has room for one."""
        self._connect()
        shares = [
            node["memory"] * MEMORY_SHARE / min(slots, room)
            for node in self._nodes()
            if node.get("memory") and (room := _fits(node, self._needs))
        ]
        return int(min(shares)) if shares else None

    def remark(self) -> str | None:
        return self._remark

    def stop(self, *, kill: bool = False) -> None:
        if self._thread is not None:
            super().stop(kill=kill)
            self._over.set()
            self._calls.put(None)
        if self._ours and self._ray is not None:
            _leave(self._ray)
            self._ours = False
        self._ray = None

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        if self._ray is not None:
            return
        require()
        ray = _import()
        if _leaving is not None:
            _leaving.join(LEAVING_SECONDS)
            if _leaving.is_alive():
                raise ClusterLostError(
                    f"Ray does not let go of its former cluster: waited for {LEAVING_SECONDS:g} s",
                    hint="Start a new process: tally jobs resume JOB",
                )
        if not ray.is_initialized():
            _initialize(ray)
            self._ours = True
        self._ray = ray

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
        """End the actor: in order, if it has begun, which then is told by an event."""
        self._slots.remove(slot)
        slot.over = True
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
        assert slot.stop_by is not None
        slot.stop_by += ENDING_SECONDS  # the node kills its worker itself, if it can

    def _kill(self, slot: _Slot) -> None:
        if (task := slot.vacate()) is not None:
            task.future.set_exception(slot.stopped())
        self._remove(slot, lost=True)

    def _handle(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("facts", slot, outcome) if not slot.over:
                if (error := outcome.exception()) is None:
                    self._check(outcome.result())
                    slot.node = outcome.result()["node"]
                    self._call("begun", slot, "begin", self._setup, self._limits.memory, self._threads, bool(self._log))
                else:
                    self._missed(slot, error)
            case ("begun", slot, outcome) if not slot.over:
                if (error := outcome.exception()) is None:
                    slot.begun, self._false_starts = True, 0
                else:
                    self._missed(slot, error)
            case ("news", slot, outcome):
                self._settle(slot, outcome)
            case ("ended", slot, outcome):
                if self._ending.pop(slot, None) is not None:
                    if outcome.exception() is None:
                        self._note(outcome.result())
                    self._calls.put(partial(self._destroy, slot))
            case ("remark", text):
                self._remark = text
            case ("head", error):
                raise error

    @property
    def _threads(self) -> int:
        return max(1, int(self._cpus))

    def _settle(self, slot: _Slot, outcome: Future[_News]) -> None:
        if (error := outcome.exception()) is not None:
            if (task := slot.vacate()) is not None:
                task.future.set_exception(self._explain(slot, error))
            if not slot.over:
                self._remove(slot, lost=True)
            return
        reports, answer = outcome.result()
        if slot.task is not None:
            slot.task.receive(reports)
        if answer is None:
            if slot.task is not None:
                self._call("news", slot, "more")
            return
        ok, data, text, said = answer
        self._note(said)
        if (task := slot.vacate()) is None:
            return
        if text is not None:
            task.deliver(task.future, ok, data, text)
        else:
            task.future.set_exception(pickle.loads(data))  # noqa: S301 - an error of ours, of the engine on the node

    def _missed(self, slot: _Slot, error: BaseException) -> None:
        """A worker was lost before it could be given a task: no task's fault, unless it goes on like that."""
        self._refuse(error)
        self._remove(slot, lost=True)
        self._false_starts += 1
        if self._false_starts >= FALSE_STARTS:
            self._not_before = time.monotonic() + 1
            while self._waiting:
                future = self._waiting.popleft().future
                if future.set_running_or_notify_cancel():
                    future.set_exception(self._explain(slot, error))
                    break

    def _check(self, facts: Mapping[str, str]) -> None:
        """Raises TallyError if the node has other versions than this process."""
        here = _versions()
        other = [f"{name} {facts[name]} there, {here[name]} here" for name in here if facts[name] != here[name]]
        if other:
            raise TallyError(
                f"the node {facts['node']} does not have the coordinator's versions: {'; '.join(other)}",
                hint="Every node of the cluster needs the same image, or the same packages as where the job starts.",
            )

    def _refuse(self, error: BaseException) -> None:
        """Raises TallyError for what no other worker would do better."""
        text = str(error)
        if getattr(error, "actor_init_failed", False) or "No module named" in text:
            reasons = [line.strip() for line in text.splitlines() if "Error: " in line]
            raise TallyError(
                f"a node of the cluster cannot start a worker of Tally: {reasons[-1] if reasons else _told(error)}",
                hint="Every node needs the coordinator's version: "
                f"pip install 'tally-scoring[ray]=={_versions()['Tally']}'",
            )
        if type(error).__name__ in ("RuntimeEnvSetupError", "ActorUnschedulableError"):
            raise TallyError(f"the cluster cannot start a worker: {_told(error)}")

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
        return WorkerCrashedError(f"the worker on the node {slot.node} was lost: {_told(error)}")

    def _watch(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, until in self._ending.items() if now > until]:
            del self._ending[slot]
            self._calls.put(partial(self._destroy, slot))
        late = sum(not slot.begun and now - slot.asked > ROOM_SECONDS for slot in self._slots)
        if not late:
            self._remark = None
        elif now - self._inquired > ROOM_SECONDS:
            self._inquired = now
            self._calls.put(partial(self._inquire, late, len(self._slots)))

    def _note(self, said: bytes) -> None:
        if said and self._log is not None:
            with suppress(OSError), self._log.open("ab") as file:
                file.write(said)

    def _end(self, *, kill: bool) -> None:
        for slot in list(self._slots):
            if (task := slot.vacate()) is not None:
                task.future.set_exception(WorkerCrashedError("the engine was stopped"))
            self._remove(slot, kill=kill)
        done = threading.Event()
        deadline = time.monotonic() + ENDING_SECONDS  # without a head too: workers answer for themselves
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
        """Call the actor; the answer, or what became of it, is told by an event of that name."""
        self._calls.put(partial(self._invoke, event, slot, method, arguments))

    # In the caller's thread.

    def _make_calls(self, calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (call := calls.get()) is not None:
            try:
                call()
            except Exception as error:
                logging.getLogger(__name__).debug("a call into Ray failed", exc_info=error)

    def _create(self, slot: _Slot) -> None:
        if slot.over:
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
            slot.actor = self._ray.remote(_Host).options(**options).remote()
        except Exception as error:
            self._tell("facts", slot, _failed(error))
        else:
            self._invoke("facts", slot, "facts", ())

    def _invoke(self, event: str, slot: _Slot, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            outcome = getattr(slot.actor, method).remote(*arguments).future()
        except Exception as error:
            outcome = _failed(error)
        outcome.add_done_callback(partial(self._tell, event, slot))

    def _tell(self, event: str, slot: _Slot, outcome: Future[Any]) -> None:
        self._events.put((event, slot, outcome))

    def _destroy(self, slot: _Slot) -> None:
        if slot.actor is not None:
            self._ray.kill(slot.actor)
            slot.actor = None

    def _inquire(self, late: int, slots: int) -> None:
        free, total = self._ray.available_resources(), self._ray.cluster_resources()
        nodes = self._ray._private.state.available_resources_per_node()
        text = None
        if not any(_fits(node, self._needs) for node in nodes.values()):  # else it is only starting
            text = (
                f"{late} of {slots} workers have not started: each needs {_amounts(self._needs, self._needs)}; "
                f"the cluster has {_amounts(total, self._needs)}, of which {_amounts(free, self._needs)} are free"
            )
        self._events.put(("remark", text))

    # In the lookout's thread.

    def _look_out(self, head: str, over: threading.Event) -> None:
        host, _, port = head.rpartition(":")
        seen = time.monotonic()
        while not over.wait(KNOCK_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
                seen = time.monotonic()
            except OSError as error:
                if time.monotonic() - seen > LOST_SECONDS:
                    lost = ClusterLostError(
                        f"the head of the Ray cluster, {head}, has been away for {LOST_SECONDS:g} s: {error}",
                        hint="The job can be resumed once the cluster is back; what was committed is kept.",
                    )
                    self._events.put(("head", lost))
                    return


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _initialize(ray: Any) -> None:
    """Connect to the cluster that Ray's rules lead to, or start one. Leaves logging and signals as they are."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise TallyError(
            f"RAY_ADDRESS={mask(address)} cannot be used by a process that has workers of its own",
            hint="Let the cluster run the job: tally score ... --engine ray --address http://HEAD:8265",
        )
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "configure_logging": False,
        "include_dashboard": False,
    }
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Of a Ray that is started here: its workers are as much worth to the machine as a local engine's.
    os.environ.setdefault("RAY_worker_niceness", "0")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        try:
            ray.init(object_store_memory=STORE_BYTES, **quiet)
        except ValueError as error:
            if "existing cluster" not in str(error):
                raise
            ray.init(**quiet)
    except ConnectionError as error:
        raise ClusterLostError(
            f"the Ray cluster {mask(address) or 'of this machine'} does not answer: {error}",
            hint="Is its head running? Without RAY_ADDRESS, and after 'ray stop', a Ray is started for the job.",
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise TallyError(f"Ray cannot be started: {error}") from error
        raise TallyError(
            f"this process and the Ray cluster have different versions: {error}",
            hint="Install the cluster's versions of Python and Ray where the job is started.",
        ) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    # Ray prints what its daemons complain of (a lost node, say) to standard output, whatever it is told.
    ray._private.worker.print_to_stdstream = _overhear


def _leave(ray: Any) -> None:
    """Disconnect, and end the Ray that was started here. Without its head that may take a minute: not waited for."""
    global _leaving
    _leaving = threading.Thread(target=ray.shutdown, name="tally-ray-end", daemon=True)
    _leaving.start()
    _leaving.join(ENDING_SECONDS)


_leaving: threading.Thread | None = None


def _overhear(data: Mapping[str, Any], *args: Any, **options: Any) -> None:
    logging.getLogger(__name__).debug("Ray: %s", "\n".join(data.get("lines", ())))


def _fits(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers have room there; those that need nothing count as one for each CPU."""
    needs = needs or {"CPU": 1.0}
    return int(min(node.get(name, 0) / amount + 1e-6 for name, amount in needs.items()))


def _amounts(found: Mapping[str, float], names: Mapping[str, float]) -> str:
    def amount(name: str) -> str:
        value = found.get(name, 0)
        return f"{value / 2**30:.3g} GiB memory" if name == "memory" else f"{value:g} {name}"

    return ", ".join(map(amount, names)) or "nothing"


def _told(error: BaseException) -> str:
    """What Ray says of an error, in one line."""
    facts = ("class_name:", "actor_id:", "pid:", "namespace:", "ip:")
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(facts)]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


def _failed(error: BaseException) -> Future[Any]:
    outcome: Future[Any] = Future()
    outcome.set_exception(error)
    return outcome
