"""Slow start: a backend that has just come back is spared its full share for a while.

It gets a share of its usual traffic, whatever chooses: with every request for the pool it earns a part of one, and it
takes part in choices while it has earned a whole one that it has not had. To let it take part in so many choices only
would not do: whoever goes by load would take it, idle as it is, each time.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SHARE = 0.1  # of its traffic when it has just come back (Envoy's minimum)
MOST_EARNED = 2.0  # requests: it need not be chosen at once, but shall not get many together later


@dataclass(slots=True)
class SlowStart:
    """Of one backend; the pool's lock guards it."""

    began_at: float | None = None  # pool clock when it came back, while it gets less than its share
    earned: float = 0.5  # requests that it may have and has not had; half of one rounds to the nearest

    def share(self, now: float, seconds: float) -> float:
        """Of its usual traffic, rising from FIRST_SHARE to 1 over so many seconds."""
        if self.began_at is None or seconds <= 0:
            return 1.0
        return min(1.0, max(FIRST_SHARE, (now - self.began_at) / seconds))

    @property
    def is_waiting(self) -> bool:
        """It has had all that it has earned: others are asked first."""
        return self.began_at is not None and self.earned < 1

    def earn(self, requests: float) -> None:
        self.earned = min(MOST_EARNED, self.earned + requests)
