"""What the servers of benchmarks/endpoints.py serve: functions from a list of bodies to a list of answers.

Each server runs in a Python of its own, so nothing of Tally is imported here. TALLY_BENCH_MODEL names the function,
TALLY_BENCH_ONNX the file of the network.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import Any

BATCH = 16


def noop(bodies: list[bytes]) -> list[int]:
    """Nothing."""
    return [len(body) for body in bodies]


def paced(bodies: list[bytes]) -> list[int]:
    """5 ms for a batch and 1 ms for each item, without the processor: as a GPU would take."""
    time.sleep(0.005 + 0.001 * len(bodies))
    return [len(body) for body in bodies]


def network() -> Callable[[list[bytes]], list[int]]:
    """A network over pictures of 224 x 224, one thread."""
    import numpy as np
    import onnxruntime
    from PIL import Image

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(os.environ["TALLY_BENCH_ONNX"], options, providers=["CPUExecutionProvider"])
    name, last = session.get_inputs()[0].name, session.get_inputs()[0].shape[-1] == 3  # channels

    def tensor(body: bytes) -> Any:
        picture = Image.open(io.BytesIO(body))
        picture.draft("RGB", (224, 224))
        pixels = np.asarray(picture.convert("RGB").resize((224, 224)), np.float32)
        pixels = pixels / 127.5 - 1
        return pixels if last else pixels.transpose(2, 0, 1)

    def run(bodies: list[bytes]) -> list[int]:
        [scores, *_] = session.run(None, {name: np.stack([tensor(body) for body in bodies])})
        return [int(each) for each in scores.reshape(len(bodies), -1).argmax(axis=1)]

    return run


def model() -> Callable[[list[bytes]], list[int]]:
    """The function that TALLY_BENCH_MODEL names."""
    wanted = os.environ["TALLY_BENCH_MODEL"]
    return network() if wanted == "network" else {"noop": noop, "paced": paced}[wanted]
