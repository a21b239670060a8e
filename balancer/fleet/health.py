"""Active health checks: one thread drives the checks of all backends of all pools side by side.

Each check is `GET health_path` with a short time-out. 200 to 399 is good; redirects are not followed. While a check
contradicts what is believed of a backend, or nothing is known yet, the next one comes sooner; while one is late,
further ones begin beside it. So recovery, and failover from what refuses or is frozen, stay under a second.

A quiet backend is checked by this thread itself, on a kept connection if it keeps one. A kept one would not notice that
nobody can connect any more, with a full accept queue for one. So every FRESH_EVERY-th check has a connection of its
own, and so has every one while a change is in the air; those have a thread.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from threading import Thread

from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.pool import BackendPool
from balancer.errors import BackendError, ConnectTimedOut, OutOfDescriptors, ResponseTimedOut
from balancer.fleet.answers import INPUT, OUTPUT, Answers
from balancer.protocol.messages import Line
from balancer.protocol.origin import Origin
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.sent import Sent
from balancer.upstream.transport import BackendAdapter

log = logging.getLogger("balancer.health")

GOOD_STATUSES = range(200, 400)
JITTER = 0.1  # share of the interval by which it may be shorter, so that many balancers do not check in step
LATE = 0.2  # share of the time-out after which a check is late
TRANSITION_SPEEDUP = 5  # checks per interval while a change is in the air
ROUND_SECONDS = 1.0  # at most between two rounds, however rare the checks: `on_round` lets time pass elsewhere
TICK_SECONDS = 0.04  # what is due within one is sent together at its end
AT_ONCE = 0.0  # in place of a time at which to look
CLOSE_EVERY = 10  # rounds between two looks for kept connections that nobody uses any more
FRESH_EVERY = 10  # checks of a backend of which one opens a connection
MAX_BODY = 1_048_576  # bytes of an answer that are read, so that the backend can write all of it
MOST_REQUESTS = 10_000  # that are remembered; above that all are made again
# Checks with a thread at the same time, of all pools: one that hangs has it until its time-out. Backends that did so
# the last time share places of their own, so that no other waits for them.
MAX_PROBES, MAX_SICK = 128, 64


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """What the checks need of the settings, by their names."""

    health_path: str
    health_host: str | None
    health_interval: float
    health_timeout: float
    health_fall: int


class CheckRequest(OutgoingRequest):
    """`GET health_path`, the same each time."""

    def __init__(self, options: HealthOptions, origin: Origin, keeps: bool) -> None:
        lines: list[Line] = [
            (b"host", (options.health_host or origin.authority).encode("ascii")),
            (b"user-agent", b"load-balancer-health"),
        ]
        if not keeps:
            lines.append((b"connection", b"close"))
        super().__init__("GET", options.health_path.encode("ascii"), lines)
        self._head = super().head()

    def head(self) -> bytes:
        return self._head


class Probe:
    """One `GET health_path` to a backend, on a connection of its own or, if it `keeps`, on one that is kept."""

    def __init__(self, options: HealthOptions, adapter: BackendAdapter) -> None:
        self._options = options
        self._fresh, self._kept = (adapter.for_checks(options.health_timeout, keeps) for keeps in (False, True))
        self._note_old = adapter.note_old
        self._requests: dict[Origin, OutgoingRequest] = {}  # on kept connections: one at a time for each origin

    def send(self, origin: Origin) -> Sent | None:
        """On a kept connection, if there is one that needs no waiting. Raises BackendError."""
        request = self._requests.get(origin)
        if request is None:
            if len(self._requests) >= MOST_REQUESTS:
                self._requests.clear()
            request = self._requests[origin] = CheckRequest(self._options, origin, keeps=True)
        return self._kept.send_now(request, origin)

    def begin(self, origin: Origin) -> Sent | None:
        """On a connection of its own, if that needs no waiting: to be written once that is connected."""
        return self._kept.begin(CheckRequest(self._options, origin, keeps=False), origin)

    def look(self, sent: Sent) -> bool:
        """Whether all of its answer is here by now."""
        return self._kept.look(sent)

    def check(self, origin: Origin, started: float, keeps: bool, sent: Sent | None = None) -> LastCheck:
        """Ask once, unless it was `sent`, and wait; what went wrong is `error`. Raises OutOfDescriptors alone."""
        status: int | None = None
        failure: BackendError | None = None
        try:
            adapter = self._kept if keeps else self._fresh
            request = CheckRequest(self._options, origin, keeps) if sent is None else sent.request
            response = adapter.exchange(request, origin, sent)
            status = response.status_code
            if response.head.version == "1.0":
                self._note_old(origin)
            if isinstance(response.body, ResponseBody):
                response.body.read_out(MAX_BODY, started + self._options.health_timeout)
        except BackendError as error:
            failure = error
        return self.result(origin, started, status, failure)

    def result(
        self, origin: Origin, started: float, status: int | None, failure: BackendError | None = None
    ) -> LastCheck:
        error: str | None = None
        if failure is not None:
            late = f"{origin.url} did not answer within {self._options.health_timeout:g} s"  # not what was left of it
            error = f"health check failed: {late if isinstance(failure, ResponseTimedOut) else failure}"
        elif status not in GOOD_STATUSES:
            error = f"health check answered {status}"
        timed_out = failure is not None and isinstance(failure, ConnectTimedOut | ResponseTimedOut)
        return LastCheck(time.time(), time.monotonic() - started, status, error, timed_out)

    def close(self) -> None:
        """Of kept connections, and of such as are not in use any more."""
        self._kept.close()

    def close_idle(self) -> None:
        self._kept.close_idle()


class Checked:
    """A pool, and how its backends are checked."""

    def __init__(self, pool: BackendPool, options: HealthOptions, adapter: BackendAdapter) -> None:
        self.pool, self.options, self.probe = pool, options, Probe(options, adapter)


@dataclass(slots=True, eq=False)
class Checks:
    """Of one backend: a row of checks begins when it is `due`, of time.monotonic(); `under_way` has the numbers, in
    this row, of those that have not ended. `sent` is the first check of a row while nobody but the health thread waits
    for it. It `is_new` until the first row."""

    checked: Checked
    backend: Backend
    due: float
    until_fresh: int  # checks of which each may be on a kept connection
    began: float = 0.0
    is_new: bool = True
    under_way: set[int] = field(default_factory=set)
    sent: Sent | None = None
    look_at: int = 0  # the tick at which to look at it again


class HealthChecker:
    """Runs the probes and tells the pools, and `on_check`. `start` and `stop` once each; `wake` and `use` from any
    thread.

    All fields belong to the health thread alone, but for these, of which each access is one step that needs no lock:
    `use` replaces `checked`; a check's own thread takes its number out of `under_way` and adds to `_again`, whom to
    look at soon; `check_soon` adds to `_told`, whom to check; `wake` sets `_is_nudged`, to look at all. `_agenda` has
    whom to look at by the tick; an entry whose tick is not its `look_at` is old.
    """

    def __init__(self, on_round: Callable[[], None], rng: random.Random | None = None) -> None:
        self.checked: Sequence[Checked] = ()
        self.on_check: Callable[[BackendPool, Backend, LastCheck, Origin], None] = lambda *check: None
        self._on_round = on_round
        self._rng = rng or random.Random()
        self._answers: Answers[Checks] = Answers()
        self._is_nudged = False
        self._again: deque[Checks] = deque()
        self._told: deque[Backend] = deque()
        self._checks: dict[Backend, Checks] = {}
        self._agenda: defaultdict[int, list[Checks]] = defaultdict(list)
        self._next_round = 0.0
        self._stopping = False
        self._probes = ThreadPoolExecutor(MAX_PROBES, thread_name_prefix="health-probe")
        self._sick = ThreadPoolExecutor(MAX_SICK, thread_name_prefix="health-sick")
        self._thread = Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._answers.open()
        self._thread.start()

    def stop(self) -> None:
        """Stop and join; probes under way end within their time-out."""
        self._stopping = True
        self._answers.wake()
        if self._thread.is_alive():
            self._thread.join()
        for probes in (self._probes, self._sick):
            probes.shutdown(wait=True, cancel_futures=True)
        for checks in self._checks.values():
            self._drop(checks)
        for checked in self.checked:
            checked.probe.close()
        self._answers.close()

    def use(self, checked: Sequence[Checked]) -> None:
        """Check these from now on; a check under way still counts."""
        before, self.checked = self.checked, checked
        for each in before:
            each.probe.close()
        self.wake()

    def wake(self) -> None:
        """Look at the backends now: one was added, or the data path saw one refuse."""
        self._is_nudged = True
        self._answers.wake()

    def check_soon(self, backend: Backend) -> None:
        """Somebody has found it other than it is believed to be here."""
        self._told.append(backend)
        self._answers.wake()

    # A thread of its own.

    def check_once(self, checks: Checks, number: int, keeps: bool, sent: Sent | None = None) -> None:
        """Probe one backend now, or go on with what was `sent`, and record the result."""
        checked, backend = checks.checked, checks.backend
        try:
            started, origin = time.monotonic(), backend.origin
            if sent is not None:
                started, origin = checks.began, sent.connection.origin
            self._tell(checks, checked.probe.check(origin, started, keeps, sent), origin)
        except OutOfDescriptors as error:  # says nothing about the backend
            log.error("cannot check %s: %s", backend.id, error)
        except Exception:  # a surprise must be seen, and the backend be probed again
            log.exception("health check of %s failed", backend.id)
        finally:
            self._let_go(checked)
            checks.under_way.discard(number)
            if backend.health.is_in_transition:
                self._again.append(checks)
                self._answers.wake()

    def _tell(self, checks: Checks, result: LastCheck, origin: Origin) -> None:
        pool, backend = checks.checked.pool, checks.backend
        pool.record_check(backend, result, origin)
        self.on_check(pool, backend, result, origin)

    def _let_go(self, checked: Checked) -> None:
        """Of a connection that was given back to a probe which is not used any more."""
        if checked not in self.checked:
            checked.probe.close()

    # The health thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                answered = self._answers.wait(self._round())
            except Exception as error:  # the thread must outlive any surprise, or failover would silently end
                if isinstance(error, RuntimeError) and "shutdown" in str(error):
                    return  # no thread may start any more: the process ends, and another server has not stopped us
                log.exception("health round failed")
                answered = self._answers.wait(ROUND_SECONDS)
            for checks in answered:
                self._take(checks)

    def _round(self) -> float:
        """Start the checks that are due; returns seconds until the next one may be."""
        now = time.monotonic()
        if self._is_nudged or now >= self._next_round:
            is_nudged, self._is_nudged, self._next_round = self._is_nudged, False, now + ROUND_SECONDS
            self._gather(now, is_nudged)
            self._on_round()
        while self._again:
            self._enter(self._again.popleft(), AT_ONCE)
        while self._told:
            if (told := self._checks.get(self._told.popleft())) is not None:
                told.due = now
                self._enter(told, AT_ONCE)
        for tick in [each for each in self._agenda if each * TICK_SECONDS <= now]:
            for checks in self._agenda.pop(tick):
                if checks.look_at == tick and self._checks.get(checks.backend) is checks:
                    self._enter(checks, self._next(checks, now))
        next_at = min(self._agenda, default=inf) * TICK_SECONDS
        return max(0.0, min(next_at, self._next_round) - now)

    def _gather(self, now: float, is_nudged: bool) -> None:
        """Who is to be checked; whoever is new is looked at now, and everybody if that was asked for."""
        known, self._checks = self._checks, {}
        for checked in self.checked:
            if int(now) % CLOSE_EVERY == 0:
                checked.probe.close_idle()
            for backend in checked.pool.backends():
                if backend.admin_state != "maint":
                    checks = known.pop(backend, None)
                    if is_nudged or checks is None:
                        checks = checks or Checks(checked, backend, now, self._rng.randrange(FRESH_EVERY))
                        checks.checked = checked
                        self._enter(checks, AT_ONCE)
                    self._checks[backend] = checks
        for checks in known.values():
            self._drop(checks)

    def _enter(self, checks: Checks, at: float) -> None:
        checks.look_at = tick = int(at / TICK_SECONDS) + 1
        self._agenda[tick].append(checks)

    def _next(self, checks: Checks, now: float) -> float:
        """Start a check of this backend if one is due; returns when to look at it again. While one is late, as many as
        it takes to be sure run side by side: one after another they would take as many time-outs."""
        options, backend = checks.checked.options, checks.backend
        number, due, expires = 0, checks.due, inf
        if checks.under_way:
            expires = checks.began + options.health_timeout if checks.sent is not None else inf
            if expires <= now:
                self._expire(checks)
                return now
            number = max(checks.under_way.copy(), default=-1) + 1
        if number == 0:
            if due > now:
                soon = self._pace(checks) if backend.health.is_in_transition else options.health_interval
                due = checks.due = min(due, now + soon)
        elif number < options.health_fall and backend.health.status == "up" and not self._is_full():
            due = checks.began + number * LATE * options.health_timeout
        else:  # to see soon that they have ended, should it be due by then
            return min(max(due, now + TICK_SECONDS), expires)
        if due > now:
            return min(due, expires)
        self._begin(checks, number, now)
        return min(now + LATE * options.health_timeout, expires)

    def _is_full(self) -> bool:
        return sum(len(checks.under_way) for checks in self._checks.values() if checks.sent is None) >= MAX_PROBES

    def _begin(self, checks: Checks, number: int, now: float) -> None:
        health, is_quiet, keeps = checks.backend.health, False, False
        if number == 0:
            seconds = self._pace(checks)
            if checks.is_new:  # the first ones of all are made at once, the second ones at any time: so they are spread
                seconds, checks.is_new = seconds * self._rng.random(), False
            checks.began, checks.due = now, now + seconds
            is_quiet = health.status == "up" and not health.consecutive_failures
            keeps = is_quiet and checks.until_fresh > 0
            checks.until_fresh = checks.until_fresh - 1 if keeps else FRESH_EVERY - 1
        checks.under_way.add(number)
        if not (is_quiet and self._send(checks, keeps)):
            self._submit(checks, number, keeps)

    def _submit(self, checks: Checks, number: int, keeps: bool, sent: Sent | None = None) -> None:
        last = checks.backend.health.last_check
        probes = self._sick if last is not None and last.timed_out and not checks.backend.is_ready else self._probes
        probes.submit(self.check_once, checks, number, keeps, sent)

    def _send(self, checks: Checks, keeps: bool) -> bool:
        """Without a thread, if that needs no waiting."""
        probe, origin = checks.checked.probe, checks.backend.origin
        try:
            sent = probe.send(origin) if keeps else probe.begin(origin)
        except BackendError:
            return False
        if sent is None:
            return False
        if sent.rest or not self._answers.expect(sent.connection, checks, INPUT if keeps else INPUT | OUTPUT):
            sent.close()
            return False
        checks.sent = sent
        return True

    def _take(self, checks: Checks) -> None:
        """Something has come, which mostly is the whole answer; or a new connection can be written to."""
        sent = checks.sent
        if sent is None:
            return
        probe, origin = checks.checked.probe, sent.connection.origin
        if not sent.is_whole:
            sent.write_now()
            if sent.is_whole and self._answers.expect(sent.connection, checks):
                return
        checks.sent = None
        try:
            if probe.look(sent) and sent.response is not None:
                self._record(checks, probe.result(origin, checks.began, sent.response.status_code), origin)
            else:  # a long answer, or none on a connection that had died
                self._submit(checks, 0, True, sent)
        except Exception:  # a surprise must be seen, and is no reason to lose the others
            log.exception("health check of %s failed", checks.backend.id)
            checks.under_way.discard(0)
        finally:
            self._let_go(checks.checked)

    def _expire(self, checks: Checks) -> None:
        sent, checks.sent = checks.sent, None
        assert sent is not None
        self._answers.forget(sent.connection)
        origin = sent.connection.origin
        if sent.is_whole:
            sent.expire()
        else:
            seconds = checks.checked.options.health_timeout
            sent.fail(ConnectTimedOut(f"{origin.url} did not accept within {seconds:.3g} s"))
        sent.close()
        self._record(checks, checks.checked.probe.result(origin, checks.began, None, sent.failure), origin)

    def _drop(self, checks: Checks) -> None:
        """Nobody waits for what was sent any more, or looks whether it is late."""
        sent, checks.sent = checks.sent, None
        if sent is not None:
            self._answers.forget(sent.connection)
            sent.close()

    def _record(self, checks: Checks, result: LastCheck, origin: Origin) -> None:
        checks.under_way.discard(0)
        self._tell(checks, result, origin)
        self._enter(checks, AT_ONCE if checks.backend.health.is_in_transition else checks.due)

    def _pace(self, checks: Checks) -> float:
        """Seconds to the next check of this backend."""
        seconds = checks.checked.options.health_interval * (1 - JITTER * self._rng.random())
        return seconds / TRANSITION_SPEEDUP if checks.backend.health.is_in_transition else seconds
