"""What the engine suite runs on workers: the best and the worst behaviour that a scorer may show."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
import zlib
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

from tally.engines import task, watchdog


@dataclass
class State:
    """What :func:`setup` makes; ``tasks`` counts those that this worker has begun."""

    args: tuple[Any, ...]
    pid: int
    tasks: int = 0


class TwoPartError(Exception):
    """Pickles, but cannot be made again from its pickle."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


# Setting up -----------------------------------------------------------------------------------------


def setup(*args: Any) -> State:
    return State(args, os.getpid())


def setup_anew(*args: Any) -> State:
    """A worker that can be set up any number of times, but not with ``refuse`` if it was before. Its arguments are
    those of all times, the last first."""
    if "refuse" in args and _set_up:
        raise ValueError("not once more")
    _set_up.append(args)
    return setup(*reversed(_set_up))


_set_up: list[tuple[Any, ...]] = []


def setup_with_farewell(path: str) -> State:
    """Leave a file at ``path`` when the worker ends in order."""
    Finalize(None, Path(path).touch, exitpriority=1)
    return setup()


def setup_that_waits(address: tuple[str, int]) -> State:
    wait_at(setup(), address)
    return setup()


def setup_that_fails(message: str) -> NoReturn:
    raise ValueError(message)


def setup_that_dies(code: int) -> NoReturn:
    os._exit(code)


class Unreadable:
    """Pickles, but cannot be read in another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return unread, (os.getpid(),)


def unread(pid: int) -> Unreadable:
    if pid != os.getpid():
        raise LookupError("this cannot be read elsewhere")
    return Unreadable()


# Well behaved ---------------------------------------------------------------------------------------


def describe(state: State) -> State:
    state.tasks += 1
    return state


def echo(state: State, value: Any) -> Any:
    return value


def make(state: State, size: int) -> bytes:
    return b"\x5a" * size


def checksum(state: State, data: bytes) -> tuple[int, int]:
    return len(data), zlib.crc32(data)


def hold(state: State, mib: int) -> int:
    """Keep so much memory for as long as the worker lives; returns its process id."""
    _held.append(b"\x5a" * (mib << 20))
    return os.getpid()


_held: list[bytes] = []


def say(state: State, word: str) -> None:
    """From Python, which may hold it back, and from below it."""
    print(f"{word} printed")
    os.write(2, f"{word} written\n".encode())


def interrupts_blocked(state: State) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def wait_at(state: State, address: tuple[str, int]) -> int:
    """Tell the gate at ``address`` this worker's process id, and wait until it lets go."""
    with socket.create_connection(address) as gate:
        gate.sendall(b"%d\n" % os.getpid())
        gate.recv(1)
    return os.getpid()


def start_children(state: State, address: tuple[str, int], mib: int = 0) -> int:
    """Start a process, and one that leaves the session and loses its parent; all of them meet at the gate.

    mib: memory that the first of them holds.
    """
    meet = f"from tally.testing.tasks import wait_at; wait_at(None, {address!r})"
    away = f"import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); {meet}"
    watchdog.busy(3, 4)
    subprocess.Popen([sys.executable, "-c", f"held = b'1' * ({mib} << 20); {meet}"])
    subprocess.run([sys.executable, "-c", away], check=True)
    return wait_at(state, address)


def leave_a_child(state: State) -> str:
    """Start a process that ends only if it is ended; returns this process's id and its."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    return f"{os.getpid()} {child.pid}"


# Reporting and stopping -----------------------------------------------------------------------------


def report(state: State, values: list[Any], address: tuple[str, int] | None = None, how: str | None = None) -> str:
    """Report these values; then wait at the gate, if there is one, and end as ``how`` says."""
    for value in values:
        task.report(value)
    if address is not None:
        wait_at(state, address)
    if how is not None:
        die(state, how, 3, 7)
    return "reported"


def report_and_count(state: State, number: int, path: str) -> None:
    """Report that many numbers; the file at ``path`` has as many bytes as were reported."""
    with open(path, "wb", buffering=0) as file:
        for value in range(number):
            task.report(value)
            file.write(b".")


def report_unpicklable(state: State) -> None:
    task.report(threading.Lock())


def report_unreadable(state: State) -> str:
    task.report("before")
    task.report(Unreadable())
    task.report("after")
    return "reported"


def report_too_late(state: State, address: tuple[str, int]) -> None:
    """Leave a thread behind that stops at the gate, reports, and stops there again."""

    def late() -> None:
        wait_at(state, address)
        task.report("too late")
        wait_at(state, address)

    threading.Thread(target=late, daemon=True).start()


def is_stopping(state: State) -> bool:
    return task.stopping()


def run_until_stopped(state: State, address: tuple[str, int] | None = None, error: str | None = None) -> int:
    """Pass the gate, then work until asked to stop; returns the process id, or raises."""
    if address is not None:
        wait_at(state, address)
    while not task.stopping():
        pass
    if error is not None:
        raise ValueError(error)
    return os.getpid()


def pass_gate_and_hang(state: State, address: tuple[str, int], how: str) -> NoReturn:
    """Report that it begins, pass the gate, and take no notice of being asked to stop."""
    task.report("begun")
    watchdog.busy(2, 3)
    wait_at(state, address)
    hang(state, how, None, 2, 3)


# Failing --------------------------------------------------------------------------------------------


def fail(state: State, error: BaseException) -> NoReturn:
    raise error


def fail_in_two_parts(state: State, what: str, where: str) -> NoReturn:
    raise TwoPartError(what, where)


def fail_with_a_stranger(state: State, message: str) -> NoReturn:
    """Raise an exception whose class only this process knows, as a user's script may."""
    module = types.ModuleType("known_to_this_worker_only")
    stranger = type("StrangerError", (Exception,), {"__module__": module.__name__})
    module.StrangerError = stranger  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    raise stranger(message)


def unpicklable(state: State, kind: str) -> Any:
    class Local:
        pass

    match kind:
        case "lambda":
            return lambda: None
        case "local":
            return Local()
        case "lock":
            return threading.Lock()
        case "iterator":
            return iter(lambda: 0, 1)
        case "deep":
            deep: list[Any] = []
            for _ in range(100_000):
                deep = [deep]
            return deep
        case _:
            return Unreadable()


# Lost -----------------------------------------------------------------------------------------------


def die(state: State, how: str, start: int = 0, stop: int = 0, ahead: int = 0) -> NoReturn:
    """End this worker while it is busy with ``start <= p < stop``: by an exit code or a signal's name."""
    watchdog.busy(start, stop, ahead=ahead)
    if how.isdigit():
        os._exit(int(how))
    if how == "SIGSEGV":
        ctypes.string_at(0)  # a real one: in native code, at a bad address
    os.kill(os.getpid(), signal.Signals[how])
    raise AssertionError("still alive")


def hang(state: State, how: str, limit: float | None, start: int = 0, stop: int = 0, ahead: int = 0) -> NoReturn:
    """Never end, except by a time limit: waiting, running Python, or in native code that holds the interpreter."""
    watchdog.busy(start, stop, ahead=ahead, limit=limit)
    match how:
        case "wait":
            threading.Event().wait()
        case "python":
            while True:
                pass
        case "native":
            ctypes.PyDLL(None).sleep(3600)
        case "regex":
            re.match(r"(a+)+$", "a" * 64 + "b")
    raise AssertionError("it ended")


def hurry(state: State, limits: list[float | None]) -> str:
    """Work on one batch after the other, each with its time limit; the last takes twice the first's."""
    for position, limit in enumerate(limits):
        watchdog.busy(position, position + 1, limit=limit)
    threading.Event().wait(2 * (limits[0] or 0.0))
    return "in time"


def grow(state: State, size: int, start: int = 0, stop: int = 0) -> NoReturn:
    """Hold ``size`` bytes, and never let go."""
    watchdog.busy(start, stop)
    held = bytearray(size)
    for page in range(0, size, 4096):
        held[page] = 1
    threading.Event().wait()
    raise AssertionError("still alive")
