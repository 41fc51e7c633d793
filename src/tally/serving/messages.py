"""What the server of endpoints and its replicas tell each other, and how it is framed.

Both ends are on one machine, and one was started by the other. A frame is four bytes of length, little endian, and a
message in MessagePack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

FRAME_LIMIT = 1 << 31
"""Bytes that a frame may have, at most: what says more is no frame."""


class Call(msgspec.Struct, array_like=True, tag=0):
    """One request, as a replica is given it.

    id: of the server's own; the answer carries it. protocol: a name in :mod:`tally.serving.protocols`.
    parameters: what the protocol took from path, headers and query.
    arrived: ``time.monotonic()`` of the machine, seconds.
    """

    id: int
    protocol: str
    body: bytes
    parameters: dict[str, str]
    arrived: float
    sampled: bool = False


class Cancel(msgspec.Struct, array_like=True, tag=1):
    """Nobody waits for this call's answer any more."""

    id: int


class Ping(msgspec.Struct, array_like=True, tag=2):
    """Answered with a Pong at once, by a thread that does nothing else."""


class Stop(msgspec.Struct, array_like=True, tag=3):
    """Answer what has been given, and end."""


class Loaded(msgspec.Struct, array_like=True, tag=0):
    """The model is loaded and warm. description: see :class:`Description`."""

    description: Description


class Failed(msgspec.Struct, array_like=True, tag=1):
    """The model cannot be loaded, or is not what it was taken for."""

    message: str
    hint: str | None = None


class Answer(msgspec.Struct, array_like=True, tag=2):
    """The answer to a call. status: of HTTP, whatever the protocol.

    error: what went wrong, in one line; the body says it in the protocol's shape.
    rows: items that it was about. batch: items in the batch that it was scored in, 0 where it was in none.
    waited, scored: seconds from its arrival until its batch was given to the model, and that the model took.
    """

    id: int
    status: int
    body: bytes
    headers: list[tuple[str, str]] = []
    error: str | None = None
    rows: int = 0
    batch: int = 0
    waited: float = 0.0
    scored: float = 0.0


class Batch(msgspec.Struct, array_like=True, tag=3):
    """A batch was scored. release: why it was closed: ``full``, ``delay``, ``idle``, ``other`` or ``alone``."""

    rows: int
    calls: int
    release: str
    seconds: float


class Pong(msgspec.Struct, array_like=True, tag=4):
    """The answer to a Ping."""


class Description(msgspec.Struct):
    """What a loaded model is, for those who ask before they send anything.

    input: what an item is (:data:`tally.scorers.base.Input`). size: (width, height) in pixels, of pictures.
    output: ``rows`` or ``image``. columns: of its rows, name to Arrow type, where that is known beforehand.
    features: of tables: names, or how many. by: of tables, the columns that choose a model.
    classes: their names, where the model tells classes apart. max_batch: items scored together.
    responds: the model itself understands requests. text: one line that says what was loaded.
    """

    input: str
    output: str
    max_batch: int
    size: tuple[int, int] | None = None
    columns: dict[str, str] | None = None
    features: list[str] | int | None = None
    by: list[str] = []
    classes: list[str] | None = None
    responds: bool = False
    text: str = ""
    assumed: list[str] = []


ToReplica: TypeAlias = Call | Cancel | Ping | Stop
ToServer: TypeAlias = Loaded | Failed | Answer | Batch | Pong

_encoder = msgspec.msgpack.Encoder()
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def framed(message: ToReplica | ToServer) -> bytes:
    """The message as a frame."""
    buffer = bytearray(4)
    _encoder.encode_into(message, buffer, 4)
    buffer[:4] = (len(buffer) - 4).to_bytes(4, "little")
    return bytes(buffer)


class Frames:
    """Frames from whatever pieces they arrive in. Raises ValueError for what is no frame."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._decoder = decoder
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete with this piece."""
        rest = self._rest
        rest += data
        start, size = 0, len(rest)
        with memoryview(rest) as view:
            while size - start >= 4:
                length = int.from_bytes(view[start : start + 4], "little")
                if length > FRAME_LIMIT:
                    raise ValueError(f"a frame of {length:,} bytes")
                if size - start - 4 < length:
                    break
                start += 4
                message = self._decoder.decode(view[start : start + length])
                start += length
                yield message
        del rest[:start]


def for_replica() -> Frames:
    """What a replica reads."""
    return Frames(_to_replica)


def for_server() -> Frames:
    """What the server reads."""
    return Frames(_to_server)
