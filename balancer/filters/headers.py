"""What a route changes in the header lines of its requests; of answers `ResponseHeads` knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balancer.forwarding.filter import Filter

if TYPE_CHECKING:
    from balancer.protocol.request import Request
    from balancer.protocol.requestheads import ChangedHeads, HeadChange
    from balancer.upstream.outgoing import OutgoingRequest


class RequestHeaders(Filter):
    """By a `change`, of which `heads` knows what it makes of those that come again."""

    def __init__(self, change: HeadChange, heads: ChangedHeads) -> None:
        self._change = change
        self._heads = heads

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        outgoing.share(self._heads.of(request.head, self._change))
