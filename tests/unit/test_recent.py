"""What an endpoint's page says of the last minutes."""

from __future__ import annotations

import random

import pytest

from tally.serving.recent import Recent


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_has_happened(clock: Clock) -> None:
    assert Recent(clock).figures() == {
        "per": 5.0, "rates": [], "rate": 0.0, "requests": 0, "failed": 0, "seconds": None, "rows": None, "sizes": [],
    }  # fmt: skip


def test_percentiles_are_within_five_percent(clock: Clock) -> None:
    recent, chance = Recent(clock), random.Random(1)
    latencies = sorted(chance.lognormvariate(-4, 1) for _ in range(5000))
    for each in latencies:
        recent.request(each, 200)
    told = recent.figures()["seconds"]
    for share, found in zip((0.5, 0.95, 0.99), told, strict=True):
        assert found == pytest.approx(latencies[int(share * 5000) - 1], rel=0.055)


def test_one_request_and_extremes(clock: Clock) -> None:
    recent = Recent(clock)
    recent.request(0.02, 200)
    assert recent.figures()["seconds"] == [pytest.approx(0.02, rel=0.055)] * 3
    recent.request(0.0, 200)
    recent.request(10_000.0, 504)
    figures = recent.figures()
    assert figures["failed"] == 1
    assert figures["seconds"][2] > 100


def test_rates_and_what_is_forgotten(clock: Clock) -> None:
    recent = Recent(clock)
    for _ in range(10):
        recent.request(0.01, 200)
    clock.now += 10
    recent.request(0.01, 429)
    assert recent.figures()["rates"] == [2.0, 0.0]
    assert recent.figures()["rate"] == 1.1
    assert recent.figures()["failed"] == 1
    clock.now += 291  # the first stretch is more than five minutes old
    figures = recent.figures()
    assert figures["requests"] == 1
    assert len(figures["rates"]) == 59
    assert figures["rates"][1] == 0.2
    clock.now += 3600
    assert recent.figures()["requests"] == 0
    assert recent.figures()["seconds"] is None


def test_sizes_of_batches(clock: Clock) -> None:
    recent = Recent(clock)
    for rows in (0, 1, 2, 3, 4, 5, 16):
        recent.batch(rows)
    assert recent.figures()["sizes"] == [2, 1, 2, 1, 1]
    assert recent.figures()["rows"] == round(31 / 7, 2)
    recent.batch(1 << 30)
    assert recent.figures()["sizes"][-1] == 1
