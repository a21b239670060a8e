"""A request for a WebSocket on its way: as any other until its backend has switched, and over when the socket is."""

from __future__ import annotations

import time

from balancer.errors import ClientError
from balancer.forwarding.answer import Answer
from balancer.forwarding.forwarding import Forwarding
from balancer.observe.websockets import WebSocketRecord
from balancer.upstream.handshake import Handshake
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import BackendResponse, Body, ResponseBody

MOST_REFUSAL = 65536  # bytes of a body that comes with another answer than 101


class Upgrade(Forwarding):
    """`run` gives an Answer of 101 once a backend has switched; its `connection` is ours then, with what it `received`
    already, and `ended` must follow. Any other answer is whole."""

    __slots__ = ("connection", "received", "subprotocol", "socket", "_opened")

    outgoing = Handshake

    def _add_body(self, outgoing: OutgoingRequest, is_here: bool) -> None:
        if self._request.head.length != 0:
            raise ClientError("a request for a WebSocket has no body")

    def _answer(self, response: BackendResponse) -> Answer:
        body, handshake = response.body, response.request
        assert isinstance(body, ResponseBody) and isinstance(handshake, Handshake)
        if response.status_code != 101:
            response.body = Body(body.read_out(MOST_REFUSAL, handshake.deadline))
            return super()._answer(response)
        self._attempts.answered(101)
        self.connection, self.received = body.take_over()
        self.subprotocol = handshake.subprotocol
        self.socket = self._record.websocket = WebSocketRecord(self._record.attempts[-1].backend)
        self._opened = time.perf_counter()
        self._route.statistics.websockets.opened(self.socket)
        return Answer(101, response.reason, [], b"")

    def alive(self) -> None:
        """Something has come from the backend."""
        self._attempts.alive()

    def ended(self, reason: str | None = None, failure: str = "") -> None:
        """The socket is closed on both sides; `failure` in words, and a `reason`, if that was its backend's fault."""
        record, socket = self._record, self.socket
        record.bytes_in, record.bytes_out = socket.bytes_in, socket.bytes_out
        # What it took to answer is the response time, for whoever compares such times; the rest has its own figure.
        socket.seconds = time.perf_counter() - self._opened
        self._started += socket.seconds
        self._route.statistics.websockets.closed(socket)
        self.finish(101, reason=reason, complete=not failure, failure=failure)
