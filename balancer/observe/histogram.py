"""Times as counts per bucket: bounded memory, and percentiles that are off by 2 % at most."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from itertools import accumulate
from math import sqrt

from typing_extensions import TypedDict

# Upper bounds in seconds that people ask for by name, in alerts and as objectives: `/metrics` shows no others.
ROUND_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# All of them: 10 us to about an hour, each at most 1.04 times the last. A percentile is told as the middle of a bucket,
# which is within 2 % of everything in it.
BOUNDS = tuple(sorted({*ROUND_BOUNDS, *(0.00001 * 1.04**step for step in range(504))}))


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
        for place, count in other.counts.items():
            self.counts[place] += count
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

    def up_to(self, bound: float) -> int:
        """How many took at most `bound` seconds, which is one of BOUNDS."""
        last = bisect_left(BOUNDS, bound)
        return sum(count for place, count in self.counts.items() if place <= last)

    def percentile(self, share: float) -> float | None:
        """About what the `share` (0 to 1) smallest took at most, in seconds; None without samples."""
        places = sorted(self.counts)
        running = list(accumulate(self.counts[place] for place in places))
        return _middle(places[bisect_left(running, share * running[-1])]) if running else None

    def summary(self) -> Percentiles:
        return {"p50": self.percentile(0.50), "p95": self.percentile(0.95), "p99": self.percentile(0.99)}


def _middle(place: int) -> float:
    """Beyond the ends no bucket has two bounds: of those the bound is told."""
    return sqrt(BOUNDS[place - 1] * BOUNDS[place]) if 0 < place < len(BOUNDS) else BOUNDS[min(place, len(BOUNDS) - 1)]
