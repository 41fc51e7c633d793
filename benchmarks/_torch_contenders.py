"""The contenders of torch_photos.py, as somebody would write them with PyTorch alone: one command each.

    python _torch_contenders.py (bare|loader) WEIGHTS PHOTOS OUT.parquet

Both run the network of ``_torch_network.py`` in evaluation mode, prepare pictures alike, keep the results in memory and
write one Parquet file at the end. The bare loop gives the network two pictures at once, as Tally does: on a processor
that is twice as fast as 32, which the DataLoader loop takes, as people write it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _contenders import Progress, Rows
from _torch_network import Mobile
from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.vision.preprocess import Preprocess, Preprocessor

BATCH, AT_ONCE = 32, 2
PREPROCESS = Preprocess(
    size=(224, 224), resize="crop", shorter=256, scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def prepared(path: str) -> torch.Tensor:
    pixels, info = decode(Path(path).read_bytes(), (256, 256))
    return torch.from_numpy(Preprocessor(PREPROCESS)(Item(path, pixels, info)).tensor)


def opened(weights: str) -> Any:
    torch.set_num_threads(1)
    network = Mobile()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def best(network: Any, tensors: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    with torch.inference_mode():
        scores, indices = network(tensors).softmax(1).max(1)
    return indices.numpy(), scores.numpy()


_network: Any = None


def _open(weights: str) -> None:
    global _network
    _network = opened(weights)


def _score(paths: list[str]) -> Rows:
    rows: Rows = []
    for at in range(0, len(paths), AT_ONCE):
        group = paths[at : at + AT_ONCE]
        indices, scores = best(_network, torch.stack([prepared(path) for path in group]))
        rows += [(Path(path).name, int(i), float(s)) for path, i, s in zip(group, indices, scores, strict=True)]
    return rows


def bare(weights: str, paths: list[str], progress: Progress) -> Rows:
    """A process for each core that takes the next batch whenever it is free."""
    rows: Rows = []
    batches = [paths[at : at + BATCH] for at in range(0, len(paths), BATCH)]
    context = torch.multiprocessing.get_context("fork")
    with context.Pool(int(os.environ["BENCH_CORES"]), _open, (weights,)) as pool:
        for scored in pool.imap_unordered(_score, batches):
            rows += scored
            progress(len(scored))
    return rows


class Photos(torch.utils.data.Dataset[tuple[str, torch.Tensor]]):
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[str, torch.Tensor]:
        return self.paths[at], prepared(self.paths[at])


def loader(weights: str, paths: list[str], progress: Progress) -> Rows:
    """The usual loop: a DataLoader reads ahead in processes of its own, and the network has a thread for each core."""
    network, cores = opened(weights), int(os.environ["BENCH_CORES"])
    torch.set_num_threads(cores)
    rows: Rows = []
    for names, tensors in torch.utils.data.DataLoader(Photos(paths), batch_size=BATCH, num_workers=cores):
        indices, scores = best(network, tensors)
        rows += [(Path(name).name, int(i), float(s)) for name, i, s in zip(names, indices, scores, strict=True)]
        progress(len(names))
    return rows


if __name__ == "__main__":
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, weights, photos, out = sys.argv[1:]
    paths = sorted(map(str, Path(photos).iterdir()))
    rows = {"bare": bare, "loader": loader}[name](weights, paths, Progress(len(paths)))
    keys, indices, scores = zip(*rows, strict=True)
    pq.write_table(pa.table({"key": keys, "index": indices, "score": scores}), out)
    print("saved", flush=True)
