"""What ``-p NAME=...`` says, and what is drawn from it."""

from __future__ import annotations

from typing import Any

import pytest

from tally.errors import SpecError
from tally.training.sweeps import sampling
from tally.training.sweeps.sampling import Judge, Past, judged_against
from tally.training.sweeps.space import Choices, Range, combinations, dimension, read


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("25,50,100", None, Choices((25, 50, 100))),
        ("25,50", float, Choices((25.0, 50.0))),
        ("sgd, adam", None, Choices(("sgd", "adam"))),
        ("true,false", None, Choices((True, False))),
        ("1,2", str, Choices(("1", "2"))),
        ("007,1_000,1.10,True", None, Choices(("007", "1_000", "1.10", "True"))),
        ("1e-4,2.0,0.00001,-3", None, Choices((1e-4, 2.0, 1e-5, -3))),
        ("a..b", None, Choices(("a..b",))),
        ("log:1e-4..1", float, Range(1e-4, 1.0, log=True)),
        ("LOG:1..1000", None, Range(1, 1000, log=True)),
        ("0..1", float, Range(0.0, 1.0)),
        ("1..8", None, Range(1, 8)),
        ("-1...5", None, Range(-1.0, 0.5)),
        ("100..500:100", int, Range(100, 500, 100)),
        ("0.1..0.5:0.2", None, Range(0.1, 0.5, 0.2)),
    ],
)
def test_a_text_is_read(text: str, kind: Any, found: object) -> None:
    assert dimension(text, kind) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate", "-p rate: should be NAME=VALUES"),
        ("=3", "-p =3: should be NAME=VALUES"),
        ("rate=5..1", "the range ends at 1, which is not above 5"),
        ("rate=log:0..1", "a logarithmic range begins above 0, not at 0"),
        ("rate=log:1..9:2", "a logarithmic range has no steps"),
        ("rate=1..x", "'x' is not a number"),
        ("rate=1..inf", "'inf' is not finite"),
        ("rate=1..9:0", "a step is more than 0, and no more than the range: not 0"),
        ("rate=1,,2", "a value is empty"),
        ("rate=1,2,1", "a value is there twice"),
        ("rate=fast", "'fast' is not a number"),
        ("size=1.5,2", "'1.5' is not a whole number"),
        ("size=1..2.5", "it takes whole numbers"),
        ("flag=maybe", "'maybe' is neither true nor false"),
        ("flag=0..1", "a range is of numbers"),
        ("rats=1", "there is no such parameter; did you mean 'rate'?; there are flag, rate, size"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        read([text], {"rate": float, "size": int, "flag": bool})
    assert said in str(error.value)
    assert "-p learning_rate=log:1e-4..1" in str(error.value)


def test_a_grid_has_every_combination() -> None:
    space = read(["a=1,2", "b=0.1..0.3:0.1", "c=1..2"])
    assert len(combinations(space)) == 12
    assert combinations(space)[1] == {"a": 1, "b": 0.1, "c": 2}
    assert sampling.count("grid", space, None) == 12
    with pytest.raises(SpecError, match="-p rate: a grid needs values or steps"):
        combinations(read(["rate=0.1..1"]))


def test_what_is_drawn_follows_from_the_seed_and_the_number() -> None:
    space = read(["rate=log:1e-4..1", "size=25,50,100", "count=1..9"])

    def drawn(sampler: Any, number: int, past: list[Past], seed: int = 1) -> dict[str, Any]:
        return sampling.draw(sampler, space, seed=seed, number=number, past=past, lowest=True)

    ten = [drawn("random", number, []) for number in range(10)]
    past = [Past(each, "finished", value=each["rate"]) for each in ten] + [Past(ten[0]), Past(ten[1], "failed")]
    assert ten == [drawn("random", number, past) for number in range(10)]
    assert len({each["rate"] for each in ten}) == 10
    assert ten[1] != drawn("random", 0, [], seed=2)
    learnt = [drawn("tpe", number, past)["rate"] for number in range(10, 30)]
    assert sum(learnt) / 20 < sum(each["rate"] for each in ten) / 10  # the lowest was the best
    assert drawn("tpe", 12, past) == drawn("tpe", 12, past)


def test_none_of_the_first_eight_trials_is_pruned() -> None:
    past = [Past({}, "finished", {0: 1.0}, 1.0) for _ in range(9)]
    found = [
        Judge([past[each] for each in judged_against(number)], lowest=True, after=0).pruned_at({0: 9.0})
        for number in range(9)
    ]
    assert found == [None] * 8 + [0]


def test_a_trial_below_the_median_is_pruned_once_enough_have_ended() -> None:
    past = [Past({}, "finished", {step: float(number) for step in range(5)}, float(number)) for number in range(5)]
    worse = {0: 9.0, 1: 9.0, 2: 9.0, 3: 9.0}
    assert Judge(past, lowest=True, after=2).pruned_at(worse) == 2
    assert Judge(past, lowest=False, after=2).pruned_at(worse) is None
    assert Judge(past[:4], lowest=True, after=0).pruned_at(worse) is None
    judge = Judge(past, lowest=True, after=0)
    assert judge.pruned_at({0: 1.0}) is None
    assert judge.pruned_at({0: 1.0, 1: 9.0}) is None, "its best so far counts"
