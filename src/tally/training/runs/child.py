"""A run that another process owns: ``tally train script`` starts a script in a child, whose run it is.

The child knows no database. It sends what it logs over a socket of this machine that asks for a key;
messages are JSON texts. One connection for each process and thread: a script may have children of its own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tally.errors import OwnershipLostError, RunError, SpecError, TallyError, error_line
from tally.training.runs.store import RunState, Value, plain

if TYPE_CHECKING:
    from tally.training.runs.tracking import DatabaseBook, Run

log = logging.getLogger("tally")

ADDRESS, KEY = "TALLY_RUN_ADDRESS", "TALLY_RUN_KEY"
"""Environment variables of the child: the socket's file, or host and port, as JSON; the key as hexadecimal digits."""


def parent() -> ParentBook | None:
    """The process that started this one and keeps its run; None if no ``tally train script`` did."""
    address, key = os.environ.get(ADDRESS), os.environ.get(KEY)
    return ParentBook(address, bytes.fromhex(key)) if address and key else None


class ParentBook:
    """Sends records to the process that owns the run. Raises OwnershipLostError once that has lost it or is gone."""

    def __init__(self, address: str, key: bytes) -> None:
        found = json.loads(address)
        self._address = found if isinstance(found, str) else (found[0], found[1])
        self._key = key
        self._local = threading.local()

    def ask(self, what: str, **given: Any) -> Any:
        """Send one request and wait for its answer."""
        try:
            connection = self._connection()
            connection.send_bytes(json.dumps({"what": what, **given}).encode())
            answer = json.loads(connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise OwnershipLostError(
                f"the process that started this script and keeps its run is gone ({error_line(error)})"
            ) from None
        if "error" in answer:
            kind = {"spec": SpecError, "lost": OwnershipLostError}.get(answer["kind"], RunError)
            raise kind(answer["error"], hint=answer["hint"])
        return answer["answer"]

    def _connection(self) -> Connection[Any, Any]:
        # A fork shares its parent's socket, where answers would be mixed up.
        known: tuple[int, Connection[Any, Any]] | None = getattr(self._local, "connection", None)
        if known is None or known[0] != os.getpid():
            known = (os.getpid(), Client(self._address, authkey=self._key))
            self._local.connection = known
        return known[1]

    def record(self, values: Sequence[Value]) -> None:
        self.ask("record", values=[list(each) for each in values])

    def flush(self) -> None:
        self.ask("flush")

    def change(self, **columns: Any) -> None:
        self.ask("change", columns=columns)

    def register(self, folder: Path, name: str, **facts: Any) -> str:
        return str(self.ask("register", folder=str(folder), name=name, facts=facts))

    def finish(self, state: RunState, error: str | None) -> None:
        """The owner ends the run when the script ends; what it raised is told."""
        self.ask("finish", state=state, error=error)


class Office:
    """Listens for the child, in threads, and keeps its records in this process's run; ``with`` opens and closes it.

    host: the address of this machine where the child may be on another one.
    environment: what to tell the child. ended: the state and the error that the child has told last, if any.
    """

    def __init__(self, run: Run, book: DatabaseBook, *, host: str | None = None) -> None:
        self._run, self._book = run, book
        self._key = os.urandom(32)
        if host is not None:
            self._listener = Listener((host, 0), backlog=64, authkey=self._key)
        else:
            try:
                self._listener = Listener(family="AF_UNIX", backlog=64, authkey=self._key)
            except OSError:  # the folder for temporary files has too long a name for a socket
                self._listener = Listener(("127.0.0.1", 0), backlog=64, authkey=self._key)
        address = self._listener.address
        self.environment = {ADDRESS: json.dumps(address), KEY: self._key.hex()}
        self.ended: tuple[RunState, str | None] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="tally-run-office", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except Exception as error:  # closed; or somebody who has not the key
                log.debug("a run's socket: %s", error)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="tally-run-office", daemon=True).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        with connection:
            while True:
                try:
                    request = json.loads(connection.recv_bytes())
                except (OSError, EOFError, ValueError):
                    return
                try:
                    answer: dict[str, Any] = {"answer": self._answer(request)}
                except TallyError as error:
                    kind = "spec" if isinstance(error, SpecError) else "lost" if _is_lost(error) else "run"
                    answer = {"error": error.message, "hint": error.hint, "kind": kind}
                except Exception as error:
                    answer = {"error": error_line(error), "hint": None, "kind": "run"}
                try:
                    connection.send_bytes(json.dumps(answer).encode())
                except OSError:
                    return

    def _answer(self, request: Mapping[str, Any]) -> Any:
        run, book = self._run, self._book
        match request["what"]:
            case "begin":
                return {
                    "id": run.id, "name": run.name, "folder": str(run.folder), "parameters": plain(run.parameters),
                    "tags": dict(run.tags), "metrics": {name: each.to_json() for name, each in book.figures.items()},
                    "data": dict(run.data), "resumed": run.resumed,
                }  # fmt: skip
            case "record":
                book.record([Value(name, step, float(value), at) for name, step, value, at in request["values"]])
            case "flush":
                book.flush()
            case "change":
                columns = dict(request["columns"])
                if (tags := columns.pop("tags", None)) is not None:
                    run.tags.become(tags)  # by which the owner of the run goes on
                if columns:
                    book.change(**columns)
            case "register":
                return book.register(Path(request["folder"]), request["name"], **request["facts"])
            case "finish":
                self.ended = (request["state"], request["error"])
        return None


def _is_lost(error: TallyError) -> bool:
    return isinstance(error, OwnershipLostError)
