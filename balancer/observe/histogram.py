"""Response times as counts per bucket: constant memory, and percentiles that are off by 15 % at most."""

from __future__ import annotations

from bisect import bisect_left

from typing_extensions import TypedDict

# Upper bounds in seconds that people ask for by name, in alerts and as objectives: `/metrics` shows no others.
ROUND_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# All of them: 100 us to about 105 s, each at most 1.15 times the last, so that a percentile is off by 15 % at most.
BOUNDS = tuple(sorted({*ROUND_BOUNDS, *(0.0001 * 1.15**step for step in range(100))}))


class Percentiles(TypedDict):
    """Seconds, None without samples."""

    p50: float | None
    p95: float | None
    p99: float | None


class Histogram:
    """Counts per bucket: constant memory however long it runs. Not locked; the owner's lock guards it."""

    __slots__ = ("counts", "total", "maximum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0
        self.maximum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += 1
        if seconds > self.maximum:
            self.maximum = seconds

    def __iadd__(self, other: Histogram) -> Histogram:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        return self

    def copy(self) -> Histogram:
        copied = Histogram()
        copied.counts, copied.total, copied.maximum = self.counts.copy(), self.total, self.maximum
        return copied

    def since(self, earlier: Histogram) -> Histogram:
        """What was added after `earlier`, an older copy of this one. The maximum stays that of both."""
        added = Histogram()
        added.counts = [ours - theirs for ours, theirs in zip(self.counts, earlier.counts, strict=True)]
        added.total, added.maximum = self.total - earlier.total, self.maximum
        return added

    def up_to(self, bound: float) -> int:
        """How many took at most `bound` seconds, which is one of BOUNDS."""
        return sum(self.counts[: bisect_left(BOUNDS, bound) + 1])

    def percentile(self, share: float) -> float | None:
        """Upper bound in seconds of the bucket that holds the `share` (0 to 1) smallest; None without samples."""
        if not self.total:
            return None
        rank, seen = share * self.total, 0
        for bound, count in zip(BOUNDS, self.counts, strict=False):
            seen += count
            if seen >= rank and count:
                return min(bound, self.maximum)
        return self.maximum

    def summary(self) -> Percentiles:
        return {"p50": self.percentile(0.50), "p95": self.percentile(0.95), "p99": self.percentile(0.99)}
