"""The messages that clients speak in over gRPC, from the ``.proto`` files beside this.

``scripts/protobuf.py`` compiles them into descriptors, of which classes are made when they are asked for. They live in
a pool of their own: a process that has its client's stubs of the same names, too, does not mix them up. And where
generated code would be bound to the versions of protobuf next to it, descriptors are read by all.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from tally.serving.protocols.base import RequestError

DESCRIPTORS = Path(__file__).with_name("descriptors.binpb")


@cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        pool.Add(file)
    return pool


@cache
def message(name: str) -> Any:
    """The class of a message, by its full name, such as ``inference.ModelInferRequest``. Raises KeyError."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@cache
def enum(name: str) -> dict[str, int]:
    """The numbers of an enum's names. Raises KeyError."""
    return {value.name: value.number for value in _pool().FindEnumTypeByName(name).values}


def parsed(name: str, body: bytes) -> Any:
    """A message from its bytes. Raises RequestError."""
    try:
        return message(name).FromString(body)
    except DecodeError:
        raise RequestError(400, "the request cannot be read: it is not the message that this method takes") from None


@cache
def methods(service: str) -> dict[str, tuple[str, str]]:
    """The methods of a service, by its full name: the full names of their requests and answers. Raises KeyError."""
    found = _pool().FindServiceByName(service).methods
    return {each.name: (each.input_type.full_name, each.output_type.full_name) for each in found}
