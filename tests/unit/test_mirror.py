"""Models that come from elsewhere: from buckets, and from the mirror that a job's model was uploaded to."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.colours import model

from tally.config import settings
from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, SpecError, StorageError
from tally.models.load import create, load, verify
from tally.models.mirror import CONTENTS, fetch, fetched, upload_to_mirror
from tally.models.reference import ModelRef
from tally.models.registry import open_registry
from tally.models.resolve import refreshed, resolve
from tally.scorers.base import Item, Scorer
from tally.scorers.per_key.files import pack
from tally.storage import Store, open_store
from tally.storage.buckets import ObjectStore

HOST = platform.node()
SCRIPT = "def init():\n    pass\n\n\ndef run(mini_batch):\n    return ['{answer}'] * len(mini_batch)\n"


pytestmark = pytest.mark.usefixtures("restored", "empty_folder")


@pytest.fixture
def bucket() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are fetched from now on."""
    names: list[str] = []
    real = ObjectStore.download

    def download(self: ObjectStore, name: str, target: Path) -> None:
        names.append(name)
        real(self, name, target)

    monkeypatch.setattr(ObjectStore, "download", download)
    return names


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[ModelRef], ModelRef]:
    """The same reference on another machine: nothing was fetched there, and no path is what it is here."""

    def move(ref: ModelRef) -> ModelRef:
        cache = tmp_path / f"cache-{uuid.uuid4().hex}"
        monkeypatch.setenv("TALLY_CACHE", str(cache))
        for place in {ref.location, *(Path(each) for each in ref.files if Path(each).is_absolute())}:
            if place.exists():
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        return ModelRef.from_dict(json.loads(json.dumps(ref.to_dict())))

    return move


def label(ref: ModelRef) -> str:
    """What the classifier calls a red picture."""
    scorer = load(ref, "cpu")
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    (row,) = scorer.score([scorer.prepare(Item("red", red, {"width": 8, "height": 8}))])
    assert isinstance(row, dict)
    return str(row["label"])


def answers(ref: ModelRef) -> list[Any]:
    return list(load(ref, "cpu").score(["a", "b"]))


def uploaded(folder: Path, url: str) -> Store:
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload(path.relative_to(folder).as_posix(), path)
    return store


def in_cache(kind: str = "models") -> list[str]:
    folder = Path(os.environ.get("TALLY_CACHE", settings().home / "cache")) / kind
    return sorted(each.name for each in folder.iterdir())


# ------------------------------------------------------------------------------------- models in buckets


def test_an_onnx_file_brings_what_belongs_to_it(tmp_path: Path, bucket: str, downloads: list[str]) -> None:
    path = model(tmp_path / "m" / "colours.onnx", external="colours.weights")
    (tmp_path / "m" / "colours.onnx.yaml").write_text("labels: names/of.txt\ntop: 1\n")
    (tmp_path / "m" / "names").mkdir()
    (tmp_path / "m" / "names" / "of.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "m" / "other.onnx").write_bytes(b"no part of it")
    store = uploaded(tmp_path / "m", f"{bucket}/models")

    ref = resolve(f"{bucket}/models/colours.onnx")

    assert (ref.name, ref.kind, ref.mirror) == ("colours", "onnx", f"{bucket}/models")
    assert ref.hash == resolve(path).hash
    assert sorted(downloads) == ["colours.onnx", "colours.onnx.yaml", "colours.weights", "names/of.txt"]
    assert label(ref) == "red"
    downloads.clear()
    assert resolve(f"{bucket}/models/colours.onnx") == ref
    assert downloads == []
    store.write("names/of.txt", b"rouge\nvert\nbleu\n")
    assert label(resolve(f"{bucket}/models/colours.onnx")) == "rouge"


def test_damage_in_the_cache_is_noticed_by_the_next_use(tmp_path: Path, bucket: str, downloads: list[str]) -> None:
    uploaded(model(tmp_path / "m" / "colours.onnx").parent, bucket)
    ref = resolve(f"{bucket}/colours.onnx")
    kept = ref.location / ref.entry
    kept.chmod(0o644)
    kept.write_bytes(kept.read_bytes()[:-9])
    downloads.clear()

    again = resolve(f"{bucket}/colours.onnx")

    assert again == ref
    assert downloads == ["colours.onnx"]
    assert label(again) == "0"


@pytest.mark.parametrize("written", ["packages/mine", "packages/mine/", "packages/mine/tally.yaml"])
def test_a_package_is_fetched_whole(tmp_path: Path, bucket: str, downloads: list[str], written: str) -> None:
    folder = tmp_path / "p"
    model(folder / "deep" / "m.onnx")
    (folder / "tally.yaml").write_text("file: deep/m.onnx\noptions: {labels: names.txt}\n")
    (folder / "names.txt").write_text("red\ngreen\nblue\n")
    (folder / ".hidden").write_text("no content")
    uploaded(folder, f"{bucket}/packages/mine")

    ref = resolve(f"{bucket}/{written}")

    assert (ref.name, ref.files, ref.mirror) == ("mine", (".",), f"{bucket}/packages/mine")
    assert sorted(downloads) == ["deep/m.onnx", "names.txt", "tally.yaml"]
    assert ref.hash == resolve(folder).hash
    assert label(ref) == "red"


def test_python_files_bring_their_neighbours(tmp_path: Path, bucket: str) -> None:
    store = open_store(f"{bucket}/code")
    store.write("score.py", b"import said\ndef init(): ...\ndef run(mini_batch): return [said.WORD] * len(mini_batch)")
    store.write("said.py", b"WORD = 'from afar'")
    store.write("below/other.py", b"1 / 0")

    ref = resolve(f"{bucket}/code/score.py")

    assert (ref.kind, ref.files, ref.mirror) == ("script", ("score.py", "said.py"), f"{bucket}/code")
    assert f"assumed {bucket}/code;" in ref.assumed[0]
    assert answers(ref) == [{"prediction": "from afar"}] * 2


def test_labels_and_artifacts_may_be_in_buckets(tmp_path: Path, bucket: str) -> None:
    store = open_store(bucket)
    store.write("lists/names.txt", b"red\ngreen\nblue\n")
    store.write("weights/v1/w.bin", b"w")
    path = model(tmp_path / "m" / "colours.onnx")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    ref = resolve(path, labels=f"{bucket}/lists/names.txt")
    assert ref.options["labels"] == ["red", "green", "blue"]
    assert ref.hash == resolve(path, labels=tmp_path / "names.txt").hash
    assert ref.mirror is None  # nothing holds all of it yet
    script = tmp_path / "m" / "score.py"
    script.write_text(SCRIPT.format(answer="x"))
    ref = resolve(script, artifacts=f"{bucket}/weights/v1/")
    assert Path(ref.artifacts, "w.bin").read_bytes() == b"w"
    assert Path(ref.artifacts).name == "v1"
    with pytest.raises(SpecError, match=r"there is no file 'memory://.*/lists/name\.txt'"):
        resolve(path, labels=f"{bucket}/lists/name.txt")
    with pytest.raises(SpecError, match="there is no folder"):
        resolve(script, artifacts=f"{bucket}/weights/v2")


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    path = model(tmp_path / "colours.onnx")
    assert resolve(path.as_uri()) == resolve(path)


def test_what_is_not_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    store = open_store(f"{bucket}/models")
    store.write("squeezenet.onnx", b"")
    with pytest.raises(ModelNotFoundError, match=r"no model at '.*/squezenet\.onnx'; did you mean 'squeezenet\.onnx'"):
        resolve(f"{bucket}/models/squezenet.onnx")
    with pytest.raises(ModelNotFoundError, match="no model at"):
        resolve(f"{bucket}/other/")
    with pytest.raises(ModelLoadError, match=r"models is a folder without a tally\.yaml\n  Give a file in it \(squeez"):
        resolve(f"{bucket}/models")
    with pytest.raises(ModelLoadError) as caught:
        resolve(f"{bucket}/models/squeezenet.onnx")
    assert str(caught.value).startswith(f"{bucket}/models/squeezenet.onnx is empty (0 bytes)")
    with pytest.raises(StorageError, match=r"carries credentials") as refused:
        resolve("s3://me:secret@bucket/m.onnx")
    assert "secret" not in str(refused.value)
    with pytest.raises(StorageError, match="ftp:// is not a known kind of storage"):
        resolve("ftp://host/m.onnx")


# ------------------------------------------------------------------------------------- for each key, one


def saved(folder: Path, *keys: str, seed: int = 0) -> None:
    skops = pytest.importorskip("skops.io")
    svm = pytest.importorskip("sklearn.svm")
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        values = np.random.default_rng(seed).normal(20, 2, (20, 1))
        skops.dump(svm.OneClassSVM(nu=0.1).fit(values), folder / f"{key}.skops")


def test_a_template_in_a_bucket_and_what_comes_to_it(
    tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]
) -> None:
    saved(tmp_path / "m", "pump", "fan")
    store = uploaded(tmp_path / "m", f"{bucket}/models")
    store.write("deeper/other.skops", b"is of no key")
    template = f"{bucket}/models/{{Device}}.skops"

    ref = resolve(template, by=("Device",))

    assert (ref.name, ref.kind, ref.files) == (template, "keyed", ("fan.skops", "pump.skops"))
    assert ref.mirror == f"{bucket}/models"
    assert ref.hash == resolve(str(tmp_path / "m" / "{Device}.skops"), by=("Device",)).hash
    assert create(ref).missing_reason({"Device": "gate"}) == "there is no model models/gate.skops"
    far = elsewhere(ref)
    assert load(far, "cpu").missing_reason({"Device": "gate"}) == "there is no model models/gate.skops"
    saved(tmp_path / "more", "gate")
    store.upload("gate.skops", tmp_path / "more" / "gate.skops")
    verify(far)
    new = refreshed(far)
    assert (new.name, new.files) == (template, ("fan.skops", "gate.skops", "pump.skops"))
    assert load(new, "cpu").missing_reason({"Device": "gate"}) is None
    pack(template, ["Device"], tmp_path / "packed")
    assert create(resolve(tmp_path / "packed")).missing_reason({"Device": "gate"}) is None
    store.write("fan.skops", b"another")
    with pytest.raises(ModelChangedError):
        refreshed(far)
    with pytest.raises(SpecError, match="no columns make keys"):
        resolve(template)
    with pytest.raises(SpecError, match="the column Tag of the key chooses no model"):
        resolve(template, by=("Device", "Tag"))
    with pytest.raises(ModelNotFoundError, match=r"no model file matches .*\n  memory://.*/none was searched"):
        resolve(f"{bucket}/none/{{Device}}.skops", by=("Device",))


def test_new_keys_of_uploaded_models_are_uploaded_too(
    tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]
) -> None:
    saved(tmp_path / "m", "pump", "fan")
    ref = upload_to_mirror(resolve(str(tmp_path / "m" / "{Device}.skops"), by=("Device",)), f"{bucket}/job")
    assert refreshed(ref) == ref
    saved(tmp_path / "m", "gate")
    new = refreshed(ref)
    assert len(new.files) == 3
    assert new.mirror == f"{bucket}/job/{new.hash.removeprefix('sha256:')}"
    far = elsewhere(new)
    assert load(far, "cpu").missing_reason({"Device": "gate"}) is None
    assert refreshed(far) == far


# ---------------------------------------------------------------------------------------------- uploading


class Doubling(Scorer):
    input = "bytes"

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def score(self, batch: Any) -> Any:
        return [{"value": self.factor * len(each)} for each in batch]


def test_a_model_with_parts_elsewhere_is_uploaded_whole(
    tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef], downloads: list[str]
) -> None:
    path = model(tmp_path / "m" / "colours.onnx", external="colours.weights")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    ref = resolve(path, labels=tmp_path / "names.txt")

    uploaded_ref = upload_to_mirror(ref, f"{bucket}/work")

    assert uploaded_ref.mirror == f"{bucket}/work/{ref.hash.removeprefix('sha256:')}"
    assert upload_to_mirror(uploaded_ref, f"{bucket}/other").mirror == uploaded_ref.mirror
    assert label(uploaded_ref) == "red"
    assert downloads == []  # it is here
    far = elsewhere(uploaded_ref)
    assert label(far) == "red"
    assert sorted(downloads) == ["colours.onnx", "colours.weights", "names.txt"]
    assert in_cache() == [ref.hash.removeprefix("sha256:")]
    assert label(far) == "red"
    assert len(downloads) == 3
    assert label(upload_to_mirror(far, f"{bucket}/work")) == "red"


def test_scripts_with_artifacts(tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]) -> None:
    script = tmp_path / "code" / "score.py"
    script.parent.mkdir()
    script.write_text(
        "import os, pathlib\ndef init():\n    global word\n"
        "    word = pathlib.Path(os.environ['AZUREML_MODEL_DIR'], 'word').read_text()\n"
        "def run(mini_batch): return [word] * len(mini_batch)\n"
    )
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "word").write_text("hello")
    far = elsewhere(upload_to_mirror(resolve(script, artifacts=weights), str(tmp_path / "shared")))
    assert not weights.exists()
    assert create(far).input == "path"
    assert answers(far) == [{"prediction": "hello"}] * 2


def test_empty_artifacts_are_a_folder_everywhere(
    tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "code" / "it.py").write_text(
        "from tally import Scorer\nclass It(Scorer):\n    def load(self, artifacts, device):\n"
        "        self.there = artifacts.is_dir()\n    def score(self, batch): return [{'there': self.there}] * 2\n"
    )
    far = elsewhere(upload_to_mirror(resolve(tmp_path / "code" / "it.py", artifacts=tmp_path / "weights"), bucket))
    assert answers(far) == [{"there": True}] * 2


def test_objects_are_uploaded(bucket: str, elsewhere: Callable[[ModelRef], ModelRef]) -> None:
    ref = resolve(Doubling(3))
    assert list(open_store(f"{bucket}/w").list()) == []
    far = elsewhere(upload_to_mirror(ref, f"{bucket}/w"))
    assert create(far).input == "bytes"
    assert load(far, "cpu").score([b"ab"]) == [{"value": 6}]
    open_store(far.mirror or "").write("scorer.pkl", b"something else")
    with pytest.raises(ModelChangedError):
        load(elsewhere(far), "cpu")


def test_a_packed_file_is_uploaded(tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]) -> None:
    saved(tmp_path / "m", "pump", "fan")
    pack(str(tmp_path / "m" / "{Device}.skops"), ["Device"], tmp_path / "packed")
    far = elsewhere(upload_to_mirror(resolve(tmp_path / "packed"), bucket))
    assert create(far).missing_reason({"Device": "fan"}) is None
    assert load(far, "cpu").missing_reason({"Device": "gate"}) == "there is no model for Device=gate"


def test_importable_classes(tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]) -> None:
    """Their own file travels; what it needs has to be installed, and the same."""
    code = "from tally import Scorer\n{}\nclass It(Scorer):\n    def score(self, batch): return [{{'n': 1}}] * 2\n"
    here = tmp_path / "here"
    for name, text in {"alone_for_test.py": "", "package_for_test/part.py": "from package_for_test.b import X"}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(code.format(text))
    (here / "package_for_test" / "__init__.py").touch()
    (here / "package_for_test" / "b.py").write_text("X = 1")
    sys.path.insert(0, str(here))
    refs = [upload_to_mirror(resolve(name), bucket) for name in ("alone_for_test:It", "package_for_test.part:It")]
    shutil.copytree(here, tmp_path / "there")

    def forget() -> None:
        for name in [name for name in sys.modules if "_for_test" in name]:
            del sys.modules[name]
        sys.path[:] = [each for each in sys.path if str(tmp_path) not in each]

    alone, part = (elsewhere(ref) for ref in refs)
    forget()
    assert answers(alone) == [{"n": 1}] * 2
    forget()
    with pytest.raises(ModelNotFoundError, match=f"no module 'package_for_test.b' on {HOST}\n.*installed there"):
        load(part, "cpu")
    forget()
    sys.path.append(str(tmp_path / "there"))
    assert answers(part) == [{"n": 1}] * 2
    forget()
    sys.path.append(str(tmp_path / "there"))
    with (tmp_path / "there" / "package_for_test" / "part.py").open("a") as file:
        file.write("# another version\n")
    with pytest.raises(ModelChangedError, match=r"part\.py on .* is not what the job began with"):
        load(part, "cpu")


def test_nothing_is_uploaded_twice_and_halves_are_completed(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    real = ObjectStore.upload

    def upload(self: ObjectStore, name: str, path: Path) -> None:
        uploads.append(name)
        real(self, name, path)

    monkeypatch.setattr(ObjectStore, "upload", upload)
    ref = resolve(model(tmp_path / "m" / "colours.onnx", external="w"))
    mirror = upload_to_mirror(ref, bucket).mirror
    assert sorted(uploads) == ["colours.onnx", "w"]
    assert upload_to_mirror(ref, bucket).mirror == mirror
    assert len(uploads) == 2
    assert mirror is not None
    for lost in (CONTENTS, "w"):
        open_store(mirror).delete([lost])
        uploads.clear()
        upload_to_mirror(ref, bucket)
        assert sorted(uploads) == ["colours.onnx", "w"]
    (tmp_path / "m" / "w").write_bytes(b"changed meanwhile")
    open_store(mirror).delete_tree()
    with pytest.raises(ModelChangedError, match="it changed while it was copied"):
        upload_to_mirror(ref, bucket)
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ModelNotFoundError, match=f"is not on this machine \\({HOST}\\)"):
        upload_to_mirror(ref, bucket)


# ---------------------------------------------------------------------------------------------- fetching


@pytest.fixture
def uploaded_ref(tmp_path: Path, bucket: str, elsewhere: Callable[[ModelRef], ModelRef]) -> ModelRef:
    """A script that answers yes, on a machine that has to fetch it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "score.py").write_text(SCRIPT.format(answer="yes"))
    return elsewhere(upload_to_mirror(resolve(tmp_path / "code" / "score.py"), bucket))


YES = [{"prediction": "yes"}] * 2


def test_without_a_mirror_the_machine_is_named(tmp_path: Path, elsewhere: Callable[[ModelRef], ModelRef]) -> None:
    path = model(tmp_path / "m" / "colours.onnx")
    far = elsewhere(resolve(path))
    with pytest.raises(ModelNotFoundError) as caught:
        load(far, "cpu")
    assert f"model colours: {path} is not on this machine ({HOST})" in str(caught.value)
    assert "in a bucket (--model s3://...)" in str(caught.value)
    assert "TALLY_REGISTRY" in str(caught.value)


def test_other_content_at_the_path_is_not_used(tmp_path: Path, bucket: str) -> None:
    script = tmp_path / "score.py"
    script.write_text(SCRIPT.format(answer="yes"))
    ref = upload_to_mirror(resolve(script), bucket)
    script.write_text(SCRIPT.format(answer="no"))
    assert answers(ref) == YES


def test_a_damaged_cache_is_mended(uploaded_ref: ModelRef, downloads: list[str]) -> None:
    assert answers(uploaded_ref) == YES
    kept = fetched(uploaded_ref).location / "score.py"
    kept.chmod(0o644)
    for damage in (lambda: kept.write_text("no"), kept.unlink, lambda: shutil.rmtree(kept.parent)):
        damage()
        downloads.clear()
        assert answers(uploaded_ref) == YES
        assert downloads == ["score.py"]
        kept.chmod(0o644)
    (kept.parent / "__pycache__").mkdir(exist_ok=True)
    assert answers(uploaded_ref) == YES
    assert len(downloads) == 1


def test_what_a_killed_process_left_is_removed(uploaded_ref: ModelRef) -> None:
    digest = uploaded_ref.hash.removeprefix("sha256:")
    models = Path(os.environ["TALLY_CACHE"]) / "models"
    left = models / f".{digest}-abc" / "new"
    left.mkdir(parents=True)
    (left / "score.py").write_text("half of")
    (models / f".{digest}.lock").touch()
    assert answers(uploaded_ref) == YES
    assert in_cache() == [digest]


def test_damage_at_the_mirror_is_told(uploaded_ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = uploaded_ref.mirror or ""
    store = open_store(mirror)
    content = store.read("score.py")
    store.write("score.py", content[:-9])
    with pytest.raises(ModelChangedError, match=f"model score: what {mirror} holds is not its content"):
        load(uploaded_ref, "cpu")
    store.delete(["score.py"])
    with pytest.raises(ModelNotFoundError, match=f"missing or incomplete at {mirror}: .*no such object"):
        load(uploaded_ref, "cpu")
    store.delete_tree()
    with pytest.raises(ModelNotFoundError, match=HOST):
        verify(uploaded_ref)
    assert in_cache() == []
    # Without the list, but whole: as a folder that a user keeps.
    store.write("score.py", content)
    assert answers(uploaded_ref) == YES


def test_a_broken_download_is_tried_once_more(uploaded_ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = ObjectStore.download, Counter[str]()

    def download(self: ObjectStore, name: str, target: Path) -> None:
        real(self, name, target)
        times[name] += 1
        if times[name] == 1:
            target.write_bytes(target.read_bytes()[:5])

    monkeypatch.setattr(ObjectStore, "download", download)
    assert answers(uploaded_ref) == YES
    assert times == {"score.py": 2}


def test_lists_are_not_believed(uploaded_ref: ModelRef, tmp_path: Path) -> None:
    """Whoever can write to the bucket cannot write elsewhere on the machines that read it."""
    store = open_store(uploaded_ref.mirror or "")
    store.write(CONTENTS, b"not JSON")
    assert answers(uploaded_ref) == YES
    evil = "../../../../evil"
    digest = "0" * 64
    from tally.models.hashing import combined

    wanted = combined([(evil, bytes.fromhex(digest))])
    store.write(CONTENTS, json.dumps({"hash": wanted, "files": {evil: [1, digest]}}).encode())
    with pytest.raises(StorageError, match=r"'\.\./\.\./\.\./\.\./evil' cannot be the name of a model's file"):
        fetch("evil", store.url, (".",), wanted)


def test_a_full_disk_is_told(uploaded_ref: ModelRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TALLY_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot keep a model in .*\n  TALLY_CACHE names"):
        load(uploaded_ref, "cpu")


# ----------------------------------------------------------------------------- many processes, one machine


@contextmanager
def web(content: Path, held: threading.Event | None = None) -> Iterator[tuple[str, Counter[str], threading.Event]]:
    """An S3 that serves a folder's files, counts what is got, and says when it was asked for a file's content.

    held: contents are not given before.
    """
    got: Counter[str] = Counter()
    asked = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.split("?")[0].split("/", 2)[2]
            got[name] += 1
            if held is not None and not name.endswith(CONTENTS):
                asked.set()
                held.wait(60)
            path = content / name
            body = path.read_bytes() if path.is_file() else b""
            try:
                self.send_response(200 if path.is_file() else 404)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"1"')
                self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # who asked was killed

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got, asked
    finally:
        if held is not None:
            held.set()
        server.shutdown()
        thread.join()
        server.server_close()


PROGRAM = """
import json, sys
from tally.models.load import load
from tally.models.reference import ModelRef
ref = ModelRef.from_dict(json.loads(sys.argv[1]))
print("ready", flush=True)
print(load(ref, "cpu").score(["a", "b"]))
"""


@contextmanager
def process(ref: ModelRef) -> Iterator[subprocess.Popen[str]]:
    """Another process that loads a model; it has said "ready", and then says what is scored."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(ref.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[[ModelRef], ModelRef]) -> ModelRef:
    """An uploaded script whose mirror is in the S3 that :func:`web` serves from ``bucket/``."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "score.py").write_text(SCRIPT.format(answer="yes"))
    ref = upload_to_mirror(resolve(tmp_path / "code" / "score.py"), str(tmp_path / "bucket"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    digest = ref.hash.removeprefix("sha256:")
    return ModelRef.from_dict({**elsewhere(ref).to_dict(), "mirror": f"s3://bucket/{digest}"})


def test_ten_processes_of_a_machine_fetch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: ModelRef
) -> None:
    held = threading.Event()
    with web(tmp_path / "bucket", held) as (url, got, asked), ExitStack() as stack:
        monkeypatch.setenv("AWS_ENDPOINT", url)
        running = [stack.enter_context(process(served)) for _ in range(10)]
        assert [said(each) for each in running] == ["ready"] * 10
        assert asked.wait(60)
        held.set()
        assert [said(each) for each in running] == [str(YES)] * 10
    digest = served.hash.removeprefix("sha256:")
    assert got == {f"{digest}/{CONTENTS}": 1, f"{digest}/score.py": 1}
    assert in_cache() == [digest]


def test_when_the_fetching_process_is_killed_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: ModelRef
) -> None:
    held = threading.Event()
    with web(tmp_path / "bucket", held) as (url, got, asked):
        monkeypatch.setenv("AWS_ENDPOINT", url)
        with process(served) as first:
            assert asked.wait(60)
            with process(served) as second:
                assert said(second) == "ready"
                first.kill()
                first.wait(60)
                held.set()
                assert said(second) == str(YES)
    digest = served.hash.removeprefix("sha256:")
    assert got[f"{digest}/score.py"] == 2
    assert in_cache() == [digest]


# --------------------------------------------------------------------------------- the registry of a team


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "score.py"
    path.parent.mkdir()
    path.write_text(SCRIPT.format(answer="yes"))
    return path


def test_a_registry_in_a_bucket(
    bucket: str,
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    downloads: list[str],
    elsewhere: Callable[[ModelRef], ModelRef],
) -> None:
    monkeypatch.setenv("TALLY_REGISTRY", f"{bucket}/registry")
    added = open_registry().add("faces", resolve(script), alias="production")
    assert added.location == f"{bucket}/registry/sha256/{added.hash.removeprefix('sha256:')}"
    assert added.added_on == HOST
    ref = resolve("models:/faces@production")
    assert (ref.name, ref.version, ref.mirror, ref.hash) == ("faces", 1, added.location, added.hash)
    assert upload_to_mirror(ref, f"{bucket}/other") == ref
    assert sorted(downloads) == ["score.py", "tally.yaml"]
    assert answers(ref) == YES
    assert resolve("models:/faces") == ref
    assert len(downloads) == 2
    far = elsewhere(ref)
    assert answers(far) == YES
    assert len(downloads) == 4
    open_store(added.location).delete(["score.py"])
    with pytest.raises(ModelNotFoundError, match="missing or incomplete"):
        load(elsewhere(far), "cpu")
    with pytest.raises(ModelChangedError, match="models:/faces/1: the registry's copy was changed"):
        resolve("models:/faces")


def test_a_registry_that_others_do_not_see(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """A database for all, and content in one's own home."""
    monkeypatch.setattr(platform, "node", lambda: "laptop")
    open_registry().add("faces", resolve(script))
    monkeypatch.undo()
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "another"))
    monkeypatch.setenv("TALLY_DATABASE", f"sqlite:///{home}/tally.db")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("models:/faces")
    text = str(caught.value)
    assert f"models:/faces/1: its content is not on this machine ({HOST})" in text
    assert "it was added on laptop" in text
    assert "Set TALLY_REGISTRY, on all machines" in text
    monkeypatch.setenv("TALLY_REGISTRY", str(home / "models"))
    assert resolve("models:/faces").version == 1


def test_settings_of_the_registry(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().registry == str(home / "models")
    monkeypatch.setenv("TALLY_REGISTRY", "team")
    assert settings().registry == str(tmp_path / "team")
    monkeypatch.setenv("TALLY_REGISTRY", "s3://bucket/team=1/x")
    assert settings().registry == "s3://bucket/team=1/x"
    assert "registry='s3://bucket/team=1/x'" in repr(settings())
    for secret in ("s3://me:hunter2@bucket/x", "az://bucket/x?sig=hunter2"):
        monkeypatch.setenv("TALLY_REGISTRY", secret)
        with pytest.raises(SpecError, match="TALLY_REGISTRY must be a URL without credentials") as caught:
            settings()
        assert "hunter2" not in str(caught.value)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TALLY_REGISTRY", str(tmp_path / "file"))
    with pytest.raises(SpecError, match=r"TALLY_REGISTRY must name a folder or a bucket, but .* is a file"):
        settings()
