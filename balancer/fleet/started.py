"""Backends that are started and stopped one by one: in the pool from their start until their last request has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from balancer.balancing.backends import Backend
from balancer.balancing.pool import DEFAULT_POOL, BackendPool
from balancer.balancing.pools import Pools
from balancer.config.scaling import ScalingSettings
from balancer.errors import SettingsError
from balancer.fleet.discovery import SourceFailed
from balancer.fleet.scaling import Load, Note, Starts
from balancer.protocol.origin import Origin

STEADY_SECONDS = 10.0  # of being up, after which a start was a good one
LAST_SECONDS = 30.0  # at most, for the requests of one whose name the configuration has taken for another


class Launcher(Protocol):
    """Starts and stops what listens for one pool. Each may raise SourceFailed."""

    options: ScalingSettings

    def found(self) -> Mapping[str, Origin]:
        """Those that a balancer before this one has left, by their ids."""

    def start(self, backend_id: str) -> Origin:
        """Where it will listen."""

    def ended(self) -> Mapping[str, str]:
        """By their ids, those that have ended by themselves since they were started, and how."""

    def stop(self, backend_id: str) -> None:
        """Have it end, whether or not it has."""

    def close(self) -> None:
        """Have all end, and wait for that."""


@dataclass(slots=True)
class Started:
    """A backend, when it was started, when it was up last, and since when it is not ours any more: of the clock."""

    backend: Backend
    at: float
    up_at: float
    is_steady: bool = False
    left_at: float | None = None


class StartedBackends:
    """Those of one pool that a launcher has started. A Provider."""

    def __init__(
        self,
        pool: BackendPool,
        pools: Pools,
        options: ScalingSettings,
        launcher: Launcher,
        starts: Starts,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self._pool = pool
        self._pools = pools
        self._launcher = launcher
        self._starts = starts
        self._note = note
        self._clock = clock
        self._started: dict[str, Started] = {}  # by id

    def adopt(self) -> None:
        for backend_id, origin in self._launcher.found().items():
            self._join(backend_id, origin)

    def tend(self) -> None:
        """Whoever has left the pool is stopped: it was drained, here or by the operator, and has no request left."""
        self._launcher.options = self.options
        ended = self._launcher.ended() if self._started else {}
        for backend_id, started in self._started.copy().items():
            if not self._is_here(started.backend):
                if backend_id in ended or self._is_over(started):
                    self._launcher.stop(backend_id)
                    del self._started[backend_id]
            elif backend_id in ended:
                self._lost(started, f"ended after {self._clock() - started.at:.0f} s: {ended[backend_id]}")
            else:
                self._watch(started)

    def _is_here(self, backend: Backend) -> bool:
        """Nor has the configuration taken its name for another one."""
        return self._pool.get(backend.id) is backend and backend.source == "scaling"

    def _is_over(self, started: Started) -> bool:
        """Where the name is taken, what was in flight still is, and counts together with what comes for the other."""
        started.left_at = self._clock() if started.left_at is None else started.left_at
        return not started.backend.active or self._clock() - started.left_at > LAST_SECONDS

    def _watch(self, started: Started) -> None:
        now, backend = self._clock(), started.backend
        if backend.health.status == "up" or backend.admin_state == "maint":  # the latter is not checked
            started.up_at = now
            if not started.is_steady and now - started.at >= STEADY_SECONDS:
                started.is_steady = True
                self._starts.succeeded()
        elif now - started.up_at > self.options.start_timeout:
            reason = backend.health.reason or "no health check"
            self._lost(started, f"not healthy within {self.options.start_timeout:g} s: {reason}")

    def _lost(self, started: Started, text: str) -> None:
        """It is of no use any more. The next look finds it gone, unless something is in flight there."""
        backend = started.backend
        if backend.is_leaving:
            return
        if started.is_steady:
            self._note("backend_ended", self._pool.name, backend.id, text)
        else:
            self._failed(backend.id, text)
        self._pool.remove(backend.id)

    def _failed(self, backend_id: str, text: str) -> None:
        self._starts.fail(f"{backend_id}: {text}", self._clock())
        self._note("start_failed", self._pool.name, backend_id, text)

    def load(self) -> Load:
        """Without those that drain, and what they still have in flight."""
        wanted = [backend for backend in self._pool.backends() if backend.is_wanted]
        ready = [backend for backend in wanted if backend.is_ready]
        return Load(
            sum(backend.active for backend in wanted),
            self._pool.waiting,
            len(ready),
            sum(backend.is_starting for backend in wanted),
            fixed=sum(backend.source != "scaling" for backend in ready),
        )

    def scale(self, load: Load, wanted: int, why: str) -> None:
        if wanted < load.there:
            self._note("scaled_down", self._pool.name, None, why)
            for backend in self._least_useful()[: load.there - wanted]:
                self._pool.remove(backend.id)
            return
        # Those that are down have their places until they are up again or given up.
        room = self.options.max - sum(not backend.is_leaving for backend in self._pool.backends())
        more = min(wanted - load.there, room, 1 if self._starts.failed_in_row else room)
        if more > 0:
            self._note("scaled_up", self._pool.name, None, why)
        for _ in range(more):
            self._start()

    def _least_useful(self) -> list[Backend]:
        """With the fewest requests, of these the newest first."""
        ours = [each for each in self._started.values() if self._is_here(each.backend)]
        free = [each for each in ours if each.backend.is_wanted]
        return [each.backend for each in sorted(free, key=lambda each: (each.backend.active, -each.at))]

    def _start(self) -> None:
        backend_id = self._free_id()
        try:
            origin = self._launcher.start(backend_id)
        except SourceFailed as error:
            self._failed(backend_id, str(error))
            return
        except (LookupError, TypeError, ValueError) as error:
            self._failed(backend_id, f"what its engine says makes no sense: {error!r}")
            return
        self._starts.started += 1
        self._join(backend_id, origin)

    def _free_id(self) -> str:
        """As if it had none in the configuration. One that has left may have not ended yet."""
        taken = {backend.id for backend in self._pools.backends()} | self._started.keys()
        prefix = "backend" if self._pool.name == DEFAULT_POOL else self._pool.name
        return next(each for number in count(1) if (each := f"{prefix}_{number}") not in taken)

    def _join(self, backend_id: str, origin: Origin) -> None:
        try:
            backend = self._pools.add(self._pool, backend_id, origin, source="scaling")
        except SettingsError as error:  # somebody has taken the id in this moment
            self._launcher.stop(backend_id)
            self._failed(backend_id, str(error))
            return
        now = self._clock()
        self._started[backend_id] = Started(backend, now, now)

    def retire(self) -> None:
        for started in self._started.values():
            if self._is_here(started.backend) and not started.backend.is_leaving:
                self._pool.remove(started.backend.id)

    @property
    def is_empty(self) -> bool:
        return not self._started

    def close(self) -> None:
        self._launcher.close()
