"""What a message names, in every form of body; and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tally.errors import ItemError, SpecError
from tally.sources.queues.base import Message
from tally.sources.queues.bodies import BodyReader

S3_EVENT = {
    "Records": [
        {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "in"}, "object": {"key": "a+b/%C3%A9.jpg"}}},
        {"eventName": "ObjectRemoved:Delete", "s3": {"bucket": {"name": "in"}, "object": {"key": "gone.jpg"}}},
    ]
}
BLOB = "https://account.blob.core.windows.net/images/new/a.jpg"
EVENT_GRID = [{"eventType": "Microsoft.Storage.BlobCreated", "data": {"url": BLOB}}]
CLOUD_EVENT = {"specversion": "1.0", "type": "Microsoft.Storage.BlobCreated", "data": {"url": BLOB}}
ATTACHMENTS = {"payload": {"attachments": {"a.jpg": {"path": "x/a.jpg"}, "b.jpg": {"path": "x/b.jpg"}}}}


def named(body: str | bytes, **options: Any) -> list[tuple[str, str | None]]:
    content = body if isinstance(body, bytes) else body.encode()
    return [(each.key, each.url) for each in BodyReader(**options).items(Message(content))]


@pytest.mark.parametrize(
    ("body", "options", "expected"),
    [
        ("photo.jpg", {"base": "s3://in"}, [("photo.jpg", "s3://in/photo.jpg")]),
        ("\ufeffphoto.jpg", {"base": "s3://in"}, [("photo.jpg", "s3://in/photo.jpg")]),
        ('\ufeff{"a": "b"}', {"form": "json", "key": "a", "base": "s3://in"}, [("b", "s3://in/b")]),
        (" deep/photo.jpg\n", {"base": "s3://in/"}, [("deep/photo.jpg", "s3://in/deep/photo.jpg")]),
        ("s3://in/a.jpg", {}, [("s3://in/a.jpg", "s3://in/a.jpg")]),
        (
            '{"a": 1}.jpg',
            {"base": "s3://in"},
            [('{"a": 1}.jpg', 's3://in/{"a": 1}.jpg')],
        ),  # a name, though it begins so
        (json.dumps(S3_EVENT), {}, [("s3://in/a b/é.jpg", "s3://in/a b/é.jpg")]),
        (json.dumps({"Type": "Notification", "Message": json.dumps(S3_EVENT)}), {}, [("s3://in/a b/é.jpg",) * 2]),
        (json.dumps(EVENT_GRID), {}, [("az://images/new/a.jpg",) * 2]),
        (
            json.dumps(CLOUD_EVENT).replace("new/a.jpg", "a%20b%2Bc+d/100%25%23%C3%A9.jpg"),
            {},
            [("az://images/a b+c+d/100%#é.jpg",) * 2],
        ),
        (json.dumps(CLOUD_EVENT), {}, [("az://images/new/a.jpg",) * 2]),
        (
            json.dumps(ATTACHMENTS),
            {"form": "json", "key": "payload.attachments.*.path", "base": "az://c"},
            [("x/a.jpg", "az://c/x/a.jpg"), ("x/b.jpg", "az://c/x/b.jpg")],
        ),
        ('["a", "b", "a"]', {"form": "json", "key": "*", "base": "s3://in"}, [("a", "s3://in/a"), ("b", "s3://in/b")]),
        ('["a", "b"]', {"form": "json", "key": "1", "base": "s3://in"}, [("b", "s3://in/b")]),
        (
            "{'input_frame': '000001_frame.jpg', 'video_name': 'clip'}",
            {"form": "pyliteral", "template": "{video_name}/input_frames/{input_frame}", "base": "s3://in"},
            [("clip/input_frames/000001_frame.jpg", "s3://in/clip/input_frames/000001_frame.jpg")],
        ),
    ],
)
def test_what_a_message_names(body: str, options: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert named(body, **options) == expected


def test_a_message_may_be_the_item_itself() -> None:
    [(key, url)] = named(b"\xff\xd8", form="content")
    assert (len(key), url) == (32, None)
    assert named(b"\xff\xd8", form="content") == [(key, None)]
    assert BodyReader("content").items(Message(b"x", {"key": "mine"}))[0].key == "mine"
    with pytest.raises(ItemError, match="no text that can be kept"):
        BodyReader("content").items(Message(b"x", {"key": "\udcff"}))


@pytest.mark.parametrize(
    ("body", "options", "said"),
    [
        ("photo.jpg", {}, "is no URL, and the job says no base"),
        ("../secret", {"base": "/data"}, "leads out of /data"),
        ("/etc/passwd", {"base": "/data"}, "leads out of /data"),
        ("a//b", {"base": "/data"}, "leads out of /data"),
        ("file:///etc/passwd", {"base": "/data"}, "is a file of this machine"),
        ("FILE:///etc/passwd", {}, "is a file of this machine"),
        ("http://169.254.169.254/latest", {"base": "/data"}, "is of the web"),
        ("", {"base": "/data"}, "no name of one item"),
        ("a\nb", {"base": "/data"}, "no name of one item"),
        (b"\xff\xfe", {"base": "/data"}, "no UTF-8"),
        ("{", {"form": "json", "key": "a", "base": "/data"}, "it is not JSON"),
        ("[" * 100_000, {"form": "json", "key": "a", "base": "/data"}, "it is not JSON"),
        ("__import__('os')", {"form": "pyliteral", "key": "a", "base": "/data"}, "not the text of a Python value"),
        ('{"a": 3}', {"form": "json", "key": "a", "base": "/data"}, "should be text in it, not int"),
        ('{"b": "x"}', {"form": "json", "key": "a", "base": "/data"}, "it names no item"),
        ('{"a": ["x"]}', {"form": "json", "template": "{a}", "base": "/data"}, "should be one text in it"),
        (
            json.dumps(["x"] * 3 + [str(n) for n in range(10_001)]),
            {"form": "json", "key": "*", "base": "/d"},
            "more than",
        ),
        (json.dumps({"Records": []}), {"base": "/data"}, "it names no item"),
        (
            json.dumps(
                {"Records": [{"eventName": "ObjectCreated", "s3": {"bucket": {"name": "b"}, "object": {"key": 5}}}]}
            ),
            {"base": "/data"},
            "it names no item",
        ),
        ('{"key": "a.jpg", "url": "s3://in/a.jpg"}', {"base": "/data"}, "it is JSON, and no event that is known"),
        ('{"a": "\\ud800.jpg"}', {"form": "json", "key": "a", "base": "/data"}, "is no text that can be kept"),
        ('{"a": "\\u0000.jpg"}', {"form": "json", "key": "a", "base": "/data"}, "is no text that can be kept"),
        ("{'a': 0x" + "f" * 5000 + "}", {"form": "pyliteral", "template": "{a}", "base": "/data"}, "'a' is no name"),
    ],
)
def test_what_cannot_be_understood(body: str | bytes, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ItemError, match=said):
        named(body, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "json"}, "needs key"),
        ({"form": "text", "key": "a"}, "key and template are for bodies"),
        ({"form": "json", "key": "a", "template": "b"}, "not both"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        BodyReader(**options)


def test_an_event_of_another_account_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert named(json.dumps(EVENT_GRID)) == [("az://images/new/a.jpg",) * 2]
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    with pytest.raises(ItemError, match="in the account account, and az:// here is that of other"):
        named(json.dumps(EVENT_GRID))
