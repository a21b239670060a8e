"""Two attempts of one request at a time: the first one is late, so a second backend is asked as well.

Whichever answers first wins, and the other is dropped: its connection is closed, and nobody is blamed. An attempt that
fails leaves the race. One that is answered with 500 or above waits for a better answer, as long as an answer may take
until it is late.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from balancer.balancing.hedging import Hedging
from balancer.errors import BackendError
from balancer.forwarding.attempts import Attempts, Leg
from balancer.forwarding.route import Route
from balancer.observe.record import DROPPED, Record
from balancer.protocol.client import Client
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.upstream.connection import Connection
from balancer.upstream.sent import Sent
from balancer.upstream.transport import BackendAdapter

WORST_GOOD = 499  # the highest status of an answer that need not be compared with another one


class Opening:
    """The connection that a second attempt lacks. A worker opens it with `run`; whoever waits for it calls `take` until
    it `is_over`, or `drop`: then it is kept for whoever needs one next. Each access is one step that needs no lock."""

    source = ""

    def __init__(self, adapter: BackendAdapter, origin: Origin) -> None:
        self._adapter = adapter
        self._origin = origin
        self._opened: deque[Connection] = deque()
        self._is_dropped = False
        self.is_over = False

    def run(self) -> None:
        try:
            with suppress(BackendError):
                self._opened.append(self._adapter.open(self._origin))
        finally:
            self.is_over = True
            if self._is_dropped:
                self.drop()

    def take(self) -> Connection | None:
        """For the one who asked for it, once."""
        try:
            return self._opened.pop()
        except IndexError:
            return None

    def drop(self) -> None:
        """It is not needed any more."""
        self._is_dropped = True
        connection = self.take()
        if connection is not None:
            self._adapter.give_back(connection)


class Race:
    """The attempts of a request that is late. Used by the thread that has it; any may call `abort`.

    `pending` has those without an answer, by the descriptors of their connections; it is empty when the race is over.
    `deadline` is of time.monotonic(), for both together. `is_waiting` for the second attempt: the budget, a place, or a
    connection.
    """

    __slots__ = (
        *("pending", "deadline", "is_waiting", "_attempts", "_adapter", "_hedging", "_client", "_late"),
        *("_is_leased", "_opening", "_bad"),
    )

    def __init__(self, attempts: Attempts, route: Route, client: Client, first: Sent, late: float) -> None:
        self.pending = {first.connection.descriptor: attempts.leg(first)}
        self.deadline = first.deadline
        self.is_waiting = True
        self._attempts = attempts
        self._adapter = route.adapter
        self._hedging = route.pool.hedging
        self._client = client
        self._late = late
        self._is_leased = False  # for a second attempt that is not sent yet
        self._opening: Opening | None = None
        self._bad: list[Leg] = []  # with an answer that is better than none

    def begin(self) -> Sent | Opening | None:
        """Send to a second backend, if the budget allows it and there is room. Returns what was sent, or what opens the
        connection that is missing, after which this has to be called again."""
        if not self._is_leased and not self._lease():
            return None
        if self._attempts.is_barred_beside:
            self._forgo()
            return None
        opening = self._opening
        is_over = opening is not None and opening.is_over
        second = self._attempts.send_beside(self.deadline, opening.take() if opening is not None else None)
        if second is not None:
            self.is_waiting = self._is_leased = False
            self.pending[second.sent.connection.descriptor] = second
            self._client.attach(self)
            return second.sent
        if opening is None:
            self._opening = Opening(self._adapter, self._attempts.origin_beside)
            return self._opening
        if is_over:  # in vain
            self._forgo()
        return None

    def _lease(self) -> bool:
        if not self._hedging.spend(self._attempts.is_silent(self._late)):
            return False
        self._client.attach(self)  # from here on the request is on two backends, of which one may be cut off
        try:
            self._is_leased = self._attempts.lease_beside()
        finally:
            if not self._is_leased:
                self._hedging.refund()
        return self._is_leased

    def _forgo(self) -> None:
        """No second attempt, if it is not sent yet."""
        self.is_waiting = False
        if self._opening is not None:
            self._opening.drop()
        if self._is_leased:
            self._is_leased = False
            self._attempts.release_beside()
            self._hedging.refund()

    def abort(self) -> None:
        """All if the client has left, else those whose backend was cut off."""
        for leg in list(self.pending.values()):
            if self._client.is_gone or self._attempts.is_cut(leg):
                leg.sent.connection.abort()

    def look(self, descriptor: int, most: int) -> Leg | None:
        """Take in what has come on one connection. Returns the winner when there is one."""
        leg = self.pending[descriptor]
        leg.is_whole = self._adapter.look(leg.sent, most)
        del self.pending[descriptor]
        if self._client.is_gone or not (self.pending or self._bad):
            return self._settle(leg)
        if leg.sent.failure is None and leg.sent.response is None:  # not even its head is whole
            self.pending[descriptor] = leg
        elif leg.sent.failure is not None:
            self._attempts.lose(leg)
        elif leg.is_whole and leg.status > WORST_GOOD:
            self._bad.append(leg)
            self.deadline = min(self.deadline, time.monotonic() + self._late)
        else:
            return self._settle(leg)
        if not self.pending:
            return self._settle(self._bad[0])
        self._client.attach(self)  # it may have been detached from this one
        return None

    def expire(self) -> Leg:
        """No answer has come in time, or no better one. Returns the winner."""
        if self._bad:
            return self._settle(self._bad[0])
        leg = next(iter(self.pending.values()))
        leg.sent.expire()
        return self._settle(leg)

    def give_up(self) -> None:
        """After a surprise of ours: nobody goes on with any of them."""
        self._forgo()
        for leg in self.pending.values():
            leg.sent.close()
        self._attempts.release_beside()

    def _settle(self, winner: Leg) -> Leg:
        """The others are dropped, and the request goes on as if there had been this attempt alone."""
        self._forgo()
        self._client.detach()
        pending, self.pending = self.pending, {}
        for leg in pending.values():
            if leg is not winner:
                self._attempts.drop(leg)
        for leg in self._bad:
            if leg is not winner:
                self._attempts.outdo(leg)
        self._attempts.settle(winner)
        if not winner.is_whole:
            self._client.attach(winner.sent.connection)
        return winner


def noting(hedging: Hedging) -> Callable[[Request, Record], None]:
    """A hook for the end of each request, from which `hedging` learns what is late and how many hedges there may be."""
    answered = hedging.answered

    def note(request: Request, record: Record) -> None:
        attempts = record.attempts
        if not attempts:
            return
        if not record.is_late:
            hedging.count()
        if record.websocket is None and not record.bytes_in:
            first = attempts[0] if len(attempts) == 1 else record.in_turn[0]
            if first.outcome.isdecimal() or first.outcome == DROPPED:
                answered(first.seconds)

    return note
