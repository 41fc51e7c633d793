"""A model as clients see it: one name, and the versions behind it.

A version is a number or a label, and a pool of replicas. Requests that name none go to the versions of the split, by
their shares. A version that is replaced answers what it was given before it ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence

from tally.errors import SpecError
from tally.models.reference import ModelRef
from tally.serving.messages import Answer
from tally.serving.metrics import Metrics, PoolMetrics
from tally.serving.pool import Pending, Pool
from tally.serving.protocols.base import RequestError, Served
from tally.serving.settings import Limits, ModelSettings
from tally.text import did_you_mean

log = logging.getLogger(__name__)

_ALIAS = re.compile(r"models:/[^@/]+@(.+)")
FIRST = "1"
"""The version of a model that has no number of its own."""


class Endpoint:
    """Used in the event loop only. changed: called when replicas come or go."""

    def __init__(self, settings: ModelSettings, metrics: Metrics, changed: Callable[[], None]) -> None:
        self.name, self.settings = settings.name, settings
        self.versions: dict[str, Pool] = {}
        self.labels: dict[str, str] = {}
        self._metrics, self._changed = metrics, changed
        self._split: list[tuple[Pool, float]] = []
        self._shadows: list[tuple[Pool, float]] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # -- requests ---------------------------------------------------------------------------------------

    def pool(self, version: str | None) -> Pool:
        """The version that answers a request. Raises RequestError where there is none of that number or label."""
        if version is None:
            split = self._split
            if len(split) == 1:
                return split[0][0]
            if not split:
                raise RequestError(503, f"{self.name} is not loaded", **{"Retry-After": "1"})
            at = random.random() * sum(share for _, share in split)  # noqa: S311 - no secret
            for pool, share in split:
                at -= share
                if at < 0:
                    return pool
            return split[-1][0]
        found = self.versions.get(self.labels.get(version, version))
        if found is None:
            there = [*self.versions, *self.labels]
            text = f"{self.name} has no version {version!r}{did_you_mean(version, there)}"
            raise RequestError(404, f"{text}; there are {', '.join(there)}" if there else text)
        return found

    def submit(self, pool: Pool, pending: Pending) -> None:
        """Have it answered, and give shadows their copies."""
        pool.submit(pending)
        for shadow, share in self._shadows:
            if shadow is not pool and random.random() < share:  # noqa: S311
                call = pending.call
                shadow.submit(Pending(call.protocol, call.body, call.parameters, pending.deadline, _ignored))

    @property
    def ready(self) -> bool:
        """Whether requests that name no version can be answered: each version of the split has a replica, or will have
        one as soon as it is asked."""
        return bool(self._split) and all(pool.ready > 0 or pool.wanted == 0 for pool, _ in self._split)

    def served(self, version: str | None = None) -> Served:
        """What can be said without a replica. Raises RequestError."""
        pool = self.pool(version) if version is not None or self._split else None
        states = {}
        for number, each in self.versions.items():
            if each.ready or each.wanted == 0:
                states[number] = "ready"
            else:
                states[number] = f"failed: {each.failure.message}" if each.failure else "loading"
        return Served(
            self.name,
            pool.version if pool else "",
            pool is not None and (pool.ready > 0 or pool.wanted == 0),
            pool.description if pool else None,
            states,
            dict(self.labels),
        )

    @property
    def split(self) -> dict[str, float]:
        """Version to its share of the requests that name none."""
        return {pool.version: share for pool, share in self._split}

    # -- changes ----------------------------------------------------------------------------------------

    async def load(
        self,
        ref: ModelRef,
        limits: Limits,
        *,
        version: str | None = None,
        label: str | None = None,
        alone: bool = True,
    ) -> Pool:
        """Start a version, and once it is ready, let it take the place of the one of its number; if it is ``alone``, of
        all others.

        version: its number; by default that of the registry. label: by which it can be chosen, too. Requests that
        others have been given are answered by them. If it cannot be loaded, nothing changes. Raises ModelLoadError.
        """
        async with self._changing:
            version = version or self._number(ref)
            metrics = PoolMetrics(self._metrics, self.name, version)
            pool = Pool(self.name, version, ref, limits, metrics=metrics, changed=self._changed)
            try:
                await pool.start()
            except BaseException:
                await pool.close(0)
                raise
            before = [each for each in self.versions.values() if alone or each.version == version]
            self.versions = {number: each for number, each in self.versions.items() if each not in before}
            self.versions[version] = pool
            if alone or not self._split:
                self._split, self._shadows = [(pool, 1.0)], []
                self.labels = {name: number for name, number in self.labels.items() if number in self.versions}
            else:
                self._split = [(pool if each in before else each, share) for each, share in self._split]
            if label is not None:
                self.labels[label] = version
            for each in before:
                self._end(each)
            self._changed()
            return pool

    def set_split(self, shares: Mapping[str, float], shadows: Mapping[str, float] = {}) -> None:
        """Share out requests that name no version. shares: version or label to its weight. shadows: version to the
        share (0 to 1) of requests of which it gets a copy, whose answers nobody sees. Raises SpecError."""
        wrong = [f"the share of {name} should be 0 or more, not {share}" for name, share in shares.items() if share < 0]
        wrong += [
            f"the share of the shadow {name} should be 0 to 1, not {share}"
            for name, share in shadows.items()
            if not 0 <= share <= 1
        ]
        if not any(share > 0 for share in shares.values()):
            wrong.append("one version at least needs a share")
        found: dict[str, Pool] = {}
        for name in (*shares, *shadows):
            try:
                found[name] = self.pool(name)
            except RequestError as error:
                wrong.append(error.message)
        if wrong:
            raise SpecError(wrong)
        self._split = [(found[name], share) for name, share in shares.items() if share > 0]
        self._shadows = [(found[name], share) for name, share in shadows.items() if share > 0]

    async def remove(self, version: str) -> None:
        """Serve this version no more. Raises SpecError while the split gives it requests."""
        pool = self.pool(version)
        if any(each is pool for each, _ in self._split):
            raise SpecError(f"{self.name}: version {pool.version} gets requests; change the split first")
        self.versions.pop(pool.version)
        self.labels = {name: number for name, number in self.labels.items() if number != pool.version}
        self._shadows = [(each, share) for each, share in self._shadows if each is not pool]
        self._end(pool)

    def resize(self, least: int, most: int) -> None:
        """Keep so many replicas of each version of the split."""
        for pool, _ in self._split:
            pool.resize(least, most)

    async def unload(self, seconds: float) -> None:
        """As ``close``, between loads: one that ends meanwhile would be forgotten, and its replicas left."""
        async with self._changing:
            await self.close(seconds)

    async def close(self, seconds: float) -> None:
        """Answer what waits, and end all replicas."""
        pools: Sequence[Pool] = list(self.versions.values())
        await asyncio.gather(*(pool.close(seconds) for pool in pools), *self._ending)
        self.versions, self._split, self._shadows = {}, [], []

    def note(self) -> None:
        """Bring gauges up to date."""
        for version, pool in self.versions.items():
            PoolMetrics(self._metrics, self.name, version).now(pool.ready, pool.waiting)

    def _end(self, pool: Pool) -> None:
        async def end() -> None:
            await pool.close(pool.limits.timeout)
            if pool.version not in self.versions:
                pool.metrics.forget()

        task = asyncio.get_running_loop().create_task(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _number(self, ref: ModelRef) -> str:
        """A registered model's version is its number; another's, the next that is free."""
        if ref.version is not None:
            return str(ref.version)
        for number, pool in self.versions.items():
            if pool.ref.hash == ref.hash:
                return number
        taken = [int(each) for each in self.versions if each.isdigit()]
        return str(max(taken, default=0) + 1) if taken else FIRST


def label_of(model: str) -> str | None:
    """The label of a version: the alias by which the model is named."""
    found = _ALIAS.fullmatch(model)
    return found[1] if found else None


def _ignored(outcome: Answer | RequestError) -> None:
    """What a shadow answers."""
