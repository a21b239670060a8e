"""Slow start: a backend that has just come back is spared its full share for a while."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SHARE = 0.1  # of its traffic when it has just come back (Envoy's minimum)


@dataclass(slots=True)
class SlowStart:
    """Of one backend; the pool's lock guards it."""

    began_at: float | None = None  # pool clock when it came back, while it gets less than its share
    _turns: float = 0.0  # choices it has earned to take part in

    def share(self, now: float, seconds: float) -> float:
        """Of its usual traffic, rising from FIRST_SHARE to 1 over so many seconds."""
        if self.began_at is None or seconds <= 0:
            return 1.0
        return min(1.0, max(FIRST_SHARE, (now - self.began_at) / seconds))

    def takes_part(self, now: float, seconds: float) -> bool:
        """Whether it is among the candidates this time: so often that it gets its share, without chance."""
        if self.began_at is None:
            return True
        self._turns += self.share(now, seconds)
        if self._turns < 1:
            return False
        self._turns -= 1
        return True
