"""A scorer around another: it changes what that is given, or what it answers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tally.scorers.base import Scorer


class Around(Scorer):
    """What it does not change is the other's: what was assumed, the size of batches, loading and closing."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.input = scorer.input

    @property
    def assumed(self) -> Sequence[str]:
        return self.scorer.assumed

    @assumed.setter
    def assumed(self, sentences: Sequence[str]) -> None:
        self.scorer.assumed = sentences

    def assume(self, sentence: str) -> None:
        """See :meth:`Scorer.assume`."""
        self.scorer.assume(sentence)

    @property
    def batch_size(self) -> int:
        return self.scorer.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.scorer.batch_size = size

    def load(self, artifacts: Path, device: str) -> None:
        self.scorer.load(artifacts, device)

    def close(self) -> None:
        self.scorer.close()
