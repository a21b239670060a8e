"""A request for a WebSocket as backends get it: with a handshake of our own."""

from __future__ import annotations

from collections.abc import Sequence

from balancer.protocol.messages import Line
from balancer.protocol.requestheads import RequestHead
from balancer.protocol.websocket import check_switch, handshake, new_key
from balancer.upstream.outgoing import OutgoingRequest


class Handshake(OutgoingRequest):
    """`subprotocol`: what the backend has chosen, once it has switched."""

    may_switch = True
    subprotocol: str | None = None

    def __init__(self, method: str, target: bytes, own: Sequence[Line], shared: RequestHead | None = None) -> None:
        super().__init__(method, target, own, shared)
        self._key = new_key()

    def check(self, before: Sequence[Line]) -> None:
        super().check(before)
        if self.method != "GET" or self.body is not None:
            raise ValueError("a filter made something else of a GET for a WebSocket")

    def head(self) -> bytes:
        lines = b"".join(b"%s: %s\r\n" % line for line in handshake(self._key))
        return super().head()[: -len(b"\r\n")] + lines + b"\r\n"

    def switched(self, lines: Sequence[Line]) -> None:
        """The backend answered 101. Raises InvalidResponse if that is not what it was asked for."""
        self.subprotocol = check_switch(lines, self._key, self.lines)
