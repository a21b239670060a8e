"""What checks and traffic make of a backend: up, down, ejected, on trial, back.

Every method is called with the pool's lock held, and changes only the backends. It returns True if that may change who
is a candidate; those that return nothing never change that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from balancer.balancing.backends import Backend, HealthStatus, LastCheck
from balancer.balancing.changes import Note
from balancer.balancing.ejection import WINDOW_SECONDS, slow_outliers
from balancer.balancing.options import PoolOptions
from balancer.balancing.slowstart import SlowStart
from balancer.balancing.speed import FAILURE_SECONDS

OUTRUN_IN_A_ROW = 2  # requests that others have answered in place of a backend, while it answered none


class Judge:
    """Judges the backends of one pool, and holds its `options`. It has no lock of its own: these and all it touches are
    guarded by the pool's."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        options: PoolOptions,
        note: Note,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.options = options
        self._backends = backends
        self._note = note
        self._clock = clock
        self._wall_clock = wall_clock
        self._rng = rng
        self._compared_at = clock()

    # Traffic.

    def answered(self, backend: Backend, first_byte_seconds: float | None, failure: str = "") -> None:
        """A request waits no longer: the head of its answer is here, or it failed, or was given up (None)."""
        if failure:
            first_byte_seconds = max(FAILURE_SECONDS, 2 * backend.speed.ewma)
        backend.speed.answered(first_byte_seconds, self._clock())
        if first_byte_seconds is not None and self.options.latency_ejection != "off":
            backend.window.add(first_byte_seconds)

    def dropped(self, backend: Backend) -> None:
        """A request waits no longer, since another backend has answered it: where the strategy goes by time."""
        silence = backend.speed.dropped(self._clock())
        if silence is not None and self.options.latency_ejection != "off":
            backend.window.add(silence)

    def outrun(self, backend: Backend, ended: int) -> bool:
        """The same of one that was asked first, where the strategy knows nothing of time. Who answers nobody meanwhile
        is busy: the others are asked first, until its next good check. So many requests had `ended` there."""
        backend.outrun = backend.outrun + 1 if ended == backend.ended_when_outrun else 1
        backend.ended_when_outrun = ended + 1  # with this one
        if backend.outrun < OUTRUN_IN_A_ROW or backend.health.status != "up" or backend.health.is_busy:
            return False
        backend.health.reason = f"{backend.outrun} requests in a row were answered by others"
        return True

    def ended(
        self, backend: Backend, first_byte_seconds: float | None, failure: str, is_trial: bool, is_answered: bool
    ) -> bool:
        """A request is over, for the causes that `Lease.release` takes; `is_answered` if `answered` was told before."""
        if not is_answered:
            self.answered(backend, first_byte_seconds, failure)
        if failure:
            return self.failed(backend, failure, is_trial)
        return first_byte_seconds is not None and self.succeeded(backend, is_trial)

    def succeeded(self, backend: Backend, is_trial: bool) -> bool:
        """The whole answer is through."""
        backend.ejection.consecutive_failures = 0
        if is_trial and backend.ejection.status == "trial":
            self._return(backend, "its trial request was answered")
            return True
        return backend.health.consecutive_failures > 0 and self._works(backend)

    def _works(self, backend: Backend) -> bool:
        """It has answered; True if it was busy until now."""
        self.alive(backend)
        was_busy = backend.health.is_busy
        if was_busy:
            backend.health.reason = None
        return was_busy

    def alive(self, backend: Backend) -> None:
        """Some of an answer has come."""
        backend.health.alive_at = self._clock()

    def failed(self, backend: Backend, failure: str, is_trial: bool) -> bool:
        """The backend was at fault, `failure` says how."""
        if backend.health.status != "up":
            return False  # it is out already
        ejection, after = backend.ejection, self.options.eject_after
        ejection.consecutive_failures += 1
        if ejection.status == "none" and after and ejection.consecutive_failures >= after:
            return self._eject(backend, f"{ejection.consecutive_failures} failures in a row, the last: {failure}")
        if ejection.status == "trial" and is_trial:
            return self._eject(backend, f"its trial request failed: {failure}")
        return False

    def _eject(self, backend: Backend, reason: str) -> bool:
        """Unless too much of the pool is out already, or no other backend would be left."""
        wanted = [other for other in self._backends.values() if other.is_wanted]
        others = [other for other in wanted if other is not backend]
        out = sum(other.ejection.status != "none" for other in others)  # one on trial is no help yet
        helpers = sum(other.is_ready and other.ejection.status == "none" for other in others)
        if out >= max(1, int(self.options.eject_max_share * len(wanted))) or not helpers:
            if backend.ejection.status != "trial":
                return False
            self._return(backend, "its trial request failed, but too few others are left")
            return True
        backend.counts.ejections += 1
        seconds = backend.ejection.start(reason, self.options, self._clock(), self._rng.random())
        self._note("backend_ejected", backend.id, f"for {seconds:.0f} s: {reason}", "warning")
        return True

    def take_over(self, backend: Backend, reason: str | None) -> bool:
        """The verdict of another process on its own traffic: to be ejected for this reason, or back."""
        if reason is not None:
            return self._eject(backend, reason)
        if backend.ejection.status == "none":
            return False
        self._return(backend, "its trial request was answered")
        return True

    def _return(self, backend: Backend, reason: str) -> None:
        backend.ejection.end(self._clock())
        self._start_slowly(backend)
        self._note("backend_returned", backend.id, reason, "info")

    def _start_slowly(self, backend: Backend) -> None:
        """It has been away, and may not bear its full share at once."""
        if self.options.slow_start > 0:
            backend.slow_start = SlowStart(self._clock())

    # Time.

    def sweep(self) -> bool:
        """Ejections and slow starts whose time is over end; response times are compared."""
        now, has_changed = self._clock(), False
        for backend in self._backends.values():
            if backend.ejection.status == "ejected" and now >= backend.ejection.until:
                backend.ejection.status = "trial"
                self._note("backend_trial", backend.id, "one request will show whether it works again", "info")
                has_changed = True
            slow_start = backend.slow_start
            if slow_start.began_at is not None and slow_start.share(now, self.options.slow_start) >= 1:
                slow_start.began_at = None
                has_changed = True
        if now - self._compared_at >= WINDOW_SECONDS:
            self._compared_at = now
            has_changed |= self._compare()
        return has_changed

    def _compare(self) -> bool:
        """Eject, or only name, who is much slower than its peers."""
        mode, has_changed = self.options.latency_ejection, False
        means = {b.id: mean for b in self._backends.values() if (mean := b.window.take()) is not None and b.is_ready}
        slow, limit = slow_outliers(means, self.options.latency_ejection_factor) if mode != "off" else ({}, 0.0)
        for backend_id, mean in slow.items():
            reason = f"{mean * 1000:.0f} ms on average, its peers allow {limit * 1000:.0f} ms"
            if mode == "enforce":
                has_changed |= self._eject(self._backends[backend_id], reason)
            else:
                self._note("backend_slow", backend_id, f"would be ejected: {reason}", "warning")
        return has_changed

    # Checks, and the data path on a refused connect.

    def checked(self, backend: Backend, check: LastCheck) -> bool:
        """After `health_fall` failures or `health_rise` successes in a row the status changes.

        The first success ends `unknown` at once, and so does the first failure: nothing is known in its favour.
        """
        backend.health.last_check = check
        backend.counts.checks += 1
        backend.counts.failed_checks += check.error is not None
        return self._checked_good(backend) if check.error is None else self._checked_bad(backend, check, check.error)

    def _checked_good(self, backend: Backend) -> bool:
        health = backend.health
        health.consecutive_successes += 1
        health.consecutive_failures = 0
        was_busy = self._works(backend)
        if health.status == "up":
            if not (self.options.eject_ends_on_check and backend.ejection.status == "ejected"):
                return was_busy
            self._return(backend, "answers its health check")
            return True
        if health.status == "down" and health.consecutive_successes < self.options.health_rise:
            return False
        if health.status == "down" or backend.is_starting:
            self._start_slowly(backend)
            backend.ejection.end(self._clock())
        backend.speed.forget()
        return self._set(backend, "up", None)

    def _checked_bad(self, backend: Backend, check: LastCheck, error: str) -> bool:
        health = backend.health
        health.consecutive_failures += 1
        health.consecutive_successes = 0
        if health.status == "up" and health.consecutive_failures < self.options.health_fall:
            return False
        if backend.is_starting:
            health.reason = error  # which is to be expected; whoever has started it knows when to give up
            return False
        if health.status == "up" and check.timed_out and self._keeps_waiting(backend, check):
            was_busy, health.reason = health.is_busy, error
            return not was_busy
        if health.status == "down":
            health.reason = error
            return False
        return self._set(backend, "down", error)

    def _keeps_waiting(self, backend: Backend, check: LastCheck) -> bool:
        """Whether it is requests that kept the check waiting, for busy is not dead: some are in flight, and it has not
        been silent for longer than any of them may take; or one was answered meanwhile."""
        silence = self._clock() - backend.health.alive_at
        return silence < (self.options.response_timeout if backend.active else check.duration)

    def refused(self, backend: Backend, reason: str) -> bool:
        backend.health.consecutive_successes = 0
        return backend.health.status != "down" and self._set(backend, "down", reason)

    def _set(self, backend: Backend, status: HealthStatus, reason: str | None) -> bool:
        backend.health.status = status
        backend.health.reason = reason
        backend.health.since = self._wall_clock()
        if status == "up":
            backend.counts.went_up(self._clock())
            self._note("backend_up", backend.id, "answers its health check", "info")
        else:
            backend.counts.went_down(self._clock())
            self._note("backend_down", backend.id, reason or "", "error")
        return True
