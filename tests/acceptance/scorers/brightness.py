from __future__ import annotations

import tally


class Brightness(tally.Scorer):
    """The mean of all pixels."""

    columns = {"brightness": "float64"}  # noqa: RUF012

    def score(self, batch):
        return [{"brightness": float(picture.mean())} for picture in batch]
