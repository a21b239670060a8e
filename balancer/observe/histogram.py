"""Times as counts per bucket: bounded memory, and percentiles that are off by 2 % at most."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import sqrt

from typing_extensions import TypedDict

# Upper bounds in seconds that people ask for by name, in alerts and as objectives: `/metrics` shows no others.
ROUND_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# All of them: 10 us to about an hour, each at most 1.04 times the last.
BOUNDS = tuple(sorted({*ROUND_BOUNDS, *(0.00001 * 1.04**step for step in range(504))}))
# How a bucket is told: as its middle, within 2 % of everything in it; at the ends, where one bound is missing, as the
# other.
MIDDLES = (BOUNDS[0], *(sqrt(low * high) for low, high in pairwise(BOUNDS)), BOUNDS[-1])
OUTLINED = 6  # buckets that are one in a picture: each 1.25 times the last or so


class Percentiles(TypedDict):
    """Seconds, None without samples."""

    p50: float | None
    p95: float | None
    p99: float | None


class Histogram:
    """Counts of the buckets that are not empty, by place in BOUNDS. Not locked; the owner's lock guards it."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        self.seconds = 0.0  # all together

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def __iadd__(self, other: Histogram) -> Histogram:
        counts = self.counts  # of 500 backends this is the longest part of what a page costs
        for place, count in other.counts.items():
            counts[place] += count
        self.seconds += other.seconds
        return self

    def copy(self) -> Histogram:
        copied = Histogram()
        copied.counts, copied.seconds = self.counts.copy(), self.seconds
        return copied

    def since(self, earlier: Histogram) -> Histogram:
        """What was added after `earlier`, an older copy of this one."""
        added = Histogram()
        for place, count in self.counts.items():
            if new := count - earlier.counts.get(place, 0):
                added.counts[place] = new
        added.seconds = self.seconds - earlier.seconds
        return added

    def up_to(self, bounds: Sequence[float]) -> list[int]:
        """How many took at most so many seconds, for each of `bounds`, which are some of BOUNDS."""
        places, running = self._running()
        return [running[bisect_right(places, bisect_left(BOUNDS, bound))] for bound in bounds]

    def _running(self) -> tuple[list[int], list[int]]:
        """Places that are not empty, and how many there are below each, and in all."""
        places = sorted(self.counts)
        return places, [*accumulate(map(self.counts.__getitem__, places), initial=0)]

    def outline(self) -> list[tuple[float, int]]:
        """How many took up to each bound in seconds, and more than the one before: OUTLINED buckets together, without
        those that are empty."""
        counts: defaultdict[int, int] = defaultdict(int)
        for place, count in self.counts.items():
            counts[place // OUTLINED] += count
        last = len(BOUNDS) - 1
        return [(BOUNDS[min(place * OUTLINED + OUTLINED - 1, last)], counts[place]) for place in sorted(counts)]

    def percentiles(self, *shares: float) -> list[float | None]:
        """About what the `share` (0 to 1) smallest took at most, in seconds; None without samples."""
        places, running = self._running()
        if not places:
            return [None] * len(shares)
        return [MIDDLES[places[bisect_left(running, share * running[-1], 1) - 1]] for share in shares]

    def summary(self) -> Percentiles:
        p50, p95, p99 = self.percentiles(0.50, 0.95, 0.99)
        return {"p50": p50, "p95": p95, "p99": p99}
