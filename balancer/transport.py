"""The way to the backends: a `requests` Transport Adapter made for a reverse proxy.

It keeps the contract of `requests` (PreparedRequest in, Response out, its exceptions) and leaves out what a session
adds and a proxy must not have: a cookie jar shared by all clients, proxies and .netrc from the environment, redirects,
rewritten paths, decompression. Header lines go out and come back in order and byte for byte.

Connections are kept alive per backend and reused last in, first out. Before reuse a socket is checked for EOF; one
that has been idle longer than `pool_idle_timeout` is closed (keep that below the backend's own keep-alive time-out).
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock

from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter

from balancer.connection import DONTWAIT, Connection, has_left
from balancer.errors import (
    BackendError,
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    OutOfDescriptors,
    ResponseTimedOut,
)
from balancer.heads import parse_plain
from balancer.origin import Origin
from balancer.outgoing import OutgoingRequest
from balancer.response import (
    BackendResponse,
    ResponseBody,
    ResponseHead,
    WholeBody,
    lost,
    receive_head,
    take_head_data,
)

_HAS_SENDMSG = hasattr(socket.socket, "sendmsg")  # Windows has none
MAX_IDLE_PER_BACKEND = 1024  # idle sockets kept; above that they are closed after use
SMALL_BODY = 131072  # bytes of an answer that is passed on in one piece if all of it is here


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `response` is until the response head is complete, `idle` between two pieces of either body."""

    connect: float = 3.0
    response: float = 30.0
    idle: float = 60.0


class Sent:
    """A request that is on its way, and what has come back so far."""

    __slots__ = ("connection", "request", "_head", "deadline", "rest", "is_whole", "is_clean", "response", "failure")

    def __init__(self, connection: Connection, request: OutgoingRequest, deadline: float) -> None:
        self.connection = connection
        self.request = request
        self._head: ResponseHead | None = None
        self.deadline = deadline  # of time.monotonic(), for the response head
        self.rest = b""  # what is still to be sent
        self.is_whole = False  # all of the request was sent
        self.is_clean = True  # nothing followed the response
        self.response: BackendResponse | None = None
        self.failure: BackendError | None = None

    @property
    def is_answered(self) -> bool:
        """The response head is here, maybe more, and nothing has gone wrong."""
        return self.response is not None and self.failure is None

    @property
    def head(self) -> ResponseHead:
        """As far as it is here. Most responses never need one."""
        if self._head is None:
            self._head = ResponseHead()
        return self._head

    def write(self, head: bytes) -> None:
        """Send the request, which begins with `head`.

        If a streamed body is refused before its end (413, 401), stop. A broken pipe is not final: the answer may be
        here already.
        """
        request = self.request
        if request.body is None:
            self.is_whole = self._write(head)
        elif isinstance(request.body, bytes):
            self.is_whole = self._write(head, request.body)
        else:
            self.is_whole = self._write(head) and self._write_stream(request.body, request.content_length is None)

    def write_now(self, data: bytes) -> None:
        """Send as much of the request as goes without waiting, and leave the `rest`."""
        try:
            size = self.connection.sock.send(data, DONTWAIT)
        except BlockingIOError:
            size = 0
        except OSError:
            return  # as in `_write`
        self.rest = data[size:]
        self.is_whole = not self.rest

    def write_rest(self) -> None:
        rest, self.rest = self.rest, b""
        self.is_whole = self._write(rest)

    def expire(self) -> None:
        """The response head has not come in time."""
        self.failure = ResponseTimedOut(f"{self.connection.origin.url} sent no complete response head in time")

    def close(self) -> None:
        """The connection is of no use to anybody any more."""
        if self.request.watcher is not None:
            self.request.watcher.detach()
        self.connection.close()

    def _write(self, *parts: bytes) -> bool:
        connection, done = self.connection, 0
        try:
            if len(parts) > 1 and _HAS_SENDMSG and not connection.is_tls:
                done = connection.sock.sendmsg(parts)  # not one by one: the backend would wake up for each
                if done == sum(map(len, parts)):
                    return True
            connection.sock.sendall(parts[0] if len(parts) == 1 else b"".join(parts)[done:])
        except (TimeoutError, BlockingIOError):
            raise ResponseTimedOut(f"{self.connection.origin.url} stopped reading the request") from None
        except OSError:
            return False
        return True

    def _write_stream(self, chunks: Iterator[bytes | list[bytes]], chunked: bool) -> bool:
        for chunk in chunks:
            pieces = chunk if isinstance(chunk, list) else [chunk]
            if chunked and (size := sum(map(len, pieces))):
                pieces = [b"%x\r\n" % size, *pieces, b"\r\n"]
            if not self._write(*pieces):
                return False
            if not self.head.has_head and self._is_refused():
                return False
        return self._write(b"0\r\n\r\n") if chunked else True

    def _is_refused(self) -> bool:
        """True if the backend hung up or answered early; an interim response and a success are no reason to stop."""
        if not self.connection.has_input():  # cheaper than to try
            return False
        data = self.connection.receive_now()
        if data is None:
            return False
        self.head.size += len(data)
        if data and not self.head.feed(data):
            self.is_clean = False
        return not data or self.head.status >= 300


class BackendAdapter(BaseAdapter):
    """Sends requests to backends over pooled connections. Thread-safe.

    `_lock` guards `_idle`: per origin, the idle connections, the newest last. Sockets are opened, checked and closed
    outside it. `timeouts` and `pool_idle_timeout` may be replaced at any time.
    """

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        *,
        pool_idle_timeout: float = 4.0,
        max_idle: int = MAX_IDLE_PER_BACKEND,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.timeouts = timeouts or Timeouts()
        self.pool_idle_timeout = pool_idle_timeout
        self._max_idle = max_idle
        self._tls = tls
        self._clock = clock
        self._lock = Lock()
        self._idle: dict[Origin, deque[Connection]] = {}

    def send(
        self,
        request: PreparedRequest,
        stream: bool = True,
        timeout: None | float | tuple[float, float] | tuple[float, None] = None,
        verify: bool | str = True,
        cert: None | bytes | str | tuple[bytes | str, bytes | str] = None,
        proxies: Mapping[str, str] | None = None,
    ) -> Response:
        """The interface of `requests`. The body is always streamed; verification is set by the TLS context."""
        scheme = str(request.url).partition("://")[0]
        return self.exchange(as_outgoing(request), Origin.parse(f"{scheme}://{_netloc(request)}"))

    def exchange(self, request: OutgoingRequest, origin: Origin, sent: Sent | None = None) -> BackendResponse:
        """Send `request` to `origin`, unless `begin` has, and return when the response head is here.

        Raises ConnectFailed and ConnectTimedOut (nothing was sent), ConnectionLost, ResponseTimedOut, InvalidResponse;
        whatever the request's body iterator raises comes through. A reused connection that died before any byte of a
        response gets one more try on a fresh one, for idempotent methods with a replayable body only.
        """
        request.is_resent = False
        if sent is None:
            request.connect_seconds = None
            sent = self._send(self._take(origin) or self._connect(origin, request), request)
        try:
            return self._receive(sent)
        except ConnectionLost as error:
            if not (error.stale and request.is_retriable) or has_left(request.watcher):
                raise
        request.is_resent = True
        return self._receive(self._send(self._connect(origin, request), request))

    def begin(self, request: OutgoingRequest, origin: Origin, may_connect: bool = False) -> Sent | None:
        """Send a request that is here whole on a kept connection or, if it `may_connect`, on a new one, as far as that
        needs no further waiting. None if neither will do. Raises as `exchange` until it is sent."""
        if origin.scheme != "http":
            return None
        connection = self._take(origin)
        if connection is None:
            if not may_connect:
                return None
            connection = self._connect(origin, request)
        return self._send(connection, request, is_patient=False)

    def look(self, sent: Sent) -> bool:
        """Take in what has come, without waiting. True if that is the whole response; `exchange` then returns it at
        once, or waits for the rest, or raises what went wrong."""
        try:
            data = self._receive_now(sent)
            if data is None:
                return False
            sent.response = self._whole(sent, data)
            return sent.response is not None or self._look_closer(sent, data)
        except BackendError as error:
            sent.failure = error
            return False

    def _receive_now(self, sent: Sent) -> bytes | None:
        try:
            return sent.connection.receive_now()
        except ConnectionLost as error:
            raise lost(sent.connection, sent.head, str(error)) from error

    def _whole(self, sent: Sent, data: bytes) -> BackendResponse | None:
        """The response, if it has the usual shape and `data` is all of it: by far the most are so."""
        plain, request = parse_plain(data), sent.request
        if plain is None or plain.whole != len(data) or request.method == "HEAD" or not sent.is_whole or sent._head:
            return None
        if request.watcher is not None:
            request.watcher.detach()
        self.give_back(sent.connection)
        return BackendResponse(plain, WholeBody(data[plain.size :]), request)

    def _look_closer(self, sent: Sent, data: bytes) -> bool:
        sent.is_clean = take_head_data(sent.connection, sent.head, data)
        if not sent.head.has_head:
            return False
        sent.response = self._respond(sent)
        body = sent.response.body
        assert isinstance(body, ResponseBody)
        if not body.is_complete:
            body.take_in(SMALL_BODY)
            if body.is_complete:
                body.close()
        return body.is_complete

    def _send(self, connection: Connection, request: OutgoingRequest, is_patient: bool = True) -> Sent:
        """Send the request; if not `is_patient`, what goes without waiting."""
        timeouts, now = self.timeouts, time.monotonic()
        if request.is_replayable:
            sent = Sent(connection, request, min(now + timeouts.response, request.deadline))
            seconds = timeouts.response
        else:  # a streamed body may take as long as it needs to come; there is only one attempt with it anyway
            sent = Sent(connection, request, now + timeouts.response)
            seconds = timeouts.idle
        if request.watcher is not None:
            request.watcher.attach(connection)
        try:
            connection.set_timeout(seconds)
            head = request.head()
            if is_patient:
                sent.write(head)
            else:
                sent.write_now(head + request.body if request.body else head)
        except BaseException:
            sent.close()
            raise
        return sent

    def _receive(self, sent: Sent) -> BackendResponse:
        try:
            if sent.failure is not None:
                raise sent.failure
            if sent.rest:
                sent.write_rest()
            if sent.response is None:
                clean = receive_head(sent.connection, sent.head, self._seconds_left(sent))
                sent.is_clean = sent.is_clean and clean
                sent.response = self._respond(sent)
        except BaseException:
            sent.close()
            raise
        return sent.response

    def _respond(self, sent: Sent) -> BackendResponse:
        """The head is here. Gives the connection back at once if the body is here too."""
        request, connection = sent.request, sent.connection
        body = ResponseBody(
            connection,
            sent.head,
            is_head_request=request.method == "HEAD",
            give_back=self.give_back,
            watcher=request.watcher,
        )
        if not (sent.is_whole and sent.is_clean):
            body.refuse_reuse()
        if body.is_complete:
            body.close()
        else:
            connection.set_timeout(self.timeouts.idle)
        return BackendResponse(sent.head, body, request)

    def _seconds_left(self, sent: Sent) -> float:
        """For the rest of the response head. A streamed body took its own time to be sent."""
        if not sent.request.is_replayable:
            return self.timeouts.response
        return max(0.001, sent.deadline - time.monotonic())

    def _connect(self, origin: Origin, request: OutgoingRequest) -> Connection:
        started = time.monotonic()
        try:
            return self._open(origin, max(0.001, min(self.timeouts.connect, request.deadline - started)))
        finally:
            request.connect_seconds = time.monotonic() - started

    def _open(self, origin: Origin, seconds: float) -> Connection:
        try:
            sock = socket.create_connection((origin.host, origin.port), seconds)
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url} did not accept within {seconds:.3g} s") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfDescriptors("the load balancer may open no more connections, raise its file limit") from None
            refused = isinstance(error, ConnectionRefusedError)
            raise ConnectFailed(f"{origin.url}: {error.strerror or error}", refused=refused) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "https":
                sock = self._wrap(sock, origin, seconds)
            else:
                sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return Connection(sock, origin)

    def _wrap(self, sock: socket.socket, origin: Origin, seconds: float) -> ssl.SSLSocket:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            return self._tls.wrap_socket(sock, server_hostname=origin.host)
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url}: no TLS handshake within {seconds:.3g} s") from None
        except (OSError, ValueError) as error:
            raise ConnectFailed(f"{origin.url}: TLS: {error}") from error

    # The pool.

    def _take(self, origin: Origin) -> Connection | None:
        """The most recently used idle connection that is still good; closes those that are not."""
        oldest = self._clock() - self.pool_idle_timeout
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                connection = idle.pop()
            if connection.idle_since >= oldest and not connection.has_input():
                connection.is_reused = True
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose last response was read to its end."""
        connection.idle_since = self._clock()
        with self._lock:
            idle = self._idle.get(connection.origin)
            if idle is None:
                idle = self._idle[connection.origin] = deque()
            kept = len(idle) < self._max_idle
            if kept:
                idle.append(connection)
        if not kept:
            connection.close()

    def idle(self) -> dict[str, int]:
        """Kept connections per URL of an origin."""
        with self._lock:
            return {origin.url: len(idle) for origin, idle in self._idle.items()}

    def close_idle(self) -> None:
        """Close what has been idle too long."""
        oldest = self._clock() - self.pool_idle_timeout
        expired: list[Connection] = []
        with self._lock:
            for origin, idle in list(self._idle.items()):
                while idle and idle[0].idle_since < oldest:
                    expired.append(idle.popleft())
                if not idle:
                    del self._idle[origin]
        for connection in expired:
            connection.close()

    def close(self) -> None:
        """Close all idle connections; those in use are closed by their owners."""
        with self._lock:
            pools, self._idle = self._idle, {}
        for idle in pools.values():
            for connection in idle:
                connection.close()


def _netloc(request: PreparedRequest) -> str:
    return str(request.url).partition("://")[2].partition("/")[0]


def as_outgoing(request: PreparedRequest) -> OutgoingRequest:
    """An OutgoingRequest from any PreparedRequest, so that the adapter can be mounted in a requests.Session."""
    if isinstance(request, OutgoingRequest):
        return request
    skipped = {"content-length", "transfer-encoding"}
    lines = [
        (name.lower().encode("latin-1"), value if isinstance(value, bytes) else str(value).encode("latin-1"))
        for name, value in request.headers.items()
        if name.lower() not in skipped
    ]
    if not any(name == b"host" for name, _ in lines):
        lines.insert(0, (b"host", _netloc(request).encode("idna")))
    outgoing = OutgoingRequest(str(request.method), request.path_url.encode("ascii"), lines)
    outgoing.url = request.url
    body = request.body
    if body is None or isinstance(body, bytes):
        outgoing.body = body
    else:
        outgoing.body = body.encode() if isinstance(body, str) else iter(body)
    return outgoing
