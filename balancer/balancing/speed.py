"""How fast a backend answers: what is remembered of it, and what it shows by keeping requests waiting."""

from __future__ import annotations

import math
from dataclasses import dataclass

# One new sample counts 20 %: ten requests tell a change of speed.
EWMA_SHARE = 0.2
# A failed attempt counts as this slow, or as twice what is remembered: a backend that refuses quickly must not look
# like the fastest and draw all traffic.
FAILURE_SECONDS = 1.0
# Without samples the remembered time halves every 5 s, so a slow backend is tried again: one that was 10 times slower
# gets its next chance after about 17 s without traffic.
EWMA_HALF_LIFE_SECONDS = 5.0


@dataclass(slots=True)
class Speed:
    """Of one backend. Times in seconds, moments of the pool's clock; the pool's lock guards it."""

    ewma: float = 0.0
    peak: float = 0.0
    ewma_at: float = 0.0
    unanswered: int = 0  # requests in flight whose response has not begun
    answered_at: float = 0.0  # the newest first byte, or when `unanswered` rose from 0
    is_owing: bool = False  # an answer that is not waited for any more; until it gives another one

    def forget(self) -> None:
        """How fast or how faulty it was before says nothing now."""
        self.ewma = self.peak = 0.0

    def response_time(self, now: float) -> float:
        """Remembered time to first byte in seconds, 0.0 if never measured; decays while there are no samples."""
        return faded(self.ewma, now - self.ewma_at)

    def peak_time(self, now: float) -> float:
        """Like `response_time`, but a worse sample counts in full at once and is forgotten only as time passes."""
        return faded(self.peak, now - self.ewma_at)

    def silence(self, now: float) -> float:
        """Seconds for which requests have been waiting here without one being answered: what a backend that stalls
        will show as response time only when it is too late. 0.0 while nothing waits."""
        return now - self.answered_at if self.unanswered else 0.0

    def sent(self, now: float) -> None:
        """One more request waits for its answer to begin."""
        if not self.unanswered:
            self.answered_at = now - self.response_time(now) if self.is_owing else now
        self.unanswered += 1

    def answered(self, seconds: float | None, now: float) -> None:
        """One request waits no longer: answered after `seconds`, failed, or given up (None), which says how slow it is
        at least."""
        if seconds is not None:
            self.observe(seconds, now)
            self.answered_at, self.is_owing = now, False
        elif (silence := self.silence(now)) > self.response_time(now):
            self.observe(silence, now)
        self.unanswered = max(0, self.unanswered - 1)  # 0 if the backend has moved to and fro meanwhile

    def dropped(self, now: float) -> float | None:
        """One request waits no longer, for another backend has answered it. This one is as slow as it has been silent,
        at least; returns that if it is news. It goes on owing an answer: else it would look as good as before as soon
        as nothing waits for it."""
        silence = self.silence(now)
        is_news = silence > self.response_time(now)
        if is_news:
            self.ewma, self.peak, self.ewma_at = silence, max(silence, self.peak_time(now)), now
        self.is_owing = True
        self.unanswered = max(0, self.unanswered - 1)
        return silence if is_news else None

    def observe(self, seconds: float, now: float) -> None:
        """Blend in one measured time to first byte. The staler the memory, the more the new sample counts."""
        staleness = 1 - faded(1.0, now - self.ewma_at)
        share = max(EWMA_SHARE, staleness) if self.ewma else 1.0
        self.ewma += share * (seconds - self.ewma)
        self.peak = max(seconds, self.peak + staleness * (seconds - self.peak))
        self.ewma_at = now

    def merge(self, ewma: float, peak: float, ewma_at: float, answered_at: float) -> None:
        """Take in what another process remembers: whoever has seen the newest sample has taken in the others."""
        if ewma_at > self.ewma_at:
            self.ewma, self.peak, self.ewma_at = ewma, max(peak, self.peak_time(ewma_at)), ewma_at
        self.answered_at = max(answered_at, self.answered_at)


def faded(remembered: float, seconds: float) -> float:
    """What is left of it after so many seconds without samples."""
    return remembered * math.exp2(-seconds / EWMA_HALF_LIFE_SECONDS)
