"""What the control API acts on: the parts of one balancer, as its routes get at them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from typing_extensions import TypedDict

from balancer.balancing.backends import BackendView
from balancer.balancing.pool import BackendPool
from balancer.balancing.pools import Pools
from balancer.config.comparison import Plan
from balancer.config.decisions import Decisions
from balancer.config.reload import Configuration
from balancer.config.settings import Settings
from balancer.control.revisions import Revisions
from balancer.filters.limits import Limiter
from balancer.fleet.discovery import Discovery
from balancer.fleet.scaler import Scaling
from balancer.observe.canary import Canaries
from balancer.observe.events import Events
from balancer.observe.history import History
from balancer.observe.logwriter import LogWriter
from balancer.observe.routecounts import RouteCounts
from balancer.observe.statistics import Statistics

if TYPE_CHECKING:
    from balancer.cluster.cluster import Cluster
    from balancer.cluster.figures import Figures
    from balancer.control.access import Access
    from balancer.state.memory import Memory

Lifecycle = Literal["starting", "running", "draining"]
WorkerState = Literal["starting", "running", "draining", "waiting"]
Reload = Callable[[bool, Callable[[str], bool]], Plan]  # True only asks what it would do


class TlsView(TypedDict):
    """The certificate that clients are shown; of several, while ports are renewed, the first to expire. `since`: when
    it was read. `pending`: a port serves with an older one, or older options, still. `last_error`: why another one was
    refused since."""

    names: list[str]
    issuer: str
    expires_at: float
    since: float
    pending: bool
    last_error: str | None


class StateView(TypedDict):
    """The `state_file`, and why it does not keep all just now."""

    file: str
    last_error: str | None


class WorkerView(TypedDict):
    """A process that serves. `since` is when it was started, `cpu` the only one that it runs on."""

    id: int
    pid: int | None
    cpu: int | None
    since: float | None
    state: WorkerState


def this_process(since: float) -> WorkerView:
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpu = next(iter(cpus)) if len(cpus) == 1 else None
    return {"id": 0, "pid": os.getpid(), "cpu": cpu, "since": since, "state": "running"}


class ManagedView(BackendView):
    """`until` is when the first of what was decided for a time ends."""

    until: float | None


@dataclass(slots=True)
class Control:
    """What the control API acts on. `lifecycle` is set when serving starts and ends, everything else locks itself."""

    pools: Pools
    statistics: Statistics
    events: Events
    history: History
    log: LogWriter
    dashboard: Path
    configuration: Configuration
    decisions: Decisions
    routes: RouteCounts
    limiter: Limiter
    discovery: Discovery
    canaries: Canaries
    scaling: Scaling
    idle: Callable[[], Mapping[str, Mapping[str, int]]]  # kept connections, by the name of a pool and a URL
    queued: Callable[[], int]  # requests that wait for a thread
    reload: Reload
    tls: Callable[[], TlsView | None]
    figures: Callable[[], Figures]
    access: Access = field(init=False)  # of the installed API
    url: Callable[[], str | None] = lambda: None  # where it listens, once it does
    revisions: Revisions = field(default_factory=Revisions)
    memory: Memory | None = None  # without a `state_file`
    cluster: Cluster | None = None  # without a `redis_url`
    workers: Callable[[], list[WorkerView]] = list
    lifecycle: Lifecycle = "starting"
    started: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.time)  # the same, of the wall clock

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    @property
    def pool(self) -> BackendPool:
        """The default one."""
        return self.pools.default

    def backends(self, pool: BackendPool | None = None) -> list[ManagedView]:
        """All, or those of one pool."""
        ends = self.decisions.ends()
        found = self.pools.snapshot() if pool is None else pool.snapshot()
        return [{**backend, "until": ends.get((backend["pool"], backend["id"]))} for backend in found]

    def is_serving(self) -> bool:
        """Ready for traffic: sources have told of backends, scaling has started the first ones, the first round of
        health checks is done, and no shutdown is under way."""
        is_here = self.discovery.has_looked() and self.scaling.has_looked()
        return self.lifecycle != "draining" and is_here and self.pools.has_had_first_round()


def current_control() -> Control:
    """That of the app whose request is being answered."""
    from flask import current_app  # which a worker process does without

    return cast(Control, current_app.extensions["control"])
