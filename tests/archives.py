"""Archives for tests, made anew each time."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO

import pyarrow as pa

Files = Mapping[str, bytes] | Sequence[tuple[str, bytes]]


def tar(files: Files, *, kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return file.getvalue()


def tar_gz(files: Files) -> bytes:
    return gzip.compress(tar(files))


def tar_zst(files: Files) -> bytes:
    return bytes(pa.Codec("zstd").compress(tar(files), asbytes=True))


def zipped(files: Files, *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(name, content)
    return file.getvalue()


PACKERS = {"tar": tar, "tar.gz": tar_gz, "tgz": tar_gz, "tar.zst": tar_zst, "zip": zipped}
