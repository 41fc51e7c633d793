"""A scorer as a user may write it, beside a helper of its own, for tests of whatever loads models."""

from __future__ import annotations

SCORER = """
from tally import Scorer
import helper_of_mine

class Bright(Scorer):
    def __init__(self, threshold, label="x"):
        self.threshold, self.label = threshold, label
    def load(self, artifacts, device):
        self.artifacts = artifacts
    def score(self, batch):
        return [{"threshold": self.threshold, "label": self.label}] * len(batch)
"""
