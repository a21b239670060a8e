"""One request on its way from client to backend and back: checked, built once, attempted, answered, recorded.

A small answer is counted before the client can see it; the `ResponseStream` of any other calls `finish` at its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from balancer.answer import Answer, ResponseStream, refusal, to_options
from balancer.attempts import Attempts, no_thread
from balancer.backends import EXPLAINED
from balancer.connection import has_left
from balancer.errors import (
    BalancerError,
    BodyTooLarge,
    ClientGone,
    MethodRefused,
    NoRoom,
    Unavailable,
    WorkerRefused,
)
from balancer.exchange import METHOD_KEPT, PATH_KEPT, Exchange
from balancer.messages import (
    REFUSED_METHODS,
    Line,
    check_target,
    count_down,
    max_forwards,
    narrowed,
    request_id,
    scope_of,
)
from balancer.outgoing import OutgoingRequest

if TYPE_CHECKING:
    from balancer.incoming import Incoming
    from balancer.proxy import ReverseProxy
    from balancer.response import BackendResponse
    from balancer.sent import Sent

log = logging.getLogger("balancer.proxy")

WHOLE_STREAM = 16384  # bytes of an answer that is handed over whole in HTTP/2, where a client may leave many unread
REPLAY_LIMIT = 65536  # bytes: a request body up to this size is read first, so that it can be sent again
INTERNAL_ERROR = "internal error, the log of the balancer has the cause"


class Forwarding:
    """One request on its way: what its attempts and its answer share. Used by one thread at a time.

    `run` does it all; `begin` may have done the first steps, and `refuse` ends it at any step before the answer.
    """

    __slots__ = (
        *("_proxy", "_options", "_incoming", "_started", "_own", "_record"),
        *("_attempts", "sent", "_failure", "_is_finished"),
    )

    def __init__(self, proxy: ReverseProxy, incoming: Incoming) -> None:
        self._proxy = proxy
        self._options = proxy.options
        self._incoming = incoming
        self._started = time.perf_counter()
        identifier = request_id(incoming.head.fields.get(b"x-request-id", ()))
        self._own: Line = (b"x-request-id", identifier)
        self._attempts: Attempts | None = None  # once the outgoing request is built
        self.sent: Sent | None = None
        self._failure: BalancerError | None = None
        self._is_finished = False
        self._record = Exchange(
            timestamp=time.time(),
            method=incoming.method[:METHOD_KEPT],
            path=incoming.path[:PATH_KEPT],
            request_id=identifier.decode("ascii"),
        )
        proxy.statistics.begin()

    def begin(self) -> bool:
        """The first attempt as far as it goes without waiting; True if its request is `sent`. `run` does the rest.

        For requests without a body, or with a small one that has come whole. Never raises.
        """
        return self._begin(may_connect=False)

    def connect(self) -> bool:
        """Go on after `begin` if a connection was all that was missing: open one and send. As `begin`, but may take as
        long as a connect does."""
        attempts = self._attempts
        return attempts is not None and attempts.lacks_connection and self._begin(may_connect=True)

    def _begin(self, may_connect: bool) -> bool:
        try:
            attempts = self._attempts
            if attempts is None:
                self._attempts = attempts = self._prepare()
            self.sent = attempts.begin(may_connect)
        except BalancerError as error:
            self._failure = error.to_keep()
        except Exception:
            log.exception("request %s failed", self._record.request_id)
            self._failure = BalancerError(INTERNAL_ERROR)
        return self.sent is not None

    def run(self) -> Answer:
        """Never raises."""
        try:
            attempts, sent = self._attempts, self.sent
            if attempts is not None and sent is not None and sent.is_answered:
                return self._answer(attempts.arrived(sent), attempts)
            # Seconds for a thread; `begin` did not have to wait for one.
            waited = time.perf_counter() - self._started if attempts is None else 0.0
            if waited > self._options.request_timeout:
                raise no_thread(self._options)
            if self._failure is not None:
                raise self._failure
            if attempts is None:
                self._attempts = attempts = self._prepare(waited)
            incoming = self._incoming
            if incoming.method == "OPTIONS" and max_forwards(incoming.values(b"max-forwards")) == 0:
                self.finish(200)
                return self._signed(to_options())
            return self._answer(attempts.exchange(sent), attempts)
        except BalancerError as error:
            return self._refuse(error.to_keep())
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

    def _prepare(self, waited: float = 0.0) -> Attempts:
        incoming, options = self._incoming, self._options
        method, head = incoming.method, incoming.head
        if method in REFUSED_METHODS:
            raise MethodRefused(f"{method} is not supported")
        check_target(method, incoming.target)
        if head.refusal is not None:
            raise head.refusal
        if head.is_worker_script and self._proxy.covers_control(scope_of(incoming.target)):
            raise WorkerRefused(
                "a service worker from here could take over the control API; "
                "serve its script from a folder of its own, or set control_port"
            )
        self._record.trace_id = head.trace_id
        if method == "OPTIONS":
            request = OutgoingRequest(method, incoming.target, [*count_down(head.lines), self._own])
        else:
            request = OutgoingRequest(method, incoming.target, (self._own,), head)
        request.watcher = incoming.client
        if incoming.length or incoming.is_ended:
            self._add_body(request)
        request.deadline = time.monotonic() + options.request_timeout - waited
        return Attempts(self._proxy, options, request, self._record, self._started)

    def _add_body(self, request: OutgoingRequest) -> None:
        incoming, limit = self._incoming, self._options.max_request_body
        length = incoming.content_length()
        if length is not None:
            if limit is not None and length > limit:
                raise BodyTooLarge(f"the request body has {length} bytes, at most {limit} are accepted")
            chunks = incoming.read(length, None)
            is_small = length <= REPLAY_LIMIT
            request.body = b"".join(chain.from_iterable(chunks)) if is_small else self._counted(chunks)
            request.content_length = length
            if is_small:
                self._record.bytes_in = length
        elif incoming.may_have_body():
            chunks = incoming.read(None, limit)
            first = next(chunks, None)  # none: there is no body after all
            request.body = self._counted(chain([first], chunks)) if first else None

    def _counted(self, chunks: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        for pieces in chunks:
            self._record.bytes_in += sum(map(len, pieces))
            yield pieces

    # The answer.

    def _answer(self, response: BackendResponse, attempts: Attempts) -> Answer:
        status, body = response.status_code, response.body
        lines = self._with_own(response.head.onward)
        if self._incoming.head.is_worker_script:
            lines = narrowed(lines, self._proxy.covers_control)
        if body.is_complete and (self._incoming.version != "2" or len(body.buffered) <= WHOLE_STREAM):
            data = body.read_chunk()
            self._record.bytes_out = len(data)
            self.finish(status)
            return Answer(status, response.reason, lines, data)
        attempts.answered(status)
        return Answer(status, response.reason, lines, ResponseStream(self, body, status))

    def _with_own(self, lines: Iterable[Line]) -> list[Line]:
        own = [*lines, self._own]
        if self._options.expose_backend and self._record.backend is not None:
            own.append((b"x-served-by", self._record.backend.encode("ascii")))
        return own

    def _refuse(self, error: BalancerError) -> Answer:
        """The balancer's own answer to a request that got none from a backend."""
        self._record.error = str(error)
        if isinstance(error, Unavailable):
            self._record.excluded = dict(islice(error.excluded.items(), EXPLAINED))
        self.finish(error.status, reason=error.reason, complete=not isinstance(error, ClientGone))
        return self._signed(refusal(error, self._options.balancer_id, self._record.request_id))

    def _signed(self, answer: Answer) -> Answer:
        """An answer of ours, with the lines that each one gets."""
        return answer._replace(lines=self._with_own(answer.lines))

    # What a `ResponseStream` needs.

    def is_client_gone(self) -> bool:
        return has_left(self._incoming.client)

    def count_out(self, size: int) -> None:
        self._record.bytes_out += size

    def finish(self, status: int, *, reason: str | None = None, complete: bool = True, failure: str = "") -> None:
        """Record the exchange and give the backend's place back, once.

        `status` is what the client sees; `failure` in words if the backend broke off its answer.
        """
        if self._is_finished:
            return
        self._is_finished = True
        record = self._record
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
            if self._attempts is not None:
                self._attempts.give_back(status, reason, failure)
