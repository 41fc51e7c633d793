"""A replica: a process with one loaded model, which answers the calls of the server that started it.

It is told what to load as JSON on its standard input, and speaks over a socket that it inherits. It ends with its
server: when the socket closes, nobody is left who waits for an answer.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from tally import garbage
from tally.errors import TallyError, error_line, is_interrupt
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
    ToServer,
    for_replica,
    framed,
)

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
SWITCH_SECONDS = 0.0005
"""How long one thread may hold the interpreter while others want it: calls come in beside a model that computes."""


class Connection:
    """The socket to the server. Safe to send from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._lock = threading.Lock()

    def send(self, messages: list[Any]) -> None:
        """Send messages at once."""
        data = b"".join([framed(message) for message in messages])
        with self._lock:
            self._socket.sendall(data)

    def receive(self, take: Any) -> None:
        """Hand each message to ``take``, until the server is gone."""
        frames = for_replica()
        while data := self._socket.recv(READ_BYTES):
            for message in frames.feed(data):
                take(message)


def main() -> None:
    """Load, say so, and answer until told to stop. Arguments: the socket's number."""
    connection = Connection(int(sys.argv[1]))
    given = json.loads(sys.stdin.buffer.readline())
    _surroundings(given)
    sys.setswitchinterval(SWITCH_SECONDS)
    plane: list[Any] = []  # once it is loaded; no call comes before

    def take(message: Any) -> None:
        match message:
            case Call():
                plane[0].accept(message)
            case Cancel():
                plane[0].cancel(message.id)
            case Ping():
                connection.send([Pong()])
            case Stop():
                if not plane:
                    os._exit(0)
                threading.Thread(target=plane[0].stop, daemon=True).start()

    def listen() -> None:
        try:
            connection.receive(take)
        except (OSError, ValueError) as error:
            log.error("the server cannot be understood: %s", error)
        finally:
            os._exit(0)  # nobody waits any more, whatever the model is doing

    threading.Thread(target=listen, name="calls", daemon=True).start()
    try:
        scorer, data_plane = _opened(given, connection)
    except TallyError as error:
        _end_with(connection, Failed(error.message, error.hint))
    except BaseException as error:
        if is_interrupt(error):
            os._exit(0)
        log.exception("the model cannot be loaded")
        _end_with(connection, Failed(error_line(error)))
    plane.append(data_plane)
    garbage.keep_what_is_loaded()
    connection.send([Loaded(_description(scorer, given))])
    try:
        data_plane.run()
    except TallyError as error:
        _end_with(connection, Failed(error.message, error.hint))
    try:
        scorer.close()
    finally:
        os._exit(0)


def _opened(given: dict[str, Any], connection: Connection) -> tuple[Any, Any]:
    """The scorer, loaded and warm, and its data plane."""
    from tally.errors import SpecError
    from tally.media.images import Decoding
    from tally.models.load import load
    from tally.models.reference import ModelRef
    from tally.scorers import run
    from tally.serving.dataplane import DataPlane
    from tally.serving.warm import warm

    decoding = Decoding(**given["decoding"])
    scorer = load(ModelRef.from_dict(given["model"]), given["device"])
    if scorer.input not in ("image", "frame") and decoding != Decoding():
        raise SpecError(f"pages, background, max_pixels: are for pictures, and the model is given {scorer.input}")
    scorer = run.configured(scorer, batch_size=given["max_batch"], decoding=decoding)
    warm(scorer)

    payloads = None
    if given["payloads"] is not None:
        from tally.serving.payloads import PayloadLog

        payloads = PayloadLog(given["payloads"], given["name"], given["version"])

    def send(messages: list[Answer | Batch]) -> None:
        connection.send(messages)

    plane = DataPlane(
        scorer,
        send,
        model=given["name"],
        version=given["version"],
        max_batch=scorer.batch_size,
        max_delay=given["max_delay"],
        payloads=payloads,
    )
    return scorer, plane


def _description(scorer: Any, given: dict[str, Any]) -> Description:
    from tally.scorers.base import Scorer

    features = scorer.features
    classes = scorer.classes
    return Description(
        input=scorer.input,
        output=scorer.output,
        max_batch=scorer.batch_size,
        size=tuple(scorer.size) if scorer.size else None,
        columns=dict(scorer.columns) if scorer.columns else None,
        features=features if features is None or isinstance(features, int) else list(features),
        by=list(scorer.by),
        classes=[str(each) for each in classes] if isinstance(classes, (list, tuple)) else None,
        responds=type(scorer).respond is not Scorer.respond,
        text=scorer.describe(),
        assumed=list(scorer.assumed),
    )


def _surroundings(given: dict[str, Any]) -> None:
    """Threads of numeric libraries, the log, and for scripts a working folder."""
    from tally.logs import log_to_stderr

    os.environ.setdefault("OMP_NUM_THREADS", str(given["threads"]))
    log_to_stderr()
    if given["model"]["kind"] == "script":
        from tally.storage import temporary

        # As scripts expect it: what lies beside them is there, and they may write.
        folder = temporary.make("endpoint")
        for each in Path(given["model"]["location"]).iterdir():
            (folder / each.name).symlink_to(each)
        os.chdir(folder)


def _end_with(connection: Connection, message: ToServer) -> None:
    try:
        connection.send([message])
    except OSError:
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
