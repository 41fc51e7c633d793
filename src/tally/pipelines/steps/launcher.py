"""Starts the processes of steps, holds them to their limits, and writes down how they ended.

A process of its own, between the driver of a pipeline's run and the steps: if the driver is killed, steps that run are
not cut off in the middle, and none is begun. A driver that resumes the run finds their ends in their folders. It
imports nothing of ours (``python -I -S launcher.py FOLDER``), starts in a few milliseconds and forks as fast.

Requests come on its standard input, one JSON object a line:

- ``start``: an id; with ``folder`` (of the step), ``argv``, ``env``, ``cwd``, ``limit`` (seconds since the epoch, or
  null), ``root`` (whether it has a file system of its own, see below), ``binds`` (folders of this machine, paths in it,
  and whether they are only read), ``keep`` (folders below ``/tmp`` that it sees), ``opaque`` (paths where it sees
  nothing of the machine's), ``stdout`` (a file, or null: into the log), ``after`` (a command that is run, and waited
  for, when it has ended, however it did; or null);
- ``stop``: an id; ``now``: kill it at once.

Answers go to its standard output: ``{"id": …, "code": …}``, with what is in the file ``exit`` of the step's folder:
``code`` (negative: a signal), ``late`` (its limit was over), ``error`` (why it could not be started), ``at``.

A file system of its own: what is in the step's folder ``root`` is laid over that of this machine. Folders that are in
both show what is in both; what a step writes into such a folder itself, and into ``/`` and ``/tmp``, is its own. All
other folders are the machine's. It needs namespaces of Linux: as root, or as a user where the system allows it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import selectors
import signal
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, NoReturn

GRACE_SECONDS = 10.0
"""How long a step that has been asked to end may take."""
MARK = "TALLY_PIPELINE_STEP"
"""The environment variable by which a step's processes are known."""
NOT_FOUND = 127

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # on every machine
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that answers -1 for an error. Raises OSError."""
    libc = _LIBC
    if name == "pivot_root":
        made = libc.syscall(ctypes.c_long(_PIVOT_ROOT[os.uname().machine]), *arguments)
    else:
        made = getattr(libc, name)(*arguments)
    if made != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def bind(source: str, target: str) -> None:
    call("mount", os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND | _MS_REC), None)


def only_read(path: str) -> None:
    """Let nothing be written into what is mounted there, and below. It takes Linux 5.12. Raises OSError."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    call(
        "syscall", ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attributes,
        ctypes.c_size_t(len(attributes)),
    )  # fmt: skip


def own_file_system(
    root: str, binds: Sequence[tuple[str, str, bool]], keep: Iterable[str] = (), opaque: Iterable[str] = ()
) -> None:
    """Make ``root``, laid over the machine's file system, the root of this process.

    binds: folders or files of this machine, where each is to be found, and whether it is only read. keep: folders below
    ``/tmp`` that it sees. opaque: folders of ``root`` that are not laid over those of the machine, but stand in their
    place.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        call("unshare", _CLONE_NEWNS)
    except OSError:  # not as root, or as one without rights: a container's
        call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open("/proc/self/" + name, "w") as file:
                file.write(text)
    call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)
    targets = {root + inside for inside in [*(inside for _, inside, _ in binds), *opaque]}
    scratch = root + "/tmp"  # noqa: S108
    os.makedirs(scratch, exist_ok=True)
    os.chmod(scratch, 0o1777)  # noqa: S103 - as it is everywhere
    targets.add(scratch)
    _lay_over(root, "/", targets)
    for source, inside, reads in [*binds, *((each, each, False) for each in keep)]:
        target = root + inside
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        elif not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        bind(source, target)
        if reads:
            only_read(target)
    bind(root, root)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _lay_over(own: str, machine: str, targets: set[str]) -> None:
    """Show what is in a folder of the machine in one of the step's own."""
    try:
        entries = list(os.scandir(machine))
    except OSError:
        return  # not this user's to see
    for entry in entries:
        target = os.path.join(own, entry.name)
        if os.path.lexists(target):
            if target not in targets and os.path.isdir(target) and not os.path.islink(target) and entry.is_dir():
                _lay_over(target, entry.path, targets)
            continue
        try:
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
                continue
            if entry.is_dir(follow_symlinks=False):
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            bind(entry.path, target)
        except OSError as error:
            if error.errno not in (1, 2, 13):  # not allowed, not there any more: it is not shown
                raise


def allowed() -> str | None:
    """None if a process of this user can have a file system of its own; else why not."""
    if sys.platform != "linux" or os.uname().machine not in _PIVOT_ROOT:
        return "it takes namespaces, which only Linux has"
    import tempfile

    try:
        root = tempfile.mkdtemp()
    except OSError as error:
        return str(error)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own_file_system(root, [])
            text = ""
        except BaseException as error:
            text = str(error) or type(error).__name__
        os.write(writer, text.encode()[:500])
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        text = file.read()
    os.waitpid(child, 0)
    _remove_places(root)
    return text or None


def _remove_places(root: str) -> None:
    """Remove a folder with the places that were made in it to show the machine's files at, which are empty. Anything
    else is left, above all what is mounted."""
    try:
        for entry in list(os.scandir(root)):
            remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
            remove(entry.path)
        os.rmdir(root)
    except OSError:
        return


class Launcher:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._steps: dict[int, dict[str, Any]] = {}
        # Requests of what runs, by the first process of each.
        self._detached = False
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            call("prctl", _SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._lock = os.open(os.path.join(folder, f"{os.getpid()}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(0, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        self._say({"ready": True})
        left = b""
        while not self._detached or self._steps:
            for key, _ in selector.select(self._patience()):
                if key.fd == self._wake:
                    os.read(self._wake, 4096)
                    continue
                block = os.read(0, 1 << 16)
                if not block:  # the driver is gone; what it had not finished to say is not done
                    selector.unregister(0)
                    self._detached = True
                    with open(os.path.join(self._folder, f"{os.getpid()}.closed"), "w"):
                        pass
                    continue
                *lines, left = (left + block).split(b"\n")
                for line in lines:
                    self._do(json.loads(line))
            self._reap()
            self._hold_to_limits()
        os.unlink(os.path.join(self._folder, f"{os.getpid()}.lock"))
        if self._detached:
            os.unlink(os.path.join(self._folder, f"{os.getpid()}.closed"))

    def _patience(self) -> float | None:
        times = [step["limit"] for step in self._steps.values() if step["limit"] is not None]
        return max(0.0, min(times) - time.time()) + 0.001 if times else None

    def _say(self, answer: Mapping[str, Any]) -> None:
        try:
            os.write(1, json.dumps(answer).encode() + b"\n")
        except OSError:
            pass  # the driver is gone; it is in the step's folder

    def _do(self, request: dict[str, Any]) -> None:
        if "start" in request:
            self._start(request)
        for pid, step in self._steps.items():
            if step["start"] == request.get("stop") and "end" not in step:
                self._end(pid, step, now=request.get("now", False))

    def _start(self, step: dict[str, Any]) -> None:
        step.setdefault("limit", None)
        step |= {"late": False, "asked": False}
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become(step, writer)
        os.close(writer)
        with open(reader, "rb") as file:
            error = file.read()
        self._steps[pid] = step
        if error:
            step["error"] = error.decode("utf-8", "replace")

    def _begin_process(self, folder: str) -> None:
        """In a new one: of its own group, with signals as usual, and known from its step's folder."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        note = os.path.join(folder, "pid")
        with open(note + ".new", "w") as file:
            json.dump({"pid": os.getpid(), "launcher": os.getppid()}, file)
        os.replace(note + ".new", note)

    def _begin_after(self, step: dict[str, Any]) -> None:
        """What is to be done once a step's process has ended."""
        pid = os.fork()
        if pid == 0:
            try:
                self._begin_process(step["folder"])
                nothing = os.open(os.devnull, os.O_RDWR)
                for each in (0, 1, 2):
                    os.dup2(nothing, each)
                os.close(self._lock)
                os.execvpe(step["after"][0], step["after"], step["env"])  # noqa: S606
            finally:
                os._exit(NOT_FOUND)
        self._steps[pid] = step

    def _become(self, step: Mapping[str, Any], writer: int) -> NoReturn:
        try:
            folder = step["folder"]
            self._begin_process(folder)
            stdin = os.open(os.devnull, os.O_RDONLY)
            log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            out = log
            if step.get("stdout"):
                out = os.open(step["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for source, target in ((stdin, 0), (out, 1), (log, 2)):
                os.dup2(source, target)
            for each in {stdin, log, out} - {0, 1, 2}:
                os.close(each)
            os.close(self._lock)
            if step["root"]:
                own_file_system(os.path.join(folder, "root"), step["binds"], step["keep"], step["opaque"])
            os.chdir(step["cwd"])
            os.execvpe(step["argv"][0], step["argv"], step["env"])  # noqa: S606
        except FileNotFoundError as error:
            text = (
                f"there is no command {step['argv'][0]!r}"
                if error.filename != step["cwd"]
                else f"there is no folder {step['cwd']!r}"
            )
        except BaseException as error:
            text = f"{step['argv'][0]}: {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(NOT_FOUND)

    def _hold_to_limits(self) -> None:
        now = time.time()
        for pid, step in self._steps.items():
            if step["limit"] is not None and step["limit"] <= now:
                if not step["asked"]:
                    step["late"] = True
                self._end(pid, step, now=step["asked"])

    def _end(self, pid: int, step: dict[str, Any], now: bool) -> None:
        """Ask the whole group to end, and kill it if it does not."""
        self._signal(pid, signal.SIGKILL if now else signal.SIGTERM)
        step["asked"] = True
        step["limit"] = None if now else time.time() + GRACE_SECONDS

    def _signal(self, pid: int, number: int) -> None:
        try:
            os.killpg(pid, number)
        except OSError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._steps:
                self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, code: int) -> None:
        step = self._steps.pop(pid)
        self._signal(pid, signal.SIGKILL)  # a container ends with its main process
        if "end" not in step:
            step["end"] = {"id": step["start"], "code": code, "late": step["late"], "at": time.time()}
            step["limit"] = None
            if step.get("after"):
                self._begin_after(step)
                return
        self._kill_strays(step["start"])
        end = step["end"]
        if "error" in step:
            end["error"] = step["error"]
        note = os.path.join(step["folder"], "exit")
        try:
            with open(note + ".new", "w") as file:
                json.dump(end, file)
            os.replace(note + ".new", note)
        except OSError as error:
            end["error"] = f"cannot write {note}: {error.strerror}"
        self._say(end)

    def _kill_strays(self, name: str) -> None:
        """Kill what has left the step's group: it is this process's child now."""
        if sys.platform != "linux":
            return
        mark = f"{MARK}={name}".encode()
        for _ in range(10):
            try:
                with open(f"/proc/self/task/{os.getpid()}/children") as file:
                    children = [int(each) for each in file.read().split()]
            except OSError:
                return
            killed = False
            for child in children:
                if child in self._steps:
                    continue
                try:
                    with open(f"/proc/{child}/environ", "rb") as file:
                        if mark in file.read().split(b"\0"):
                            os.kill(child, signal.SIGKILL)
                            killed = True
                except OSError:
                    continue
            if not killed:
                return
            time.sleep(0.001)


if __name__ == "__main__":
    if sys.argv[1:] == ["--allowed"]:
        print(allowed() or "")
    else:
        Launcher(sys.argv[1]).run()
