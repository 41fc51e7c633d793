"""Processes that are started and watched for servers and loops."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tally.engines import logs
from tally.jobs.children import Children

DEADLINE = 60.0


def test_they_are_there_until_they_are_forgotten_and_their_logs_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 400)
    monkeypatch.setattr(logs, "HEAD_BYTES", 100)
    monkeypatch.setattr(logs, "TAIL_BYTES", 100)
    wake, log = threading.Event(), tmp_path / "logs" / "child.log"
    children: Children[str] = Children(wake)
    children.start("reading", "this", log=log)  # it prints a poem
    assert (len(children), children.work) == (1, ["reading"])
    assert wake.wait(DEADLINE)
    assert children.ended() == ["reading"]
    kept = log.read_text()
    assert (len(kept) < 400, kept.startswith("The Zen"), "left out" in kept) == (True, True, True)
    assert log.stat().st_mode & 0o077 == 0
    children.forget("reading")
    assert len(children) == 0


def test_they_end_when_they_are_told(tmp_path: Path) -> None:
    wake = threading.Event()
    children: Children[str] = Children(wake)
    children.start("serving", "http.server", "--bind", "127.0.0.1", "0", log=tmp_path / "log")

    def settle() -> None:
        for each in children.ended():
            children.forget(each)

    children.stop(settle)
    assert len(children) == 0
