"""Whether something has changed in a folder of this machine, as its operating system tells: listing a folder of a
million files every few seconds would keep a core busy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from importlib.util import find_spec

log = logging.getLogger("tally")

_TURN_MILLISECONDS = 500
"""After which a thread looks whether it is to end."""


class Notices:
    """Of several folders, each with all that is below it.

    Not to be used for what other machines write: they give no notice of it.
    """

    def __init__(self) -> None:
        self._folders: dict[str, _Folder] = {}
        self._can = find_spec("watchfiles") is not None

    def changed(self, folder: str) -> bool:
        """Whether anything may have changed there since the last call; True where nobody can tell."""
        if not self._can:
            return True
        if folder not in self._folders:
            self._folders[folder] = _Folder(folder)
        return self._folders[folder].changed()

    def keep(self, folders: Iterable[str]) -> None:
        """Forget all others."""
        for gone in self._folders.keys() - set(folders):
            self._folders.pop(gone).stop()

    def close(self) -> None:
        self.keep(())


class _Folder:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._changed, self._stopping = threading.Event(), threading.Event()
        self._changed.set()
        self._thread = threading.Thread(target=self._run, name="tally-notices", daemon=True)
        self._thread.start()

    def changed(self) -> bool:
        changed = self._changed.is_set() or not self._thread.is_alive()
        self._changed.clear()
        return changed

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        from watchfiles import watch

        begun = False
        try:
            for changes in watch(
                self._folder,
                watch_filter=None,
                stop_event=self._stopping,
                rust_timeout=_TURN_MILLISECONDS,
                yield_on_timeout=True,
                raise_interrupt=False,
            ):
                if changes or not begun:  # what came before the first notice could have been given
                    self._changed.set()
                begun = True
        except (OSError, RuntimeError) as error:  # it has gone, or the system watches no more folders
            log.info("%s is listed again and again, as there is no notice of changes: %s", self._folder, error)
