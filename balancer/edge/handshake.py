"""A client that asks for a WebSocket: refused, or let in once its backend has switched."""

from __future__ import annotations

import math
from typing import Any

from balancer.edge.call import Call
from balancer.edge.listener import Listener
from balancer.edge.promise import when_done
from balancer.edge.scope import request_of
from balancer.edge.sockets import Sockets
from balancer.errors import BalancerError
from balancer.forwarding.upgrade import Upgrade
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads


class HandshakeCall(Call):
    """A worker has it until its backend has answered; from then on nobody, for as long as the socket is open."""

    __slots__ = ("_sockets", "since", "leave_at", "is_pending")

    def __init__(self, listener: Listener, watcher: Any, is_control: bool, is_last: bool, sockets: Sockets) -> None:
        super().__init__(listener, watcher, is_control, is_last)
        self._sockets = sockets
        self.since = -math.inf if is_last else self.started  # before its worker was parked, in any case
        self.leave_at = math.inf  # of time.monotonic(): it has to end then, because we or its backend do
        self.is_watched = True  # Granian says of no client that it has left before it was let in; `Bridge` looks itself
        self.is_pending = True  # until then
        listener.open_sockets[self] = None

    def request(self, heads: RequestHeads) -> Request:
        # To the rest of its way it is a GET (RFC 6455 section 4.1); Granian says nothing of the method.
        scheme = "https" if self.scope["scheme"] == "wss" else "http"
        made = request_of(self.scope | {"method": "GET", "scheme": scheme}, heads)
        made.client = self
        return made

    def run(self) -> None:
        assert isinstance(self.forwarding, Upgrade)
        try:
            answer = self.forwarding.run()
            if answer.status == 101:
                self._open(self.forwarding)
                return
            self._pass_on(answer)
        except BaseException:
            self._fail()
        self._end()

    def refuse_plainly(self) -> None:
        """There is no WebSocket at its path."""
        self._status, self._headers = 404, []
        self._send_last(b"")
        self._end()

    def _open(self, upgrade: Upgrade) -> None:
        self.is_pending = False
        try:
            from balancer.edge.websocket import WebSocket  # which loads what few need

            socket = WebSocket(self, upgrade, self._sockets, self.listener.limits)
            self.attach(socket)
            # "websocket.connect". To ask for it once the client has left would end this process.
            self.protocol.receive()
            accepted = self.protocol.send({"type": "websocket.accept", "subprotocol": upgrade.subprotocol})
        except BaseException:  # its backend waits for somebody to speak
            upgrade.connection.close()
            upgrade.ended(BalancerError.reason)
            raise
        when_done(accepted, lambda _: socket.begin())

    def let_go(self) -> None:
        self._watcher.done()

    def end(self) -> None:
        self.detach()
        self._end()

    def _end(self) -> None:
        self.listener.open_sockets.pop(self, None)
        super()._end()

    def _send_last(self, piece: bytes) -> None:
        """A refusal, which has exactly one piece, and which Granian frames itself."""
        headers = [line for line in self._headers if line[0] != b"content-length"]
        self.protocol.send({"type": "websocket.http.response.start", "status": self._status, "headers": headers})
        self.protocol.send({"type": "websocket.http.response.body", "body": piece})
        self._is_started = self._is_ended = True
