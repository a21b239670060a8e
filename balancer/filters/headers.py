"""Header lines that a route changes in its requests, of answers `ResponseHeads` knows them; and X-Served-By."""

from __future__ import annotations

from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.protocol.requestheads import ChangedHeads, HeadChange
from balancer.upstream.outgoing import OutgoingRequest


class RequestHeaders(Filter):
    """By a `change`, of which `heads` knows what it makes of those that come again."""

    def __init__(self, change: HeadChange, heads: ChangedHeads) -> None:
        self._change = change
        self._heads = heads

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        outgoing.share(self._heads[request.head, self._change])


class ServedBy(Filter):
    """`expose_backend`: X-Served-By with the id of the last backend that was asked."""

    is_safe = True

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        return lines if record.backend is None else [*lines, (b"x-served-by", record.backend.encode("ascii"))]
