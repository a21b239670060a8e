"""From ASGI, as Granian speaks it, to the proxy and to WSGI, without losing what a proxy must keep.

Granian's own WSGI interface gives neither the raw path nor repeated header lines, so this bridges its ASGI interface,
at the point where Granian would schedule a coroutine. What is to be forwarded goes to the `ReverseProxy` as it is: on
the express way if it can, else in a worker thread. Everything else is a WSGI call in a worker thread. Nothing passes
through the event loop: each request, and each wait for a client, cost two more wake-ups there and a task.

    Granian's thread: Bridge.accept -> worker: Call.run, or express: Call.answer -> Granian's thread

An answer that its client does not read holds no thread: its call is parked until Granian says that there is room.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from balancer.edge import accepted
from balancer.edge.call import Call
from balancer.edge.handshake import HandshakeCall
from balancer.edge.listener import ClientLimits, Listener
from balancer.edge.promise import result_of, when_done
from balancer.edge.workers import WorkerPool
from balancer.errors import BackendRemoved, ClientStalled
from balancer.forwarding.stage import Stage

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from balancer.edge.express import Express
    from balancer.edge.sockets import Sockets
    from balancer.edge.wsgi import ReverseProxy
    from balancer.forwarding.forwarding import Forwarding

log = logging.getLogger("balancer.server")

SPREAD = 0.8  # of the time in which WebSockets are closed; in the rest the last ones can end
SEARCH_SECONDS, SEARCH_PAUSE = 0.5, 20  # between two searches through all connections, and times what one takes
WATCH_AFTER_SECONDS = 0.1  # a request in flight longer than this is watched for its client leaving


class Bridge(Listener):
    """Takes requests from Granian and hands them on.

    Without `proxy`, or for a control path, a request is `app`'s.

    `_collecting` holds the calls whose small body is coming in, `_parked` those whose client has to read first, with
    the time by which it must have: whoever takes one out goes on with it.
    """

    def __init__(
        self,
        app: WSGIApplication,
        pool: WorkerPool,
        limits: ClientLimits,
        *,
        is_control: Callable[[str], bool] = lambda path: False,
        proxy: ReverseProxy | None = None,
        express: Express | None = None,
        sockets: Sockets | None = None,
    ) -> None:
        super().__init__(app, limits)
        self.sockets = sockets  # without it, WebSockets are requests like others
        self.is_leaving = False  # all WebSockets are being closed: no more are wanted
        self.pool = pool
        self.proxy = proxy
        self.express = express
        self._is_control = is_control
        self._collecting: dict[Call, None] = {}
        self._parked: dict[Call, float] = {}
        self._next_search = 0.0  # of time.monotonic(), for clients that have left before they were let in

    # --- Granian's thread: nothing here may block. ---

    def accept_last(self, watcher: Any) -> None:
        """One request to a worker that accepts no more: another has taken its place."""
        self.accept(watcher, True)

    def accept(self, watcher: Any, is_last: bool = False) -> None:
        """One request, as Granian's `watcher` has it, the last one of its connection or not."""
        scope = watcher.scope
        is_control = self._is_control(scope["path"])
        if scope["type"] == "websocket":
            self._accept_socket(watcher, is_control, is_last)
            return
        call = Call(self, watcher, is_control, is_last)
        self.calls[call] = None
        self._begun[scope["client"]] = None
        try:
            if is_control or self.proxy is None:
                self._submit(call)
                return
            forwarding = call.forwarding = self.proxy.forward(call.request(self.proxy.heads))
            if call.body is None and self.express is not None and forwarding.start() and self.express.wait_for(call):
                return
            if call.body is None and forwarding.is_decided:
                call.answer()
            else:
                self._hand_on(call)
        except BaseException:
            self._surprised(call)

    def _accept_socket(self, watcher: Any, is_control: bool, is_last: bool) -> None:
        assert self.sockets is not None and self.proxy is not None  # else Granian is told to bring none
        call = HandshakeCall(self, watcher, is_control, is_last, self.sockets)
        self.calls[call] = self._begun[call.scope["client"]] = None
        try:
            if is_control:
                call.refuse_plainly()
                return
            call.forwarding = self.proxy.upgrade(call.request(self.proxy.heads))
            if self.is_leaving or len(self.open_sockets) > self.limits.max_websockets:
                call.refuse()
            else:
                self._submit(call)
        except BaseException:
            self._surprised(call)

    def _surprised(self, call: Call) -> None:
        """No call may be lost: its client would wait for ever, and so would the end of the process."""
        log.exception("request failed")
        call.refuse()

    def _safely(self, step: Callable[[Call], object], call: Call) -> None:
        try:
            step(call)
        except BaseException:
            self._surprised(call)

    def _submit(self, call: Call) -> None:
        forwarding = call.forwarding
        is_under_way = call.download is not None or (forwarding is not None and forwarding.stage is Stage.SENT)
        if not self.pool.submit(call, call.is_control, is_under_way=is_under_way):
            call.refuse()

    def _hand_on(self, call: Call) -> None:
        """To a worker thread, if it has no body that is small enough for the express way. Such a body comes in without
        a worker: by this thread, which also brings each piece of it."""
        body, forwarding = call.body, call.forwarding
        if self.express is not None and forwarding is not None and body is not None:
            if not body.is_done and body.is_small(min(forwarding.small_body, self.small_bytes)):
                missing = body.missing()
                if missing is not None:
                    when_done(missing, lambda _: self._go_on(call))  # first, or it could undo what a worker waits for
                    self._collecting[call] = None
                    return
            if (body.is_done or body.is_here) and forwarding.start() and self.express.wait_for(call):
                return
        self._submit(call)

    def _go_on(self, call: Call) -> None:
        if self._collecting.pop(call, call) is not call:  # else a worker waits for the rest
            self._safely(self._hand_on, call)

    def _resume(self, call: Call) -> None:
        """The client of a download has read on, or left. Also called by the thread that parks it."""
        if not self._take(call):
            return
        assert call.download is not None
        call.download.note_room()
        if call.download.is_here and (call.body is None or call.body.is_done):
            call.answer()
        else:
            self._safely(self._submit, call)

    # --- Whoever has the call. ---

    def connect(self, call: Call) -> bool:
        express, forwarding = self.express, call.forwarding
        return express is not None and forwarding is not None and forwarding.connect() and express.wait_for(call)

    def park(self, call: Call) -> None:
        assert call.download is not None
        promise = call.download.promise
        self._parked[call] = call.download.deadline
        when_done(promise, lambda _: self._resume(call))
        if call.is_gone and self._take(call):  # its leaving may have been looked at before
            call.abandon()

    def _take(self, call: Call) -> bool:
        """True if it was parked: it is ours now."""
        return self._parked.pop(call, None) is not None

    # --- The loop thread; that a client has left is said by Granian's. ---

    async def watch(self) -> None:
        """Most requests are over before this looks at them, so that watching costs them nothing."""
        while True:
            await asyncio.sleep(WATCH_AFTER_SECONDS)
            try:
                now = time.monotonic()
                self._look_around(now - WATCH_AFTER_SECONDS)
                self._look_for_left(now)
                self._end_slow_downloads(now)
            except Exception:  # it must go on, or nobody would notice any more that clients leave
                log.exception("watching clients failed")

    def _look_around(self, oldest: float) -> None:
        for call in list(self._collecting):  # a worker knows how long it may take
            if call.started <= oldest and self._collecting.pop(call, call) is not call:
                self._safely(self._submit, call)
        for call in list(self.calls):
            if call.started > oldest:
                break
            if not call.is_watched and call.may_be_watched():
                call.is_watched = True
                self._watch_one(call)

    def _look_for_left(self, now: float) -> None:
        """Clients that wait for a WebSocket: Granian does not say that they have left, but the kernel does."""
        if now < self._next_search:
            return
        oldest = now - SEARCH_SECONDS
        pending = [
            call
            for call in list(self.open_sockets)
            if call.is_pending and call.started <= oldest and call.scope["client"][0]
        ]
        if not pending:
            return
        here = accepted.connected(call.addresses for call in pending)
        for call in pending:
            if call.scope["client"] not in here:
                self._lost(call)
        self._next_search = now + max(SEARCH_SECONDS, SEARCH_PAUSE * (time.monotonic() - now))

    def _end_slow_downloads(self, now: float) -> None:
        """Connections that have to end too are cut in one pass, and before their requests are recorded."""
        late = [call for call, deadline in self._parked.copy().items() if deadline <= now and self._take(call)]
        if unreadable := {call.addresses for call in late if not call.leave()}:
            accepted.cut_all(unreadable)
        for call in late:
            call.abandon(ClientStalled)

    def _watch_one(self, call: Call) -> None:
        when_done(call.protocol.receive(), lambda promise: self._look(call, promise))

    def _look(self, call: Call, promise: Any) -> None:
        if result_of(promise)["type"] == "http.request":
            self._watch_one(call)
        elif call in self.calls:  # else it was the end of the answer that ended the wait
            self._lost(call)

    def _lost(self, call: Call) -> None:
        call.disconnect()
        if self._take(call):
            call.abandon()
        elif self.pool.withdraw(call):
            call.refuse()

    def leave_backend(self, is_there: Callable[[Forwarding], bool]) -> None:
        """End what is in flight on a backend. From any thread; whoever has such a call sees its connection end."""
        for call in list(self.calls):
            if call.leave_backend(is_there) and self._take(call):
                call.abandon(BackendRemoved)

    def has(self, is_one: Callable[[Forwarding], bool]) -> bool:
        """Whether such a request is in flight. From any thread."""
        return any(call.forwarding is not None and is_one(call.forwarding) for call in list(self.calls))

    def sockets_before(self, moment: float) -> list[HandshakeCall]:
        """WebSockets that were asked for by then, of time.monotonic(), or of a worker that accepted no more."""
        return [call for call in list(self.open_sockets) if call.since <= moment]

    def close_sockets(self, seconds: float, moment: float = math.inf) -> None:
        """One after the other, so that their clients do not come back all at once."""
        calls, now = self.sockets_before(moment), time.monotonic()
        for number, call in enumerate(calls):
            call.leave_at = now + SPREAD * seconds * number / len(calls)
        if self.sockets is not None:
            self.sockets.hurry()

    def abort(self, before: float = math.inf) -> None:
        """Every client has been cut off whose request began `before` then, of time.monotonic()."""
        for call in list(self.calls):
            if call.started < before:
                self._lost(call)
        if before == math.inf and self.sockets is not None:
            self.sockets.give_up()
