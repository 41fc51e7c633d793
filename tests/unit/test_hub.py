"""``hf:ORG/NAME@REVISION``: fetched once from a stand-in of the hub's API, verified, and not asked for again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.services import require

from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, SpecError, StorageError
from tally.models.resolve import check_there, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": json.dumps(
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "id2label": {"0": "a", "1": "b"}}
    ).encode(),
    "preprocessor_config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "modeling.py": b"raise SystemExit('code of the hub ran')",
    "tally.yaml": b"entry: modeling.py",
    "pytorch_model.bin": b"a pickle",
}


class Hub(ThreadingHTTPServer):
    """files: of ``org/small``. damaged: names of those that come otherwise than they are described. asked: paths."""

    files: dict[str, bytes]
    damaged: set[str]
    asked: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        hub.asked.append(path)
        if path.startswith("/api/models/org/small/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self._answer(200, json.dumps(described(hub.files)).encode())
        if path == "/api/models/org/small":
            return self._answer(200, json.dumps(described(hub.files)).encode())
        if path.startswith(f"/org/small/resolve/{COMMIT}/"):
            name = path.partition(COMMIT)[2][1:]
            content = hub.files[name] + (b"!" if name in hub.damaged else b"")
            return self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(hub.files[name])}"'})
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def described(files: dict[str, bytes]) -> dict[str, Any]:
    siblings = []
    for name, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        large = {"lfs": {"sha256": digest(content), "size": len(content), "pointerSize": 130}}
        siblings.append(
            {"rfilename": name, "size": len(content), "blobId": blob, **(large if name.endswith("tensors") else {})}
        )
    return {"id": "org/small", "modelId": "org/small", "sha": COMMIT, "siblings": siblings, "private": False}


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    require("huggingface_hub (make .venv/test-torch.stamp)", find_spec("huggingface_hub") is not None)
    server = Hub(("127.0.0.1", 0), _Handler)
    server.files, server.damaged, server.asked = dict(FILES), set(), []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_once_and_without_code(hub: Hub) -> None:
    ref = resolve("hf:org/small")
    assert (ref.kind, ref.name, ref.options["names"]) == ("transformers", "small", ["a", "b"])
    assert ref.assumed == (f"hf:org/small is now at commit {COMMIT} (name it with @ to stay there)",)
    names = sorted(path.name for path in ref.location.rglob("*"))
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sum(path.endswith("/model.safetensors") for path in hub.asked) <= 2  # its size, and itself

    hub.asked.clear()
    again = resolve(f"hf:org/small@{COMMIT}")
    assert (again.hash, again.assumed, hub.asked) == (ref.hash, (), [])

    (ref.location / "model.safetensors").write_bytes(b"spoilt")
    mended = resolve(f"hf:org/small@{COMMIT}")
    assert mended.hash == ref.hash
    assert any(path.endswith("/model.safetensors") for path in hub.asked)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_comes_otherwise_than_described_is_refused(hub: Hub, name: str) -> None:
    hub.damaged = {name}
    with pytest.raises((ModelChangedError, StorageError), match=r"hf:org/small: .*(not the content|does not answer)"):
        resolve("hf:org/small")


def test_pickled_weights_are_taken_where_there_are_no_others(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    assert (resolve("hf:org/small").location / "pytorch_model.bin").read_bytes() == b"a pickle"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("hf:org/none", ModelNotFoundError, "the hub has no such model, or it is private"),
        ("hf:org/small@old", ModelNotFoundError, "the hub knows the model, and no revision 'old' of it"),
        ("hf:small", SpecError, "is no model of a hub"),
    ],
)
def test_names_that_are_not_there(hub: Hub, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(text)


def test_what_is_no_model_of_transformers_and_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.files["config.json"]
    with pytest.raises(ModelLoadError, match=r"has no config\.json, and so is no model of transformers \(it has model"):
        resolve("hf:org/small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the hub does not answer"):
        resolve("hf:org/small")
    check_there("hf:org/small")
    with pytest.raises(SpecError, match="is no model of a hub"):
        check_there("hf:small@")
