"""Files that are refused before anything opens them: those that are no model, and those that would run code."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from tally.errors import ModelLoadError, UntrustedModelError
from tally.models import kinds


def check_whole(path: Path) -> None:
    """Raises ModelLoadError for an ONNX or skops file that is cut off or damaged, as far as that is seen without
    opening it: lengths of ONNX's outermost fields, checksums of what skops packs."""
    kind = path.suffix.lower()
    if (kind == ".onnx" and not _fields_fill(path)) or (kind == ".skops" and not _checksums_hold(path)):
        raise ModelLoadError(
            f"{path.parent.name}/{path.name} cannot be opened: it is damaged or cut off",
            hint="Was it copied or downloaded completely?",
        )


def _checksums_hold(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False


def _fields_fill(path: Path) -> bool:
    """Whether the fields of a protobuf message fill the file exactly.

    See https://protobuf.dev/programming-guides/encoding/
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while (at := file.tell()) < size:
            tag = _varint(file)
            if tag is None or not tag >> 3:
                return False
            match tag & 7:
                case 0:
                    length = 0 if _varint(file) is not None else size
                case 1:
                    length = 8
                case 2:
                    found = _varint(file)
                    length = size if found is None else found
                case 5:
                    length = 4
                case _:
                    return False
            if file.tell() + length > size or file.tell() == at:
                return False
            file.seek(length, os.SEEK_CUR)
    return True


def _varint(file: BinaryIO) -> int | None:
    """The next number; None if there is none."""
    number = 0
    for shift in range(0, 70, 7):
        if not (byte := file.read(1)):
            return None
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number
    return None


def check_readable(path: Path, *, trusted: bool) -> None:
    """Raises ModelLoadError for what is no model at all, UntrustedModelError for a pickle without trust."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise ModelLoadError(f"{path} is empty (0 bytes)", hint="Was it copied or downloaded completely?")
    if head.startswith(b"version https://git-lfs"):
        raise ModelLoadError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the model itself",
            hint="Fetch the content with 'git lfs pull' in the repository that it comes from.",
        )
    suffix, claimed = path.suffix.lower(), kinds.claiming(path.name)
    pickles = () if claimed is None else claimed.pickles
    if claimed is not None and suffix in claimed.weights:
        return
    # Pickles begin with the byte 0x80 and the number of their protocol.
    if suffix not in pickles and not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return
    if claimed is not None and not claimed.runs_code:
        raise ModelLoadError(
            f"{path} is a pickle of a kind that cannot be scored, trusted or not",
            hint=f"Export the model to ONNX, or open it in a script's init(). Supported are {kinds.supported()}.",
        )
    if not trusted:
        raise UntrustedModelError(
            f"{path} is a pickle: opening it runs whatever code it carries",
            hint="If you know who made it, give --trust. Better: save it with skops, or export it to ONNX.",
        )
