"""CSV and its relatives: the dialect of a file, and its rows, read by DuckDB.

DuckDB's own guesses about a dialect depend on faults in the file. So the dialect is found here first, from the
beginning of the file, and DuckDB is told all of it. A line that does not fit is then a fault of that line alone.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import mmap
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from tally.errors import StorageError
from tally.sources.tables.damage import damaged
from tally.sources.tables.type_inference import SAMPLE_ROWS, Kinds, Notation, Text, infer, unlike
from tally.sql import distinct_names, sql_name, sql_text
from tally.text import did_you_mean

T = TypeVar("T")

OPTIONS = (
    "delim",
    "quote",
    "escape",
    "header",
    "encoding",
    "nullstr",
    "decimal_separator",
    "thousands",
    "skip",
    "comment",
    "timestampformat",
    "dateformat",
    "types",
)
_DELIMITERS = ",;\t|"
_HEAD_BYTES = 1 << 20
_HEAD_RECORDS = 500
_LINE_BYTES = 16 << 20
_BUFFER_BYTES = 32 << 20
_NEWLINES = 1 << 22

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_VALUE = re.compile(r"[-+]?[\d.,]*\d[\d.,]*([eE][-+]?\d+)?%?|\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[./]\d\d?[./]\d{2,4}.*")


@dataclass(frozen=True)
class Dialect:
    """How one file is written. names: all its columns, in order. renamed: those that are called otherwise than in the
    file, as they are called there and here. returns: whether lines end with a carriage return alone."""

    names: tuple[str, ...]
    delim: str = ","
    quote: str = '"'
    escape: str = '"'
    header: bool = True
    encoding: str = "utf-8"
    skip: int = 0
    comment: str = ""
    nullstr: tuple[str, ...] = ("",)
    notation: Notation = field(default_factory=Notation)
    renamed: tuple[tuple[str, str], ...] = ()
    returns: bool = False

    def remark(self) -> str | None:
        """What was assumed about the file, if it is unusual."""
        said = []
        if self.delim != ",":
            said.append(f"the delimiter is {_DELIMITER_NAMES.get(self.delim, repr(self.delim))}")
        if not self.header:
            last = f"to {self.names[-1]}" if len(self.names) > 1 else ""
            said.append(f"there is no header (columns are called {self.names[0]} {last}".rstrip() + ")")
        elif len(self.names) == 1 and re.search(r"[^\w ]", self.names[0]):
            said.append(f"there is one column, {self.names[0]!r} (csv delim=... says what else lines are cut at)")
        for old, new in self.renamed[:3]:
            said.append(
                f"another column {old!r} is called {new!r}" if old else f"a column without a name is called {new!r}"
            )
        return " and ".join(said) or None


_DELIMITER_NAMES = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar", " ": "a space"}


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Every problem with the given options for CSV."""
    problems = []
    for name, value in options.items():
        if name not in OPTIONS:
            problems.append(f"csv: there is no option {name!r}{did_you_mean(name, OPTIONS)}")
        elif name == "types":
            if not isinstance(value, Mapping):
                problems.append(f"csv: types must map columns to types, not {value!r}")
        elif name == "header":
            if not isinstance(value, bool):
                problems.append(f"csv: header must be true or false, not {value!r}")
        elif name == "skip":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                problems.append(f"csv: skip must be a number of lines, not {value!r}")
        elif name == "nullstr":
            if not isinstance(value, (str, list, tuple)) or not all(isinstance(each, str) for each in value):
                problems.append(f"csv: nullstr must be a text or several, not {value!r}; in YAML, put it in quotes")
        elif not isinstance(value, str):
            problems.append(f"csv: {name} must be a text, not {value!r}")
        elif name in ("delim", "quote", "escape", "comment", "decimal_separator", "thousands") and len(value) > 1:
            problems.append(f"csv: {name} must be one character, not {value!r}")
        elif name == "delim" and not value:
            problems.append("csv: delim must be one character, not ''")
        elif name == "encoding":
            try:
                "".encode(value)  # not all codecs are of text
                codecs.getincrementaldecoder(value)("replace").decode(b"a", final=True)
            except (LookupError, ValueError):
                problems.append(f"csv: there is no encoding {value!r}; examples are utf-8, utf-16, latin-1, cp1252")
    return problems


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are meant: ``\\t`` is a tab, and a number is the text of it where text is asked for."""
    meant = dict(options)
    if meant.get("delim") == "\\t":
        meant["delim"] = "\t"
    if "nullstr" in meant:
        several = meant["nullstr"] if isinstance(meant["nullstr"], (list, tuple)) else [meant["nullstr"]]
        texts = [str(each) if type(each) in (int, float) else each for each in several]
        meant["nullstr"] = texts if len(texts) != 1 else texts[0]
    return meant


def open_plain(path: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    return cast("BinaryIO", gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def look(path: Path, name: str, options: Mapping[str, Any]) -> Dialect | None:
    """The dialect of a file; None if the file is empty. Raises StorageError if there is no telling.

    name: what to call the file in messages.
    """
    try:
        with open_plain(path) as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(name, error, "it is damaged") from None
    if kind := next((kind for mark, kind in _MAGIC if head.startswith(mark)), None):
        raise StorageError(f"{name} is {kind} by its content, not text", hint=_AS_WHAT_IT_IS)
    bom = next((encoding for mark, encoding in _BOMS if head.startswith(mark)), None)
    encoding = str(options.get("encoding") or bom or "utf-8")
    text = _decoded(head, encoding, name)
    skip = int(options.get("skip", 0))
    records = _cut_first(text, skip, options.get("comment", ""))
    if not records.strip():
        return None
    if re.match(r"\s*<(!doctype html|html|\?xml)", records[:100], re.IGNORECASE):
        raise StorageError(f"{name} is a web page or XML by its content, not a table", hint=_AS_WHAT_IT_IS)
    if "skip" not in options and (match := re.match(r"sep=(.)\r?\n", records)):  # Excel's own way to say it
        skip, records, options = 1, records[match.end() :], {"delim": match[1], **options}
    quote = str(options.get("quote", '"'))
    escape = str(options.get("escape", quote))
    delim = options.get("delim") or _delimiter(records, quote, escape)
    rows = _parse(records, delim, quote, escape, complete=len(head) < _HEAD_BYTES)
    if not rows:
        raise StorageError(
            f"{name}, line 1: the line is too long to be one of CSV, or a quote is never closed",
            hint="if quotes mean nothing in this file, say so with csv quote=''",
        )
    header = options.get("header")
    if header is None:
        header = not any(_VALUE.fullmatch(cell.strip()) for cell in rows[0])
    width = _width(rows)
    names = _names(rows[0]) if header else tuple(f"column{index}" for index in range(width))
    _check_width(name, names, rows, delim, bool(header))
    called = zip((cell.strip() for cell in rows[0]), names, strict=False) if header else ()
    nullstr = options.get("nullstr", "")
    return Dialect(
        names,
        delim,
        quote,
        escape,
        bool(header),
        "utf-8" if _is_utf8(encoding) else encoding,
        skip,
        str(options.get("comment", "")),
        (nullstr,) if isinstance(nullstr, str) else tuple(nullstr),
        Notation(
            str(options.get("decimal_separator", ".")),
            str(options.get("thousands", "")),
            options.get("timestampformat"),
            options.get("dateformat"),
        ),
        tuple((old, new) for old, new in called if old != new),
        _first_newline(records, quote) == "\r",
    )


def _first_newline(text: str, quote: str) -> str:
    """How the first line ends that does so outside of quotes."""
    mark = re.escape(quote)
    match = re.search(r"\r\n|[\r\n]", re.sub(f"{mark}[^{mark}]*{mark}", "", text) if quote else text)
    return match[0] if match else ""


_MAGIC = (
    (b"\x1f\x8b", "packed with gzip"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"BZh", "packed with bzip2"),
    (b"\xfd7zXZ", "packed with xz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet"),
    (b"%PDF", "PDF"),
    (b"SQLite format 3", "a database"),
)
_AS_WHAT_IT_IS = (
    "give it the suffix of what it is (.csv.gz of packed CSV, .parquet, .arrow), or write it out as CSV first"
)


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii")


def _decoded(head: bytes, encoding: str, name: str) -> str:
    """The beginning as text. The first line must be valid: it may name the columns."""
    try:
        text = head.decode(encoding, "replace").removeprefix("\ufeff")
    except ValueError as error:  # UTF-16 without a mark at its beginning, say
        raise StorageError(
            f"{name}, line 1, column 1: {error} (read as {encoding})",
            hint="name the encoding that the file is in, as in csv encoding=utf-16-le",
        ) from None
    if text.count("\0", 0, 4096) * 3 > len(text[:4096]):  # every second byte, of UTF-16 in a language of Latin letters
        probable = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
        raise StorageError(
            f"{name}, line 1, column 1: zero bytes: this is no text, or not in {encoding}",
            hint=f"name its encoding, as in csv encoding={probable}",
        )
    if _is_utf8(encoding):
        line = head.split(b"\n", 1)[0]
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.end < len(head):
                column = line[: error.start].count(b",") + 1
                raise StorageError(
                    f"{name}, line 1, column {column}: byte 0x{line[error.start]:02x} is not valid UTF-8",
                    hint="name the file's encoding, as in csv encoding=latin-1",
                ) from None
    return text


def _cut_first(text: str, skip: int, comment: str) -> str:
    lines = text.splitlines(keepends=True)[skip:]
    return "".join(line for line in lines if not comment or not line.startswith(comment))


def _delimiter(text: str, quote: str, escape: str) -> str:
    """The delimiter that cuts the most records into the same number of parts."""
    best, chosen = (0.5, 1), ","
    for each in _DELIMITERS:
        rows = _parse(text, each, quote, escape, complete=True)
        widths = Counter(len(row) for row in rows if row)
        if not widths:
            continue
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]))
        rank = (round(count / sum(widths.values()), 2), width)
        if width > 1 and rank > best:
            best, chosen = rank, each
    return chosen


def _parse(text: str, delim: str, quote: str, escape: str, *, complete: bool) -> list[list[str]]:
    """The first records. complete: the text is not cut off within its last one."""
    style: dict[str, Any] = {"delimiter": delim, "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE}
    if quote:
        style |= {"quotechar": quote, "doublequote": escape == quote}
        if escape and escape != quote:
            style["escapechar"] = escape
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    try:
        for row in reader:
            if row:
                rows.append(row)
            if len(rows) > _HEAD_RECORDS:
                break
        else:
            if not complete:
                rows = rows[:-1]
    except csv.Error:  # a field that never ends
        pass
    return rows


def _width(rows: Sequence[Sequence[str]]) -> int:
    return Counter(map(len, rows)).most_common(1)[0][0]


def _names(cells: Sequence[str]) -> tuple[str, ...]:
    """Unique column names: missing and repeated ones are numbered."""
    given = {cell.strip() for cell in cells}
    names: dict[str, None] = {}
    for index, cell in enumerate(cells):
        name = unique = cell.strip() or f"column{index}"
        number = 0
        while unique in names or (number and unique in given):
            number += 1
            unique = f"{name}_{number}"
        names[unique] = None
    return tuple(names)


def _check_width(name: str, names: Sequence[str], rows: Sequence[Sequence[str]], delim: str, header: bool) -> None:
    data = rows[1:] if header else rows
    mark = rows[0][0].lstrip()[:1]
    remark = f", or what lines of remarks begin with, with csv comment='{mark}'" if mark in ("#", "%", "!") else ""
    fitting = sum(len(row) == len(names) for row in data)
    if len(data) >= 2 and fitting * 2 < len(data) and fitting < sum(len(row) == _width(data) for row in data):
        raise StorageError(
            f"{name}, line 1, column {min(len(names), _width(data)) + 1}: the first line has {len(names)} "
            f"columns, and most of the others have {_width(data)} (delimiter {delim!r})",
            hint=f"say how many lines to pass over with csv skip=N, or what it is cut at with csv delim=';'{remark}",
        )


# -- reading ------------------------------------------------------------------------------------------


def readable(path: Path, dialect: Dialect, folder: Path, name: str) -> Path:
    """A file for DuckDB: the path itself (packed or not), or a copy in UTF-8 made in the folder.

    Raises StorageError naming the line that is not in the encoding.
    """
    if _is_utf8(dialect.encoding):
        return path
    target = folder / f"{path.name.removesuffix('.gz')}.utf8"
    with open_plain(path) as raw, target.open("w", encoding="utf-8", newline="") as out:
        decoder = codecs.getincrementaldecoder(dialect.encoding)()
        lines, before = 1, ""
        while True:
            block = raw.read(_NEWLINES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(dialect.encoding, "replace")
                line = (before + good).rsplit("\n", 1)[-1]
                raise StorageError(
                    f"{name}, line {lines + good.count(chr(10))}, column {line.count(dialect.delim) + 1}: "
                    f"{error.reason} (read as {dialect.encoding})",
                    hint="name the encoding that the file is in, as in csv encoding=cp1252",
                ) from None
            except UnicodeError as error:
                raise StorageError(
                    f"{name}: {error} (read as {dialect.encoding})",
                    hint="name the encoding that the file is in, as in csv encoding=utf-16-le",
                ) from None
            out.write(text.removeprefix("\ufeff"))
            lines += text.count("\n")
            before = (before + text).rsplit("\n", 1)[-1]
            if not block:
                return target


def relation(path: Path, dialect: Dialect, types: Mapping[str, str]) -> str:
    """The file as an SQL relation of all its columns; columns without a type are text. DuckDB notes its faults.

    Columns are called as in :func:`distinct_names`.
    """
    called = distinct_names(dialect.names)
    columns = ", ".join(f"{sql_text(called[name])}: {sql_text(types.get(name, 'VARCHAR'))}" for name in dialect.names)
    nulls = ", ".join(map(sql_text, dict.fromkeys(["", *dialect.nullstr])))
    parts = [
        sql_text(path),
        "auto_detect = false",
        f"columns = {{{columns}}}",
        f"delim = {sql_text(dialect.delim)}",
        f"quote = {sql_text(dialect.quote)}",
        f"escape = {sql_text(dialect.escape)}",
        f"header = {str(dialect.header).lower()}",
        f"skip = {dialect.skip}",
        f"nullstr = [{nulls}]",
        f"max_line_size = {_LINE_BYTES}",
        f"buffer_size = {_BUFFER_BYTES}",
        "store_rejects = true",
    ]
    if path.suffix.lower() == ".gz":
        parts.append("compression = 'gzip'")
    if dialect.comment:
        parts.append(f"comment = {sql_text(dialect.comment)}")
    notation = dialect.notation
    if notation.decimal != ".":
        parts.append(f"decimal_separator = {sql_text(notation.decimal)}")
    if notation.thousands:
        parts.append(f"thousands = {sql_text(notation.thousands)}")
    if notation.timestampformat:
        parts.append(f"timestampformat = {sql_text(notation.timestampformat)}")
    if notation.dateformat:
        parts.append(f"dateformat = {sql_text(notation.dateformat)}")
    return f"read_csv({', '.join(parts)})"


def check_thousands(connection: Any, path: Path, dialect: Dialect, types: Mapping[str, str], name: str) -> None:
    """Raises StorageError if a column of numbers has one with the mark of thousands elsewhere: ``1.5`` would be 15.

    name: what to call the file in messages.
    """
    mark, decimal = dialect.notation.thousands, dialect.notation.decimal
    numbers = [each for each in dialect.names if types.get(each) in ("BIGINT", "DOUBLE")]
    if not mark or not numbers:
        return
    called = distinct_names(dialect.names)
    grouped = sql_text(
        rf"\s*[-+]?\d{{1,3}}({re.escape(mark)}\d{{2,3}})*{re.escape(mark)}\d{{3}}({re.escape(decimal)}.*)?\s*"
    )
    asked = []
    for each in numbers:
        text = sql_name(called[each])
        plain = f"replace(replace({text}, {sql_text(mark)}, ''), {sql_text(decimal)}, '.')"
        asked.append(
            f"first({text}) FILTER (WHERE contains({text}, {sql_text(mark)}) "
            f"AND TRY_CAST({plain} AS DOUBLE) IS NOT NULL AND NOT regexp_full_match({text}, {grouped}))"
        )
    found = connection.execute(f"SELECT {', '.join(asked)} FROM {relation(path, dialect, {})}").fetchone()  # noqa: S608
    forget_faults(connection)
    for each, value in zip(numbers, found, strict=True):
        if value is not None:
            raise StorageError(
                f"{name}: column {each!r} holds {value!r}, where {mark!r} does not stand between thousands",
                hint=f"Mend it, or leave out csv thousands={mark}; csv types={{{each}: VARCHAR}} takes it as text",
            )


def infer_types(
    connection: Any, path: Path, dialect: Dialect, closely: Callable[[str, Kinds], bool]
) -> tuple[dict[str, Kinds], dict[str, str]]:
    """The kinds of values in the file's columns; and of columns of text the first value that makes them so.

    closely: whether all values of a column have to be looked at, given those of the first rows.
    """
    given, notation = relation(path, dialect, {}), dialect.notation
    called = distinct_names(dialect.names)
    columns = {name: Text(sql_name(called[name]), sql_name(called[name])) for name in dialect.names}
    connection.execute(f"CREATE OR REPLACE TEMP TABLE sample AS FROM {given} LIMIT {SAMPLE_ROWS}")
    found = infer(connection, "sample", columns, notation)
    odd = unlike(connection, "sample", columns, found, notation)
    count = connection.execute("SELECT count(*) FROM sample").fetchone()[0]
    connection.execute("DROP TABLE sample")
    if count >= SAMPLE_ROWS:
        looked = {name: columns[name] for name in columns if closely(name, found[name])}
        expected = {name: found[name].usual for name in looked}
        found |= infer(connection, given, looked, notation, expected=expected)
        odd |= unlike(connection, given, {name: looked[name] for name in looked if name not in odd}, found, notation)
    forget_faults(connection)
    return found, odd


def evenly(run: Callable[[Path], T], path: Path, dialect: Dialect, folder: Path) -> T:
    """The result of ``run(path)``; of a file with mixed or unusual line endings, that of a copy with usual ones."""
    import duckdb

    try:
        return run(_with_line_feeds(path, dialect, folder) if dialect.returns else path)
    except duckdb.InvalidInputException as error:
        if "state" not in str(error):
            raise
        return run(_with_line_feeds(path, dialect, folder))


def _with_line_feeds(path: Path, dialect: Dialect, folder: Path) -> Path:
    """A copy of the file, made in the folder, whose lines all end with a line feed. Quoted cells stay as they are."""
    target = folder / f"{path.name.removesuffix('.gz')}.lines"
    if target.exists():
        return target
    plain = folder / f"{path.name}.plain"
    with open_plain(path) as packed, plain.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    quote, escape = (re.escape(each.encode()) for each in (dialect.quote, dialect.escape))
    cell = b""
    if quote and escape == quote:
        cell = b"%b[^%b]*+(?:%b%b[^%b]*+)*+%b" % ((quote,) * 6)
    elif quote:
        within = b"(?:[^%b%b]|%b.)" % (quote, escape, escape) if escape else b"[^%b]" % quote
        cell = b"%b%b*+%b" % (quote, within, quote)
    starts = b"(?:\\A|(?<=[\r\n%b])) *%b|" % (re.escape(dialect.delim.encode()), cell) if cell else b""
    pattern = re.compile(starts + b"\r\n?", re.DOTALL)
    with (
        plain.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        target.open("wb") as out,
    ):
        at = 0
        for match in pattern.finditer(content):
            out.write(content[at : match.start()])
            out.write(b"\n" if match[0].startswith(b"\r") else match[0])
            at = match.end()
        out.write(content[at:])
    plain.unlink()
    return target


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that could not be read. before: how many good rows come before it."""

    line: int
    before: int
    message: str


def faults(connection: Any, path: Path, dialect: Dialect, name: str) -> Iterator[Fault]:
    """The faults that DuckDB noted while it read the file, in order. Afterwards they are forgotten."""
    if not _has_faults(connection):
        return
    found = connection.execute(
        "SELECT line, min(line_byte_position), arg_min(column_idx, column_idx), arg_min(column_name, column_idx), "
        "arg_min(error_type::VARCHAR, column_idx), arg_min(error_message, column_idx) "
        "FROM reject_errors GROUP BY line ORDER BY line"
    ).fetchall()
    forget_faults(connection)
    if not found:
        return
    first = dialect.skip + int(dialect.header) + 1
    lines = _line_numbers(path, [int(row[1]) for row in found])
    for index, ((record, _, column, title, kind, message), line) in enumerate(zip(found, lines, strict=True)):
        if title:
            title = dialect.names[column - 1]
        if match := re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message):
            expected, given = int(match[1]), int(match[2])
            column, title = min(expected, given) + 1, None
            fewer = f"the line has {given} column{'s' if given > 1 else ''}, not {expected}"
            told = fewer if given < expected else f"the line has more than {expected} columns"
        else:
            told = _told(kind, message)
        where = f"{name}, line {line}, column {column}" + (f" ({title})" if title else "")
        yield Fault(line, max(0, record - first - index), f"{where}: {told}")


def _told(kind: str, message: str) -> str:
    """The fault in our words, from DuckDB's."""
    if match := re.search(r"Could not convert string \"(.*)\" to '(.*)'", message, re.DOTALL):
        return converted(match[1], match[2])
    return {
        "UNQUOTED VALUE": "a quote is never closed, or text follows after it; what it opens is lost up to its end; if "
        "lines after it are missing, mend it and score again with --overwrite"
        + ("; if a backslash stands before quotes, csv escape='\\'" if '\\"' in message else ""),
        "INVALID ENCODING": "not valid UTF-8; name the file's encoding, as in csv encoding=latin-1",
        "LINE SIZE OVER MAXIMUM": f"the line is longer than {_LINE_BYTES:,} bytes",
    }.get(kind, " ".join(message.split()))


def converted(value: str, kind: str) -> str:
    """What to say of a value that is not of its column's type, and the option that helps, if there is one."""
    found = advice(value, kind)
    return f"could not convert {value[:100]!r} to {kind}" + (f"; {found}" if found else "")


_NOTHING = re.compile(r"(?i)#?n[/.]?a|null|none|nil|missing|[-?.]{1,3}|<na>|\\N")
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?|[-+]?\d{1,3}(,\d{3}){2,}")
_FORMATS = (
    *("%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y"),
    *("%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y", "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p"),
    *("%Y%m%d%H%M%S", "%Y%m%d %H%M%S", "%Y%m%dT%H%M%S", "%Y%m%d", "%d-%b-%Y %H:%M:%S", "%d %b %Y %H:%M:%S"),
)


def advice(value: str, kind: str) -> str | None:
    """The option for CSV with which a value would be one of a DuckDB type, if there is one."""
    text = value.strip()
    if _NOTHING.fullmatch(text):
        return f"csv nullstr={value} makes it a missing value"
    if kind in ("BIGINT", "DOUBLE"):
        if _THOUSANDS.fullmatch(text) and ("." in text or text.count(",") > 1):
            return "csv thousands=, reads it as a number"
        if _DECIMAL_COMMA.fullmatch(text):
            return "csv decimal_separator=, reads it as a number"
    elif kind in ("TIMESTAMP", "TIMESTAMPTZ", "DATE"):
        for form in _FORMATS:
            with suppress(ValueError):
                datetime.strptime(text, form)  # noqa: DTZ007  # only whether it fits
                option = "dateformat" if kind == "DATE" else "timestampformat"
                return f"csv {option}='{form}' reads it, if the day and the month are meant so"
    return None


def _line_numbers(path: Path, positions: Sequence[int]) -> list[int]:
    """The line number of each byte position. Positions ascend and count from 1."""
    numbers: list[int] = []
    with open_plain(path) as file:
        newline = b"\n" if b"\n" in file.read(_HEAD_BYTES) else b"\r"
        file.seek(0)
        at, line = 0, 1
        block = b""
        for position in positions:
            target = position - 1
            while True:
                step = min(len(block), target - at)
                line += block.count(newline, 0, step)
                at, block = at + step, block[step:]
                if at >= target or not (block := file.read(_NEWLINES)):
                    break
            # DuckDB may point at the line feed before the line.
            numbers.append(line + (block[:1] == newline))
    return numbers


def digest_without(path: Path, lines: Collection[int]) -> str:
    """Of a text file's lines, but for those of these numbers, which count from 1. Line endings do not count."""
    left_out = sorted(lines, reverse=True)
    digest, number = hashlib.sha256(), 1
    with open_plain(path) as file:
        while block := file.read(_NEWLINES):
            block = (block + file.readline()).replace(b"\r\n", b"\n").removesuffix(b"\n")
            count = block.count(b"\n") + 1
            if left_out and left_out[-1] < number + count:
                kept = block.split(b"\n")
                while left_out and left_out[-1] < number + count:
                    kept[left_out.pop() - number] = b"\0"
                block = b"\n".join(kept)
            digest.update(block + b"\n")
            number += count
    return digest.hexdigest()[:32]


def _has_faults(connection: Any) -> bool:
    return bool(
        connection.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'").fetchone()[0]
    )


def forget_faults(connection: Any) -> None:
    connection.execute("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans")
