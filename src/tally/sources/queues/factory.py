"""From a URL to its queue. A new broker is one file and one line here."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tally.errors import SpecError
from tally.masking import mask
from tally.optional import needed

if TYPE_CHECKING:
    from tally.sources.queues.base import Queue

PASSWORD = "TALLY_QUEUE_PASSWORD"  # noqa: S105 - its name
"""The environment variable with the password of the user whom a queue's URL names."""


class _Line(NamedTuple):
    """module: has ``open_queue(url)``. extra: what brings its client."""

    module: str
    extra: str


BROKERS = {
    "amqp": _Line("tally.sources.queues.rabbitmq", "rabbitmq"),
    "amqps": _Line("tally.sources.queues.rabbitmq", "rabbitmq"),
    "redis": _Line("tally.sources.queues.redis", "redis"),
    "rediss": _Line("tally.sources.queues.redis", "redis"),
    "sqs": _Line("tally.sources.queues.sqs", "sqs"),
    "azure-queue": _Line("tally.sources.queues.azure_queue", "azure-queue"),
    "servicebus": _Line("tally.sources.queues.servicebus", "servicebus"),
    "kafka": _Line("tally.sources.queues.kafka", "kafka"),
    "kafkas": _Line("tally.sources.queues.kafka", "kafka"),
}
"""By the scheme of URLs."""

LOGIN = f"Check the user in the URL, the password in {PASSWORD}, and what that user may do there."
"""The next step where a broker that has users refuses."""
_HELP = "'tally queue --help' shows how such URLs are written."

_AZURE = r"(windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)"
_HOSTS = {
    r"sqs\.[a-z0-9-]+\.amazonaws\.com(\.cn)?": BROKERS["sqs"],
    rf"[a-z0-9]+\.queue\.core\.{_AZURE}": BROKERS["azure-queue"],
    rf"[a-z0-9-]+\.servicebus\.{_AZURE}": BROKERS["servicebus"],
}
"""By the host of https URLs, as the broker's own pages show them. They are sent the environment's credentials."""


def is_queue(url: str) -> bool:
    """Whether the URL names a queue."""
    return "://" in url and _line(url) is not None


def is_of_its_service(url: str) -> bool:
    """Whether the host of a cloud's queue is its service's own; a name without a dot is a name there."""
    host = urlsplit(url).hostname or ""
    return "." not in host or any(re.fullmatch(each, host) for each in _HOSTS)


def _line(url: str) -> _Line | None:
    try:
        parts = urlsplit(url)
    except ValueError:  # an address in brackets that is none, say
        return None
    if parts.scheme.lower() == "https":
        return next((line for host, line in _HOSTS.items() if re.fullmatch(host, parts.hostname or "")), None)
    return BROKERS.get(parts.scheme.lower())


def check(url: str) -> None:
    """Raises SpecError for a URL that is not a queue's, for a password in it, which a job would keep, and for a client
    that is not installed."""
    if not is_queue(url):
        raise SpecError(f"{mask(url)} is no queue", hint=f"A queue's URL begins with {', '.join(BROKERS)}, and ://")
    if urlsplit(url).password is not None:
        raise SpecError(
            f"{mask(url)} carries a password, which would be kept with the job",
            hint=f"Leave it out, and put it into the environment: {PASSWORD}",
        )
    _adapter(url)


def open_queue(url: str) -> Queue:
    """The queue of the URL. Raises SpecError where the URL is wrong or its client is not installed."""
    try:
        return _adapter(url)(url)
    except SpecError:
        raise
    except ValueError as error:  # a port that is no number, say
        raise SpecError(f"{mask(url)} is no URL of a queue: {error}", hint=_HELP) from None


def _adapter(url: str) -> Callable[[str], Queue]:
    line = _line(url)
    assert line is not None, "is_queue"
    with needed(f"{mask(url)} needs", line.extra):
        make: Callable[[str], Queue] = import_module(line.module).open_queue
    return make
