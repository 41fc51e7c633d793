"""Messages of real brokers choose their models: each is scored with what it names, or is dead with the reason."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image
from tests.clusters import Cluster
from tests.colours import model
from tests.extensions import install
from tests.extent import FULL
from tests.faults.storms import start
from tests.integration.test_push import Hook
from tests.objectstores import Service
from tests.queues import MAKERS, new_queue
from tests.waiting import wait_for

from tally.jobs.facade import Jobs
from tally.sources.queues.base import REASON, Message
from tally.sources.queues.factory import open_queue
from tally.storage import open_store

Cli = Callable[..., Any]
KINDS = list(MAKERS) if FULL else ["rabbitmq", "redis-stream", "kafka"]
"""All of them read their headers in the contract suite."""
QUICK = Path(__file__).resolve().parents[1] / "faults" / "quick_aliases.py"
QUEUES = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "queues.md"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def register(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Adds a classifier whose labels are its own; returns its hash."""

    def add(name: str, *labels: str, alias: str | None = None, task: str = "classify") -> str:
        file = model(tmp_path / "made" / f"{name}.onnx")
        (tmp_path / "labels.txt").write_text("\n".join(labels))
        more = ["--labels", tmp_path / "labels.txt"] if labels else []
        added = cli("models", "add", name, file, "--task", task, *more, *(["--alias", alias] if alias else []))
        assert added.code == 0, added.err
        shown = json.loads(cli("models", "show", name, "--json").out)
        return str(shown["versions"][-1]["hash"])

    return add


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with new_queue(request.param, request) as url:
        yield url


BARE = ("redis-list", "azure-queue")
"""Brokers whose messages have no headers. There, the body says it."""
IN_BODY = ["body=json", "key=name", "meta.model=body:model", "meta.device=body:device"]
IN_HEADERS = ["meta.device=header:device"]


def send(url: str, *messages: tuple[str, dict[str, str]], bare: bool = False) -> None:
    with closing(open_queue(url)) as queue:
        queue.send(
            [
                Message(json.dumps({"name": body, **headers}).encode()) if bare else Message(body.encode(), headers)
                for body, headers in messages
            ]
        )


def dead(url: str, *, bare: bool = False) -> dict[tuple[str, str | None], str]:
    """By body and the header ``model``, the reasons."""
    with closing(open_queue(url)) as queue:
        found = queue.peek(1000, dead=True)
        assert queue.depth().waiting == 0
    told = {}
    for each in found:
        fields = json.loads(each.body) if bare else {"name": each.body.decode(), **each.headers}
        told[fields["name"], fields.get("model")] = each.headers[REASON]
    assert len(told) == len(found)
    return told


HOSTILE = [
    "../../../etc/passwd",
    "detector/../../secrets",
    "http://evil.example/model.onnx",
    "file:///etc/passwd",
    "s3://bucket/model.onnx",
    "/tmp/model.onnx",
    "os:system",
    "{meta:model}",
    "d" * 4000,
    "dëtector",
    "detector\u202e",
    "DETECTOR",
    "detector@champion@champion",
    "detector\n",
    " ",
]


@pytest.mark.parametrize(("url", "kind"), [(each, each) for each in KINDS], indirect=["url"], ids=KINDS)
def test_each_message_is_scored_with_the_model_that_it_names(
    cli: Cli, url: str, kind: str, pictures: Path, tmp_path: Path, register: Callable[..., str]
) -> None:
    first = register("detector", "red", "green", "blue", alias="champion")
    second = register("detector", "rot", "grün", "blau")
    other = register("embedder", task="embed")
    register("secret", "red", "green", "blue")
    register("painter", task="values")
    register("damaged", "a", "b", "c")
    (damaged,) = json.loads(cli("models", "show", "damaged", "--json").out)["versions"]
    for each in Path(damaged["location"]).glob("*.onnx"):
        each.chmod(0o600)
        each.write_bytes(b"damaged")
    script = tmp_path / "script.py"
    script.write_text("import tally\nclass Code(tally.Scorer):\n    def score(self, batch):\n        return batch\n")
    assert cli("models", "add", "code", script).code == 0
    bare, allowed = kind in BARE, "detector,embedder,damaged,code,nobody"
    good: dict[tuple[str, str], tuple[str, int, str]] = {
        ("red.png", "detector@champion"): ("red", 1, first),
        ("red.png", "detector/2"): ("rot", 2, second),
        ("blue.png", "detector"): ("blau", 2, second),
        ("green.png", "embedder"): ("", 1, other),
    }
    bad = {
        ("red.png", "nobody"): "no model",
        ("red.png", "detector/9"): "no version 9",
        ("red.png", "detector@gone"): "no alias 'gone'",
        ("red.png", "secret"): "the job allows detector, embedder",
        ("red.png", "code"): "is code (kind python), which messages cannot choose",
        ("red.png", "damaged"): "the registry's copy was changed",
        ("../red.png", "detector"): "leads out of",
        **{("blue.png", each): "is no name of a registered model" for each in HOSTILE},
        ("blue.png", "d" * 40_000): "over 4,096 characters",
        ("blue.png", "detector\0"): "no text that can be kept",
    }
    send(
        url,
        *((body, {"model": name, "device": "d1"}) for body, name in [*bad, *good]),
        ("green.png", {"device": "d2"}),
        ("green.png", {"model": "detector/1", "device": "x" * 5000}),
        bare=bare,
    )
    options = [f"base={pictures}", f"models={allowed}", *(IN_BODY if bare else IN_HEADERS)]
    done = cli(
        "score", url, *chain.from_iterable(("--queue", each) for each in options),
        "--model", "models:/{meta:model}", "--out", tmp_path / "out", "--until-empty", "--workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    job = Jobs().store.newest(limit=1)[0]
    rows = {row["key"]: row for row in Jobs().results(job.id).to_pylist()}
    assert set(rows) == {f"{body}#{name}" for body, name in good}
    for (body, name), (label, version, digest) in good.items():
        row = rows[f"{body}#{name}"]
        facts = (row["item"], row["model"], row["model_version"], row["model_hash"], row["device"])
        assert facts == (body, name.partition("/")[0].partition("@")[0], version, digest, "d1")
        assert (row["label"] or "") == label
        assert (row["embedding"] is not None) == (name == "embedder")
    reasons = dead(url, bare=bare)
    assert reasons.keys() == {*bad, ("green.png", None), ("green.png", "detector/1")}
    for message, told in bad.items():
        assert told in reasons[message], (message, reasons[message])
    assert "names no model: it has no 'model'" in reasons["green.png", None]
    assert "over 4,096 characters" in reasons["green.png", "detector/1"]
    assert job.dead == 0
    shown = cli("jobs", "show", job.id).out
    assert "models:/{meta:model}, as each message says" in shown
    for option in options[1:]:
        assert option in shown


@pytest.mark.parametrize("url", ["redis-stream"], indirect=True)
def test_a_moved_alias_counts_for_what_comes_later_and_a_killed_worker_changes_nothing(
    cli: Cli, url: str, pictures: Path, tmp_path: Path, register: Callable[..., str]
) -> None:
    first = register("detector", "red", "green", "blue", alias="champion")
    other = register("other", "r", "g", "b", alias="champion")
    for number in range(60):
        Image.new("RGB", (8, 8), (250, 0, 0)).save(pictures / f"{number:02}.png")
    out, log = tmp_path / "out", tmp_path / "log"
    command = [
        sys.executable, str(QUICK), "score", url, "--queue", f"base={pictures}",
        "--model", "models:/{meta:model}@{meta:alias|champion}", "--out", f"{out}/", "--workers", "1",
    ]  # fmt: skip

    def names(begin: int) -> list[tuple[str, dict[str, str]]]:
        return [(f"{n:02}.png", {"model": "other" if n % 2 else "detector"}) for n in range(begin, begin + 20)]

    process = start(command, log)
    try:
        jobs = Jobs()

        def done() -> int:
            found = jobs.store.newest(limit=1)
            return found[0].done if found else 0

        send(url, *names(0))
        wait_for(lambda: done() == 20, process, told=log.read_text)
        second = register("detector", "rot", "gruen", "blau", alias="champion")
        workers = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        assert workers
        send(url, *names(20))
        os.kill(workers[-1].pid, signal.SIGKILL)
        wait_for(lambda: done() == 40, process, told=log.read_text)
        send(url, *names(40))
        wait_for(lambda: done() == 60, process, told=log.read_text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    job = jobs.store.newest(limit=1)[0]
    rows = jobs.results(job.id).to_pylist()
    found = Counter((row["model"], row["model_version"], row["model_hash"], row["label"]) for row in rows)
    assert found == {
        ("detector", 1, first, "red"): 10,
        ("detector", 2, second, "rot"): 20,
        ("other", 1, other, "r"): 30,
    }
    assert len({row["key"] for row in rows}) == 60
    assert job.dead == 0
    assert dead(url) == {}


@pytest.mark.ray
@pytest.mark.skipif(not FULL, reason="a cluster takes long to start: TALLY_TEST_FULL=1")
def test_workers_of_a_cluster_score_with_the_models_that_messages_choose(
    cli: Cli,
    s3: str,
    s3_server: Service,
    request: pytest.FixtureRequest,
    pictures: Path,
    register: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TALLY_REGISTRY", f"{s3}/registry")
    first = register("detector", "red", "green", "blue", alias="champion")
    second = register("detector", "rot", "gruen", "blau", alias="next")
    other = register("other", "r", "g", "b", alias="champion")
    there = open_store(f"{s3}/pictures")
    for each in pictures.iterdir():
        there.write(each.name, each.read_bytes())
    with (
        Cluster(nodes=1, cpus=1, head_cpus=0, env=s3_server.environment) as cluster,
        new_queue("redis-stream", request) as url,
    ):
        for name, value in cluster.client_env.items():
            monkeypatch.setenv(name, value)
        send(
            url,
            *((f"{name}.png", {"model": "detector"}) for name in ("red", "green", "blue")),
            ("red.png", {"model": "detector", "alias": "next"}),
            ("blue.png", {"model": "other"}),
            ("green.png", {"model": "nobody"}),
        )
        done = cli(
            "score", url, "--queue", f"base={s3}/pictures", "--model", "models:/{meta:model}@{meta:alias|champion}",
            "--out", f"{s3}/out", "--until-empty", "--engine", "ray", "--address", cluster.dashboard, "--workers", "1",
        )  # fmt: skip
        assert done.code == 0, done.err
        reasons = dead(url)
    rows = Jobs().results(Jobs().store.newest(limit=1)[0].id).to_pylist()
    assert {(row["item"], row["model"], row["model_version"], row["model_hash"], row["label"]) for row in rows} == {
        ("red.png", "detector", 1, first, "red"),
        ("green.png", "detector", 1, first, "green"),
        ("blue.png", "detector", 1, first, "blue"),
        ("red.png", "detector", 2, second, "rot"),
        ("blue.png", "other", 1, other, "b"),
    }
    assert len(rows) == 5
    assert list(reasons) == [("green.png", "nobody")]


def test_results_go_back_in_the_form_that_the_manual_shows(
    cli: Cli,
    request: pytest.FixtureRequest,
    pictures: Path,
    tmp_path: Path,
    register: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register("detector", "red", "green", "blue", alias="champion")
    register("classifier", "r", "g", "b", alias="champion")
    (example,) = (
        each for each in re.findall(r"```yaml\n(.*?)```", QUEUES.read_text(), re.DOTALL) if "ai-result" in each
    )
    with closing(Hook()) as hook, new_queue("redis-stream", request) as url:
        for name, value in {"URL": hook.url, "KEY": "k", "SECRET": "s"}.items():
            monkeypatch.setenv(f"RESULTS_{name}", value)
        job = yaml.safe_load(example)
        job["source"], job["queue"]["base"] = url, str(pictures)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        body = {
            "timestamp": "20261129T0455",
            "binary_payload": None,
            "revision": "v1",
            "device_serial_number": "D-17",
            "payload": {
                "message_id": "m-1",
                "original_timestamp": "20261129T0454",
                "attachments": {"A.png": {"path": "red.png"}, "B.png": {"path": "blue.png"}},
            },
        }
        send(url, (json.dumps(body), {"model": "detector"}), (json.dumps(body), {"model": "classifier"}))
        done = cli("run", tmp_path / "job.yaml", "--until-empty")
        assert done.code == 0, done.err
        assert (hook.headers["Authentication-Key"], hook.headers["Authentication-Secret"]) == ("k", "s")
        posted = {
            (each["payload"]["image_path"], each["payload"]["model_used"]["model"]): each for each in hook.got.values()
        }
    assert len(hook.got) == len(posted) == 4
    (box,) = posted["blue.png", "classifier"]["payload"].pop("bounding_boxes")
    assert posted["blue.png", "classifier"] == {
        "device_serial_number": "D-17",
        "timestamp": "20261129T0455",
        "type": "ai-result",
        "revision": "v1",
        "payload": {
            "message_id": "m-1",
            "image_path": "blue.png",
            "model_used": {"service": "tally", "model": "classifier", "version": 1},
        },
    }
    assert box.keys() == {"label", "index", "score"}
    assert box["label"] == "b"


KIND = """
import os, signal
from tally import Scorer
from tally.models.base import Kind, Traits


class Sized(Scorer):
    input = "bytes"

    def load(self, artifacts, device):
        match next(artifacts.glob("*.sized")).read_text():
            case "fatal":
                os.kill(os.getpid(), signal.SIGKILL)
            case "bad":
                raise RuntimeError("a part of it is missing")

    def score(self, batch):
        return [{"size": len(each)} for each in batch]


class SizedKind(Kind):
    traits = Traits(claims=(".sized",))

    def create(self, ref):
        return Sized()
"""


def test_a_model_that_crashes_its_worker_costs_its_own_messages(
    cli: Cli, request: pytest.FixtureRequest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch, "tally.scorers", {"sized": "sized_kind:SizedKind"}, sized_kind=KIND)
    for name in ("good", "fatal", "bad"):
        (tmp_path / f"{name}.sized").write_text(name)
        assert cli("models", "add", name, tmp_path / f"{name}.sized").code == 0
    names = [f"{colour}.png" for colour in ("red", "green", "blue")]
    with new_queue("redis-stream", request) as url:
        send(url, *((name, {"model": each}) for name in names for each in ("good", "fatal", "bad")))
        done = cli(
            "score", url, "--queue", f"base={pictures}", "--model", "models:/{meta:model}", "--out", tmp_path / "out",
            "--until-empty", "--workers", "1", "--max-dead", "100%",
        )  # fmt: skip
        reasons = dead(url)
    assert done.code == 0, done.err
    jobs = Jobs()
    job = jobs.store.newest(limit=1)[0]
    sizes = {f"{name}#good": (pictures / name).stat().st_size for name in names}
    assert {row["key"]: row["size"] for row in jobs.results(job.id).to_pylist()} == sizes
    assert {each.key: each.stage for each in jobs.dead(job.id)} == {
        **{f"{name}#fatal": "score" for name in names},
        **{f"{name}#bad": "load" for name in names},
    }
    assert reasons.keys() == {(name, each) for name in names for each in ("fatal", "bad")}
    assert all("SIGKILL" in reasons[name, "fatal"] for name in names)
    assert all("a part of it is missing" in reasons[name, "bad"] for name in names)
