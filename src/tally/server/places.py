"""Which places a request may name. Whoever has a key is not thereby let into this machine, or into its network.

Local paths must lie under a declared root, links resolved. Web addresses must not be private ones.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tally.errors import SpecError
from tally.jobs.spec import JobSpec
from tally.storage import is_url
from tally.text import expanded

_WEB = ("http", "https")


def check(spec: JobSpec, roots: Sequence[Path]) -> None:
    """Raises SpecError with every place of the spec that a request may not name."""
    problems = [problem for name, place in _places(spec) if (problem := _refusal(name, place, roots))]
    if problems:
        allowed = ", ".join(map(str, roots)) or "none is declared (tally up --root FOLDER)"
        raise SpecError(problems, hint=f"Folders that requests may name: {allowed}")


def _places(spec: JobSpec) -> Iterable[tuple[str, str]]:
    yield from (("source", each) for each in spec.source)
    for name in ("model", "out", "labels", "artifacts", "webhook"):
        place = getattr(spec, name)
        if place:
            yield name, str(place)


def _refusal(name: str, place: str, roots: Sequence[Path]) -> str | None:
    if name == "model" and place.startswith("models:/"):
        return None
    scheme = urlsplit(place).scheme.lower()
    if scheme in _WEB:
        return _web_refusal(name, place)
    if is_url(place):
        return f"{name}: file URLs are not taken: {place}" if scheme == "file" else None
    if name == "model" and ":" in place:
        return f"{name}: {place!r} names code of the server's own environment; put it into a folder under a root"
    resolved = expanded(place).resolve()
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return None
    return f"{name}: {place!r} is not under a folder that requests may name"


def _web_refusal(name: str, url: str) -> str | None:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return f"{name}: {url!r} has no valid port"
    if not host:
        return f"{name}: {url!r} names no host"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return f"{name}: the host {host!r} cannot be found"
    private = [str(each[4][0]) for each in found if not ipaddress.ip_address(str(each[4][0]).split("%")[0]).is_global]
    return f"{name}: {host!r} is a private address ({private[0]})" if private else None
