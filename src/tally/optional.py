"""Packages that an extra brings: imported where they are used; missing, they are named with what installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tally.errors import SpecError, TallyError

_PACKAGES = {"sklearn": "scikit-learn", "google_crc32c": "google-crc32c", "huggingface_hub": "huggingface-hub"}
"""What pip calls a module, where that is another name."""


def install(extra: str | None) -> str:
    """How to get an extra, or several: ``server,grpc``; None is the plain installation."""
    return f"pip install 'tally-scoring[{extra}]'" if extra else "pip install tally-scoring"


@contextmanager
def needed(what: str, extra: str | None, raising: type[TallyError] = SpecError) -> Iterator[None]:
    """Have imports in this block say what they are for: ``with needed("training needs", "sklearn"): import sklearn``.

    extra: None if the plain installation has all. Raises ``raising`` where a package is missing, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "a package").partition(".")[0]
        package = _PACKAGES.get(module, module)
        if isinstance(error, ModuleNotFoundError):
            hint = f"Install it with: {install(extra)}"
            raise raising(f"{what} {package}, which is not installed", hint=hint) from None
        hint = f"Install it anew: {install(extra)} --upgrade"
        raise raising(f"{what} {package}, which cannot be imported: {error}", hint=hint) from error
