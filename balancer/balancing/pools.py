"""All pools of one balancer: what is asked of whichever has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import Any, TypeVar

from balancer.balancing.backends import Backend, BackendView
from balancer.balancing.members import PoolChanges
from balancer.balancing.pool import DEFAULT_POOL, BackendPool, PoolView
from balancer.protocol.origin import Origin

T = TypeVar("T")


class Pools:
    """By name, `default` first; then those that the settings have no more, until their last requests have ended. Ids of
    backends are unique over all of them, but that one of a pool that leaves is out of sight if another pool has its id.

    `_lock` is held while backends are added, so that they stay unique, and while `_pools` or `_leaving` is replaced,
    which anybody may read. It is taken before the lock of a pool.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pools: Mapping[str, BackendPool] = {}
        self._leaving: tuple[BackendPool, ...] = ()
        self._had_first_round = False

    @property
    def default(self) -> BackendPool:
        return self._pools[DEFAULT_POOL]

    def __iter__(self) -> Iterator[BackendPool]:
        return iter((*self._pools.values(), *self._leaving))

    @property
    def names(self) -> list[str]:
        return list(self._pools)

    def get(self, name: str) -> BackendPool | None:
        """None if it is leaving, too."""
        return self._pools.get(name)

    def pool_of(self, backend_id: str) -> BackendPool | None:
        """The pool that has a backend of this id."""
        return next((pool for pool in self if pool.get(backend_id) is not None), None)

    def backends(self) -> list[Backend]:
        return _in_sight((backend.id, backend) for pool in self for backend in pool.backends())

    def snapshot(self) -> list[BackendView]:
        """All backends, those of each pool at one moment."""
        return _in_sight((view["id"], view) for pool in self for view in pool.snapshot())

    def describe(self) -> list[PoolView]:
        leaving = self._leaving
        return [pool.describe(pool in leaving) for pool in self]

    @property
    def waiting(self) -> int:
        """Requests in the queues."""
        return sum(pool.waiting for pool in self)

    def has_had_first_round(self) -> bool:
        """True from the moment when every backend that is checked had a health status; later ones, and later pools,
        change nothing."""
        self._had_first_round = self._had_first_round or all(pool.has_had_first_round() for pool in self)
        return self._had_first_round

    def note_elsewhere(self, in_flight: Mapping[str, int]) -> None:
        """What other members of a cluster have in flight, by the ids of backends."""
        for backend in self.backends():
            backend.elsewhere = in_flight.get(backend.id, 0)

    # What is changed at run time.

    def add(self, pool: BackendPool, backend_id: str | None, origin: Origin, **fields: Any) -> Backend:
        """As `BackendPool.add`, if no other pool has the id either."""
        with self._lock:
            others = {backend.id: backend for each in self if each is not pool for backend in each.backends()}
            return pool.add(backend_id, origin, others=others, **fields)

    def apply(self, pools: Mapping[str, BackendPool], changes: Mapping[str, PoolChanges]) -> None:
        """These are all there are from now on, beside those that leave; change each, by its name."""
        with self._lock:
            self._leaving += tuple(pool for name, pool in self._pools.items() if name not in pools)
            self._pools = pools
            self._apply(changes)

    def change(self, changes: Mapping[str, PoolChanges]) -> set[str]:
        """Change these pools, by name. Returns the ids of backends that were not added, since others have them."""
        with self._lock:
            staying = [
                backend for pool in self._pools.values() for backend in pool.backends() if not backend.is_leaving
            ]
            taken = {backend.id for backend in staying}
            taken -= {backend_id for changed in changes.values() for backend_id in changed.remove}
            passed_over = {backend.id for changed in changes.values() for backend in changed.add} & taken
            for changed in changes.values():
                changed.add = [backend for backend in changed.add if backend.id not in passed_over]
            self._apply({name: changed for name, changed in changes.items() if name in self._pools})
        return passed_over

    def _apply(self, changes: Mapping[str, PoolChanges]) -> None:
        for name, changed in changes.items():
            pool = self._pools[name]
            for backend in changed.add:
                for other in self._pools.values():  # one that leaves may need its own for requests under way
                    if other is not pool and other.get(backend.id) is not None:
                        other.replace(backend.id)
            pool.apply(changed)

    def forget(self, pool: BackendPool) -> None:
        """It is gone."""
        with self._lock:
            self._leaving = tuple(each for each in self._leaving if each is not pool)


def _in_sight(told: Iterable[tuple[str, T]]) -> list[T]:
    """The first one of each id."""
    known: dict[str, T] = {}
    for backend_id, each in told:
        known.setdefault(backend_id, each)
    return list(known.values())
