"""No service worker from a backend may take over the pages of the control API, which have the same origin.

Browsers ask for the script of one with `Service-Worker`. How far it reaches is its folder, or what its answer says in
`Service-Worker-Allowed` (W3C Service Workers, section "Service Worker Script Response").
"""

from __future__ import annotations

from collections.abc import Callable

from balancer.errors import WorkerRefused
from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.protocol.messages import Line, narrowed, scope_of
from balancer.protocol.request import Request


class ServiceWorkers(Filter):
    """`covers_control`: does what begins with this scope include a path of the control API?"""

    def __init__(self, covers_control: Callable[[str], bool]) -> None:
        self._covers_control = covers_control

    def admit(self, request: Request) -> None:
        if request.values(b"service-worker") and self._covers_control(scope_of(request.target)):
            raise WorkerRefused(
                "a service worker from here could take over the control API; "
                "serve its script from a folder of its own, or set control_port"
            )

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        return narrowed(lines, self._covers_control) if request.values(b"service-worker") else lines
