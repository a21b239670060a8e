"""Requests that reach no backend: sent elsewhere, answered at once, or refused for want of a route."""

from __future__ import annotations

import re

from balancer.balancing.pool import BackendPool
from balancer.errors import AmbiguousPath, ClientError, NoRoute
from balancer.forwarding.answer import Answer, whole
from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.protocol.request import Request
from balancer.protocol.requestkey import host_of

_FIELD = re.compile(rb"\{(path|host|query)\}")
AMBIGUOUS = (
    "the path or the host can be read in more than one way: leave out what is encoded without need, //, dot segments "
    "and \\"
)


class Redirect(Filter):
    """To `location`, in which {path}, {host} and {query} are those of the request. Its query goes along, unless there
    is one already."""

    def __init__(self, location: str, status: int) -> None:
        self._location = location.encode("ascii")
        self._status = status

    def admit(self, request: Request) -> Answer:
        path, _, query = request.target.partition(b"?")
        told = {b"path": b"/" if path == b"*" else path, b"host": host_of(request), b"query": query}
        if not told[b"host"] and b"{host}" in self._location:
            raise ClientError("the request has no Host, which is where it would be sent")
        location = _FIELD.sub(lambda match: told[match[1]], self._location)
        if query and b"?" not in self._location:
            location += b"?" + query
        return whole(self._status, b"", (b"location", location))


class FixedAnswer(Filter):
    """The same for all: `status`, and `body` as text."""

    def __init__(self, status: int, body: str) -> None:
        lines = [(b"content-type", b"text/plain; charset=utf-8")] if body else []
        self._answer = whole(status, body.encode(), *lines)

    def admit(self, request: Request) -> Answer:
        return self._answer


class Unrouted(Filter):
    """No route is for it, so the `pool` of those must have backends."""

    def __init__(self, pool: BackendPool) -> None:
        self._pool = pool

    def admit(self, request: Request) -> None:
        if not self._pool.backends():
            raise NoRoute("no_route: there is no route for this request, and there are no backends without one")

    def done(self, request: Request, record: Record) -> None:
        if record.reason == NoRoute.reason:
            record.pool = None


class Ambiguous(Filter):
    """It may take another way in a backend than it has taken here."""

    def admit(self, request: Request) -> None:
        raise AmbiguousPath(AMBIGUOUS)

    def done(self, request: Request, record: Record) -> None:
        record.pool = None
