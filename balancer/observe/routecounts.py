"""What came of the requests of each route."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from threading import Lock
from typing import Any, Literal

from balancer.observe.histogram import Histogram
from balancer.observe.plain import fill, plain, with_bounds, without_bounds
from balancer.observe.record import Record
from balancer.observe.statistics import Counters

Mirrored = Literal["answered", "failed", "full", "too_large", "no_backend"]  # what came of a copy


class RouteCounts:
    """By the name of the route: since the start or the last reset, and since the start of the process.

    `_lock` guards them, and `_mirrored`: the copies since the start by route and outcome. Requests of no route do not
    come here, and cost nothing.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: defaultdict[str, Counters] = defaultdict(Counters)
        self._before: defaultdict[str, Counters] = defaultdict(Counters)  # what resets took out of `_counters`
        self._mirrored: Counter[tuple[str, Mirrored]] = Counter()

    def add(self, route: str, record: Record) -> None:
        with self._lock:
            self._counters[route].add(record)

    def count(self, route: str, record: Record, times: Histogram) -> None:
        """As many as there are `times`, all of its kind."""
        with self._lock:
            self._counters[route].count(record, times)

    def mirrored(self, route: str, outcome: Mirrored, count: int = 1) -> None:
        with self._lock:
            self._mirrored[route, outcome] += count

    def copies(self) -> Mapping[tuple[str, Mirrored], int]:
        """Since the start, by route and outcome."""
        with self._lock:
            return self._mirrored.copy()

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
            self._mirrored = Counter({key: count for key, count in self._mirrored.items() if key[0] in routes})

    def kept(self) -> dict[str, Any]:
        """All counts as plain values: `since ROUTE` and `before ROUTE` of the last reset, and `mirrored`."""
        with self._lock:
            counted = {f"since {route}": plain(each) for route, each in self._counters.items()}
            counted |= {f"before {route}": plain(each) for route, each in self._before.items()}
            return with_bounds({**counted, "mirrored": plain(self._mirrored)})

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from there, before the first request. Raises as `fill`."""
        with self._lock:
            for name, value in without_bounds(kept).items():
                when, _, route = name.partition(" ")
                if when == "mirrored":
                    fill(self._mirrored, value)
                else:
                    fill((self._counters if when == "since" else self._before)[route], value)

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
