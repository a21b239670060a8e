"""The parts of each pool, made from the settings, and kept as a reload wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from balancer.balancing.backends import Backend
from balancer.balancing.changes import Change
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.config.settings import Settings
from balancer.fleet.health import Checked, HealthChecker, HealthOptions
from balancer.forwarding.retrybudget import RetryBudget
from balancer.observe.statistics import Statistics
from balancer.upstream.dialer import Dialer
from balancer.upstream.transport import BackendAdapter, Timeouts


@dataclass(frozen=True, slots=True)
class PoolParts:
    """What one pool consists of. `settings` are those in force for it: its own, and for all else the top level's."""

    pool: BackendPool
    adapter: BackendAdapter
    budget: RetryBudget
    settings: Settings


class PoolWiring:
    """Makes the parts of pools. `parts` has them by name, `default` first; a reload replaces it whole.

    `tell` is called for each change of a pool, `cut_off` to end what is in flight on a backend; whoever cares sets
    them.
    """

    def __init__(self, dialer: Dialer, statistics: Statistics) -> None:
        self._dialer = dialer
        self._statistics = statistics
        self.pools = Pools()
        self.parts: Mapping[str, PoolParts] = {}
        self.health = HealthChecker(self._let_time_pass)
        self.tell: Callable[[BackendPool, Change], None] = lambda pool, change: None
        self.cut_off: Callable[[Backend], None] = lambda backend: None

    def use(self, config: Settings, changes: Mapping[str, PoolChanges]) -> None:
        """Change each pool as `changes` has it by its name; make those that are not there yet."""
        parts: dict[str, PoolParts] = {}
        for name, settings in config.by_pool().items():
            changes[name].options = settings.options(PoolOptions)
            known = self.parts.get(name)
            if known is None:
                parts[name] = self._made(name, settings, changes[name])
            else:
                known.adapter.use(settings.options(Timeouts), settings.backend_sni)
                parts[name] = replace(known, settings=settings)
        self.parts = parts
        self.pools.apply({name: each.pool for name, each in parts.items()}, changes)
        self.health.use(
            [Checked(each.pool, each.settings.options(HealthOptions), each.adapter) for each in parts.values()]
        )

    def _made(self, name: str, settings: Settings, changes: PoolChanges) -> PoolParts:
        assert changes.strategy is not None
        pool = BackendPool(changes.strategy, settings.options(PoolOptions), name)
        changes.strategy = None  # it has it
        pool.on_change(lambda change: self.tell(pool, change))
        pool.cut_off = lambda backend: self.cut_off(backend)
        adapter = BackendAdapter(settings.options(Timeouts), dialer=self._dialer, server_name=settings.backend_sni)
        return PoolParts(pool, adapter, RetryBudget(self._statistics), settings)

    def idle(self) -> dict[str, dict[str, int]]:
        """Kept connections by the name of the pool and the URL."""
        return {name: each.adapter.idle() for name, each in self.parts.items()}

    def close(self) -> None:
        """Close all kept connections."""
        for each in self.parts.values():
            each.adapter.close()

    def _let_time_pass(self) -> None:
        for each in self.parts.values():
            each.adapter.close_idle()
            each.pool.sweep()
