"""Alerts: rules, and a webhook that is told exactly as often as it has to be, by whoever lives to do so."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.alerts import delivery, rules, webhook
from tally.alerts.alert import Alert, alerts_of, resend
from tally.alerts.delivery import conclude, deliver
from tally.alerts.evaluation import check, evaluate
from tally.alerts.job import unevaluated
from tally.api import Job
from tally.config import settings
from tally.database.clock import now
from tally.database.connect import connect
from tally.database.tables import alerts as table
from tally.database.tables import jobs
from tally.errors import JobError, SourceNotFoundError, SpecError
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobRecord, JobStore
from tally.sinks.base import Sink
from tally.sinks.factory import sink_for
from tally.sources.base import Chunk

DOCS = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "alerts.md"
DEADLINE = 60.0
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdefghijklmnopqrstuv").decode()
HIDDEN = "T00-hidden-path"
ROWS = [{"anomaly": True}, {"anomaly": False}, {"anomaly": None}, {"anomaly": True}]


class Receiver(ThreadingHTTPServer):
    """Answers with the statuses given, then with 204; notes what it was sent."""

    daemon_threads = True

    def __init__(self, *, listen: bool = True) -> None:
        self.answers: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()
        if listen:
            self.listen()

    def listen(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{HIDDEN}?token={HIDDEN}"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}}, body))
        self.server.arrived.release()
        self.server.gate.wait(DEADLINE)
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.send_header("location", "/elsewhere")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_WEBHOOK_SECRET", SECRET)


@pytest.fixture
def store() -> Iterator[JobStore]:
    store = JobStore(connect(settings().database))
    yield store
    store.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield settings().database
    else:
        with postgres_database() as url:
            yield url


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    """Not yet written to."""
    return sink_for(str(tmp_path / "out"), output="rows")


def ended(store: JobStore, *texts: str, hook: str = "https://nowhere.invalid/", **values: Any) -> JobRecord:
    """A job with these rules that has come to its end."""
    model = {"name": "pumps", "version": 3, "kind": "sklearn", "hash": "sha256:0", "assumed": []}
    spec = {"source": ["in"], "model": "m", "out": "out", "alerts": list(texts), "webhook": hook}
    record = store.create(fingerprint="f", spec=spec, model=model, output={"place": "out"})
    done = {"state": "finished", "planned": 1, "items": 200, "done": 200, "dead": 14, "rows": 186}
    return change(store, record, **{**done, "usage": {"seconds": 12.5}, "finished_at": now(), **values})


def change(store: JobStore, record: JobRecord, **values: Any) -> JobRecord:
    with store.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == record.id).values(**values))
    return store.get(record.id)


def alter(store: JobStore, **values: Any) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.update(table).values(**values))


def write(store: JobStore, sink: Sink, record: JobRecord, rows: list[dict[str, Any]]) -> None:
    """The job has written these rows."""
    store.respec(record.id, record.spec, output=sink.describe().to_json())
    sink.claim(record.id)
    writer = sink.open("attempt", Chunk(0, len(rows), {}))
    assert writer.add([str(number) for number in range(len(rows))], rows) == []
    sink.finalize([writer.close()], [], {"job": record.id, "generation": 0})


def alerts(store: JobStore, record: JobRecord) -> list[Alert]:
    return alerts_of(store.engine, record.id)


def outcomes(store: JobStore, record: JobRecord) -> dict[str, str]:
    return {alert.rule: alert.state for alert in alerts(store, record)}


# -- rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept", "value", "holds"),
    [
        ("anomalies > 0", "anomalies > 0", 0, False),
        ("anomalies>0", "anomalies > 0", 1, True),
        ("  dead_share >=5% ", "dead_share >= 5%", 0.05, True),
        ("dead_share > 0.05", "dead_share > 5%", 0.05, False),
        ("dead_share > 0.1%", "dead_share > 0.1%", 0.0011, True),
        ("rows == 0", "rows == 0", 0, True),
        ("items!=3", "items != 3", 3, False),
        ("dead <= 1e3", "dead <= 1000", 1000, True),
        ("seconds < 0.5", "seconds < 0.5", 0.5, False),
        ("failed", "failed", 1, True),
        (" no_data ", "no_data", 0, False),
    ],
)
def test_rules_are_understood(text: str, kept: str, value: float, holds: bool) -> None:
    assert rules.checked(text) == kept
    assert rules.checked(kept) == kept
    assert rules.parse(text).holds(value) is holds


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("anomolies > 0", ["there is no measure 'anomolies'; did you mean 'anomalies'?"]),
        ("anomalies = 0", ["'=' is no comparison; comparisons are > >= < <= == !="]),
        ("anomalies => zero", ["'=>' is no comparison", "'zero' is no number"]),
        ("anomalies", ["compares with nothing"]),
        ("anomalies >", ["'' is no number"]),
        ("anomalies 5", ["compares with nothing"]),
        ("> 5", ["names no measure; there are anomalies, rows"]),
        ("rows > nan", ["'nan' is no number"]),
        ("rows > 5%", ["5% is a share, and rows is none; dead_share is"]),
        ("dead_share > 5", ["dead_share is a share such as 5% or 0.05, not 5"]),
        ("dead_share > 200%", ["not 200%"]),
        ("failed > 0", ["'failed' stands alone"]),
        ("fail", ["did you mean 'failed'?"]),
        ("", ["names no measure", "compares with nothing"]),
        ("rows > 1 > 2", ["'1 > 2' is no number"]),
        ("nothing < x", ["no measure 'nothing'", "'x' is no number"]),
    ],
)
def test_what_is_wrong_with_a_rule_is_said_together(text: str, messages: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        rules.checked(text)
    for message in messages:
        assert message in str(caught.value)


def test_the_documented_measures_are_those_there_are() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", DOCS.read_text("utf-8"), re.MULTILINE)
    assert documented == [*rules.MEASURES, *rules.EVENTS]


# -- judging -------------------------------------------------------------------------------------------


def test_each_measure_is_judged_by_what_the_job_counted(store: JobStore) -> None:
    texts = ["dead_share > 6%", "dead_share > 7%", "rows == 186", "items >= 201", "dead > 13", "seconds < 13"]
    record = ended(store, *texts, "failed", "no_data")
    evaluate(store.engine, record.id)
    found = alerts(store, record)
    assert [(alert.rule, alert.state) for alert in found] == [
        ("dead_share > 6%", "pending"),
        ("dead_share > 7%", "quiet"),
        ("rows == 186", "pending"),
        ("items >= 201", "quiet"),
        ("dead > 13", "pending"),
        ("seconds < 13", "pending"),
        ("failed", "quiet"),
        ("no_data", "quiet"),
    ]
    assert [alert.value for alert in found] == [0.07, 0.07, 186, 200, 14, 12.5, 0, 0]
    assert [alert.position for alert in found] == list(range(8))


@pytest.mark.parametrize("name", ["out", "out.csv", "out.jsonl"])
@pytest.mark.parametrize(
    ("rows", "anomalies"),
    [(ROWS, 2), ([{"anomaly": -1}, {"anomaly": 0}], 1), ([{"anomaly": 0.5}, {"anomaly": 0.0}], 1)],
)
def test_anomalies_are_counted_in_the_results(
    store: JobStore, tmp_path: Path, name: str, rows: list[dict[str, Any]], anomalies: int
) -> None:
    sink = sink_for(str(tmp_path / name), output="rows")
    record = ended(store, "anomalies > 1", rows=len(rows))
    write(store, sink, record, rows)
    evaluate(store.engine, record.id)
    (alert,) = alerts(store, record)
    assert (alert.value, alert.state) == (anomalies, "pending" if anomalies > 1 else "quiet")


def test_results_without_rows_have_no_anomalies(store: JobStore) -> None:
    record = ended(store, "anomalies == 0", rows=0)
    evaluate(store.engine, record.id)
    assert outcomes(store, record) == {"anomalies == 0": "pending"}


def test_what_cannot_be_judged_is_said_and_disturbs_nothing(store: JobStore, tmp_path: Path, sink: Sink) -> None:
    record = ended(store, "anomalies > 0", "dead > 0")
    write(store, sink, record, [{"label": "a"}])
    evaluate(store.engine, record.id)
    first, second = alerts(store, record)
    assert (first.state, first.value, first.error) == ("failed", None, "the results have no column 'anomaly'")
    assert first.describe() == "anomalies > 0: cannot be judged: the results have no column 'anomaly'"
    assert second.state == "pending"
    for elsewhere, message in [
        (sink_for(str(tmp_path / "gone"), output="rows"), "the results are no longer at out"),
        (sink_for(str(tmp_path / "a.mp4"), output="video"), "the results are no longer at out"),
    ]:
        store.respec(record.id, record.spec, output=elsewhere.describe().to_json())
        evaluate(store.engine, record.id)
        assert alerts(store, record)[0].error == message
    assert resend(store.engine, record.id) == 1  # what was not judged is not to be sent


def test_a_failed_job_is_judged_and_judged_again_when_it_was_resumed(store: JobStore, sink: Sink) -> None:
    texts = ("failed", "anomalies > 0", "dead > 100")
    record = ended(store, *texts, state="failed", finished_at=None, error="no room")
    evaluate(store.engine, record.id)
    assert outcomes(store, record) == {"failed": "pending", "anomalies > 0": "quiet", "dead > 100": "quiet"}
    assert alerts(store, record)[1].describe() == "anomalies > 0: not measured, the job failed"
    alter(store, attempts=1)
    record = change(store, record, state="finished", finished_at=now(), rows=4)
    write(store, sink, record, ROWS)
    for _ in range(2):
        evaluate(store.engine, record.id)
        assert outcomes(store, record) == {"failed": "pending", "anomalies > 0": "pending", "dead > 100": "quiet"}
    assert [alert.value for alert in alerts(store, record)] == [1, 2, 14]


def test_rules_that_came_later_join_those_there_are(store: JobStore) -> None:
    record = ended(store, "failed", state="failed")
    evaluate(store.engine, record.id)
    record = store.respec(record.id, {**record.spec, "alerts": ["dead > 1", "failed"]})
    evaluate(store.engine, record.id)
    assert [(each.rule, each.position) for each in alerts(store, record)] == [
        ("failed", 0),
        ("dead > 1", 1),
    ]
    assert len({each.message_id for each in alerts(store, record)}) == 2


def test_a_new_generation_is_judged_anew(store: JobStore) -> None:
    record = ended(store, "dead > 1")
    evaluate(store.engine, record.id)
    alter(store, state="delivered", attempts=1, delivered_at=now(), next_at=None)
    assert unevaluated(store.engine) == []
    record = change(store, record, generation=1)
    assert unevaluated(store.engine) == [record.id]
    evaluate(store.engine, record.id)
    assert [(each.generation, each.state) for each in alerts(store, record)] == [
        (0, "delivered"),
        (1, "pending"),
    ]


@pytest.mark.parametrize("state", ["running", "paused", "interrupted", "cancelled"])
def test_only_jobs_that_finished_or_failed_are_judged(store: JobStore, state: str) -> None:
    record = ended(store, "dead > 1", state=state)
    evaluate(store.engine, record.id)
    assert alerts(store, record) == []
    assert unevaluated(store.engine) == []


@pytest.mark.parametrize(
    ("values", "error", "holds"),
    [
        ({"items": 0, "done": 0}, None, True),
        ({"items": 0, "done": 0, "state": "failed", "planned": 0}, SourceNotFoundError("nothing there"), True),
        ({"items": 0, "done": 0, "state": "failed", "planned": 0}, JobError("no model"), False),
        ({"state": "failed"}, None, False),
        ({}, None, False),
    ],
)
def test_no_data_is_an_empty_source_or_none(
    store: JobStore, values: dict[str, Any], error: Exception | None, holds: bool
) -> None:
    record = ended(store, "no_data", **values)
    evaluate(store.engine, record.id, error=error)
    assert outcomes(store, record) == {"no_data": "pending" if holds else "quiet"}


def test_a_job_that_nobody_judged_is_found(database: str) -> None:
    store = JobStore(connect(database))
    record = ended(store, "dead > 1")
    failed = ended(store, "failed", state="failed", finished_at=None, started_at=now())
    ended(store)
    ended(store, "failed", finished_at=now() - 30 * 86_400)
    plain = store.create(fingerprint="f", spec={"out": "out"}, model={}, output={"place": "out"})
    change(store, plain, state="finished", finished_at=now())
    strange = ended(store, "dead > 1")
    store.respec(strange.id, {**strange.spec, "source": ["caf\udce9/\0", '"alerts": []']})
    settings_only = ended(store)
    store.respec(settings_only.id, {**settings_only.spec, "settings": {"alerts": ["mine"]}})
    assert set(unevaluated(store.engine)) == {record.id, failed.id, strange.id}
    for job_id in unevaluated(store.engine):
        evaluate(store.engine, job_id)
    assert unevaluated(store.engine) == []
    store.engine.dispose()


def test_two_that_judge_at_once_write_one_row_for_each_rule(database: str) -> None:
    stores = [JobStore(connect(database)) for _ in range(4)]
    records = [ended(stores[0], "dead > 1", "failed") for _ in range(5)]
    together = threading.Barrier(len(stores))

    def judge(store: JobStore) -> None:
        for record in records:
            together.wait(DEADLINE)
            evaluate(store.engine, record.id)

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(judge, stores))
    for record in records:
        assert [(each.rule, each.position) for each in alerts(stores[0], record)] == [
            ("dead > 1", 0),
            ("failed", 1),
        ]
    for store in stores:
        store.engine.dispose()


# -- before the job ------------------------------------------------------------------------------------


def test_a_job_is_refused_whose_alerts_could_not_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_WEBHOOK_SECRET")
    monkeypatch.delenv("ALERT_URL", raising=False)
    with pytest.raises(SpecError) as caught:
        check(["anomalies > 0", "failed"], "env:ALERT_URL", {"key": "string", "label": "string"})
    assert caught.value.problems == [
        "alerts: 'anomalies > 0' counts rows whose column 'anomaly' is true, and the results have no such column",
        "the webhook is env:ALERT_URL, and ALERT_URL is not set",
        "a webhook is signed, and TALLY_WEBHOOK_SECRET is not set",
    ]
    assert "openssl rand" in str(caught.value.hint)
    with pytest.raises(SpecError, match="no webhook to send them to"):
        check(["failed"], None, None)
    with pytest.raises(SpecError, match="no alert to send"):
        check([], "https://example.com/", None)
    monkeypatch.setenv("TALLY_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("ALERT_URL", "https://example.com/x")
    check(["anomalies > 0"], "env:ALERT_URL", None)
    check(["anomalies > 0"], "env:ALERT_URL", ["anomaly"])
    check([], None, [])


@pytest.mark.parametrize("given", ["abc", "whsec_", "whsec_c2hvcnQ=", "whsec_%%%", SECRET.removeprefix("whsec_")])
def test_a_secret_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TALLY_WEBHOOK_SECRET", given)
    with pytest.raises(SpecError) as caught:
        webhook.secret()
    assert "at least 24 bytes" in caught.value.message
    assert len(given) < 10 or given not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        "ftp://example.com/s3cret",
        "example.com/s3cret",
        "https:///s3cret",
        "https://me:s3cret@example.com/",
        "https://example.com:port/s3cret",
        "https://example.com/s3cret path",
        "https://example.com/s3cret\n",
        "https://exämple.com/s3cret",
        "https://[::1/s3cret",
        "env:s3cret name",
        "",
    ],
)
def test_what_is_no_address_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    with pytest.raises(ValueError) as caught:
        webhook.checked(given)
    assert "s3cret" not in str(caught.value)
    if not given.startswith("env:") and given == given.strip():
        monkeypatch.setenv("ALERT_URL", given or " ")
        with pytest.raises(SpecError) as refused:
            webhook.address("env:ALERT_URL")
        assert "s3cret" not in str(refused.value)
        assert webhook.shown(given) == "(no web address)"


def test_addresses_are_shown_without_their_path() -> None:
    assert webhook.shown("https://hooks.example.com/services/T0/B0/x?y=z#f") == "https://hooks.example.com"
    assert webhook.shown("http://[::1]:8080/x") == "http://[::1]:8080"
    assert webhook.shown("env:ALERT_URL") == "env:ALERT_URL"
    for given in ("https://example.com", "http://localhost:9/x?y=z", "env:ALERT_URL"):
        assert webhook.checked(given) == given


# -- sending -------------------------------------------------------------------------------------------


def genuine(headers: dict[str, str], body: bytes) -> bool:
    """As the documentation tells receivers to verify."""
    found = re.search(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return bool(names["genuine"](headers, body, SECRET))


def test_signatures_are_those_of_standard_webhooks() -> None:
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = webhook.signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="  # as its Python library makes it


def test_what_is_sent_is_signed_and_says_what_was_found(store: JobStore, receiver: Receiver) -> None:
    record = ended(store, "dead_share > 5%", "failed", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    ((headers, body),) = receiver.got
    assert headers["path"] == f"/{HIDDEN}?token={HIDDEN}"
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == f"alert_{record.id}_0_0"
    stamp = headers["webhook-timestamp"]
    assert abs(int(stamp) - time.time()) < DEADLINE
    key = base64.b64decode(SECRET[6:])
    digest = hmac.new(key, f"alert_{record.id}_0_0.{stamp}.{body.decode()}".encode(), hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert genuine(headers, body)
    assert not genuine(headers, body + b" ")
    assert not genuine({**headers, "webhook-timestamp": str(int(stamp) - 1)}, body)

    message = json.loads(body)
    assert (message["id"], message["type"]) == (headers["webhook-id"], "job.alert")
    assert message["timestamp"].endswith("+00:00")
    data = message["data"]
    assert (data["rule"], data["value"]) == ("dead_share > 5%", 0.07)
    assert data["text"] == f"Tally job {record.id}: dead_share > 5% (7%), out"
    assert data["job"] == {
        "id": record.id, "generation": 0, "state": "finished", "out": "out", "model": {"name": "pumps", "version": 3},
        "items": 200, "done": 200, "dead": 14, "rows": 186, "seconds": 12.5, "error": None,
    }  # fmt: skip
    assert [alert.state for alert in alerts(store, record)] == ["delivered", "quiet"]
    deliver(store.engine)
    assert len(receiver.got) == 1


def test_a_failed_job_sends_its_error(store: JobStore, receiver: Receiver) -> None:
    out = "caf\udce9/out"
    record = ended(store, "failed", hook=receiver.url, state="failed", error="no room on the disk")
    record = store.respec(record.id, {**record.spec, "out": out})
    evaluate(store.engine, record.id)
    deliver(store.engine)
    job = json.loads(receiver.got[0][1])["data"]["job"]
    assert (job["state"], job["error"], job["out"]) == ("failed", "no room on the disk", "caf\\udce9/out")


def test_the_address_may_be_in_the_environment(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALERT_URL", receiver.url)
    record = ended(store, "dead > 1", hook="env:ALERT_URL")
    evaluate(store.engine, record.id)
    deliver(store.engine)
    assert len(receiver.got) == 1


@pytest.mark.parametrize("status", [500, 302, 404, 429])
def test_a_refusal_is_tried_again_later(store: JobStore, receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    (alert,) = alerts(store, record)
    why = ": redirects are not followed" if status == 302 else ""
    assert alert.error == f"http://127.0.0.1:{receiver.server_port}: answered {status}{why}"
    assert (alert.state, alert.attempts) == ("pending", 1)
    assert alert.next_at is not None
    assert alert.next_at > alert.created_at
    alter(store, next_at=now() + 1000)
    deliver(store.engine)
    assert len(receiver.got) == 1  # it is not due
    alter(store, next_at=now())
    deliver(store.engine)
    assert len(set(receiver.ids)) == 1
    assert len(receiver.got) == 2
    (alert,) = alerts(store, record)
    assert (alert.state, alert.attempts, alert.error) == ("delivered", 2, None)


def test_a_receiver_that_is_not_there_is_tried_again(store: JobStore) -> None:
    server = Receiver(listen=False)
    record = ended(store, "dead > 1", hook=server.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    (alert,) = alerts(store, record)
    assert alert.error == f"http://127.0.0.1:{server.server_port}: connection refused"
    server.listen()
    alter(store, next_at=now())
    deliver(store.engine)
    server.shutdown()
    server.server_close()
    assert outcomes(store, record) == {"dead > 1": "delivered"}
    assert server.ids == [alert.message_id]


def test_gone_is_given_up_at_once(store: JobStore, receiver: Receiver) -> None:
    receiver.answers = [410]
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    (alert,) = alerts(store, record)
    assert (alert.state, alert.attempts, alert.next_at) == ("failed", 1, None)
    assert "given up; http://127.0.0.1" in alert.describe()
    evaluate(store.engine, record.id)
    deliver(store.engine)
    assert len(receiver.got) == 1
    assert resend(store.engine, record.id) == 1
    deliver(store.engine)
    assert outcomes(store, record) == {"dead > 1": "delivered"}


def test_the_tries_spread_over_a_day_and_end(store: JobStore, receiver: Receiver) -> None:
    receiver.answers = [503] * 99
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    waits = []
    for tried in range(1, delivery.TRIES + 1):
        deliver(store.engine)
        (alert,) = alerts(store, record)
        assert alert.attempts == tried
        if alert.next_at is not None:
            with store.engine.connect().execution_options(reading=True) as connection:
                clock: float = connection.scalar(sa.select(now()))
            waits.append(alert.next_at - clock)
            alter(store, next_at=now())
    assert alert.state == "failed"
    assert len(receiver.got) == delivery.TRIES
    assert len(set(receiver.ids)) == 1
    nominal = [2.0, 6.0, 18.0, 54.0, 162.0, 486.0, 1458.0, 4374.0, 13122.0, 28800.0, 28800.0]
    assert all(0.8 * n - 1.5 <= wait <= 1.2 * n for n, wait in zip(nominal, waits, strict=True))
    assert 20 * 3600 < sum(nominal) < 24 * 3600
    deliver(store.engine)
    assert len(receiver.got) == delivery.TRIES


def test_the_end_of_a_job_waits_a_little(store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(delivery, "PATIENCE", DEADLINE)
    receiver.answers = [500, 503]
    said: list[str] = []
    record = ended(store, "dead > 1", "failed", hook=receiver.url)
    conclude(store.engine, record.id, say=said.append)
    assert len(receiver.got) == 3
    assert [line.partition(" 20")[0] for line in said] == ["alert: dead > 1: delivered"]
    assert said[0].endswith(" (14)")


def test_the_end_of_a_job_says_who_tries_again(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_DELAY", 1000.0)
    receiver.answers = [500]
    said: list[str] = []
    record = ended(store, "dead > 1", hook=receiver.url)
    conclude(store.engine, record.id, say=said.append)
    assert len(receiver.got) == 1
    assert "dead > 1: not delivered, again after 20" in said[0]
    assert f"tally jobs alerts {record.id} --send" in said[1]
    said.clear()
    conclude(store.engine, ended(store).id, say=said.append)
    assert said == []


def test_without_the_secret_nothing_is_sent(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TALLY_WEBHOOK_SECRET")
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    (alert,) = alerts(store, record)
    assert (alert.state, alert.error) == ("pending", "a webhook is signed, and TALLY_WEBHOOK_SECRET is not set")
    assert receiver.got == []


def test_a_receiver_that_drips_is_hung_up_on(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 0.3)
    dropped = threading.Event()

    def drip(handler: Handler) -> None:
        while not dropped.wait(0.02):
            try:
                handler.wfile.write(b"H")
                handler.wfile.flush()
            except OSError:
                dropped.set()

    monkeypatch.setattr(Handler, "do_POST", drip)
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    assert dropped.wait(DEADLINE)
    assert str(alerts(store, record)[0].error).endswith(": no answer within 0.3 s")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate, and is not there")
def test_a_certificate_that_nobody_vouches_for_is_not_accepted(
    store: JobStore, receiver: Receiver, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    record = ended(store, "dead > 1", hook=receiver.url.replace("http:", "https:"))
    evaluate(store.engine, record.id)
    deliver(store.engine)
    assert "its certificate is not accepted: self-signed certificate" in str(alerts(store, record)[0].error)
    assert receiver.got == []


def test_of_several_that_send_at_once_one_sends_each(database: str, receiver: Receiver) -> None:
    stores = [JobStore(connect(database)) for _ in range(4)]
    records = [ended(stores[0], "dead > 1", "rows > 1", hook=receiver.url) for _ in range(10)]
    for record in records:
        evaluate(stores[0].engine, record.id)
    together = threading.Barrier(len(stores))

    def send(store: JobStore) -> None:
        together.wait(DEADLINE)
        deliver(store.engine)

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(send, stores))
    assert set(Counter(receiver.ids).values()) == {1}
    assert len(receiver.ids) == 20
    assert all(alert.state == "delivered" for record in records for alert in alerts(stores[0], record))
    for store in stores:
        store.engine.dispose()


def test_a_sender_whose_claim_ran_out_says_nothing_more(store: JobStore, receiver: Receiver) -> None:
    receiver.gate.clear()
    receiver.answers = [500]
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    late = threading.Thread(target=deliver, args=(store.engine,))
    late.start()
    assert receiver.arrived.acquire(timeout=DEADLINE)
    alter(store, owner="another's", lease_until=now() + 1000)
    receiver.gate.set()
    late.join(DEADLINE)
    (alert,) = alerts(store, record)
    assert (alert.state, alert.attempts) == ("pending", 0)


@pytest.mark.parametrize("sent", [False, True], ids=["before it is sent", "before the answer"])
def test_who_is_killed_while_sending_is_followed_by_another_with_the_same_id(
    store: JobStore, receiver: Receiver, sent: bool
) -> None:
    record = ended(store, "dead > 1", hook=receiver.url)
    evaluate(store.engine, record.id)
    program = (
        "import signal, sys\n"
        "from tally.config import settings\n"
        "from tally.alerts import delivery, webhook\n"
        "from tally.database.connect import connect\n"
        "def wait(*arguments):\n"
        "    print('claimed', flush=True)\n"
        "    signal.pause()\n"
        f"if not {sent}:\n"
        "    webhook.post = wait\n"
        "delivery.deliver(connect(settings().database))\n"
    )
    receiver.gate.clear()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        if sent:
            assert receiver.arrived.acquire(timeout=DEADLINE)
        else:
            assert process.stdout.readline() == "claimed\n"
        process.send_signal(signal.SIGKILL)
    receiver.gate.set()
    deliver(store.engine)
    assert len(receiver.ids) == int(sent)  # the dead one's claim holds
    alter(store, lease_until=now() - 1)
    deliver(store.engine)
    assert receiver.ids == [f"alert_{record.id}_0_0"] * (1 + sent)
    assert outcomes(store, record) == {"dead > 1": "delivered"}


def test_alerts_of_a_job_that_is_forgotten_are_forgotten(store: JobStore) -> None:
    record = ended(store, "dead > 1")
    evaluate(store.engine, record.id)
    store.delete(record.id)
    assert alerts(store, record) == []
    deliver(store.engine)
    evaluate(store.engine, record.id)
    assert alerts(store, record) == []


# -- what is seen --------------------------------------------------------------------------------------


def test_jobs_show_and_jobs_alerts_tell_what_became_of_them(
    store: JobStore, receiver: Receiver, cli: Callable[..., Any]
) -> None:
    receiver.answers = [410]
    record = ended(store, "dead_share > 5%", "rows == 0", hook=receiver.url)
    evaluate(store.engine, record.id)
    deliver(store.engine)
    shown = cli("jobs", "show", record.id)
    assert f"alerts       dead_share > 5%, rows == 0; to http://127.0.0.1:{receiver.server_port}\n" in shown.out
    assert "alert        dead_share > 5%: not delivered, given up; http://127.0.0.1" in shown.out
    assert "alert        rows == 0: quiet (186)\n" in shown.out
    listed = cli("jobs", "alerts", record.id)
    assert (listed.code, len(listed.out.splitlines())) == (1, 2)
    facts = json.loads(cli("jobs", "show", record.id, "--json").out)
    assert [(each["rule"], each["state"]) for each in facts["alerts"]] == [
        ("dead_share > 5%", "failed"),
        ("rows == 0", "quiet"),
    ]
    none = ended(store)
    assert cli("jobs", "alerts", none.id).err == f"job {none.id} has no alerts: it has no rules (--alert)\n"


@pytest.mark.parametrize("answers", [[], [500] * 9])
def test_neither_secret_nor_path_is_ever_shown(
    store: JobStore,
    receiver: Receiver,
    cli: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[int],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(delivery, "FIRST_DELAY", 1000.0)
    receiver.answers = list(answers)
    said: list[str] = []
    record = ended(store, "dead > 1", "failed", hook=receiver.url)
    conclude(store.engine, record.id, say=said.append)
    seen = [
        *said,
        repr(alerts(store, record)),
        caplog.text,
        json.dumps([a.describe() for a in alerts(store, record)]),
    ]
    for command in (("show", record.id), ("show", record.id, "--json"), ("alerts", record.id), ("list", "--json")):
        ran = cli("jobs", *command)
        seen += [ran.out, ran.err]
    seen.append(receiver.got[0][1].decode())
    assert "dead > 1" in seen[0]
    everything = "\n".join(seen) + caplog.text
    assert HIDDEN not in everything
    assert SECRET not in everything
    assert SECRET[6:] not in everything


# -- of real jobs --------------------------------------------------------------------------------------

SCORER = """
import tally


class Odd(tally.Scorer):
    input = "bytes"
    columns = {"anomaly": "bool"}

    def score(self, batch):
        return [ValueError("broken") if data == b"broken" else {"anomaly": data == b"odd"} for data in batch]
"""


@pytest.fixture
def run(tmp_path: Path, cli: Callable[..., Any]) -> Callable[..., Any]:
    """``tally score`` of files with these contents, into ``out``."""

    def run(contents: list[bytes], *options: str) -> Any:
        (tmp_path / "odd.py").write_text(SCORER)
        (tmp_path / "in").mkdir()
        for number, data in enumerate(contents):
            (tmp_path / "in" / f"{number}.bin").write_bytes(data)
        model = f"{tmp_path / 'odd.py'}:Odd"
        return cli("score", tmp_path / "in", "--model", model, "--out", tmp_path / "out", "-w", 1, *options)

    return run


def test_the_webhook_is_told_of_anomalies(run: Callable[..., Any], receiver: Receiver, tmp_path: Path) -> None:
    alert = ("--alert", "anomalies>=2", "--alert", "failed", "--webhook", receiver.url)
    ran = run([b"odd", b"even", b"odd"], *alert)
    assert ran.code == 0
    assert "alert: anomalies >= 2: delivered" in ran.err
    ((headers, body),) = receiver.got
    assert genuine(headers, body)
    data = json.loads(body)["data"]
    assert (data["rule"], data["value"], data["job"]["state"]) == ("anomalies >= 2", 2, "finished")
    job = Job(str(tmp_path / "out"))
    assert job.manifest["spec"]["alerts"] == ["anomalies >= 2", "failed"]
    seen = [ran.out, ran.err, (tmp_path / "out" / "_manifest.json").read_text(), repr(job.record), repr(job)]
    seen += [str(job.manifest), repr(JobSpec(**job.record.spec))]
    assert HIDDEN not in "".join(seen)


def test_the_webhook_is_told_of_a_failure(run: Callable[..., Any], receiver: Receiver) -> None:
    ran = run([b"broken"], "--alert", "anomalies > 0", "--alert", "failed", "--webhook", receiver.url)
    assert ran.code == 1
    ((_, body),) = receiver.got
    data = json.loads(body)["data"]
    assert (data["rule"], data["job"]["state"], data["job"]["dead"]) == ("failed", "failed", 1)
    assert "the only item failed: " in data["job"]["error"]


def test_what_is_wrong_with_alerts_is_said_at_the_start(run: Callable[..., Any], receiver: Receiver) -> None:
    ran = run([b"odd"], "--alert", "anomalie > 0", "--alert", "rows = 0", "--webhook", "x" + receiver.url)
    assert ran.code == 2
    for message in ("did you mean 'anomalies'?", "'=' is no comparison", "webhook: should be an address"):
        assert message in ran.err
    assert HIDDEN not in ran.err
    assert receiver.got == []


def test_a_real_job_that_nobody_judged_is_sent_by_hand(
    store: JobStore, run: Callable[..., Any], receiver: Receiver, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    assert run([b"odd", b"even"]).code == 0
    record = Job(str(tmp_path / "out")).record
    store.respec(record.id, {**record.spec, "alerts": ["anomalies >= 1"], "webhook": receiver.url})
    assert unevaluated(store.engine) == [record.id]
    (tmp_path / "odd.py").unlink()  # the job's row and its results are all that is needed
    sent = cli("jobs", "alerts", tmp_path / "out", "--send")
    assert (sent.code, sent.out.partition(" 20")[0]) == (0, "anomalies >= 1: delivered")
    assert json.loads(receiver.got[0][1])["data"]["value"] == 1


def test_who_delivers_alerts_opens_no_model(
    store: JobStore, run: Callable[..., Any], receiver: Receiver, tmp_path: Path
) -> None:
    assert run([b"odd", b"even"]).code == 0
    record = Job(str(tmp_path / "out")).record
    store.respec(record.id, {**record.spec, "alerts": ["anomalies >= 1"], "webhook": receiver.url})
    (tmp_path / "odd.py").write_text("raise SystemExit('imported')")
    program = (
        "import sys\n"
        "from tally.alerts.delivery import delivering\n"
        "from tally.config import settings\n"
        "from tally.database.connect import connect\n"
        "with delivering(connect(settings().database)):\n"
        "    sys.stdin.read()\n"
        "print(*sorted(sys.modules))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert receiver.arrived.acquire(timeout=DEADLINE)
        modules = process.communicate(timeout=DEADLINE)[0].split()
    assert process.returncode == 0
    assert json.loads(receiver.got[0][1])["data"]["value"] == 1
    assert "tally.sinks.rows" in modules  # the results were looked at
    scoring = ("tally.models.", "tally.jobs.run", "tally.jobs.assemble", "tally.scorers.")
    assert [name for name in modules if name.startswith(scoring)] == ["tally.models.reference", "tally.scorers.base"]
