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
import time
from collections.abc import Callable
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from balancer.edge import accepted
from balancer.edge.call import Call
from balancer.edge.clientbody import AHEAD_BYTES, AHEAD_IN_ALL, READ_BYTES, SMALL_IN_ALL
from balancer.edge.download import BRIEF_SECONDS
from balancer.edge.listener import ClientLimits
from balancer.edge.promise import result_of, when_done
from balancer.edge.workers import WorkerPool
from balancer.errors import ClientStalled
from balancer.forwarding.forwarding import WHOLE_STREAM
from balancer.forwarding.stage import Stage
from balancer.protocol.messages import is_in_networks, network_of
from balancer.upstream.transport import SMALL_BODY

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from balancer.edge.express import Express
    from balancer.edge.wsgi import ReverseProxy

log = logging.getLogger("balancer.server")

WATCH_AFTER_SECONDS = 0.1  # a request in flight longer than this is watched for its client leaving
MANY_DOWNLOADS = 64  # that are under way: from then on less is held, and no thread waits for any of them
MAX_LINGERING = 64  # worker threads that read on after an answer at the same time; lingering is a courtesy


class Bridge:
    """Takes requests from Granian and hands them on.

    Without `proxy`, or for a control path, a request is `app`'s.

    `_calls` holds what is in flight, oldest first: Granian's thread adds, whoever answers takes out, the loop thread
    looks at a copy; each of these is one step that needs no lock. `_collecting` holds those whose small body is coming
    in, `_parked` those whose client has to read first, with the time by which it must have: whoever takes one out goes
    on with it. `_downloads` holds all that are answered in pieces. `_begun` has who sent a request since the loop
    thread last replaced it, `_handed` how many bytes who was handed since then.
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
    ) -> None:
        self.app = app
        self.pool = pool
        self.limits = limits  # may be replaced at any time
        self.is_draining = False  # set by the server: each answer asks its client to close
        self._is_control = is_control
        self.proxy = proxy
        self.express = express
        self.lingering = BoundedSemaphore(MAX_LINGERING)
        self.most_read = READ_BYTES  # bytes of a body that hyper gives at a time; set by the server
        self._calls: dict[Call, None] = {}
        self._collecting: dict[Call, None] = {}
        self._begun: dict[accepted.Address, None] = {}
        self._handed: dict[accepted.Address, int] = {}
        self._parked: dict[Call, float] = {}
        self._downloads: dict[Call, None] = {}
        # Bytes of an answer that may be taken in whole, and seconds that a worker waits for its client before it parks
        # the call: less with many downloads under way.
        self.most_held, self.patience = SMALL_BODY, BRIEF_SECONDS

    def accept(self, watcher: Any) -> None:
        """One request: Granian calls this in its own thread and it must not block."""
        call = Call(self, watcher)
        self._calls[call] = None
        self._begun[call.scope["client"]] = None
        self.safely(self._hand_on, call)

    def safely(self, step: Callable[[Call], object], call: Call) -> None:
        """No call may be lost by a surprise: its client would wait for ever, and so would the end of the process."""
        try:
            step(call)
        except Exception:
            log.exception("request failed")
            call.refuse()

    def _hand_on(self, call: Call) -> None:
        is_control = self._is_control(call.scope["path"])
        if self.proxy is not None and not is_control:
            call.forwarding = self.proxy.forward(call.request(self.proxy.heads))
            if self.express is not None:
                self._collect(call)
                return
        self._submit(call, is_control)

    def connect(self, call: Call) -> bool:
        """Called by a worker: True if the express way has the call from now on."""
        return self.express is not None and self.express.connect(call)

    def _submit(self, call: Call, is_control: bool = False) -> None:
        forwarding = call.forwarding
        is_under_way = call.download is not None or (forwarding is not None and forwarding.stage is Stage.SENT)
        if not self.pool.submit(call, is_control, is_under_way=is_under_way):
            call.refuse()

    # Small bodies come in without a worker thread: Granian's thread, which also brings each piece of them.

    def _collect(self, call: Call) -> None:
        assert self.express is not None
        body = call.body
        if body is not None and not body.is_done and body.is_small(self.small_body):
            missing = body.missing()
            if missing is not None:
                when_done(missing, lambda _: self._go_on(call))  # first, or it could undo what a worker waits for
                self._collecting[call] = None
                return
        if not self.express.take(call):
            self._submit(call)

    def _go_on(self, call: Call) -> None:
        if self._collecting.pop(call, call) is not call:  # else a worker waits for the rest
            self.safely(self._collect, call)

    def _stop_collecting(self, oldest: float) -> None:
        """The loop thread: whatever takes longer than usual gets a worker, which knows how long it may take."""
        for call in list(self._collecting):
            if call.started <= oldest and self._collecting.pop(call, call) is not call:
                self.safely(self._submit, call)

    # Answers that their clients do not read at once.

    @property
    def downloads(self) -> int:
        return len(self._downloads)

    def begin_download(self, call: Call) -> None:
        self._downloads[call] = None
        self._note_downloads()

    def end_download(self, call: Call) -> None:
        self._downloads.pop(call, None)
        self._note_downloads()

    def _note_downloads(self) -> None:
        few = len(self._downloads) < MANY_DOWNLOADS
        self.most_held, self.patience = (SMALL_BODY, BRIEF_SECONDS) if few else (WHOLE_STREAM, 0.0)

    def park(self, call: Call) -> None:
        """Called by whoever had it; from here on it may be somebody else's."""
        assert call.download is not None
        promise = call.download.promise
        self._parked[call] = call.download.deadline
        when_done(promise, lambda _: self._go_on_with(call))
        if call.is_gone and self._take(call):  # its leaving may have been looked at before
            call.abandon()

    def _take(self, call: Call) -> bool:
        """True if it was parked: it is ours now."""
        return self._parked.pop(call, None) is not None

    def _go_on_with(self, call: Call) -> None:
        """Its client has read, or left. Granian's thread, or the one that parks it: must not block."""
        if not self._take(call):
            return
        assert call.download is not None
        call.download.note_room()
        if call.download.is_here and (call.body is None or call.body.is_done):
            call.answer()
        else:
            self.safely(self._resume, call)

    def _resume(self, call: Call) -> None:
        self._submit(call, self._is_control(call.scope["path"]))

    def _end_slow_downloads(self, now: float) -> None:
        """The loop thread. All are cut in one pass, and before they are recorded."""
        late = [call for call, deadline in self._parked.copy().items() if deadline <= now and self._take(call)]
        if late:
            accepted.cut_all({call.addresses for call in late})
            for call in late:
                call.abandon(ClientStalled)

    def finish(self, call: Call) -> None:
        self._calls.pop(call, None)

    def source_of(self, host: str) -> str:
        """Whose requests share the worker threads: an address, in IPv6 the network that one customer has. "" for a
        proxy that is trusted."""
        if self.limits.networks and is_in_networks(host, self.limits.networks):
            return ""
        return network_of(host)

    @property
    def active(self) -> int:
        return len(self._calls)

    def paused(self, client: accepted.Address) -> int:
        """How many request bodies of this connection wait for their backends."""
        return sum(call.is_paused for call in list(self._calls) if call.scope["client"] == client)

    @property
    def ahead_bytes(self) -> int:
        """Of one request body: what may be asked for before it is needed."""
        return min(AHEAD_BYTES, AHEAD_IN_ALL // max(self.active, 1))

    @property
    def small_body(self) -> int:
        """Bytes of a body that needs no thread."""
        assert self.proxy is not None
        return min(self.proxy.routes.usual.small_body, SMALL_IN_ALL // max(self.active, 1))

    def used(self) -> Callable[[accepted.Address], bool]:
        """What tells of a client whether it has a request in flight, or had one since `used` was last asked for."""
        begun, self._begun = self._begun, {}
        known = begun.keys() | {call.scope["client"] for call in list(self._calls)}
        return lambda client: client in known or client in self._begun

    def hand_over(self, client: accepted.Address, size: int) -> None:
        """So many bytes of an answer went to hyper, for a client of HTTP/2, which may leave many unread. Two at once
        may count as one, to the client's good."""
        self._handed[client] = self._handed.get(client, 0) + size

    def handed(self) -> dict[accepted.Address, int]:
        """What was handed over since this was last asked for."""
        handed, self._handed = self._handed, {}
        return handed

    # Noticing that a client has left: the loop thread begins it, Granian's ends it.

    async def watch(self) -> None:
        """Most requests are over before this looks at them, so that watching costs them nothing."""
        while True:
            await asyncio.sleep(WATCH_AFTER_SECONDS)
            try:
                now = time.monotonic()
                self._look_around(now - WATCH_AFTER_SECONDS)
                self._end_slow_downloads(now)
            except Exception:  # it must go on, or nobody would notice any more that clients leave
                log.exception("watching clients failed")

    def _look_around(self, oldest: float) -> None:
        self._stop_collecting(oldest)
        for call in list(self._calls):
            if call.started > oldest:
                break
            if not call.is_watched and call.may_be_watched():
                call.is_watched = True
                self._watch_one(call)

    def _watch_one(self, call: Call) -> None:
        when_done(call.protocol.receive(), lambda promise: self._look(call, promise))

    def _look(self, call: Call, promise: Any) -> None:
        """In Granian's thread or the loop's: must not block."""
        if result_of(promise)["type"] == "http.request":
            self._watch_one(call)
        elif call in self._calls:  # else it was the end of the answer that ended the wait
            self._lost(call)

    def _lost(self, call: Call) -> None:
        call.disconnect()
        if self._take(call):
            call.abandon()
        elif self.pool.withdraw(call):
            call.refuse()

    def abort(self) -> None:
        """Cut every client off: the drain time is over."""
        calls = list(self._calls)
        accepted.cut_all({call.addresses for call in calls})  # first, or they would be told that they had left
        for call in calls:
            self._lost(call)
