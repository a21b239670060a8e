"""Who gets the next request: all balancing state, behind one lock.

A backend takes requests if the operator lets it (`is_wanted`), its health checks say `up`, and real traffic has not
ejected it. With room (`max_connections`, one request for a trial) it is a candidate; the strategy chooses among those.
When all are full, requests wait in one bounded queue.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from balancer.backends import Backend, Choice, Health, LastCheck
from balancer.connection import Watcher
from balancer.errors import NoRoom, SettingsError, Unavailable
from balancer.judge import Judge, JudgeOptions
from balancer.origin import Origin
from balancer.tally import Tally
from balancer.waiting import Waiter, WaitingLine

if TYPE_CHECKING:
    from balancer.strategies import Strategy

FORMER_KEPT = 1000  # tallies of backends that are gone
# Told of every change: (kind, backend id, text, severity). Called outside the pool lock.
Listener = Callable[[str, str, str, str], None]


@dataclass(frozen=True, slots=True)
class PoolOptions(JudgeOptions):
    """What the pool needs of the settings; `settings.Settings` says what each one means."""

    panic_threshold: float = 0.0
    queue_limit: int = 500
    queue_timeout: float = 5.0


@dataclass(slots=True)
class PoolChanges:
    """What `apply` does at once. `update` has fields per backend id, `url` as an Origin under `origin`."""

    options: PoolOptions | None = None
    strategy: Strategy | None = None
    add: Sequence[Backend] = ()
    update: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remove: Sequence[str] = ()


class Lease:
    """One request's place on a backend: taken by `BackendPool.lease`, given back once by `release`."""

    __slots__ = ("_pool", "backend", "choice", "is_trial", "is_answered", "queued")

    def __init__(self, pool: BackendPool, choice: Choice) -> None:
        self._pool: BackendPool | None = pool
        self.choice = choice
        self.backend = choice.backend
        self.is_trial = choice.backend.ejection.status == "trial"
        self.is_answered = False
        self.queued = 0.0  # seconds it waited in the queue

    def answered(self, first_byte_seconds: float, is_good: bool = True) -> None:
        """The response has begun but its body may take long: count the time now, not at `release`, and end a trial if
        it `is_good`. Idempotent."""
        if self._pool is not None and (self.is_trial or not self.is_answered):
            self._pool._answered(self, first_byte_seconds, is_good)

    def release(self, first_byte_seconds: float | None = None, *, failure: str = "") -> None:
        """Idempotent. `first_byte_seconds` for a good answer; `failure` in words if the backend was at fault; neither
        if nobody can tell, as when the client left."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._release(self, first_byte_seconds, failure)


class BackendPool:
    """The backends, the strategy that chooses among them, and the counts both depend on.

    `_lock` guards every field of every Backend, `_backends`, `_strategy`, `_options`, `_line`, `_news`, and what
    `_refresh` derives from them: `_ready`, `_absent`, `_is_conditional`, `_is_timed`, `_is_panicking`. Nothing under it
    does I/O or calls out, but for the strategy; news for the listeners is collected under it and told after it is let
    go.
    """

    def __init__(
        self,
        strategy: Strategy,
        options: PoolOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._lock = Lock()
        self._backends: dict[str, Backend] = {}
        self._former: dict[str, Tally] = {}
        self._strategy = strategy
        self._options = options or PoolOptions()
        self._line: WaitingLine[Lease] = WaitingLine()
        self._ready: list[Backend] = []
        self._absent: dict[str, str] = {}
        self._is_conditional = False
        self._is_timed = True
        self._is_panicking = False
        self._had_first_round = False
        self._clock = clock
        self._wall_clock = wall_clock
        self._news: list[tuple[str, str, str, str]] = []
        self._telling = Lock()
        self._judge = Judge(self._backends, self._options, self._note, clock, wall_clock, rng or random.Random())
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

    def lease(
        self,
        request: Any,
        exclude: Collection[str] = (),
        *,
        watcher: Watcher | None = None,
        deadline: float | None = None,
    ) -> Lease:
        """Choose and count in one step; wait in the queue if all backends are full.

        `exclude` are ids already tried for this request; they are not asked again. `deadline` is of the pool's clock;
        `watcher` ends the wait when the client leaves. Raises Unavailable with the cause in words.
        """
        with self._lock:
            lease = self._choose(request, exclude)
            if lease is not None:
                return lease
            waiter = self._line_up(request, exclude)
            limit = self._options.queue_timeout
        return self._wait(waiter, watcher, limit if deadline is None else min(limit, deadline - self._clock()))

    def lease_now(self, request: Any) -> Lease | None:
        """A first lease if that needs no waiting."""
        with self._lock:
            return self._choose(request, ())

    def _choose(self, request: Any, exclude: Collection[str]) -> Lease | None:
        candidates, excluded = self._ready, self._absent
        if exclude or self._is_conditional:
            candidates, excluded = self._narrow(exclude)
        if not candidates:
            return None
        strategy = self._strategy
        active = [backend.active for backend in candidates]
        scores = strategy.scores(candidates)
        backend = strategy.select(candidates, request)
        backend.active += 1
        backend.tally.selected += 1
        lease = Lease(self, Choice(strategy.name, backend, candidates, active, scores, excluded))
        if lease.is_trial:
            backend.ejection.is_tried = True
        if self._is_timed:
            backend.ask(self._clock())
        else:
            lease.is_answered = True  # nobody wants to know how long that takes
        return lease

    def _narrow(self, exclude: Collection[str]) -> tuple[list[Backend], dict[str, str]]:
        """(candidates, why each of the others is none)."""
        excluded = dict(self._absent)
        candidates: list[Backend] = []
        on_trial: list[Backend] = []
        for backend in self._ready:
            if obstacle := "already tried" if backend.id in exclude else backend.obstacle:
                excluded[backend.id] = obstacle
            elif backend.ejection.is_tried:
                on_trial.append(backend)
            else:
                candidates.append(backend)
        if not candidates:  # a trial is never worth having nobody
            candidates, on_trial = on_trial, []
        excluded |= {backend.id: "its trial request is under way" for backend in on_trial}
        now, slow_start = self._clock(), self._options.slow_start
        admitted = [backend for backend in candidates if backend.takes_part(now, slow_start)]
        if not admitted or len(admitted) == len(candidates):  # nobody else is left, or nobody is slow
            return candidates, excluded
        names = {backend.id for backend in admitted}
        excluded |= {backend.id: "slow start" for backend in candidates if backend.id not in names}
        return admitted, excluded

    def _line_up(self, request: Any, exclude: Collection[str]) -> Waiter[Lease]:
        """A place in the queue, if there is any and waiting can help."""
        if not self._is_worth_waiting(exclude):
            raise Unavailable(self._why_none(exclude), self._narrow(exclude)[1])
        if len(self._line) >= self._options.queue_limit:
            waiting = f", and {len(self._line)} requests are waiting already" if self._line else ""
            raise NoRoom(f"every backend is full or not checked yet{waiting}", self._narrow(exclude)[1])
        return self._line.join(request, exclude)

    def _is_worth_waiting(self, exclude: Collection[str]) -> bool:
        """Somebody is only full, or is about to have its first check."""
        return any(
            backend.is_wanted
            and backend.id not in exclude
            and (backend in self._ready or backend.health.status == "unknown")
            for backend in self._backends.values()
        )

    def _why_none(self, exclude: Collection[str]) -> str:
        if not self._backends:
            return "no backend is configured"
        return "no other backend is available" if exclude and self._ready else "no backend is available"

    def _wait(self, waiter: Waiter[Lease], watcher: Watcher | None, seconds: float) -> Lease:
        started = self._clock()
        if watcher is not None:
            watcher.attach(waiter)
        waiter.wait(seconds)
        if watcher is not None:
            watcher.detach()
        with self._lock:
            lease = self._line.leave(waiter)
            if lease is None:
                excluded = self._narrow(waiter.exclude)[1]
                if not self._is_worth_waiting(waiter.exclude):
                    raise Unavailable(self._why_none(waiter.exclude), excluded)
                text = f"every backend is full or not checked yet, also after {max(0.0, seconds):.3g} s"
                raise NoRoom(text, excluded)
        lease.queued = self._clock() - started
        return lease

    def _answered(self, lease: Lease, first_byte_seconds: float, is_good: bool) -> None:
        backend = lease.backend
        with self._lock:
            was_answered, lease.is_answered = lease.is_answered, True
            if lease.choice.origin == backend.origin:
                if not was_answered:
                    self._judge.answered(backend, first_byte_seconds)
                if lease.is_trial and is_good:
                    lease.is_trial = backend.ejection.is_tried = False
                    self._judged(self._judge.succeeded(backend, is_trial=True))
        self._publish()

    def _release(self, lease: Lease, first_byte_seconds: float | None, failure: str) -> None:
        backend = lease.backend
        with self._lock:
            backend.active -= 1
            if lease.is_trial:
                backend.ejection.is_tried = False
            if lease.choice.origin == backend.origin:  # else it has moved: this says nothing of where it is now
                self._judge_answer(lease, first_byte_seconds, failure)
            if backend.active == 0 and (backend.is_leaving or backend.admin_state == "drain"):
                self._drained(backend)
                self._settle()
            elif self._line:
                self._line.serve(self._choose)
        self._publish()

    def _judge_answer(self, lease: Lease, first_byte_seconds: float | None, failure: str) -> None:
        if not lease.is_answered:
            self._judge.answered(lease.backend, first_byte_seconds, failure)
        if failure:
            self._judged(self._judge.failed(lease.backend, failure, lease.is_trial))
        elif first_byte_seconds is not None:
            self._judged(self._judge.succeeded(lease.backend, lease.is_trial))

    def _drained(self, backend: Backend) -> None:
        if self._backends.get(backend.id) is not backend:
            return  # gone already
        if backend.is_leaving:
            self._take_out(backend, "its last request has ended")
        else:
            self._note("backend_drained", backend.id, "drained: no requests in flight", "info")

    # What the checks say, and the data path on a refused connect.

    def record_check(self, backend: Backend, check: LastCheck, origin: Origin | None = None) -> None:
        """Count one check. `origin` is where it went: what it found does not count if the backend has moved since."""
        with self._lock:
            if self._backends.get(backend.id) is backend and origin in (None, backend.origin):
                self._judged(self._judge.checked(backend, check))
        self._publish()

    def record_refused(self, backend: Backend, reason: str, origin: Origin | None = None) -> None:
        """A refused connect on the data path: nobody listens there, so the backend is down at once."""
        with self._lock:
            if self._backends.get(backend.id) is backend and origin in (None, backend.origin):
                self._judged(self._judge.refused(backend, reason))
        self._publish()

    def sweep(self) -> None:
        """Let time pass: ejections and slow starts end, response times are compared. Call about once a second."""
        with self._lock:
            self._judged(self._judge.sweep())
        self._publish()

    def _judged(self, has_changed: bool) -> None:
        if has_changed:
            self._had_first_round = self._had_first_round or self._is_all_known()
            self._settle()

    def _is_all_known(self) -> bool:
        return all(b.health.status != "unknown" or b.admin_state == "maint" for b in self._backends.values())

    # What the operator changes at run time.

    def add(
        self,
        backend_id: str | None,
        origin: Origin,
        *,
        weight: int = 1,
        max_connections: int | None = None,
        source: str = "api",
        configured: Mapping[str, Any] | None = None,
    ) -> Backend:
        """Add a backend; it gets requests after its first good check. Raises SettingsError if the id is taken."""
        with self._lock:
            backend_id = backend_id or self._free_id()
            if backend_id in self._backends:
                leaving = self._backends[backend_id].is_leaving
                hint = "is being removed; admin_state ready calls that off" if leaving else "is taken, choose another"
                raise SettingsError(f"backend id {backend_id!r} {hint}")
            backend = Backend(backend_id, origin, weight, max_connections, source=source, configured=configured or {})
            self._add(backend)
            self._settle()
        self._publish()
        return backend

    def _add(self, backend: Backend) -> None:
        backend.health.since = self._wall_clock()
        if backend.id in self._backends:  # one that is leaving: it finishes what it has, out of sight
            self._take_out(self._backends[backend.id], "another one takes its name")
        self._backends[backend.id] = backend
        backend.tally = self._former.pop(backend.id, backend.tally)
        self._note("backend_added", backend.id, f"{backend.origin.url}, weight {backend.weight}", "info")

    def _free_id(self) -> str:
        number = len(self._backends) + 1
        while f"backend_{number}" in self._backends:
            number += 1
        return f"backend_{number}"

    def update(self, backend_id: str, changes: Mapping[str, Any]) -> Backend:
        """Set `weight`, `max_connections` or `admin_state`, already validated. Raises KeyError for an unknown id."""
        with self._lock:
            backend = self._backends[backend_id]
            self._update(backend, changes)
            self._settle()
        self._publish()
        return backend

    def _update(self, backend: Backend, changes: Mapping[str, Any]) -> None:
        real = {name: value for name, value in changes.items() if getattr(backend, name) != value}
        if "admin_state" in real and backend.admin_state == "maint":  # nobody has looked at it since
            backend.health = Health(since=self._wall_clock())
        for name, value in real.items():
            setattr(backend, name, value)
            if name not in ("source", "configured"):
                text = f"url set to {value.url}" if name == "origin" else f"{name} set to {value}"
                self._note("backend_changed", backend.id, text, "info")
        if backend.admin_state == "ready":
            backend.is_leaving = False  # ready again calls the removal off
        if "weight" in real:
            self._strategy.backends_changed()
        if "origin" in real:  # another server: nothing is known of it
            backend.forget(self._wall_clock())
            backend.tally.is_down_no_more(self._clock())
        if backend.active == 0 and (backend.is_leaving or real.get("admin_state") == "drain"):
            self._drained(backend)

    def remove(self, backend_id: str) -> int:
        """No new requests from now on; it goes when the last one in flight has ended. Returns how many there are.

        Raises KeyError for an unknown id.
        """
        with self._lock:
            backend = self._backends[backend_id]
            active = backend.active
            self._remove(backend)
            self._settle()
        self._publish()
        return active

    def _remove(self, backend: Backend) -> None:
        backend.admin_state = "drain"
        backend.is_leaving = True
        if backend.active == 0:
            self._take_out(backend, backend.origin.url)
        else:
            text = f"to be removed, {backend.active} requests in flight"
            self._note("backend_draining", backend.id, text, "info")

    def _take_out(self, backend: Backend, text: str) -> None:
        del self._backends[backend.id]
        backend.tally.is_down_no_more(self._clock())
        self._former[backend.id] = backend.tally
        if len(self._former) > FORMER_KEPT:
            del self._former[next(iter(self._former))]
        self._strategy.backends_changed()
        self._note("backend_removed", backend.id, text, "info")

    def use(self, strategy: Strategy) -> None:
        """Switch the strategy; the next `lease` uses it, with no memory of the past."""
        self.apply(PoolChanges(strategy=strategy))

    def apply(self, changes: PoolChanges) -> None:
        """Everything at once: no request sees one part without the other.

        Ids to update and remove that are not here any more are passed over.
        """
        with self._lock:
            if changes.options is not None:
                self._options = self._judge.options = changes.options
            if changes.strategy is not None:
                self._strategy = changes.strategy
                self._note("algorithm_changed", "", changes.strategy.name, "info")
            for backend_id, fields in changes.update.items():
                if backend_id in self._backends:
                    self._update(self._backends[backend_id], fields)
            for backend_id in changes.remove:
                if backend_id in self._backends:
                    self._remove(self._backends[backend_id])
            for backend in changes.add:
                self._add(backend)
            self._settle()
        self._publish()

    # Derived state and news.

    def _settle(self) -> None:
        """After any change: who can be served now is."""
        self._refresh()
        self._line.serve(self._choose)
        if self._line and not self._is_worth_waiting(()):
            self._line.dismiss()

    def _refresh(self) -> None:
        """Recompute what `lease` looks at, so that it need not ask every backend for every request."""
        self._is_timed = self._strategy.uses_times or self._options.ejection.latency != "off"
        backends = self._backends.values()
        wanted = [backend for backend in backends if backend.is_wanted]
        ready = [backend for backend in wanted if backend.is_ready]
        if not ready:  # an ejection is never worth having nobody
            ready = [backend for backend in wanted if backend.health.status == "up"]
        known = [backend for backend in wanted if backend.health.status != "unknown"]
        self._panic(len(ready) < self._options.panic_threshold * len(known) and self._had_first_round)
        self._ready = known if self._is_panicking else ready
        names = {backend.id for backend in self._ready}
        self._absent = {backend.id: backend.absence for backend in backends if backend.id not in names}
        self._is_conditional = any(
            backend.max_connections is not None
            or backend.slow_start_at is not None
            or backend.ejection.status != "none"
            for backend in self._ready
        )

    def _panic(self, is_due: bool) -> None:
        """So few are available that sending to all is the smaller evil."""
        if is_due != self._is_panicking:
            self._is_panicking = is_due
            if is_due:
                self._note("panic_on", "", "too few backends are available: health is ignored", "error")
            else:
                self._note("panic_off", "", "enough backends are available again", "info")

    def _note(self, kind: str, backend_id: str, text: str, severity: str) -> None:
        self._news.append((kind, backend_id, text, severity))

    def _publish(self) -> None:
        if not self._news:
            return
        with self._telling:  # or a thread could tell of something before another has told what came first
            with self._lock:
                news, self._news = self._news, []
            for item in news:
                for listener in self._listeners:
                    listener(*item)

    # Reading.

    @property
    def algorithm(self) -> str:
        return self._strategy.name

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._line)

    @property
    def is_panicking(self) -> bool:
        return self._is_panicking

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

    def tallies(self) -> dict[str, Tally]:
        """Copies, with the time that a backend has been down so far."""
        with self._lock:
            now = self._clock()
            return {b.id: replace(b.tally, down_seconds=b.tally.downtime(now)) for b in self._backends.values()}

    def snapshot(self) -> list[dict[str, Any]]:
        """All backends at one moment, as plain values in configured order, for `/status`."""
        with self._lock:
            shares = self._strategy.expected_shares(self._ready)
            now, wall = self._clock(), self._wall_clock()
            limits = {"fall": self._options.fall, "rise": self._options.rise}
            return [
                {
                    **backend.describe(now, wall, limits),
                    "admission": backend.admission(now, self._options.slow_start),
                    "expected_share": None if shares is None else shares.get(backend.id, 0.0),
                }
                for backend in self._backends.values()
            ]
