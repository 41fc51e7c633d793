"""Ports for servers that have to be told theirs before they start."""

from __future__ import annotations

import random
import socket

_PORTS = range(20_000, 32_000)
"""Below those that the system gives to clients and to whoever asks for any port: nobody takes one of these before its
server has started, or while the server is away."""


def free_ports(count: int) -> list[int]:
    """So many different ports of 127.0.0.1 on which nobody listens."""
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise AssertionError(f"only {len(free)} of {count} ports are free in {_PORTS}")
