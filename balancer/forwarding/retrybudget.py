"""How many retries there may be, so that a failing backend does not bring the others down with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from balancer.observe.rate import KEPT_SECONDS, Rate


class RetryBudget:
    """Of one pool: a share of its requests of the last 10 s, but so many a second in any case. `choices` says how many
    these were, retries among them; `spent` is told of each.

    Counted over time rather than over what is in flight: when one of three backends dies, a third of what is in flight
    needs its retry at the same moment, while a storm shows in the seconds that follow.

    `_lock` guards `_retried`; the others are called outside it.
    """

    def __init__(
        self, choices: Callable[[], int], spent: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._choices = choices
        self._spent = spent
        self._lock = Lock()
        self._retried = Rate(clock)

    def is_left(self, share: float, minimum: int) -> bool:
        """What `spend` would say now, without counting."""
        choices = self._choices()
        with self._lock:
            return self._has_room(choices, share, minimum)

    def spend(self, share: float, minimum: int) -> bool:
        """Count one more retry, if `share` of the requests and `minimum` a second allow it."""
        choices = self._choices()
        with self._lock:
            if not self._has_room(choices, share, minimum):
                return False
            self._retried.add()
        self._spent()
        return True

    def _has_room(self, choices: int, share: float, minimum: int) -> bool:
        retried = self._retried.recent()
        return retried < max(minimum * KEPT_SECONDS, share * (choices - retried))
