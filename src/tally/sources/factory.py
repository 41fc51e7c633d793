"""From what the user wrote as the source to the source that reads it.

A new kind of source is one file and one line in :data:`BUILT_IN`. An installed package adds another by an entry
point in the group ``tally.sources``, whose name is a URL scheme (``mything`` for ``mything://...``) and whose value
takes a :class:`SourceRequest` and returns a :class:`Source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from tally import extensions
from tally.errors import SourceNotFoundError, SpecError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Media, Source
from tally.sources.files import FileSource
from tally.sources.queues.factory import is_queue
from tally.storage import foreign_scheme

GROUP = "tally.sources"
"""The entry points of other packages' sources."""


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What a job says about its source.

    uris: as given, with absolute paths. scorer: the one that will score the items, not loaded.
    media: what the source holds, if the job says so.
    options: the job's options for sources that were given, of every, size, by, keep, where, time, window, aggregate,
        csv, queue and until_empty.
    without: the job's own output, which is never taken, even if it lies within the source.
    """

    uris: tuple[str, ...]
    scorer: Scorer
    media: Media | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    without: str | None = None


Factory: TypeAlias = Callable[[SourceRequest], Source]


def source_for(request: SourceRequest) -> Source:
    """The source that the request describes. It is listed and inspected; no item is read.

    Of the kinds that serve the scorer, the job's ``media`` chooses; without it, the first kind that finds something.
    Raises SpecError if the scorer cannot be served, SourceNotFoundError if nothing is there, StorageError if it cannot
    be read.
    """
    if any(map(is_queue, request.uris)):
        return _messages(request)
    if (factory := _foreign(request.uris)) is not None:
        source = extensions.call(GROUP, foreign_scheme(request.uris[0]) or "", factory, request)
        if request.scorer.input not in source.accepts:
            served, needed = " or ".join(map(_plural, sorted(source.accepts))), _plural(request.scorer.input)
            raise SpecError(
                f"{request.uris[0]} provides {served}, but the model needs {needed}",
                hint=f"Choose a model that takes {served}, or a source that provides {needed}.",
            )
        return source
    lines = [each for each in BUILT_IN if request.scorer.input in each.accepts]
    if len(lines) > 1 and request.media is not None:
        lines = [each for each in lines if each.media == request.media]
    first: SourceNotFoundError | None = None
    for line in lines:
        try:
            return line.make(request)
        except SourceNotFoundError as error:
            first = first or error
    assert first is not None
    raise first


def _plural(what: str) -> str:
    return what if what.endswith("s") else f"{what}s"


def _foreign(uris: tuple[str, ...]) -> Factory | None:
    """The factory of another package for the scheme of these URLs, if there is one."""
    schemes = {scheme: uri for uri in uris if (scheme := foreign_scheme(uri)) is not None}
    for scheme in schemes:
        factory: Factory | None = extensions.find(GROUP, scheme)
        if factory is None:
            continue
        if other := next((uri for uri in uris if foreign_scheme(uri) != scheme), None):
            raise SpecError(
                f"{schemes[scheme]} and {other} are sources of different kinds", hint="Start a job for each."
            )
        return factory
    return None


def _files(request: SourceRequest) -> Source:
    return FileSource.describe(request.uris, request.scorer.input, without=request.without)


def _messages(request: SourceRequest) -> Source:
    from tally.scorers.routed import RoutedScorer
    from tally.sources.queues.source import QueueSource

    if len(request.uris) > 1:
        raise SpecError(f"a job takes one queue, not {len(request.uris)} sources", hint="Start a job for each.")
    options, scorer = request.options, request.scorer
    route, trusted = (scorer.template, scorer.trusted) if isinstance(scorer, RoutedScorer) else (None, False)
    return QueueSource.describe(
        request.uris[0],
        scorer.input,
        options.get("queue", {}),
        until_empty=options.get("until_empty", False),
        route=route,
        trusted=trusted,
    )


def _frames(request: SourceRequest) -> Source:
    from tally.sources.video import VideoSource

    options = {name: request.options[name] for name in ("every", "size") if name in request.options}
    return VideoSource.describe(request.uris, **options, without=request.without)


def _rows(request: SourceRequest) -> Source:
    """Rows of tables. The job's options come before those of the scorer."""
    from tally.sources.tables.source import TableSource

    scorer, given = request.scorer, request.options
    options = {name: given[name] for name in ("keep", "where", "csv") if name in given}
    own = scorer.window if "window" not in given else None
    return TableSource.describe(
        request.uris,
        features=scorer.features,
        by=given.get("by") or tuple(scorer.by),
        time=given.get("time") or (own.time if own else None),
        window=own.seconds if own else given.get("window"),
        aggregate=own.aggregate if own else given.get("aggregate", ("mean",)),
        missing_reason=scorer.missing_reason if scorer.by else None,
        without=request.without,
        **options,
    )


class _Line(NamedTuple):
    """media: what a job calls it. accepts: as in :class:`Source`. make: imports it, and makes one."""

    media: Media
    accepts: frozenset[Input]
    make: Factory


BUILT_IN: tuple[_Line, ...] = (
    _Line("image", frozenset({"image", "bytes", "path"}), _files),
    _Line("video", frozenset({"image", "frame"}), _frames),
    _Line("table", frozenset({"table"}), _rows),
)
"""In the order in which they look for something to score. What a kind of source imports takes time: only that of the
kinds that serve the scorer is imported."""
