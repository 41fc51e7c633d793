"""What is said of a table's file that cannot be read: what is wrong with it, and what to do."""

from __future__ import annotations

from tally.errors import StorageError
from tally.storage import failure

TWICE = "Rename one of them: a model and the results know columns by their names."
"""The next step where two columns of a table have one name."""
NO_ROWS = "Name files with rows, or look at what writes these."
"""The next step where there is nothing in a table."""
DAMAGED = "Copy or write the file anew. To score the others meanwhile, move it to another folder."
"""The next step where a file of a table is damaged."""


def damaged(place: str, error: BaseException, what: str) -> StorageError:
    """The error for a file that cannot be read, in one line that says first, in plain words, what is wrong.

    what: that, where the operating system does not say it.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return failure("read", place, error)
    text = str(error).split("\n", 1)[0].strip().rstrip(".")
    return failure("read", place, ValueError(f"{what} ({text})"), hint=DAMAGED)


def unreadable(key: str, error: Exception) -> StorageError:
    """What DuckDB says of a text that it cannot read. A full disk or memory is no fault of the file."""
    import duckdb

    machine = isinstance(error, (duckdb.IOException, duckdb.OutOfMemoryException))
    return failure("read", key, ValueError(str(error).strip().split("\n", 1)[0]), hint=None if machine else DAMAGED)
