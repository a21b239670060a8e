"""One request on its way from client to backend and back: checked, built once, attempted, answered, recorded.

A small answer is counted before the client can see it; the `ResponseStream` of any other calls `finish` at its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from balancer.balancing.backends import EXPLAINED
from balancer.errors import (
    BackendError,
    BalancerError,
    BodyTooLarge,
    ClientGone,
    NoRoom,
    Unavailable,
    WorkerRefused,
)
from balancer.forwarding.answer import Answer, ResponseStream, refusal, to_options
from balancer.forwarding.attempts import Attempts, no_thread
from balancer.forwarding.route import REPLAY_LIMIT, Route
from balancer.forwarding.stage import Stage
from balancer.observe.record import METHOD_KEPT, PATH_KEPT, Record
from balancer.protocol.messages import (
    Line,
    count_down,
    narrowed,
    scope_of,
)
from balancer.upstream.outgoing import OutgoingRequest

if TYPE_CHECKING:
    from balancer.protocol.incoming import Incoming
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

    __slots__ = (
        *("_route", "_options", "_incoming", "_started", "_own", "_record"),
        *("stage", "_attempts", "sent", "_decision"),
    )

    def __init__(self, route: Route, incoming: Incoming) -> None:
        self._route = route
        self._options = route.options
        self._incoming = incoming
        self._started = time.perf_counter()
        self._own: Line = (b"x-request-id", incoming.id)
        self._record = Record(
            timestamp=time.time(),
            method=incoming.method[:METHOD_KEPT],
            path=incoming.path[:PATH_KEPT],
            request_id=incoming.id.decode("ascii"),
        )
        self.stage = Stage.FOUND
        self._attempts: Attempts  # from BUILT on
        self.sent: Sent | None = None  # by `start`
        self._decision: Answer | BalancerError | None = None  # of our own, without a backend's answer
        route.statistics.begin()

    def run(self) -> Answer:
        """The whole way: admit, build, lease, send, receive, answer. Waits where it has to. Never raises."""
        try:
            if self.sent is not None and self.sent.response is not None:
                return self._answer(self.sent.response)
            # Seconds for a thread; what is built already did not have to wait for one.
            waited = time.perf_counter() - self._started if self.stage < Stage.BUILT else 0.0
            if waited > self._options.request_timeout:
                raise no_thread(self._options)
            if self._decision is None and self.stage < Stage.ADMITTED:
                self._admit()
            if self._decision is None and self.stage < Stage.BUILT:
                self._build(waited)
            if self._decision is not None:
                return self._decided(self._decision)
            return self._answer(self._attempts.run(self.stage, self.sent))
        except BalancerError as error:
            return self._decided(error.to_keep())
        except Exception:  # ours, not the client's or a backend's: the log has the traceback, the client one line
            log.exception("request %s failed", self._record.request_id)
            return self._decided(BalancerError(INTERNAL_ERROR))

    def start(self, *, may_connect: bool = False) -> bool:
        """The steps of `run` as far as they need no waiting; True if the request is SENT. Never raises.

        For requests without a body, or with a small one that has come whole. Once LEASED it `may_connect`, and take as
        long as a connect does.
        """
        try:
            if not may_connect:
                self._admit()
                self._build()
                if self._decision is not None or not self._attempts.lease_now():
                    return False
                self.stage = Stage.LEASED
            self.sent = self._attempts.send_now(may_connect)
            if self.sent is not None:
                self.stage = Stage.SENT
                return True
        except BackendError:
            self.stage = Stage.FAILED
        except BalancerError as error:
            self._decision = error.to_keep()
        except Exception:
            log.exception("request %s failed", self._record.request_id)
            self._decision = BalancerError(INTERNAL_ERROR)
        return False

    def connect(self) -> bool:
        """As `start`, after it, if a connection was all that was missing."""
        return self.stage is Stage.LEASED and self._decision is None and self.start(may_connect=True)

    def refuse(self) -> Answer:
        """The answer when no thread is free for the request; does not block."""
        if self.sent is not None:
            self.sent.close()
        else:
            self._record.backend = None  # nothing reached it
        if self.is_client_gone():
            return self._decided(ClientGone("the client left while it waited for a thread"))
        return self._decided(NoRoom("the load balancer is full, try again"))

    # Its steps.

    def _admit(self) -> None:
        """By its head alone: no body is read for what is refused here. Raises ClientError."""
        incoming = self._incoming
        head = incoming.head
        if incoming.refusal is not None:
            raise incoming.refusal
        if head.is_worker_script and self._route.covers_control(scope_of(incoming.target)):
            raise WorkerRefused(
                "a service worker from here could take over the control API; "
                "serve its script from a folder of its own, or set control_port"
            )
        self._record.trace_id = head.trace_id
        self.stage = Stage.ADMITTED

    def _build(self, waited: float = 0.0) -> None:
        """The request for a backend. Reads a small body; `waited` are seconds for a thread. Raises as the body does."""
        incoming = self._incoming
        if incoming.method == "OPTIONS":
            lines = count_down(incoming.head.lines)
            if lines is None:
                self._decision = to_options()
                return
            request = OutgoingRequest("OPTIONS", incoming.target, [*lines, self._own])
        else:
            request = OutgoingRequest(incoming.method, incoming.target, (self._own,), incoming.head)
        request.client = incoming.client
        if not incoming.head.is_bodiless:
            self._add_body(request)
        request.deadline = time.monotonic() + self._options.request_timeout - waited
        self._attempts = Attempts(self._route, request, self._record, self._started)
        self.stage = Stage.BUILT

    def _add_body(self, request: OutgoingRequest) -> None:
        incoming, limit = self._incoming, self._options.max_request_body
        length = incoming.head.length
        if length is not None:
            if limit is not None and length > limit:
                raise BodyTooLarge(f"the request body has {length} bytes, at most {limit} are accepted")
            chunks = incoming.read(length, None)
            if length <= REPLAY_LIMIT:
                request.set_body(b"".join(chain.from_iterable(chunks)))
                self._record.bytes_in = length
            else:
                request.set_body(self._counted(chunks), length)
        elif incoming.is_ended:
            chunks = incoming.read(None, limit)
            first = next(chunks, None)  # none: there is no body after all
            if first:
                request.set_body(self._counted(chain([first], chunks)))

    def _counted(self, chunks: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        for pieces in chunks:
            self._record.bytes_in += sum(map(len, pieces))
            yield pieces

    # The answer.

    def _answer(self, response: BackendResponse) -> Answer:
        status, body = response.status_code, response.body
        lines = self._with_own(response.head.for_client)
        if self._incoming.head.is_worker_script:
            lines = narrowed(lines, self._route.covers_control)
        if body.is_complete and (self._incoming.version != "2" or len(body.buffered) <= WHOLE_STREAM):
            self._record.bytes_out = len(body.buffered)
            self.finish(status)
            return Answer(status, response.reason, lines, body.buffered)
        self._attempts.answered(status)
        return Answer(status, response.reason, lines, ResponseStream(self, body, status))

    def _with_own(self, lines: Iterable[Line]) -> list[Line]:
        own = [*lines, self._own]
        if self._options.expose_backend and self._record.backend is not None:
            own.append((b"x-served-by", self._record.backend.encode("ascii")))
        return own

    def _decided(self, decision: Answer | BalancerError) -> Answer:
        """The balancer's own answer to a request that got none from a backend, with the lines that each answer gets."""
        if isinstance(decision, BalancerError):
            self._record.error = str(decision)
            if isinstance(decision, Unavailable):
                self._record.excluded = dict(islice(decision.excluded.items(), EXPLAINED))
            self.finish(decision.status, reason=decision.reason, complete=not isinstance(decision, ClientGone))
            decision = refusal(decision, self._options.balancer_id, self._record.request_id)
        else:
            self.finish(decision.status)
        return decision._replace(lines=self._with_own(decision.lines))

    # What a `ResponseStream` needs.

    def is_client_gone(self) -> bool:
        return self._incoming.client.is_gone

    def count_out(self, size: int) -> None:
        self._record.bytes_out += size

    def finish(self, status: int, *, reason: str | None = None, complete: bool = True, failure: str = "") -> None:
        """Record the request and give the backend's place back, once.

        `status` is what the client sees; `failure` in words if the backend broke off its answer.
        """
        if self.stage is Stage.FINISHED:
            return
        stage, self.stage = self.stage, Stage.FINISHED
        record = self._record
        record.status = status
        record.reason = reason
        record.complete = complete
        try:
            if stage >= Stage.BUILT:
                self._attempts.end(status, reason, failure)
        finally:
            record.seconds = time.perf_counter() - self._started
            self._route.statistics.record(record)
            access_log = self._route.access_log
            if access_log.is_on:
                access_log.add(record, self._incoming)
