"""The request's way: a WSGI callable that leases a backend, sends, retries and streams.

In front of Flask (`app.wsgi_app = ReverseProxy(app.wsgi_app, ...)`): a control path goes on to Flask, everything else
to a backend without touching Flask. The outgoing request is built once; attempts loop around it. A small answer that
came whole is handed on whole, and is counted before the client can see it; anything else is streamed, and its
`ResponseStream` releases the lease, gives back or closes the connection, and records the exchange on every ending.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import TYPE_CHECKING, Any

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
from balancer.incoming import CLIENT, HEADER_LINES, content_length, header_lines, may_have_body, raw_target, read_body
from balancer.messages import (
    Line,
    Network,
    check_codings,
    check_request,
    count_down,
    max_forwards,
    request_id,
    request_lines,
    response_lines,
)
from balancer.pool import BackendPool, Lease
from balancer.response import BackendResponse, ResponseBody
from balancer.statistics import Attempt, Exchange, Statistics
from balancer.transport import BackendAdapter, OutgoingRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("balancer.proxy")

REPLAY_LIMIT = 65536  # bytes: a request body up to this size is read first, so that it can be sent again
# Full jitter before a retry, as Envoy has it: up to 25 ms, then up to 75 ms, never more than 250 ms.
BACKOFF_SECONDS = 0.025
MAX_BACKOFF_SECONDS = 0.25
EJECTING_STATUSES = frozenset({502, 503, 504})  # answers that say that the backend cannot work; passed on all the same
RETRY_AFTER_SECONDS = b"1"
ALLOWED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # in 405; others pass, CONNECT and TRACE do not


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What the data path needs of the settings; `settings.Settings` says what each one means."""

    balancer_id: str = "lb-1"
    pseudonym: bytes = b"lb-1"
    trusted: tuple[Network, ...] = ()
    expose_backend: bool = False
    max_header_count: int = 100
    max_request_body: int | None = None
    retries: int = 2
    retry_budget: float = 0.2
    retry_budget_minimum: int = 10
    request_timeout: float = 60.0


class ReverseProxy:
    """The WSGI callable. It has no state of its own; the pool, the adapter and the statistics each lock theirs.

    `options` may be replaced at any time: a request keeps those it began with.
    """

    def __init__(
        self,
        control_app: WSGIApplication,
        is_control: Callable[[str], bool],
        *,
        pool: BackendPool,
        adapter: BackendAdapter,
        statistics: Statistics,
        options: ProxyOptions,
        on_refused: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self._control_app = control_app
        self.is_control = is_control
        self.pool = pool
        self.adapter = adapter
        self.statistics = statistics
        self.options = options
        self.on_refused = on_refused
        self.rng = rng or random.Random()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self.is_control(environ["PATH_INFO"]):
            return self._control_app(environ, start_response)
        return Forwarding(self, environ, start_response).run()

    def refuse(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The answer to a request that no thread is free for; does not block."""
        return Forwarding(self, environ, start_response).refuse()


class Forwarding:
    """One request on its way: what its attempts and its answer share. Used by one thread, once."""

    __slots__ = (
        "_proxy",
        "_options",
        "_environ",
        "_start_response",
        "_lines",
        "_started",
        "_identifier",
        "_record",
        "_lease",
        "_is_finished",
    )

    def __init__(self, proxy: ReverseProxy, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self._proxy = proxy
        self._options = proxy.options
        self._environ = environ
        self._start_response = start_response
        self._lines = header_lines(environ)
        self._started = time.perf_counter()
        self._identifier = request_id(self._lines)
        self._lease: Lease | None = None
        self._is_finished = False
        self._record = Exchange(
            timestamp=time.time(),
            method=environ["REQUEST_METHOD"],
            path=environ["PATH_INFO"],
            request_id=self._identifier.decode("ascii"),
        )

    def run(self) -> Iterable[bytes]:
        self._proxy.statistics.begin()
        try:
            if self._record.method == "OPTIONS" and max_forwards(self._lines) == 0:
                return self._answer_options()
            return self._answer(self._send(self._build()))
        except BalancerError as error:
            return self._refuse(error)
        except Exception:  # ours, not the client's or a backend's: the log has the traceback, the client one line
            log.exception("request %s failed", self._record.request_id)
            return self._refuse(BalancerError("internal error, the log of the balancer has the cause"))

    def refuse(self) -> Iterable[bytes]:
        self._proxy.statistics.begin()
        if self._client_is_gone():
            return self._refuse(ClientGone("the client left while it waited for a thread"))
        return self._refuse(NoRoom("the load balancer is full, try again"))

    # The outgoing request, built once.

    def _build(self) -> OutgoingRequest:
        environ, options = self._environ, self._options
        method = self._record.method
        version = environ["SERVER_PROTOCOL"].removeprefix("HTTP/")
        target = raw_target(environ)
        if len(self._lines) > options.max_header_count:
            raise TooManyHeaders(f"{len(self._lines)} header lines, at most {options.max_header_count} are accepted")
        if method in ("CONNECT", "TRACE"):
            raise MethodRefused(f"{method} is not supported")
        check_request(method, target, [value for name, value in self._lines if name == b"host"], version)
        lines = request_lines(
            self._lines,
            peer=environ.get("REMOTE_ADDR") or "unknown",
            scheme=environ["wsgi.url_scheme"],
            http_version=version,
            pseudonym=options.pseudonym,
            identifier=self._identifier,
            trusted=options.trusted,
        )
        if method == "OPTIONS":
            lines = count_down(lines)
        request = OutgoingRequest(method, target, lines)
        request.watcher = environ.get(CLIENT)
        self._add_body(request)
        request.deadline = time.monotonic() + options.request_timeout
        return request

    def _add_body(self, request: OutgoingRequest) -> None:
        environ, limit = self._environ, self._options.max_request_body
        check_codings(self._lines)
        length = content_length(environ, self._lines)
        if length is not None:
            if limit is not None and length > limit:
                raise BodyTooLarge(f"the request body has {length} bytes, at most {limit} are accepted")
            chunks = read_body(environ["wsgi.input"], length, None)
            request.body = b"".join(chunks) if length <= REPLAY_LIMIT else self._counted(chunks)
            request.content_length = length
            if length <= REPLAY_LIMIT:
                self._record.bytes_in = length
        elif environ.get("wsgi.input_terminated") and may_have_body(environ, self._lines):
            chunks = read_body(environ["wsgi.input"], None, limit)
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
        started = time.perf_counter()
        try:
            lease = self._proxy.pool.lease(request, tried, watcher=request.watcher, deadline=request.deadline)
        except Unavailable as unavailable:
            record.queued += time.perf_counter() - started
            if self._client_is_gone():
                raise ClientGone("the client left while it waited for a backend") from None
            if failure is not None:  # what went wrong says more than that nobody else is left
                record.not_retried = str(unavailable)
                raise failure from None
            raise
        record.queued += lease.queued
        if failure is not None and not self._proxy.statistics.may_retry(
            options.retry_budget, options.retry_budget_minimum
        ):
            lease.release()
            record.not_retried = "the retry budget is used up"
            raise failure
        self._lease = lease
        record.backend = lease.backend.id

    def _attempt(self, request: OutgoingRequest) -> BackendResponse:
        lease = self._lease
        assert lease is not None
        started = time.perf_counter()
        attempt = Attempt(lease.choice)
        self._record.attempts.append(attempt)
        try:
            response = self._proxy.adapter.exchange(request, lease.choice.origin)
        except Unavailable:
            lease.release()
            raise
        except (ClientError, ClientGone) as error:  # while the body was streamed; `finish` gives the place back
            attempt.outcome, attempt.error = error.reason, str(error)
            raise
        except BackendError as error:
            if self._client_is_gone():
                raise ClientGone("the client left while the backend was working") from None
            attempt.outcome, attempt.error = error.reason, str(error)
            self._blame(lease, error)
            raise
        else:
            attempt.outcome = str(response.status_code)
            return response
        finally:
            attempt.seconds = time.perf_counter() - started
            attempt.connect = request.connect_seconds

    def _blame(self, lease: Lease, error: BackendError) -> None:
        if isinstance(error, ConnectFailed) and error.refused:
            self._proxy.pool.record_refused(lease.backend, str(error))
            self._proxy.on_refused()
        lease.release(failure="" if getattr(error, "stale", False) else str(error))

    def _client_is_gone(self) -> bool:
        client = self._environ.get(CLIENT)
        return client is not None and client.is_gone

    # The answer.

    def _answer(self, response: BackendResponse) -> Iterable[bytes]:
        status, body = response.status_code, response.body
        lines = response_lines(response.lines, status, response.options)
        if body.is_complete:
            data = body.read_chunk()
            self._record.bytes_out = len(data)
            self.finish(status)
            self._start(f"{status} {response.reason}", lines)
            return [data]
        if self._lease is not None:
            self._lease.answered(self._record.attempts[-1].seconds)
        try:
            self._start(f"{status} {response.reason}", lines)
        except BaseException:  # the server refuses a header line
            body.close()
            raise
        return ResponseStream(self, body, status)

    def _answer_options(self) -> Iterable[bytes]:
        """The end of the way for an OPTIONS that may be forwarded no further (RFC 9110 section 7.6.2)."""
        self.finish(200)
        self._start("200 OK", [(b"allow", ALLOWED_METHODS), (b"content-length", b"0")])
        return [b""]

    def _start(self, status: str, lines: list[Line]) -> None:
        """`start_response` with our own lines added; our own server takes bytes, PEP 3333 wants text."""
        lines.append((b"x-request-id", self._identifier))
        if self._options.expose_backend and self._record.backend is not None:
            lines.append((b"x-served-by", self._record.backend.encode("ascii")))
        headers: Any = lines
        if HEADER_LINES not in self._environ:
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in lines]
        self._start_response(status, headers)

    def _refuse(self, error: BalancerError) -> Iterable[bytes]:
        """The balancer's own answer to a request that got none from a backend."""
        self.finish(error.status, reason=error.reason, complete=not isinstance(error, ClientGone))
        status = (
            HTTPStatus.BAD_REQUEST if isinstance(error, ClientGone) else HTTPStatus(error.status)
        )  # nobody reads it
        body = json.dumps(
            {
                "error": error.public or str(error),
                "load_balancer_id": self._options.balancer_id,
                "request_id": self._record.request_id,
            }
        ).encode()
        lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if isinstance(error, Unavailable):
            lines.append((b"retry-after", RETRY_AFTER_SECONDS))
        if isinstance(error, MethodRefused):
            lines.append((b"allow", ALLOWED_METHODS))
        self._start(f"{status.value} {status.phrase}", lines)
        return [body]

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
        self._proxy.statistics.record(record)
        if lease is None:
            return
        if failure or status in EJECTING_STATUSES:
            lease.release(failure=failure or f"answered {status}")
        else:
            lease.release(record.attempts[-1].seconds if reason is None else None)


class ResponseStream:
    """A response body on its way to the client, as WSGI wants it: iterate, then `close` whatever happened."""

    __slots__ = ("_forwarding", "_body", "_status", "_is_flushed", "_is_finished")

    def __init__(self, forwarding: Forwarding, body: ResponseBody, status: int) -> None:
        self._forwarding = forwarding
        self._body = body
        self._status = status
        self._is_flushed = bool(body.buffered)
        self._is_finished = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._is_flushed:  # our server sends the head when it sees this; any other server does nothing
            self._is_flushed = True
            return b""
        if self._is_finished:
            raise StopIteration
        try:
            chunk = self._body.read_chunk()
        except BackendError as error:
            if self._forwarding._client_is_gone():
                self.close()
            else:
                self._finish(error.reason, complete=False, failure=str(error))
            raise
        self._forwarding.count_out(len(chunk))
        if self._body.is_complete:  # counted before the client can see the end
            self._finish()
        return chunk

    def close(self) -> None:
        """Idempotent. Before the end it means that the client left: the backend connection is closed at once."""
        if not self._is_finished:
            self._status = ClientGone.status
            self._finish(ClientGone.reason, complete=False)

    def _finish(self, reason: str | None = None, *, complete: bool = True, failure: str = "") -> None:
        self._is_finished = True
        self._body.close()
        self._forwarding.finish(self._status, reason=reason, complete=complete, failure=failure)
