"""Waiting for what other processes do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen[Any],
    seconds: float = 60,
    told: Callable[[], str] = lambda: "",
) -> None:
    """Until the condition holds. Fails when the process ends first, or after so many seconds, with what it told."""
    deadline = time.monotonic() + seconds
    while True:
        # In this order: what the process does last may be what makes the condition true.
        over = process.poll() is not None or time.monotonic() > deadline
        if condition():
            return
        if over:
            process.kill()
            process.wait()
            pytest.fail(f"it did not come to that:\n{told()}")
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            pass


def eventually(
    condition: Callable[[], object],
    seconds: float = 60,
    told: Callable[[], object] = lambda: "",
    every: float = 0.02,
) -> None:
    """Ask until it holds, every so many seconds. Fails after ``seconds``, with what is told then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this did not happen:\n{told()}"
        time.sleep(every)
