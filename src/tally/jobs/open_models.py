"""The models that messages have chosen, of which a worker keeps the last few loaded."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress

from tally.media.images import Decoding
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.run import configured

OPEN_MODELS = 8
"""Models that a worker keeps loaded, at most: each may take as much memory as a job's only one."""


class OpenModels:
    """device, batch_size, decoding: as the job says."""

    def __init__(self, device: str, batch_size: int | None, decoding: Decoding) -> None:
        self._device, self._batch_size, self._decoding = device, batch_size, decoding
        self._open: OrderedDict[tuple[str, int | None, str], Scorer] = OrderedDict()

    def get(self, ref: ModelRef) -> Scorer:
        """The scorer, loaded. Raises what keeps it from being loaded; that is tried again the next time."""
        key = ref.name, ref.version, ref.hash
        scorer = self._open.get(key)
        if scorer is None:
            while len(self._open) >= OPEN_MODELS:  # before the next one takes memory, too
                _close(self._open.popitem(last=False)[1])
            scorer = configured(load(ref, self._device), batch_size=self._batch_size, decoding=self._decoding)
            self._open[key] = scorer
        self._open.move_to_end(key)
        return scorer

    def close(self) -> None:
        """Release all."""
        while self._open:
            _close(self._open.popitem()[1])


def _close(scorer: Scorer) -> None:
    with suppress(Exception):  # it has done its work
        scorer.close()
