"""The first scoring of a model takes longer than others: it is done before anybody waits for it."""

from __future__ import annotations

import logging

from tally.errors import ModelRefutedError
from tally.scorers import run
from tally.scorers.base import Item, Scorer

log = logging.getLogger(__name__)


def warm(scorer: Scorer) -> None:
    """Score made-up pictures: one, and a whole batch. Scorers of other things are warm when they are loaded.

    What the model says to made-up pictures does not matter, so no error of theirs does.
    """
    if scorer.input not in ("image", "frame"):
        return
    import numpy as np

    width, height = scorer.size or (224, 224)
    values = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3)
    picture = (values * 2654435761 >> 24).astype(np.uint8)  # all values, in no order
    before = scorer.assumed
    try:
        for count in (1, min(scorer.batch_size, 16)):
            run.run(scorer, [Item(f"made up {at}", picture) for at in range(count)])
    except ModelRefutedError:
        pass
    except Exception:
        log.info("the model could not be warmed up", exc_info=True)
    scorer.assumed = before
