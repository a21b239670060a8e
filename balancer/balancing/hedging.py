"""When an answer is late, and how many requests may go to a second backend for that."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from math import ceil
from threading import Lock

from typing_extensions import TypedDict

from balancer.balancing.options import Hedge, PoolOptions

LATE_SHARE = 0.95  # of the answers come before one is late
LEAST_SECONDS = 0.01  # before that none is
TIMES_KEPT, FEWEST_TIMES = 2000, 100  # the newest times to a first byte; with fewer nobody can tell what is late
ESTIMATE_SECONDS = 1.0  # between two looks at them
# Hedges that may be saved up; and so many of them are kept for backends that stand still. One that answers others is
# only slow with this one, and while all are slow a second copy of each would make it worse.
SAVED, RESERVED = 30, 10


class HedgeView(TypedDict):
    """`mode` is the setting, `late` seconds until a second backend is asked, None for never."""

    mode: Hedge
    late: float | None


class Hedging:
    """Of one pool. `_lock` guards `_saved`; `_times` may be added to without it, and `_late` is as old
    as ESTIMATE_SECONDS allow, whoever looked last."""

    def __init__(self, options: PoolOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options  # may be replaced at any time
        self._clock = clock
        self._lock = Lock()
        self._saved = 0.0
        self._times: deque[float] = deque(maxlen=TIMES_KEPT)
        self._late: float | None = None
        self._estimated_at = clock()

    @property
    def is_on(self) -> bool:
        return self.options.hedge != "off"

    def late(self) -> float | None:
        """Seconds without a first byte after which an answer is late; None for never."""
        hedge = self.options.hedge
        if isinstance(hedge, str):
            return None if hedge == "off" else self._estimate()
        return hedge

    def _estimate(self) -> float | None:
        now = self._clock()
        if now - self._estimated_at >= ESTIMATE_SECONDS or (self._late is None and len(self._times) >= FEWEST_TIMES):
            self._estimated_at = now
            times = sorted(self._times.copy())
            enough = len(times) >= FEWEST_TIMES
            self._late = max(LEAST_SECONDS, times[ceil(LATE_SHARE * len(times)) - 1]) if enough else None
        return self._late

    @property
    def answered(self) -> Callable[[float], None]:
        """Call it with the seconds after which a first byte came, or was not waited for any longer."""
        return self._times.append

    def count(self) -> None:
        """One more request, once each."""
        if self._saved == SAVED:  # as mostly: one step that needs no lock
            return
        with self._lock:
            saved = self._saved + self.options.hedge_budget
            self._saved = saved if saved < SAVED else SAVED

    def spend(self, is_urgent: bool) -> bool:
        """Whether there may be one more hedge, which is counted then: not for a request that was late before a reload
        has switched this off. `is_urgent`: the backend stands still."""
        with self._lock:
            if not self.is_on or self._saved < (1 if is_urgent else 1 + RESERVED):
                return False
            self._saved -= 1
        return True

    def refund(self) -> None:
        """It was not sent."""
        with self._lock:
            self._saved = min(SAVED, self._saved + 1)

    def note_late(self, late: float | None) -> None:
        """What another process of ours, which has the traffic, has found."""
        self._late, self._estimated_at = late, math.inf

    def describe(self) -> HedgeView:
        return {"mode": self.options.hedge, "late": self.late()}
