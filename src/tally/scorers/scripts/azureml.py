"""The names that Azure ML scoring scripts import, for machines without the azureml packages.

:func:`provide` places modules of these names in ``sys.modules``, only where importing them would fail:

- ``azureml.contrib.services.aml_request`` and ``azureml_inference_server_http.api.aml_request``:
  :class:`AMLRequest`, :func:`rawhttp`
- the same with ``aml_response``: :class:`AMLResponse`
- ``azureml.core.model`` and ``azureml.core``: :class:`Model`, for ``Model.get_model_path(name)``
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from tally.errors import ModelNotFoundError
from tally.scorers.scripts import forms

Run = TypeVar("Run", bound=Callable[..., Any])


class Headers(MutableMapping[str, str]):
    """Headers by name, whatever the case of its letters."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self._named: dict[str, tuple[str, str]] = {}
        self.update(headers or {})

    def __getitem__(self, name: str) -> str:
        return self._named[name.lower()][1]

    def __setitem__(self, name: str, value: str) -> None:
        self._named[name.lower()] = (name, str(value))

    def __delitem__(self, name: str) -> None:
        del self._named[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._named.values())

    def __len__(self) -> int:
        return len(self._named)

    def add(self, name: str, value: str) -> None:
        """Set a header, or append to its value, after a comma."""
        self[name] = f"{self[name]}, {value}" if name in self else value

    def __repr__(self) -> str:
        return repr(dict(self))


class Values(dict[str, Any]):
    """The fields of a query or form, as scripts know them from Werkzeug: one value by name, or all of them."""

    def __init__(self, pairs: Iterable[tuple[str, Any]] = ()) -> None:
        self._pairs = list(pairs)
        super().__init__(reversed(self._pairs))  # the first of several

    def getlist(self, name: str) -> list[Any]:
        return [value for each, value in self._pairs if each == name]

    def get(self, name: str, default: Any = None, type: Callable[[Any], Any] | None = None) -> Any:  # noqa: A002
        if name not in self:
            return default
        try:
            return self[name] if type is None else type(self[name])
        except ValueError:
            return default


class Upload(io.BytesIO):
    """One file of a form; ``save`` and the rest as scripts know them from Werkzeug."""

    def __init__(self, content: bytes, filename: str, content_type: str = "application/octet-stream") -> None:
        super().__init__(content)
        self.filename = filename
        self.content_type = self.mimetype = content_type

    @property
    def stream(self) -> io.BytesIO:
        return self

    def save(self, place: str | Path) -> None:
        Path(place).write_bytes(self.getvalue())


class _AnyField(dict[str, Upload]):
    """A form with one file in it, whatever name the script expects it under."""

    def __init__(self, upload: Callable[[], Upload]) -> None:
        super().__init__(file=upload())
        self._upload = upload

    def __missing__(self, name: str) -> Upload:
        return self.setdefault(name, self._upload())

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None, type: Any = None) -> Any:  # noqa: A002 - Werkzeug's name
        return self[name]


class AMLRequest:
    """What a ``run`` decorated with :func:`rawhttp` is given: one request.

    data: the body. args: of the query; left out, they are taken from ``query``.
    filename: name under which :attr:`files` hands the body out if it is no form: as if it had been posted as one.
    """

    def __init__(
        self,
        data: bytes = b"",
        *,
        method: str = "POST",
        path: str = "/score",
        query: str = "",
        headers: Mapping[str, str] | None = None,
        args: Mapping[str, str] | None = None,
        filename: str = "file",
    ) -> None:
        self.data = data
        self.method = method
        self.path = path
        self.query_string = query.encode()
        self.headers = Headers(headers)
        self.args = Values(parse_qsl(query, keep_blank_values=True) if args is None else args.items())
        self.filename = filename

    def get_data(self, cache: bool = True, as_text: bool = False, parse_form_data: bool = False) -> Any:
        return self.data.decode("utf-8", "replace") if as_text else self.data

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        try:
            return json.loads(self.data)
        except ValueError:
            if silent:
                return None
            raise

    @property
    def json(self) -> Any:
        return self.get_json()

    @property
    def is_json(self) -> bool:
        return "json" in (self.content_type or "").partition(";")[0]

    @cached_property
    def _posted(self) -> forms.Form | None:
        return forms.parse(self.data, self.content_type)

    @property
    def form(self) -> Values:
        return Values(self._posted.fields if self._posted is not None else ())

    @property
    def files(self) -> Mapping[str, Upload]:
        if self._posted is None:
            return _AnyField(lambda: Upload(self.data, self.filename))
        return Values((name, Upload(f.content, f.filename, f.content_type)) for name, f in self._posted.files)

    @property
    def stream(self) -> io.BytesIO:
        return io.BytesIO(self.data)

    @property
    def content_length(self) -> int:
        return len(self.data)

    @property
    def content_type(self) -> str | None:
        return self.headers.get("Content-Type")

    mimetype = content_type

    @property
    def full_path(self) -> str:
        return f"{self.path}?{self.query_string.decode()}"


class AMLResponse:
    """What a script answers with: a body, a status and headers.

    message: bytes, text, or a value for JSON. Without a Content-Type, text is ``text/plain``: Azure ML says HTML, as
    which a browser would run what a client has put into a message.
    """

    def __init__(
        self,
        message: Any,
        status_code: int,
        response_headers: Mapping[str, str] | None = None,
        json_str: bool = False,
        run_function_failed: bool = False,
    ) -> None:
        self.status_code = int(status_code)
        self.headers = Headers(response_headers)
        self.run_function_failed = run_function_failed
        if isinstance(message, (bytes, bytearray)) and not json_str:
            self.data, kind = bytes(message), "application/octet-stream"
        elif isinstance(message, str) and not json_str:
            self.data, kind = message.encode(), "text/plain; charset=utf-8"
        else:
            self.data, kind = json.dumps({} if message is None else message).encode(), "application/json"
        self.headers.setdefault("Content-Type", kind)

    def get_data(self, as_text: bool = False) -> Any:
        return self.data.decode("utf-8", "replace") if as_text else self.data


def rawhttp(run: Run) -> Run:
    """Mark ``run`` as one that takes an :class:`AMLRequest`."""
    run.__rawhttp__ = True  # type: ignore[attr-defined]
    return run


class Model:
    """Of ``azureml.core.Model``, what scoring scripts use."""

    @staticmethod
    def get_model_path(model_name: str, version: int | None = None, _workspace: object = None) -> str:
        """The file or folder of a model below ``AZUREML_MODEL_DIR``.

        It is ``<name>/<version>`` (the newest version if None), ``<name>``, or the file of that name with any suffix.
        Raises ModelNotFoundError.
        """
        root = Path(os.environ.get("AZUREML_MODEL_DIR", "."))
        place = root / model_name
        if place.is_dir():
            versions = sorted((each for each in place.iterdir() if each.name.isdigit()), key=lambda e: int(e.name))
            wanted = [each for each in versions if version is None or each.name == str(version)]
            if versions and not wanted:
                raise ModelNotFoundError(
                    f"{place} has no version {version}, only {', '.join(e.name for e in versions)}"
                )
            return str(wanted[-1] if wanted else place)
        if place.exists():
            return str(place)
        found = sorted(each for each in root.iterdir() if each.stem == model_name) if root.is_dir() else []
        if len(found) == 1:
            return str(found[0])
        there = sorted(each.name for each in root.iterdir())[:10] if root.is_dir() else []
        raise ModelNotFoundError(
            f"the script asks for the model {model_name!r}, but AZUREML_MODEL_DIR ({root}) "
            + (f"holds only {', '.join(there)}" if there else "holds nothing"),
            hint="Give the folder that holds it with --artifacts.",
        )


def provide() -> None:
    """Make the modules importable that Azure ML scripts import, where the real ones are not installed."""
    services = ("azureml.contrib.services", "azureml_inference_server_http.api")
    for package in services:
        _provide(f"{package}.aml_request", AMLRequest=AMLRequest, rawhttp=rawhttp)
        _provide(f"{package}.aml_response", AMLResponse=AMLResponse)
    _provide("azureml.core.model", Model=Model)
    _provide("azureml.core", Model=Model)


def _provide(name: str, **members: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    if parent:
        _provide(parent)
    module = sys.modules.get(name)
    if module is None:
        try:
            if importlib.util.find_spec(name) is not None:
                return
        except (ImportError, ValueError):
            pass
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []  # a package, as far as "import a.b" is concerned
        module.__tally__ = True  # type: ignore[attr-defined]
    if parent and getattr(sys.modules.get(parent), "__tally__", False):
        setattr(sys.modules[parent], leaf, module)
    if getattr(module, "__tally__", False):
        for key, value in members.items():
            setattr(module, key, value)
