"""Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP) as a clean stop."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tally.jobs.stop import Stop


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into a clean stop while the job runs; the second one kills its workers."""

    def ask(count: int) -> None:
        stop(now=count > 1)

    def give_up(count: int) -> None:
        if count > 1 and not stop.attached:
            raise KeyboardInterrupt

    with stop_signals(ask, at_once=give_up):
        yield


@contextmanager
def stop_signals(stop: Callable[[int], None], *, at_once: Callable[[int], None] = lambda count: None) -> Iterator[None]:
    """While the context lasts, call ``stop`` at each SIGINT and SIGTERM: with 1 at the first, 2 at the second ...

    SIGHUP is the first, or nothing: who closes a terminal may send it twice. It stays ignored for who uses ``nohup``.

    A thread calls it: a signal may come while the main thread holds a lock, and whatever the signal itself calls
    would wait for that lock for ever. ``at_once`` is called by the signal itself, and may raise what ends the main
    thread. A no-op outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: queue.SimpleQueue[int] = queue.SimpleQueue()
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        if number == signal.SIGHUP and count:
            return
        count += 1
        came.put(count)
        at_once(count)

    def run() -> None:
        while each := came.get():
            stop(each)

    thread = threading.Thread(target=run, name="tally-stop", daemon=True)
    thread.start()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came.put(0)
        thread.join()
