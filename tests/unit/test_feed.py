"""One look serves all who watch; a stream ends with its last state, also where that is the first."""

from __future__ import annotations

import asyncio
import itertools

import pytest

pytest.importorskip("fastapi")

from fastapi.sse import ServerSentEvent

from tally.server import feed as feed_module
from tally.server.feed import Feed, seldom


async def seen(states: list[str | None], last: str | None) -> list[str | None]:
    feed, looks = Feed(), iter(states)
    current: str | None = states[0]

    def look() -> str | None:
        nonlocal current
        current = next(looks, current)
        return current

    async def may_see() -> bool:
        return True

    stream = feed.stream(
        "a", look, lambda state: ServerSentEvent(data=state), is_last=lambda state: state == last, may_see=may_see
    )
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


def test_who_may_not_see_it_any_more_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "ASK_SECONDS", 0.0)
    answers = iter([True, True, False])

    async def may_see() -> bool:
        return next(answers)

    async def told() -> list[int]:
        feed, states = Feed(), itertools.count()
        stream = feed.stream(
            "a", lambda: next(states), lambda state: ServerSentEvent(data=state), is_last=lambda _: False,
            may_see=may_see,
        )  # fmt: skip
        found = [event.data async for event in stream]
        await feed.close()
        return found

    assert len(asyncio.run(told())) == 2
