"""The WSGI callable in front of Flask: `app.wsgi_app = ReverseProxy(app.wsgi_app, ...)`.

A control path goes on to Flask, everything else to a backend without touching Flask.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from balancer.accesslog import AccessLog
from balancer.forwarding import REPLAY_LIMIT, Forwarding
from balancer.incoming import Incoming
from balancer.outgoing import RequestHeads
from balancer.pool import BackendPool
from balancer.statistics import Statistics
from balancer.transport import BackendAdapter

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What the data path needs of the settings; `settings.Settings` says what each one means."""

    balancer_id: str = "lb-1"
    expose_backend: bool = False
    max_request_body: int | None = None
    retries: int = 2
    retry_budget: float = 0.2
    retry_budget_minimum: int = 10
    request_timeout: float = 60.0


class ReverseProxy:
    """The WSGI callable. It has no state of its own; the pool, the adapter and the statistics each lock theirs.

    `options`, `heads` and `access_log` may be replaced at any time: a request keeps the options it began with.
    """

    def __init__(
        self,
        control_app: WSGIApplication,
        is_control: Callable[[str], bool],
        *,
        pool: BackendPool,
        adapter: BackendAdapter,
        statistics: Statistics,
        options: ProxyOptions,
        heads: RequestHeads | None = None,
        access_log: AccessLog | None = None,
        on_refused: Callable[[], None] = lambda: None,
        covers_control: Callable[[str], bool] = lambda scope: False,
        rng: random.Random | None = None,
    ) -> None:
        self._control_app = control_app
        self.is_control = is_control
        self.pool = pool
        self.adapter = adapter
        self.statistics = statistics
        self.options = options
        self.heads = heads or RequestHeads()
        self.access_log = access_log
        self.on_refused = on_refused
        self.covers_control = covers_control
        self.rng = rng or random.Random()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self.is_control(environ["PATH_INFO"]):
            return self._control_app(environ, start_response)
        return self.forward(Incoming.of(environ, self.heads)).run().begin(start_response)

    @property
    def small_body(self) -> int:
        """Bytes of a request body that is read before the request is sent on."""
        most = self.options.max_request_body
        return REPLAY_LIMIT if most is None else min(REPLAY_LIMIT, most)

    def forward(self, incoming: Incoming) -> Forwarding:
        """A request that is not for the control API, counted from now on: `run` or `refuse` must follow."""
        return Forwarding(self, incoming)
