"""Backends and who may get the next request: all balancing state, behind one lock.

Only `BackendPool` changes a `Backend`. Strategies and everybody else read; other threads take `snapshot()`.

State of a backend is two axes. `admin_state` is what the operator wants: `ready`, `drain` (no new requests, checks go
on, requests in flight finish) or `maint` (the same, and no checks). `health` is what we saw: `unknown` until the first
check, `up`, or `down` with a reason. Taking requests needs ready, up, a weight above 0 and room.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from balancer.errors import SettingsError, Unavailable
from balancer.origin import Origin

if TYPE_CHECKING:
    from balancer.strategies import Strategy

AdminState = Literal["ready", "drain", "maint"]
HealthStatus = Literal["unknown", "up", "down"]
# Told of every change: (kind, backend id, text, severity). Called outside the pool lock.
Listener = Callable[[str, str, str, str], None]

ID_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"  # also one step of a URL path, so not "." or ".."
MAX_CONNECTIONS = 1_000_000
MAX_WEIGHT = 256  # as in HAProxy: enough for any ratio, and sums stay small

# One new sample counts 20 %: ten requests tell a change of speed.
EWMA_SHARE = 0.2
# A failed attempt counts as this slow, or as twice what is remembered: a backend that refuses quickly must not look
# like the fastest and draw all traffic.
FAILURE_SECONDS = 1.0
# Without samples the remembered time halves every 5 s, so a slow backend is tried again: one that was 10 times slower
# gets its next chance after about 17 s without traffic.
EWMA_HALF_LIFE_SECONDS = 5.0


@dataclass(slots=True)
class LastCheck:
    """The newest health check: epoch seconds, duration in seconds, and what came back."""

    at: float
    duration: float
    status: int | None
    error: str | None


@dataclass(slots=True)
class Health:
    """What the checks have seen. `since` is epoch seconds of the last change of `status`."""

    status: HealthStatus = "unknown"
    reason: str | None = None
    since: float = 0.0
    consecutive_failures: int = 0
    consecutive_successes: int = 0
    last_check: LastCheck | None = None

    @property
    def is_in_transition(self) -> bool:
        """A check contradicts the status but not yet often enough, so the next one should come soon."""
        return self.status == "unknown" or (
            self.consecutive_failures > 0 if self.status == "up" else self.consecutive_successes > 0
        )


@dataclass(slots=True, eq=False)
class Backend:
    """One server. Written by BackendPool under its lock; others read single fields or take `snapshot()`."""

    id: str
    origin: Origin
    weight: int = 1
    max_connections: int | None = None
    admin_state: AdminState = "ready"
    active: int = 0
    is_leaving: bool = False  # removed by the operator, waits for its last request
    health: Health = field(default_factory=Health)
    ewma: float = 0.0
    ewma_at: float = 0.0
    peak: float = 0.0
    unanswered: int = 0  # of `active`: those whose response has not begun
    heard_at: float = 0.0  # of the pool's clock: the newest first byte, or when `unanswered` rose from 0

    @property
    def is_ready(self) -> bool:
        """Takes requests as long as it has room."""
        return self.admin_state == "ready" and self.health.status == "up" and self.weight > 0

    @property
    def is_full(self) -> bool:
        return self.max_connections is not None and self.active >= self.max_connections

    @property
    def state(self) -> str:
        """What to show: the operator's word unless it is `ready`, else the health."""
        return self.health.status if self.admin_state == "ready" else self.admin_state

    def response_time(self, now: float) -> float:
        """Remembered time to first byte in seconds, 0.0 if never measured; decays while there are no samples."""
        return self.ewma * self._freshness(now)

    def peak_time(self, now: float) -> float:
        """Like `response_time`, but a worse sample counts in full at once and is forgotten only as time passes."""
        return self.peak * self._freshness(now)

    def silence(self, now: float) -> float:
        """Seconds for which requests have been waiting here without one being answered: what a backend that stalls
        will show as response time only when it is too late. 0.0 while nothing waits."""
        return now - self.heard_at if self.unanswered else 0.0

    def observe(self, seconds: float, now: float) -> None:
        """Blend in one measured time to first byte. The staler the memory, the more the new sample counts."""
        staleness = 1 - self._freshness(now)
        share = max(EWMA_SHARE, staleness) if self.ewma else 1.0
        self.ewma += share * (seconds - self.ewma)
        self.peak = max(seconds, self.peak + staleness * (seconds - self.peak))
        self.ewma_at = now

    def _freshness(self, now: float) -> float:
        return math.exp2((self.ewma_at - now) / EWMA_HALF_LIFE_SECONDS)


class Lease:
    """One request's place on a backend: taken by `BackendPool.lease`, given back once by `release`."""

    __slots__ = ("_pool", "backend", "is_answered")

    def __init__(self, pool: BackendPool, backend: Backend) -> None:
        self._pool: BackendPool | None = pool
        self.backend = backend
        self.is_answered = False

    def answered(self, first_byte_seconds: float) -> None:
        """The response has begun but its body may take long: count the time now, not at `release`. Idempotent."""
        if self._pool is not None and not self.is_answered:
            self.is_answered = True
            self._pool._observe(self.backend, first_byte_seconds)

    def release(self, first_byte_seconds: float | None = None, *, failed: bool = False) -> None:
        """Idempotent. `first_byte_seconds` for an attempt that got a response, `failed` if the backend was at fault."""
        pool, self._pool = self._pool, None
        if pool is not None:
            if failed:
                first_byte_seconds = max(FAILURE_SECONDS, 2 * self.backend.ewma)
            pool._release(self.backend, first_byte_seconds, self.is_answered)


class BackendPool:
    """The backends, the strategy that chooses among them, and the counts both depend on.

    `_lock` guards every field of every Backend, `_backends`, `_ready`, `_limited`, `_had_first_round` and `_strategy`.
    Nothing under it does I/O or calls out, but for `Strategy.select`; listeners are told after it is let go.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        fall: int = 2,
        rise: int = 1,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._lock = Lock()
        self._backends: dict[str, Backend] = {}
        self._ready: list[Backend] = []
        self._limited = False
        self._had_first_round = False
        self._strategy = strategy
        self._fall = fall
        self._rise = rise
        self._clock = clock
        self._wall_clock = wall_clock
        self._listeners: list[Listener] = []

    def __repr__(self) -> str:
        with self._lock:
            up = sum(backend.health.status == "up" for backend in self._backends.values())
            active = sum(backend.active for backend in self._backends.values())
            return f"<BackendPool {up} up, {len(self._backends) - up} not, {active} active, {self._strategy.name}>"

    def on_change(self, listener: Listener) -> None:
        """Register before traffic starts; listeners are called outside the lock, by the thread that made the change."""
        self._listeners.append(listener)

    # The data path.

    def lease(self, request: Any, exclude: Collection[str] = ()) -> Lease:
        """Choose and count in one step.

        `exclude` are ids already tried for this request; they are not asked again. Raises Unavailable with the cause
        in words.
        """
        with self._lock:
            candidates = self._ready
            if self._limited:
                candidates = [backend for backend in candidates if not backend.is_full]
            if exclude:
                candidates = [backend for backend in candidates if backend.id not in exclude]
            if not candidates:
                raise Unavailable(self._why_none(exclude))
            backend = self._strategy.select(candidates, request)
            backend.active += 1
            if not backend.unanswered:
                backend.heard_at = self._clock()
            backend.unanswered += 1
            return Lease(self, backend)

    def _observe(self, backend: Backend, first_byte_seconds: float | None) -> None:
        with self._lock:
            self._end_wait(backend, first_byte_seconds)

    def _end_wait(self, backend: Backend, first_byte_seconds: float | None) -> None:
        """One request waits no longer: answered, failed, or given up (None), which says how slow it is at least."""
        now = self._clock()
        if first_byte_seconds is not None:
            backend.observe(first_byte_seconds, now)
            backend.heard_at = now
        elif (silence := backend.silence(now)) > backend.response_time(now):
            backend.observe(silence, now)
        backend.unanswered -= 1

    def _release(self, backend: Backend, first_byte_seconds: float | None, is_answered: bool) -> None:
        with self._lock:
            backend.active -= 1
            if not is_answered:
                self._end_wait(backend, first_byte_seconds)
            gone = backend.is_leaving and backend.active == 0 and self._take_out(backend)
        if gone:
            self._tell("backend_removed", backend.id, "its last request has ended", "info")

    def _why_none(self, exclude: Collection[str]) -> str:
        if not self._backends:
            return "no backend is configured"
        if not self._ready:
            return "no backend is available"
        if exclude:
            return "no other backend is available"
        return "every backend has reached its max_connections"

    # Health, told by the checks and by the data path.

    def record_check(self, backend: Backend, check: LastCheck) -> None:
        """Count one check; after `fall` failures or `rise` successes in a row the status changes.

        The first success ends `unknown` at once, and so does the first failure: nothing is known in its favour.
        """
        with self._lock:
            if self._backends.get(backend.id) is not backend:
                return  # removed while the check was under way
            health = backend.health
            health.last_check = check
            if check.error is None:
                health.consecutive_successes += 1
                health.consecutive_failures = 0
                flips = health.status == "unknown" or (
                    health.status == "down" and health.consecutive_successes >= self._rise
                )
                changed = flips and self._set_health(backend, "up", None)
                if changed:
                    backend.ewma = backend.peak = 0.0  # how fast it was before it failed says nothing now
            else:
                health.consecutive_failures += 1
                health.consecutive_successes = 0
                flips = health.status == "unknown" or (
                    health.status == "up" and health.consecutive_failures >= self._fall
                )
                changed = flips and self._set_health(backend, "down", check.error)
                if health.status == "down":
                    health.reason = check.error
        if changed:
            self._tell_health(backend, check.error)

    def record_refused(self, backend: Backend, reason: str) -> None:
        """A refused connect on the data path: nobody listens there, so the backend is down at once."""
        with self._lock:
            if self._backends.get(backend.id) is not backend:
                return  # removed meanwhile
            backend.health.consecutive_successes = 0
            changed = backend.health.status != "down" and self._set_health(backend, "down", reason)
        if changed:
            self._tell_health(backend, reason)

    def _is_all_known(self) -> bool:
        return all(b.health.status != "unknown" or b.admin_state == "maint" for b in self._backends.values())

    def _set_health(self, backend: Backend, status: HealthStatus, reason: str | None) -> bool:
        backend.health.status = status
        backend.health.reason = reason
        backend.health.since = self._wall_clock()
        self._had_first_round = self._had_first_round or self._is_all_known()
        self._refresh()
        return True

    def _tell_health(self, backend: Backend, error: str | None) -> None:
        if error is None:
            self._tell("backend_up", backend.id, "answers its health check", "info")
        else:
            self._tell("backend_down", backend.id, error, "error")

    # What the operator changes at run time.

    def add(
        self, backend_id: str | None, origin: Origin, *, weight: int = 1, max_connections: int | None = None
    ) -> Backend:
        """Add a backend; it gets requests after its first good check. Raises SettingsError if the id is taken."""
        with self._lock:
            backend_id = backend_id or self._free_id()
            if backend_id in self._backends:
                raise SettingsError(f"backend id {backend_id!r} is taken, choose another")
            backend = Backend(backend_id, origin, weight, max_connections)
            backend.health.since = self._wall_clock()
            self._backends[backend_id] = backend
            self._refresh()
        self._tell("backend_added", backend_id, f"{origin.url}, weight {weight}", "info")
        return backend

    def _free_id(self) -> str:
        number = len(self._backends) + 1
        while f"backend_{number}" in self._backends:
            number += 1
        return f"backend_{number}"

    def update(self, backend_id: str, changes: Mapping[str, Any]) -> Backend:
        """Set `weight`, `max_connections` or `admin_state`, already validated. Raises KeyError for an unknown id."""
        with self._lock:
            backend = self._backends[backend_id]
            real = {name: value for name, value in changes.items() if getattr(backend, name) != value}
            for name, value in real.items():
                setattr(backend, name, value)
            if backend.admin_state == "ready":
                backend.is_leaving = False  # ready again calls the removal off
            if "weight" in real:
                self._strategy.backends_changed()
            self._refresh()
        for name, value in real.items():
            self._tell("backend_changed", backend_id, f"{name} set to {value}", "info")
        return backend

    def remove(self, backend_id: str) -> int:
        """No new requests from now on; it goes when the last one in flight has ended. Returns how many there are.

        Raises KeyError for an unknown id.
        """
        with self._lock:
            backend = self._backends[backend_id]
            backend.admin_state = "drain"
            backend.is_leaving = True
            self._refresh()
            active = backend.active
            if active == 0:
                self._take_out(backend)
        if active:
            self._tell("backend_draining", backend_id, f"to be removed, {active} requests in flight", "info")
        else:
            self._tell("backend_removed", backend_id, backend.origin.url, "info")
        return active

    def _take_out(self, backend: Backend) -> bool:
        """True if it was still here."""
        if self._backends.get(backend.id) is not backend:
            return False
        del self._backends[backend.id]
        self._strategy.backends_changed()
        self._refresh()
        return True

    def use(self, strategy: Strategy) -> None:
        """Switch the strategy; the next `lease` uses it, with no memory of the past."""
        with self._lock:
            self._strategy = strategy
        self._tell("algorithm_changed", "", strategy.name, "info")

    def _refresh(self) -> None:
        """Recompute what `lease` looks at, so that it need not ask every backend for every request."""
        self._ready = [backend for backend in self._backends.values() if backend.is_ready]
        self._limited = any(backend.max_connections is not None for backend in self._ready)

    def _tell(self, kind: str, backend_id: str, text: str, severity: str) -> None:
        for listener in self._listeners:
            listener(kind, backend_id, text, severity)

    # Reading.

    @property
    def algorithm(self) -> str:
        return self._strategy.name

    def backends(self) -> list[Backend]:
        """The live objects in configured order, for the health checker."""
        with self._lock:
            return list(self._backends.values())

    def get(self, backend_id: str) -> Backend | None:
        return self._backends.get(backend_id)

    def has_had_first_round(self) -> bool:
        """True from the moment when every backend that is checked had a health status; later ones change nothing."""
        with self._lock:
            return self._had_first_round or self._is_all_known()

    def snapshot(self) -> list[dict[str, Any]]:
        """All backends at one moment, as plain values in configured order, for `/status`."""
        with self._lock:
            shares = self._strategy.expected_shares(self._ready)
            return [self._describe(backend, shares) for backend in self._backends.values()]

    def _describe(self, backend: Backend, shares: Mapping[str, float] | None) -> dict[str, Any]:
        health, check = backend.health, backend.health.last_check
        return {
            "id": backend.id,
            "url": backend.origin.url,
            "healthy": health.status == "up",
            "active_connections": backend.active,
            "weight": backend.weight,
            "max_connections": backend.max_connections,
            "state": backend.state,
            "admin_state": backend.admin_state,
            "expected_share": None if shares is None else shares.get(backend.id, 0.0),
            "health": {
                "status": health.status,
                "reason": health.reason,
                "since": health.since,
                "fall": self._fall,
                "rise": self._rise,
                "consecutive_failures": health.consecutive_failures,
                "consecutive_successes": health.consecutive_successes,
                "last_check": None
                if check is None
                else {"at": check.at, "duration": check.duration, "status": check.status, "error": check.error},
            },
        }
