"""The parts of each pool, made from the settings, and kept as a reload wants them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Lock

from balancer.balancing.backends import Backend
from balancer.balancing.changes import Change
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.balancing.shared import SharedLoads
from balancer.config.settings import Settings
from balancer.fleet.health import Checked, HealthChecker, HealthOptions
from balancer.forwarding.retrybudget import RetryBudget
from balancer.observe.statistics import Statistics
from balancer.upstream.dialer import Dialer
from balancer.upstream.transport import BackendAdapter, Timeouts

LEAVE_SECONDS = 1.0  # for whoever has just looked up a route, but is not known as a request on it yet


@dataclass(frozen=True, slots=True, eq=False)
class PoolParts:
    """What one pool consists of. `settings` are those in force for it: its own, and for all else the top level's."""

    pool: BackendPool
    adapter: BackendAdapter
    budget: RetryBudget
    settings: Settings


class PoolWiring:
    """Makes the parts of pools, and lets them go. `parts` has them by name, `default` first, and is replaced whole.

    `tell` is called for each change of a pool, `cut_off` to end what is in flight on a backend, `is_used` to know
    whether a request in flight may still need a pool, `look` about once a second; whoever cares sets them.

    `loads` are what the processes of the balancer share, if there are several.

    `_lock` is held while `parts` is replaced, and guards `_leaving`: those that the settings have no more, and since
    when, of time.monotonic(), no new request comes to them. It is taken before that of `Pools`.
    """

    def __init__(
        self,
        dialer: Dialer,
        statistics: Statistics,
        health: Callable[[Callable[[], None]], HealthChecker] = HealthChecker,
        loads: SharedLoads | None = None,
    ) -> None:
        self._dialer = dialer
        self._statistics = statistics
        self._loads = loads
        self._lock = Lock()
        self.pools = Pools()
        self.parts: Mapping[str, PoolParts] = {}
        self._leaving: dict[PoolParts, float] = {}
        self.health = health(self._let_time_pass)
        self.tell: Callable[[BackendPool, Change], None] = lambda pool, change: None
        self.cut_off: Callable[[Backend], None] = lambda backend: None
        self.look: Callable[[], None] = lambda: None
        self.is_used: Callable[[BackendPool], bool] = lambda pool: False

    def use(self, config: Settings, changes: Mapping[str, PoolChanges]) -> None:
        """Change each pool as `changes` has it by its name; make those that are new. For the others, `retire` must
        follow."""
        parts: dict[str, PoolParts] = {}
        for name, settings in config.by_pool().items():
            changes[name].options = settings.options(PoolOptions)
            known = self.parts.get(name)
            if known is None:
                parts[name] = self._made(name, settings, changes[name])
            else:
                known.adapter.use(settings.options(Timeouts), settings.backend_sni)
                parts[name] = replace(known, settings=settings)
        with self._lock:
            self._leaving |= {each: math.inf for name, each in self.parts.items() if name not in parts}
            self.parts = parts
            self.pools.apply({name: each.pool for name, each in parts.items()}, changes)
            self._check_all()

    def retire(self) -> None:
        """No new request comes to what `use` has left out: it goes when its last one has ended."""
        with self._lock:
            now = time.monotonic()
            self._leaving = {each: min(since, now) for each, since in self._leaving.items()}

    def _made(self, name: str, settings: Settings, changes: PoolChanges) -> PoolParts:
        assert changes.strategy is not None
        loads = None if self._loads is None else self._loads.of(name)
        pool = BackendPool(changes.strategy, settings.options(PoolOptions), name, loads=loads)
        changes.strategy = None  # it has it
        pool.on_change(lambda change: self.tell(pool, change))
        pool.cut_off = lambda backend: self.cut_off(backend)
        pool.waiting_elsewhere = lambda: self.pools.waiting - pool.waiting
        adapter = BackendAdapter(settings.options(Timeouts), dialer=self._dialer, server_name=settings.backend_sni)
        budget = RetryBudget(pool.recent_choices, self._statistics.retried)
        return PoolParts(pool, adapter, budget, settings)

    def _all(self) -> list[PoolParts]:
        return [*self.parts.values(), *self._leaving]

    def _check_all(self) -> None:
        self.health.use(
            [Checked(each.pool, each.settings.options(HealthOptions), each.adapter) for each in self._all()]
        )

    def soonest_late(self) -> float:
        """Seconds after which the first answer of any pool is late."""
        return min((late for each in self._all() if (late := each.pool.hedging.late()) is not None), default=math.inf)

    def idle(self) -> dict[str, dict[str, int]]:
        """Kept connections by the name of the pool and the URL."""
        return {name: each.adapter.idle() for name, each in self.parts.items()}

    def close(self) -> None:
        """Close all kept connections."""
        for each in self._all():
            each.adapter.close()

    # The health thread.

    def _let_time_pass(self) -> None:
        for each in self._all():
            each.adapter.close_idle()
            each.pool.sweep()
        self.look()
        if self._leaving:
            with self._lock:
                for each in self._leaving.copy():
                    self._let_go(each)

    def _let_go(self, parts: PoolParts) -> None:
        """Its requests may need a backend until they have an answer; from then on its backends drain, as any that are
        removed."""
        pool, seconds = parts.pool, time.monotonic() - self._leaving[parts]
        if seconds < LEAVE_SECONDS or (seconds < parts.settings.request_timeout and self.is_used(pool)):
            return
        pool.apply(PoolChanges(remove=[backend.id for backend in pool.backends() if not backend.is_leaving]))
        if pool.is_empty:
            del self._leaving[parts]
            self.pools.forget(pool)
            if self._loads is not None:
                self._loads.release(pool.loads)
            parts.adapter.close()
            self._check_all()
