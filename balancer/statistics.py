"""Counters, latency histograms, and the bounded rings of recent requests and events.

A request is recorded once, when its answer is complete or has failed, under one lock, so that at any moment
total = successful + failed, and a request is counted for the backend that answered or was tried last, or for none.
Failed means that the client got no complete answer, or one of 500 and above.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balancer.backends import Choice

RECENT_KEPT = 1000  # finished requests that `/requests/<id>` can still explain
TROUBLED_KEPT = 200  # those that failed or were tried more than once stay longer: they are the ones people ask about
EVENTS_KEPT = 500
REFUSED = "write_refused"  # the one kind of event that anybody can cause
RATE_SECONDS = 5  # requests per second are the mean of this many whole seconds
BUDGET_SECONDS = 10  # retries are counted against the requests of this many seconds
PATH_SHOWN = 200  # characters of a path that are kept; the query never is, it may hold secrets

# Upper bounds in seconds, 100 us to about 105 s, each 1.15 times the last: a percentile is off by 15 % at most.
BOUNDS = tuple(0.0001 * 1.15**step for step in range(100))
CODE_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")


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

    def summary(self) -> dict[str, float | None]:
        return {"p50": self.percentile(0.50), "p95": self.percentile(0.95), "p99": self.percentile(0.99)}


@dataclass(slots=True)
class Attempt:
    """One try on one backend. `seconds` until the response head was here or the attempt had failed."""

    choice: Choice
    outcome: str = ""  # a status, or the reason why there is none
    seconds: float = 0.0
    connect: float | None = None  # seconds for a new connection, None if a kept one was used
    error: str | None = None  # in words, for the operator

    @property
    def backend(self) -> str:
        return self.choice.backend.id

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "outcome": self.outcome,
            "error": self.error,
            "seconds": self.seconds,
            "connect": self.connect,
        }


@dataclass(slots=True)
class Exchange:
    """A finished request as it is recorded. Times in seconds; bytes are of the bodies.

    `status` is what the client saw, 499 if it had left; `reason` says why, if no backend's answer went through whole.
    """

    timestamp: float
    method: str
    path: str
    request_id: str
    backend: str | None = None
    status: int = 0
    seconds: float = 0.0
    queued: float = 0.0  # waited for a place on a backend
    bytes_in: int = 0
    bytes_out: int = 0
    complete: bool = True
    reason: str | None = None
    not_retried: str | None = None  # why the last failure was final, in words
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return not self.complete or self.status >= 500

    @property
    def aborted(self) -> bool:
        return self.status == 499 and not self.complete  # not if a backend answered 499 itself

    @property
    def is_troubled(self) -> bool:
        return self.failed or len(self.attempts) > 1

    @property
    def first_byte(self) -> float | None:
        """Seconds until the last attempt had its response head, None if it got none."""
        attempt = self.attempts[-1] if self.attempts else None
        return attempt.seconds if attempt is not None and attempt.error is None else None

    def describe(self) -> dict[str, Any]:
        return {
            "timestamp": self.timestamp,
            "server_id": self.backend,
            "response_time": self.seconds,
            "status": self.status,
            "method": self.method,
            "path": self.path[:PATH_SHOWN],
            "request_id": self.request_id,
            "queued": self.queued,
            "first_byte": self.first_byte,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "attempts": len(self.attempts),
            "tried": [attempt.describe() for attempt in self.attempts],
            "reason": self.reason,
            "not_retried": self.not_retried,
            "complete": self.complete,
        }

    def explain(self) -> dict[str, Any]:
        """`describe` with why each attempt went to its backend."""
        tried = [attempt.describe() | attempt.choice.describe() for attempt in self.attempts]
        return self.describe() | {"tried": tried}


class Counters:
    """Totals of the whole balancer or of one backend. Not locked; the owner's lock guards it."""

    __slots__ = ("total", "failed", "aborted", "seconds", "codes", "latency")

    def __init__(self) -> None:
        self.total = self.failed = self.aborted = 0
        self.seconds = 0.0
        self.codes = [0] * len(CODE_CLASSES)
        self.latency = Histogram()

    def __iadd__(self, other: Counters) -> Counters:
        self.total += other.total
        self.failed += other.failed
        self.aborted += other.aborted
        self.seconds += other.seconds
        self.codes = [ours + theirs for ours, theirs in zip(self.codes, other.codes, strict=True)]
        self.latency += other.latency
        return self

    def add(self, exchange: Exchange) -> None:
        self.total += 1
        self.seconds += exchange.seconds
        self.latency.add(exchange.seconds)
        if exchange.failed:
            self.failed += 1
        if exchange.aborted:
            self.aborted += 1
        elif 100 <= exchange.status < 600:
            self.codes[exchange.status // 100 - 1] += 1

    def describe(self) -> dict[str, Any]:
        return {
            "total_requests": self.total,
            "successful_requests": self.total - self.failed,
            "failed_requests": self.failed,
            "aborted_requests": self.aborted,
            "avg_response_time": self.seconds / self.total if self.total else 0.0,
            "latency": self.latency.summary(),
            "codes": dict(zip(CODE_CLASSES, self.codes, strict=True)),
        }


class Rate:
    """Counts per second, for the newest BUDGET_SECONDS. Not locked; the owner's lock guards it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: deque[list[int]] = deque(maxlen=BUDGET_SECONDS + 1)  # [second, count]

    def add(self) -> None:
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += 1
        else:
            self._seconds.append([second, 1])

    def per_second(self) -> float:
        """Mean of the last whole seconds."""
        now = int(self._clock())
        return self._sum(now - RATE_SECONDS, now) / RATE_SECONDS

    def recent(self) -> int:
        """How many in the last BUDGET_SECONDS and the second that runs."""
        now = int(self._clock())
        return self._sum(now - BUDGET_SECONDS, now + 1)

    def _sum(self, first: int, end: int) -> int:
        return sum(count for second, count in self._seconds if first <= second < end)


class Statistics:
    """What happened since the start or the last reset.

    `_lock` guards everything: `_counters` (per backend id; None for no backend or a former one), `_recent`,
    `_troubled`, `_arrivals`, `_retried`, `_retries`, `_active` and `_start_time`.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._lock = Lock()
        self._wall_clock = wall_clock
        self._active = 0
        self._arrivals = Rate(clock)
        self._retried = Rate(clock)
        self._clear()

    def _clear(self) -> None:
        self._start_time = self._wall_clock()
        self._counters: dict[str | None, Counters] = {None: Counters()}
        self._retries = 0
        self._recent: deque[Exchange] = deque(maxlen=RECENT_KEPT)
        self._troubled: deque[Exchange] = deque(maxlen=TROUBLED_KEPT)

    def begin(self) -> None:
        """A request has arrived; exactly one `record` follows."""
        with self._lock:
            self._active += 1
            self._arrivals.add()

    def record(self, exchange: Exchange) -> None:
        """A request has ended, one way or another."""
        with self._lock:
            self._active -= 1
            counters = self._counters.get(exchange.backend)
            if counters is None:
                counters = self._counters[exchange.backend] = Counters()
            counters.add(exchange)
            self._recent.append(exchange)
            if exchange.is_troubled:
                self._troubled.append(exchange)

    def find(self, request_id: str) -> Exchange | None:
        """The newest finished request of this id that is still kept; clients may send the same id twice."""
        with self._lock:
            for exchange in chain(reversed(self._recent), reversed(self._troubled)):
                if exchange.request_id == request_id:
                    return exchange
        return None

    def may_retry(self, share: float, minimum: int) -> bool:
        """Count one more retry if the budget allows it: `share` of the requests of the last 10 s, but `minimum` a
        second in any case.

        Counted over time rather than over what is in flight: when one of three backends dies, a third of what is in
        flight needs its retry at the same moment, while a storm shows in the seconds that follow.
        """
        with self._lock:
            if self._retried.recent() >= max(minimum * BUDGET_SECONDS, share * self._arrivals.recent()):
                return False
            self._retried.add()
            self._retries += 1
            return True

    def forget(self, backend_id: str) -> None:
        """A backend was removed: its requests stay in the total, and a later backend of that id starts at 0."""
        with self._lock:
            former = self._counters.pop(backend_id, None)
            if former is not None:
                self._counters[None] += former

    def reset(self) -> None:
        """Zero everything but what is in flight."""
        with self._lock:
            self._clear()

    def snapshot(
        self, recent: int = 20
    ) -> tuple[dict[str, Any], dict[str | None, dict[str, Any]], list[dict[str, Any]]]:
        """(whole, per backend id or None, newest `recent` requests first), all of one moment."""
        with self._lock:
            total = Counters()
            for counters in self._counters.values():
                total += counters
            whole = total.describe() | {
                "start_time": self._start_time,
                "active_requests": self._active,
                "retries": self._retries,
                "requests_per_second": self._arrivals.per_second(),
            }
            backends = {key: counters.describe() for key, counters in self._counters.items()}
            newest = list(islice(reversed(self._recent), recent))
        return whole, backends, [exchange.describe() for exchange in newest]


NO_REQUESTS = Counters().describe()  # what `/status` shows for a backend that has had none


class Events:
    """The newest events with a rising `seq`, so that a reader asks only for what is new. `_lock` guards both."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._lock = Lock()
        self._wall_clock = wall_clock
        self._seq = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)

    def add(self, kind: str, backend: str | None, message: str, severity: str = "info") -> None:
        """`kind` is a stable word; `severity` is info, warning or error.

        Refused writes that follow each other become one event with a `count`, or any page could flood the log.
        """
        with self._lock:
            self._seq += 1
            count = 1
            if kind == REFUSED and self._events and self._events[-1]["kind"] == REFUSED:
                count += self._events.pop()["count"]
            self._events.append(
                {
                    "seq": self._seq,
                    "timestamp": self._wall_clock(),
                    "kind": kind,
                    "backend": backend or None,
                    "message": message,
                    "severity": severity,
                    "count": count,
                }
            )

    def since(self, seq: int) -> tuple[list[dict[str, Any]], int]:
        """(events with a higher `seq`, oldest first; the newest `seq`)."""
        with self._lock:
            return [event for event in self._events if event["seq"] > seq], self._seq

    @property
    def latest(self) -> int:
        return self._seq
