"""Spreadsheets of Excel as JSON Lines, row by row, with openpyxl (an extra)."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tally.errors import SpecError, StorageError
from tally.sources.tables.damage import TWICE, damaged


def lines_of(path: Path, name: str, target: Path) -> None:
    """Write the rows of the only sheet with cells as JSON Lines.

    Line n is row n of the sheet, so that faults tell their row; rows without values, and that of the names, are empty
    lines. Numbers, texts, truth and times stay what they are. A cell with an error is its text (``#DIV/0!``), and a
    formula without a result is the formula's text: both are faults of their row in a column of numbers.
    Raises StorageError if it cannot be read, or has several sheets.
    """
    with _opened(path, name) as (values, formulas), target.open("w", encoding="utf-8") as out:
        sheet = _sheet(values, name)
        names: list[str | None] = []
        for row, written in zip_longest(
            values[sheet].iter_rows(), formulas[sheet].iter_rows(values_only=True), fillvalue=()
        ):
            cells = [_value(cell, formula) for cell, formula in zip(row, written, strict=False)]
            filled = any(value is not None for value in cells)
            if names or not filled:
                out.write(_line(names, cells, name, row) if filled else "\n")
            else:
                names = _names(cells, name)
                out.write("\n")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """The workbook with the values of its formulas, and with the formulas themselves."""
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise SpecError(
            f"{name} is a spreadsheet, which is read with openpyxl, and that is not installed",
            hint="pip install 'tally-scoring[excel]', or save its sheet as CSV",
        ) from None
    books = []
    try:
        with path.open("rb") as one, path.open("rb") as other, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what only matters to who would write the file again
            for file, data in ((one, True), (other, False)):
                books.append(openpyxl.load_workbook(file, read_only=True, data_only=data))
            yield books[0], books[1]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, SyntaxError) as error:
        if isinstance(error, StorageError):
            raise
        raise damaged(name, error, "it is no Excel file, or damaged") from None
    finally:
        for book in books:
            book.close()


def _sheet(book: Any, name: str) -> str:
    """The sheet to read. Raises StorageError if there are several with cells."""
    filled = [
        sheet.title
        for sheet in book.worksheets
        if sheet.sheet_state == "visible"
        and any(any(cell is not None for cell in row) for row in sheet.iter_rows(max_row=100, values_only=True))
    ]
    if len(filled) > 1:
        raise StorageError(
            f"{name} has {len(filled)} sheets ({', '.join(filled[:5])}), and one table is read",
            hint="Save the sheet that is meant as a file of its own, or as CSV.",
        )
    if not filled and not book.worksheets:
        raise StorageError(f"{name} has no sheet with cells", hint="Save the sheet that is meant as CSV.")
    return str(filled[0] if filled else book.worksheets[0].title)


def _value(cell: Any, formula: Any) -> Any:
    """What a cell holds, as JSON knows it. formula: what is written in it."""
    value = cell.value
    if value is None and isinstance(formula, str) and formula.startswith("="):
        return formula  # nobody has calculated it
    if isinstance(value, datetime):
        return value.isoformat(sep=" ")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _names(cells: Sequence[Any], name: str) -> list[str | None]:
    names = [None if cell is None else str(cell).strip() for cell in cells]
    given = [each for each in names if each]
    if twice := [each for each in given if given.count(each) > 1]:
        raise StorageError(f"{name} has two columns of the name {twice[0]!r}", hint=TWICE)
    if numbers := [cell for cell in cells if isinstance(cell, (int, float))]:
        raise StorageError(
            f"{name}: its first row names the columns, and holds the number {numbers[0]}",
            hint="Write the columns' names above the values.",
        )
    return names


def _line(names: Sequence[str | None], cells: Sequence[Any], name: str, row: Sequence[Any]) -> str:
    wide = next((at for at, value in enumerate(cells) if value is not None and not _at(names, at)), None)
    if wide is not None:
        cell = row[wide]
        raise StorageError(
            f"{name}: cell {cell.coordinate} holds {cells[wide]!r}, and its column has no name",
            hint="Write a name into the first row above it, or empty the cell.",
        )
    filled = {each: value for each, value in zip(names, cells, strict=False) if each}
    every = {each: filled.get(each) for each in names if each}
    return json.dumps(every, ensure_ascii=False) + "\n"


def _at(names: Sequence[str | None], at: int) -> str | None:
    return names[at] if at < len(names) else None
