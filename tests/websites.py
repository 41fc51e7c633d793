"""A web server of this machine: files in memory, in parts or not, and what was asked for."""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Website:
    """files: what it has, by path. parts: whether it gives parts of them. mark: the header that tells their content:
    ``ETag``, ``Last-Modified``, or none. sized: whether it says how large they are.
    encoding: what it says of how they are packed.
    troubles: what becomes of the next answers: a status such as ``503``, or ``cut``.
    asked: the path and the range of each request."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    parts: bool = True
    mark: str = "ETag"
    sized: bool = True
    encoding: str = ""
    troubles: list[str] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def website() -> Iterator[Website]:
    """A server without files, ended afterwards."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = unquote(self.path.partition("?")[0]), self.headers.get("Range")
            site.asked.append((name, wanted))
            trouble = site.troubles.pop(0) if site.troubles else ""
            content = site.files.get(name)
            if trouble.isdecimal() or content is None:
                self.send_error(int(trouble or 404))
                return
            status, headers, body = 200, {}, content
            if site.parts and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")):
                first, last = int(found[1]), min(int(found[2]), len(content) - 1)
                status, body = (206, content[first : last + 1]) if first < len(content) else (416, b"")
                of = f"{first}-{last}" if body else "*"
                headers["Content-Range"] = f"bytes {of}/{len(content) if site.sized else '*'}"
            sum_ = zlib.crc32(content)
            if site.mark:
                headers[site.mark] = f'"{sum_}"' if site.mark == "ETag" else formatdate(sum_, usegmt=True)
            if site.sized:
                headers["Content-Length"] = str(len(body))
            if site.encoding:
                headers["Content-Encoding"] = site.encoding
            self.send_response(status)
            for each, value in headers.items():
                self.send_header(each, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # a client that has seen enough

    server = Server(("127.0.0.1", 0), Handler)
    site = Website(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
