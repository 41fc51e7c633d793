"""Pages of an S3 bucket's listing with every key, also those that obstore refuses (``a//b``, ``..``).

obstore parses all keys of a page, and one that it cannot use costs the whole listing. Here the service's answer is read
itself. obstore signs the request, so that credentials of every kind work.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_plus, urlencode
from xml.etree import ElementTree

if TYPE_CHECKING:
    import obstore.store

_VALID = timedelta(minutes=15)
_ANSWER_SECONDS = 60
_PASSING = (408, 429, 500, 502, 503, 504)


class AgainError(Exception):
    """The service did not answer, or was too busy."""


def pages(
    client: obstore.store.ObjectStore,
    bucket: str,
    prefix: str,
    after: str | None,
    again: Callable[[Callable[[], Any]], Any],
) -> Iterator[list[dict[str, Any]]]:
    """Pages of ``path``, ``size`` and ``e_tag``, as obstore gives them, of the keys that follow ``after``.

    prefix: what the keys begin with. again: gives the result of a call, which may raise AgainError.
    """
    truncated = True
    while truncated:
        url = _signed(client, bucket, prefix, after)
        root = ElementTree.fromstring(again(partial(_get, url)))  # noqa: S314  # the service's own answer
        space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
        found: list[dict[str, Any]] = [
            {
                "path": unquote_plus(each.findtext(f"{space}Key", "")),
                "size": int(each.findtext(f"{space}Size", "0")),
                "e_tag": each.findtext(f"{space}ETag", ""),
            }
            for each in root.iter(f"{space}Contents")
        ]
        yield found
        truncated = root.findtext(f"{space}IsTruncated") == "true" and bool(found)
        after = found[-1]["path"] if found else None


def _signed(client: obstore.store.ObjectStore, bucket: str, prefix: str, after: str | None) -> str:
    """A URL that may be fetched: the request for a page."""
    import obstore
    from obstore.store import S3Store

    # Only objects can be signed for. So an object "x" is asked for in a bucket whose address ends in a query.
    signable: Any = client
    address = obstore.sign(signable, "GET", "x", _VALID).partition("?")[0].removesuffix("/x")
    asked = {"list-type": "2", "encoding-type": "url", "prefix": prefix, "start-after": after or "", "x": ""}
    query = urlencode({name: value for name, value in asked.items() if value or name == "x"}, quote_via=quote)
    listing = S3Store(
        bucket,
        endpoint=f"{address}?{query}",
        virtual_hosted_style_request=True,
        client_options={"allow_http": address.startswith("http://")},
    )
    return obstore.sign(listing, "GET", "x", _VALID)


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310  # obstore's
            content: bytes = answer.read()
    except urllib.error.HTTPError as error:
        if error.code in _PASSING:
            raise AgainError(f"the service answered {error.code}") from None
        raise OSError(f"the service answered {error.code}") from None
    except OSError as error:
        raise AgainError(str(error)) from None
    return content
