"""A stand-in for MongoDB, as far as writing documents needs it: it speaks the wire protocol (OP_MSG, and OP_QUERY for
the first hello), and keeps documents by their ``_id``.

No server of MongoDB can be installed where these tests run.
"""

from __future__ import annotations

import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bson

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013

_HELLO = {
    "ismaster": True,
    "isWritablePrimary": True,
    "maxBsonObjectSize": 16 << 20,
    "maxMessageSizeBytes": 48_000_000,
    "maxWriteBatchSize": 100_000,
    "minWireVersion": 0,
    "maxWireVersion": 21,
    "ok": 1.0,
}


class StandIn:
    """documents: by collection and ``_id``. writes: how often each ``_id`` was written. fault: what is said to a
    document in place of taking it; None takes it."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[Any, dict[str, Any]]] = {}
        self.writes: Counter[Any] = Counter()
        self.fault: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda document: None
        self.lock = threading.Lock()

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(command))
        with self.lock:
            if name.lower() in ("hello", "ismaster"):
                return _HELLO
            if name == "update":
                return self._updated(command)
        return {"ok": 1.0}

    def _updated(self, command: dict[str, Any]) -> dict[str, Any]:
        kept = self.documents.setdefault(f"{command['$db']}.{command['update']}", {})
        errors, upserted = [], []
        for index, each in enumerate(command["updates"]):
            key, document = each["q"]["_id"], each["u"]
            assert each["upsert"]
            assert document["_id"] == key
            if (fault := self.fault(document)) is not None:
                errors.append({"index": index, "errmsg": "as the test asks", **fault})
                continue
            if key not in kept:
                upserted.append({"index": index, "_id": key})
            kept[key] = document
            self.writes[key] += 1
        more = {name: value for name, value in (("writeErrors", errors), ("upserted", upserted)) if value}
        return {"ok": 1.0, "n": len(command["updates"]) - len(errors), "nModified": 0, **more}


@contextmanager
def stand_in() -> Iterator[tuple[str, StandIn]]:
    """The URL of a database, and what is behind it."""
    behind = StandIn()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while head := self._exactly(16):
                length, number, _, kind = struct.unpack("<iiii", head)
                body = self._exactly(length - 16)
                if kind == OP_QUERY:
                    start = body.index(b"\0", 4) + 9
                    answer = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(behind.answer(bson.decode(body[start:])))
                    self._send(number, OP_REPLY, answer)
                else:
                    reply = behind.answer(_command(body))
                    self._send(number, OP_MSG, struct.pack("<iB", 0, 0) + bson.encode(reply))

        def _exactly(self, size: int) -> bytes:
            found = b""
            while len(found) < size:
                try:
                    piece = self.request.recv(size - len(found))
                except OSError:
                    return b""
                if not piece:
                    return b""
                found += piece
            return found

        def _send(self, number: int, kind: int, body: bytes) -> None:
            self.request.sendall(struct.pack("<iiii", 16 + len(body), 0, number, kind) + body)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"mongodb://127.0.0.1:{server.server_address[1]}/cocoonaks", behind
        finally:
            server.shutdown()
            thread.join()


def _command(body: bytes) -> dict[str, Any]:
    """The command of a message: its own document, and lists that come in sections of their own."""
    at, command = 4, {}
    lists: dict[str, list[Any]] = {}
    while at < len(body):
        kind, at = body[at], at + 1
        (size,) = struct.unpack_from("<i", body, at)
        if kind == 0:
            command = bson.decode(body[at : at + size])
        else:
            name_end = body.index(b"\0", at + 4)
            name, inner = body[at + 4 : name_end].decode(), name_end + 1
            lists[name] = []
            while inner < at + size:
                (length,) = struct.unpack_from("<i", body, inner)
                lists[name].append(bson.decode(body[inner : inner + length]))
                inner += length
        at += size
    return {**command, **lists}
