"""Where requests go, and by which rules: what one request has in common with all others of its route."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from balancer.balancing.pool import BackendPool
from balancer.forwarding.retrybudget import RetryBudget
from balancer.observe.accesslog import AccessLog
from balancer.observe.statistics import Statistics
from balancer.upstream.transport import BackendAdapter

REPLAY_LIMIT = 65536  # bytes: a request body up to this size is read first, so that it can be sent again


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """What a request's way needs of the settings, by their names."""

    id: str
    expose_backend: bool
    max_request_body: int | None
    retries: int
    retry_budget: float
    retry_budget_minimum: int
    request_timeout: float


@dataclass(frozen=True, slots=True)
class Route:
    """Replaced whole by a reload, while a request keeps the one it began with. The parts it names each lock theirs."""

    pool: BackendPool
    adapter: BackendAdapter
    statistics: Statistics
    budget: RetryBudget
    options: RouteOptions
    access_log: AccessLog
    on_refused: Callable[[], None] = lambda: None  # a backend's port is closed: its health should be looked at
    covers_control: Callable[[str], bool] = lambda scope: (
        False
    )  # a service worker of this scope would see the control API
    rng: random.Random = field(default_factory=random.Random)

    @property
    def small_body(self) -> int:
        """Bytes of a request body that is read before the request is sent on."""
        most = self.options.max_request_body
        return REPLAY_LIMIT if most is None else min(REPLAY_LIMIT, most)
