"""Rows of tables."""

from __future__ import annotations

from typing import Any

from tally.sources.base import Source


class TableSource(Source):
    @classmethod
    def describe(cls, uris: Any, **options: Any) -> TableSource:
        raise NotImplementedError

    def at(self, scratch: str) -> TableSource:
        raise NotImplementedError
