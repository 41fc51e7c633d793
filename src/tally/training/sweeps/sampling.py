"""Which parameters a trial gets, and which trials are not worth going on with: Optuna's samplers and its pruner.

Optuna keeps nothing. Its study is made anew from the trials that there are, whenever one is drawn or judged, so a sweep
that goes on elsewhere draws what it would have drawn; and what random sampling draws follows from the seed and the
trial's number alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from tally.errors import RunError
from tally.optional import needed
from tally.training.sweeps.space import Choices, Space, Value, combinations

if TYPE_CHECKING:
    import optuna

SamplerName: TypeAlias = Literal["grid", "random", "tpe"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

LAG = 4
"""A trial is judged against those whose number is lower by so many: they have mostly ended by then. If they have not,
it goes on, and is judged afterwards. So the verdict does not depend on how many trials run at once."""
STARTUP = 5
"""Finished trials that pruning needs."""


@dataclass(slots=True)
class Past:
    """A trial as far as it is known. values: of the metric, by step. state: running, finished, pruned or failed.

    value, step: the result of a finished one, and the step that a pruned one was pruned at.
    """

    parameters: Mapping[str, Value]
    state: str = "running"
    values: dict[int, float] = field(default_factory=dict)
    value: float | None = None
    step: int | None = None


def library() -> Any:
    """Optuna, quiet. Raises RunError where it is not installed."""
    with needed("sweeps need", "sweep", RunError):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def count(sampler: SamplerName, space: Space, trials: int | None) -> int:
    """How many trials a sweep has. Raises SpecError for a grid that is none."""
    if sampler != "grid":
        return 20 if trials is None else trials
    number = len(combinations(space))
    return number if trials is None else min(trials, number)


def draw(
    sampler: SamplerName, space: Space, *, seed: int, number: int, past: Sequence[Past], lowest: bool
) -> dict[str, Value]:
    """The parameters of trial ``number``. past: the other trials, of which TPE alone takes notice."""
    if sampler == "grid":
        return combinations(space)[number]
    optuna = library()
    # Not the seed and the number added up: sweeps with neighbouring seeds would draw the same.
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    distributions = _distributions(space)
    if sampler == "random":
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=own))
    else:
        study = _study(lowest, optuna.samplers.TPESampler(seed=own, constant_liar=True))
        for each in past:
            if (known := _known(each, distributions)) is not None:
                study.add_trial(known)
    return dict(study.ask(distributions).params)


def judged_against(number: int) -> range:
    """The numbers of the trials that trial ``number`` is judged against. So none of the first eight is ever pruned."""
    return range(max(0, number - LAG + 1))


class Judge:
    """Says at which step a trial is pruned: where its best value so far is worse than the median of others there.

    past: the trials that it is judged against, all of which have ended. after: steps before which none is pruned.
    """

    def __init__(self, past: Sequence[Past], *, lowest: bool, after: int) -> None:
        optuna = library()
        self._optuna = optuna
        self._pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=after)
        self._study = _study(lowest, None)
        self._able, self._after = False, after
        finished = [each for each in past if each.state == "finished"]
        if len(finished) >= STARTUP:
            self._able = True
            for each in finished:
                self._study.add_trial(_frozen(optuna, "COMPLETE", value=each.value, intermediate_values=each.values))
        self._trial = _frozen(optuna, "RUNNING")
        self._better = min if lowest else max
        self._best: tuple[int, float] | None = None
        self._seen = -1

    def pruned_at(self, values: Mapping[int, float]) -> int | None:
        """The first step of those not looked at yet at which the trial is to be pruned."""
        if not self._able:
            return None
        for step in sorted(each for each in values if each > self._seen):
            self._seen, value = step, values[step]
            if self._best is None or math.isnan(self._best[1]) or self._better(value, self._best[1]) == value:
                self._best = step, value
            if math.isnan(self._best[1]):  # the rule prunes it, too, but NumPy would print a warning
                if step >= self._after:
                    return step
                continue
            # The rule looks at the best value and the last step: with all values, each look would take longer.
            self._trial.intermediate_values = dict((self._best, (step, value)))
            if self._pruner.prune(self._study, self._trial):
                return step
        return None


def _study(lowest: bool, sampler: Any) -> optuna.Study:
    study: optuna.Study = library().create_study(direction="minimize" if lowest else "maximize", sampler=sampler)
    return study


def _frozen(optuna: Any, state: str, **given: Any) -> Any:
    return optuna.trial.create_trial(state=getattr(optuna.trial.TrialState, state), **given)


def _known(past: Past, distributions: Mapping[str, Any]) -> Any:
    """A trial for a sampler, which needs no more than its last value."""
    about = {"params": dict(past.parameters), "distributions": dict(distributions)}
    match past.state:
        case "finished":
            return _frozen(library(), "COMPLETE", value=past.value, **about)
        case "pruned" if past.step in past.values:
            last = {past.step: past.values[past.step]}
            return _frozen(library(), "PRUNED", intermediate_values=last, **about)
        case "running":
            return _frozen(library(), "RUNNING", **about)
    return None


def _distributions(space: Space) -> dict[str, Any]:
    kinds = library().distributions
    found: dict[str, Any] = {}
    for name, each in space.items():
        if isinstance(each, Choices):
            found[name] = kinds.CategoricalDistribution(each.values)
        elif each.whole:
            found[name] = kinds.IntDistribution(each.low, each.high, log=each.log, step=each.step or 1)
        else:
            found[name] = kinds.FloatDistribution(each.low, each.high, log=each.log, step=each.step)
    return found
