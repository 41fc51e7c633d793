"""Runs Argo's published examples side by side in one process; what is left to chance is always the same.

``sleep`` is a hundredth of itself, except where a file is about time limits. Of choices, an exit code is the worst one
first, and then the best; a coin shows heads. The web is what is written here, and one service stands for all with S3.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tally.errors import TallyError
from tally.pipelines import workflow
from tally.pipelines.driver import Driver
from tally.pipelines.facade import Pipelines, open_pipelines
from tally.pipelines.options import Options
from tally.pipelines.steps import s3 as steps_s3
from tally.pipelines.store import Node
from tally.storage import buckets

AT_ONCE = 10
SLEEP = """#!/bin/sh
case "$1" in 15s|30s|1d) exec {sleep} "$1";; esac
n=${{1%s}}
exec {sleep} "$((n / 100)).$(printf %02d $((n % 100)))"
"""
CHANCE = """
import hashlib, os, random, re, sys, time
_sleep, time.sleep = time.sleep, lambda seconds: _sleep(seconds / 100)
random.randint = lambda least, most: least

def choice(values):
    if list(values) == [0, 0, 1]:  # of steps side by side, which is first would be left to chance
        return 1
    source = open(sys.orig_argv[-1]).read() if os.path.exists(sys.orig_argv[-1]) else sys.orig_argv[-1]
    run = os.environ["TALLY_PIPELINE_STEP"].split("/")[0]
    key = hashlib.sha256((run + re.sub("[0-9]", "", source)).encode()).hexdigest()
    try:
        os.close(os.open(os.path.join({folder!r}, key), os.O_CREAT | os.O_EXCL))
        return values[-1]
    except FileExistsError:
        return values[0]

random.choice = choice
"""
KUBECTL = "#!/bin/sh\necho Client Version: v1.8.0\n"


@dataclass
class Outcome:
    """What came of a file: its run's state, its nodes' phases, and what its steps printed; or why it was refused."""

    state: str
    refusal: str = ""
    error: str | None = None
    phases: dict[str, str] = field(default_factory=dict)
    printed: dict[str, list[str]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def made_sure(folder: Path, s3: str) -> Iterator[None]:
    """While this lasts, steps meet neither chance nor the web, and sleep little. s3: stands for every service."""
    (folder / "bin").mkdir(parents=True)
    (folder / "python").mkdir()
    (folder / "choices").mkdir()
    sleep = folder / "bin" / "sleep"
    sleep.write_text(SLEEP.format(sleep="/bin/sleep"))
    sleep.chmod(sleep.stat().st_mode | stat.S_IXUSR)
    (folder / "python" / "sitecustomize.py").write_text(CHANCE.replace("{folder!r}", repr(str(folder / "choices"))))
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(folder / "python"))
        patch.setenv("RANDOM", "2")
        patch.setenv("S3_ENDPOINT", s3.removeprefix("http://"))
        patch.setenv("S3_USE_HTTPS", "false")
        patch.setattr(steps_s3, "AMAZON", "")
        patch.setattr(steps_s3, "s3_endpoint", lambda _, secure: buckets.s3_endpoint(s3, secure=secure))
        client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="testing",
                              aws_secret_access_key="testing")  # fmt: skip
        for bucket in ("my-bucket-name", "my-bucket"):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket="my-bucket-name", Key="path/in/bucket", Body=b"hello")
        patch.setattr(httpx2, "request", _request)
        patch.setattr(httpx2, "stream", _stream)
        yield


def _answer(request: httpx2.Request) -> httpx2.Response:
    if "thisisnotahash" in str(request.url):
        return httpx2.Response(404, text="404: Not Found")
    return httpx2.Response(200, text=KUBECTL if "kubectl" in str(request.url) else '{"swagger": "2.0"}')


def _request(method: str, url: str, **given: Any) -> httpx2.Response:
    given.pop("verify", None)
    with httpx2.Client(transport=httpx2.MockTransport(_answer)) as client:
        return client.request(method, url, **given)


@contextmanager
def _stream(method: str, url: str, **given: Any) -> Iterator[httpx2.Response]:
    with (
        httpx2.Client(transport=httpx2.MockTransport(_answer)) as client,
        client.stream(method, url, **given) as told,
    ):
        yield told


def run_all(files: Mapping[Path, Mapping[str, Any]], folder: Path, s3: str) -> dict[str, Outcome]:
    """Run the files, and what came of each by its name. Their settings: options, parameters, supplied, workflow."""
    pipelines = open_pipelines()
    with made_sure(folder, s3):
        return asyncio.run(_run_all(pipelines, files, folder))


async def _run_all(pipelines: Pipelines, files: Mapping[Path, Mapping[str, Any]], folder: Path) -> dict[str, Outcome]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(path: Path, settings: Mapping[str, Any]) -> Outcome:
        async with places:
            begun = time.monotonic()
            outcome = await _run(pipelines, path, settings, folder)
            outcome.seconds = time.monotonic() - begun
            return outcome

    # What takes long first.
    order = sorted(files, key=lambda path: not files[path].get("long"))
    found = await asyncio.gather(*(one(path, files[path]) for path in order))
    return {path.name: outcome for path, outcome in zip(order, found, strict=True)}


async def _run(pipelines: Pipelines, path: Path, settings: Mapping[str, Any], folder: Path) -> Outcome:
    options = Options(shares=(str(folder),), parallel=8, **settings.get("options", {}))
    try:
        lease, _ = pipelines.start(path, settings.get("parameters", {}), options, name=settings.get("workflow"))
    except TallyError as error:
        return Outcome("refused", refusal=error.message)
    record = pipelines.store.get(lease.id)
    while True:
        found = workflow.from_json(record.spec["workflow"])
        state = await Driver(pipelines.store, lease, record, found, options).drive()
        if state != "waiting":
            break
        pipelines.supply(record.id, settings.get("supplied", {}))
        lease = pipelines.resume(record.id)
    record = pipelines.store.get(record.id)
    nodes = pipelines.store.nodes(record.id)
    outcome = Outcome(state, error=record.error)
    top = next(each for each in nodes if not each.parent)
    outcome.outputs = top.outputs.get("parameters") or {}

    def name(node: Node) -> str:
        return node.display.replace(record.name, "WORKFLOW")

    for node in nodes:
        if node.kind != "StepGroup":
            outcome.phases.setdefault(name(node), node.phase)
    for node, paths in pipelines.logs(record.id):
        text = "".join(each.read_text("utf-8", "replace") for each in paths).replace(record.name, "WORKFLOW")
        outcome.printed.setdefault(name(node), []).append(text.strip())
    pipelines.delete(record.id)
    return outcome
