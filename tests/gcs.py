"""A stand-in for Google Cloud Storage: as much of its XML interface as its client in obstore uses, in memory."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.objectstores import Service

_PAGE = 100
_DATE = "2026-01-01T00:00:00.000Z"
_HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@contextmanager
def gcs(folder: Path) -> Iterator[Service]:
    """A service with one bucket, ``gs://bucket``. folder: for the file of credentials."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Bucket) as server:
        server.generation, server.objects, server.uploads, server.lock = 1, {}, {}, threading.Lock()  # type: ignore[attr-defined]
        url = f"http://127.0.0.1:{server.server_address[1]}"
        key = folder / "key.json"
        content = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
        key.write_text(json.dumps({**content, "private_key_id": ""}))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(key), "GOOGLE_SERVICE_ACCOUNT": str(key)}
            yield Service(url, "gs", {**environment, "GOOGLE_ALLOW_HTTP": "true"})
        finally:
            server.shutdown()
            thread.join()


class _Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5  # of idle connections, which would keep the server from ending

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return unquote(parts.path.removeprefix("/bucket").removeprefix("/")), query

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        name, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        with server.lock:  # type: ignore[attr-defined]
            objects, uploads = server.objects, server.uploads  # type: ignore[attr-defined]
            if "partNumber" in query:
                uploads[query["uploadId"]][int(query["partNumber"])] = content
                self._answer(200, ETag=f'"{query["partNumber"]}"')
                return
            if self.headers.get("x-goog-if-generation-match") == "0" and name in objects:
                self._answer(412)
                return
            marks = {key: value for key, value in self.headers.items() if key.lower().startswith("x-goog-meta-")}
            if source := self.headers.get("x-goog-copy-source"):
                source = unquote(source).lstrip("/").removeprefix("bucket/")
                if source not in objects:
                    self._answer(404)
                    return
                content, marks = objects[source][:2]
            generation = str(server.generation)  # type: ignore[attr-defined]
            server.generation += 1  # type: ignore[attr-defined]
            objects[name] = (content, marks, generation)
        self._answer(200, ETag=f'"{generation}"', x_goog_generation=generation)

    def do_POST(self) -> None:
        name, query = self._asked()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        with server.lock:  # type: ignore[attr-defined]
            uploads = server.uploads  # type: ignore[attr-defined]
            if "uploads" in query:
                upload = f"upload-{len(uploads)}"
                uploads[upload] = {}
                body = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                self._answer(200, body.encode())
                return
            parts = uploads.pop(query["uploadId"])
            content = b"".join(parts[number] for number in sorted(parts))
            server.generation += 1  # type: ignore[attr-defined]
            generation = str(server.generation)  # type: ignore[attr-defined]
            server.objects[name] = (content, {}, generation)  # type: ignore[attr-defined]
        body = f'<CompleteMultipartUploadResult><ETag>"{generation}"</ETag></CompleteMultipartUploadResult>'
        self._answer(200, body.encode(), x_goog_generation=generation)

    def do_GET(self) -> None:
        name, query = self._asked()
        if not name:
            self._list(query)
            return
        found = self.server.objects.get(name)  # type: ignore[attr-defined]
        if found is None:
            self._answer(404)
            return
        content, marks, generation = found
        facts = {"ETag": f'"{generation}"', "Last_Modified": _HTTP_DATE, "x_goog_generation": generation}
        facts |= {key.replace("-", "_"): value for key, value in marks.items()}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(content)) + 1
            part = content[start:stop]
            if not part:
                self._answer(416)
                return
            span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            self._answer(206, part, Content_Range=span, **facts)
            return
        self._answer(200, content, **facts)
        return

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        name, _ = self._asked()
        with self.server.lock:  # type: ignore[attr-defined]
            there = self.server.objects.pop(name, None) is not None  # type: ignore[attr-defined]
        self._answer(204 if there else 404)

    def _list(self, query: dict[str, str]) -> None:
        with self.server.lock:  # type: ignore[attr-defined]
            objects = dict(self.server.objects)  # type: ignore[attr-defined]
        after = query.get("continuation-token") or query.get("start-after", "")
        names = sorted(name for name in objects if name.startswith(query.get("prefix", "")) and name > after)
        page, more = names[:_PAGE], len(names) > _PAGE
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{_DATE}</LastModified>"
            f"<ETag>{objects[name][2]}</ETag><Size>{len(objects[name][0])}</Size></Contents>"
            for name in page
        )
        self._answer(200, f"<ListBucketResult>{token}{body}</ListBucketResult>".encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass
