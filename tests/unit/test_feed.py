"""One look serves all who watch; a stream ends with its last state, also where that is the first."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi")

from fastapi.sse import ServerSentEvent

from tally.server.feed import Feed, seldom


async def seen(states: list[str | None], last: str | None) -> list[str | None]:
    feed, looks = Feed(), iter(states)
    current: str | None = states[0]

    def look() -> str | None:
        nonlocal current
        current = next(looks, current)
        return current

    stream = feed.stream("a", look, lambda state: ServerSentEvent(data=state), is_last=lambda state: state == last)
    found = [event.data async for event in stream]
    await feed.close()
    return found


def test_states_are_told_when_they_change_up_to_the_last() -> None:
    assert asyncio.run(seen(["waiting", "waiting", "running", "finished"], "finished")) == [
        "waiting",
        "running",
        "finished",
    ]


def test_what_is_gone_before_the_first_look_ends_the_stream() -> None:
    assert asyncio.run(asyncio.wait_for(seen([None], None), 30)) == [None]


def test_what_is_costly_is_looked_at_seldom() -> None:
    looks = iter(range(9))
    now_and_then = seldom(lambda: next(looks), seconds=3600)
    assert [now_and_then() for _ in range(3)] == [0, 0, 0]
    always = seldom(lambda: next(looks), seconds=0)
    assert [always() for _ in range(3)] == [1, 2, 3]
