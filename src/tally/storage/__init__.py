"""Where bytes are kept: folders of this machine and object stores, behind one interface.

``open_store("photos/")`` gives a :class:`LocalStore`, ``open_store("s3://bucket/photos")`` a store of a bucket
(``buckets``, imported then), ``open_store("https://host/photos")`` one of files of the web (``web``), which are only
read. A store holds objects under names: segments joined with ``/``, relative to the
store's place. Stores are safe to share between threads. Every failure is a
:class:`~tally.errors.StorageError` that says in plain words what was wrong and keeps ``errno``.
"""

from __future__ import annotations

import os

from tally.errors import StorageError
from tally.masking import mask
from tally.storage.base import (
    CHANGED_HINT,
    KINDS,
    TEMPORARY,
    WEB,
    Entry,
    Page,
    Store,
    cache_folder,
    changed,
    failure,
    file_name,
    is_url,
    is_web,
    key_of,
    local_of,
    name_from_json,
    name_to_json,
    refuse_secrets,
    unexpected,
    while_waiting,
)
from tally.storage.local import LocalStore, folder_away, folder_identity

__all__ = [
    "CHANGED_HINT",
    "KINDS",
    "TEMPORARY",
    "Entry",
    "LocalStore",
    "Page",
    "Store",
    "cache_folder",
    "changed",
    "failure",
    "file_name",
    "folder_away",
    "folder_identity",
    "foreign_scheme",
    "is_url",
    "is_web",
    "key_of",
    "local_of",
    "name_from_json",
    "name_to_json",
    "normalised",
    "open_store",
    "refuse_secrets",
    "unexpected",
    "while_waiting",
]


_AZURE = "Azure's stores are written az://container/folder, with the account in AZURE_STORAGE_ACCOUNT_NAME"
_ELSEWHERE = {
    **dict.fromkeys(("azure", "wasb", "wasbs", "adl", "adls", "abs"), _AZURE),
    **dict.fromkeys(("gcs", "gsutil"), "Google's buckets are written gs://bucket/folder"),
    **dict.fromkeys(("s3n", "minio"), "buckets of S3 and of services like it are written s3://bucket/folder"),
}
"""How stores are written here that others write with another scheme."""


def foreign_scheme(place: str) -> str | None:
    """The scheme of a URL that names no storage of ours, in lower case; else None. An installed package may know it."""
    scheme, separator, _ = place.partition("://")
    if not separator or not is_url(place) or scheme.lower() in (*KINDS, *WEB, "file"):
        return None
    return scheme.lower()


def normalised(place: str) -> str:
    """The place in the one form that is stored and compared: absolute, without ``file://`` and a slash at the end."""
    if foreign_scheme(place) is None and (not is_url(place) or place[:7].lower() == "file://"):
        return os.path.abspath(local_of(place) if is_url(place) else place)  # noqa: PTH100
    scheme, _, rest = place.partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def open_store(place: str | os.PathLike[str]) -> Store:
    """The store at a path or URL. Nothing is contacted or created yet.

    Raises StorageError for a URL of unknown kind, or one that carries a password.
    """
    text = os.fspath(place)
    if not is_url(text):
        return LocalStore(text)
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme == "file":
        return LocalStore(local_of(text))
    if scheme not in (*KINDS, *WEB):
        known = ", ".join(f"{kind}://" for kind in (*KINDS, *WEB) if kind != "memory")
        hint = _ELSEWHERE.get(scheme, f"known are {known}")
        raise StorageError(f"{mask(text)!r}: {scheme}:// is not a known kind of storage", hint=hint)
    refuse_secrets(text)
    if scheme in WEB:
        from tally.storage.web import WebStore

        return WebStore(text)
    from tally.storage.buckets import ObjectStore

    bucket, _, folder = rest.partition("/")
    return ObjectStore(scheme, bucket, folder.strip("/"))
