"""Folders of files that belong to a table with versions (Delta, Iceberg, Hudi), and are not the table.

Which of the files hold its rows, and which of their rows still count, only its log says. That is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import PurePosixPath

from tally.errors import SpecError
from tally.sources.listing import Listing
from tally.sources.tables.ingest import TableFile
from tally.storage import Store, key_of, open_store

_LOGS = (
    ("Delta", "_delta_log", ".json"),
    ("Iceberg", "metadata", ".metadata.json"),
    ("Hudi", ".hoodie", ".properties"),
)
"""The kind of table, the folder that shows it, and how a name in it ends."""
_STORED = ("parquet", "orc", "avro")
"""What the rows of such tables are kept as; Iceberg's as any of these."""
_MOST = 64
"""The most folders that are looked into, in each location."""


def check(listing: Listing, inputs: Sequence[TableFile]) -> None:
    """Raises SpecError if a location would take the loose files of a table with versions."""
    for index, location in enumerate(listing.locations):
        names = [each.name for each in inputs if each.location == index and each.format in _STORED]
        if location.names or not names:  # files named one by one are meant
            continue
        folders = dict.fromkeys(str(folder) for name in names for folder in reversed(PurePosixPath(name).parents))
        root = open_store(location.root)
        for folder in islice(folders, _MOST):
            _check(root, "" if folder == "." else f"{folder}/")
        if root.is_local:
            for above in PurePosixPath(location.root).parents:
                _check(open_store(str(above)), "", *_LOGS[:1])


def _check(store: Store, folder: str, *logs: tuple[str, str, str]) -> None:
    for kind, log, ending in logs or _LOGS:
        found = islice(store.list(f"{folder}{log}", sizes=False), _MOST)
        if any(entry.name.endswith(ending) for entry in found):
            place = f"{key_of(store.url).rstrip('/')}/{folder}".rstrip("/")
            scan = {"Delta": "delta_scan", "Iceberg": "iceberg_scan"}.get(kind)
            how = f", with DuckDB: COPY (FROM {scan}('{place}')) TO 'rows.parquet'" if scan else ""
            raise SpecError(
                f"{place} is a table of {kind}, which is not read: its files hold rows of earlier versions too",
                hint=f"Write the rows that it holds now into a file{how}; then score that. "
                "Files that are named one by one are scored as they are.",
            )
