"""Reading items one by one: for sources that have them at hand, and gain nothing by reading ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tally.errors import ItemError, StorageAwayError, TallyError, error_line
from tally.scorers.base import Item, Scorer
from tally.scorers.run import prepare
from tally.sources.base import Batch, Timings


def read_values(keys: Sequence[str], fetch: Callable[[int], Any], scorer: Scorer, timings: Timings) -> Iterator[Batch]:
    """The batches of a chunk, for :meth:`Source.read`.

    keys: of the chunk's items. fetch: gives what the scorer's ``input`` says (of pictures, the file's content will
    do) of the item at a position; whatever it raises makes that item dead.
    """
    for start in range(0, len(keys), scorer.batch_size):
        batch = Batch(start, min(start + scorer.batch_size, len(keys)))
        for position in range(start, batch.stop):
            began = time.perf_counter()
            value = _fetched(fetch, position)
            read = time.perf_counter()
            if not isinstance(value, ItemError):
                value = prepare(scorer, Item(keys[position], value))
            timings.read += read - began
            timings.decode += time.perf_counter() - read
            if isinstance(value, ItemError):
                batch.dead.append((position, value))
            else:
                batch.keys.append(keys[position])
                batch.values.append(value)
                batch.positions.append(position)
        yield batch


def _fetched(fetch: Callable[[int], Any], position: int) -> Any:
    try:
        return fetch(position)
    except StorageAwayError:
        raise
    except ItemError as error:
        return error.bare()
    except TallyError as error:
        return ItemError(error.message, stage="read", hint=error.hint)
    except Exception as error:
        return ItemError(error_line(error), stage="read")
