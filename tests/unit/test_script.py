"""Scripts with init() and run(): forms, results, and what users read when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, SpecError, TallyError
from tally.scorers.base import Item
from tally.scorers.scripts.answers import result_of
from tally.scorers.scripts.azureml import AMLRequest, AMLResponse, Model
from tally.scorers.scripts.script import ScriptScorer, form_of

pytestmark = pytest.mark.usefixtures("restored")


def write(folder: Path, text: str, name: str = "score.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def scorer(folder: Path, text: str, **options: Any) -> ScriptScorer:
    found = ScriptScorer(write(folder, text), **options)
    found.load(folder, "cpu")
    return found


def run(found: ScriptScorer, *values: Any) -> list[Any]:
    items = [Item(f"item{number}", value) for number, value in enumerate(values)]
    return list(found.score([found.prepare(item) for item in items]))


@pytest.mark.parametrize(
    ("run", "form"),
    [
        ("def run(mini_batch): ...", "mini_batch"),
        ("def run(files): ...", "mini_batch"),
        ("@rawhttp\ndef run(request): ...", "raw"),
        ("@aml_request.rawhttp\ndef run(mini_batch): ...", "raw"),
        ("def run(image): ...", "bytes"),
        ("def run(raw_data): ...", "json"),
        ("def run(data): ...", "json"),
        ("def run(df): ...", "dataframe"),
        ("def run(mini_batch: pd.DataFrame): ...", "dataframe"),
        ("def run(data: 'pandas.DataFrame') -> list: ...", "dataframe"),
        ("@rawhttp\ndef run(frame): ...", "raw"),
    ],
)
def test_form_is_told_from_decorator_and_parameter(tmp_path: Path, run: str, form: str) -> None:
    assert form_of(write(tmp_path, f"raise RuntimeError('not to be run')\ndef init(): ...\n{run}")) == form


def test_form_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"run\(x\) takes cannot be told.*\n  Say it with --set form="):
        form_of(write(tmp_path, "def init(): ...\ndef run(x): ..."))
    with pytest.raises(SpecError, match=r"defines no init\(\)"):
        form_of(write(tmp_path, "def run(data): ..."))
    with pytest.raises(ModelLoadError, match="line 2: "):
        form_of(write(tmp_path, "def init(): ...\ndef run(data:"))


def test_mini_batch_of_paths(tmp_path: Path) -> None:
    found = scorer(
        tmp_path,
        "import os\n"
        "def init():\n    global calls; calls = 0\n"
        "def run(mini_batch):\n"
        "    assert all(type(each) is str for each in mini_batch)\n"
        "    return [os.path.basename(each) for each in mini_batch]\n",
    )
    assert found.input == "path"
    assert run(found, Path("/a/b.jpg"), Path("/a/c.jpg")) == [{"prediction": "b.jpg"}, {"prediction": "c.jpg"}]


@pytest.mark.parametrize(
    "returned",
    [
        "[{'n': 0}, {'n': 1}]",
        "({'n': 0}, '{\"n\": 1}')",
        "pandas.DataFrame({'n': [0, 1]})",
        "pyarrow.table({'n': [0, 1]})",
        "[{'n': numpy.int64(0)}, {'n': numpy.uint8(1)}]",
    ],
)
def test_mini_batch_answers(tmp_path: Path, returned: str) -> None:
    found = scorer(
        tmp_path, f"import numpy, pandas, pyarrow\ndef init(): ...\ndef run(mini_batch):\n    return {returned}"
    )
    results = run(found, "a", "b")
    assert results == [{"n": 0}, {"n": 1}]
    assert all(type(each["n"]) is int for each in results)


def test_mini_batch_array(tmp_path: Path) -> None:
    found = scorer(tmp_path, "import numpy as np\ndef init(): ...\ndef run(files): return np.arange(4.0).reshape(2, 2)")
    assert run(found, "a", "b") == [{"prediction": [0.0, 1.0]}, {"prediction": [2.0, 3.0]}]


def test_wrong_number_of_results_names_both(tmp_path: Path) -> None:
    found = scorer(tmp_path, "def init(): ...\ndef run(mini_batch): return mini_batch[1:]")
    with pytest.raises(TallyError, match=r"run\(\) returned 2 results for a mini-batch of 3 files"):
        run(found, "a", "b", "c")
    found = scorer(tmp_path, "def init(): ...\ndef run(mini_batch):\n    pass", form="mini_batch")
    with pytest.raises(TallyError, match=r"run\(\) returned nothing for a mini-batch of 1 file\b"):
        run(found, "a")


def test_raw_requests_one_at_a_time(tmp_path: Path) -> None:
    found = scorer(
        tmp_path,
        "from azureml.contrib.services.aml_request import AMLRequest, rawhttp\n"
        "from azureml.contrib.services.aml_response import AMLResponse\n"
        "def init(): ...\n"
        "@rawhttp\n"
        "def run(request):\n"
        "    if request.method != 'POST': return AMLResponse('bad request', 500)\n"
        "    body = request.get_data(False)\n"
        "    if body == b'bad': return AMLResponse('no such thing', 422)\n"
        "    if body == b'worse': raise KeyError('worse')\n"
        "    if body == b'exit': raise SystemExit(3)\n"
        "    if body == b'form': return request.files['image'].read()\n"
        "    return AMLResponse({'size': len(body)}, 200, json_str=True)\n",
    )
    assert found.input == "bytes"
    fine, bad, worse, left, form = run(found, b"abc", b"bad", b"worse", b"exit", b"form")
    assert fine == {"size": 3}
    assert isinstance(bad, ItemError)
    assert bad.message == "the script answered 422: no such thing"
    assert isinstance(worse, KeyError)
    assert isinstance(left, ItemError)
    assert "sys.exit(3)" in left.message
    assert form == {"prediction": "form"}


def test_json_text_and_bytes(tmp_path: Path) -> None:
    text = "import json\ndef init(): ...\ndef run(data): return json.dumps(sum(json.loads(data)['data']))"
    found = scorer(tmp_path, text)
    assert run(found, b'{"data": [1, 2]}') == [{"prediction": "3"}]
    with pytest.raises(ItemError, match=r"not UTF-8 \(byte 0\)") as caught:
        found.prepare(Item("photo.jpg", b"\xff\xd8"))
    assert caught.value.stage == "decode"
    found = scorer(tmp_path, "def init(): ...\ndef run(data): return {'n': len(data)}", form="bytes")
    assert run(found, b"\xff\xd8") == [{"n": 2}]


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ({"a": np.float32(1)}, {"a": 1.0}),
        ([{"a": 1}, {"a": np.array([1, 2])}], [{"a": 1}, {"a": [1, 2]}]),
        ([], []),
        ('[{"a": 1}]', [{"a": 1}]),
        ('"cat"', {"prediction": "cat"}),
        ("7", {"prediction": "7"}),
        ("{broken", {"prediction": "{broken"}),
        (b"dog", {"prediction": "dog"}),
        (b"\xff", {"prediction": b"\xff"}),
        ([0.5, 0.5], {"prediction": [0.5, 0.5]}),
        (np.array(3), {"prediction": 3}),
        (np.bool_(True), {"prediction": True}),
        (AMLResponse("ok", 200), {"prediction": "ok"}),
        (Path("/a"), {"prediction": "/a"}),
    ],
)
def test_results(answer: Any, result: Any) -> None:
    assert result_of(answer) == result


def test_no_answer_is_an_error() -> None:
    result = result_of(None)
    assert isinstance(result, ItemError)
    assert result.message == "run() returned nothing for this item"


def test_init_runs_once_with_its_surroundings(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (tmp_path / "beside_the_script.py").write_text("VALUE = 7")
    path = write(
        tmp_path,
        "import os, sys, argparse, beside_the_script\n"
        "calls = 0\n"
        "def init():\n"
        "    global calls, seen; calls += 1\n"
        "    parser = argparse.ArgumentParser(); parser.add_argument('--top', type=int)\n"
        "    seen = os.environ['AZUREML_MODEL_DIR'], parser.parse_args().top, beside_the_script.VALUE\n"
        "def run(mini_batch): return [list(seen) + [calls]] * len(mini_batch)\n"
        "def shutdown(): open(os.path.join(seen[0], 'closed'), 'w').close()\n",
    )
    before = list(sys.argv)
    found = ScriptScorer(path, arguments=["--top", "5"], batch_size=2)
    found.load(weights, "cpu")
    assert sys.argv == before
    assert found.batch_size == 2
    assert run(found, "a", "b") == [{"prediction": [str(weights), 5, 7, 1]}] * 2
    assert run(found, "c") == [{"prediction": [str(weights), 5, 7, 1]}]
    assert found.describe() == "score.py: run() takes lists of file paths"
    found.close()
    assert (weights / "closed").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys\ndef init(): sys.exit('no GPU')", r"init\(\) failed: SystemExit: no GPU \(score.py, line 2\)"),
        ("def init():\n    open('/nowhere/w.onnx')", r"init\(\) failed: FileNotFoundError.*line 2\)\n.*--artifacts"),
        ("import not_there_at_all\ndef init(): ...", r"line 1\)\n  Install 'not_there_at_all' into"),
        ("run = None\ndef init(): ...\nrun = 3", r"defines no run\(\)"),
    ],
)
def test_failing_scripts_say_where(tmp_path: Path, body: str, message: str) -> None:
    text = body if "run" in body else f"{body}\ndef run(mini_batch): ..."
    with pytest.raises(ModelLoadError, match=message):
        scorer(tmp_path, text, form="mini_batch")


def test_requests_as_scripts_use_them(tmp_path: Path) -> None:
    request = AMLRequest(b'{"a": 1}', headers={"content-type": "application/json"}, filename="x.json")
    assert request.get_data(False) == b'{"a": 1}'
    assert request.get_data(as_text=True) == '{"a": 1}'
    assert request.json == request.get_json() == {"a": 1}
    assert request.content_type == "application/json"
    assert request.content_length == 8
    upload = request.files["anything"]
    upload.save(tmp_path / "saved")
    assert (upload.filename, (tmp_path / "saved").read_bytes()) == ("x.json", b'{"a": 1}')
    assert AMLRequest(b"no json").get_json(silent=True) is None
    assert json.loads(AMLResponse({"a": 1}, 200).get_data()) == {"a": 1}


def test_model_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path))
    for version in ("2", "10"):
        (tmp_path / "yolo" / version).mkdir(parents=True)
    (tmp_path / "ssd.onnx").write_bytes(b"x")
    assert Model.get_model_path("yolo") == str(tmp_path / "yolo" / "10")
    assert Model.get_model_path("yolo", version=2) == str(tmp_path / "yolo" / "2")
    assert Model.get_model_path("ssd") == Model.get_model_path("ssd.onnx") == str(tmp_path / "ssd.onnx")
    with pytest.raises(ModelNotFoundError, match=r"asks for the model 'frcnn'.*holds only ssd.onnx, yolo"):
        Model.get_model_path("frcnn")
    with pytest.raises(ModelNotFoundError, match="no version 3, only 2, 10"):
        Model.get_model_path("yolo", version=3)


# ---------------------------------------------------------------------------------------------- DataFrames

READINGS = pa.table({"Device": ["p1", "p2", None], "Value": [1.5, 2.5, 3.5], "Count": [1, 2, 3]})


def frames(folder: Path, body: str, **options: Any) -> ScriptScorer:
    return scorer(folder, f"def init(): ...\ndef run(df):\n    {body}\n", **options)


def test_rows_of_a_table_come_as_a_dataframe(tmp_path: Path) -> None:
    found = frames(
        tmp_path,
        "assert type(df).__name__ == 'DataFrame' and list(df.index) == [0, 1, 2]\n"
        "    assert df['Count'].dtype == 'int64' and df['Device'].tolist() == ['p1', 'p2', None]\n"
        "    return df['Value'] * df['Count']",
    )
    assert found.input == "table"
    assert found.features is None
    assert found.describe() == "score.py: run() takes DataFrames"
    result = found.score(READINGS)
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == {"prediction": [1.5, 5.0, 10.5]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return df[['Value']].assign(high=df['Value'] > 2)", {"Value": [1.5, 2.5, 3.5], "high": [False, True, True]}),
        ("return (df['Value'] > 2).rename('anomaly')", {"anomaly": [False, True, True]}),
        ("return df['Value'].to_numpy()", {"prediction": [1.5, 2.5, 3.5]}),
        ("return df[['Value', 'Count']].to_numpy()", {"prediction": [[1.5, 1.0], [2.5, 2.0], [3.5, 3.0]]}),
        ("return df[df['Value'] > 0].set_index('Count')[['Value']]", {"Value": [1.5, 2.5, 3.5]}),
        ("return {'twice': (df['Value'] * 2).tolist()}", {"twice": [3.0, 5.0, 7.0]}),
    ],
)
def test_answers_that_are_columns_stay_columns(tmp_path: Path, body: str, expected: dict[str, Any]) -> None:
    result = frames(tmp_path, body).score(READINGS)
    assert isinstance(result, pa.Table)
    assert result.to_pydict() == expected


def test_a_list_answers_row_by_row(tmp_path: Path) -> None:
    found = frames(tmp_path, "return [{'label': 'a'}, ValueError('no reading'), 3]")
    first, second, third = found.score(READINGS)
    assert (first, third) == ({"label": "a"}, {"prediction": 3})
    assert isinstance(second, ValueError)
    (tmp_path / "other").mkdir()  # a file that changes within a second may be taken for what it was
    mixed = frames(tmp_path / "other", "return df.assign(answer=[1, 'two', 3.0])[['answer']]")
    assert [dict(each) for each in mixed.score(READINGS)] == [{"answer": 1}, {"answer": "two"}, {"answer": 3.0}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return df['Value'][:2]", "returned 2 results for a DataFrame of 3 rows"),
        ("return [1]", "returned 1 results for a DataFrame of 3 rows"),
        ("return {'a': [1, 2]}", "returned a value of type dict for a DataFrame of 3 rows"),
        ("return {'a': 'abc'}", "returned a value of type dict for a DataFrame of 3 rows"),
        ("return None", "returned nothing for a DataFrame of 3 rows"),
    ],
)
def test_answers_of_another_length_are_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(TallyError, match=f"{message}\n.*one result per row.*(?i:an) exception object marks a row"):
        frames(tmp_path, body).score(READINGS)


def test_a_script_may_ask_for_columns(tmp_path: Path) -> None:
    found = frames(tmp_path, "return df.sum(axis=1)", features=["Value", "Count"], batch_size=100)
    assert found.features == ["Value", "Count"]
    assert found.batch_size == 100
    assert found.score(READINGS).to_pydict() == {"prediction": [2.5, 4.5, 6.5]}
    with pytest.raises(SpecError, match="takes a file's bytes, not rows of a table"):
        ScriptScorer(write(tmp_path, "def init(): ...\ndef run(image): ..."), features=["Value"])
