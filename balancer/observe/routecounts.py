"""What came of the requests of each route."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from threading import Lock

from balancer.observe.record import Record
from balancer.observe.statistics import Counters


class RouteCounts:
    """By the name of the route: since the start or the last reset, and since the start of the process.

    `_lock` guards both. Requests of no route do not come here, and cost nothing.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: defaultdict[str, Counters] = defaultdict(Counters)
        self._before: defaultdict[str, Counters] = defaultdict(Counters)  # what resets took out of `_counters`

    def add(self, route: str, record: Record) -> None:
        with self._lock:
            self._counters[route].add(record)

    def reset(self) -> None:
        with self._lock:
            for route, counters in self._counters.items():
                self._before[route] += counters
            self._counters.clear()

    def keep(self, routes: Collection[str]) -> None:
        """There are no others any more."""
        with self._lock:
            for counted in (self._counters, self._before):
                for route in counted.keys() - set(routes):
                    del counted[route]

    def since_reset(self) -> dict[str, Counters]:
        """Of those that have had requests."""
        with self._lock:
            return {route: counters.copy() for route, counters in self._counters.items()}

    def lifetime(self) -> dict[str, Counters]:
        with self._lock:
            total = defaultdict(Counters, {route: counters.copy() for route, counters in self._before.items()})
            for route, counters in self._counters.items():
                total[route] += counters
        return total
