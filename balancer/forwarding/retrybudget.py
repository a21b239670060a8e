"""How many retries there may be, so that a failing backend does not bring the others down with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from balancer.observe.rate import KEPT_SECONDS, Rate
from balancer.observe.statistics import Statistics


class RetryBudget:
    """A share of the requests of the last 10 s, but so many a second in any case.

    Counted over time rather than over what is in flight: when one of three backends dies, a third of what is in flight
    needs its retry at the same moment, while a storm shows in the seconds that follow.

    `_lock` guards `_retried`; the statistics lock themselves and are asked outside it.
    """

    def __init__(self, statistics: Statistics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._statistics = statistics
        self._lock = Lock()
        self._retried = Rate(clock)

    def is_left(self, share: float, minimum: int) -> bool:
        """What `spend` would say now, without counting."""
        most = self._most(share, minimum)
        with self._lock:
            return self._retried.recent() < most

    def spend(self, share: float, minimum: int) -> bool:
        """Count one more retry, if `share` of the requests and `minimum` a second allow it."""
        most = self._most(share, minimum)
        with self._lock:
            if self._retried.recent() >= most:
                return False
            self._retried.add()
        self._statistics.retried()
        return True

    def _most(self, share: float, minimum: int) -> float:
        return max(minimum * KEPT_SECONDS, share * self._statistics.recent_requests())
