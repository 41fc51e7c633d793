"""Every form that items come in, read from buckets and from the web: what comes out is what comes out of a folder."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Ran
from tests.forms import FORMS, SCRIPT, Form
from tests.websites import website

from tally.jobs.assemble import assemble, describe_model, make_scorer
from tally.jobs.spec import make
from tally.sources.base import ChunkLimit, Timings
from tally.storage import open_store

Put = Callable[[Mapping[str, bytes]], str]
OF_FOLDERS = ("numbered", "coco", "hive")
"""Forms of several files, which the web does not list."""


@pytest.fixture(params=["s3", "azure", "web"])
def put(request: pytest.FixtureRequest) -> Iterator[Put]:
    """Puts files where the place that it returns has them."""
    if request.param == "web":
        with website() as site:

            def serve(files: Mapping[str, bytes]) -> str:
                site.files |= {f"/in/{name}": content for name, content in files.items()}
                return f"{site.url}/in"

            yield serve
        return
    bucket = request.getfixturevalue(request.param)
    yield lambda files: written(f"{bucket}/in", files)


def written(place: str, files: Mapping[str, bytes]) -> str:
    store = open_store(place)
    for name, content in files.items():
        store.write(name, content)
    return place


def held(form: Form, place: str, work: Path) -> dict[str, Any]:
    """What a job at a place would score: of each key, the value and what is kept, as worker after worker has it."""
    (work / "held.py").write_text(SCRIPT)
    source, *_ = form.words(place)
    fields: dict[str, Any] = {name.replace("-", "_"): value for name, value in form.options.items()}
    fields |= {"source": source, "model": f"{work}/held.py:Held", "settings": {"input": form.input}}
    spec = make(**fields, out=str(work / "out"))
    model = describe_model(spec)
    ready, scorer = assemble(spec, model).source, make_scorer(spec, model)
    ready.prepare()
    found: dict[str, Any] = {}
    for chunk in ready.plan(None, 0, lambda: ChunkLimit(5 if form.count < 100 else 500, 1 << 40)):
        worker = pickle.loads(pickle.dumps(ready))
        for batch in worker.read(chunk, scorer, Timings()):
            assert not batch.dead, batch.dead
            keys, values, info = (_listed(each) for each in (batch.keys, batch.values, batch.info))
            for at, (key, value) in enumerate(zip(keys, values, strict=True)):
                kept = dict(info[at]) if info and "keep" in form.options else None
                assert key not in found
                found[key] = (value.tobytes() if isinstance(value, np.ndarray) else value, kept)
    return found


def _listed(values: Any) -> list[Any]:
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values or ())


@pytest.mark.parametrize("name", FORMS)
def test_what_is_read_is_what_a_folder_gives(
    put: Put, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    form = FORMS[name]
    if "web" in request.node.callspec.params.values() and name in OF_FOLDERS:
        pytest.skip("a web server lists no folders")
    files = form.files()
    (tmp_path / "far").mkdir()
    near = held(form, written(str(tmp_path / "in"), files), tmp_path)
    assert len(near) == form.count
    assert held(form, put(files), tmp_path / "far") == near


@pytest.mark.parametrize("name", ["parquet", "zip", "webp"])
def test_a_job_scores_what_is_in_a_container(azure: str, tmp_path: Path, cli: Callable[..., Ran], name: str) -> None:
    form = FORMS[name]
    files = form.files()
    near = held(form, written(str(tmp_path / "in"), files), tmp_path)
    out = tmp_path / "rows.jsonl"
    words = form.words(written(f"{azure}/in", files))
    ran = cli("score", *words, "--model", f"{tmp_path}/held.py:Held", "--out", out, "--workers", 1, "-q")
    assert ran.code == 0, ran.err
    found = {row["key"]: row["held"] for row in map(json.loads, out.read_text().splitlines())}
    assert found == {key: hashlib.sha256(value).hexdigest() for key, (value, _) in near.items()}
