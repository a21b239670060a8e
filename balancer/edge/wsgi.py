"""The WSGI callable in front of Flask: `app.wsgi_app = ReverseProxy(app.wsgi_app, ...)`.

A control path goes on to Flask, everything else to a backend without touching Flask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from balancer.forwarding.forwarding import Forwarding
from balancer.forwarding.route import Routes
from balancer.forwarding.upgrade import Upgrade
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class ReverseProxy:
    """The WSGI callable. `routes`, `heads` and `control_app` may be replaced at any time: a request keeps what it began
    with."""

    def __init__(
        self,
        control_app: WSGIApplication,
        is_control: Callable[[str], bool],
        *,
        routes: Routes,
        heads: RequestHeads | None = None,
    ) -> None:
        self.control_app = control_app
        self.is_control = is_control
        self.routes = routes
        self.heads = heads or RequestHeads()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self.is_control(environ["PATH_INFO"]):
            return self.control_app(environ, start_response)
        return self.forward(Request.of(environ, self.heads)).run().as_wsgi(start_response)

    def forward(self, request: Request) -> Forwarding:
        """A request that is not for the control API, counted from now on: `run` or `refuse` must follow."""
        route = self.routes.find(request)
        route.statistics.begin()
        return Forwarding(route, request)

    def upgrade(self, request: Request) -> Upgrade:
        """As `forward`, for one that asks for a WebSocket."""
        route = self.routes.find(request)
        route.statistics.begin()
        return Upgrade(route, request)
