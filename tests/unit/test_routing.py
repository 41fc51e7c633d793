"""Messages choose models: what they may say, what is remembered of it, and what a model that cannot be used costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.colours import model
from tests.integration.test_push import Hook

from tally.errors import DatabaseAwayError, ItemError, ModelLoadError, ModelRefutedError, SpecError
from tally.jobs import open_models, spec
from tally.jobs.assemble import assemble, describe_model
from tally.jobs.open_models import OPEN_MODELS, OpenModels
from tally.jobs.worker import Worker, run_chunk
from tally.media.images import Decoding
from tally.models.reference import ModelRef
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.models.route import Route, is_route
from tally.push.base import Parcel
from tally.push.factory import open_receiver
from tally.push.target import Push
from tally.scorers.base import Scorer
from tally.sinks.factory import sink_for
from tally.sources.base import Chunk
from tally.sources.queues import routing
from tally.sources.queues.base import Message
from tally.sources.queues.bodies import BodyReader
from tally.sources.queues.metadata import Metadata
from tally.sources.queues.routing import FRESH_SECONDS, Router, Routing
from tally.sources.queues.source import QueueSource

JSON = BodyReader("json", key="name")


def said(**values: str) -> Callable[[str], str | None]:
    return values.get


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "values", "uri"),
    [
        ("models:/{meta:model}", {"model": "a"}, "models:/a"),
        ("models:/{meta:model}", {"model": "a/3"}, "models:/a/3"),
        ("models:/{meta:model}", {"model": "a@b"}, "models:/a@b"),
        ("models:/{meta:model|a@b}", {}, "models:/a@b"),
        ("models:/{meta:model|a@b}", {"model": ""}, "models:/a@b"),
        ("models:/a@{meta:alias|b}", {"alias": "c"}, "models:/a@c"),
        ("models:/{meta:model}/{meta:version}", {"model": "a", "version": "12"}, "models:/a/12"),
    ],
)
def test_what_a_message_says_becomes_a_registered_models_name(template: str, values: dict[str, str], uri: str) -> None:
    assert is_route(template)
    assert Route(template).uri(said(**values)) == uri


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "a//1", "a/", "a@", "a@b@c", "a/1/2", "../a", "a\0", "a\n", "A", "\u0661/1", "a/\u0661", "a" * 129],
)  # fmt: skip
def test_nothing_else_is_a_name(name: str) -> None:
    with pytest.raises(ItemError, match="the message names"):
        Route("models:/{meta:model}").uri(said(model=name))


def test_a_name_that_is_not_allowed_is_refused() -> None:
    route = Route("models:/{meta:model}", ("a", "b"))
    assert route.uri(said(model="b@c")) == "models:/b@c"
    with pytest.raises(ItemError, match=r"names the model 'ab', and the job allows a, b"):
        route.uri(said(model="ab"))


@pytest.mark.parametrize("template", ["models:/{model}", "models:/{meta:a", "models:/{meta:}", "models:/x/{meta:a}/b"])
def test_a_template_that_cannot_be_meant_is_refused(template: str) -> None:
    with pytest.raises(SpecError, match="model:"):
        resolve(template)


def test_a_route_is_for_queues_and_tells_jobs_apart(tmp_path: Path) -> None:
    model(tmp_path / "m.onnx")
    routed = {"model": "models:/{meta:model}", "out": str(tmp_path / "out")}
    queue = spec.make(source="amqp://h/q", queue={"meta.device": "header:d", "meta": {"at": "time"}}, **routed)
    assert queue.queue == {"meta": {"at": "time", "device": "header:d"}}
    ref = describe_model(queue)
    assert (ref.kind, str(ref)) == ("routed", "models:/{meta:model}")
    parts = assemble(queue, ref)
    assert list(parts.source.columns) == ["item", "model", "model_version", "model_hash", "at", "device"]
    in_body = spec.make(source="amqp://h/q", queue={"meta": {"model": "body:m", "d": "id"}}, **routed)
    assert list(assemble(in_body, ref).source.columns) == ["item", "model", "model_version", "model_hash", "d"]
    other = spec.make(source="amqp://h/q", **{**routed, "model": "models:/{meta:other}"})
    assert other.fingerprint(describe_model(other).hash) != queue.fingerprint(ref.hash)
    for changed, problem in [
        ({"source": str(tmp_path)}, "is chosen by messages, and the source is"),
        ({"overlay": True}, "overlay: needs one model"),
        ({"settings": {"top": 3}}, "top: cannot be set of models that messages choose"),
        ({"task": "detect"}, "--task cannot be used with a model that messages choose"),
        ({"queue": {"models": [1]}}, "models should be names"),
        ({"queue": {"meta": {"key": "id"}}}, "meta has 'key'"),
        ({"queue": {"meta": {"a": "env:HOME"}}}, "meta.a should be header:NAME"),
        ({"queue": {"meta": {"a": "body:b"}, "body": "text"}}, "a body of the form text has no fields"),
        ({"queue": {"meta": "a"}}, "meta should be names and places"),
        ({"model": str(tmp_path / "m.onnx"), "queue": {"models": "a"}}, "models are those that messages may choose"),
    ]:  # fmt: skip
        made = spec.make(**{"source": "amqp://h/q", **routed, **changed})
        with pytest.raises(SpecError, match=problem):
            assemble(made, describe_model(made))


def test_a_route_in_a_job_file_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("{source: 'amqp://h/q', model: 'models:/{meta:model}', out: out/}")
    assert spec.read(str(tmp_path / "job.yaml")).model == "models:/{meta:model}"


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_metadata_are_texts_of_headers_and_bodies() -> None:
    places = {"device": "body:device.serial", "n": "body:n", "flag": "body:flag", "h": "header:H", "none": "body:x.y"}
    body = {"name": "a", "device": {"serial": "D-1"}, "n": 3, "flag": True, "x": None}
    message = Message(json.dumps(body).encode(), {"H": "é", "free": "f"}, id="7", time="2026-11-29T05:00:00+00:00")
    metadata = Metadata(JSON, {**places, "id": "id", "at": "time"})
    assert metadata.kept(message) == {
        "device": "D-1", "n": "3", "flag": "true", "h": "é", "none": None, "id": "7", "at": "2026-11-29T05:00:00+00:00",
    }  # fmt: skip
    assert metadata.of(message)("free") == "f"
    assert metadata.of(message)("H") == "é"
    python = Metadata(BodyReader("pyliteral", key="name"), {"n": "body:n"})
    assert python.kept(Message(b"{'name': 'a', 'n': 'x'}")) == {"n": "x"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"d": [1]}', "should be one text or number"),
        (b'{"d": "\\u0000"}', "no text that can be kept"),
        (b'{"d": "\\ud800"}', "no text that can be kept"),
        (b'{"d": "' + b"x" * 5000 + b'"}', "over 4,096 characters"),
        (b"\xff", "no UTF-8 text"),
        (b"{", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
    ],
)
def test_what_is_no_text_makes_its_message_a_dead_one(body: bytes, problem: str) -> None:
    with pytest.raises(ItemError, match=problem):
        Metadata(JSON, {"d": "body:d"}).kept(Message(body))


# -- looking up --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(routing.time, "monotonic", lambda: now[0])
    return now


def test_what_an_alias_means_is_asked_again_after_a_while(tmp_path: Path, clock: list[float]) -> None:
    registry = open_registry()
    (tmp_path / "labels.txt").write_text("r\ng\nb")
    first = registry.add("m", resolve(model(tmp_path / "m.onnx"), task="classify"), alias="champion")
    router = Router(Routing(Route("models:/m@{meta:alias}"), ["image"]))
    name, ref = router.choose(said(alias="champion"))
    assert (name, ref.name, ref.version, ref.hash) == ("m@champion", "m", 1, first.hash)
    with pytest.raises(ItemError, match="no alias 'next'"):
        router.choose(said(alias="next"))
    labels = tmp_path / "labels.txt"
    second = registry.add("m", resolve(tmp_path / "m.onnx", task="classify", labels=labels), alias="champion")
    registry.alias("m", "next", 2)
    clock[0] += FRESH_SECONDS
    assert router.choose(said(alias="champion"))[1].version == 1
    clock[0] += 0.1
    assert router.choose(said(alias="champion"))[1].hash == second.hash
    assert router.choose(said(alias="next"))[1].version == 2


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"input": "table"}, "takes table, and messages name pictures and files"),
        ({"output": "image"}, "gives pictures, and where messages choose the model, results are rows"),
        ({"columns": {"device": "string"}}, "gives a column 'device', and so does the job"),
    ],
)
def test_a_model_that_cannot_serve_the_job_costs_its_own_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], problem: str
) -> None:
    open_registry().add("m", resolve(model(tmp_path / "m.onnx"), task="classify"))
    made = Scorer()
    vars(made).update(more)
    monkeypatch.setattr("tally.models.load.create", lambda ref: made)
    with pytest.raises(ItemError, match=problem):
        Router(Routing(Route("models:/{meta:m}"), ["image"], ["device"])).choose(said(m="m"))


def test_a_database_that_is_away_is_no_messages_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: object, uri: str) -> None:
        raise DatabaseAwayError("it does not answer")

    monkeypatch.setattr("tally.models.registry.Registry.get", away)
    with pytest.raises(DatabaseAwayError):
        Router(Routing(Route("models:/{meta:m}"), ["image"])).choose(said(m="m"))


# -- in workers --------------------------------------------------------------------------------------------------------


class Sized(Scorer):
    input = "bytes"

    def __init__(self, ref: ModelRef) -> None:
        self.ref, self.closed = ref, False

    def score(self, batch: Any) -> Any:
        if self.ref.name == "refuted":
            raise ModelRefutedError("it is no classifier")
        return [{"size": len(each)} for each in batch]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Sized]:
    made: list[Sized] = []

    def load(ref: ModelRef, device: str) -> Scorer:
        if ref.name == "broken":
            raise ModelLoadError("it cannot be loaded")
        made.append(Sized(ref))
        return made[-1]

    monkeypatch.setattr(open_models, "load", load)
    return made


def reference(name: str, version: int = 1) -> ModelRef:
    return ModelRef("onnx", name, Path("/"), "m.onnx", f"sha256:{name}{version}", version=version)


def test_the_last_few_models_stay_open(loaded: list[Sized]) -> None:
    models = OpenModels("cpu", 3, Decoding())
    scorers = [models.get(reference("m", version)) for version in range(OPEN_MODELS)]
    assert models.get(reference("m", 0)) is scorers[0]
    assert scorers[0].batch_size == 3
    models.get(reference("m", OPEN_MODELS))
    assert [each.closed for each in loaded] == [False, True, *[False] * (OPEN_MODELS - 1)]
    models.close()
    assert all(each.closed for each in loaded)


def routed(names: list[str], ref: ModelRef) -> Chunk:
    payload = {
        "keys": [f"{name}#{ref.name}" for name in names],
        "urls": [None] * len(names),
        "bodies": ["YWI="] * len(names),
        "meta": [{"device": name.upper()} for name in names],
        "items": names,
        "model": ref.to_dict(),
    }
    return Chunk(0, len(names), payload)


@pytest.fixture
def worker(tmp_path: Path, loaded: list[Sized]) -> Worker:
    options = {"body": "content", "meta": {"device": "header:device"}}
    source = QueueSource.describe("amqp://h/q", "bytes", options, route="models:/{meta:m}")
    sink = sink_for(str(tmp_path / "out"), output="rows")
    sink.claim("job")
    return Worker(Sized(reference("of the job")), source, sink, 60, chosen=OpenModels("cpu", None, Decoding()))


def test_rows_say_what_scored_them(worker: Worker) -> None:
    chunk = routed(["a", "b"], reference("m", 4))
    part = worker.source.slice(chunk, 1, 2)
    outcome = run_chunk(worker, part, "1")
    (table,) = worker.sink.staged_rows(outcome.output)
    chosen = {"model": "m", "model_version": 4, "model_hash": "sha256:m4"}
    assert table.to_pylist() == [{"key": "b#m", "item": "b", **chosen, "device": "B", "size": 2}]


@pytest.mark.parametrize(("name", "problem"), [("broken", "it cannot be loaded"), ("refuted", "it is no classifier")])
def test_a_chosen_model_that_cannot_be_used_costs_its_own_items(worker: Worker, name: str, problem: str) -> None:
    outcome = run_chunk(worker, routed(["a", "b"], reference(name)), "1")
    assert [(each.position, each.key, each.stage) for each in outcome.dead] == [
        (0, f"a#{name}", "load"),
        (1, f"b#{name}", "load"),
    ]
    assert all(problem in each.error for each in outcome.dead)
    assert (outcome.output.rows, outcome.output.files) == (0, [])
    assert run_chunk(worker, routed(["a"], reference("m")), "2").output.rows == 1


# -- pushed bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, {"of": "{device}", "by": "{model} {version}", "boxes": "{rows}"}])
def test_what_is_told_of_an_item_is_told_without_a_row_too(body: Any) -> None:
    hook = Hook()
    try:
        facts = {"job": "j", "model": "models:/{meta:m}", "version": None}
        receiver = open_receiver(Push(url=hook.url, body=body), facts)
        info = {each: {"device": each.upper(), "model": "m", "model_version": 3} for each in ("a", "b")}
        rows = pa.table({"key": ["a"], "device": ["A"], "model": ["m"], "model_version": [3], "box": [7]})
        assert receiver.deliver(Parcel("p", ["a", "b"], rows, info)) == []
        receiver.close()
        posted = sorted(hook.got.values(), key=str)
    finally:
        hook.close()
    rows_of = {"A": [{"box": 7}], "B": []}
    if body is None:
        assert posted == [
            {"key": device.lower(), "device": device, "model": "m", "model_version": 3, "rows": rows}
            for device, rows in rows_of.items()
        ]
    else:
        assert posted == [{"of": device, "by": "m 3", "boxes": rows} for device, rows in rows_of.items()]
