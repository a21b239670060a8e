"""A request's attempts: a place on a backend for each, when another one follows, and who is to blame.

What may be repeated goes to another backend, as long as `retries`, the retry budget and `request_timeout` allow. This
is the only place where that is decided, but for the one more try that `transport` gives a kept connection that died.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from balancer.balancing.backends import Backend
from balancer.balancing.pool import Lease
from balancer.errors import BackendError, BackendRemoved, ClientError, ClientGone, ConnectFailed, NoRoom, Unavailable
from balancer.forwarding.route import Route, RouteOptions
from balancer.forwarding.stage import Stage
from balancer.observe.record import DROPPED, Attempt, Record
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.upstream.connection import Connection
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import BackendResponse
from balancer.upstream.sent import Sent

Given = TypeVar("Given")
Got = TypeVar("Got")

# Full jitter before a retry, as Envoy has it: up to 25 ms, then up to 75 ms, never more than 250 ms.
BACKOFF_SECONDS = 0.025
MAX_BACKOFF_SECONDS = 0.25
EJECTING_STATUSES = frozenset({502, 503, 504})  # answers that say that the backend cannot work; passed on all the same
BUDGET_USED_UP = "the retry budget is used up"
HEDGED = ("GET", "HEAD")  # methods that have no effect


def no_thread(options: RouteOptions) -> NoRoom:
    return NoRoom(f"no thread became free within {options.request_timeout:g} s")


@dataclass(slots=True, eq=False)
class Leg:
    """One of two attempts at the same time."""

    lease: Lease
    attempt: Attempt
    sent: Sent
    is_whole: bool = False  # its answer is here

    @property
    def status(self) -> int:
        return 0 if self.sent.response is None else self.sent.response.status_code


class Attempts:
    """Gets one request to a backend: `lease_now` and `send_now` as far as nothing has to be waited for, `run` for all
    the rest; `answered` if the answer comes in pieces, `end` in any case.

    Notes in `record` what was tried; `started` is of time.perf_counter(). Used by one thread at a time.
    """

    __slots__ = ("_route", "_request", "_outgoing", "_record", "_started", "_lease", "_beside", "_failure")

    def __init__(
        self, route: Route, request: Request, outgoing: OutgoingRequest, record: Record, started: float
    ) -> None:
        self._route = route
        self._request = request
        self._outgoing = outgoing
        self._record = record
        self._started = started
        self._lease: Lease | None = None  # of the last attempt, or for the next one
        self._beside: Lease | None = None  # of a second one at the same time
        self._failure: BackendError | None = None  # of what `send_now` tried

    def lease_now(self) -> bool:
        """Take a place on a backend if there is one; False if it has to be waited for."""
        lease = self._route.pool.lease_now(self._request)
        if lease is None:
            return False
        self._lease = lease
        self._record.backend = lease.backend.id
        return True

    def send_now(self, may_connect: bool) -> Sent | None:
        """Send to the leased backend if that needs no waiting, or if it `may_connect` no more than a connect does.

        None if it could not be. Raises BackendError if this attempt has failed, NoRoom, Unavailable, ClientGone.
        """
        if may_connect:  # a worker thread, for which it may have had to wait
            self._check_time()
        self._begin()
        try:
            sent = self._try(self._route.adapter.send_now, may_connect)
        except BackendError as error:
            self._failure = error.to_keep()
            raise
        if sent is None:
            self._record.attempts.pop()
        return sent

    def _check_time(self) -> None:
        """Raises NoRoom if nothing was sent yet and the time is over: no backend is to blame for that."""
        if time.monotonic() >= self._outgoing.deadline:
            self._record.backend = None
            raise no_thread(self._route.options)

    def run(self, stage: Stage, sent: Sent | None) -> BackendResponse:
        """Go on from `stage` until a backend has answered, another one for each attempt.

        Raises what the last attempt raised; Unavailable if there was none; ClientGone, ClientError.
        """
        if stage < Stage.SENT:
            self._check_time()
        failure, self._failure = self._failure, None
        while True:
            if failure is not None:
                self._record.not_retried = self._why_final(failure)
                if self._record.not_retried is not None:
                    raise failure
                self._back_off(failure)
            if failure is not None or stage < Stage.LEASED:
                self._lease_backend(failure)
            if failure is not None or sent is None:
                self._begin()
            try:
                return self._try(self._route.adapter.exchange, None if failure is not None else sent)
            except BackendError as error:
                failure = error.to_keep()

    # Whether there is another one.

    def _why_final(self, error: BackendError) -> str | None:
        """Why there is no further attempt, in words; None if there is one.

        Nothing was sent and the body is untouched: any method. Otherwise only what may be repeated; never too late.
        """
        tries, options, outgoing = len(self._record.attempts), self._route.options, self._outgoing
        if tries > options.retries:
            return f"tried {tries} times"
        if time.monotonic() >= outgoing.deadline:
            return f"request_timeout of {options.request_timeout:g} s is over"
        if not (isinstance(error, ConnectFailed) or outgoing.is_retriable):
            # Not the request's own: a client may make up a method as long as a head.
            return f"{self._record.method} may have had its effect" if outgoing.is_replayable else "the body is gone"
        return None

    def _back_off(self, failure: BackendError) -> None:
        """Not after a refused connect: a closed port has no load to be spared, and another backend is asked next."""
        if isinstance(failure, ConnectFailed) and failure.refused:
            return
        most = BACKOFF_SECONDS * (2 ** len(self._record.attempts) - 1)
        time.sleep(self._route.rng.uniform(0, min(MAX_BACKOFF_SECONDS, most)))

    def _lease_backend(self, failure: BackendError | None) -> None:
        """A place for the next attempt. Raises `failure`, if there was one, when there is none, or no budget for it."""
        record, request, budget = self._record, self._request, self._route.budget
        if failure is not None and not budget.is_left(*self._shares()):  # nor wait for a place in vain
            raise self._final(failure, BUDGET_USED_UP)
        tried = [attempt.backend for attempt in record.attempts]
        started = time.perf_counter()
        try:
            lease = self._route.pool.lease(request, tried, client=request.client, deadline=self._outgoing.deadline)
        except Unavailable as unavailable:
            record.queued += time.perf_counter() - started
            if request.client.is_gone:
                raise ClientGone("the client left while it waited for a backend") from None
            if failure is not None:  # what went wrong says more than that no other backend is left
                raise self._final(failure, str(unavailable)) from None
            raise
        if failure is not None and not budget.spend(*self._shares()):
            lease.release()
            raise self._final(failure, BUDGET_USED_UP)
        self._lease = lease
        record.queued += lease.queued
        record.backend = lease.backend.id

    def _shares(self) -> tuple[float, int]:
        return self._route.options.retry_budget, self._route.options.retry_budget_minimum

    def _final(self, failure: BackendError, why: str) -> BackendError:
        self._record.not_retried = why
        return failure

    # One of them.

    def _begin(self) -> None:
        """An attempt on the leased backend."""
        assert self._lease is not None
        self._record.attempts.append(Attempt(self._lease.choice, at=time.perf_counter() - self._started))

    def _try(self, step: Callable[[OutgoingRequest, Origin, Given], Got], given: Given) -> Got:
        """A step of it, which the adapter does. If it fails, this says who is to blame."""
        lease, record = self._lease, self._record
        assert lease is not None
        try:
            return step(self._outgoing, lease.choice.origin, given)
        except Unavailable:  # it reached no backend, and none is at fault
            lease.release()
            record.attempts.pop()
            record.backend = record.attempts[-1].backend if record.attempts else None
            raise
        except (ClientError, ClientGone) as error:  # while the body was streamed; `end` gives the place back
            self._note(error.reason, str(error))
            raise
        except BackendError as error:
            if self._request.client.is_gone:
                self._note("")
                raise ClientGone("the client left while the backend was working") from None
            if self._was_cut():
                lease.release()
                removed = BackendRemoved(f"{lease.backend.id} was taken out of service")
                self._note(removed.reason, str(removed))
                raise removed from None
            self._note(error.reason, str(error))
            if isinstance(error, ConnectFailed) and error.refused:
                self._route.pool.record_refused(lease.backend, str(error), lease.choice.origin)
                self._route.on_refused()
            self._blame(lease, error)
            raise

    def _blame(self, lease: Lease, error: BackendError) -> None:
        lease.release(failure="" if getattr(error, "stale", False) else str(error))

    def _note(self, outcome: str, error: str | None = None) -> None:
        """What came of it: a status, or a reason."""
        attempt = self._record.attempts[-1]
        attempt.outcome, attempt.error = outcome, error
        attempt.seconds = time.perf_counter() - self._started - attempt.at
        attempt.connect, attempt.resent = self._outgoing.connect_seconds, self._outgoing.is_resent

    def is_on(self, backend: Backend) -> bool:
        """It has a place there. Any thread may ask."""
        return any(
            lease is not None and lease.backend is backend and lease.is_held for lease in (self._lease, self._beside)
        )

    def _was_cut(self) -> bool:
        return self._lease is not None and self._is_cut(self._lease, self._record.attempts[-1])

    def _is_cut(self, lease: Lease, attempt: Attempt) -> bool:
        """The operator ended what its backend had in flight after this attempt began."""
        return self._started + attempt.at <= lease.backend.cut_at

    # Two of them at a time: the last one of the record, and one beside it. `Race` decides between them.

    def lateness(self) -> float | None:
        """Seconds after which an answer is late, if this one is by now, and the request may go to another backend as
        well: not if its client is bound to the one that has it."""
        late, outgoing = self._route.pool.hedging.late(), self._outgoing
        if late is None or outgoing.method not in HEDGED or outgoing.body is not None:
            return None
        if self._lease is None or self._lease.backend.id == self._request.preferred:
            return None
        if time.perf_counter() - self._started - self._record.attempts[-1].at < late:
            return None
        if not self._record.is_late:
            self._record.is_late = True
            self._route.pool.hedging.count()
        return late

    def leg(self, sent: Sent) -> Leg:
        assert self._lease is not None
        return Leg(self._lease, self._record.attempts[-1], sent)

    def is_silent(self, seconds: float) -> bool:
        """Whether nobody had an answer of its backend for so long."""
        return self._lease is not None and self._lease.is_silent(seconds)

    def lease_beside(self) -> bool:
        assert self._lease is not None
        self._beside = self._route.pool.lease_beside(self._lease, self._request)
        return self._beside is not None

    @property
    def is_barred_beside(self) -> bool:
        """Nothing is sent there: the operator ended what its backend had in flight, or TLS might have to wait."""
        beside = self._beside
        return beside is not None and (beside.backend.cut_at > -math.inf or beside.choice.origin.scheme == "https")

    @property
    def origin_beside(self) -> Origin:
        assert self._beside is not None
        return self._beside.choice.origin

    def send_beside(self, deadline: float, opened: Connection | None) -> Leg | None:
        """On the connection that was `opened` for it, or a kept one; None if there is none."""
        assert self._beside is not None
        sent = self._route.adapter.send_now(self._outgoing, self.origin_beside, opened=opened)
        if sent is not None and sent.rest:  # a head that does not go out at once: leave it
            sent.close()
        if sent is None or sent.rest:
            return None
        sent.deadline = deadline
        attempt = Attempt(self._beside.choice, at=time.perf_counter() - self._started)
        attempt.hedge = True
        self._record.attempts.insert(-1, attempt)
        return Leg(self._beside, attempt, sent)

    def release_beside(self) -> None:
        lease, self._beside = self._beside, None
        if lease is not None:
            lease.release()

    def lose(self, leg: Leg) -> None:
        """It failed, and the other one goes on."""
        error = leg.sent.failure
        assert error is not None
        if self.is_cut(leg):
            self._note_leg(leg, BackendRemoved.reason, f"{leg.lease.backend.id} was taken out of service")
            leg.lease.release()
        else:
            self._note_leg(leg, error.reason, str(error))
            self._blame(leg.lease, error)
        leg.sent.close()

    def drop(self, leg: Leg) -> None:
        """The other one was faster, or the client has left."""
        if self._request.client.is_gone:
            self._note_leg(leg, "")
            leg.lease.release()
        else:
            self._note_leg(leg, DROPPED)
            leg.lease.drop(is_late=not leg.attempt.hedge)
        leg.sent.close()

    def outdo(self, leg: Leg) -> None:
        """It has an answer, and the other one a better one."""
        self._note_leg(leg, str(leg.status))
        if leg.status in EJECTING_STATUSES:
            leg.lease.release(failure=f"answered {leg.status}")
        else:
            leg.lease.release(leg.attempt.seconds)

    def settle(self, leg: Leg) -> None:
        """The others are over: go on with this one."""
        attempts = self._record.attempts
        if attempts[-1] is not leg.attempt:
            attempts.remove(leg.attempt)
            attempts.append(leg.attempt)
            self._outgoing.connect_seconds = None  # that was the other's
        self._lease, self._beside = leg.lease, None
        self._record.backend = leg.lease.backend.id

    def _note_leg(self, leg: Leg, outcome: str, error: str | None = None) -> None:
        attempt = leg.attempt
        attempt.outcome, attempt.error = outcome, error
        attempt.seconds = time.perf_counter() - self._started - attempt.at
        attempt.connect = None if attempt.hedge else self._outgoing.connect_seconds

    def is_cut(self, leg: Leg) -> bool:
        return self._is_cut(leg.lease, leg.attempt)

    # The last one's place.

    def answered(self, status: int) -> None:
        """The response has begun, but its body may take long."""
        self._note(str(status))
        if self._lease is not None:
            self._lease.answered(self._record.attempts[-1].seconds, status not in EJECTING_STATUSES)

    def alive(self) -> None:
        """A piece of the body has come."""
        if self._lease is not None:
            self._lease.alive()

    def end(self, status: int, reason: str | None, failure: str) -> None:
        """The request is over, as `Forwarding.finish` has it."""
        lease = self._lease
        if lease is None:
            return
        if reason is None and not self._record.attempts[-1].outcome:
            self._note(str(status))
        if failure and self._was_cut():
            self._record.reason = BackendRemoved.reason
            lease.release()
        elif failure:
            lease.release(failure=failure)
        elif reason is not None:  # our own answer, or it says nothing about the backend
            lease.release()
        elif status in EJECTING_STATUSES:
            lease.release(failure=f"answered {status}")
        else:
            lease.release(self._record.attempts[-1].seconds)
