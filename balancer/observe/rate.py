"""How often something happens, counted by the second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MEAN_SECONDS = 5  # `per_second` is the mean of this many whole seconds
KEPT_SECONDS = 10  # `recent` counts this many


class Rate:
    """Counts per second, for the newest KEPT_SECONDS. Not locked; the owner's lock guards it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._newest = [0, 0]  # [second, count]
        self._seconds = deque([self._newest], maxlen=KEPT_SECONDS + 1)

    def add(self, count: int = 1) -> bool:
        """True for the first of a second."""
        second = int(self._clock())
        is_first = second != self._newest[0]
        if is_first:
            self._newest = [second, 0]
            self._seconds.append(self._newest)
        self._newest[1] += count
        return is_first

    def per_second(self) -> float:
        """Mean of the last whole seconds."""
        now = int(self._clock())
        return self._sum(now - MEAN_SECONDS, now) / MEAN_SECONDS

    def recent(self) -> int:
        """How many in the last KEPT_SECONDS and the second that runs."""
        now = int(self._clock())
        return self._sum(now - KEPT_SECONDS, now + 1)

    def _sum(self, first: int, end: int) -> int:
        return sum(count for second, count in self._seconds if first <= second < end)
