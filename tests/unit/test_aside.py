"""What takes long is done beside the server; who would hold too many of its threads is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("pebble")

from tally.errors import RefusedError, SpecError
from tally.server import aside as aside_module
from tally.server.aside import Aside
from tally.server.room import Room


def held(begun: Path, end: Path) -> str:
    """Says that it has begun, and ends when it is told to."""
    begun.touch()
    while not end.exists():
        time.sleep(0.01)
    return "done"


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> Aside:
    monkeypatch.setattr(aside_module, "PROCESSES", 1)
    return Aside()


def test_a_call_that_would_wait_too_long_for_a_process_is_refused(
    aside: Aside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside_module, "WAIT_SECONDS", 0.0)
    begun, end = tmp_path / "begun", tmp_path / "end"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(aside.call, held, begun, end, seconds=60, what="the first")
        while not begun.exists():
            assert not first.done()
            time.sleep(0.01)
        with pytest.raises(RefusedError, match="the second would have to wait") as refused:
            aside.call(held, begun, end, seconds=0.01, what="the second")
        assert (refused.value.status, refused.value.retry_after) == (503, 5)
        end.touch()
        assert first.result() == "done"
    assert aside.call(held, begun, end, seconds=60, what="the third") == "done"
    aside.close()


def test_a_call_that_takes_too_long_is_stopped(aside: Aside, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"the first was stopped after 0\.1 s"):
        aside.call(held, tmp_path / "begun", tmp_path / "end", seconds=0.1, what="the first")
    aside.close()


def test_a_room_has_so_many_places() -> None:
    room = Room(2)
    third = pytest.raises(RefusedError, match="a third would have to wait")
    with room.place("one"), room.place("another"), third, room.place("a third"):
        raise AssertionError
    with room.place("one"), room.place("another"):
        pass
