"""Scaling at work: a thread for each pool that is scaled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread

from typing_extensions import TypedDict

from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.config.scaling import ScalingSettings
from balancer.fleet.discovery import SourceFailed
from balancer.fleet.scaling import Demand, Load, Note, Provider, Starts

log = logging.getLogger("balancer.scaling")

LOOK_SECONDS = 1.0
ADVICE_SECONDS = 60.0  # at least between two events of shadow mode
FIRST_SECONDS = 0.1  # between two looks while there is nobody, for the first request waits

Make = Callable[[ScalingSettings, BackendPool, Starts, Note], Provider]


class ScalingView(TypedDict):
    """`wanted`, None before it is known, and `why` are of the last look. `started` and `failed_starts` count since the
    start of the process; `last_error` is why the last start failed, None once one was good."""

    pool: str
    kind: str
    mode: str
    min: int
    max: int
    target_in_flight: float
    wanted: int | None
    healthy: int
    starting: int
    why: str
    started: int
    failed_starts: int
    last_error: str | None


class Scaler:
    """Scales one pool. `look` once a second, by a thread of its own; `use` and `describe` from any."""

    def __init__(
        self,
        pool: BackendPool,
        options: ScalingSettings,
        provider: Provider,
        starts: Starts,
        note: Note,
    ) -> None:
        self.pool = pool
        self.options = options
        self._provider = provider
        self._demand = Demand(options)
        self._starts = starts
        self._note = note
        self._load = Load(0, 0, 0)
        self._wanted: int | None = None
        self._advise_at = 0.0
        self._failure = ""  # of the provider, that was told
        self._adopts = False  # what another has left, once that can be told
        self._is_retired = self._drains = False
        self.has_looked = False
        self._stopping = Event()
        self._thread = Thread(target=self._run, name=f"scaling-{pool.name}", daemon=True)

    def start(self, adopts: bool) -> None:
        """Unless it has been."""
        if not self.is_alive:
            self._adopts = adopts
            self._thread.start()

    def retire(self, drains: bool) -> None:
        """Take nothing on any more, and end when what it has brought has; with `drains` have that begin now."""
        self._drains = drains
        self._is_retired = True

    def stop(self) -> None:
        """`join` afterwards."""
        self._stopping.set()

    def join(self) -> None:
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not (self._is_retired and self._provider.is_empty):
                self._look_safely()
                self.has_looked = True
                is_at_zero = self._wanted is not None and not self._load.there
                if self._stopping.wait(FIRST_SECONDS if is_at_zero else LOOK_SECONDS):
                    break
        finally:
            self.pool.let_grow(False)
            self._provider.close()

    def _look_safely(self) -> None:
        try:
            self.look()
            self._failure = ""
        except Exception as error:  # the thread must outlive any surprise, or nothing would be scaled from then on
            if str(error) != self._failure:
                self._failure = str(error)
                if not isinstance(error, SourceFailed):  # an answer of another shape, for one
                    log.exception("scaling of %s failed", self.pool.name)
                self._note("scaling_failed", self.pool.name, None, self._failure)

    def look(self) -> None:
        provider, options, now = self._provider, self.options, time.monotonic()
        provider.options = self._demand.options = options
        if self._is_retired and self._drains:
            provider.retire()
        if self._adopts:
            provider.adopt()
            self._adopts = False
        provider.tend()
        if self._is_retired:
            return
        load, is_enforced = provider.load(), options.mode == "enforce"
        wanted = None if load is None else self._demand.wanted(load, now)
        # Before any go, so that nobody is refused who comes just after the last one.
        has_more = load is None or wanted is None or min(load.there, wanted) < options.max or load.starting > 0
        # After a failed start nobody waits; but where nobody is left, the next one takes a request that does.
        has_hope = not self._starts.failed_in_row or (self._starts.are_due(now) and not (load and load.there))
        self.pool.let_grow(is_enforced and has_more and has_hope)
        if load is None or wanted is None:
            return
        self._load, self._wanted = load, wanted
        if not is_enforced and wanted != load.there and now >= self._advise_at:
            self._advise_at = now + ADVICE_SECONDS
            self._note("scaling_advised", self.pool.name, None, f"shadow: {self._demand.why}")
        elif is_enforced and wanted != load.there and self._starts.are_due(now):
            provider.scale(load, wanted, self._demand.why)

    def describe(self) -> ScalingView:
        options, load = self.options, self._load
        return {
            "pool": options.name,
            "kind": options.kind,
            "mode": options.mode,
            "min": options.min,
            "max": options.max,
            "target_in_flight": options.target_in_flight,
            "wanted": self._wanted,
            "healthy": load.healthy,
            "starting": load.starting,
            "why": self._demand.why,
            "started": self._starts.started,
            "failed_starts": self._starts.failed,
            "last_error": self._starts.last_error,
        }


class Scaling:
    """All that is scaled. `use` says what, before `start` and at each reload. `make` makes the provider of a pool.

    `_lock` guards all fields but `_scalers`, by pool, which is replaced under it and may be read by anybody. `_leaving`
    are those that still drain.
    """

    def __init__(self, pools: Pools, make: Make, note: Note) -> None:
        self._pools = pools
        self._make = make
        self._note = note
        self._lock = Lock()
        self._scalers: dict[str, Scaler] = {}
        self._leaving: list[Scaler] = []
        self._starts: dict[str, Starts] = {}  # by pool: what counts goes on when others bring its backends
        self._is_running = False

    def use(self, wanted: Sequence[ScalingSettings]) -> None:
        with self._lock:
            before = self._scalers
            self._scalers = {options.name: self._scaler(options) for options in wanted}
            gone = [scaler for scaler in before.values() if scaler not in self._scalers.values()]
            for scaler in gone:
                scaler.retire(drains=self._pools.get(scaler.pool.name) is scaler.pool)  # else its pool does that
            self._leaving = [scaler for scaler in (*self._leaving, *gone) if scaler.is_alive]
            if self._is_running:
                for scaler in self._scalers.values():
                    scaler.start(adopts=False)

    def _scaler(self, options: ScalingSettings) -> Scaler:
        """The one that there is, if it can be had with these options."""
        pool, known = self._pools.get(options.name), self._scalers.get(options.name)
        assert pool is not None  # the settings have checked that
        if known is not None and known.pool is pool and known.options.kind == options.kind:
            known.options = options
            return known
        starts = self._starts.setdefault(options.name, Starts())
        return Scaler(pool, options, self._make(options, pool, starts, self._note), starts, self._note)

    def start(self, adopts: bool) -> None:
        """If it `adopts`, with what a balancer that was killed has left."""
        with self._lock:
            self._is_running = True
            for scaler in self._scalers.values():
                scaler.start(adopts)

    def stop(self) -> None:
        """Stop and join; what was started is stopped with it."""
        with self._lock:
            self._is_running = False
            scalers = [scaler for scaler in (*self._scalers.values(), *self._leaving) if scaler.is_alive]
        for scaler in scalers:
            scaler.stop()
        for scaler in scalers:
            scaler.join()

    def has_looked(self) -> bool:
        """So what there is to be at first is in the pools, unless it cannot be started."""
        return all(scaler.has_looked for scaler in self._scalers.values())

    def describe(self) -> list[ScalingView]:
        return [scaler.describe() for scaler in self._scalers.values()]
