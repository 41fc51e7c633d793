"""What has changed in jobs, for all who watch them: one look at the database serves every open page.

The feed looks twice a second, and only at jobs that somebody watches. A subscriber that reads slowly gets the newest
state, not every state in between, so its memory does not grow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi.sse import ServerSentEvent

from tally.errors import TallyError

log = logging.getLogger("tally")

LOOK_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
"""A stream says something at least that often, so that proxies keep it open and a lost client is noticed."""
ASK_SECONDS = 2.0
"""Seconds for which it stands that somebody may see something."""
_NOT_LOOKED: Any = object()

State = TypeVar("State")


class Topic:
    """One thing that is watched: what it is called, how it is looked at, and who waits for it."""

    def __init__(self, look: Callable[[], object]) -> None:
        self.look = look
        self.last: object = _NOT_LOOKED
        self.subscribers: set[asyncio.Queue[object]] = set()


class Feed:
    """Topics and their subscribers. All methods belong to the server's event loop; looks run in threads."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def subscribe(self, name: str, look: Callable[[], State]) -> AsyncIterator[asyncio.Queue[State]]:
        """A queue that gets what ``look`` returns whenever that has changed, the first time at once.

        name: of the topic; who subscribes to the same name shares its looks. look: returns a value that can be
        compared; called in a thread. It holds one state: the newest replaces one that was not read.
        """
        topic = self._topics.setdefault(name, Topic(look))
        queue: asyncio.Queue[object] = asyncio.Queue(maxsize=1)
        if topic.last is not _NOT_LOOKED:
            queue.put_nowait(topic.last)
        topic.subscribers.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="tally-feed")
        try:
            yield queue  # type: ignore[misc]
        finally:
            topic.subscribers.discard(queue)
            if not topic.subscribers:
                self._topics.pop(name, None)

    async def stream(
        self,
        name: str,
        look: Callable[[], State],
        event: Callable[[State], ServerSentEvent],
        *,
        is_last: Callable[[State], bool],
        may_see: Callable[[], Awaitable[bool]],
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: what ``event`` makes of each new state, up to the one that ``is_last``.

        They end as well when who gets them may not see them any more, which ``may_see`` is asked for now and then.
        """
        async with self.subscribe(name, look) as states:
            following = time.monotonic() + ASK_SECONDS
            while True:
                try:
                    state = await asyncio.wait_for(states.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    state = _NOT_LOOKED
                if time.monotonic() >= following:
                    if not await may_see():
                        return
                    following = time.monotonic() + ASK_SECONDS
                if state is _NOT_LOOKED:
                    yield ServerSentEvent(comment="still here")
                    continue
                yield event(state)
                if is_last(state):
                    return

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while self._topics:
            for topic in list(self._topics.values()):
                try:
                    now = await asyncio.to_thread(topic.look)
                except TallyError as error:  # away, or deleted: subscribers see the last state until it is back
                    log.debug("feed: %s", error)
                    continue
                except Exception:  # the others are told all the same
                    log.exception("looking at what is watched on pages failed")
                    continue
                if now != topic.last:
                    topic.last = now
                    for queue in topic.subscribers:
                        if queue.full():
                            queue.get_nowait()
                        queue.put_nowait(now)
            await asyncio.sleep(LOOK_SECONDS)


def seldom(look: Callable[[], State], *, seconds: float) -> Callable[[], State]:
    """As ``look``, but asked again only after so many seconds; until then, its last answer stands. For one thread at a
    time."""
    last: State = _NOT_LOOKED
    following = 0.0

    def look_seldom() -> State:
        nonlocal last, following
        if last is _NOT_LOOKED or time.monotonic() >= following:
            last = look()
            following = time.monotonic() + seconds
        return last

    return look_seldom
