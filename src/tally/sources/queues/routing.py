"""From what a message calls its model to a reference that names the content, in the coordinator."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tally.errors import (
    DatabaseAwayError,
    ItemError,
    StorageAwayError,
    TallyError,
    UntrustedModelError,
    error_line,
    is_interrupt,
)
from tally.models.reference import ModelRef
from tally.models.route import Route

if TYPE_CHECKING:
    from tally.models.registry import ModelVersion, Registry

FRESH_SECONDS = 10.0
"""After so long, what an alias means is asked again."""
_NAMES, _MODELS = 1000, 64
"""Names and models that are remembered, at most: anybody who may send messages can think of many names."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Routing:
    """What a job says about models that messages choose. accepts: the inputs that its items can serve.
    columns: of the results, which no model may have. trusted: models may run code that their artifacts carry."""

    route: Route
    accepts: Collection[str]
    columns: Collection[str] = ()
    trusted: bool = False


class Router:
    """Finds the model of each message in the registry. Used by one thread."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._registry: Registry | None = None
        self._names: OrderedDict[str, tuple[float, ModelRef | ItemError]] = OrderedDict()
        self._models: OrderedDict[tuple[str, int, str], ModelRef] = OrderedDict()

    def choose(self, value: Callable[[str], str | None]) -> tuple[str, ModelRef]:
        """The name that the message chose, as ``detector@champion``, and the model that it means now.

        value: what the message says under a name. Raises ItemError where it names no model that can score its items;
        StorageAwayError, DatabaseAwayError where that cannot be said now.
        """
        uri = self._routing.route.uri(value)
        known = self._names.get(uri)
        if known is None or time.monotonic() - known[0] > FRESH_SECONDS:
            known = time.monotonic(), self._found(uri)
            _keep(self._names, uri, known, _NAMES)
        if isinstance(known[1], ItemError):
            raise known[1].bare()
        return uri.removeprefix("models:/"), known[1]

    def _found(self, uri: str) -> ModelRef | ItemError:
        from tally.models.registry import open_registry

        try:
            if self._registry is None:
                self._registry = open_registry()
            version = self._registry.get(uri)
            key = version.name, version.version, version.hash
            if key not in self._models:
                _keep(self._models, key, self._resolved(version), _MODELS)
            self._models.move_to_end(key)
            return self._models[key]
        except (StorageAwayError, DatabaseAwayError):
            raise
        except ItemError as error:
            return error
        except TallyError as error:
            return ItemError(f"{uri} cannot be used: {error.message}", stage="read", hint=error.hint)
        except BaseException as error:  # a framework that looks into a model may raise anything
            if is_interrupt(error):
                raise
            hint = f"Score one item with it by a job of its own: --model {uri} --limit 1"
            return ItemError(f"{uri} cannot be used: {error_line(error)}", stage="read", hint=hint)

    def _resolved(self, version: ModelVersion) -> ModelRef:
        from tally.models import kinds
        from tally.models.load import create
        from tally.models.resolve import resolve

        if kinds.get(version.kind).traits.entry:
            # Two of them in one process would share modules of one name, and the environment.
            raise UntrustedModelError(
                f"{version} is code (kind {version.kind}), which messages cannot choose",
                hint="Score it by a job of its own.",
            )
        ref = resolve(str(version), trust=self._routing.trusted)
        scorer = create(ref)
        if scorer.input not in self._routing.accepts:
            what = f"{version} takes {scorer.input}, and messages name pictures and files"
            raise ItemError(what, stage="read", hint="Have messages choose a model of pictures.")
        if scorer.output != "rows":
            what = f"{version} gives pictures, and where messages choose the model, results are rows"
            raise ItemError(what, stage="read", hint="Score it by a job of its own.")
        if twice := sorted({*self._routing.columns} & {*(scorer.columns or ())}):
            hint = f"Give {twice[0]!r} another name, in the model or in --queue meta.NAME."
            raise ItemError(f"{version} gives a column {twice[0]!r}, and so does the job", stage="read", hint=hint)
        return ref


def _keep(known: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > most:
        known.popitem(last=False)
