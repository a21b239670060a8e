"""Requests that need no thread while their backend works.

A request with a small head, without a body or with a small one that comes promptly (`Bridge` waits for it), is sent on
by the thread that brings it if a plain connection to its backend is kept, else by a worker thread that opens one. One
thread waits for the answers of all of them and passes on those that come whole. Whatever takes longer goes on in a
worker thread from where it stands: the queue, a long or late answer, a failure, a retry. So the usual request costs two
switches between threads less, and a thousand waiting for slow backends cost no thread at all.

Needs epoll, so Linux; elsewhere every request has its worker thread.
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

from balancer.edge.call import Call
from balancer.edge.workers import WorkerPool
from balancer.errors import InvalidResponse
from balancer.forwarding.attempts import Leg
from balancer.forwarding.race import Opening, Race
from balancer.upstream.connection import Connection
from balancer.upstream.sent import Sent

log = logging.getLogger("balancer.server")

INPUT = getattr(select, "EPOLLIN", 0)  # elsewhere than on Linux not used
LOOK_SECONDS = 0.05  # at most between two looks for answers that are overdue
LEAST_TICK, TICK_SHARE = 0.005, 0.125  # seconds between two looks for those that are late, and of what is late
LOOK_SHARE = 0.05  # of this thread's time for these looks: thousands may wait for backends that all stand still


class Express:
    """Call `wait_for` from any thread; `start` once.

    `_waiting` has the call per descriptor of its backend connection. Who brings a call puts it in and then sees to it
    that the descriptor is watched; whoever takes it out goes on with it: the express thread, or the one that brought it
    if the kernel watches no more. Each is one step that needs no lock, and so a call belongs to one thread at any time.

    A connection stays watched, `_watched` by its descriptor, while one request after the other waits on it: that saves
    each two system calls. When something comes for which nobody waits here, to a worker or to nobody, it is left.

    `_races` has the calls of this thread that are late, and wait for a second backend too or will soon: such a call is
    in `_waiting` once for each. `soonest_late` says after how many seconds the first one is.
    """

    def __init__(self, workers: WorkerPool, soonest_late: Callable[[], float] = lambda: math.inf) -> None:
        self._workers = workers
        self._soonest_late = soonest_late
        self._waiting: dict[int, Call] = {}
        self._races: dict[Call, Race] = {}
        self._watched: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)
        self._stopping = False
        self._next_look = self._next_expiry = 0.0  # of time.monotonic()
        self._late = math.inf
        self._tick = self._pause = LOOK_SECONDS
        self._thread = Thread(target=self._run, name="express", daemon=True)

    def start(self) -> None:
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread.start()

    def stop(self) -> None:
        """Stop and join. Calls that still wait are dropped: by now their clients have been cut off."""
        if self._stopping:
            return  # what was its descriptor may be somebody else's by now
        self._stopping = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def wait_for(self, call: Call) -> bool:
        """The request was sent: wait for its answer. From here on the call may belong to the express thread; False if
        it is still the caller's."""
        sent = self._sent(call)
        if sent.rest:
            return False
        connection = sent.connection
        descriptor = connection.descriptor
        self._waiting[descriptor] = call
        if self._watched.get(descriptor) is not connection:
            try:
                self._watch(descriptor, connection)
            except (OSError, ValueError):  # the kernel watches no more descriptors for us, or we have stopped
                self._forget(descriptor)
                return not self._claim(descriptor, call)  # else it was found overdue
        return True

    def _watch(self, descriptor: int, connection: Connection) -> None:
        """The kernel forgets each when it is closed."""
        self._watched[descriptor] = connection
        connection.is_watched = True
        with suppress(FileExistsError):  # about to be left
            self._epoll.register(descriptor, INPUT)

    def _claim(self, descriptor: int, call: Call) -> bool:
        """Take the call out; False if somebody has. The descriptor may be another connection's by now: a worker goes on
        with what waits there, since nobody else would."""
        taken = self._waiting.pop(descriptor, None)
        if taken is not None and taken is not call:
            self._hand_over(taken)
        return taken is call

    # The express thread.

    def run_once(self) -> None:
        """Pass on what has come, and whoever has waited for too long."""
        self._pass_on_answers()
        now = time.monotonic()
        if now >= self._next_look:
            begun = time.thread_time()
            if now >= self._next_expiry:
                self._next_expiry = now + LOOK_SECONDS
                self._expire(now)
                self._late, self._pause = self._soonest_late(), LOOK_SECONDS
                self._tick = min(LOOK_SECONDS, max(LEAST_TICK, TICK_SHARE * self._late))
            if self._next_late(now) <= now:
                self._hedge(now)
            self._next_look = now + max(self._tick, (time.thread_time() - begun) / LOOK_SHARE)
        if self._late < math.inf:
            self._pause = min(LOOK_SECONDS, max(self._tick, self._next_late(now) - now))

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.run_once()
            except BaseException:  # the thread must outlive any surprise, or every request would hang
                log.exception("express thread: a round failed")

    def _pass_on_answers(self) -> None:
        for descriptor, _ in self._epoll.poll(self._pause):
            call = self._waiting.pop(descriptor, None)
            if call is None:
                self._leave(descriptor)
                continue
            try:
                if self._races and call in self._races:
                    self._look_at_race(call, descriptor)
                else:
                    self._look(call)
            except BaseException:  # the others of this round must not wait for their time-out
                log.exception("passing on an answer failed")

    def _look(self, call: Call) -> None:
        forwarding = call.forwarding
        assert forwarding is not None
        try:
            is_whole = forwarding.look(call.listener.most_held)
        except BaseException:  # no call may be lost: its client would wait for ever
            log.exception("looking at an answer failed")
            sent = self._sent(call)
            sent.fail(InvalidResponse(f"{sent.connection.origin.url}: its answer could not be read"))
            is_whole = False
        if is_whole:
            call.answer()
        else:
            self._leave(self._sent(call).connection.descriptor)
            self._hand_over(call)

    def _leave(self, descriptor: int) -> None:
        """Watch it no more, unless somebody waits on it by now: who did not see that it is left would wait in vain."""
        if not self._forget(descriptor):
            return
        with suppress(OSError):  # closed meanwhile
            self._epoll.unregister(descriptor)
        call = self._waiting.get(descriptor)
        if call is not None:
            self._watch(descriptor, self._sent(call).connection)

    def _forget(self, descriptor: int) -> bool:
        connection = self._watched.pop(descriptor, None)
        if connection is not None:
            connection.is_watched = False
        return connection is not None

    def _sent(self, call: Call) -> Sent:
        assert call.forwarding is not None and call.forwarding.sent is not None
        return call.forwarding.sent

    def _hand_over(self, call: Call) -> None:
        if not self._workers.submit(call, False, is_under_way=True):
            call.refuse()

    def _expire(self, now: float) -> None:
        for descriptor, call in self._waiting.copy().items():
            if self._is_overdue(call, now) and self._claim(descriptor, call):
                self._leave(descriptor)
                if call in self._races:
                    self._decide(call, Race.expire)
                else:
                    self._sent(call).expire()
                    self._hand_over(call)

    def _is_overdue(self, call: Call, now: float) -> bool:
        forwarding, race = call.forwarding, self._races.get(call)
        if race is not None:
            return race.deadline <= now
        return forwarding is not None and forwarding.sent is not None and forwarding.sent.deadline <= now

    # The same thread: answers that are late.

    def _next_late(self, now: float) -> float:
        """When the answer for whoever was brought first is late, or would be for somebody brought now. A race may lack
        a connection or a place, which may come at any time."""
        if self._races:
            return now
        try:
            first = next(iter(self._waiting.values()), None)
        except RuntimeError:  # somebody was brought, or taken out, within this step
            return now
        return self._late + (now if first is None else first.started)

    def _hedge(self, now: float) -> None:
        """Ask a second backend for whoever has waited too long for one."""
        for call, race in self._races.copy().items():
            if race.is_waiting:
                self._begin(call, race)
        for descriptor, call in self._waiting.copy().items():  # about in the order in which they were brought
            if now - call.started < self._late:
                return
            if call not in self._races:
                self._race(descriptor, call)

    def _race(self, descriptor: int, call: Call) -> None:
        forwarding = call.forwarding
        race = forwarding.race() if forwarding is not None else None
        if race is None or not self._claim(descriptor, call):
            return
        self._races[call] = race
        try:
            self._wait_on(self._sent(call), call)  # whoever brought it may have failed to, and found it gone
        except (OSError, ValueError):
            self._decide(call, Race.expire)
        else:
            self._begin(call, race)

    def _wait_on(self, sent: Sent, call: Call) -> None:
        connection = sent.connection
        self._waiting[connection.descriptor] = call
        if self._watched.get(connection.descriptor) is not connection:
            self._watch(connection.descriptor, connection)

    def _begin(self, call: Call, race: Race) -> None:
        if call.listener.is_draining:
            return
        try:
            begun = race.begin()
            if isinstance(begun, Opening):
                if not self._workers.submit(begun, False):
                    begun.is_over = True
            elif begun is not None:
                self._wait_on(begun, call)
        except BaseException:  # the first attempt goes on
            log.exception("asking a second backend failed")
            race.is_waiting = False

    def _look_at_race(self, call: Call, descriptor: int) -> None:
        self._decide(call, lambda race: race.look(descriptor, call.listener.most_held))

    def _decide(self, call: Call, step: Callable[[Race], Leg | None]) -> None:
        """Go on with the winner, if there is one after this step."""
        race, forwarding = self._races[call], call.forwarding
        assert forwarding is not None
        for descriptor in race.pending:
            self._waiting.pop(descriptor, None)
        try:
            winner = step(race)
        except BaseException:  # as in `_look`
            log.exception("looking at an answer failed")
            del self._races[call]
            try:
                race.give_up()
            finally:
                call.refuse()
            return
        if winner is None:
            self._waiting |= dict.fromkeys(race.pending, call)
            return
        del self._races[call]
        forwarding.sent = winner.sent
        if winner.is_whole:
            call.answer()
        else:
            self._leave(winner.sent.connection.descriptor)
            self._hand_over(call)
