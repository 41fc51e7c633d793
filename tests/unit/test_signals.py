"""Ctrl-C comes at any moment, and most likely when something has just been printed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

from tally.jobs.signals import stop_signals

PRINTING = """
import signal
import threading

from rich.console import Console
from tally.jobs.signals import stop_signals

console = Console(stderr=True)
stopped = []
enough = threading.Event()

def stop(count):
    console.print(f"stop {count}")
    stopped.append(count)
    if count == 60:
        enough.set()

signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes when all is over
with stop_signals(stop):
    while not enough.is_set():
        console.print("working")
assert stopped == [*range(1, len(stopped) + 1)], stopped
"""


def test_ctrl_c_in_the_midst_of_printing() -> None:
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", PRINTING], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "stop 60\n" not in said:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, "".join(said[-20:])
    assert [line for line in said if line.startswith("stop")][:60] == [f"stop {count + 1}\n" for count in range(60)]


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    counted: list[int] = []
    with stop_signals(counted.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert counted == [1, 2], "and what had come is done"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_closed_terminal_stops_once_and_nohup_is_obeyed() -> None:
    counted: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_signals(counted.append):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)  # the shell passes it on, too
            signal.raise_signal(signal.SIGTERM)
        assert counted == [1, 2]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals(counted.append):
            signal.raise_signal(signal.SIGHUP)
        assert counted == [1, 2]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_called_at_once_may_raise() -> None:
    def give_up(count: int) -> None:
        if count > 1:
            raise KeyboardInterrupt

    counted: list[int] = []
    try:
        with stop_signals(counted.append, at_once=give_up):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        counted.append(-1)
    assert counted == [1, 2, -1]


def test_other_threads_get_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def other() -> None:
        with stop_signals(lambda count: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]
