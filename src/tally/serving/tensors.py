"""Tensors of the protocols that speak in them, to items and back. Runs in replicas.

A model of pictures takes ``image``: files (BYTES of any shape) or ``uint8[count, height, width, 3]``. A model of tables
takes one tensor for each column, ``[rows]`` or ``[rows, 1]``, or one ``[rows, columns]`` of all features in order.
Others take ``body``: BYTES. Results are one tensor for each column, of all rows; where an item may have several rows or
none, ``count`` says how many each has, ``int64[items]``. Pictures come back as ``image``, as they were sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tally.scorers.base import Item, Pictured, Result, Scorer
from tally.serving import values
from tally.serving.metadata import ITEM_INPUT
from tally.serving.protocols.base import RequestError, Work, check_all, check_order, column_names


@dataclass(frozen=True, slots=True)
class Tensor:
    """values: an array of its shape, or ``list[bytes]`` in row-major order for texts."""

    name: str
    shape: tuple[int, ...]
    values: Any

    @property
    def is_text(self) -> bool:
        return isinstance(self.values, list)


def numbers(given: Any, kind: str, datatype: str, where: str) -> Any:
    """Values of a message as an array of NumPy's ``kind``, which may be smaller than theirs. Raises RequestError."""
    wide = np.array(given)
    array = wide.astype(kind)
    if array.dtype.kind in "iu" and (wrong := np.flatnonzero(array != wide)).size:
        raise RequestError(422, f"{where}: {wide[wrong[0]]} is no {datatype}")
    return array


def work_of(tensors: Sequence[Tensor], scorer: Scorer) -> Work:
    """What they ask to have scored. Raises RequestError, which names the tensor."""
    if not tensors:
        raise RequestError(422, "inputs: there is none")
    if scorer.input == "table":
        return Work(_table(tensors, scorer))
    wanted = ITEM_INPUT[scorer.input]
    if len(tensors) > 1:
        names = ", ".join(tensor.name for tensor in tensors)
        raise RequestError(422, f"inputs: the model takes {wanted!r} alone, not {names}")
    [tensor] = tensors
    if tensor.is_text:
        return Work([Item(str(at), content) for at, content in enumerate(tensor.values)])
    if wanted != "image":
        raise RequestError(422, f"inputs.{tensor.name}: should be bytes (datatype BYTES)")
    array = tensor.values
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise RequestError(
            422,
            f"inputs.{tensor.name}: should be pictures: BYTES, or UINT8 of shape [count, height, width, 3], not "
            f"{array.dtype} of shape {list(array.shape)}",
        )
    pictures = array[None] if array.ndim == 3 else array
    return Work([Item(str(at), picture) for at, picture in enumerate(pictures)])


def _table(tensors: Sequence[Tensor], scorer: Scorer) -> Any:
    import pyarrow as pa

    features = scorer.features
    if len(tensors) == 1 and not tensors[0].is_text and tensors[0].values.ndim == 2 and tensors[0].shape[1] != 1:
        [tensor] = tensors
        width = tensor.shape[1]
        count = features if isinstance(features, int) else None if features is None else len(features)
        if scorer.by:
            raise RequestError(
                422, f"inputs: send a tensor for each column; the model needs {', '.join(scorer.by)}, too"
            )
        if count is not None and width != count:
            raise RequestError(422, f"inputs.{tensor.name}: should have {count} columns, not {width}")
        names = column_names(scorer) or [f"f{at}" for at in range(width)]
        return pa.table({name: pa.array(tensor.values[:, at]) for at, name in enumerate(names)})
    check_order([tensor.name for tensor in tensors], scorer, "inputs")
    columns: dict[str, Any] = {}
    rows: int | None = None
    for tensor in tensors:
        if not tensor.shape or int(np.prod(tensor.shape)) != tensor.shape[0]:
            raise RequestError(
                422, f"inputs.{tensor.name}: should have the shape [rows] or [rows, 1], not {list(tensor.shape)}"
            )
        if rows is not None and tensor.shape[0] != rows:
            raise RequestError(422, f"inputs.{tensor.name}: has {tensor.shape[0]} rows, and others have {rows}")
        if tensor.name in columns:
            raise RequestError(422, f"inputs.{tensor.name}: is there more than once")
        rows = tensor.shape[0]
        if tensor.is_text:
            try:
                columns[tensor.name] = pa.array([each.decode() for each in tensor.values])
            except UnicodeDecodeError:
                raise RequestError(422, f"inputs.{tensor.name}: is not UTF-8") from None
        else:
            columns[tensor.name] = pa.array(tensor.values.reshape(-1))
    return pa.table(columns)


def tensors_of(results: Sequence[Result], scorer: Scorer, work: Work) -> list[Tensor]:
    """The results as tensors. Raises RequestError, which names the items that failed."""
    check_all(results, "row" if scorer.input == "table" else "item")
    if results and all(values.is_picture(result) for result in results):
        return [_pictures(results, work)]
    if results and all(isinstance(result, Pictured) for result in results):
        rows = tensors_of([result.rows for result in results], scorer, work)  # type: ignore[union-attr]
        return [_pictures([result.picture for result in results], work), *rows]  # type: ignore[union-attr]
    columns = values.columns_of(results, scorer.columns)
    kinds = scorer.columns or {}
    tensors = [column_tensor(name, column, kinds.get(name)) for name, column in columns.items()]
    counts = [len(values.rows_of(result)) for result in results]
    if any(count != 1 for count in counts):
        tensors.append(Tensor("count", (len(counts),), np.array(counts, np.int64)))
    return tensors


def _pictures(results: Sequence[Any], work: Work) -> Tensor:
    sent_arrays = hasattr(work.items[0].value, "shape")
    if sent_arrays and len({result.shape for result in results}) == 1:
        stacked = np.stack(results)
        return Tensor("image", stacked.shape, stacked)
    return Tensor("image", (len(results),), [values.png(result) for result in results])


def column_tensor(name: str, column: Sequence[Any], kind: str | None = None) -> Tensor:
    """One column of results: numbers as int64, float64, or float32 where the scorer's ``kind`` says so; truth values as
    bool; lists of numbers of one length as ``[rows, length]``; anything else as BYTES (JSON for what is no text).
    A number that is missing is NaN."""
    shape = (len(column),)
    real = np.float32 if kind in ("float32", "list<float32>") else np.float64
    given = [value for value in column if value is not None]
    complete = len(given) == len(column)
    if given and complete and _all(given, (bool, np.bool_)):
        return Tensor(name, shape, np.array(column, bool))
    if complete and (kind == "int64" or given) and _all(given, (int, np.integer)):
        try:
            return Tensor(name, shape, np.array(column, np.int64))
        except OverflowError:
            pass
    if (given or kind in ("int64", "float32", "float64")) and _all(given, (int, float, np.integer, np.floating)):
        return Tensor(name, shape, np.array([np.nan if value is None else value for value in column], real))
    if given and complete and _all(given, (list, tuple, np.ndarray)):
        try:
            array = np.array(column, real if kind is not None else None)
        except ValueError:
            array = np.array(None)
        if array.ndim == 2 and array.dtype.kind in "fiub":
            return Tensor(name, array.shape, array)
    return Tensor(name, shape, [_bytes(value) for value in column])


def _all(found: Sequence[Any], types: tuple[type, ...]) -> bool:
    """Whether all are of these types; a truth value is no number."""
    return all(isinstance(value, types) and (bool in types or not isinstance(value, bool)) for value in found)


def _bytes(value: Any) -> bytes:
    if value is None:
        return b""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    text = value if isinstance(value, str) else json.dumps(values.json_value(value), default=str)
    return text.encode("utf-8", "surrogateescape")
