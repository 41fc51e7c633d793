"""Downloads over https, from a server that cuts, stalls, redirects and lies."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import wait_for

from tally.errors import ModelNotFoundError, StorageError
from tally.models import web
from tally.models.download import download

CONTENT = os.urandom(100_000)
Answer = Callable[[BaseHTTPRequestHandler], None]


def send(handler: BaseHTTPRequestHandler, content: bytes, promised: int | None, code: int = 200, **more: str) -> None:
    handler.send_response(code)
    if promised is not None:
        handler.send_header("Content-Length", str(promised))
    for name, value in more.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def chunked(handler: BaseHTTPRequestHandler, *, end: bool) -> None:
    handler.protocol_version = "HTTP/1.1"
    send(handler, b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT), None, **{"Transfer-Encoding": "chunked"})
    if end:
        handler.wfile.write(b"0\r\n\r\n")
    handler.close_connection = True


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key, and a certificate of this machine's own, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Answer]]]:
    """The address of an https server, and its answers by path."""
    answers: dict[str, Answer] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers[self.path](self)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: send(handler, CONTENT, len(CONTENT)),
        lambda handler: send(handler, CONTENT, None),
        lambda handler: chunked(handler, end=True),
    ],
)
def test_a_whole_download(server: tuple[str, dict[str, Answer]], tmp_path: Path, answer: Answer) -> None:
    url, answers = server
    answers["/m"] = answer
    answers["/moved"] = lambda handler: send(handler, b"", 0, 302, Location=f"{url}/m")
    for path in ("/m", "/moved"):
        assert web.fetch(url + path, tmp_path / "m") == hashlib.sha256(CONTENT).hexdigest()
        assert (tmp_path / "m").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda handler: send(handler, CONTENT, len(CONTENT) + 1), r"cut off after 100,000 of 100,001 bytes"),
        (lambda handler: send(handler, b"", len(CONTENT)), r"cut off after 0 of 100,000 bytes"),
        (lambda handler: chunked(handler, end=False), r"cut off after 100,000 bytes"),
        (lambda handler: send(handler, b"", 302, 302, Location="http://127.0.0.1:1/m?token=x"), r"to http://127.0.0.1:1/m, which is not https"),  # noqa: E501
        (lambda handler: send(handler, b"", 1 << 60), r"it has 1,152,921,504,606,846,976 bytes, and .* has room for"),
    ],
)  # fmt: skip
def test_a_download_that_is_refused(
    server: tuple[str, dict[str, Answer]], tmp_path: Path, answer: Answer, message: str, monkeypatch: Any
) -> None:
    url, answers = server
    answers["/m.onnx"] = answer
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    with pytest.raises(StorageError, match=message):
        download(f"{url}/m.onnx")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_a_server_that_sends_a_byte_now_and_then(
    server: tuple[str, dict[str, Answer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"", 1000)
        while not over.wait(0.01):
            handler.wfile.write(b"x")

    answers["/m"] = drip
    monkeypatch.setattr(web, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(web, "SLOWEST", 1e9)
    try:
        with pytest.raises(StorageError, match="it comes too slowly"):
            web.fetch(f"{url}/m", tmp_path / "m")
    finally:
        over.set()
    silent = threading.Event()
    answers["/n"] = lambda handler: bool(silent.wait(30)) or None
    monkeypatch.setattr(web, "SILENCE_SECONDS", 0.2)
    try:
        with pytest.raises((StorageError, ModelNotFoundError), match=r"nothing was heard|timed out"):
            web.fetch(f"{url}/n", tmp_path / "m")
    finally:
        silent.set()


def test_what_a_killed_download_left_is_removed_by_the_next(
    server: tuple[str, dict[str, Answer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    over = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        send(handler, CONTENT, len(CONTENT) + 1)
        over.wait(60)

    answers["/m.onnx"] = stall
    home = tmp_path / "home"
    monkeypatch.setenv("TALLY_HOME", str(home))
    code = f"from tally.models.download import download; download('{url}/m.onnx')"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: any(path.stat().st_size for path in home.rglob("m.onnx")), process)
    finally:
        process.kill()
        process.wait()
        over.set()
    assert list(home.rglob("m.onnx"))
    answers["/m.onnx"] = lambda handler: send(handler, CONTENT, len(CONTENT))
    digest = hashlib.sha256(CONTENT).hexdigest()
    kept = download(f"{url}/m.onnx#sha256={digest}")
    assert [path for path in (home / "downloads").rglob("*") if path.is_file()] == [kept]
    shutil.rmtree(home)
