"""Where requests go, and by which rules: what one request has in common with all others of its route."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from balancer.balancing.pool import BackendPool
from balancer.forwarding.answer import Answer
from balancer.forwarding.filter import Filter
from balancer.forwarding.retrybudget import RetryBudget
from balancer.forwarding.routetable import RouteTable
from balancer.observe.record import Record
from balancer.observe.statistics import Statistics
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.protocol.responseheads import ResponseHeads
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.transport import BackendAdapter

REPLAY_LIMIT = 65536  # bytes: a request body up to this size is read first, so that it can be sent again


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """What a request's way needs of the settings, by their names."""

    id: str
    max_request_body: int | None
    retries: int
    retry_budget: float
    retry_budget_minimum: int
    request_timeout: float


@dataclass(frozen=True, slots=True)
class Route:
    """The parts that it names each lock theirs. Hooks are called in their order; `Filter` says what each one does."""

    pool: BackendPool
    adapter: BackendAdapter
    statistics: Statistics
    budget: RetryBudget
    options: RouteOptions
    on_refused: Callable[[], None] = lambda: None  # a backend's port is closed: its health should be looked at
    rng: random.Random = field(default_factory=random.Random)
    response_heads: ResponseHeads = field(default_factory=ResponseHeads)
    admit: tuple[Callable[[Request], Answer | None], ...] = ()
    send: tuple[Callable[[Request, OutgoingRequest], None], ...] = ()
    answer: tuple[Callable[[Request, Record, list[Line]], list[Line]], ...] = ()
    done: tuple[Callable[[Request, Record], None], ...] = ()
    is_safe: bool = True  # what `answer` makes need not be checked
    waits: bool = False  # `admit` or `send` may: requests have a worker thread for their whole way

    @property
    def small_body(self) -> int:
        most = self.options.max_request_body
        return REPLAY_LIMIT if most is None else min(REPLAY_LIMIT, most)

    def with_filters(self, filters: Sequence[Filter]) -> Route:
        """With their hooks after its own, but for `done`: what they add to the record, the access log tells."""
        return replace(
            self,
            admit=(*self.admit, *(each.admit for each in filters if _has(each, "admit"))),
            send=(*self.send, *(each.send for each in filters if _has(each, "send"))),
            answer=(*self.answer, *(each.answer for each in filters if _has(each, "answer"))),
            done=(*(each.done for each in filters if _has(each, "done")), *self.done),
            is_safe=self.is_safe and all(each.is_safe or not _has(each, "answer") for each in filters),
            waits=self.waits or any(each.waits for each in filters),
        )


def _has(each: Filter, hook: str) -> bool:
    return getattr(type(each), hook) is not getattr(Filter, hook)


@dataclass(frozen=True, slots=True)
class Routes:
    """Replaced whole by a reload, while a request keeps the route that it began with.

    `rare` leads where `usual` does, with more filters: those that look at requests of which there are few, so that they
    cost the others nothing.
    """

    usual: Route
    rare: Route

    def find(self, request: Request) -> Route:
        return self.rare if request.head.is_rare else self.usual


@dataclass(frozen=True, slots=True)
class TableOfRoutes(Routes):
    """For each request the route of the `table`."""

    table: RouteTable[Routes]

    def find(self, request: Request) -> Route:
        return self.table.find(request).find(request)
