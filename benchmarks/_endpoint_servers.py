"""The servers beside Tally in benchmarks/endpoints.py: ``python _endpoint_servers.py NAME PORT``, each in a Python of
its own that has it installed. Each takes the body as it is, where it can, and batches up to 16 for up to 5 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _endpoint_models import BATCH, model

DELAY = 0.005


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def asgi(port: int) -> None:
    """The least that batches: uvicorn, one queue, one thread."""
    import uvicorn

    predict = model()
    waiting: list[tuple[bytes, asyncio.Future[int]]] = []
    came = asyncio.Event()

    async def batches() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await came.wait()
            if len(waiting) < BATCH:
                await asyncio.sleep(0)
            batch = waiting[:BATCH]
            del waiting[:BATCH]
            if not waiting:
                came.clear()
            answers = await loop.run_in_executor(None, predict, [body for body, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    started: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if not started:
            started.append(asyncio.create_task(batches()))
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting.append((body, future))
        came.set()
        content = json.dumps({"answer": await future}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def litserve(port: int) -> None:
    import litserve as ls

    from _endpoint_litserve import Api

    api = Api(max_batch_size=BATCH, batch_timeout=DELAY, api_path="/score")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=port, num_api_servers=1, log_level="error", generate_client_file=False)


def mlserver(port: int) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "settings.json").write_text(
        json.dumps(
            {"http_port": port, "grpc_port": _free(), "metrics_port": _free(), "parallel_workers": 1, "debug": False}
        )
    )
    (folder / "model-settings.json").write_text(
        json.dumps(
            {
                "name": "model",
                "implementation": "_endpoint_mlserver.Model",
                "max_batch_size": BATCH,
                "max_batch_time": DELAY,
            }
        )
    )
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.execv(str(Path(sys.executable).parent / "mlserver"), ["mlserver", "start", str(folder)])


def ray(port: int) -> None:
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)

    @serve.deployment(max_ongoing_requests=512)
    class Model:
        def __init__(self) -> None:
            sys.path.insert(0, str(Path(__file__).parent))
            from _endpoint_models import model

            self.predict = model()

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=DELAY)
        async def score(self, bodies: list[bytes]) -> list[int]:
            return await asyncio.to_thread(self.predict, bodies)

        async def __call__(self, request: Any) -> dict[str, int]:
            return {"answer": await self.score(await request.body())}

    serve.start(http_options={"port": port})
    serve.run(Model.bind(), route_prefix="/score")
    import time

    time.sleep(1e6)


def bentoml(port: int) -> None:
    folder = Path(__file__).parent
    command = ["bentoml", "serve", "_endpoint_bento:Model", "--port", str(port), "--working-dir", str(folder)]
    os.execv(str(Path(sys.executable).parent / "bentoml"), command)


if __name__ == "__main__":
    {"asgi": asgi, "litserve": litserve, "mlserver": mlserver, "ray": ray, "bentoml": bentoml}[sys.argv[1]](
        int(sys.argv[2])
    )
