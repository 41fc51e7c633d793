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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tally.errors import ModelNotFoundError

Run = TypeVar("Run", bound=Callable[..., Any])


class _Upload(io.BytesIO):
    """One file of a form; ``save`` and the rest as scripts know them from Werkzeug."""

    def __init__(self, content: bytes, filename: str) -> None:
        super().__init__(content)
        self.filename = filename
        self.content_type = self.mimetype = "application/octet-stream"

    @property
    def stream(self) -> io.BytesIO:
        return self

    def save(self, place: str | Path) -> None:
        Path(place).write_bytes(self.getvalue())


class _AnyField(dict[str, _Upload]):
    """A form with one file in it, whatever name the script expects it under."""

    def __init__(self, upload: Callable[[], _Upload]) -> None:
        super().__init__(file=upload())
        self._upload = upload

    def __missing__(self, name: str) -> _Upload:
        return self.setdefault(name, self._upload())

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None, type: Any = None) -> Any:  # noqa: A002 - Werkzeug's name
        return self[name]


class AMLRequest:
    """What a ``run`` decorated with :func:`rawhttp` is given: one request.

    data: the body. filename: name under which :attr:`files` hands it out, as if posted as a form.
    """

    def __init__(
        self,
        data: bytes = b"",
        *,
        method: str = "POST",
        path: str = "/score",
        headers: Mapping[str, str] | None = None,
        args: Mapping[str, str] | None = None,
        filename: str = "file",
    ) -> None:
        self.data = data
        self.method = method
        self.path = path
        self.headers = dict(headers or {})
        self.args = dict(args or {})
        self.form: dict[str, str] = {}
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
    def files(self) -> Mapping[str, _Upload]:
        return _AnyField(lambda: _Upload(self.data, self.filename))

    @property
    def stream(self) -> io.BytesIO:
        return io.BytesIO(self.data)

    @property
    def content_length(self) -> int:
        return len(self.data)

    @property
    def content_type(self) -> str | None:
        return next((value for name, value in self.headers.items() if name.lower() == "content-type"), None)

    mimetype = content_type


class AMLResponse:
    """What a script answers with: a body, a status and headers."""

    def __init__(
        self,
        message: Any,
        status_code: int,
        response_headers: Mapping[str, str] | None = None,
        json_str: bool = False,
        run_function_failed: bool = False,
    ) -> None:
        self.status_code = int(status_code)
        self.headers = dict(response_headers or {})
        self.run_function_failed = run_function_failed
        # Scripts hand over bytes, text, or (leniently) anything that JSON can hold.
        if isinstance(message, (bytes, bytearray)) and not json_str:
            self.data = bytes(message)
        elif isinstance(message, str) and not json_str:
            self.data = message.encode()
        else:
            self.data = json.dumps({} if message is None else message).encode()
            self.headers.setdefault("Content-Type", "application/json")

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

        Looked for as ``<name>/<version>`` (the newest version if None), ``<name>``, or a file of that
        name whatever its suffix. Raises ModelNotFoundError.
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
