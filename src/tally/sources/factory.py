"""From what the user wrote as the source to the source that reads it.

A new kind of source is one file and one line in :data:`BUILT_IN`. An installed package adds another by an entry
point in the group ``tally.sources``, whose name is a URL scheme (``mything`` for ``mything://...``) and whose value
takes a :class:`SourceRequest` and returns a :class:`Source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from tally import extensions
from tally.errors import SourceNotFoundError, SpecError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Media, Source
from tally.sources.files import FileSource
from tally.sources.queues.factory import is_queue
from tally.sources.sql.factory import is_sql
from tally.storage import foreign_scheme

GROUP = "tally.sources"
"""The entry points of other packages' sources."""


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What a job says about its source.

    uris: as given, with absolute paths. scorer: the one that will score the items, not loaded.
    media: what the source holds, if the job says so.
    options: the job's options for sources that were given, of every, size, fit, fps, deinterlace, by, keep, where,
        time, window, aggregate, csv, query, item_column, key, base, queue and until_empty.
    without: the job's own output, which is never taken, even if it lies within the source.
    items: the source is a list, which names the items.
    """

    uris: tuple[str, ...]
    scorer: Scorer
    media: Media | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    without: str | None = None
    items: bool = False


Factory: TypeAlias = Callable[[SourceRequest], Source]


def source_for(request: SourceRequest) -> Source:
    """The source that the request describes. It is listed and inspected; no item is read.

    Of the kinds that serve the scorer, the job's ``media`` chooses; without it, the first kind that finds something.
    Raises SpecError if the scorer cannot be served, SourceNotFoundError if nothing is there, StorageError if it cannot
    be read.
    """
    if request.items:
        return _references(request)
    if any(map(is_queue, request.uris)):
        return _messages(request)
    if any(map(is_sql, request.uris)):
        return _query(request)
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
    if request.media is not None:
        lines = _asked_for(lines, request)
    first: SourceNotFoundError | None = None
    for line in lines:
        try:
            return line.make(request)
        except SourceNotFoundError as error:
            first = first or error
    assert first is not None
    raise first


def _asked_for(lines: list[_Line], request: SourceRequest) -> list[_Line]:
    """Those of the kinds that the job's ``media`` names. Raises SpecError if there is none."""
    if found := [each for each in lines if each.media == request.media]:
        return found
    served = " or ".join(dict.fromkeys(each.media for each in lines))
    raise SpecError(
        f"media: {request.media} is asked for, and the model needs {_plural(request.scorer.input)}",
        hint=f"For this model, media is {served}; leave it out.",
    )


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
    source = FileSource.describe(request.uris, request.scorer.input, without=request.without)
    if request.media is None and source.listing.has_covers_only():
        return _frames(request)
    _keeps_nothing(request)
    return source


def _keeps_nothing(request: SourceRequest) -> None:
    if column := request.options.get("item_column"):
        raise SpecError(f"item_column: {column!r} is asked for, and {request.uris[0]} is no table")
    if request.options.get("keep"):
        raise SpecError(f"keep: is for tables, lists and archives only, and {request.uris[0]} is neither")


def _cells(request: SourceRequest) -> Source:
    from tally.sources.tables.pictures import PictureColumnSource

    options = {name: request.options[name] for name in ("item_column", "keep") if name in request.options}
    return PictureColumnSource.describe(request.uris, request.scorer.input, **options, without=request.without)


def _members(request: SourceRequest) -> Source:
    from tally.sources.archives.source import ArchiveSource

    keep = request.options.get("keep", ())
    _keeps_nothing(replace(request, options={**request.options, "keep": ()}))
    return ArchiveSource.describe(request.uris, request.scorer.input, keep=keep, without=request.without)


def _references(request: SourceRequest) -> Source:
    from tally.sources.coco import is_coco, open_coco
    from tally.sources.lists import ItemList, open_list
    from tally.sources.references import ReferenceSource

    ReferenceSource.check(request.scorer.input)
    names = ("item_column", "key", "keep", "where", "csv", "query")
    options = {name: request.options[name] for name in names if name in request.options}
    base, place = request.options.get("base"), request.uris[0]
    items: ItemList = open_coco(place, base=base, **options) if is_coco(place) else open_list(place, **options)
    return ReferenceSource.describe(items, request.scorer.input, base=base)


def _messages(request: SourceRequest) -> Source:
    from tally.scorers.routed import RoutedScorer
    from tally.sources.queues.source import QueueSource

    if request.scorer.input != "table":
        _keeps_nothing(request)
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
    from tally.sources.patterns import is_pattern
    from tally.sources.sequences import SequenceSource
    from tally.sources.video import VideoSource

    rate = request.options.get("fps")
    options = {name: request.options[name] for name in ("every", "size", "fit") if name in request.options}
    source: Source
    if rate is not None or any(map(is_pattern, request.uris)):
        if request.options.get("deinterlace"):
            raise SpecError(f"deinterlace: is for videos, and {request.uris[0]} gives pictures")
        rate = None if rate is None else Fraction(rate)
        source = SequenceSource.describe(request.uris, rate=rate, **options, without=request.without)
    else:
        deinterlace = request.options.get("deinterlace", False)
        source = VideoSource.describe(request.uris, **options, deinterlace=deinterlace, without=request.without)
    _keeps_nothing(request)
    return source


def _rows(request: SourceRequest) -> Source:
    from tally.sources.tables.source import TableSource

    csv = {"csv": request.options["csv"]} if "csv" in request.options else {}
    in_paths = request.options.get("path_columns")
    return TableSource.describe(
        request.uris, **_of_rows(request), **csv, path_columns=in_paths, without=request.without
    )


def _query(request: SourceRequest) -> Source:
    from tally.sources.sql.source import SqlSource

    if len(request.uris) > 1:
        raise SpecError(f"a job takes one database, not {len(request.uris)} sources", hint="Start a job for each.")
    if request.scorer.input != "table":
        raise SpecError(
            f"{request.uris[0]} gives rows of a table, but the model needs {_plural(request.scorer.input)}",
            hint="To score the files that a column names, make it a list: --items URL --item-column COLUMN",
        )
    options = {name: request.options[name] for name in ("key",) if name in request.options}
    source = SqlSource.of(request.uris[0], request.options.get("query"), **_of_rows(request), **options)
    if not source.key and source.query.request.window is None:
        numbered = f"rows of {source.named} are numbered in the order in which the database gave them"
        told = f"{numbered}; --key COLUMN names them by a column of their own"
        source = replace(source, assumed=(*source.assumed, told))
    return source


def _of_rows(request: SourceRequest) -> dict[str, Any]:
    """What is asked of rows. The job's options come before those of the scorer."""
    scorer, given = request.scorer, request.options
    own = scorer.window if "window" not in given else None
    return {
        **{name: given[name] for name in ("keep", "where", "time_unit") if name in given},
        "features": scorer.features,
        "by": given.get("by") or tuple(scorer.by),
        "time": given.get("time") or (own.time if own else None),
        "timezone": given.get("timezone") or (own.timezone if own else None),
        "window": own.seconds if own else given.get("window"),
        "aggregate": own.aggregate if own else given.get("aggregate", ("mean",)),
        "missing_reason": scorer.missing_reason if scorer.by else None,
    }


class _Line(NamedTuple):
    """media: what a job calls it. accepts: as in :class:`Source`. make: imports it, and makes one."""

    media: Media
    accepts: frozenset[Input]
    make: Factory


BUILT_IN: tuple[_Line, ...] = (
    _Line("image", frozenset({"image", "bytes", "path"}), _files),
    _Line("video", frozenset({"image", "frame"}), _frames),
    _Line("table", frozenset({"table"}), _rows),
    _Line("table", frozenset({"image", "bytes", "path"}), _cells),
    _Line("archive", frozenset({"image", "bytes", "path"}), _members),
)
"""In the order in which they look for something to score. What a kind of source imports takes time: only that of the
kinds that serve the scorer is imported."""
