"""Compressed bodies: what was packed comes out, and never more than it may be."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tally.serving.encodings import MEMBERS, TooLargeError, decoded


@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=3), st.integers(0, 4))
def test_what_was_packed_comes_out(parts: list[bytes], padding: int) -> None:
    content = b"".join(parts)
    packed = b"".join(map(gzip.compress, parts)) + bytes(padding)
    assert decoded(packed, "gzip", len(content)) == content
    raw = zlib.compressobj(wbits=-15)
    for each in (zlib.compress(content), raw.compress(content) + raw.flush()):
        assert decoded(each, "deflate", len(content)) == content
        if content:
            with pytest.raises(TooLargeError):
                decoded(each, "deflate", len(content) - 1)
    if content:
        with pytest.raises(TooLargeError):
            decoded(packed, "gzip", len(content) - 1)


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]))
def test_anything_else_is_refused_in_one_line(body: bytes, encoding: str) -> None:
    said, found = "", b""
    try:
        found = decoded(body, encoding, 1000)
    except ValueError as error:
        said = str(error)
    assert said.isprintable()
    assert len(found) <= 1000


def test_many_members_are_read_up_to_a_limit() -> None:
    member = gzip.compress(b"x")
    assert decoded(member * MEMBERS, "gzip", MEMBERS) == b"x" * MEMBERS
    with pytest.raises(ValueError, match="more than 16,384 members"):
        decoded(member * (MEMBERS + 1), "gzip", 2 * MEMBERS)


def test_an_end_that_is_missing_is_seen() -> None:
    for packed, encoding in ((gzip.compress(b"x" * 99), "gzip"), (zlib.compress(b"x" * 99), "deflate")):
        for size in range(1, len(packed)):
            with pytest.raises(ValueError, match=r"."):
                decoded(packed[:size], encoding, 1000)
