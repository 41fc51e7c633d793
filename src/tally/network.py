"""Which addresses this process may connect to on somebody's word.

Whoever may start jobs on a server is not thereby let into its network. So a server, and what it starts, connect to
public addresses only, and to the hosts that it was started with (``tally up --allow-host``). The very address that is
connected to is checked: a name that was looked up before may lead elsewhere by now.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import socket
from collections.abc import Iterable
from typing import Any

ALLOWED = "TALLY_ALLOWED_HOSTS"
"""The environment variable with the private hosts that may be connected to; where it is not set, any address may be."""


class PrivateAddressError(OSError):
    """The host is not public, and not among those that are allowed."""


def restrict(hosts: Iterable[str]) -> None:
    """Let this process, and those that it starts, connect to public addresses and these hosts only."""
    os.environ[ALLOWED] = ",".join(each.lower() for each in hosts)


def refusal(host: str, port: int) -> str | None:
    """Why this process may not connect there; None if it may."""
    try:
        addresses(host, port)
    except PrivateAddressError as error:
        return error.strerror
    except (OSError, UnicodeError):
        return f"{host!r} cannot be found"
    return None


def is_allowed(host: str) -> bool:
    """Whether this process may connect to the host wherever that is."""
    allowed = os.environ.get(ALLOWED)
    return allowed is None or host.lower() in allowed.split(",")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine. What is asked of it goes through no proxy, whatever the environment names."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_connection(
    address: tuple[str, int], timeout: float | None = None, source_address: tuple[str, int] | None = None
) -> socket.socket:
    """As :func:`socket.create_connection`, to an address that is allowed. Raises OSError."""
    host, port = address
    last: OSError = OSError(f"{host} has no address")
    for each in addresses(host, port):
        try:
            return socket.create_connection((each, port), timeout, source_address)
        except OSError as error:
            last = error
    raise last


class HTTPConnection(http.client.HTTPConnection):
    """One that connects to allowed addresses only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _guard(self)


class HTTPSConnection(http.client.HTTPSConnection):
    """One that connects to allowed addresses only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _guard(self)


def _guard(connection: Any) -> None:
    def connect(address: tuple[str, int], *options: Any) -> socket.socket:
        if connection._tunnel_host is None:
            return create_connection(address, *options)
        # Through the proxy that the environment names, wherever that is; it looks the host up by itself.
        addresses(connection._tunnel_host, connection._tunnel_port)
        return socket.create_connection(address, *options)

    connection._create_connection = connect


def addresses(host: str, port: int) -> list[str]:
    """The addresses of the host, for clients that take one, and so do not look the name up again.

    Raises PrivateAddressError if it may not be connected to, OSError.
    """
    found = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not is_allowed(host):
        for each in found:
            if not _is_public(each):
                raise PrivateAddressError(errno.EACCES, f"{host!r} is a private address ({each})")
    return found


_INSIDE = [
    ipaddress.ip_network(each)
    for each in (
        "192.0.0.0/24",  # of protocols; some clouds answer there with the machine's credentials
        "168.63.129.16/32",  # where Azure answers its machines
        "64:ff9b:1::/48",
        "fec0::/10",
        "5f00::/16",
    )
]
"""Networks that Python calls global, or some of its versions do, and that are inside all the same."""
_CLOTHES = [ipaddress.ip_network(each) for each in ("64:ff9b::/96", "::/96")]
"""Networks of IPv6 whose addresses end in one of IPv4, which is where they lead."""


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    # An address of IPv4 in the clothes of IPv6 leads where that one does.
    forms = [address]
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(address in each for each in _CLOTHES):
            inner.append(ipaddress.IPv4Address(address.packed[-4:]))
        forms += [each for each in inner if each is not None]
    return all(each.is_global and not each.is_multicast and not any(each in net for net in _INSIDE) for each in forms)
