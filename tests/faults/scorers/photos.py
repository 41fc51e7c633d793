from __future__ import annotations

import os
import time

import numpy as np
import onnxruntime
from PIL import Image

import tally


class Photos(tally.Scorer):
    """A small MobileNet of whole numbers: rows do not depend on the batch. Takes PACE seconds more for each photo."""

    size = (128, 128)
    batch_size = 4
    columns = {"index": "int64", "score": "int64", "mean": "float64"}  # noqa: RUF012

    def load(self, artifacts, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(artifacts / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def prepare(self, item):
        return np.asarray(Image.fromarray(item.value).resize(self.size, Image.Resampling.BILINEAR))

    def score(self, batch):
        time.sleep(float(os.environ.get("PACE", "0")) * len(batch))
        (found,) = self.session.run(None, {self.session.get_inputs()[0].name: np.stack(batch)})
        return [
            {"index": int(each.argmax()), "score": int(each.max()), "mean": float(picture.mean())}
            for each, picture in zip(found, batch, strict=True)
        ]
