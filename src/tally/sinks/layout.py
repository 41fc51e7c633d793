"""Where the files of one output lie, while a job runs and when it is finished."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import StorageError
from tally.storage import TEMPORARY, failure, key_of, open_store, temporary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

File = dict[str, Any]
"""A finished file in the manifest: ``path``, ``rows``, ``bytes``."""

_WORKING = re.compile(
    r"(?s:.*/)?"
    r"(?:(?:_tally|[^/]+\.tally)/(?:(?:attempts|final|work)/(?s:.*)|(?:job|manifest)\.json)"
    rf"|{re.escape(TEMPORARY)}[^/]*)"
)


def is_working(name: str) -> bool:
    """Whether the name is that of a file which jobs keep only while they run, whichever database knows of them."""
    return _WORKING.fullmatch(name) is not None


class OutputLayout:
    """The names of all files of one output, relative to :attr:`store`.

    root: the output folder; for a merged output, the folder of its one file. merged: the name of that file, or None.
    Picklable.
    """

    confirm: Callable[[], None] = staticmethod(lambda: None)
    """Raises if the output is no longer ours; see :meth:`confirmed`."""

    def __init__(self, root: str, merged: str | None = None) -> None:
        self.store = open_store(root)
        self.merged = merged
        self.staging = f"{merged}.tally/" if merged else "_tally/"
        self.manifest = f"{merged}.manifest.json" if merged else "_manifest.json"
        self.log = f"{merged}.log.jsonl" if merged else "_log.jsonl"
        self.success = None if merged else "_SUCCESS"
        self.claim = self.staging + "job.json"
        self.plan = self.staging + "manifest.json"
        self.attempts = self.staging + "attempts/"
        self.final = self.staging + "final/"
        self.work = self.staging + "work/"

    def __str__(self) -> str:
        return self.address(self.merged) if self.merged else key_of(self.store.url)

    def address(self, name: str) -> str:
        """The local path or URL of a name."""
        return f"{self.store.url.rstrip('/')}/{name}"

    def part(self, number: int, suffix: str) -> str:
        """The name of a final file of rows."""
        return self.merged or f"part-{number:05d}.{suffix}"

    def dead(self, suffix: str) -> str:
        """The name of the list of dead items. Readers of whole folders skip names that begin with ``_``."""
        return f"{self.merged.rpartition('.')[0]}.dead.{suffix}" if self.merged else f"_dead.{suffix}"

    def thumbnails(self, number: int) -> str:
        """The name of a final file of thumbnails, in a folder of their own."""
        folder = f"{self.merged.rpartition('.')[0]}.thumbnails" if self.merged else "_thumbnails"
        return f"{folder}/part-{number:05d}.parquet"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, or None if it is not there."""
        try:
            text = self.store.read(name)
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise StorageError(
                f"{self.address(name)} is damaged: it holds no JSON object",
                hint="Restore it, or remove it together with the output it belongs to.",
            )
        return content

    def write_json(self, name: str, content: dict[str, Any], *, exclusive: bool = False) -> None:
        """Write a JSON file, indented. Keys are sorted, except for inner ones: columns have an order."""
        text = json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False, default=str)
        self.store.write(name, f"{text}\n".encode(errors="backslashreplace"), exclusive=exclusive)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """A local path to write a final file to. On leaving, the file is durable; it is not published yet."""
        self.confirm()
        if self.store.is_local:
            path = Path(self.address(self.final + name))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                yield path
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise error if isinstance(error, StorageError) else failure("write", str(path), error) from None
            return
        with temporary.folder("final") as folder:
            path = Path(folder, name.rpartition("/")[2])
            try:
                yield path
            except OSError as error:
                raise error if isinstance(error, StorageError) else failure("write", str(path), error) from None
            self.confirm()
            self.store.upload(self.final + name, path)

    def publish(self, name: str) -> None:
        """Move a final file to its place. Repeatable."""
        self.move(self.final + name, name)

    @contextmanager
    def confirmed(self, confirm: Callable[[], None]) -> Iterator[None]:
        """Within it, ``confirm`` is called before each file is built or moved. It raises if the output is not ours."""
        self.confirm = confirm
        try:
            yield
        finally:
            del self.confirm

    def move(self, source: str, target: str) -> None:
        """Move a file, unless it was moved already."""
        self.confirm()
        try:
            self.store.move(source, target)
        except FileNotFoundError:
            if not self.store.exists(target):
                raise

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.store.is_local:
                return pq.ParquetFile(self.address(name))
            return pq.ParquetFile(pa.BufferReader(self.store.read(name)))
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise failure("read", self.address(name), error) from None

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file."""
        import pyarrow as pa

        with self.parquet(name) as file:
            try:
                return file.read(columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise failure("read", self.address(name), error) from None

    def sweep(self) -> None:
        """Remove the staging folder, the claim last."""
        store = self.store
        self._clear()
        store.delete([self.plan])
        for folder in [self.staging] if self.merged else ["", self.staging]:
            store.remove_partial(folder)
        store.delete([self.claim])
        self._close()

    def sweep_again(self) -> None:
        """Remove what was staged after the staging folder was removed; nothing if the output is claimed."""
        if self.read_json(self.claim) is None:
            self._clear()
            self._close()

    def _clear(self) -> None:
        for folder in (self.final, self.attempts, self.work):
            self.store.delete_tree(folder)

    def _close(self) -> None:
        self.store.remove_folder(self.staging)


def staged_name(attempt: str, number: int | str = 0, suffix: str = "parquet") -> str:
    """The name of an attempt's file of results, relative to the staging folder."""
    return f"attempts/{attempt}+{number}.{suffix}" if number else f"attempts/{attempt}.{suffix}"


def attempt_of(name: str) -> str:
    """The attempt that wrote the file of that name."""
    return name.removeprefix("attempts/").removesuffix(".parquet").partition("+")[0]
