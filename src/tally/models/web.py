"""Downloading a file over https: whole, from https alone, and in bounded time."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tally import network
from tally.errors import ModelNotFoundError, StorageError

SILENCE_SECONDS = 60
"""How long the server may send nothing."""
PATIENCE_SECONDS = 600.0
SLOWEST = 20_000
"""A download may take PATIENCE_SECONDS, and a second more for each so many bytes that have come."""
_BLOCK = 1 << 20
_OTHERWISE = "Check the address and the connection; or download it by other means, and name the file."
_ROOM = 64 * 2**20
"""Bytes that are left free on the disk."""


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to no other kind of address: on http:// anybody on the way may change what comes."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise StorageError(
                f"cannot download {req.full_url}: it redirects to {newurl.partition('?')[0]}, which is not https",
                hint="Give the address of the file itself.",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Checked(urllib.request.HTTPSHandler):
    """Connects to allowed addresses only, also where a redirect leads."""

    def https_open(self, req: Any) -> Any:
        return self.do_open(network.HTTPSConnection, req)


def fetch(url: str, target: Path) -> str:
    """Write what is at an https:// URL to a file; returns its SHA-256 in hexadecimal.

    Raises ModelNotFoundError if it cannot be had, StorageError if it comes incomplete, too slowly, or does not fit on
    the disk.
    """
    digest = hashlib.sha256()
    received = 0
    began = time.monotonic()
    opener = urllib.request.build_opener(_HttpsOnly, _Checked)
    try:
        with opener.open(url, timeout=SILENCE_SECONDS) as response, target.open("wb") as file:
            expected = _length(response)
            _check_room(url, target, expected)
            # Not read(), which waits until the block is full, however slowly it fills.
            while block := response.read1(_BLOCK):
                received += len(block)
                if time.monotonic() - began > PATIENCE_SECONDS + received / SLOWEST:
                    raise StorageError(
                        f"cannot download {url}: it comes too slowly, {received:,} bytes in "
                        f"{time.monotonic() - began:,.0f} s",
                        hint=_OTHERWISE,
                    )
                if expected is None:
                    _check_room(url, target, len(block))
                digest.update(block)
                file.write(block)
    except StorageError:
        raise
    except urllib.error.URLError as error:
        reason = getattr(error, "reason", error)
        why = reason.strerror if isinstance(reason, network.PrivateAddressError) else reason
        raise ModelNotFoundError(f"cannot download {url}: {why}", hint=_OTHERWISE) from error
    except http.client.HTTPException as error:
        raise _incomplete(url, received, None) from error
    except TimeoutError as error:
        raise StorageError(
            f"cannot download {url}: nothing was heard for {SILENCE_SECONDS} s", hint=_OTHERWISE
        ) from error
    except OSError as error:
        raise StorageError(f"cannot download {url} to {target.parent}: {error}") from error
    if expected is not None and received != expected:
        raise _incomplete(url, received, expected)
    return digest.hexdigest()


def _length(response: Any) -> int | None:
    """The bytes that the server promises."""
    given = response.headers.get("Content-Length", "")
    return int(given) if given.isdecimal() else None


def _check_room(url: str, target: Path, needed: int | None) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed is not None and needed + _ROOM > free:
        raise StorageError(
            f"cannot download {url}: it has {needed:,} bytes, and {target.parent} has room for {free:,}",
            hint="Make room there.",
        )


def _incomplete(url: str, received: int, expected: int | None) -> StorageError:
    promised = "" if expected is None else f" of {expected:,}"
    return StorageError(
        f"cannot download {url}: it was cut off after {received:,}{promised} bytes", hint="Give the command again."
    )
