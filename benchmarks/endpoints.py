"""Endpoints side by side: Tally beside LitServe, MLServer, BentoML, Ray Serve, and the least that batches over ASGI.

    python benchmarks/endpoints.py [--peers FOLDER] [--seconds 4] [--concurrency 1,16,64,256] [--only tally,asgi]

FOLDER has a virtual environment for each peer (``litserve``, ``mlserver``, ``bentoml``, ``ray``), made by
``python -m venv FOLDER/litserve && FOLDER/litserve/bin/pip install litserve onnxruntime pillow numpy`` and so on. What
is not there is left out. The command ``wrk`` sends the requests where it is installed, else ``tally load``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _endpoint_models import BATCH
from _machine import DATA, TALLY, free_port, introduce, scratch, settle, shapes_pictures

HERE = Path(__file__).resolve().parent
CAVEATS = """
All on one machine: the server, its replica and the generator share its cores. Every server has one process with the
model, and batches up to 16 items for up to 5 ms. The generator keeps so many connections busy, each with one request at
a time; its own limit, against a server that does nothing, is printed first.

Bodies go as they are to Tally, the bare ASGI server and Ray Serve. LitServe, MLServer and BentoML are given JSON with
base64, which is how they take bytes in a batch; decoding it is in their figures.

"paced" sleeps 5 ms for a batch and 1 ms for each item: with 16 in a batch, 762 requests a second are the most that can
be. "network" is a classifier of pictures in ONNX Runtime, one thread, with the same code in every server; its bare loop
scores the same bodies in batches of 16, with no server around.
"""
SCORER = """
import sys
import tally

sys.path.insert(0, {here!r})
from _endpoint_models import BATCH, model

class Model(tally.Scorer):
    input = "bytes"
    batch_size = BATCH

    def load(self, artifacts, device):
        self.run = model()

    def score(self, batch):
        return [{{"answer": each}} for each in self.run(batch)]
"""
PEERS = ("litserve", "mlserver", "bentoml", "ray")


class EndedError(Exception):
    """A contender does not answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with an environment for each peer")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--concurrency", default="1,16,64,256")
    parser.add_argument("--models", default="noop,paced,network")
    parser.add_argument("--only", help="contenders, e.g. tally,asgi")
    given = parser.parse_args()
    names = ["tally", "asgi", *(name for name in PEERS if given.peers and (given.peers / name / "bin").is_dir())]
    if given.only:
        names = [name for name in names if name in given.only.split(",")]
    levels = [int(each) for each in given.concurrency.split(",")]
    introduce("Endpoints", CAVEATS)
    with scratch() as folder:
        (folder / "scorer.py").write_text(SCORER.format(here=str(HERE)))
        small, picture = folder / "small.bin", folder / "picture.jpg"
        small.write_bytes(b"x" * 100)
        network = DATA / "models/classify/mobilenet_v2_fp32.onnx"
        photos = sorted((DATA / "images/imagenet").glob("*.JPEG")) or sorted((DATA / "images/imagenet").glob("*.jpg"))
        if network.is_file() and photos:
            near = min(photos, key=lambda each: abs(each.stat().st_size - 24_000))
            shutil.copyfile(near, picture)
        else:
            print("the network is left out: no test data here")
            shapes_pictures(folder / "shapes", 1)
            shutil.copyfile(next((folder / "shapes").iterdir()), picture)
        print(f"generator alone: {limit(folder, small, max(levels)):,.0f} requests/s\n")
        bodies = {"noop": small, "noop-24kb": picture, "paced": small, "network": picture}
        wanted = [
            name for model in given.models.split(",") for name in ([model, "noop-24kb"] if model == "noop" else [model])
        ]
        for model in wanted:
            if model == "network" and not network.is_file():
                continue
            environment = {"TALLY_BENCH_MODEL": model.partition("-")[0], "TALLY_BENCH_ONNX": str(network)}
            if model == "network":
                print(f"{model}: bare loop {bare(environment, picture):,.1f} items/s")
            for name in names:
                settle()
                try:
                    with serving(name, folder, environment, given.peers) as port:
                        for clients in levels:
                            line = load(folder, name, port, bodies[model], clients, given.seconds)
                            print(f"{model:10} {name:9} {clients:4} clients  {line}", flush=True)
                except EndedError as error:
                    print(f"{model:10} {name:9} {error}", flush=True)
            print()


def bare(environment: dict[str, str], body: Path) -> float:
    """Items a second of the function alone, in batches."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from _endpoint_models import BATCH, model\n"
        "run, body = model(), open(sys.argv[2], 'rb').read(); run([body] * BATCH); begin = time.monotonic(); n = 0\n"
        "while time.monotonic() - begin < 4: run([body] * BATCH); n += BATCH\n"
        "print(n / (time.monotonic() - begin))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(HERE), str(body)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(ran.stdout)


@contextmanager
def serving(name: str, folder: Path, environment: dict[str, str], peers: Path | None) -> Iterator[int]:
    """A contender that answers."""
    port = free_port()
    if name == "tally":
        model = f"model={folder}/scorer.py:Model"
        command = [*TALLY, "serve", model, "--port", str(port), "--max-batch", str(BATCH), "--max-delay", "5ms"]
    else:
        python = sys.executable if name == "asgi" or peers is None else str(peers / name / "bin" / "python")
        command = [python, str(HERE / "_endpoint_servers.py"), name, str(port)]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    try:
        body, headers, path = request(
            name, b"x" if environment["TALLY_BENCH_MODEL"] != "network" else (folder / "picture.jpg").read_bytes()
        )
        for _ in range(600):
            try:
                asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
                with urllib.request.urlopen(asked, timeout=10):
                    break
            except OSError:
                if process.poll() is not None:
                    raise EndedError(f"{name} has ended: {(folder / f'{name}.log').read_text()[-1000:]}") from None
                time.sleep(0.1)
        else:
            raise EndedError(f"{name} does not answer")
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def request(name: str, body: bytes) -> tuple[bytes, dict[str, str], str]:
    """A request as the contender takes it: body, headers, path."""
    text = base64.b64encode(body).decode()
    as_json = {"Content-Type": "application/json"}
    if name == "litserve":
        return json.dumps({"data": text}).encode(), as_json, "/score"
    if name == "bentoml":
        return json.dumps({"data": [text]}).encode(), as_json, "/score"
    if name == "mlserver":
        tensor = {"name": "data", "shape": [1], "datatype": "BYTES", "data": [text]}
        return json.dumps({"inputs": [tensor]}).encode(), as_json, "/v2/models/model/infer"
    return body, {"Content-Type": "application/octet-stream"}, "/score"


def load(folder: Path, name: str, port: int, body: Path, clients: int, seconds: float) -> str:
    """Requests a second and latencies, as a line."""
    content, headers, path = request(name, body.read_bytes())
    url = f"http://127.0.0.1:{port}{path}"
    if shutil.which("wrk") is None:
        from tally.serving import load as loads
        from tally.serving.requests import EndpointRequest

        report = loads.load(
            EndpointRequest(url, content, headers), concurrency=clients, seconds=seconds, own_limit=False
        )
        shown = "  ".join(f"p{s:g} {report.percentile(s / 100) * 1000:8.2f} ms" for s in (50, 99))
        return f"{report.rate:10,.1f}/s  {shown}  {sum(report.errors.values())} errors"
    (folder / "body").write_bytes(content)
    script = folder / "wrk.lua"
    lines = ['wrk.method = "POST"', f'local file = io.open("{folder / "body"}", "rb")', 'wrk.body = file:read("*all")']
    script.write_text("\n".join([*lines, *(f'wrk.headers["{key}"] = "{value}"' for key, value in headers.items())]))
    ran = subprocess.run(
        ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}", "--latency", "-s", str(script), url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", ran)[1])  # type: ignore[index]
    shown = "  ".join(f"p{share} {_milliseconds(ran, share):8.2f} ms" for share in (50, 99))
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", ran)
    broken = re.search(r"Socket errors: (.*)", ran)
    return (
        f"{rate:10,.1f}/s  {shown}" + (f"  {failed[1]} failed" if failed else "") + (f"  {broken[1]}" if broken else "")
    )


def _milliseconds(text: str, share: int) -> float:
    found = re.search(rf"\s{share}%\s+([\d.]+)(us|ms|s)", text)
    assert found is not None
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def limit(folder: Path, body: Path, clients: int) -> float:
    """What the generator reaches against a server that does nothing."""
    from multiprocessing import get_context

    from tally.serving.load import do_nothing

    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    process = get_context("fork").Process(target=do_nothing, args=(listener,), daemon=True)
    process.start()
    port = listener.getsockname()[1]
    listener.close()
    try:
        line = load(folder, "asgi", port, body, clients, 3.0)
    finally:
        process.kill()
    return float(line.split("/s")[0].replace(",", ""))


if __name__ == "__main__":
    main()
