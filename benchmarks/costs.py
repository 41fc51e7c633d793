"""A year of five loads, simulated: machines that always run, beside workers that come from none and go again.

    python benchmarks/costs.py [--worker 10] [--node 240] [--keep 600] [--seed 1]

--worker: seconds from the first item in the queue to the first that is committed, once a machine is there, as
tests/integration/test_scale_to_zero.py prints them (TALLY_TEST_FULL=1 pytest -s). --node: seconds that a cloud takes to
bring a machine. --keep: seconds that it keeps one that nobody uses.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from _machine import introduce

HOURS = 365 * 24
IDLE = 60.0 + 60.0
"""Seconds until Tally gives back workers that have nothing to do, and then Ray's autoscaler its pods."""
BASE = 0.096
"""What the small machine costs for an hour that always runs: server, database, Ray's head."""

CAVEATS = """
A simulation: arrivals are drawn by chance (--seed) after what the original systems were made for, work is taken from
what their machines did, prices are list prices as their authors paid them, or close to that: ratios count, not sums.

Each load runs alone, with a small machine of its own (0.096 an hour) that always runs. Several loads share it.

Machines are paid from when they are asked for until they are given back, start-up and waiting included. Nothing is
assumed of spot prices, reserved machines, or storage, which cost the same either way.
"""

Arrival = tuple[float, float]
"""Hours since the year began, and worker-hours of work."""


@dataclass(frozen=True)
class Load:
    """always: machines that the original kept. most: machines at once, without them. price: of one, for an hour."""

    name: str
    what: str
    always: int
    most: int
    price: float
    arrivals: Callable[[random.Random], Iterator[Arrival]]


def uploads(chance: random.Random) -> Iterator[Arrival]:
    """Six clips on a working day, by day, of 10 s to 5 min with 30 frames a second; a machine restyles 15 a second."""
    for day in (day for day in range(365) if day % 7 < 5):
        for _ in range(6):
            frames = chance.uniform(10, 300) * 30
            yield day * 24 + chance.uniform(8, 18), frames / 15 / 3600


def trainings(chance: random.Random) -> Iterator[Arrival]:
    """A retraining each night of half an hour, and each Monday a sweep of nine trials."""
    for day in range(365):
        yield day * 24 + 2.0, chance.uniform(0.4, 0.6)
        if day % 7 == 0:
            yield day * 24 + 9.0, 9 * chance.uniform(0.4, 0.6)


def cameras(chance: random.Random) -> Iterator[Arrival]:
    """Pictures of cameras on rivers, in bursts while the sun is up: 40 each half hour, 2 a second."""
    for half in range(365 * 48):
        if 6 <= (half / 2) % 24 < 20:
            yield half / 2 + chance.uniform(0, 0.1), 40 / 2 / 3600


def injections(chance: random.Random) -> Iterator[Arrival]:
    """A folder of 20,000 pictures, twice a month, at 2 a second on each machine."""
    for month in range(12):
        for _ in range(2):
            yield month * 730 + chance.uniform(0, 700), 20_000 / 2 / 3600


def sensors(chance: random.Random) -> Iterator[Arrival]:
    """Each hour: 15 detectors are trained, and score the hour before, for two minutes in all."""
    for hour in range(HOURS):
        yield hour + 0.0, chance.uniform(100, 140) / 3600


LOADS = (
    Load("style", "videos restyled on upload", 5, 5, 3.06, uploads),
    Load("retrain", "nightly retraining, weekly sweep", 3, 9, 0.90, trainings),
    Load("dispatch", "pictures of cameras, routed to models", 3, 3, 0.526, cameras),
    Load("coco", "folders of pictures, in bursts", 10, 20, 0.0486 * 2, injections),
    Load("anomalies", "15 detectors, hourly", 2, 2, 0.096, sensors),
)


@dataclass
class Year:
    """hours: of machines, of which work: doing something. first: of each piece of work, hours until its first result.
    starts: machines brought."""

    hours: float = 0.0
    work: float = 0.0
    starts: int = 0
    first: tuple[float, ...] = ()


def simulate(load: Load, seed: int, *, worker: float, node: float, keep: float) -> Year:
    """Machines come when work does, as many as it is worth, and go when they were idle for long enough."""
    year, waits = Year(), []
    warm: list[tuple[float, float]] = []  # when each machine is free, and since when it is paid
    idle = (IDLE + keep) / 3600
    for begin, work in sorted(load.arrivals(random.Random(seed))):
        for free, since in [each for each in warm if each[0] + idle < begin]:
            year.hours += free + idle - since
            warm.remove((free, since))
        # A machine is brought for each quarter of an hour of work that those there do not do.
        wanted = min(load.most, max(1, round(work * 4)))
        ready = [(max(free, begin) + worker / 3600, since) for free, since in heapq.nsmallest(wanted, warm)]
        taken = {since: free for free, since in heapq.nsmallest(wanted, warm)}
        warm = [each for each in warm if taken.get(each[1]) != each[0]]
        while len(ready) < wanted and len(ready) + len(warm) < load.most:
            # Machines that are asked for at one moment are told apart by when they are paid from.
            ready.append((begin + (node + worker) / 3600, begin + len(ready) * 1e-9))
            year.starts += 1
        waits.append(min(free for free, _ in ready) - begin)
        year.work += work
        # Chunks are small: all that are there end at about the same time.
        end = (work + sum(free for free, _ in ready)) / len(ready)
        warm += [(max(end, free), since) for free, since in ready]
    year.hours += sum(free + idle - since for free, since in warm)
    year.first = tuple(sorted(waits))
    return year


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=float, default=10.0)
    parser.add_argument("--node", type=float, default=240.0)
    parser.add_argument("--keep", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    introduce("costs", CAVEATS)
    print(f"\na worker {given.worker:g} s, a machine {given.node:g} s, kept for {given.keep:g} s; a year, USD")
    head = (
        "load",
        "always on",
        "from none",
        "ratio",
        "machine-h",
        "of",
        "used",
        "starts",
        "first result, median / 95 %",
    )
    print("  {:10} {:>10} {:>10} {:>6} {:>10} {:>8} {:>6} {:>7}  {}".format(*head))
    sums = [0.0, 0.0]
    for load in LOADS:
        year = simulate(load, given.seed, worker=given.worker, node=given.node, keep=given.keep)
        always = load.always * HOURS * load.price + HOURS * BASE
        zero = year.hours * load.price + HOURS * BASE
        sums = [sums[0] + always, sums[1] + zero]
        middle, late = (year.first[int(len(year.first) * share)] * 3600 for share in (0.5, 0.95))
        print(
            f"  {load.name:10} {always:10,.0f} {zero:10,.0f} {zero / always:6.2f} {year.hours:10,.0f} "
            f"{load.always * HOURS:8,} {year.work / load.always / HOURS:6.1%} {year.starts:7,}  "
            f"{middle:.0f} s / {late:.0f} s"
        )
    print(f"  {'all':10} {sums[0]:10,.0f} {sums[1]:10,.0f} {sums[1] / sums[0]:6.2f}")
    print(
        "\nratio, and median time to the first result, where the cloud keeps unused machines for longer or not at all"
    )
    for keep in (0.0, 600.0, 3600.0):
        told = []
        for load in LOADS:
            year = simulate(load, given.seed, worker=given.worker, node=given.node, keep=keep)
            ratio = (year.hours * load.price + HOURS * BASE) / (load.always * HOURS * load.price + HOURS * BASE)
            told.append(f"{load.name} {ratio:.2f} ({year.first[len(year.first) // 2] * 3600:.0f} s)")
        print(f"  {keep:5.0f} s  {'  '.join(told)}")


if __name__ == "__main__":
    main()
