"""Files that are refused before anything opens them: those that are no model, and those that would run code."""

from __future__ import annotations

from pathlib import Path

from tally.errors import ModelLoadError, UntrustedModelError
from tally.models import kinds

PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".th")
"""Suffixes of files that are taken for pickles where no kind of model says otherwise."""


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
    pickles = PICKLES if claimed is None else claimed.pickles
    # Pickles begin with the byte 0x80 and the number of their protocol.
    if suffix not in pickles and not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return
    if not trusted:
        raise UntrustedModelError(
            f"{path} is a pickle: opening it runs whatever code it carries",
            hint="If you know who made it, give --trust. Better: save it with skops, or export it to ONNX.",
        )
    if claimed is None or not claimed.runs_code:
        raise ModelLoadError(
            f"{path}: pickles of this kind cannot be scored, not even trusted ones",
            hint=f"Supported are {kinds.supported()}. Export the model to ONNX, or open it in a script's init().",
        )
