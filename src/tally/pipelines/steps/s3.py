"""Artifacts in stores that speak S3, as a workflow or the environment says where they are.

S3_ENDPOINT (host and port, without a scheme), S3_USE_HTTPS, S3_VERIFY_SSL and AWS_REGION stand in for what a workflow
does not say.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import S3Store

from tally.errors import SpecError
from tally.pipelines.options import Keys
from tally.pipelines.steps.errors import ArtifactError, MissingError
from tally.storage.buckets import s3_endpoint, s3_security

AMAZON = "s3.amazonaws.com"
"""The endpoint that need not be said."""


def _store(place: Mapping[str, Any], keys: Keys) -> S3Store:
    """Raises ArtifactError."""
    endpoint = place.get("endpoint") or os.environ.get("S3_ENDPOINT") or ""
    secure, verify = s3_security()
    if "insecure" in place:
        secure = not place["insecure"]
    config: dict[str, Any] = {"region": place.get("region") or os.environ.get("AWS_REGION") or "us-east-1"}
    if endpoint and endpoint != AMAZON:
        config |= s3_endpoint(endpoint, secure=secure)
    try:
        for secret, name in (
            ("accessKeySecret", "access_key_id"),
            ("secretKeySecret", "secret_access_key"),
            ("sessionTokenSecret", "token"),
        ):
            if secret in place:
                config[name] = keys.get("Secret", place[secret]["name"], place[secret]["key"]).strip()
        options: Any = {"allow_http": not secure, "allow_invalid_certificates": not verify}
        return S3Store(place["bucket"], client_options=options, **config)
    except (SpecError, BaseError) as error:
        raise ArtifactError(f"s3://{place['bucket']}: {error}") from None


def download(place: Mapping[str, Any], keys: Keys, target: Path) -> None:
    """Fetch an object, or all below a key that is none itself. Raises MissingError, ArtifactError."""
    store, key = _store(place, keys), place.get("key", "")
    shown = f"s3://{place['bucket']}/{key}"
    try:
        if not key.endswith("/"):
            try:
                _write(store, key, target)
                return
            except FileNotFoundError:
                pass
        prefix = key.rstrip("/") + "/" if key else None
        names = [each["path"] for page in store.list(prefix) for each in page]
        if not names:
            raise MissingError(f"there is nothing at {shown}")
        for name in names:
            inside = (target / name.removeprefix(prefix or "")).resolve()
            if not inside.is_relative_to(target.resolve()):
                raise ArtifactError(f"{shown}: the object {name!r} leads out of its folder")
            inside.parent.mkdir(parents=True, exist_ok=True)
            _write(store, name, inside)
    except (BaseError, OSError) as error:
        raise ArtifactError(f"{shown}: {error}") from None


def _write(store: S3Store, name: str, target: Path) -> None:
    answer = store.get(name)
    with target.open("wb") as file:
        for block in answer.stream():
            file.write(block)


def upload(source: Path, place: Mapping[str, Any], keys: Keys, archive: Mapping[str, Any]) -> None:
    """Send what a step has left: packed, unless its archive is ``none``, as a cluster would. Raises ArtifactError."""
    store, key = _store(place, keys), place.get("key", "")
    try:
        if "none" not in archive:
            packed = source.with_name(source.name + ".tgz")
            level = (archive.get("tar") or {}).get("compressionLevel", 6)
            try:
                with tarfile.open(packed, "w:gz", compresslevel=level) as tar:
                    tar.add(source, arcname=source.name)
                store.put(key, packed)
            finally:
                packed.unlink(missing_ok=True)
        elif source.is_dir():
            for each in sorted(source.rglob("*")):
                if each.is_file():
                    store.put(f"{key.rstrip('/')}/{each.relative_to(source).as_posix()}", each)
        else:
            store.put(key, source)
    except (BaseError, OSError) as error:
        raise ArtifactError(f"s3://{place['bucket']}/{key}: {error}") from None
