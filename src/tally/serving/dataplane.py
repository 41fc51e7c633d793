"""What a replica does with calls: decode, gather into a batch, score, encode. Every protocol goes this way.

Threads: calls come in one thread (:meth:`DataPlane.accept`). Pictures are decoded in a few more, ahead of scoring. One
thread scores (:meth:`DataPlane.run`). One more encodes answers, while the next batch is being scored.

A batch is closed when it is full, or when nothing more waits and it has as many rows as the batch before. While it
has fewer, it waits for more, but no longer than ``max_delay``, nor than scoring the last one took: so a client alone
never waits, many fill batches, and a quick model is not kept waiting for a fuller batch that would save nothing.
Full is what scores a row the fastest (:mod:`tally.serving.pace`), at most ``max_batch`` rows.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tally.errors import ModelRefutedError, TallyError, error_line, is_interrupt
from tally.scorers import run
from tally.scorers.base import Request, Result, Scorer
from tally.serving import protocols
from tally.serving.messages import Answer, Batch, Call
from tally.serving.pace import Pace
from tally.serving.protocols.base import Reply, RequestError, Work

if TYPE_CHECKING:
    from tally.serving.payloads import PayloadLog

log = logging.getLogger(__name__)

Send = Callable[[list[Answer | Batch]], None]

BATCH_BYTES = 64 << 20
"""Bytes of bodies in one batch, at most, unless one call alone has more."""
SMALL = 64 << 10
"""Bodies of so many bytes are read as they come; larger ones when it is their turn, so that they hold up no call."""
QUICK = 0.001
"""Seconds for a batch below which its answers are written before the next one is scored."""
ABANDONED = 499
"""The status of calls that were not scored because nobody waits for them."""


@dataclass(slots=True, eq=False)
class Entry:
    """A call on its way. prepared: what the scorer made of its items. reply: set where no batch is needed."""

    call: Call
    work: Work | None = None
    prepared: list[Any] = field(default_factory=list)
    reply: Reply | None = None

    @property
    def rows(self) -> int:
        return self.work.rows if self.work is not None else 1

    @property
    def kind(self) -> Any:
        """Calls of one kind may stand in one batch."""
        work = self.work
        assert work is not None
        return work.items.schema if hasattr(work.items, "schema") else work.all_classes


@dataclass(slots=True)
class _Scored:
    """A batch that has been scored. results: of all items of all entries, in order."""

    entries: list[Entry]
    results: Sequence[Result]
    started: float
    seconds: float
    release: str


class DataPlane:
    """Scores calls with one loaded scorer. send: takes answers; it is called from several threads.

    model, version: as clients call it. max_batch: rows scored together, at most. max_delay: seconds that an incomplete
    batch waits for more. decoders: threads that decode pictures. payloads: keeps calls that are sampled.
    """

    def __init__(
        self,
        scorer: Scorer,
        send: Send,
        *,
        model: str = "",
        version: str = "",
        max_batch: int,
        max_delay: float = 0.005,
        decoders: int = 2,
        payloads: PayloadLog | None = None,
    ) -> None:
        self._scorer, self._send = scorer, send
        self._model, self._version = model, version
        self._payloads = payloads
        self._max_delay = max_delay
        self._pace = Pace(max_batch)
        self.responds = type(scorer).respond is not Scorer.respond
        self._ahead = scorer.input in ("image", "frame")
        self._decoding = ThreadPoolExecutor(decoders, "decode") if self._ahead else None
        self._ready: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._scored: queue.SimpleQueue[_Scored | None] = queue.SimpleQueue()
        self._held: Entry | None = None
        self._stopping = False
        self._last_rows, self._last_seconds = 1, 0.0
        self._waiting: set[int] = set()
        self._cancelled: set[int] = set()

    def accept(self, call: Call) -> None:
        """Take a call; its answer is sent when it is there."""
        entry = Entry(call)
        self._waiting.add(call.id)
        if self._decoding is not None:
            self._decoding.submit(self._ahead_of_scoring, entry)
            return
        if len(call.body) <= SMALL and not self.responds:
            self._open(entry)  # while the model scores others
        self._ready.put(entry)

    def cancel(self, call_id: int) -> None:
        """Nobody waits for this answer: if its batch has not begun, it is not scored."""
        if call_id in self._waiting:
            self._cancelled.add(call_id)

    def stop(self) -> None:
        """Have :meth:`run` return once everything that was accepted is answered. Accept nothing after it."""
        if self._decoding is not None:
            self._decoding.shutdown(wait=True)
        self._ready.put(None)

    def run(self) -> None:
        """Score until :meth:`stop`. Raises ModelRefutedError if the model is not what it was taken for."""
        import threading

        answering = threading.Thread(target=self._answer_all, name="answers", daemon=True)
        answering.start()
        try:
            while (entry := self._next(None)) is not None:
                if self._decode(entry):
                    self._score(*self._gather(entry))
        finally:
            self._scored.put(None)
            answering.join()
            if self._payloads is not None:
                self._payloads.close()

    # -- before the batch -------------------------------------------------------------------------------

    def _ahead_of_scoring(self, entry: Entry) -> None:
        if entry.call.id not in self._cancelled:
            self._open(entry)
        self._ready.put(entry)

    def _open(self, entry: Entry) -> None:
        """Find the call's items, and prepare them. What is wrong with it becomes its reply."""
        call = entry.call
        protocol = protocols.get(call.protocol)
        try:
            work = protocol.decode(call, self._scorer)
            work.model, work.version = self._model, self._version
            if self._scorer.input == "table":
                work.items = run.columns(self._scorer, work.items)
            elif self._scorer.input != "path":  # their files have to last until they are scored
                entry.prepared = [run.prepare(self._scorer, item) for item in work.items]
            entry.work = work
        except RequestError as error:
            entry.reply = protocol.refusal(error)
        except TallyError as error:
            entry.reply = protocol.refusal(RequestError(422, error.message))
        except (OverflowError, RecursionError, UnicodeError) as error:  # numbers, depths and texts that nothing holds
            entry.reply = protocol.refusal(RequestError(422, f"the request cannot be read: {error_line(error)}"))
        except BaseException as error:
            if is_interrupt(error):
                raise
            log.exception("a request could not be read")
            entry.reply = protocol.refusal(RequestError(500, f"the request could not be read: {error_line(error)}"))

    def _next(self, until: float | None) -> Entry | None:
        """The next call; None when there will be none. until: raises queue.Empty then; 0.0: if none is there now."""
        if (held := self._held) is not None:
            self._held = None
            return held
        if self._stopping:
            if until is None:
                return None
            raise queue.Empty
        if until is None:
            entry = self._ready.get()
        elif until == 0.0 or (left := until - time.monotonic()) <= 0:
            entry = self._ready.get_nowait()
        else:
            entry = self._ready.get(timeout=left)
        if entry is None:
            self._stopping = True
            return self._next(until)
        return entry

    def _decode(self, entry: Entry) -> bool:
        """Whether the call is to be scored in a batch; others are answered, or have nobody who waits."""
        call = entry.call
        if call.id in self._cancelled:
            self._forget(call.id)
            self._send([Answer(call.id, ABANDONED, b"")])  # so that the server knows that there is room
            return False
        if self.responds and call.protocol == "azureml":
            self._respond(call)
            return False
        if entry.work is None and entry.reply is None:
            self._open(entry)
        if entry.reply is not None:
            self._forget(call.id)
            answer = _answer(call.id, entry.reply)
            self._send([answer])
            self._keep(call, answer)
            return False
        return True

    def _gather(self, first: Entry) -> tuple[list[Entry], str]:
        """A batch that begins with this call, and why it was closed."""
        entries, rows, size, kind = [first], first.rows, len(first.call.body), first.kind
        until = time.monotonic() + min(self._max_delay, self._last_seconds)
        full = self._pace.rows
        while rows < full:
            try:
                entry = self._next(0.0 if rows >= self._last_rows else until)
            except queue.Empty:
                release = "idle" if rows >= self._last_rows else "delay"
                break
            if entry is None or not self._decode(entry):
                continue
            more = entry.rows
            if entry.kind != kind or rows + more > full or size + len(entry.call.body) > BATCH_BYTES:
                self._held = entry
                release = "other"
                break
            entries.append(entry)
            rows, size = rows + more, size + len(entry.call.body)
        else:
            release = "full"
        self._last_rows = min(rows, full)
        return entries, release

    # -- the batch ----------------------------------------------------------------------------------------

    def _score(self, entries: list[Entry], release: str) -> None:
        started = time.monotonic()
        scorer = self._scorer
        first = entries[0].work
        assert first is not None
        results: Sequence[Result]
        try:
            scorer.all_classes = first.all_classes
            if scorer.input == "table":
                results = self._table_results(entries)
            else:
                items = [item for entry in entries for item in (entry.work.items if entry.work else ())]
                if scorer.input == "path":
                    results = run.run(scorer, items)
                else:
                    prepared = [value for entry in entries for value in entry.prepared]
                    step = self._pace.rows
                    results = [
                        result
                        for at in range(0, len(items), step)
                        for result in run.finish(scorer, items[at : at + step], prepared[at : at + step])
                    ]
        except ModelRefutedError as error:
            self._fail(entries, error)
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            log.error("a batch failed", exc_info=error)
            self._fail(entries, error)
            return
        for entry in entries:
            self._waiting.discard(entry.call.id)
        self._last_seconds = time.monotonic() - started
        if results:
            self._pace.took(len(results), self._last_seconds)
        scored = _Scored(entries, results, started, self._last_seconds, release)
        if self._last_seconds < QUICK or (self._held is None and self._ready.empty()):
            self._answer(scored)  # nothing to do meanwhile, or what is done so soon that the other thread would starve
        else:
            self._scored.put(scored)

    def _table_results(self, entries: list[Entry]) -> Sequence[Result]:
        import pyarrow as pa

        tables = [entry.work.items for entry in entries if entry.work is not None]
        return run.run(self._scorer, tables[0] if len(tables) == 1 else pa.concat_tables(tables))

    def _fail(self, entries: Sequence[Entry], error: BaseException) -> None:
        message = error.message if isinstance(error, TallyError) else f"the model failed: {error_line(error)}"
        refused = RequestError(500, message)
        for entry in entries:
            self._forget(entry.call.id)
        self._send([_answer(each.call.id, protocols.get(each.call.protocol).refusal(refused)) for each in entries])

    def _respond(self, call: Call) -> None:
        """Have the model itself answer a request."""
        started = time.monotonic()
        given = call.parameters
        headers = {name[7:]: value for name, value in given.items() if name.startswith("header:")}
        response = self._scorer.respond(
            Request(
                call.body, given.get("method", "POST"), given.get("path", "/score"), given.get("query", ""), headers
            )
        )
        assert response is not None
        self._forget(call.id)
        seconds = time.monotonic() - started
        waited = max(0.0, started - call.arrived)
        answer = Answer(call.id, response.status, response.body, list(response.headers), None, 1, 1, waited, seconds)
        self._send([answer, Batch(1, 1, "alone", seconds)])
        self._keep(call, answer)

    # -- after the batch ----------------------------------------------------------------------------------

    def _answer_all(self) -> None:
        while (scored := self._scored.get()) is not None:
            self._answer(scored)

    def _answer(self, scored: _Scored) -> None:
        answers: list[Answer | Batch] = []
        total = len(scored.results)
        at = 0
        for entry in scored.entries:
            own = scored.results[at : at + entry.rows]
            at += entry.rows
            answer = _answer(entry.call.id, self._encoded(entry, own))
            answer.rows, answer.batch, answer.scored = len(own), total, scored.seconds
            answer.waited = max(0.0, scored.started - entry.call.arrived)
            answers.append(answer)
            self._keep(entry.call, answer)
            self._cancelled.discard(entry.call.id)
        answers.append(Batch(total, len(scored.entries), scored.release, scored.seconds))
        self._send(answers)

    def _encoded(self, entry: Entry, results: Sequence[Result]) -> Reply:
        assert entry.work is not None
        protocol = protocols.get(entry.call.protocol)
        try:
            return protocol.encode(entry.call, self._scorer, entry.work, results)
        except RequestError as error:
            return protocol.refusal(error)
        except Exception as error:
            log.exception("a result could not be written")
            return protocol.refusal(RequestError(500, f"the result could not be written: {error_line(error)}"))

    def _keep(self, call: Call, answer: Answer) -> None:
        if call.sampled and self._payloads is not None:
            self._payloads.add(call, answer)

    def _forget(self, call_id: int) -> None:
        self._waiting.discard(call_id)
        self._cancelled.discard(call_id)


def _answer(call_id: int, reply: Reply) -> Answer:
    return Answer(call_id, reply.status, reply.body, list(reply.headers), reply.error)
