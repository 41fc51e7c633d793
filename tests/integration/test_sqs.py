"""What only Amazon's queues have: redrive policies, groups, URLs of their own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from tests.brokers import make_sqs_queue
from tests.objectstores import Service

from tally.errors import SourceNotFoundError, SpecError
from tally.sources.queues.base import REASON, Message
from tally.sources.queues.factory import is_queue, open_queue


@pytest.fixture
def name(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    s3_server.enter(monkeypatch)
    return f"tally-test-{secrets.token_hex(6)}"


def test_dead_messages_go_where_the_redrive_policy_says(name: str) -> None:
    make_sqs_queue(f"{name}-elsewhere")
    target = f"arn:aws:sqs:us-east-1:123456789012:{name}-elsewhere"
    make_sqs_queue(name, RedrivePolicy=json.dumps({"deadLetterTargetArn": target, "maxReceiveCount": "9"}))
    with closing(open_queue(f"sqs://us-east-1/{name}")) as queue:
        queue.send([Message(b"bad", {str(number): "x" for number in range(10)})])
        [message] = queue.receive(1, 1.0)
        queue.reject([(message, "why: \x00 it is\nbad")])
        with closing(open_queue(f"sqs://us-east-1/123456789012/{name}-elsewhere")) as dead:
            [found] = dead.peek(5)
        assert (found.body, found.headers[REASON]) == (b"bad", "why:   it is\nbad")
        assert queue.depth().dead == 1


def test_a_message_stays_in_its_group(name: str) -> None:
    make_sqs_queue(f"{name}.fifo")
    with closing(open_queue(f"sqs://us-east-1/{name}.fifo")) as queue:
        queue.send([Message(b"a", {"MessageGroupId": "ours"}), Message(b"b")])
        first, other = queue.receive(2, 1.0)
        assert first.headers["MessageGroupId"] == "ours" != other.headers["MessageGroupId"]
        queue.reject([(first, "bad")])
        [dead] = queue.peek(1, dead=True)
        assert dead.headers["MessageGroupId"] == "ours"
        assert queue.replay(1) == 1
        [again] = queue.receive(1, 1.0)
        assert again.headers == {"MessageGroupId": "ours"}


def test_messages_of_a_group_are_received_in_order(name: str) -> None:
    make_sqs_queue(f"{name}.fifo")
    with closing(open_queue(f"sqs://us-east-1/{name}.fifo")) as queue:
        sent = [str(number).encode() for number in range(12)]
        queue.send([Message(each, {"MessageGroupId": "cats"}) for each in sent])
        received: list[bytes] = []
        while len(received) < len(sent):  # the next ones come when these are settled
            queue.acknowledge(some := queue.receive(5, 1.0))
            received += [each.body for each in some]
        assert received == sent


def test_large_messages_are_sent_in_requests_of_their_own(name: str) -> None:
    make_sqs_queue(name)
    with closing(open_queue(f"sqs://us-east-1/{name}")) as queue:
        queue.send([Message(b"x" * 400_000) for _ in range(5)])
        assert queue.depth().waiting == 5


def test_a_queue_that_is_not_there(name: str) -> None:
    with closing(open_queue(f"sqs://us-east-1/{name}")) as queue:
        for ask in (queue.depth, lambda: queue.receive(1, 0.1), lambda: queue.send([Message(b"a")])):
            with pytest.raises(SourceNotFoundError, match="there is no such queue"):
                ask()


def test_what_is_no_text_is_refused(name: str) -> None:
    make_sqs_queue(name)
    with closing(open_queue(f"sqs://us-east-1/{name}")) as queue, pytest.raises(SpecError, match="text only"):
        queue.send([Message(b"\xff")])


def test_a_queue_by_the_url_that_amazon_shows(name: str) -> None:
    make_sqs_queue(name)
    with closing(open_queue(f"https://sqs.us-east-1.amazonaws.com/123456789012/{name}")) as queue:
        assert queue.depth().waiting == 0
    assert not is_queue(f"https://images.example.com/123456789012/{name}")


@pytest.mark.parametrize("url", ["sqs://us-east-1", "sqs:///items", "sqs://us-east-1/a/b/c", "sqs://r/items?lock=0"])
def test_urls_that_name_no_queue(url: str) -> None:
    with pytest.raises(SpecError):
        open_queue(url)


def test_a_job_takes_messages_until_the_queue_is_empty(name: str, tmp_path: Any, cli: Callable[..., Any]) -> None:
    make_sqs_queue(name)
    source, model = tmp_path / "in", tmp_path / "sizes.py"
    source.mkdir()
    for each in ("a", "b"):
        (source / each).write_text(each)
    model.write_text(
        "from tally import Scorer\n\n\nclass Sizes(Scorer):\n    input = 'bytes'\n\n"
        "    def score(self, batch):\n        return [{'size': len(each)} for each in batch]\n"
    )
    url = f"sqs://us-east-1/{name}"
    assert "2 messages sent" in cli("inject", source, "--queue", url).out
    ran = cli("score", url, "--queue", f"base={source}", "--model", model, "--out", f"{tmp_path}/out/", "--until-empty")
    assert ran.code == 0, ran.err
    assert json.loads(cli("queue", "depth", url, "--json").out) == {"waiting": 0, "in_hand": 0, "dead": 0}
