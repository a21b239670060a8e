"""How far an OPTIONS may go: `Max-Forwards` means nothing for other methods that a gateway forwards."""

from __future__ import annotations

from balancer.forwarding.answer import Answer, whole
from balancer.forwarding.filter import Filter
from balancer.protocol.messages import ALLOWED, count_down, max_forwards
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest


class MaxForwards(Filter):
    """Answers an OPTIONS that may be forwarded no further, and counts down for the others (RFC 9110 section 7.6.2)."""

    def admit(self, request: Request) -> Answer | None:
        if request.method == "OPTIONS" and max_forwards(request.values(b"max-forwards")) == 0:
            return whole(200, b"", (b"allow", ALLOWED))
        return None

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        if request.method == "OPTIONS":
            outgoing.lines = count_down(outgoing.lines)
