"""Makes a small picture of each item while it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tally.errors import TallyError
from tally.media import images
from tally.scorers.base import Item, Results, Scorer, Thumbnail, Thumbnailed
from tally.scorers.vision.around import Around


class Kept(NamedTuple):
    """What the inner scorer made of a picture, beside a small one of it."""

    value: Any
    thumbnail: Thumbnail


class Thumbnails(Around):
    """Gives another scorer's results, each with a small picture of its item.

    side: pixels of the small picture's longer side; a smaller picture stays as it is.
    """

    def __init__(self, scorer: Scorer, side: int) -> None:
        super().__init__(scorer)
        self.output, self.columns = scorer.output, scorer.columns
        self._side = side

    @property
    def size(self) -> tuple[int, int] | None:  # type: ignore[override]
        """That of the other scorer, or as large as it takes for a small picture that is not enlarged."""
        if self.scorer.size is None:
            return None
        width, height = self.scorer.size
        half = -(-self._side // 2)
        return max(width, half), max(height, half)

    def prepare(self, item: Item) -> Kept:
        height, width = item.value.shape[:2]
        jpeg = images.thumbnail(item.value, self._side)  # first: the other scorer may change the picture
        info = item.info
        thumbnail = Thumbnail(jpeg, info.get("width", width), info.get("height", height))
        return Kept(self.scorer.prepare(item), thumbnail)

    def score(self, batch: Sequence[Kept]) -> Results:
        results = self.scorer.score([kept.value for kept in batch])
        if not isinstance(results, (Sequence, np.ndarray)) or len(results) != len(batch):
            raise TallyError(
                f"{type(self.scorer).__name__}.score returned {type(results).__name__}, not a sequence with one result "
                "for each picture"
            )
        return [
            result if isinstance(result, Exception) else Thumbnailed(result, kept.thumbnail)
            for kept, result in zip(batch, results, strict=True)
        ]

    def describe(self) -> str:
        return self.scorer.describe()
