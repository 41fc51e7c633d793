"""TensorBoard's event files, written without TensorFlow or PyTorch: scalars, histograms, pictures, hparams, graphs.

They need the package ``tensorboard`` (extra ``train``), whose messages are used. Its own file writer hands each event
to a thread and sums in Python, which costs a training more than its steps; so records are written here:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details. A writer is safe to use from several
threads. What it is given is on disk after :data:`FLUSH_SECONDS`, with the next that is given, or after :meth:`flush`.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np

from tally.errors import RunError, StorageError
from tally.optional import needed
from tally.storage import failure
from tally.training.runs.pictures import as_picture, png

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

FLUSH_SECONDS = 2.0
BUFFER = 1 << 20
"""Bytes that are kept until then, at most."""
BUCKETS = 30
"""Of a histogram, unless its edges are given."""


_number = itertools.count()


class Node(NamedTuple):
    """A node of a graph: name, what it does, the names of the nodes that it takes, and its output's shape, if known
    (None for a dimension of any size)."""

    name: str
    operation: str
    inputs: Sequence[str] = ()
    shape: Sequence[int | None] | None = None


class EventWriter:
    """Writes one event file in ``folder``, which is made. Raises RunError without that package, StorageError."""

    def __init__(self, folder: str | Path) -> None:
        with needed("event files for TensorBoard need", "retrain", RunError):
            from tensorboard.compat.proto import event_pb2, summary_pb2
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._histogram = summary_pb2.HistogramProto
        self._sum = _masked_sum()
        self._lock = threading.Lock()
        self._flushed = time.monotonic()
        self.folder = Path(folder)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / name).open("wb", buffering=BUFFER)
        except OSError as error:
            raise failure("write", str(folder), error) from error
        self._write(self._event(file_version="brain.Event:2"), None)
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left, and close the file. May be repeated. Raises StorageError."""
        with self._lock, self._explained():
            self._file.close()

    def flush(self) -> None:
        """Bring all that was given to the disk. Raises StorageError."""
        with self._lock, self._explained():
            self._file.flush()

    def add(
        self,
        step: int,
        *,
        scalars: Mapping[str, float] = {},
        histograms: Mapping[str, ArrayLike | Mapping[str, Any]] = {},
        images: Mapping[str, Any] = {},
        at: float | None = None,
    ) -> None:
        """One event with all that was measured at a step.

        histograms: arrays of any shape, of which BUCKETS buckets are counted; what is not finite is left out. Or what
            :func:`histogram` has made of one, for files that show the same.
        images: as of :func:`tally.training.runs.pictures.as_picture`. at: seconds since the epoch; now by default.
        """
        summary = self._summary()
        for tag, number in scalars.items():
            summary.value.add(tag=tag, simple_value=float(number))
        for tag, array in histograms.items():
            counted = array if isinstance(array, Mapping) else histogram(np.asarray(array))
            summary.value.add(tag=tag, histo=self._histogram(**counted))
        for tag, given in images.items():
            picture = as_picture(given)
            height, width = picture.shape[:2]
            value = summary.value.add(tag=tag)
            value.image.height, value.image.width, value.image.colorspace = height, width, 3
            value.image.encoded_image_string = png(picture)
        self._write(self._event(step=step, summary=summary), at)

    def hparams(self, parameters: Mapping[str, Any], metrics: Sequence[str] = (), *, name: str | None = None) -> None:
        """The parameters of this run for TensorBoard's HParams page.

        The folder of the file is the run's; its scalars lie in it, or below. metrics: tags of the scalars that rate it;
        all that there are by default. name: of the run, on that page.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams

        at = time.time()
        known = {key: _hparam(value) for key, value in parameters.items()}
        config = hparams.hparams_config_pb(
            hparams=[hparams.HParam(key) for key in known],
            metrics=[hparams.Metric(tag) for tag in metrics],
            time_created_secs=at,
        )
        # Without a configuration the page finds the names by itself.
        for summary in [config] * bool(metrics) + [hparams.hparams_pb(known, trial_id=name, start_time_secs=at)]:
            event = self._event()
            event.summary.ParseFromString(summary.SerializeToString())
            self._write(event, at)

    def session_end(self, succeeded: bool = True) -> None:
        """Tell the HParams page that the run has ended."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        event = self._event()
        event.summary.value.add(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
        )
        self._write(event, None)

    def graph(self, nodes: Sequence[Node]) -> None:
        """What is computed, for TensorBoard's Graphs page. Names with ``/`` are grouped by what stands before it."""
        from tensorboard.compat.proto import graph_pb2, versions_pb2
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        graph = graph_pb2.GraphDef(versions=versions_pb2.VersionDef(producer=22))
        for each in nodes:
            node = graph.node.add(name=each.name, op=each.operation, input=list(each.inputs))
            if each.shape is not None:
                sizes = [TensorShapeProto.Dim(size=-1 if size is None else size) for size in each.shape]
                node.attr["_output_shapes"].list.shape.add().CopyFrom(TensorShapeProto(dim=sizes))
        self._write(self._event(graph_def=graph.SerializeToString()), None)

    def _write(self, event: Any, at: float | None) -> None:
        event.wall_time = time.time() if at is None else at
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        record = b"".join(
            (length, struct.pack("<I", self._sum(length)), content, struct.pack("<I", self._sum(content)))
        )
        now = time.monotonic()
        with self._lock, self._explained():
            self._file.write(record)
            if now - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # the latter: it is closed
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"cannot write {self.folder}: {reason}") from error


def _masked_sum() -> Callable[[bytes], int]:
    """The checksum of records: CRC-32C, turned and moved on."""
    try:
        from google_crc32c import value as crc
    except ImportError:  # a hundred times as slow
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        return cast(Callable[[bytes], int], masked_crc32c)

    def masked(content: bytes) -> int:
        found = int(crc(content))
        return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF

    return masked


def can_write() -> bool:
    """Whether the package that event files need is installed."""
    return find_spec("tensorboard") is not None


def histogram(values: np.ndarray[Any, Any], edges: Sequence[float] | None = None) -> dict[str, Any]:
    """The fields of TensorBoard's HistogramProto: ``min``, ``max``, ``num``, ``sum``, ``sum_squares``, ``bucket_limit``
    (right edges) and ``bucket`` (counts). What is not finite is left out."""
    flat = np.asarray(values, np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    if not finite.size:
        return {
            "min": 0.0,
            "max": 0.0,
            "num": 0.0,
            "sum": 0.0,
            "sum_squares": 0.0,
            "bucket_limit": [0.0],
            "bucket": [0.0],
        }
    least, most = float(finite.min()), float(finite.max())
    if least == most:  # one bucket around the only value
        counts, right = np.array([finite.size]), np.array([math.nextafter(most, math.inf)])
    else:
        counts, found = np.histogram(finite, bins=BUCKETS if edges is None else np.asarray(edges))
        right = found[1:]
    return {
        "min": least, "max": most, "num": float(finite.size), "sum": float(finite.sum()),
        "sum_squares": float(np.square(finite).sum()), "bucket_limit": right.tolist(), "bucket": counts.tolist(),
    }  # fmt: skip


def _hparam(value: Any) -> bool | float | str:
    """HParams are booleans, numbers or texts."""
    if isinstance(value, (bool, float, str)):
        return value
    return float(value) if isinstance(value, int) else str(value)
