"""How a run stands while it is driven: its nodes, what a person wants of it, and why it stops.

Everything happens in one thread, that of the event loop; the store is asked there, too, so that nothing is begun before
it is durable.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from tally.database import lease, waiting
from tally.database.leased import Lease
from tally.errors import OwnershipLostError, PipelineNotFoundError
from tally.masking import mask
from tally.pipelines.options import Options
from tally.pipelines.store import Node, Phase, PipelineStore, RunRecord

POLL_SECONDS = 0.5
"""How often it is looked for what a person wants of the run, and has supplied."""
WHY = {"cancel": "cancelled", "deadline": "activeDeadlineSeconds of the workflow were over"}
"""Why a run is stopped that does not go on."""


class StopError(Exception):
    """The run is to stop; why: cancel, deadline, interrupt, waits, lost."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Progress:
    """That of one run, which this process drives.

    say: gets one line for each node that is done. done: is told of each node that is, also of those from before.
    stopped: is called once the steps that run are to end, with whether at once.
    """

    def __init__(
        self,
        store: PipelineStore,
        lease: Lease,
        options: Options,
        *,
        say: Callable[[Node], None],
        done: Callable[[Node], None],
        stopped: Callable[[bool], None],
        patience: waiting.Patience,
    ) -> None:
        self.store, self.lease, self._options, self.patience = store, lease, options, patience
        self._say, self._done, self._tell_stopped = say, done, stopped
        self._past: dict[str, Node] = {}
        self._open: dict[str, Node] = {}
        self._numbers = 0
        self._dirty: dict[str, Node] = {}
        self._remembered: list[tuple[str, str, Node]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._suspended: dict[str, asyncio.Event] = {}
        self._supplied: dict[str, dict[str, Any]] = {}
        self._busy = 0
        self._lost: OwnershipLostError | None = None
        self._stopped = asyncio.Event()
        self.stopping: str | None = None
        """Why no step is begun any more, if so."""
        self.interrupted = False
        self.waits = False
        """Whether it was put down because only a person keeps it waiting."""
        self.exiting = False
        """Whether its exit handler is due: then nothing but an interrupt stops it."""
        self.reached = False
        """Whether the step was begun from which on all is done again."""

    @property
    def run_id(self) -> str:
        return self.lease.id

    # -- nodes -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """The nodes that there are already."""
        for node in self.patience(lambda: self.store.nodes(self.run_id)):
            self._past[node.name] = node
            self._numbers = max(self._numbers, node.number)
            if node.done:
                self._done(node)

    def begin(self, name: str, display: str, kind: str, template: str, parent: str) -> Node:
        """The node by this name: as it was left, or a new one."""
        node = self._past.pop(name, None)
        if node is None:
            self._numbers += 1
            node = Node(name, display, kind, template, parent, number=self._numbers)
        if not node.done:
            self._open[name] = node
        return node

    async def end(self, node: Node, phase: Phase, message: str | None = None) -> Node:
        """Say and keep what came of a node; no secret that is in the message."""
        node.phase, node.message, node.finished_at = phase, mask(message) if message else node.message, time.time()
        node.started_at = node.started_at or node.finished_at
        await self.save(node)
        self._open.pop(node.name, None)
        self._done(node)
        self._say(node)
        return node

    async def passed(
        self, name: str, display: str, template: str, parent: str, phase: Phase, message: str | None
    ) -> Node:
        """The node of what is not run, and why."""
        node = self.begin(name, display, "Skipped", template, parent)
        return node if node.done else await self.end(node, phase, message)

    async def end_open(self, message: str) -> None:
        """Those that are not done have failed."""
        for each in list(self._open.values()):
            await self.end(each, "Failed", message)

    async def save(self, node: Node) -> None:
        """Keep a node's row as it is now, with others that are to be kept; back when it is durable."""
        self._dirty[node.id] = node
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        await asyncio.shield(self._flushing)

    async def _flush(self) -> None:
        await asyncio.sleep(0)  # whoever else is about to save comes along
        nodes, self._dirty, self._flushing = self._dirty, {}, None
        remembered, self._remembered = self._remembered, []
        self.check()
        try:
            self.patience(lambda: self.store.save(self.lease, nodes.values(), remembered))
        except OwnershipLostError as error:
            self._lose(error)
            raise

    # -- what was done before ----------------------------------------------------------------------------------

    @property
    def uses_cache(self) -> bool:
        """Whether what was done before, in other runs, is taken from there."""
        return self._options.cached or (self._options.since is not None and not self.reached)

    def cached(self, cache: str, key: str, node: Node, *, oldest: float | None = None) -> bool:
        """Take a node's outputs from the cache; whether they were there. oldest: the most seconds of age."""
        found = self.patience(lambda: self.store.cached(cache, key))
        if found is None or (oldest is not None and found.age > oldest):
            return False
        for artifact in (found.outputs.get("artifacts") or {}).values():
            if "at" in artifact and not os.path.lexists(artifact["at"]):
                return False
        node.outputs = dict(found.outputs)
        return True

    def remember(self, cache: str, key: str, node: Node) -> None:
        """Keep a node's outputs for other runs, as soon as it is saved."""
        self._remembered.append((cache, key, node))

    # -- a person ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """While this lasts, the run does not only wait for a person."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def supplied(self, node: Node, seconds: float | None) -> dict[str, Any] | None:
        """Wait until a person supplies something to a node, or for so many seconds; then None."""
        event = self._suspended.setdefault(node.id, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                if seconds is None:
                    await self._or_stop(event.wait())
                else:
                    async with self.working():
                        await self._or_stop(event.wait())
            return self._supplied.pop(node.id, {})
        except TimeoutError:
            return None
        finally:
            self._suspended.pop(node.id, None)

    async def watch(self, record: RunRecord, limit: float | None) -> None:
        """Renew the lease; see what a person wants, and has supplied; see whether all waits for a person.

        limit: seconds from the run's beginning until it is stopped.
        """
        idle = 0
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                wanted = self.patience(lambda: self.store.renew(self.lease))
                if self._suspended:
                    waiting = list(self._suspended)
                    for node, values in self.patience(lambda: self.store.supplied(self.lease, waiting)).items():  # noqa: B023
                        if node in self._suspended:
                            self._supplied[node] = values
                            self._suspended[node].set()
                            idle = 0
            except OwnershipLostError as error:
                self._lose(error)
                if not self._goes_on_here():  # then who drives the run looks after its steps, too
                    self._tell_stopped(True)
                return
            if wanted == "cancel" and self.stopping is None and not self.exiting:
                self._end("cancel")
            late = limit is not None and time.time() > record.created_at + limit
            if late and self.stopping is None and not self.exiting:
                self._end("deadline")
            idle = idle + 1 if self._suspended and not self._busy else 0
            if idle >= 2 and self.stopping is None:
                self.waits = True
                self._end("waits")

    # -- stopping ----------------------------------------------------------------------------------------------

    def stop(self, *, now: bool = False) -> None:
        """Put the run down: what runs is ended, and run again when the run is resumed. From the loop's thread."""
        self.interrupted = True
        self._end("interrupt", now=now)

    def stop_before(self, record: RunRecord, limit: float | None) -> None:
        """Where the run was to stop before this process drives it: nothing is begun, and what still runs is ended."""
        top = self._past.get(record.name)
        if record.wanted == "cancel" and (top is None or top.failed or not top.done):
            self._end("cancel")
        elif limit is not None and time.time() > record.created_at + limit and (top is None or not top.done):
            self._end("deadline")

    def _end(self, why: str, *, now: bool = False) -> None:
        self.stopping = self.stopping or why
        self._stopped.set()
        self._tell_stopped(now)

    def begin_exit(self) -> None:
        """From now on, it is the exit handler's turn."""
        self.exiting = True
        if self.stopping in WHY:
            self.stopping = None
            self._stopped.clear()

    async def _or_stop(self, waiting: Awaitable[Any]) -> None:
        """Wait for something, but no longer than until the run is to stop."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in tasks:
                each.cancel()
        self.check_goes_on()

    async def pause(self, seconds: float) -> None:
        """Raises StopError where the run is to stop meanwhile."""
        async with self.working():
            try:
                async with asyncio.timeout(seconds):
                    await self._or_stop(asyncio.Event().wait())
            except TimeoutError:
                return

    def check_goes_on(self) -> None:
        """Raises StopError where no step is begun any more."""
        if self.stopping is not None:
            raise StopError(self.stopping)

    def check(self) -> None:
        """Raises OwnershipLostError where another process drives the run by now."""
        if self._lost is not None:
            raise self._lost

    def _goes_on_here(self) -> bool:
        """Whether who took the run is, or was, on this machine, where its steps are."""
        try:
            return self.store.get(self.run_id).owner_host == lease.host()
        except PipelineNotFoundError:
            return False

    def _lose(self, error: OwnershipLostError) -> None:
        self._lost = error
        self.stopping = "lost"
        self._stopped.set()
