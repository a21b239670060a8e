"""Times of many requests: every one while that is affordable, after that counts in buckets one percent wide.

Percentiles are of the nearest rank: the smallest value that at least so many percent of all do not exceed. Nothing is
interpolated, so what is printed has happened.
"""

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

EXACT_SAMPLES = 1_000_000  # of a whole run; 8 bytes each
WIDTH = math.log(1.01)  # buckets grow by 1 %, so a value read from one is less than 1 % too high


def rank_of(total: int, per_mille: int) -> int:
    """The nearest rank, counted from 1, in integers so that rounding cannot move it."""
    return max(-(-per_mille * total // 1000), 1)


class Latencies:
    """Seconds. One thread adds; reading while it does is for progress only."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self.exact = array("d", seconds)
        self._buckets: Counter[int] = Counter()
        self._total = self._squares = 0.0  # of what is in the buckets
        self._low, self._high = math.inf, 0.0
        self._sorted: list[float] = []  # of `exact` when it was last asked for

    @property
    def is_exact(self) -> bool:
        return not self._buckets

    def __len__(self) -> int:
        return len(self.exact) + self._buckets.total()

    def condense(self) -> None:
        """Move every value into its bucket."""
        for value in self.exact:
            self._buckets[math.ceil(math.log(max(value, 1e-9)) / WIDTH)] += 1
            self._total += value
            self._squares += value * value
            self._low, self._high = min(self._low, value), max(self._high, value)
        del self.exact[:]

    def merge(self, other: "Latencies") -> None:
        self.exact.extend(other.exact)
        self._buckets.update(other._buckets)
        self._total += other._total
        self._squares += other._squares
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def ordered(self) -> Sequence[float] | None:
        """Every value in order, or None if some are only counted."""
        if not self.is_exact:
            return None
        if len(self._sorted) != len(self.exact):  # values only come, until all of them go
            self._sorted = sorted(self.exact)
        return self._sorted

    def percentiles(self, per_mille: Sequence[int]) -> list[float]:
        """Values of the nearest rank; there must be at least one value."""
        if (values := self.ordered()) is not None:
            return [values[rank_of(len(values), rank) - 1] for rank in per_mille]
        self.condense()
        keys, below, reached = sorted(self._buckets), 0, []
        for key in keys:
            below += self._buckets[key]
            reached.append(below)
        found = [keys[bisect_left(reached, rank_of(below, rank))] for rank in per_mille]
        return [min(math.exp(key * WIDTH), self._high) for key in found]

    def limits(self) -> tuple[float, float]:
        """Smallest and largest, exact always."""
        return min(self._low, min(self.exact, default=math.inf)), max(self._high, max(self.exact, default=0.0))

    def mean_and_deviation(self) -> tuple[float, float | None]:
        """The sample's standard deviation is None for a single value."""
        number = len(self)
        mean = (self._total + math.fsum(self.exact)) / number
        if self.is_exact:
            squares = math.fsum((value - mean) ** 2 for value in self.exact)
        else:
            squares = max(self._squares + math.fsum(v * v for v in self.exact) - number * mean * mean, 0.0)
        return mean, math.sqrt(squares / (number - 1)) if number > 1 else None

    def counts(self, bounds: Sequence[float]) -> list[int]:
        """How many values are at most each bound and above the one before; the last bound takes the rest too."""
        counts = [0] * len(bounds)
        last = len(bounds) - 1
        for value in self.exact:
            counts[min(bisect_left(bounds, value), last)] += 1
        for key, number in self._buckets.items():
            counts[min(bisect_left(bounds, min(math.exp(key * WIDTH), self._high)), last)] += number
        return counts
