"""Synthetic sensor readings for trials: daily rhythms, drift, noise, and labelled anomalies.

A reading depends only on the seed, its sensor and its number in time. So any part of any series can be made by
itself: files of any size take the same memory, and the first hour is the same in a file of a day and of a year.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import OutputExistsError, SpecError
from tally.storage import failure

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 1 << 19
"""Readings that are made in one block."""
PART_ROWS = 8_000_000
"""Rows of one file of a folder."""
SPAN = 64
"""In each span of this many readings of a sensor, at most one anomaly and one gap begin, and they end in it."""
KINDS = ("spike", "shift", "stuck", "dropout")
"""One reading far off; some on another level; one value repeated; zeros."""
_LONGEST = np.array([1, 24, 24, 12])
_MEAN_LENGTH = float(((1 + _LONGEST) / 2).mean())
_GAP_LONGEST = 15
MAX_ANOMALIES, MAX_GAPS, MAX_DISORDER = 0.1, 0.1, 0.5

_DAY = 86_400_000
"""Milliseconds."""
_NOISE, _EPISODE, _SHAPE, _GAP, _DISORDER, _SENSOR = range(6)
"""The purposes of random numbers: each has its own stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The readings to make. Raises SpecError with every problem, OutputExistsError.

    out: a folder of Parquet parts, or a ``.parquet`` or ``.csv`` file; it must not exist.
    every: seconds between two readings of a sensor.
    anomalies, gaps, disorder: approximate shares of readings that are anomalous, missing, and sent twice or with a
        clock that was set back.
    labels: a file for the labels of the anomalous readings; it has no other rows.
    """

    out: Path
    devices: int = 10
    sensors: int = 5
    hours: float = 24.0
    every: float = 60.0
    start: datetime = datetime(2026, 1, 1)  # noqa: DTZ001 - the readings' own clock
    anomalies: float = 0.001
    gaps: float = 0.001
    disorder: float = 0.0
    seed: int = 1
    labels: Path | None = None

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: at least 1, not {value}"
            for name, value in (("devices", self.devices), ("sensors", self.sensors))
            if value < 1
        ]
        problems += [
            f"--{name}: 0 to {most:.0%}, not {value:g}"
            for name, value, most in (
                ("anomalies", self.anomalies, MAX_ANOMALIES),
                ("gaps", self.gaps, MAX_GAPS),
                ("disorder", self.disorder, MAX_DISORDER),
            )
            if not 0 <= value <= most
        ]
        if not 0.001 <= self.every < float("inf"):
            problems.append(f"--every: at least 1 ms, not {self.every:g} s")
        elif not 0 < self.hours < 1e7 or not self.ticks:
            problems.append(f"--hours: enough for one reading, and fewer than ten million, not {self.hours:g}")
        if self.seed < 0:
            problems.append(f"--seed: 0 or more, not {self.seed}")
        if self.labels is not None and self.labels.suffix.lower() not in (".parquet", ".csv"):
            problems.append(f"--labels: a .parquet or .csv file, not {self.labels.name!r}")
        if self.labels == self.out:
            problems.append("--labels: is the file of the readings")
        if problems:
            raise SpecError(problems)
        for path in (self.out, self.labels):
            if path is not None and (path.exists() or path.is_symlink()):
                raise OutputExistsError(f"{path} is there already", hint="Choose another place, or remove it first.")

    @property
    def ticks(self) -> int:
        """Readings of one sensor, missing ones included."""
        return int(self.hours * 3600 / self.every + 1e-9)

    def write(self) -> dict[str, int]:
        """Write the files, which appear when they are complete. Returns the numbers of ``rows`` and ``anomalies``.

        Raises StorageError.
        """
        counts = {"rows": 0, "anomalies": 0}
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            try:
                with ExitStack() as stack:
                    rows = stack.enter_context(_Writer(partial / "out", _suffix(self.out)))
                    labels = None
                    if self.labels is not None:
                        labels = stack.enter_context(_Writer(partial / "labels", _suffix(self.labels)))
                    for table, labelled in self.tables():
                        counts["rows"] += table.num_rows
                        counts["anomalies"] += labelled.num_rows
                        rows.write(table)
                        if labels is not None:
                            labels.write(labelled)
                if self.labels is not None:
                    self.labels.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(partial / "labels", self.labels)
                (partial / "out").rename(self.out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise failure("write", str(self.out), error) from error
        return counts

    def tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Readings in the order of arrival, and the labels of the anomalous ones among them.

        TS: timestamp[ms], Device: int32 from 1, Tag: int32 from 1, Value: float64; and TS, Device, Tag, Kind.
        """
        keys = self.devices * self.sensors
        ticks = max(1, BLOCK_ROWS // keys)
        for tick in range(0, self.ticks, ticks):
            for key in range(0, keys, BLOCK_ROWS):
                some = np.arange(key, min(keys, key + BLOCK_ROWS), dtype=np.int64)
                yield _Block(self, tick, min(ticks, self.ticks - tick), some).tables()


class _Block:
    """Readings of some sensors (``keys int64[k]``) at ``count`` times from ``tick`` on: arrays ``[count, k]``."""

    def __init__(self, given: Readings, tick: int, count: int, keys: np.ndarray[Any, Any]) -> None:
        self.given, self.tick, self.count, self.keys = given, tick, count, keys
        self.sensors = _Sensors(given, keys)

    def tables(self) -> tuple[pa.Table, pa.Table]:
        import pyarrow as pa

        given, shape = self.given, (self.count, len(self.keys))
        ticks = np.arange(self.tick, self.tick + self.count)
        values = self.sensors.values(ticks[:, None], self.keys[None, :])
        kinds = self._anomalies(values)
        present, times, backward = self._present(), _times(given, ticks), None
        columns = {
            "TS": np.broadcast_to(times[:, None], shape),
            "Device": np.broadcast_to((self.keys // given.sensors + 1).astype(np.int32), shape),
            "Tag": np.broadcast_to((self.keys % given.sensors + 1).astype(np.int32), shape),
            "Value": values,
        }
        flat = {name: np.ascontiguousarray(column).reshape(-1) for name, column in columns.items()}
        rows = None if present is None else np.flatnonzero(present)
        if given.disorder:
            rows, backward = self._disorder(np.arange(values.size) if rows is None else rows)
        if rows is not None:
            flat = {name: column[rows] for name, column in flat.items()}
        if backward is not None:
            flat["TS"] = flat["TS"] - (backward * given.every * 1000).astype("timedelta64[ms]")
        unit = "s" if _suffix(given.out) == ".csv" and given.every % 1 == 0 and not given.start.microsecond else "ms"
        flat["TS"] = flat["TS"].astype(f"datetime64[{unit}]")
        found = kinds.reshape(-1) if rows is None else kinds.reshape(-1)[rows]
        where = np.flatnonzero(found)
        named = {name: column[where] for name, column in flat.items() if name != "Value"}
        return pa.table(flat), pa.table({**named, "Kind": pa.array(np.array(KINDS)[found[where] - 1], pa.string())})

    def _episodes(self, purpose: int, share: float, longest: Any, mean: float) -> tuple[np.ndarray[Any, Any], ...]:
        """Runs of readings that begin at random; one entry for each reading of the block that is in a run.

        Returns its row, its column, the number in time at which the run began, the run's random number, and the index
        of its kind. longest: the greatest length of each kind. mean: the mean length of all.
        """
        spans = np.arange(self.tick // SPAN, (self.tick + self.count - 1) // SPAN + 1)
        chances = _random(self.given.seed, purpose, spans[:, None], self.keys[None, :])
        which = np.nonzero(_uniform(chances) < share * SPAN / mean)
        drawn = _random(self.given.seed, _SHAPE + 16 * purpose, spans[which[0]], self.keys[which[1]])
        kind = (drawn % len(longest)).astype(np.int64)
        lengths = 1 + (drawn >> np.uint64(8)) % np.asarray(longest)[kind].astype(np.uint64)
        lengths = lengths.astype(np.int64)
        first = spans[which[0]] * SPAN + ((drawn >> np.uint64(32)) % (SPAN - lengths + 1).astype(np.uint64)).astype(
            np.int64
        )
        entry = np.repeat(np.arange(len(lengths)), lengths)
        ticks = first[entry] + np.arange(len(entry)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = (ticks >= self.tick) & (ticks < self.tick + self.count)
        entry, ticks = entry[inside], ticks[inside]
        return ticks - self.tick, which[1][entry], first[entry], drawn[entry], kind[entry]

    def _anomalies(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Put anomalies into the values. Returns for each value 0, or 1 + the index of its kind in KINDS."""
        kinds = np.zeros(values.shape, np.int8)
        if not self.given.anomalies:
            return kinds
        row, column, first, drawn, kind = self._episodes(_EPISODE, self.given.anomalies, _LONGEST, _MEAN_LENGTH)
        sign = np.where(drawn >> np.uint64(63), 1.0, -1.0)
        size = (1.0 + _uniform(drawn << np.uint64(20))) * self.sensors.reach[column]
        held = self.sensors.values(first, self.keys[column], column)
        there = values[row, column]
        values[row, column] = np.choose(kind, [there + 2 * sign * size, there + sign * size, held, np.zeros_like(held)])
        kinds[row, column] = kind + 1
        return kinds

    def _present(self) -> np.ndarray[Any, Any] | None:
        """Which readings are not in a gap; None: all of them."""
        if not self.given.gaps:
            return None
        row, column, *_ = self._episodes(_GAP, self.given.gaps, [_GAP_LONGEST], (1 + _GAP_LONGEST) / 2)
        present = np.ones((self.count, len(self.keys)), bool)
        present[row, column] = False
        return present

    def _disorder(self, rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows, some of them repeated; and by how many readings the clock of each was set back."""
        ticks, keys = np.divmod(rows, len(self.keys))
        drawn = _random(self.given.seed, _DISORDER, ticks + self.tick, self.keys[keys])
        struck = _uniform(drawn) < self.given.disorder
        twice = struck & (drawn & np.uint64(1) == 0)
        back = np.where(struck & ~twice, (drawn >> np.uint64(1)) % np.uint64(3) + np.uint64(1), 0)
        times = np.where(twice, 2, 1)
        return np.repeat(rows, times), np.repeat(back, times)


class _Sensors:
    """The parameters of each sensor. ``keys int64[k]``."""

    def __init__(self, given: Readings, keys: np.ndarray[Any, Any]) -> None:
        self.given = given
        parts = [_uniform(_random(given.seed, _SENSOR, np.int64(part), keys)) for part in range(5)]
        level = 20.0 + 180.0 * parts[0]
        rhythm = level * (0.03 + 0.12 * parts[1])
        self.noise = rhythm * (0.05 + 0.15 * parts[2])
        phase = 2 * np.pi * parts[3]
        drift = rhythm * 0.02 * (2 * parts[4] - 1)  # per day
        self.reach = rhythm + 4 * self.noise
        """How far values usually stray from their level."""
        self.factors = np.stack([level, rhythm * np.cos(phase), rhythm * np.sin(phase), drift])

    def values(
        self, ticks: np.ndarray[Any, Any], keys: np.ndarray[Any, Any], columns: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Values ``float64`` for every time and sensor (``ticks[t, 1]``, ``keys[1, k]``), or for pairs of both.

        columns: for pairs, the index of each one's sensor.
        """
        since = ticks * (self.given.every * 1000)
        angle = (since + _since_midnight(self.given.start)) * (2 * np.pi / _DAY)
        basis = np.stack([np.ones_like(angle), np.sin(angle), np.cos(angle), since / _DAY])
        noise = _normal(_random(self.given.seed, _NOISE, ticks, keys))
        if columns is None:
            columns = np.arange(len(self.noise))
        values = noise * self.noise[columns]
        # Not BLAS: its order of summation depends on the size of the matrix, which changes the last digit.
        for times, factors in zip(basis, self.factors[:, columns], strict=True):
            values += times * factors
        values *= 1000.0  # the resolution of the sensors
        np.rint(values, out=values)
        values /= 1000.0
        return values


class _Writer(AbstractContextManager["_Writer"]):
    """Writes tables into one ``.csv`` or ``.parquet`` file, or (suffix ``""``) into the Parquet parts of a folder."""

    def __init__(self, path: Path, suffix: str) -> None:
        self.path, self.suffix = path, suffix
        self.writer: Any = None
        self.rows = self.parts = 0
        if not suffix:
            path.mkdir()

    def write(self, table: pa.Table) -> None:
        while table.num_rows or self.writer is None:
            if self.writer is None:
                self.writer = self._open(table.schema)
            room = PART_ROWS - self.rows if not self.suffix else table.num_rows
            self._append(table.slice(0, room))
            self.rows += min(room, table.num_rows)
            table = table.slice(room)
            if not self.suffix and self.rows == PART_ROWS:
                self._close()

    def _append(self, table: pa.Table) -> None:
        if self.suffix == ".csv":
            self.writer.write_table(table)
        else:
            self.writer.write_table(table, row_group_size=BLOCK_ROWS)

    def _open(self, schema: pa.Schema) -> Any:
        if self.suffix == ".csv":
            from pyarrow import csv

            return csv.CSVWriter(self.path, schema, write_options=csv.WriteOptions(quoting_style="none"))
        from pyarrow import parquet

        path = self.path if self.suffix else self.path / f"readings-{self.parts:05d}.parquet"
        return parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=_REPEATED)

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer, self.rows, self.parts = None, 0, self.parts + 1

    def __exit__(self, *exception: object) -> None:
        self._close()


_REPEATED = ["TS", "Device", "Tag", "Kind"]


def _suffix(path: Path) -> str:
    """``.csv``, ``.parquet``, or ``""`` for a folder."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".csv", ".parquet") else ""


def _times(given: Readings, ticks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The times ``datetime64[ms]`` of readings by their number."""
    return np.datetime64(given.start, "ms") + np.rint(ticks * (given.every * 1000)).astype("timedelta64[ms]")


def _since_midnight(moment: datetime) -> float:
    """In milliseconds."""
    return (moment - moment.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds() * 1000


def _random(seed: int, purpose: int, ticks: Any, keys: Any) -> np.ndarray[Any, Any]:
    """Random ``uint64`` for each time and sensor, broadcast: SplitMix64's output function applied to a counter.

    https://prng.di.unimi.it/splitmix64.c
    """
    with np.errstate(over="ignore"):
        salt = _mixed(np.array([seed * 64 + purpose], np.uint64))[0]
        stride, golden = np.uint64(0xD1342543DE82EF95), np.uint64(0x9E3779B97F4A7C15)
        lines = _mixed(np.asarray(keys, np.uint64) * golden + salt)
        return _mixed(lines + np.asarray(ticks, np.uint64) * stride)


def _mixed(state: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``state`` is overwritten."""
    state = np.atleast_1d(state)
    spare = np.empty_like(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(state, np.uint64(shift), out=spare)
        np.bitwise_xor(state, spare, out=state)
        if factor is not None:
            np.multiply(state, np.uint64(factor), out=state)
    return state


def _uniform(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``float64`` in 0..1 from the upper bits."""
    return np.asarray((numbers >> np.uint64(11)) * 2.0**-53)


def _normal(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Nearly normal ``float64`` of mean 0 and deviation 1: the sum of four numbers of 16 bits, within ±3.46."""
    pairs = np.right_shift(numbers, np.uint64(16))
    pairs &= np.uint64(0x0000FFFF0000FFFF)
    numbers &= np.uint64(0x0000FFFF0000FFFF)
    pairs += numbers
    total = np.right_shift(pairs, np.uint64(32))
    pairs &= np.uint64(0xFFFFFFFF)
    total += pairs
    values: np.ndarray[Any, Any] = total.astype(np.float64)
    values -= 2.0 * 65_535
    values *= 1.0 / (65_536 * (4 / 12) ** 0.5)
    return values
