"""When requests are sent.

Closed loop: each connection sends its next request when it has its answer, so a slow server is asked less often.
Open loop (--rate): requests are due at fixed times whatever the server does, and latency counts from the time a request
was due. A client that waits and starts its clock late hides the worst of what its users would see ("coordinated
omission").
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from loadtest.connection import clock
from loadtest.latencies import Latencies

SLICE = 0.05  # seconds between looks whether the run is over
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds that a connection waits once it was refused, and at most


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be sent. Without `rate` it is a closed loop; `requests` or `seconds` ends it, whichever is first."""

    requests: int | None
    concurrency: int
    seconds: float | None = None
    rate: float | None = None
    ramp_up: float = 0.0  # seconds
    waits: bool = True  # for the answers under way when `seconds` are over

    def __post_init__(self) -> None:
        assert self.requests is not None or self.seconds is not None, "it would never end"


class Ticket(NamedTuple):
    """Leave to send one request."""

    number: int  # from 1
    due: float | None  # clock value at which it was to be sent, None if at once


class Pace(NamedTuple):
    """What a rate came to, on average until the last request."""

    due: float  # requests a second
    sent: float  # requests a second
    behind: float  # seconds that the last one was sent after it was due


class Schedule(Protocol):
    def take(self, worker: int, pause: float = 0.0) -> Ticket | None:
        """The next request, when it is time for it; None if there are no more. Called by the worker's own thread,
        with the seconds it would rather wait since nobody lets it in."""


def longer(pause: float) -> float:
    """The next pause of a connection that was refused after this one."""
    return min(2 * pause + FIRST_PAUSE, LONGEST_PAUSE)


class ClosedLoop:
    """`_lock` guards the count of tickets. Pauses are for runs with an end in time, which they make no longer."""

    def __init__(self, load: Load, begin: float, is_over: Callable[[], bool]) -> None:
        self._limit = load.requests
        self._end = math.inf if load.seconds is None else begin + load.seconds
        self._begin, self._step = begin, load.ramp_up / load.concurrency
        self._is_over = is_over
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, worker: int, pause: float = 0.0) -> Ticket | None:
        if self._step and not self._wait(self._begin + self._step * worker):
            return None
        if pause and self._end < math.inf and not self._wait(clock() + pause):
            return None
        with self._lock:
            if self._is_over() or self._taken == self._limit or clock() >= self._end:
                return None
            self._taken += 1
            return Ticket(self._taken, None)

    def _wait(self, until: float) -> bool:
        """False if the run was over before."""
        while (rest := min(until, self._end) - clock()) > 0:
            if self._is_over() or self._taken == self._limit:
                return False
            time.sleep(min(rest, SLICE))
        return True


class OpenLoop:
    """One worker at a time, the leader, waits for the next send time while the others wait to lead.

    `_leading` is held by the leader while it sleeps, `_lock` guards `_followers`; the rest is the leader's. A leader
    that nobody follows asks for another worker before it sleeps (`grow`, False if there may be no more), so that there
    are as many connections as the answers under way need.
    """

    def __init__(self, load: Load, begin: float, is_over: Callable[[], bool], grow: Callable[[], bool]) -> None:
        assert load.rate is not None
        self._rate, self._ramp_up, self._limit = load.rate, load.ramp_up, load.requests
        self._begin, self._end = begin, math.inf if load.seconds is None else begin + load.seconds
        self._is_over, self._grow = is_over, grow
        self._taken = 0
        self._leading, self._lock = threading.Lock(), threading.Lock()
        self._followers = 0
        self._is_full = False
        self._behind = 0.0  # seconds that the latest request was sent after it was due
        self.lag = Latencies()  # of the client alone: it was time, and a connection was free or could be opened
        self.overdue = 0  # requests that were due before one of the connections, no more being allowed, was free

    def take(self, worker: int, pause: float = 0.0) -> Ticket | None:
        with self._lock:
            self._followers += 1
        with self._leading:
            with self._lock:
                self._followers -= 1
                alone = not self._followers
            if alone and not self._is_full and not self._is_over():
                self._is_full = not self._grow()
            return self._wait()

    def _wait(self) -> Ticket | None:
        due = self._begin + self.offset(self._taken)
        if self._taken == self._limit or due >= self._end:
            return None
        in_time = clock() < due or not self._is_full
        while not (over := self._is_over()) and (rest := due - clock()) > 0:
            time.sleep(min(rest, SLICE))
        if over:
            return None
        self._taken += 1
        self._behind = clock() - due
        if in_time:
            self.lag.exact.append(self._behind)
            if self._taken % 1000 == 0 and len(self.lag.exact) > 100_000:
                self.lag.condense()
        else:
            self.overdue += 1
        return Ticket(self._taken, due)

    def pace(self) -> Pace | None:
        """None before the first request."""
        if not self._taken:
            return None
        span = self.offset(self._taken)  # the last one has its place in the rate too
        return Pace(self._taken / span, self._taken / (span + self._behind), self._behind)

    def offset(self, number: int) -> float:
        """Seconds from the begin to the request after `number` others. During the ramp the rate grows evenly from 0,
        so that rate * t * t / (2 * ramp) requests are due by then."""
        ramped = self._rate * self._ramp_up / 2
        if number < ramped:
            return math.sqrt(2 * number * self._ramp_up / self._rate)
        return self._ramp_up + (number - ramped) / self._rate
