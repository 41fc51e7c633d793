"""Text that may go anywhere."""

from __future__ import annotations


def storable(text: str) -> str:
    """Text that every database takes: what is no character (bytes of a file's name, say) is written as an escape."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
