"""What a request's body holds when it was posted as a form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from email.message import Message


@dataclass(frozen=True, slots=True)
class File:
    """One file of a form. content_type: as the client says."""

    filename: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """fields, files: name and value of each, in the order sent; a name may come several times."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, File]] = field(default_factory=list)


def parse(body: bytes, content_type: str | None) -> Form | None:
    """The form in a body of type ``multipart/form-data`` or ``application/x-www-form-urlencoded``; None of others.

    Parts that are damaged are left out.
    """
    from email.message import Message  # not before a request is there: importing it takes a while
    from email.parser import HeaderParser

    header = Message()
    header["Content-Type"] = content_type or "application/octet-stream"
    kind = header.get_content_type()
    if kind == "application/x-www-form-urlencoded":
        return Form(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    boundary = header.get_boundary()
    if kind != "multipart/form-data" or not boundary:
        return None
    form = Form()
    # Each part stands between two lines that hold the boundary; what comes before the first and after the last is none.
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        if part.startswith(b"--"):
            break
        head, separator, content = part.partition(b"\r\n\r\n")
        described = HeaderParser().parsestr(head.decode("utf-8", "replace").lstrip())
        name = _parameter(described, "name")
        if not separator or name is None:
            continue
        filename = _parameter(described, "filename")
        if filename is None:
            form.fields.append((name, content.decode("utf-8", "replace")))
        else:
            form.files.append(
                (name, File(filename, described.get("Content-Type", "application/octet-stream"), content))
            )
    return form


def _parameter(head: Message, name: str) -> str | None:
    """A parameter of the part's Content-Disposition."""
    value = head.get_param(name, header="Content-Disposition")
    if isinstance(value, tuple):  # RFC 2231: charset, language, text
        return value[2]
    return value
