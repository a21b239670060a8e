"""One open WebSocket: what its client sends goes to its backend, and the other way round.

The client's side is Granian's, which calls back when a message has come, or when there is room for more; the backend's
is ours. No thread waits for either.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any, Protocol

from balancer.edge.accepted import Address
from balancer.edge.listener import ClientLimits
from balancer.edge.promise import is_done, result_of, when_done
from balancer.edge.sockets import INPUT, ROOM, Sockets
from balancer.errors import BackendError, ConnectionLost, InvalidResponse, ResponseTimedOut
from balancer.forwarding.upgrade import Upgrade
from balancer.protocol.websocket import (
    GOING_AWAY,
    INTERNAL_ERROR,
    NO_CODE,
    NORMAL,
    TOO_BIG,
    By,
    cut_reason,
    is_close_code,
)
from balancer.upstream.websocket import BackendSocket

log = logging.getLogger("balancer.server")

PAUSE, RESUME = 262144, 65536  # bytes that one side has not read: then the other is not read either, and again from
LEAST_COUNTED = 512  # bytes of memory that a message takes until it is read, however small
TOLD_EACH = 131072  # bytes to a client after which we ask when it has read them: each answer costs a switch of threads
CLOSE_SECONDS = 5.0  # for either side to end, once it has been told


class Opened(Protocol):
    """The request that it came from."""

    protocol: Any
    leave_at: float

    @property
    def addresses(self) -> tuple[Address, Address]: ...

    def let_go(self) -> None:
        """Its client's side is over."""

    def end(self) -> None:
        """And so is the other."""


class WebSocket:
    """`_lock` guards everything; it is taken by Granian's thread, the `websockets` thread, and whoever opens it. An
    RLock, for Granian may call back from within a call. Sends under it never wait for a peer.

    What is to be done at its end takes other locks: `finish`, by the `websockets` thread, without this one.
    """

    __slots__ = (
        *("_call", "_upgrade", "_sockets", "_limits", "_client", "_backend", "_record", "_lock", "due"),
        *("_events", "_receiving", "_is_client_open", "_is_backend_open", "_is_over", "_untold", "_unread"),
        *("_opened_at", "_used_at", "_pinged_at", "_deadline", "_reason", "_failure"),
    )

    def __init__(self, call: Opened, upgrade: Upgrade, sockets: Sockets, limits: ClientLimits) -> None:
        self._call = call
        self._upgrade = upgrade
        self._sockets = sockets
        self._limits = limits  # as they were when it began
        self._client = call.protocol
        self._backend = BackendSocket(upgrade.connection, upgrade.received, self._limits.websocket_max_message)
        self._record = upgrade.socket
        self._lock = RLock()
        self.due = math.inf
        self._events = 0  # that the thread waits for
        self._receiving: Any = None  # Granian's promise of the client's next message
        self._is_client_open = self._is_backend_open = True
        self._is_over = False
        self._untold = self._unread = 0  # bytes to the client: of which we have not asked; that it has not read
        self._opened_at = self._used_at = self._pinged_at = time.monotonic()
        self._deadline: float | None = None  # it is closing
        self._reason: str | None = None
        self._failure = ""

    @property
    def addresses(self) -> tuple[Address, Address]:
        return self._call.addresses

    @property
    def leave_at(self) -> float:
        return self._call.leave_at

    # What happens to it, in whichever thread.

    def begin(self) -> None:
        """Its client has been let in."""
        self._sockets.add(self._backend.connection.sock.fileno(), self)
        self._safely(self._begin)

    def ready(self, events: int) -> None:
        """The backend has sent something, or has read."""
        self._upgrade.alive()
        self._safely(self._exchange, events)

    def look(self, now: float) -> bool:
        """Whatever is due. True if its client has to be cut off."""
        with self._lock:
            is_stuck = self._is_client_open and self._deadline is not None and now >= self._deadline
        self._safely(self._look, now)
        return is_stuck

    def abort(self) -> None:
        """As `Abortable` has it: it ends, and neither side is at fault."""
        self._call.leave_at = 0.0
        self._sockets.hurry()

    def finish(self) -> None:
        connection = self._backend.connection
        self._sockets.forget(connection.sock.fileno())
        connection.close()
        try:
            self._upgrade.ended(self._reason, self._failure)
        finally:
            self._call.end()

    def _safely(self, step: Callable[..., object], *arguments: Any) -> None:
        """Whatever fails ends this one and no other."""
        with self._lock:
            if self._is_over:
                return
            try:
                step(*arguments)
                self._await()
            except BaseException:
                log.exception("a WebSocket failed")
                self._close(INTERNAL_ERROR, "", "balancer")
            if not (self._is_client_open or self._is_backend_open):
                self._is_over = True
                self._sockets.leave_to_thread(self.finish)

    # The rest has the lock.

    def _begin(self) -> None:
        self._plan()
        self._listen()
        self._pass_back()

    def _await(self) -> None:
        """What the thread is to wait for: more from the backend, unless the client has to read first; room for more."""
        events = ROOM if self._backend.unsent else 0
        if self._unread <= (PAUSE if self._events & INPUT else RESUME):
            events |= INPUT
        if not self._is_backend_open:
            events = 0
        if events != self._events:
            self._sockets.arm(self._backend.connection.sock.fileno(), self._events, events)
            self._events = events

    # From the client to the backend.

    def _listen(self) -> None:
        """Ask for the client's next message, until one has to be waited for, or the backend has to read first. Granian
        answers a client's pings while it is asked. Not once it is closing: that would keep the close frame back."""
        while self._deadline is None and self._receiving is None and len(self._backend.unsent) <= PAUSE:
            promise = self._client.receive()
            if is_done(promise):
                self._take(result_of(promise))
            else:
                self._receiving = promise
                promise.add_done_callback(partial(self._safely, self._heard))

    def _heard(self, promise: Any) -> None:
        if promise is self._receiving:
            self._receiving = None
            self._take(result_of(promise))
            self._listen()

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "websocket.disconnect":
            self._client_over()
            code = event.get("code") or NO_CODE
            self._close(code if is_close_code(code) else NO_CODE, "", "client")
        elif self._deadline is None:
            text = event.get("text")
            self._pass_on(event["bytes"] if text is None else text.encode(), is_text=text is not None)

    def _pass_on(self, data: bytes, *, is_text: bool) -> None:
        record, most = self._record, self._limits.websocket_max_message
        record.messages_in += 1
        record.bytes_in += len(data)
        self._used_at = time.monotonic()
        if len(data) > most:
            self._close(TOO_BIG, f"at most {most} bytes are accepted", "balancer")
        else:
            self._backend.send(data, is_text=is_text)

    # From the backend to the client.

    def _exchange(self, events: int) -> None:
        backend = self._backend
        if backend.unsent and events & ~INPUT:
            backend.flush()
            if len(backend.unsent) <= RESUME:
                self._listen()
        if events & ~ROOM:
            self._read_on()

    def _read_on(self) -> None:
        """Pass on what is here, and what more comes, until the client has to read first."""
        is_more = True
        self._pass_back()
        while is_more and self._is_backend_open and self._unread <= PAUSE:
            is_more = self._backend.receive()
            self._pass_back()

    def _pass_back(self) -> None:
        while self._unread <= PAUSE:
            message = self._backend.next_message()
            if message is None:
                self._note_end()
                return
            if self._deadline is None:
                self._send(*message)

    def _send(self, message: str | bytes, size: int) -> None:
        record = self._record
        record.messages_out += 1
        record.bytes_out += size
        self._used_at = time.monotonic()
        kind = "text" if isinstance(message, str) else "bytes"
        promise = self._client.send({"type": "websocket.send", kind: message})
        self._untold += max(size, LEAST_COUNTED)
        if self._untold >= TOLD_EACH:  # whoever has read this one has read those before it
            told, self._untold = self._untold, 0
            if not is_done(promise):
                self._unread += told
                promise.add_done_callback(partial(self._safely, self._note_room, told))

    def _note_room(self, size: int, promise: Any) -> None:
        self._unread -= size
        if self._unread <= RESUME and not self._events & INPUT:
            self._read_on()

    def _note_end(self) -> None:
        """Whatever the backend has sent is passed on. Nothing happens if it goes on."""
        backend = self._backend
        if backend.close_code is not None:
            self._close(backend.close_code, backend.close_reason, "backend")
        elif backend.failure_code == TOO_BIG:
            self._close(TOO_BIG, "the backend's message is too big", "balancer")
        elif backend.failure:
            self._close(INTERNAL_ERROR, "the backend broke the protocol", "backend", InvalidResponse, backend.failure)
        if backend.has_ended:
            self._lose(ConnectionLost, "it closed the connection of a WebSocket without a close frame")

    # Time, and the end.

    def _plan(self) -> None:
        limits, due = self._limits, [self._used_at + self._limits.websocket_idle_timeout]
        if limits.websocket_max_age:
            due.append(self._opened_at + limits.websocket_max_age)
        if limits.websocket_ping_interval:
            due.append(self._pinged_at + limits.websocket_ping_interval)
        self.due = min(due) if self._deadline is None else self._deadline

    def _look(self, now: float) -> None:
        limits = self._limits
        if self._deadline is not None:
            if now >= self._deadline:
                self._client_over()
                self._is_backend_open = False
        elif now >= self.leave_at:
            self._close(GOING_AWAY, "the balancer or the backend is going away", "balancer")
        elif limits.websocket_max_age and now >= self._opened_at + limits.websocket_max_age:
            self._close(GOING_AWAY, f"open for {limits.websocket_max_age:g} s", "balancer")
        elif now >= self._used_at + limits.websocket_idle_timeout:
            self._close(GOING_AWAY, f"idle for {limits.websocket_idle_timeout:g} s", "balancer")
        elif limits.websocket_ping_interval and now >= self._pinged_at + limits.websocket_ping_interval:
            self._ping(now)
        self._plan()

    def _ping(self, now: float) -> None:
        """Whatever has come since the last one shows that the backend is there. While we do not read, nothing can."""
        if self._events & INPUT and not self._backend.heard:
            self._lose(ResponseTimedOut, f"no answer to a ping for {self._limits.websocket_ping_interval:g} s")
            return
        self._backend.ping()
        self._backend.heard = not self._events & INPUT
        self._pinged_at = now

    def _lose(self, kind: type[BackendError], failure: str) -> None:
        self._is_backend_open = False
        self._close(INTERNAL_ERROR, "the backend was lost", "backend", kind, failure)

    def _close(self, code: int, reason: str, by: By, kind: type[BackendError] | None = None, failure: str = "") -> None:
        """Tell whichever side is there, once; `kind` and `failure` if the backend is to blame."""
        if self._deadline is not None:
            return
        self._record.code, self._record.by = code, by
        self._reason, self._failure = None if kind is None else kind.reason, failure
        self._deadline = self.due = time.monotonic() + CLOSE_SECONDS
        if self._is_client_open:
            receiving, self._receiving = self._receiving, None
            if receiving is not None:
                receiving.cancel()  # it holds on to what Granian needs for the next
            said = NORMAL if code == NO_CODE else code
            closed = self._client.send({"type": "websocket.close", "code": said, "reason": cut_reason(reason)})
            when_done(closed, partial(self._safely, self._client_over))
        if self._is_backend_open:
            self._backend.close(code, cut_reason(reason))

    def _client_over(self, promise: Any = None) -> None:
        if self._is_client_open:
            self._is_client_open = False
            self._call.let_go()
