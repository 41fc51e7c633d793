"""Queues over HTTP: how much waits, what is dead and why; dead messages go back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from tally.server.api.views import MessageView, Replayed
from tally.server.auth.guard import Operator, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.places import check_places
from tally.server.room import Room
from tally.sources.queues.base import Depth, Queue
from tally.sources.queues.factory import check, open_queue

router = APIRouter(
    prefix="/queues", tags=["queues"], route_class=OnceRoute, responses=answers(400, 401, 403, 409, 422, 429, 503)
)

Url = Annotated[str, Query(description="The queue, without a password.", min_length=1, max_length=2000)]


class Replay(BaseModel):
    """Which dead messages to put back. limit: at most so many, oldest first."""

    url: str = Field(min_length=1, max_length=2000)
    limit: int = Field(1000, ge=1, le=100_000)


@router.get("/depth")
def queue_depth(request: Request, who: Viewer, url: Url) -> Depth:
    """How many messages wait, are in hand, and are dead; null where the broker does not tell."""
    with _opened(request, url) as queue:
        return queue.depth()


@router.get("/messages")
def peek_queue(
    request: Request,
    who: Viewer,
    url: Url,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    dead: Annotated[bool, Query(description="Dead messages, with their reasons.")] = False,
) -> list[MessageView]:
    """The oldest messages; they stay where they are."""
    with _opened(request, url) as queue:
        return [MessageView.of(each) for each in queue.peek(limit, dead=dead)]


@router.post("/replay")
def replay_queue(request: Request, who: Operator, wanted: Replay) -> Replayed:
    """Put dead messages back into the queue."""
    with _opened(request, wanted.url) as queue:
        return Replayed(replayed=queue.replay(wanted.limit))


@contextmanager
def _opened(request: Request, url: str) -> Iterator[Queue]:
    check(url)
    room: Room = request.app.state.brokers
    with room.place("asking the broker"):
        check_places([("queue", url)], request.app.state.settings.roots)
        queue = open_queue(url)
        try:
            yield queue
        finally:
            queue.close()
