"""What goes wrong with the artifacts of one step; it becomes the step's message."""

from __future__ import annotations


class ArtifactError(Exception):
    """An artifact cannot be had, or cannot be kept."""


class MissingError(ArtifactError):
    """There is no such artifact."""
