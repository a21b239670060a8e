"""Who gets the next request: all balancing state, behind one lock.

A backend takes requests if the operator lets it (`is_wanted`), its health checks say `up`, and real traffic has not
ejected it. With room (`max_connections`, one request for a trial) it is a candidate; the strategy chooses among those.
When all are full, requests wait in one bounded queue.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import Any, TypeVar, cast

from typing_extensions import TypedDict

from balancer.balancing.backends import EXPLAINED, Backend, BackendView, Choice, Health, LastCheck, Scene
from balancer.balancing.candidates import Candidates
from balancer.balancing.changes import Listener, Notifier
from balancer.balancing.counts import BackendCounts
from balancer.balancing.ejection import KeptEjection
from balancer.balancing.hedging import HedgeView, Hedging
from balancer.balancing.judge import Judge
from balancer.balancing.members import Members, PoolChanges
from balancer.balancing.options import PoolOptions
from balancer.balancing.queue import Waiter, WaitingLine
from balancer.balancing.recent import RecentChoices
from balancer.balancing.shared import PoolLoads
from balancer.balancing.strategies import Indexed, Strategy
from balancer.errors import NoRoom, Unavailable
from balancer.protocol.client import UNWATCHED, Client
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request

log = logging.getLogger("balancer.pool")

T = TypeVar("T")

DEFAULT_POOL = "default"  # of the backends at the top level of the settings
STICKY = "sticky"  # in place of a strategy's name where none was asked
LOOK_SECONDS = 0.0005  # from one look at what other processes have in flight to the next, but for limits
WAIT_SECONDS = 0.003  # as well, while somebody waits for them to give a place back
SHORTEST_ROW = 16  # changes of backends until what choices see is noted anew, and one more for each candidate


class PoolView(TypedDict):
    """`available` backends take requests as far as they have room. A pool that is `leaving` has no place in the
    settings any more, and goes with its last requests."""

    name: str
    algorithm: str
    panic: bool
    leaving: bool
    backends: int
    available: int
    active_connections: int
    waiting_requests: int
    hedge: HedgeView


class Lease:
    """One request's place on a backend: taken by `BackendPool.lease`, given back once by `release`."""

    __slots__ = ("_pool", "backend", "choice", "is_trial", "is_answered", "queued")

    def __init__(self, pool: BackendPool, choice: Choice) -> None:
        self._pool: BackendPool | None = pool
        self.choice = choice
        self.backend = choice.backend
        self.is_trial = choice.backend.ejection.status == "trial"
        self.is_answered = not pool._is_timed  # then its time is of no use to the strategy, nor to ejections
        self.queued = 0.0  # seconds it waited in the queue

    @property
    def is_held(self) -> bool:
        return self._pool is not None

    def is_silent(self, seconds: float) -> bool:
        """Its backend has answered nothing for so long, or nobody keeps count of that."""
        pool = self._pool
        return pool is None or not pool._is_timed or self.backend.speed.silence(pool._clock()) >= seconds

    def answered(self, first_byte_seconds: float, is_good: bool = True) -> None:
        """The response has begun but its body may take long: count the time now, not at `release`, and end a trial if
        it `is_good`. Idempotent."""
        if self._pool is not None and (self.is_trial or not self.is_answered):
            self._pool._answered(self, first_byte_seconds, is_good)

    def alive(self) -> None:
        """Some of the answer has come. Of interest if the backend does not answer its checks at the same time."""
        if self._pool is not None and self.backend.health.consecutive_failures:
            self._pool._alive(self)

    def drop(self, is_late: bool) -> None:
        """As `release`, since another backend has answered instead: nobody is to blame, but this one was slower.
        `is_late` if it was asked first."""
        if self._pool is not None:
            self._pool._dropped(self, is_late)
            self.release()

    def release(self, first_byte_seconds: float | None = None, *, failure: str = "") -> None:
        """Idempotent. `first_byte_seconds` for a good answer; `failure` in words if the backend was at fault; neither
        if nobody can tell, as when the client left."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._release(self, first_byte_seconds, failure)


class BackendPool:
    """The backends, the strategy that chooses among them, and the counts both depend on.

    `_lock` guards every field of every Backend, all other fields here, and its helpers, which have no lock of their
    own: `_members` what the operator changes, `_judge` what checks and traffic change, `_candidates` what follows for
    the next request, `_recent` how many there were. A single value may be read without it. Nothing under it does I/O or
    calls out, but for the strategy; `_notifier` for the listeners is noted under it and told after it is let go.
    `_preparing`, taken before it, is held while the strategy prepares, and guards `_prepared`: what it was given.

    `cut_off` ends what is in flight on a backend; whoever has the clients sets it. It is called without the lock.
    `waiting_elsewhere` says how many wait in the queues of other pools. `loads` are what all processes of the balancer
    have in flight, None if there is but one: `Backend.active` and `Speed` are then theirs together.
    """

    def __init__(
        self,
        strategy: Strategy,
        options: PoolOptions,
        name: str = DEFAULT_POOL,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        loads: PoolLoads | None = None,
    ) -> None:
        self.name = name
        self._lock = Lock()
        self.loads = loads
        self._is_looking = False  # a choice depends on what other processes have in flight
        self._look_at = 0.0  # then, if it does not have to be sooner
        self._is_unsettled = False  # what `_look` has found may change who is a candidate
        self._strategy = strategy
        self._index: Indexed | None = None  # the strategy, if that is one
        self._is_special = True  # not every candidate takes every request, or the strategy wants a list
        self._is_followed = False  # the index must know of every change
        self._sees_more = False  # than a scene can tell
        self._scene = Scene("", (), (), lambda rank, now: None, {}, {})
        self._row = SHORTEST_ROW
        self._set_aside: list[Backend] = []  # within one choice
        self._is_sticky = options.sticky
        self._preparing = Lock()
        self._prepared: tuple[Strategy, Mapping[str, int]] | None = None
        self._line: WaitingLine[Lease] = WaitingLine()
        self._is_timed = True
        self._had_first_round = False
        self._clock = clock
        self._wall_clock = wall_clock
        self._notifier = Notifier()
        self._note = self._notifier.note
        self._members = Members(self._reweighed, self._note, clock, wall_clock)
        self._backends: Mapping[str, Backend] = self._members.backends
        judging = (self._note, clock, wall_clock, rng or random.Random())
        self._judge = Judge(self._backends, options, *judging)
        self._candidates = Candidates(self._backends, self._note)
        self._recent = RecentChoices(self._backends, clock)
        self.hedging = Hedging(options, clock)
        self.cut_off: Callable[[Backend], None] = lambda backend: None
        self.waiting_elsewhere: Callable[[], int] = lambda: 0

    def __repr__(self) -> str:
        with self._lock:
            up = sum(backend.health.status == "up" for backend in self._backends.values())
            active = sum(backend.active for backend in self._backends.values())
            return f"<BackendPool {up} up, {len(self._backends) - up} not, {active} active, {self._strategy.name}>"

    def on_change(self, listener: Listener) -> None:
        """Register before traffic starts; listeners are called outside the lock, by a thread that made a change."""
        self._notifier.on_change(listener)

    # The data path.

    def lease(
        self,
        request: Request,
        exclude: Collection[str] = (),
        *,
        client: Client = UNWATCHED,
        deadline: float | None = None,
    ) -> Lease:
        """Choose and count in one step; wait in the queue if all backends are full.

        `exclude` are ids already tried for this request; they are not asked again. `deadline` is of the pool's clock;
        `client` ends the wait when the client leaves. Raises Unavailable with the cause in words.
        """
        with self._lock:
            lease = self._choose(request, exclude)
            if lease is not None:
                return lease
            waiter = self._line_up(request, exclude)
            limit = self._judge.options.queue_timeout
        return self._wait(waiter, client, limit if deadline is None else min(limit, deadline - self._clock()))

    def lease_now(self, request: Request) -> Lease | None:
        """A first lease if that needs no waiting."""
        with self._lock:
            return self._choose(request, ())

    def lease_beside(self, first: Lease, request: Request) -> Lease | None:
        """A place on another backend, if there is one that nobody waits for."""
        with self._lock:
            return None if self._line else self._choose(request, (first.backend.id,))

    def _choose(self, request: Request, exclude: Collection[str]) -> Lease | None:
        index, choice, seen, is_turn = self._index, None, None, True
        if self._is_looking and (self._candidates.limits or self._clock() >= self._look_at):
            self._look()
        if index is None or exclude or self._is_special:
            choice, is_turn = self._choose_specially(request, exclude)
            chosen = None if choice is None else choice.backend
        else:
            chosen = index.choose(request)
            if self._sees_more and chosen is not None:
                seen = index.now, index.rank(chosen), (), index.passed_over
        if chosen is None:
            return None
        chosen.active += 1  # not before the last step that a strategy's answer can make fail
        chosen.counts.selected += 1
        if self._is_timed:
            chosen.speed.sent(self._clock())
        if self.loads is not None:
            self.loads.add(chosen, 1, self._is_timed)
        rank = None if index is None else index.taken(chosen) if is_turn else index.changed(chosen)
        lease = Lease(self, choice or Choice(chosen, self._scene, seen))
        if index is not None:
            changes = self._scene.changes
            changes.append((chosen, chosen.active, rank))
            if len(changes) > self._row:
                self._begin_scene(index)
        if exclude or self._is_special:
            self._follow(lease)
        return lease

    def _choose_specially(self, request: Request, exclude: Collection[str]) -> tuple[Choice | None, bool]:
        """Where not every candidate takes every request, or the strategy wants a list. Also, whether it is the turn of
        whom the index has chosen."""
        if self._candidates.starting:
            self._let_in()
        choice, index = self._bound(request, exclude) if self._is_sticky else None, self._index
        if choice is not None or index is None:
            return choice or self._ask(request, exclude), False
        chosen = index.choose(request)
        while chosen is not None and (chosen.is_full or chosen.id in exclude):
            index.leave(chosen)
            if not chosen.is_full:
                self._set_aside.append(chosen)
            chosen = index.choose(request)
        if chosen is not None:
            # A retry takes nobody's turn: else each of these would lead the next request to whom it was for.
            return Choice(chosen, self._scene, (index.now, index.rank(chosen), exclude, index.passed_over)), not exclude
        self._bring_back()
        if len(self._candidates.first) == len(self._candidates.ready):
            return None, False  # there is nobody else
        choice = self._ask(request, exclude)
        index.gather(self._candidates.first)
        return choice, False

    def _look(self, *, at_all: bool = False) -> None:
        """Take in what other processes have in flight."""
        if self.loads is None:
            return
        self._look_at = self._clock() + LOOK_SECONDS
        for backend, before in self.loads.look(at_all=at_all):
            if self._index is not None:
                rank = self._index.changed(backend) if self._is_followed else None
                self._scene.changes.append((backend, backend.active, rank))
            if backend.active == 0 < before and (backend.is_leaving or backend.admin_state == "drain"):
                self._members.drained(backend)
                self._is_unsettled = True  # not now: the queue may just be served

    def _catch_up(self, *, at_all: bool = False) -> None:
        """`_look`, where nobody is choosing: in a master nobody ever does, and what is noted for choices piles up."""
        self._look(at_all=at_all)
        if self._is_unsettled:
            self._settle()
        elif self.loads is not None and len(self._scene.changes) > self._row:
            self._gather()

    def _bring_back(self) -> None:
        """Who was set aside because this request has tried it."""
        while self._set_aside and self._index is not None:
            self._index.changed(self._set_aside.pop())

    def _ask(self, request: Request, exclude: Collection[str]) -> Choice | None:
        """Let the strategy choose from a list."""
        current, strategy = self._candidates, self._strategy
        candidates: Sequence[Backend] = current.first
        excluded = current.excluded
        if exclude or current.is_conditional:
            candidates = current.narrow(exclude)
            excluded = current.why_not(exclude, candidates)
        if not candidates:
            return None
        scores: Sequence[float | None] = strategy.scores(candidates) or [None] * len(candidates)
        chosen = strategy.select(candidates, request)
        shown, excluded = candidates[:EXPLAINED], dict(islice(excluded.items(), EXPLAINED))
        scene = Scene(strategy.name, shown, scores[:EXPLAINED], lambda score, now: score, excluded, {})
        choice = Choice(chosen, scene, (0.0, scores[candidates.index(chosen)], (), strategy.passed_over))
        scene.changes.append((chosen, chosen.active + 1, None))
        return choice

    def _bound(self, request: Request, exclude: Collection[str]) -> Choice | None:
        """The backend that the request is bound to, if it can take it. One that drains can: its clients may finish."""
        backend = self._backends.get(request.preferred)
        if backend is None or backend.id in exclude or backend.is_leaving or backend.admin_state == "maint":
            return None
        if backend.health.status != "up" or backend.ejection.status != "none" or backend.is_full:
            return None
        return Choice(backend, Scene(STICKY, (backend,), (None,), lambda rank, now: None, {}, {}))

    def _follow(self, lease: Lease) -> None:
        """What a choice among some means for the next one."""
        self._bring_back()
        if lease.is_trial:
            lease.backend.ejection.is_tried = True
            self._sort()
        if lease.backend.slow_start.began_at is not None:
            lease.backend.slow_start.earned -= 1
            self._earn()

    def _let_in(self) -> None:
        """Those who start slowly, when they have earned it."""
        self._candidates.waited += 1
        if self._candidates.waited >= self._candidates.patience:
            self._earn()

    def _earn(self) -> None:
        self._candidates.earn(self._clock(), self._judge.options.slow_start)
        self._sort()

    def _sort(self) -> None:
        self._candidates.sort()
        self._gather()

    def _gather(self) -> None:
        """Others are asked first from now on."""
        index, current = self._index, self._candidates
        self._is_special = index is None or self._is_sticky or current.is_conditional
        if self.loads is not None:
            self._is_looking = self.loads.is_told = self._strategy.uses_load or bool(current.limits)
        if index is not None:
            self._is_followed = index.follows or self._is_special
            self._sees_more = index.explains or (current.are_many and index.has_ranks)
            index.gather(current.first)
            self._begin_scene(index)

    def _begin_scene(self, index: Indexed) -> None:
        current = self._candidates
        shown = current.first[:EXPLAINED]
        self._row = SHORTEST_ROW + len(shown)
        self._scene = Scene(index.name, shown, index.ranks(shown), index.score, current.excluded, current.limits)

    def _line_up(self, request: Request, exclude: Collection[str]) -> Waiter[Lease]:
        """A place in the queue, if there is any and waiting can help."""
        options, waiting = self._judge.options, self.waiting
        has_place = waiting < options.queue_limit and waiting + self.waiting_elsewhere() < options.queue_places
        if has_place and self._candidates.is_worth_waiting(exclude):
            waiter = self._line.join(request, exclude)
            self._tell_waiting()
            return waiter
        raise self._refusal(exclude, f", and {len(self._line)} requests are waiting already" if self._line else "")

    def _tell_waiting(self) -> None:
        if self.loads is not None:
            self.loads.wait(len(self._line))

    def _refusal(self, exclude: Collection[str], about_waiting: str) -> Unavailable:
        excluded = self._candidates.why_not(exclude)
        if not self._candidates.is_worth_waiting(exclude):
            return Unavailable(self._candidates.why_none(exclude), excluded)
        return NoRoom(f"every backend is full or not checked yet{about_waiting}", excluded)

    def _wait(self, waiter: Waiter[Lease], client: Client, seconds: float) -> Lease:
        started = self._clock()
        client.attach(waiter)
        if self.loads is None:
            waiter.wait(seconds)
        else:
            self._look_until(waiter, started + seconds)
        client.detach()
        with self._lock:
            try:
                lease = self._line.leave(waiter)
            finally:
                self._tell_waiting()
            if lease is None:
                raise self._refusal(waiter.exclude, f", also after {max(0.0, seconds):.3g} s")
        lease.queued = self._clock() - started
        return lease

    def _look_until(self, waiter: Waiter[Lease], end: float) -> None:
        """What other processes give back wakes nobody here: those who wait take turns at looking."""
        while (left := end - self._clock()) > 0 and not waiter.wait(min(left, WAIT_SECONDS * len(self._line))):
            with self._lock:
                self._catch_up()
                self._line.serve(self._choose)

    def _answered(self, lease: Lease, first_byte_seconds: float, is_good: bool) -> None:
        backend = lease.backend
        with self._lock:
            was_answered, lease.is_answered = lease.is_answered, True
            if lease.choice.origin == backend.origin:
                if not was_answered:
                    self._judge.answered(backend, first_byte_seconds)
                    if self.loads is not None:
                        self.loads.add(backend, 0, -1)
                    if self._index is not None:
                        self._scene.changes.append((backend, backend.active, self._index.changed(backend)))
                if lease.is_trial and is_good:
                    lease.is_trial = backend.ejection.is_tried = False
                    if self._judge.succeeded(backend, is_trial=True):
                        self._judged()
        self._notifier.notify()

    def _alive(self, lease: Lease) -> None:
        with self._lock:
            if lease.choice.origin == lease.backend.origin:
                self._judge.alive(lease.backend)

    def _dropped(self, lease: Lease, is_late: bool) -> None:
        backend = lease.backend
        with self._lock:
            if lease.choice.origin != backend.origin:
                return
            if not lease.is_answered:
                self._judge.dropped(backend)
                lease.is_answered = True
                if self.loads is not None:
                    self.loads.add(backend, 0, -1)
            elif is_late:
                ended = backend.counts.selected - (backend.active if self.loads is None else self.loads.own(backend))
                if self._judge.outrun(backend, ended):
                    self._judged()

    def _release(self, lease: Lease, first_byte_seconds: float | None, failure: str) -> None:
        backend = lease.backend
        with self._lock:
            backend.active -= 1
            if lease.is_trial:
                backend.ejection.is_tried = False
                self._sort()
            if lease.choice.origin == backend.origin:  # else it has moved: this says nothing of where it is now
                judge, is_trial, is_answered = self._judge, lease.is_trial, lease.is_answered
                if judge.ended(backend, first_byte_seconds, failure, is_trial, is_answered):
                    self._judged()
            if self.loads is not None:
                owed = not lease.is_answered and lease.choice.origin == backend.origin
                self.loads.add(backend, -1, -owed)
            if (index := self._index) is not None:
                rank = index.changed(backend) if self._is_followed else None
                self._scene.changes.append((backend, backend.active, rank))
            if backend.active == 0 and (backend.is_leaving or backend.admin_state == "drain"):
                self._members.drained(backend)
                self._settle()
            elif self._line:
                self._line.serve(self._choose)
        if self._notifier.pending:  # hardly ever: saves every request a call
            self._notifier.notify()

    # What the checks say, and the data path on a refused connect.

    def record_check(self, backend: Backend, check: LastCheck, origin: Origin | None = None) -> None:
        """Count one check. `origin` is where it went: what it found does not count if the backend has moved since."""
        self._record(self._judge.checked, backend, check, origin)

    def record_refused(self, backend: Backend, reason: str, origin: Origin | None = None) -> None:
        """A refused connect on the data path: nobody listens there, so the backend is down at once."""
        self._record(self._judge.refused, backend, reason, origin)

    def record_verdict(self, backend: Backend, reason: str | None, origin: Origin | None = None) -> None:
        """What traffic of another process has made of it: out for this reason, or back."""
        self._record(self._judge.take_over, backend, reason, origin)

    def _record(self, judge: Callable[[Backend, T], bool], backend: Backend, seen: T, origin: Origin | None) -> None:
        with self._lock:
            # Neither removed nor moved away from there meanwhile.
            if self._backends.get(backend.id) is backend and origin in (None, backend.origin):
                if judge(backend, seen):
                    self._judged()
        if self._notifier.pending:
            self._notifier.notify()

    def adopt(self, health: Mapping[str, Health]) -> None:
        """What another process has seen of them, by their ids, before the first request."""
        with self._changing():
            for backend_id, seen in health.items():
                if backend_id in self._backends:
                    self._backends[backend_id].health = seen
            self._judged()

    def sweep(self) -> None:
        """Let time pass: ejections, slow starts and drains end, response times are compared. Call about once a
        second."""
        with self._lock:
            self._catch_up(at_all=True)
            if self._judge.sweep():
                self._judged()
            elif self._candidates.starting:
                self._earn()
            self._recent.sweep()
            overdue = self._members.cut_overdue(self._judge.options.backend_drain_timeout)
        self._notifier.notify()
        for backend in overdue:
            self.cut_off(backend)

    def _judged(self) -> None:
        self._had_first_round = self._had_first_round or self._is_all_known()
        self._settle()

    def _is_all_known(self) -> bool:
        return all(b.health.status != "unknown" or b.admin_state == "maint" for b in self._backends.values())

    # What the operator changes at run time.

    def add(
        self, backend_id: str | None, origin: Origin, *, others: Mapping[str, Backend] | None = None, **fields: Any
    ) -> Backend:
        """Add a Backend with these fields; it gets requests after its first good check. `others` are those of other
        pools, by their ids. Raises SettingsError if the id is taken."""
        with self._changing():
            backend = Backend(self._members.new_id(backend_id, others or {}), origin, **fields)
            self._members.add(backend)
        return backend

    def update(self, backend_id: str, changes: Mapping[str, Any]) -> Backend:
        """Set `weight`, `admin_state` and the like, already validated. Raises KeyError for an unknown id."""
        with self._changing():
            backend = self._backends[backend_id]
            self._members.update(backend, changes)
        return backend

    def remove(self, backend_id: str, at_once: bool = False) -> int:
        """No new requests from now on; it goes when the last one in flight has ended, or `at_once`, and those are cut
        off. Returns how many there are. Raises KeyError for an unknown id.
        """
        with self._changing():
            backend = self._backends[backend_id]
            active = self._members.remove(backend, at_once)
        if at_once and active:
            self.cut_off(backend)
        return active

    def replace(self, backend_id: str) -> None:
        """Another pool has one of that name from now on: it finishes what it has, out of sight."""
        with self._changing():
            if backend_id in self._backends:
                self._members.replace(self._backends[backend_id])

    def use(self, strategy: Strategy) -> None:
        """Switch the strategy; the next `lease` uses it, with no memory of the past."""
        self.apply(PoolChanges(strategy=strategy))

    def apply(self, changes: PoolChanges) -> None:
        """Everything at once: no request sees one part without the other.

        Ids to update and remove that are not here any more are passed over.
        """
        if changes.strategy is not None:
            self._prepare(changes.strategy)
        with self._changing():
            if changes.options is not None:
                self._judge.options = changes.options
                self._is_sticky = changes.options.sticky
                self.hedging.options = changes.options
            if changes.strategy is not None:
                self._strategy = changes.strategy
                self._note("algorithm_changed", "", changes.strategy.name, "info")
            self._members.apply(changes)

    def let_grow(self, may_grow: bool) -> None:
        """Whether it is worth waiting for backends that are still to come, even where there are none."""
        if may_grow != self._candidates.may_grow:
            with self._changing():
                self._candidates.may_grow = may_grow

    @property
    def may_grow(self) -> bool:
        return self._candidates.may_grow

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            self._look(at_all=True)
            yield
            self._settle()
        self._prepare()
        self._notifier.notify()

    def _prepare(self, strategy: Strategy | None = None) -> None:
        """Let the strategy do what takes long, unless it has; one that is not in use yet before it is."""
        with self._preparing:
            with self._lock:
                strategy = strategy or self._strategy
                wanted = strategy, {b.id: b.weight for b in self._backends.values() if b.weight}
            if wanted == self._prepared:
                return
            try:
                strategy.prepare(wanted[1])
            except BaseException:  # as below
                log.exception("strategy %s failed", strategy.name)
            self._prepared = wanted

    def _reweighed(self) -> None:
        """Weights are others, or a backend is gone."""
        try:
            self._strategy.backends_changed()
        except BaseException:  # the change that this is a part of must not stop half-way
            log.exception("strategy %s failed", self._strategy.name)

    def _settle(self) -> None:
        """After any change: serve the waiters for whom there is room now."""
        options, strategy = self._judge.options, self._strategy
        self._is_unsettled = False
        self._is_timed = strategy.uses_times or options.latency_ejection != "off"
        is_indexed = isinstance(strategy, Indexed) and type(strategy).select is Indexed.select
        self._index = cast(Indexed, strategy) if is_indexed else None
        if self._candidates.starting:
            self._candidates.earn(self._clock(), options.slow_start)
        if self.loads is not None:
            self.loads.is_timed = self._is_timed
            self.loads.follow((*self._backends.values(), *self._members.gone))
        self._candidates.refresh(options.panic_threshold if self._had_first_round else 0.0, self._usual_shares)
        self._gather()
        self._line.serve(self._choose)
        if self._line and not self._candidates.is_worth_waiting(()):
            self._line.dismiss()

    def _usual_shares(self, ready: Sequence[Backend]) -> Mapping[str, float] | None:
        return None if self._index is None else self._index.expected_shares(ready)

    # Over restarts.

    def kept_counts(self) -> dict[str, BackendCounts]:
        """Of backends that there are, or were, by their ids."""
        with self._lock:
            return self._members.kept()

    def restore_counts(self, kept: Mapping[str, BackendCounts]) -> None:
        """Go on from there, before the first check."""
        with self._lock:
            self._members.restore(kept)

    def ejections(self) -> dict[str, KeptEjection]:
        """Of those that are out, by their ids; the time of one on trial is over."""
        with self._lock:
            to_epoch, out = self._to_epoch, [b for b in self._backends.values() if b.ejection.status != "none"]
            return {backend.id: backend.ejection.kept(backend.origin.url, to_epoch) for backend in out}

    def eject(self, kept: Mapping[str, KeptEjection]) -> None:
        """Take out again who is where it was then, before the first check."""
        with self._changing():
            for backend_id, backend in self._backends.items():
                if backend_id in kept and kept[backend_id]["url"] == backend.origin.url:
                    backend.ejection.restore(kept[backend_id], self._to_epoch)

    @property
    def _to_epoch(self) -> float:
        """What its clock lacks."""
        return self._wall_clock() - self._clock()

    # Reading.

    @property
    def algorithm(self) -> str:
        return self._strategy.name

    @property
    def waiting(self) -> int:
        """Requests in the queue, of all processes."""
        return len(self._line) if self.loads is None else self.loads.waiting

    def recent_choices(self) -> int:
        """How many requests, retries among them, there were in the last 10 s."""
        with self._lock:
            return self._recent.count()

    @property
    def is_panicking(self) -> bool:
        return self._candidates.is_panicking

    def backends(self) -> list[Backend]:
        """The live objects in configured order, for the health checker."""
        with self._lock:
            self._catch_up()
            return list(self._backends.values())

    @property
    def is_empty(self) -> bool:
        """No backends, and nothing in flight on any that was here."""
        return not self._backends and not self._members.gone

    def get(self, backend_id: str) -> Backend | None:
        return self._backends.get(backend_id)

    def has_had_first_round(self) -> bool:
        """True from the moment when every backend that is checked had a health status; later ones change nothing."""
        with self._lock:
            return self._had_first_round or self._is_all_known()

    def note_selected(self, chosen: Mapping[str, int]) -> None:
        """How often another process has chosen each."""
        with self._lock:
            for backend_id in chosen.keys() & self._backends.keys():
                self._backends[backend_id].counts.selected += chosen[backend_id]

    def alive(self) -> dict[str, float]:
        """When those last answered whose checks fail, of the pool's clock."""
        with self._lock:
            return {b.id: b.health.alive_at for b in self._backends.values() if b.health.consecutive_failures}

    def note_alive(self, alive: Mapping[str, float]) -> None:
        """They have answered another process: busy is not dead."""
        with self._lock:
            for backend_id in alive.keys() & self._backends.keys():
                health = self._backends[backend_id].health
                health.alive_at = max(health.alive_at, alive[backend_id])

    def counts(self) -> dict[str, BackendCounts]:
        """Copies, with the time that a backend has been down so far."""
        with self._lock:
            now = self._clock()
            return {backend.id: backend.counts.copy(now) for backend in self._backends.values()}

    def describe(self, is_leaving: bool) -> PoolView:
        hedge = self.hedging.describe()
        with self._lock:
            self._catch_up()
            return {
                "name": self.name,
                "algorithm": self._strategy.name,
                "panic": self._candidates.is_panicking,
                "leaving": is_leaving,
                "backends": len(self._backends),
                "available": len(self._candidates.ready),
                "active_connections": sum(backend.active for backend in self._backends.values()),
                "waiting_requests": self.waiting,
                "hedge": hedge,
            }

    def snapshot(self) -> list[BackendView]:
        """All backends at one moment, as plain values in configured order, for `/status`."""
        with self._lock:
            self._catch_up()
            shares = self._strategy.expected_shares(self._candidates.ready)
            seen = (self.name, self._clock(), self._wall_clock(), self._judge.options, shares)
            return [backend.describe(*seen) for backend in self._backends.values()]
