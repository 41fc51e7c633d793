"""``tally queue`` and ``tally inject``: look into a queue, and fill it."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tally.cli import installation
from tally.cli.console import say
from tally.cli.values import Choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tally.sources.queues.base import Message, Queue

_SENT_AT_ONCE = 500

Command = TypeVar("Command", bound="Callable[..., Any]")


def _limit(default: int) -> Callable[[Command], Command]:
    return click.option(
        "-n",
        "--limit",
        type=click.IntRange(1, 1_000_000_000),
        default=default,
        show_default=True,
        help="How many, oldest first.",
    )


@click.group()
def queue() -> None:
    """Look into a queue: how much waits, what is dead and why.

    \b
    URL is one of
      amqp://HOST/VHOST/QUEUE
      redis://HOST/0/STREAM or redis://HOST/0/LIST?kind=list
      sqs://REGION/QUEUE
      azure-queue://ACCOUNT/QUEUE
      servicebus://NAMESPACE/QUEUE or servicebus://NAMESPACE/TOPIC/Subscriptions/NAME
      kafka://HOST:PORT/TOPIC
    A password comes from TALLY_QUEUE_PASSWORD; credentials of clouds from where their own programs look for them.
    """


@queue.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def depth(url: str, as_json: bool) -> None:
    """How many messages wait, are in hand, and are dead."""
    found = installation.queue(url, _opened).depth()
    counts = {"waiting": found.waiting, "in_hand": found.in_hand, "dead": found.dead}
    if as_json:
        say(json.dumps(counts))
        return
    for name, count in counts.items():
        say(f"{name.replace('_', ' '):<8} {'not told' if count is None else format(count, ',')}")


@queue.command()
@click.argument("url")
@_limit(10)
def peek(url: str, limit: int) -> None:
    """Show the oldest messages as JSON; they stay where they are."""
    _show(installation.queue(url, _opened).peek(limit))


@queue.command()
@click.argument("url")
@_limit(10)
def dead(url: str, limit: int) -> None:
    """Show dead messages and their reasons as JSON."""
    _show(installation.queue(url, _opened).peek(limit, dead=True))


@queue.command()
@click.argument("url")
@_limit(1000)
def replay(url: str, limit: int) -> None:
    """Put dead messages back into the queue."""
    say(f"{installation.queue(url, _opened).replay(limit):,} messages are back in the queue")


@click.command()
@click.argument("source", nargs=-1, required=True)
@click.option("--queue", "url", required=True, metavar="URL", help="The queue: as for 'tally queue'.")
@click.option("--limit", type=click.IntRange(1, 1_000_000_000), help="Stop after so many.")
@click.option(
    "--body",
    type=Choice(("text", "url", "json", "pyliteral")),
    default="text",
    show_default=True,
    help="The key; its URL; or a dict with both, as JSON or as Python writes it.",
)
def inject(source: tuple[str, ...], url: str, limit: int | None, body: str) -> None:
    """List SOURCE (folders, globs, buckets), and put a message for each file into a queue; each key once.

    A job that reads the queue scores a key that comes again only once: injecting a bucket twice does no harm.
    """
    from tally.jobs.spec import absolute
    from tally.sources.listing import Listing

    queue = _opened(url)
    listing = Listing.of([absolute(each) for each in source], None)
    sent = 0
    waiting = islice(_files(listing), limit)
    while batch := list(islice(waiting, _SENT_AT_ONCE)):
        queue.send([_message(key, place, body) for key, place in batch])
        sent += len(batch)
    say(f"{sent:,} messages sent")
    queue.close()


def _files(listing: object) -> Iterator[tuple[str, str]]:
    """Key and URL (or path) of each file, each key once."""
    from tally.sources.listing import Listing

    assert isinstance(listing, Listing)
    seen: set[str] = set()
    for index, location in enumerate(listing.locations):
        for name, *_ in listing.entries(index, None):
            key = location.prefix + name
            if key not in seen:
                seen.add(key)
                yield key, location.within + name


def _message(key: str, place: str, body: str) -> Message:
    from tally.sources.queues.base import Message

    if body in ("text", "url"):
        return Message((key if body == "text" else place).encode())
    fields = {"key": key, "url": place}
    return Message((json.dumps(fields) if body == "json" else repr(fields)).encode())


def _opened(url: str) -> Queue:
    from tally.sources.queues.factory import check, open_queue

    check(url)
    return open_queue(url)


def _show(messages: Iterable[Message]) -> None:
    for each in messages:
        say(json.dumps({"body": each.body.decode("utf-8", "backslashreplace"), "headers": dict(each.headers)}))
