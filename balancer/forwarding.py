"""One request on its way from client to backend and back: checked, built once, attempted, answered, recorded.

A small answer is counted before the client can see it; the `ResponseStream` of any other calls `finish` at its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from balancer.answer import Answer, ResponseStream, refusal, to_options
from balancer.errors import (
    BackendError,
    BalancerError,
    BodyTooLarge,
    ClientError,
    ClientGone,
    ConnectFailed,
    MethodRefused,
    NoRoom,
    TooManyHeaders,
    Unavailable,
)
from balancer.exchange import METHOD_KEPT, PATH_KEPT, Attempt, Exchange
from balancer.messages import Line, check_target, count_down, max_forwards, request_id
from balancer.outgoing import OutgoingRequest

if TYPE_CHECKING:
    from balancer.incoming import Incoming
    from balancer.pool import Lease
    from balancer.proxy import ReverseProxy
    from balancer.response import BackendResponse
    from balancer.transport import Sent

log = logging.getLogger("balancer.proxy")

REPLAY_LIMIT = 65536  # bytes: a request body up to this size is read first, so that it can be sent again
# Full jitter before a retry, as Envoy has it: up to 25 ms, then up to 75 ms, never more than 250 ms.
BACKOFF_SECONDS = 0.025
MAX_BACKOFF_SECONDS = 0.25
EJECTING_STATUSES = frozenset({502, 503, 504})  # answers that say that the backend cannot work; passed on all the same
BUDGET_USED_UP = "the retry budget is used up"
INTERNAL_ERROR = "internal error, the log of the balancer has the cause"


class Forwarding:
    """One request on its way: what its attempts and its answer share. Used by one thread at a time.

    `run` does it all; `begin` may have done the first steps, and `refuse` ends it at any step before the answer.
    """

    __slots__ = (
        *("_proxy", "_options", "_incoming", "_started", "_identifier", "_record"),
        *("_request", "_lease", "sent", "_failure", "_waited", "_is_finished"),
    )

    def __init__(self, proxy: ReverseProxy, incoming: Incoming) -> None:
        self._proxy = proxy
        self._options = proxy.options
        self._incoming = incoming
        self._started = time.perf_counter()
        self._identifier = request_id(incoming.values(b"x-request-id"))
        self._request: OutgoingRequest | None = None
        self._lease: Lease | None = None
        self.sent: Sent | None = None
        self._failure: BalancerError | None = None
        self._waited = 0.0  # seconds for a thread
        self._is_finished = False
        self._record = Exchange(
            timestamp=time.time(),
            method=incoming.method[:METHOD_KEPT],
            path=incoming.path[:PATH_KEPT],
            request_id=self._identifier.decode("ascii"),
        )
        proxy.statistics.begin()

    def begin(self) -> bool:
        """The first attempt as far as it goes without waiting; True if its request is `sent`. `run` does the rest.

        For requests without a body only. Never raises.
        """
        try:
            self._request = request = self._build()
            self._take_place(self._proxy.pool.lease_now(request))
            if self._lease is not None:
                attempt = self._attempt_on(self._lease)
                self.sent = self._proxy.adapter.begin(request, self._lease.choice.origin)
                if self.sent is None:
                    self._record.attempts.remove(attempt)
        except BalancerError as error:
            self._failure = error
        except Exception:
            log.exception("request %s failed", self._record.request_id)
            self._failure = BalancerError(INTERNAL_ERROR)
        return self.sent is not None

    def run(self) -> Answer:
        """Never raises."""
        try:
            if self._request is None:  # else `begin` did not have to wait for a thread
                self._waited = time.perf_counter() - self._started
                if self._waited > self._options.request_timeout:
                    raise NoRoom(f"no thread became free within {self._options.request_timeout:g} s")
            if self._failure is not None:
                raise self._failure
            if self.sent is not None and self.sent.is_answered:
                return self._answer(self._arrived(self.sent))
            incoming = self._incoming
            if incoming.method == "OPTIONS" and max_forwards(incoming.values(b"max-forwards")) == 0:
                self.finish(200)
                return self._signed(to_options())
            return self._answer(self._send(self._request or self._build()))
        except BalancerError as error:
            return self._refuse(error)
        except Exception:  # ours, not the client's or a backend's: the log has the traceback, the client one line
            log.exception("request %s failed", self._record.request_id)
            return self._refuse(BalancerError(INTERNAL_ERROR))

    def refuse(self) -> Answer:
        """The answer when no thread is free for the request; does not block."""
        if self.sent is not None:
            self.sent.close()
        else:
            self._record.backend = None  # nothing reached it
        if self.is_client_gone():
            return self._refuse(ClientGone("the client left while it waited for a thread"))
        return self._refuse(NoRoom("the load balancer is full, try again"))

    # The outgoing request, built once.

    def _build(self) -> OutgoingRequest:
        incoming, options = self._incoming, self._options
        method, head = incoming.method, incoming.head
        if len(incoming.lines) > options.max_header_count:
            raise TooManyHeaders(f"{len(incoming.lines)} header lines, at most {options.max_header_count} are accepted")
        if method in ("CONNECT", "TRACE"):
            raise MethodRefused(f"{method} is not supported")
        check_target(method, incoming.target)
        if head.refusal is not None:
            raise head.refusal
        self._record.trace_id = head.trace_id
        own = (b"x-request-id", self._identifier)
        if method == "OPTIONS":
            request = OutgoingRequest(method, incoming.target, [*count_down(head.lines), own])
        else:
            request = OutgoingRequest(method, incoming.target, (own,), head)
        request.watcher = incoming.client
        if incoming.length or incoming.is_ended:
            self._add_body(request)
        request.deadline = time.monotonic() + options.request_timeout - self._waited
        return request

    def _add_body(self, request: OutgoingRequest) -> None:
        incoming, limit = self._incoming, self._options.max_request_body
        length = incoming.content_length()
        if length is not None:
            if limit is not None and length > limit:
                raise BodyTooLarge(f"the request body has {length} bytes, at most {limit} are accepted")
            chunks = incoming.read(length, None)
            request.body = b"".join(chunks) if length <= REPLAY_LIMIT else self._counted(chunks)
            request.content_length = length
            if length <= REPLAY_LIMIT:
                self._record.bytes_in = length
        elif incoming.may_have_body():
            chunks = incoming.read(None, limit)
            first = next(chunks, b"")  # none: there is no body after all
            request.body = self._counted(chain([first], chunks)) if first else None

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._record.bytes_in += len(chunk)
            yield chunk

    # Attempts.

    def _send(self, request: OutgoingRequest) -> BackendResponse:
        """Try backends, another one each time. Raises what the last attempt raised."""
        failure: BackendError | None = None
        while True:
            if self._lease is None or failure is not None:
                self._lease_backend(request, failure)
            try:
                return self._attempt(request)
            except BackendError as error:
                failure = error
                self._record.not_retried = self._why_final(request, error)
                if self._record.not_retried is not None:
                    raise
            self._back_off(failure)

    def _why_final(self, request: OutgoingRequest, error: BackendError) -> str | None:
        """Why there is no further attempt, in words; None if there is one.

        Nothing was sent and the body is untouched: any method. Otherwise only what may be repeated; never too late.
        """
        tries, options = len(self._record.attempts), self._options
        if tries > options.retries:
            return f"tried {tries} times"
        if time.monotonic() >= request.deadline:
            return f"request_timeout of {options.request_timeout:g} s is over"
        if not (isinstance(error, ConnectFailed) or request.is_retriable):
            return f"{request.method} may have had its effect" if request.is_replayable else "the body is gone"
        return None

    def _back_off(self, failure: BackendError) -> None:
        """Not after a refused connect: a closed port has no load to be spared, and another backend is asked next."""
        if isinstance(failure, ConnectFailed) and failure.refused:
            return
        most = BACKOFF_SECONDS * (2 ** len(self._record.attempts) - 1)
        time.sleep(self._proxy.rng.uniform(0, min(MAX_BACKOFF_SECONDS, most)))

    def _lease_backend(self, request: OutgoingRequest, failure: BackendError | None) -> None:
        """A place for the next attempt. Raises `failure`, if there was one, when there is none, or no budget for it."""
        record, options = self._record, self._options
        tried = [attempt.backend for attempt in record.attempts]
        budget = options.retry_budget, options.retry_budget_minimum
        if failure is not None and not self._proxy.statistics.can_retry(*budget):  # nor wait for a place in vain
            record.not_retried = BUDGET_USED_UP
            raise failure
        started = time.perf_counter()
        try:
            lease = self._proxy.pool.lease(request, tried, watcher=request.watcher, deadline=request.deadline)
        except Unavailable as unavailable:
            record.queued += time.perf_counter() - started
            if self.is_client_gone():
                raise ClientGone("the client left while it waited for a backend") from None
            if failure is not None:  # what went wrong says more than that nobody else is left
                record.not_retried = str(unavailable)
                raise failure from None
            raise
        if failure is not None and not self._proxy.statistics.may_retry(*budget):
            lease.release()
            record.not_retried = BUDGET_USED_UP
            raise failure
        self._take_place(lease)

    def _take_place(self, lease: Lease | None) -> None:
        self._lease = lease
        if lease is not None:
            self._record.queued += lease.queued
            self._record.backend = lease.backend.id

    def _attempt_on(self, lease: Lease) -> Attempt:
        attempt = Attempt(lease.choice, at=time.perf_counter() - self._started)
        self._record.attempts.append(attempt)
        return attempt

    def _arrived(self, sent: Sent) -> BackendResponse:
        """The response to what `begin` sent: it is here, so nothing can fail any more."""
        attempt, response = self._record.attempts[-1], sent.response
        assert response is not None
        attempt.outcome = str(response.status_code)
        attempt.seconds = time.perf_counter() - self._started - attempt.at
        return response

    def _attempt(self, request: OutgoingRequest) -> BackendResponse:
        lease, sent = self._lease, self.sent
        assert lease is not None
        self.sent = None
        attempt = self._attempt_on(lease) if sent is None else self._record.attempts[-1]
        try:
            response = self._proxy.adapter.exchange(request, lease.choice.origin, sent)
        except Unavailable:
            lease.release()
            raise
        except (ClientError, ClientGone) as error:  # while the body was streamed; `finish` gives the place back
            attempt.outcome, attempt.error = error.reason, str(error)
            raise
        except BackendError as error:
            if self.is_client_gone():
                raise ClientGone("the client left while the backend was working") from None
            attempt.outcome, attempt.error = error.reason, str(error)
            self._blame(lease, error)
            raise
        else:
            attempt.outcome = str(response.status_code)
            return response
        finally:
            attempt.seconds = time.perf_counter() - self._started - attempt.at
            attempt.connect, attempt.resent = request.connect_seconds, request.is_resent

    def _blame(self, lease: Lease, error: BackendError) -> None:
        if isinstance(error, ConnectFailed) and error.refused:
            self._proxy.pool.record_refused(lease.backend, str(error), lease.choice.origin)
            self._proxy.on_refused()
        lease.release(failure="" if getattr(error, "stale", False) else str(error))

    def is_client_gone(self) -> bool:
        client = self._incoming.client
        return client is not None and client.is_gone

    # The answer.

    def _answer(self, response: BackendResponse) -> Answer:
        status, body = response.status_code, response.body
        lines = self._with_own(response.head.onward)
        if body.is_complete:
            data = body.read_chunk()
            self._record.bytes_out = len(data)
            self.finish(status)
            return Answer(status, response.reason, lines, data)
        if self._lease is not None:
            self._lease.answered(self._record.attempts[-1].seconds, status not in EJECTING_STATUSES)
        return Answer(status, response.reason, lines, ResponseStream(self, body, status))

    def _with_own(self, lines: Iterable[Line]) -> list[Line]:
        own = [*lines, (b"x-request-id", self._identifier)]
        if self._options.expose_backend and self._record.backend is not None:
            own.append((b"x-served-by", self._record.backend.encode("ascii")))
        return own

    def _refuse(self, error: BalancerError) -> Answer:
        """The balancer's own answer to a request that got none from a backend."""
        self._record.error = str(error)
        if isinstance(error, Unavailable):
            self._record.excluded = error.excluded
        self.finish(error.status, reason=error.reason, complete=not isinstance(error, ClientGone))
        return self._signed(refusal(error, self._options.balancer_id, self._record.request_id))

    def _signed(self, answer: Answer) -> Answer:
        return answer._replace(lines=self._with_own(answer.lines))

    def count_out(self, size: int) -> None:
        self._record.bytes_out += size

    def finish(self, status: int, *, reason: str | None = None, complete: bool = True, failure: str = "") -> None:
        """Record the exchange and give the backend's place back, once.

        `status` is what the client sees; `failure` in words if the backend broke off its answer.
        """
        if self._is_finished:
            return
        self._is_finished = True
        record, lease = self._record, self._lease
        record.status = status
        record.reason = reason
        record.complete = complete
        record.seconds = time.perf_counter() - self._started
        try:
            self._proxy.statistics.record(record)
            access_log = self._proxy.access_log
            if access_log is not None:
                access_log.add(record, self._incoming)
        finally:
            if lease is not None:
                self._give_back(lease, status, reason, failure)

    def _give_back(self, lease: Lease, status: int, reason: str | None, failure: str) -> None:
        if failure:
            lease.release(failure=failure)
        elif reason is not None:  # our own answer, or nobody can tell
            lease.release()
        elif status in EJECTING_STATUSES:
            lease.release(failure=f"answered {status}")
        else:
            lease.release(self._record.attempts[-1].seconds)
