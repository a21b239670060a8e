"""The WSGI callable in front of Flask: `app.wsgi_app = ReverseProxy(app.wsgi_app, ...)`.

A control path goes on to Flask, everything else to a backend without touching Flask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from balancer.forwarding.forwarding import Forwarding
from balancer.forwarding.route import Route
from balancer.protocol.incoming import Incoming
from balancer.protocol.requestheads import RequestHeads

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class ReverseProxy:
    """The WSGI callable. `route` and `heads` may be replaced at any time: a request keeps those it began with."""

    def __init__(
        self,
        control_app: WSGIApplication,
        is_control: Callable[[str], bool],
        *,
        route: Route,
        heads: RequestHeads | None = None,
    ) -> None:
        self._control_app = control_app
        self.is_control = is_control
        self.route = route
        self.heads = heads or RequestHeads()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self.is_control(environ["PATH_INFO"]):
            return self._control_app(environ, start_response)
        return self.forward(Incoming.of(environ, self.heads)).run().as_wsgi(start_response)

    def forward(self, incoming: Incoming) -> Forwarding:
        """A request that is not for the control API, counted from now on: `run` or `refuse` must follow."""
        return Forwarding(self.route, incoming)
