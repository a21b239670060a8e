"""One request on its way from client to backend and back: checked, built once, attempted, answered, recorded.

A small answer is counted before the client can see it; the `ResponseStream` of any other calls `finish` at its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import ClassVar

from balancer.balancing.backends import EXPLAINED, Backend
from balancer.balancing.pool import BackendPool
from balancer.errors import BackendError, BalancerError, BodyTooLarge, ClientGone, NoRoom, Unavailable
from balancer.forwarding.answer import Answer, ResponseStream, refusal
from balancer.forwarding.attempts import Attempts, no_thread
from balancer.forwarding.race import Race
from balancer.forwarding.route import REPLAY_LIMIT, Route
from balancer.forwarding.stage import Stage
from balancer.observe.record import METHOD_KEPT, PATH_KEPT, Record
from balancer.protocol.headerrules import check_filtered
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import BackendResponse
from balancer.upstream.sent import Sent

log = logging.getLogger("balancer.proxy")

WHOLE_STREAM = 16384  # bytes of an answer that is handed over whole in HTTP/2, where a client may leave many unread
INTERNAL_ERROR = "internal error, the log of the balancer has the cause"


class Forwarding:
    """One request on its way: what its attempts and its answer share. Used by one thread at a time.

    `run` takes it from whichever `stage` to its answer; `start` may have gone ahead as far as nothing had to be waited
    for; `refuse` ends it at any stage before the answer.
    """

    __slots__ = ("_route", "_request", "_started", "_own", "_record", "stage", "_attempts", "sent", "_decision")

    outgoing: ClassVar[type[OutgoingRequest]] = OutgoingRequest  # what is made of it for a backend

    def __init__(self, route: Route, request: Request) -> None:
        self._route = route
        self._request = request
        self._started = time.perf_counter()
        self._own: Line = (b"x-request-id", request.id)
        self._record = Record(
            time.time(), request.method[:METHOD_KEPT], request.path[:PATH_KEPT], request.id.decode("ascii")
        )
        self.stage = Stage.FOUND
        self._attempts: Attempts  # from BUILT on
        self.sent: Sent | None = None  # by `start`
        self._decision: Answer | BalancerError | None = None  # of our own, without a backend's answer

    @property
    def small_body(self) -> int:
        """Bytes of a request body that is read before the request is sent on."""
        return self._route.small_body

    @property
    def is_decided(self) -> bool:
        """It has an answer of our own: nothing has to be waited for any more, and `run` gives it at once."""
        return self._decision is not None

    def run(self) -> Answer:
        """The whole way: admit, build, lease, send, receive, answer. Waits where it has to. Never raises."""
        try:
            if self.sent is not None and self.sent.response is not None:
                return self._answer(self.sent.response)
            # Seconds for a thread; what is built already did not have to wait for one.
            waited = time.perf_counter() - self._started if self.stage < Stage.BUILT else 0.0
            if waited > self._route.options.request_timeout:
                raise no_thread(self._route.options)
            if self._decision is None and self.stage < Stage.ADMITTED:
                self._admit()
            if self._decision is None and self.stage < Stage.BUILT:
                self._build(waited, is_here=False)
            if self._decision is not None:
                return self._decided(self._decision)
            return self._answer(self._attempts.run(self.stage, self.sent))
        except BaseException as error:
            return self._decided(self._told(error))

    def start(self, *, may_connect: bool = False) -> bool:
        """The steps of `run` as far as they need no waiting; True if the request is SENT. Never raises.

        For requests without a body, or with a small one that has come whole. Once LEASED it `may_connect`, and take as
        long as a connect does.
        """
        try:
            if not may_connect:
                if self._route.waits:
                    return False
                self._admit()
                if self._decision is not None:
                    return False
                self._build()
                if not self._attempts.lease_now():
                    return False
                self.stage = Stage.LEASED
            self.sent = self._attempts.send_now(may_connect)
            if self.sent is not None:
                self.stage = Stage.SENT
                return True
        except BackendError:
            self.stage = Stage.FAILED
        except BaseException as error:
            self._decision = self._told(error)
        return False

    def connect(self) -> bool:
        """As `start`, after it, if a connection was all that was missing; or if it may be hedged, and a filter that
        waits was all that kept it from it."""
        if self.stage is Stage.FOUND and self._route.pool.hedging.is_on and self._request.head.is_bodiless:
            self._lease_late()
        return self.stage is Stage.LEASED and self._decision is None and self.start(may_connect=True)

    def _lease_late(self) -> None:
        """The steps of `run` until it is LEASED, if it need not wait for that. Never raises."""
        try:
            waited = time.perf_counter() - self._started
            self._admit()
            if self._decision is None:
                self._build(waited)
                if self._attempts.lease_now():
                    self.stage = Stage.LEASED
        except BaseException as error:
            self._decision = self._told(error)

    def look(self, most: int) -> bool:
        """SENT: take in what has come of the answer, without waiting, as `BackendAdapter.look` does."""
        assert self.sent is not None
        return self._route.adapter.look(self.sent, most)

    def race(self) -> Race | None:
        """SENT: two attempts at a time, if this one is late and may have a second one beside it."""
        late = self._attempts.lateness()
        if late is None or self.sent is None:
            return None
        return Race(self._attempts, self._route, self._request.client, self.sent, late)

    def refuse(self) -> Answer:
        """The answer when no thread is free for the request; does not block."""
        if self.sent is not None:
            self.sent.close()
        else:
            self._record.backend = None  # nothing reached it
        if self.is_client_gone():
            return self._decided(ClientGone("the client left while it waited for a thread"))
        return self._decided(NoRoom("the load balancer is full, try again"))

    def _told(self, error: BaseException) -> BalancerError:
        """What is told of it. A surprise is ours, not the client's or a backend's: the log has its traceback. So is a
        `sys.exit()` in a hook or a strategy: the thread is for other requests too, and the place has to come back."""
        if isinstance(error, BalancerError):
            return error.to_keep()
        log.error("request %s failed", self._record.request_id, exc_info=error)
        return BalancerError(INTERNAL_ERROR)

    # Its steps.

    def _admit(self) -> None:
        """By its head alone: no body is read for what is refused here. Raises ClientError."""
        request = self._request
        if request.refusal is not None:
            request.client.end_connection()  # what follows on it may be a part of this, by another reading
            raise request.refusal
        self._record.trace_id = request.head.trace_id
        for admit in self._route.admit:
            decision = admit(request)
            if decision is not None:
                decision.check()
                self._decision = decision
                return
        self.stage = Stage.ADMITTED

    def _build(self, waited: float = 0.0, *, is_here: bool = True) -> None:
        """The request for a backend. Reads a small body, if its client does not pause or it `is_here`; `waited` are
        seconds for a thread. Raises as the body does."""
        request = self._request
        outgoing = self.outgoing(request.method, request.target, (self._own,), request.head)
        outgoing.client = request.client
        outgoing.heads = self._route.response_heads
        if not request.head.is_bodiless:
            self._add_body(outgoing, is_here)
        if self._route.send:
            for send in self._route.send:
                send(request, outgoing)
            outgoing.check(request.head.lines)
        outgoing.deadline = time.monotonic() + self._route.options.request_timeout - waited
        self._attempts = Attempts(self._route, request, outgoing, self._record, self._started)
        self.stage = Stage.BUILT

    def _add_body(self, outgoing: OutgoingRequest, is_here: bool) -> None:
        request, limit = self._request, self._route.options.max_request_body
        length = request.head.length
        if length is None and not request.is_ended:
            return
        if length is not None and limit is not None and length > limit:
            raise BodyTooLarge(f"the request body has {length} bytes, at most {limit} are accepted")
        chunks = request.read(length, limit)
        taken = [*chunks] if is_here else []
        is_small = length is not None and length <= REPLAY_LIMIT
        # A backend may have an answer before a client that pauses has sent all, or anything.
        while not is_here and (is_small or not taken) and request.is_prompt:
            pieces = next(chunks, None)
            if pieces is None:
                is_here = True
            else:
                taken.append(pieces)
        if not is_here:
            outgoing.set_body(self._counted(chain(taken, chunks)), length)
        elif length is not None:  # else there is no body after all
            outgoing.set_body(b"".join(chain.from_iterable(taken)))
            self._record.bytes_in = length

    def _counted(self, chunks: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        for pieces in chunks:
            self._record.bytes_in += sum(map(len, pieces))
            yield pieces

    # The answer.

    def _answer(self, response: BackendResponse) -> Answer:
        status, body = response.status_code, response.body
        lines = [*response.head.for_client, self._own]
        if self._route.answer:
            self._record.status = status
            try:
                lines = self._filtered(lines)
            except BaseException as error:
                self._attempts.answered(status)
                body.close()
                return self._decided(self._told(error), is_filtered=True)
        if body.is_complete and (self._request.version != "2" or len(body.buffered) <= WHOLE_STREAM):
            self._record.bytes_out = len(body.buffered)
            self.finish(status)
            return Answer(status, response.reason, lines, body.buffered)
        self._attempts.answered(status)
        return Answer(status, response.reason, lines, ResponseStream(self, body, status))

    def _decided(self, decision: Answer | BalancerError, *, is_filtered: bool = False) -> Answer:
        """The balancer's own answer to a request that got none from a backend, with the lines that each answer gets; to
        one whose answer `is_filtered`, in vain, without those of filters."""
        record, reason, complete = self._record, None, True
        record.status = decision.status
        if isinstance(decision, BalancerError):
            record.error = str(decision)
            if isinstance(decision, Unavailable):
                record.excluded = dict(islice(decision.excluded.items(), EXPLAINED))
            reason, complete = decision.reason, not isinstance(decision, ClientGone)
            decision = refusal(decision, self._route.options.id, record.request_id)
        lines = [*self._route.response_heads.ruled(decision.lines), self._own]
        if self._route.answer and not is_filtered:
            try:
                lines = self._filtered(lines)
            except BaseException as error:
                return self._decided(self._told(error), is_filtered=True)
        self.finish(record.status, reason=reason, complete=complete)
        return decision._replace(lines=lines)

    def _filtered(self, lines: list[Line]) -> list[Line]:
        before = [*lines]
        for answer in self._route.answer:
            lines = [*answer(self._request, self._record, lines)]
        if not self._route.is_safe:
            check_filtered(lines, before)
        return lines

    def is_on(self, backend: Backend) -> bool:
        """It has a place there. Any thread may ask."""
        return Stage.BUILT <= self.stage < Stage.FINISHED and self._attempts.is_on(backend)

    def is_for(self, pool: BackendPool) -> bool:
        """It may still need a backend of this pool. Any thread may ask."""
        return self._route.pool is pool and self.stage < Stage.FINISHED

    # What a `ResponseStream` needs.

    def is_client_gone(self) -> bool:
        return self._request.client.is_gone

    def count_out(self, size: int) -> None:
        self._record.bytes_out += size
        self._attempts.alive()

    def finish(self, status: int, *, reason: str | None = None, complete: bool = True, failure: str = "") -> None:
        """Record the request and give the backend's place back, once.

        `status` is what the client sees; `failure` in words if the backend broke off its answer.
        """
        stage = self.stage
        if stage is Stage.FINISHED:
            return
        self.stage = Stage.FINISHED
        record = self._record
        record.status = status
        record.reason = reason
        record.complete = complete
        try:
            if stage >= Stage.BUILT:
                self._attempts.end(status, reason, failure)
            record.seconds = time.perf_counter() - self._started
        except BaseException:  # too late to answer anything else
            log.exception("the end of request %s failed", record.request_id)
        for done in self._route.done:  # each, whatever becomes of the others: it may have something to give back
            try:
                done(self._request, record)
            except BaseException:
                log.exception("the end of request %s failed", record.request_id)
        self._route.statistics.record(record)
