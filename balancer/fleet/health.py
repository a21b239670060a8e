"""Active health checks: one thread drives the checks of all backends of all pools side by side.

Each check is `GET health_path` on a fresh connection (a kept one would not notice a full accept queue), with a short
time-out. 200 to 399 is good; redirects are not followed. While a check contradicts what is believed of a backend, or
nothing is known yet, the next one comes sooner; while one is late, further ones begin beside it. So recovery, and
failover from what refuses or is frozen, stay under a second.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Thread

from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.pool import BackendPool
from balancer.errors import BackendError, ConnectTimedOut, OutOfDescriptors, ResponseTimedOut
from balancer.protocol.messages import Line
from balancer.protocol.origin import Origin
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.transport import BackendAdapter

log = logging.getLogger("balancer.health")

GOOD_STATUSES = range(200, 400)
JITTER = 0.1  # share of the interval by which it may be shorter, so that many balancers do not check in step
LATE = 0.2  # share of the time-out after which a check is late
TRANSITION_SPEEDUP = 5  # checks per interval while a change is in the air
ROUND_SECONDS = 1.0  # at most between two rounds, however rare the checks: `on_round` lets time pass elsewhere
MAX_BODY = 1_048_576  # bytes of an answer that are read, so that the backend can write all of it
MAX_PROBES = 64  # checks at the same time, of all pools; one that hangs holds one of these until its time-out


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """What the checks need of the settings, by their names."""

    health_path: str
    health_host: str | None
    health_interval: float
    health_timeout: float
    health_fall: int


@dataclass(slots=True)
class Checks:
    """Of one backend: a row of checks begins when it is `due`, of time.monotonic(); `under_way` has the numbers, in
    this row, of those that have not ended."""

    due: float
    began: float = 0.0
    under_way: set[int] = field(default_factory=set)


class Probe:
    """One `GET health_path` to a backend."""

    def __init__(self, options: HealthOptions, adapter: BackendAdapter) -> None:
        self._options = options
        self._adapter, self._note_old = adapter.for_checks(options.health_timeout), adapter.note_old

    def check(self, origin: Origin) -> LastCheck:
        """Ask once; what went wrong is `error`. Raises OutOfDescriptors alone."""
        started = time.monotonic()
        status: int | None = None
        error: str | None = None
        timed_out = False
        try:
            status = self._status(origin, started + self._options.health_timeout)
            if status not in GOOD_STATUSES:
                error = f"health check answered {status}"
        except BackendError as failure:
            timed_out = isinstance(failure, ConnectTimedOut | ResponseTimedOut)
            late = f"{origin.url} did not answer within {self._options.health_timeout:g} s"  # not what was left of it
            error = f"health check failed: {late if isinstance(failure, ResponseTimedOut) else failure}"
        return LastCheck(time.time(), time.monotonic() - started, status, error, timed_out)

    def _status(self, origin: Origin, deadline: float) -> int:
        lines: list[Line] = [
            (b"host", (self._options.health_host or origin.authority).encode("ascii")),
            (b"user-agent", b"load-balancer-health"),
            (b"connection", b"close"),
        ]
        target = self._options.health_path.encode("ascii")
        response = self._adapter.exchange(OutgoingRequest("GET", target, lines), origin)
        if response.head.version == "1.0":
            self._note_old(origin)
        assert isinstance(response.body, ResponseBody)
        response.body.read_out(MAX_BODY, deadline)
        return response.status_code


class Checked:
    """A pool, and how its backends are checked."""

    def __init__(self, pool: BackendPool, options: HealthOptions, adapter: BackendAdapter) -> None:
        self.pool, self.options, self.probe = pool, options, Probe(options, adapter)


class HealthChecker:
    """Runs the probes and tells the pools. `start` and `stop` once each; `wake` and `use` from any thread.

    `_checks` belongs to the health thread alone, but for `under_way`: the health thread adds, the check's own thread
    takes out again, each one step that needs no lock. `_nudge` wakes the health thread early.
    """

    def __init__(self, on_round: Callable[[], None], rng: random.Random | None = None) -> None:
        self.checked: Sequence[Checked] = ()
        self._on_round = on_round
        self._rng = rng or random.Random()
        self._nudge = Event()
        self._checks: dict[Backend, Checks] = {}
        self._stopping = False
        self._probes = ThreadPoolExecutor(MAX_PROBES, thread_name_prefix="health-probe")
        self._thread = Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join; probes under way end within their time-out."""
        self._stopping = True
        self._nudge.set()
        if self._thread.is_alive():
            self._thread.join()
        self._probes.shutdown(wait=True, cancel_futures=True)

    def use(self, checked: Sequence[Checked]) -> None:
        """Check these from now on; a check under way still counts."""
        self.checked = checked
        self.wake()

    def wake(self) -> None:
        """Look at the backends now: one was added, or the data path saw one refuse."""
        self._nudge.set()

    def check_once(self, checked: Checked, backend: Backend, checks: Checks, number: int) -> None:
        """Probe one backend now and record the result."""
        try:
            origin = backend.origin
            checked.pool.record_check(backend, checked.probe.check(origin), origin)
        except OutOfDescriptors as error:  # says nothing about the backend
            log.error("cannot check %s: %s", backend.id, error)
        except Exception:  # a surprise must be seen, and the backend be probed again
            log.exception("health check of %s failed", backend.id)
        finally:
            checks.under_way.discard(number)
            if backend.health.is_in_transition:
                self._nudge.set()

    def _run(self) -> None:
        while not self._stopping:
            try:
                wait = self._round()
            except Exception as error:  # the thread must outlive any surprise, or failover would silently end
                if isinstance(error, RuntimeError) and "shutdown" in str(error):
                    return  # no thread may start any more: the process ends, and another server has not stopped us
                log.exception("health round failed")
                wait = ROUND_SECONDS
            self._nudge.wait(wait)
            self._nudge.clear()

    def _round(self) -> float:
        """Start the checks that are due; returns seconds until the next one is. While one is late, as many as it takes
        to be sure run side by side: one after another they would take as many time-outs."""
        now = time.monotonic()
        known, self._checks = self._checks, {}
        is_full = sum(len(checks.under_way) for checks in known.values()) >= MAX_PROBES
        next_due = now + ROUND_SECONDS
        for checked in self.checked:
            for backend in checked.pool.backends():
                if backend.admin_state != "maint":
                    self._checks[backend] = known.get(backend) or Checks(now)
                    next_due = min(next_due, self._next(checked, backend, now, is_full))
        self._on_round()
        return max(0.01, next_due - now)

    def _next(self, checked: Checked, backend: Backend, now: float, is_full: bool) -> float:
        """Start a check of this backend if one is due; returns when to look at it again."""
        checks, options = self._checks[backend], checked.options
        number = max([*checks.under_way], default=-1) + 1
        if number == 0:
            due = checks.due = min(checks.due, now + self._pace(options, backend))
        elif number < options.health_fall and backend.health.status == "up" and not is_full:
            due = checks.began + number * LATE * options.health_timeout
        else:  # to see soon that they have ended, should it be due by then
            return checks.due
        if due > now:
            return due
        if number == 0:
            checks.began, checks.due = now, now + self._pace(options, backend)
        checks.under_way.add(number)
        self._probes.submit(self.check_once, checked, backend, checks, number)
        return now + LATE * options.health_timeout

    def _pace(self, options: HealthOptions, backend: Backend) -> float:
        """Seconds to the next check of this backend."""
        spread = 1 - self._rng.uniform(0, JITTER)
        return options.health_interval * spread / (TRANSITION_SPEEDUP if backend.health.is_in_transition else 1)
