"""What ``run()`` of a script returned, as results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tally.errors import ItemError, TallyError
from tally.scorers.base import Result


def answers_of(returned: Any, count: int, what: str = "file") -> Sequence[Any]:
    """What ``run`` returned for ``count`` files or rows, one by one. Raises TallyError if it is not as many answers."""
    given = f"a mini-batch of {count} file" if what == "file" else f"a DataFrame of {count} row"
    given += "" if count == 1 else "s"
    several = "Several rows for one file are a list of dicts; an" if what == "file" else "An"
    hint = (
        f"Return one result per {what}, in the {what}s' order: a list, an array or a DataFrame. "
        f"{several} exception object marks a {what} that failed."
    )
    if isinstance(returned, str):
        returned = _parsed(returned)
    if hasattr(returned, "to_pylist"):  # pyarrow
        returned = returned.to_pylist()
    elif hasattr(returned, "iloc"):  # pandas
        returned = records(returned)
    elif getattr(returned, "ndim", 0) > 0:  # NumPy, or whatever calls itself an array
        returned = list(returned)
    if not isinstance(returned, (list, tuple)):
        raise TallyError(f"run() returned {_kind_of(returned)} for {given}", hint=hint)
    if len(returned) != count:
        raise TallyError(f"run() returned {len(returned)} results for {given}", hint=hint)
    return returned


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def records(frame: Any) -> list[Any]:
    """Rows of a pandas DataFrame as dicts, or values of a Series. Pandas itself is never imported here."""
    return cast("list[Any]", frame.to_dict("records") if hasattr(frame, "columns") else frame.tolist())


def result_of(answer: Any) -> Result:
    """A script's answer for one item as a row or rows, or an exception.

    A dict is a row, a list of dicts are rows; JSON text is parsed first; anything else becomes
    ``{"prediction": answer}``. An answer with status 400 and more, or none at all, is an ItemError.
    """
    try:
        return _result_of(answer)
    except ItemError as error:
        return error


def _result_of(answer: Any) -> Result:
    if isinstance(answer, Exception):
        return answer
    if hasattr(answer, "status_code") and hasattr(answer, "get_data"):
        if answer.status_code >= 400:
            text = " ".join(answer.get_data(as_text=True).split())
            raise ItemError(f"the script answered {answer.status_code}: {text[:500] or 'without a body'}")
        answer = answer.get_data()
    if isinstance(answer, (bytes, bytearray)):
        try:
            answer = answer.decode()
        except UnicodeDecodeError:
            return {"prediction": bytes(answer)}
    if isinstance(answer, str):
        answer = _parsed(answer)
    elif hasattr(answer, "iloc"):
        answer = records(answer)
    if answer is None:
        raise ItemError(
            "run() returned nothing for this item",
            hint="Return a dict, a list of dicts, a value, or JSON text.",
        )
    answer = plain(answer)
    if isinstance(answer, dict) or (isinstance(answer, list) and all(isinstance(each, dict) for each in answer)):
        return cast("Result", answer)
    return {"prediction": answer}


def _parsed(text: str) -> Any:
    # Only what is certainly JSON: a class called "7" or "null" stays the text that it is.
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def plain(value: Any) -> Any:
    """The same value without the types of NumPy and its like, paths and tuples."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
