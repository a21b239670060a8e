"""A new version gets a growing share of a route's requests, and none at once if it does worse than the stable one.

Both are compared in the same interval, since the last step: what happens to both is no one's fault.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from typing_extensions import TypedDict

from balancer.observe.histogram import Histogram
from balancer.observe.record import Record

ENOUGH, INTERVAL_SECONDS = 200, 10.0  # requests of each side, and time, before they are compared
# One-sided test of two proportions. A canary that is as good is compared thousands of times, so the bound is high.
CERTAIN = 4.0  # standard errors
SLOWER, SLOWER_SECONDS = 1.5, 0.01  # p95 of the canary: so many times the stable one's, and so much more

News = Literal["canary_step", "canary_done", "canary_returned"]
State = Literal["growing", "done", "returned"]
Counts = tuple[int, int, float]  # requests, failed ones, seconds of the 95th percentile


class CanaryView(TypedDict):
    """`text` are the figures of the last comparison."""

    state: State
    share: float
    since: float
    text: str


@dataclass(frozen=True, slots=True)
class CanaryOptions:
    """Of the `pools` the last one is the canary. `steps` are its shares from 0 to 1, `hold` are seconds for each."""

    pools: tuple[str, ...]
    steps: tuple[float, ...]
    hold: float


class Side:
    """What came of the requests of one pool in this interval. `_lock` guards it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.begin()

    def add(self, record: Record) -> None:
        if record.aborted:  # says nothing of the pool
            return
        with self._lock:
            self._total += 1
            self._failed += record.failed
            if record.backend is not None:
                self._times.add(record.seconds)

    def count(self, record: Record, times: Histogram) -> None:
        """As many as there are `times`, all of its kind."""
        if record.aborted:
            return
        with self._lock:
            self._total += times.total
            self._failed += times.total * record.failed
            if record.backend is not None:
                self._times += times

    def counts(self) -> tuple[int, int, float]:
        """(requests, failed ones, seconds of the 95th percentile)"""
        with self._lock:
            return self._total, self._failed, self._times.percentiles(0.95)[0] or 0.0

    def begin(self) -> None:
        """Another interval."""
        with self._lock:
            self._total = self._failed = 0
            self._times = Histogram()


class Canary:
    """The steps of one route. `look` belongs to one thread; the rest may be read by any, and is one value each."""

    def __init__(
        self,
        options: CanaryOptions,
        notify: Callable[[News, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._options, self._notify = options, notify
        self._clock, self._wall_clock = clock, wall_clock
        self.stable, self.canary = Side(), Side()
        self.state: State = "growing"
        self.text = ""
        self._step = 0
        self._is_compared = False  # in this step
        self._begin(options.steps[0])

    def count(self, record: Record, times: Histogram) -> None:
        """As many as there are `times`, all of its kind, which another process has forwarded."""
        (self.canary if record.pool == self._options.pools[-1] else self.stable).count(record, times)

    def shares(self) -> Sequence[float]:
        return 1 - self.share, self.share

    def describe(self) -> CanaryView:
        return {"state": self.state, "share": self.share, "since": self.since, "text": self.text}

    def look(self) -> None:
        """Call about once a second."""
        if self.state == "returned":
            return
        now = self._clock()
        if now - self._interval_began >= INTERVAL_SECONDS:
            self._compare(self.stable.counts(), self.canary.counts())
        steps = self._options.steps
        if self.state != "growing" or not self._is_compared or now - self._step_began < self._options.hold:
            return
        self._step += 1
        if self._step == len(steps):
            self.state = "done"
            self._note("canary_done", f"stays at {self.share:.0%}: {self.text}")
        else:
            self._begin(steps[self._step])
            self._note("canary_step", f"gets {self.share:.0%} now: {self.text}")

    def _begin(self, share: float) -> None:
        self.share, self.since = share, self._wall_clock()
        self._step_began = self._clock()
        self._is_compared = False
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval_began = self._clock()
        self.stable.begin()
        self.canary.begin()

    def _compare(self, stable: Counts, canary: Counts) -> None:
        if stable[0] < ENOUGH and self.share < 1 or canary[0] < ENOUGH:
            return  # of either too few; the interval goes on
        figures = f"{_told(canary)}, the stable one {_told(stable)}"
        if self.share < 1 and is_worse(canary, stable):
            self.state = "returned"
            self._begin(0.0)
            self._note("canary_returned", f"gets nothing any more, it did worse: {figures}")
            return
        self.text, self._is_compared = figures, True
        self._begin_interval()

    def _note(self, kind: News, text: str) -> None:
        self.text = text
        self._notify(kind, text)


def is_worse(canary: Counts, stable: Counts) -> bool:
    """More failures than chance explains, or a tail that is much longer."""
    (total, failed, p95), (others, others_failed, others_p95) = canary, stable
    share = (failed + others_failed) / (total + others)
    error = math.sqrt(share * (1 - share) * (1 / total + 1 / others))
    excess = failed / total - others_failed / others
    return excess > CERTAIN * error > 0 or p95 > SLOWER * others_p95 + SLOWER_SECONDS


def _told(counts: Counts) -> str:
    total, failed, p95 = counts
    return f"{failed} of {total} requests failed, p95 {p95 * 1000:.3g} ms"


class Canaries:
    """One for each route whose split has steps. Kept over a reload that changes nothing of it; else it begins anew.

    `_canaries` is replaced, never changed.
    """

    def __init__(self, note: Callable[[News, str], None]) -> None:
        self._note = note
        self._canaries: Mapping[str, tuple[CanaryOptions, Canary]] = {}

    def use(self, wanted: Mapping[str, CanaryOptions]) -> None:
        """These and no others, by the name of the route."""
        old = self._canaries
        self._canaries = {
            route: old[route] if route in old and old[route][0] == options else (options, self._made(route, options))
            for route, options in wanted.items()
        }

    def _made(self, route: str, options: CanaryOptions) -> Canary:
        return Canary(options, lambda kind, text: self._note(kind, f"route {route}: {options.pools[-1]} {text}"))

    def of(self, route: str) -> Canary | None:
        found = self._canaries.get(route)
        return None if found is None else found[1]

    def shares(self) -> dict[str, float]:
        return {route: canary.share for route, (_, canary) in self._canaries.items()}

    def take(self, shares: Mapping[str, float]) -> None:
        """They are compared elsewhere, and have these now."""
        for route, share in shares.items():
            if (canary := self.of(route)) is not None:
                canary.share = share

    def look(self) -> None:
        for _, canary in self._canaries.values():
            canary.look()
