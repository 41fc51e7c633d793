"""Scripts behind an endpoint: what of a request reaches run(), and what of its answer reaches the client."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tally.scorers.base import Request, Response, Scorer
from tally.scorers.scripts import forms
from tally.scorers.scripts.azureml import AMLRequest, AMLResponse, Headers
from tally.scorers.scripts.script import ScriptScorer, form_of

RAW = """
from azureml.contrib.services.aml_request import AMLRequest, rawhttp
from azureml.contrib.services.aml_response import AMLResponse
def init(): ...
@rawhttp
def run(request):
"""
AZURE = "from azureml.contrib.services.aml_response import AMLResponse\n"


def script(folder: Path, text: str, **options: Any) -> ScriptScorer:
    (folder / "score.py").write_text(text)
    found = ScriptScorer(folder / "score.py", **options)
    found.load(folder, "cpu")
    return found


def raw(folder: Path, body: str) -> ScriptScorer:
    return script(folder, RAW + "".join(f"    {line}\n" for line in body.splitlines()))


def plain(folder: Path, body: str, parameter: str = "data", **options: Any) -> ScriptScorer:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return script(folder, f"{AZURE}def init(): ...\ndef run({parameter}):\n{lines}", **options)


def value(response: Response, status: int = 200) -> Any:
    """What a JSON response holds."""
    assert response.status == status, response
    assert ("Content-Type", "application/json") in response.headers
    return json.loads(response.body)


def as_json(content: Any, **more: Any) -> Request:
    return Request(json.dumps(content).encode(), headers={"Content-Type": "application/json"}, **more)


def test_models_other_than_scripts_leave_requests_to_the_endpoint() -> None:
    assert Scorer().respond(Request()) is None


# ---------------------------------------------------------------------------------------- whole requests


def test_a_whole_request_reaches_the_script(tmp_path: Path) -> None:
    found = raw(
        tmp_path,
        "return AMLResponse({\n"
        "    'method': request.method, 'path': request.path, 'full': request.full_path, 'json': request.is_json,\n"
        "    'body': request.get_data(False).decode(), 'length': request.content_length,\n"
        "    'key': request.headers['x-api-key'], 'other': request.headers.get('X-Other', 'none'),\n"
        "    'first': request.args['tag'], 'all': request.args.getlist('tag'), 'empty': request.args.get('none'),\n"
        "    'top': request.args.get('top', type=int), 'bad': request.args.get('tag', 7, type=int),\n"
        "}, 200, json_str=True)",
    )
    request = Request(
        b"{}",
        method="PUT",
        path="/api/v1/service/x/score",
        query="tag=a%20b&tag=c&top=3",
        headers={"X-API-Key": "k", "content-type": "application/json; charset=utf-8"},
    )
    assert value(found.respond(request)) == {
        "method": "PUT",
        "path": "/api/v1/service/x/score",
        "full": "/api/v1/service/x/score?tag=a%20b&tag=c&top=3",
        "json": True,
        "body": "{}",
        "length": 2,
        "key": "k",
        "other": "none",
        "first": "a b",
        "all": ["a b", "c"],
        "empty": None,
        "top": 3,
        "bad": 7,
    }


def test_status_headers_and_body_of_an_answer_survive(tmp_path: Path) -> None:
    found = raw(
        tmp_path,
        "body = request.get_data()\n"
        "if request.method != 'POST': return AMLResponse('only POST is understood', 405)\n"
        "if not body: return AMLResponse('the body is empty', 400, {'X-Reason': 'empty'})\n"
        "answer = AMLResponse(bytes(reversed(body)), 201)\n"
        "answer.headers['content-type'] = 'image/jpeg'\n"
        "answer.headers['Access-Control-Allow-Origin'] = '*'\n"
        "return answer",
    )
    assert found.respond(Request(method="GET")) == Response(
        405, b"only POST is understood", [("Content-Type", "text/plain; charset=utf-8")]
    )
    empty = found.respond(Request())
    assert (empty.status, empty.body) == (400, b"the body is empty")
    assert dict(empty.headers)["X-Reason"] == "empty"
    assert found.respond(Request(b"\xff\xd8")) == Response(
        201, b"\xd8\xff", [("content-type", "image/jpeg"), ("Access-Control-Allow-Origin", "*")]
    )


def test_a_file_posted_as_a_form_is_found_under_its_name(tmp_path: Path) -> None:
    found = raw(
        tmp_path,
        "upload = request.files['image']\n"
        "return {'name': upload.filename, 'type': upload.content_type, 'size': len(upload.read()),\n"
        "        'files': sorted(request.files), 'form': dict(request.form), 'tags': request.form.getlist('tag')}",
    )
    picture = b"\xff\xd8\r\n--not-it\r\n\r\n\x00"
    body = (
        b'--XYZ\r\nContent-Disposition: form-data; name="tag"\r\n\r\na\r\n'
        b'--XYZ\r\nContent-Disposition: form-data; name="tag"\r\n\r\n\xc3\xa9\r\n'
        b'--XYZ\r\nContent-Disposition: form-data; name="image"; filename="caf\xc3\xa9.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + picture + b"\r\n--XYZ--\r\n"
    )
    answer = found.respond(Request(body, headers={"Content-Type": 'multipart/form-data; boundary="XYZ"'}))
    assert value(answer) == {
        "name": "café.jpg",
        "type": "image/jpeg",
        "size": len(picture),
        "files": ["image"],
        "form": {"tag": "a"},
        "tags": ["a", "é"],
    }
    form = forms.parse(body, "multipart/form-data; boundary=XYZ")
    assert form is not None
    assert [each.content for _, each in form.files] == [picture]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=X"),
        (b"--X", "multipart/form-data; boundary=X"),
        (b"--X\r\nno header\r\n", "multipart/form-data; boundary=X"),
        (b"--X\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--X--", "multipart/form-data; boundary=X"),
        (
            b"--X--\r\nContent-Disposition: form-data; name=a\r\n\r\nlate\r\n--X",
            "multipart/form-data; boundary=X",
        ),
    ],
)
def test_damaged_forms_are_empty(body: bytes, kind: str) -> None:
    assert forms.parse(body, kind) == forms.Form()


def test_bodies_that_are_no_forms() -> None:
    assert forms.parse(b"a=1", None) is None
    assert forms.parse(b"--X", "multipart/form-data") is None
    assert forms.parse(b"a=1&a=%C3%A9&b", "application/x-www-form-urlencoded") == forms.Form(
        [("a", "1"), ("a", "é"), ("b", "")]
    )
    request = AMLRequest(b"a=1", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (request.form["a"], dict(request.files)) == ("1", {})


def test_headers_have_no_case() -> None:
    headers = Headers({"X-One": "1"})
    headers["x-one"] = "2"
    headers.add("X-ONE", "3")
    headers.add("Y", "4")
    assert headers == {"X-ONE": "2, 3", "Y": "4"}
    assert headers.get("x-ONE") == "2, 3"
    assert "y" in headers
    del headers["Y"]
    assert "Y" not in headers
    assert repr(headers) == "{'X-ONE': '2, 3'}"


# -------------------------------------------------------------------------------------------- other forms


def test_scripts_of_json_are_given_its_text(tmp_path: Path) -> None:
    found = plain(tmp_path, "import json\nassert type(data) is str\nreturn {'sum': sum(json.loads(data)['data'])}")
    assert value(found.respond(as_json({"data": [1, 2]}))) == {"sum": 3}
    assert value(found.respond(Request(b"\xff\xfe")), 400) == {
        "message": "the body should be text (JSON), and is not UTF-8 (byte 0)"
    }
    assert value(found.respond(Request(method="GET", query="data=[1,2,3]"))) == {"sum": 6}
    assert value(found.respond(Request(b"{}", method="DELETE")), 405) == {
        "message": "the method DELETE is not supported; use POST"
    }


def test_scripts_that_declare_a_schema_are_given_its_fields(tmp_path: Path) -> None:
    text = """
def input_schema(name, *more):  # as in the package inference-schema: it wraps run()
    import functools
    def wrap(run):
        @functools.wraps(run)
        def wrapped(*args, **fields):
            assert not args
            return run(**fields)
        return wrapped
    return wrap
def init(): ...
@input_schema("inputs", None)
@input_schema("method", None)
def run(inputs, method="plain"):
    return {"inputs": inputs, "method": method}
"""
    found = script(tmp_path, text)
    assert form_of(found.script) == "json"
    assert value(found.respond(as_json({"inputs": [[1.5]], "method": "fast"}))) == {"inputs": [[1.5]], "method": "fast"}
    assert value(found.respond(Request(method="GET", query="inputs=[1]"))) == {"inputs": [1], "method": "plain"}
    assert "JSON object" in value(found.respond(as_json([1])), 400)["message"]
    assert "not JSON" in value(found.respond(Request(b"{")), 400)["message"]
    assert found.score(['{"inputs": 1}']) == [{"inputs": 1, "method": "plain"}]


def test_headers_are_given_to_scripts_that_ask_for_them(tmp_path: Path) -> None:
    found = plain(tmp_path, "return request_headers.get('X-Id', 'none')", "data, request_headers")
    assert value(found.respond(Request(b"1", headers={"X-Id": "7"}))) == "7"
    assert found.score(["1"]) == [{"prediction": "none"}]


def test_scripts_of_bytes_and_of_files_are_given_the_body(tmp_path: Path) -> None:
    found = plain(tmp_path, "return {'size': len(image)}", "image")
    assert value(found.respond(Request(b"\xff\xd8"))) == {"size": 2}
    assert found.respond(Request(method="GET")).status == 405
    (tmp_path / "files").mkdir()
    body = "from pathlib import Path\nreturn [[path, Path(path).read_text()] for path in mini_batch]"
    found = plain(tmp_path / "files", body, "mini_batch")
    path, content = value(found.respond(Request(b"abc", headers={"content-type": "image/png"})))
    assert (Path(path).suffix, content) == (".png", "abc")
    assert not Path(path).exists()
    (tmp_path / "none").mkdir()
    found = plain(tmp_path / "none", "return []", "mini_batch")
    answer = value(found.respond(Request(b"abc")), 500)
    assert "run() returned 0 results for a mini-batch of 1 file" in answer["message"]


ROWS = [{"a": 1.5, "b": "x"}, {"a": None, "b": "y"}]


@pytest.mark.parametrize(
    "body",
    [
        ROWS,
        {"data": ROWS},
        {"inputs": ROWS},
        {"dataframe_records": ROWS},
        {"a": [1.5, None], "b": ["x", "y"]},
        {"input_data": {"a": [1.5, None], "b": ["x", "y"]}},
        {"columns": ["a", "b"], "data": [[1.5, "x"], [None, "y"]]},
        {"dataframe_split": {"columns": ["a", "b"], "index": [0, 1], "data": [[1.5, "x"], [None, "y"]]}},
        {"data": [[1.5, "x"], [None, "y"]]},
        b"a,b\n1.5,x\n,y\n",
    ],
)
def test_scripts_of_frames_are_given_the_rows(tmp_path: Path, body: Any) -> None:
    found = plain(
        tmp_path, "assert str(df['a'].dtype) == 'float64'\nreturn df.assign(c=df['a'] * 2)", "df", features=["a", "b"]
    )
    request = Request(body, headers={"Content-Type": "text/csv"}) if isinstance(body, bytes) else as_json(body)
    assert value(found.respond(request)) == [{"a": 1.5, "b": "x", "c": 3.0}, {"a": None, "b": "y", "c": None}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"7", "the body should hold rows"),
        (b"{", "the body is not JSON"),
        (b'[{"b": 1}]', "the body lacks the columns a"),
        (b"[[1, 2]]", "lists of values beside the names of their columns"),
        (b'{"a": [1], "b": [1, 2]}', "the body holds no table"),
        (b'{"a": [1, "x"]}', "the body holds no table"),
    ],
)
def test_bodies_without_rows_are_refused(tmp_path: Path, body: bytes, message: str) -> None:
    found = plain(tmp_path, "return df['a']", "df", features=["a"])
    assert message in value(found.respond(Request(body)), 400)["message"]


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 2.5, None]", [1, 2.5, None]),
        ("'{\"a\": 1}'", '{"a": 1}'),  # text is JSON's text, as by Azure ML: its clients parse it again
        ("None", None),
        ("{'a': numpy.float32(0.5), 'b': numpy.arange(3)}", {"a": 0.5, "b": [0, 1, 2]}),
        ("[float('nan'), {'x': float('inf')}]", [None, {"x": None}]),
        ("pandas.DataFrame({'a': [1, 2]})", [{"a": 1}, {"a": 2}]),
        ("pandas.Series([1, 2])", [1, 2]),
        ("pyarrow.table({'a': [1]})", [{"a": 1}]),
        ("__import__('datetime').date(2026, 1, 2)", "2026-01-02"),
    ],
)
def test_other_answers_become_json(tmp_path: Path, answer: str, expected: Any) -> None:
    assert value(plain(tmp_path, f"import numpy, pandas, pyarrow\nreturn {answer}").respond(Request(b"1"))) == expected


def test_bytes_stay_bytes(tmp_path: Path) -> None:
    found = plain(tmp_path, "return b'\\xff'")
    assert found.respond(Request(b"1")) == Response(200, b"\xff", [("Content-Type", "application/octet-stream")])


def test_what_json_cannot_hold_is_said(tmp_path: Path) -> None:
    answer = value(plain(tmp_path, "return {'a': object()}").respond(Request(b"1")), 500)
    assert answer == {"message": "run() returned a value of type object, which cannot be written as JSON"}


SECRET = "Server=db;Password=hunter2"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"x = 1\nraise ValueError('{SECRET}')", "ValueError in run() (score.py, line 5)"),
        (f"import sys\nsys.exit('{SECRET}')", "SystemExit in run() (score.py, line 5)"),
        (f"return KeyError('{SECRET}')", "KeyError in run() (score.py)"),
        (f"import json\njson.loads('{SECRET}')", "JSONDecodeError in run() (score.py, line 5)"),
        (f"from tally import ItemError\nraise ItemError('{SECRET}')", "ItemError in run() (score.py, line 5)"),
        (f"def inner():\n    raise OSError('{SECRET}')\ninner()", "OSError in run() (score.py, line 5)"),
    ],
)
def test_a_failure_names_the_line_and_shows_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str, message: str
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = plain(tmp_path, body).respond(Request(b"1"))
    assert value(answer, 500) == {"message": message}
    assert b"hunter2" not in answer.body + repr(answer.headers).encode()
    assert ("x-ms-run-function-failed", "true") in answer.headers
    assert "hunter2" in caplog.text  # whoever runs the endpoint learns it all
    assert f"{tmp_path}/score.py" in caplog.text


def test_an_answer_after_a_failure_is_as_good_as_before(tmp_path: Path) -> None:
    found = plain(tmp_path, "return 10 / int(data)")
    assert [found.respond(Request(body)).status for body in (b"1", b"0", b"2")] == [200, 500, 200]
    assert value(found.respond(Request(b"5"))) == 2.0


def test_requests_are_answered_in_the_scripts_surroundings(tmp_path: Path) -> None:
    text = "import os, sys\ndef init(): ...\ndef run(data): return [sys.argv[1:], os.environ['AZUREML_MODEL_DIR']]"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    scorers = {name: script(tmp_path / name, text, arguments=[name]) for name in ("a", "b")}
    for name in ("a", "b", "a"):
        assert value(scorers[name].respond(Request(b"1"))) == [[name], str(tmp_path / name)]


def test_aml_responses_as_scripts_make_them() -> None:
    assert AMLResponse("x", 200).headers == {"Content-Type": "text/plain; charset=utf-8"}
    assert AMLResponse(b"x", 200).headers == {"Content-Type": "application/octet-stream"}
    assert AMLResponse([1], 200).headers == {"Content-Type": "application/json"}
    assert AMLResponse("x", 200, json_str=True).get_data(as_text=True) == '"x"'
    assert AMLResponse(None, 204).get_data() == b"{}"
