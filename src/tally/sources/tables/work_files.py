"""The work files of a table job: made once, and whole.

They are made in a folder of a random name; then a marker is written that names the folder. If several processes do so
at once, the first marker counts. The other folders are removed, and so are those that a crash left behind.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import OutputExistsError, SourceChangedError, SourceNotFoundError, StorageError
from tally.sources.tables.formats import open_parquet
from tally.sources.tables.ingest import Made
from tally.storage import CHANGED_HINT, Store, failure, open_store, temporary

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow.parquet as pq

MARKER = "table.json"
_PREFIX = "table-"
"""The beginning of the folders' names."""


class WorkFolder:
    """A place for work files: the path of a folder, or a URL."""

    def __init__(self, location: str) -> None:
        self._store: Store = open_store(location)

    def ensure(self, fingerprint: str, make: Callable[[Path], Made]) -> None:
        """Make the work files unless they are there. make: makes them in a new folder of this machine.

        fingerprint: of the source and of what is made of it. Raises SourceChangedError if there are files with another
        one.
        """
        if self._known(fingerprint):
            return
        name = _PREFIX + secrets.token_hex(8)
        try:
            with self._folder(name) as folder:
                made = make(folder)
            marker = {"folder": name, "fingerprint": fingerprint, "made": made.to_json()}
            self._store.write(MARKER, json.dumps(marker).encode(), exclusive=True)
        except OutputExistsError:
            self._store.delete_tree(name)
        except StorageError:
            # Another process may have been faster, and have removed this folder.
            if not self._known(fingerprint):
                self._store.delete_tree(name)
                raise
        except BaseException:
            self._store.delete_tree(name)
            raise
        self._known(fingerprint)
        self._sweep()

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        """An empty local folder, whose files are in the store under ``name`` in the end."""
        if self._store.is_local:
            folder = Path(self._store.url, name)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise failure("write", str(folder), error) from None
            yield folder
            return
        folder = temporary.make("tables")
        try:
            yield folder
            for path in sorted(folder.iterdir()):
                self._store.upload(f"{name}/{path.name}", path)
        finally:
            temporary.remove(folder)

    def _known(self, fingerprint: str) -> bool:
        marker = self._marker()
        if marker is None:
            return False
        if marker["fingerprint"] != fingerprint:
            raise SourceChangedError(
                "the source has changed since its rows were made ready for scoring", hint=CHANGED_HINT
            )
        return True

    def _marker(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._store.read(MARKER))
        except SourceNotFoundError:
            return None
        return found

    def _sweep(self) -> None:
        """Remove the folders that other processes made or left behind."""
        marker = self._marker()
        assert marker is not None
        for name in self._store.folders() - {marker["folder"]}:
            if name.startswith(_PREFIX):
                self._store.delete_tree(name)

    def open(self) -> WorkFiles:
        """The files. Raises StorageError if they were not made."""
        marker = self._marker()
        if marker is None:
            raise StorageError(
                f"the work files of the table are not at {self._store.url}", hint="score it again with --overwrite"
            )
        return WorkFiles(self._store, marker["folder"], Made.from_json(marker["made"]), marker["fingerprint"])

    def forget(self) -> None:
        """Remove the files: they are made anew."""
        self._store.delete([MARKER])
        for name in self._store.folders():
            if name.startswith(_PREFIX):
                self._store.delete_tree(name)


class WorkFiles:
    """Work files that exist. folder: the name of theirs, which no others have."""

    def __init__(self, store: Store, folder: str, made: Made, fingerprint: str) -> None:
        self.made, self.fingerprint = made, fingerprint
        self.folder = folder
        self._store = store

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open one of them. Raises StorageError."""
        return open_parquet(self._store, f"{self.folder}/{name}")
