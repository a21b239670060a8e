"""Counts of finished requests by label, since the start of the process: what `/metrics` shows beside the statistics.

They never fall: neither a reset nor the removal of a backend touches them.
"""

from __future__ import annotations

from collections import defaultdict

from balancer.errors import (
    BodyTruncated,
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    InvalidResponse,
    ResponseTimedOut,
)
from balancer.observe.histogram import Histogram
from balancer.observe.record import DROPPED, Hedged, Record
from balancer.protocol.messages import METHODS

KNOWN = frozenset(METHODS)
OTHER = "other"  # every method that is not one of those: a client may make up any number of them
NO_ANSWER = "none"  # the code of an attempt that got no status
# Outcomes of attempts that got no connection at all, and reasons why an answer that had begun broke off.
UNCONNECTED = frozenset({ConnectFailed.reason, ConnectFailed("", refused=True).reason, ConnectTimedOut.reason})
BROKEN_OFF = frozenset(error.reason for error in (BodyTruncated, ConnectionLost, InvalidResponse, ResponseTimedOut))


class BackendTotals:
    """Attempts on one backend. Not locked; the owner's lock guards it."""

    __slots__ = ("outcomes", "broken")

    def __init__(self) -> None:
        self.outcomes: defaultdict[tuple[str, bool], int] = defaultdict(int)  # by outcome, and if on a kept connection
        self.broken: defaultdict[str, int] = defaultdict(int)  # by reason, after the response head

    def copy(self) -> BackendTotals:
        copied = BackendTotals()
        copied.outcomes, copied.broken = self.outcomes.copy(), self.broken.copy()
        return copied

    def codes(self) -> dict[str, int]:
        """Attempts by status, NO_ANSWER for those without."""
        found: defaultdict[str, int] = defaultdict(int)
        for (outcome, _), count in self.outcomes.items():
            found[outcome if outcome.isdecimal() else NO_ANSWER] += count
        return found

    def failures(self) -> dict[str, int]:
        """Failed attempts by reason. One whose client left is none: it has no outcome; nor is one that was dropped."""
        found = self.broken.copy()
        for (outcome, _), count in self.outcomes.items():
            if outcome and outcome != DROPPED and not outcome.isdecimal():
                found[outcome] += count
        return found

    @property
    def opened(self) -> int:
        """Attempts on a new connection."""
        return sum(n for (outcome, is_kept), n in self.outcomes.items() if not is_kept and outcome not in UNCONNECTED)

    @property
    def reused(self) -> int:
        """Attempts on a kept connection."""
        return sum(n for (_, is_kept), n in self.outcomes.items() if is_kept)


class Totals:
    """All requests. Not locked; the owner's lock guards it."""

    __slots__ = ("answers", "errors", "retries", "hedges", "backends", "bytes_in", "bytes_out", "waits")

    def __init__(self) -> None:
        self.answers: defaultdict[tuple[int, str], int] = defaultdict(int)  # by status and method
        self.errors: defaultdict[str, int] = defaultdict(int)  # by reason
        self.retries: defaultdict[str, int] = defaultdict(int)  # by what had failed before
        self.hedges: defaultdict[tuple[str, Hedged], int] = defaultdict(int)  # by pool, and what came of it
        self.backends: defaultdict[str, BackendTotals] = defaultdict(BackendTotals)
        self.bytes_in = self.bytes_out = 0
        self.waits = Histogram()  # of the requests that had to wait for a place

    def add(self, record: Record, count: int = 1) -> None:
        """So many of its kind; the bytes are those of all of them."""
        method, attempts = record.method, record.attempts
        self.answers[record.status, method if method in KNOWN else OTHER] += count
        self.bytes_in += record.bytes_in
        self.bytes_out += record.bytes_out
        for attempt in attempts:  # without a call: every request comes here
            self.backends[attempt.choice.backend.id].outcomes[attempt.outcome, attempt.connect is None] += count
        if record.queued:
            self.waits.add(record.queued)
        if record.reason is not None or len(attempts) > 1:
            self._add_trouble(record, count)

    def _add_trouble(self, record: Record, count: int) -> None:
        reason, attempts = record.reason, record.attempts
        for attempt in record.retried():
            self.retries[attempt.outcome] += count
        if (hedge := record.hedge) is not None:
            self.hedges[record.pool or "", hedge] += count
        if reason is None:
            return
        self.errors[reason] += count
        if reason in BROKEN_OFF and attempts and attempts[-1].outcome.isdecimal():
            self.backends[attempts[-1].backend].broken[reason] += count

    def copy(self) -> Totals:
        copied = Totals()
        copied.answers, copied.errors, copied.retries = self.answers.copy(), self.errors.copy(), self.retries.copy()
        copied.hedges = self.hedges.copy()
        copied.backends.update((backend, totals.copy()) for backend, totals in self.backends.items())
        copied.bytes_in, copied.bytes_out = self.bytes_in, self.bytes_out
        copied.waits = self.waits.copy()
        return copied

    def forget(self, backend: str) -> None:
        """For good: it has been gone for so long that it will not come back."""
        self.backends.pop(backend, None)
