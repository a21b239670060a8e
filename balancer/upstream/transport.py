"""The way to the backends: a `requests` Transport Adapter made for a reverse proxy.

It keeps the contract of `requests` (PreparedRequest in, Response out, its exceptions) and leaves out what a session
adds and a proxy must not have: a cookie jar shared by all clients, proxies and .netrc from the environment, redirects,
rewritten paths, decompression. Header lines go out and come back in order and byte for byte.

Connections are kept alive per backend and reused last in, first out. Before reuse the kernel is asked whether a socket
has ended, unless it is watched and the request could be sent once more; one that has been idle longer than
`pool_idle_timeout` is closed. A request that cannot be repeated gets only one on which the backend's own time-out
cannot be near (`servers`), since it would be lost with it. A connection that was logged in
(RFC 4559) is never kept: whoever came next would be served as whoever did so.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter

from balancer.errors import BackendError, ConnectionLost
from balancer.protocol.origin import Origin
from balancer.protocol.responseheads import ResponseHeads
from balancer.upstream.connection import FIRST, Connection
from balancer.upstream.dialer import Dialer, name_for
from balancer.upstream.handshake import Handshake
from balancer.upstream.outgoing import OutgoingRequest, as_outgoing, origin_of
from balancer.upstream.response import BackendResponse, Body, ResponseBody
from balancer.upstream.sent import Sent
from balancer.upstream.servers import Servers

MAX_IDLE_PER_BACKEND = 1024  # idle sockets kept; above that they are closed after use
CHECKS_IDLE_TIMEOUT = 60.0  # seconds for which a connection is kept on which a backend is checked now and then
SMALL_BODY = 131072  # bytes of an answer that is passed on in one piece if all of it is here


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, by the names of the settings."""

    connect_timeout: float
    response_timeout: float
    idle_timeout: float
    pool_idle_timeout: float


class BackendAdapter(BaseAdapter):
    """Sends requests to backends over pooled connections. Thread-safe.

    `server_name` is what backends are called over TLS, None for the host of each.

    `_lock` guards `_idle`: per origin, the idle connections, the newest last. Sockets are opened, checked and closed
    outside it. `use` may be called at any time. What `with_timeouts` makes shares the connections of `_first`.
    """

    def __init__(
        self,
        timeouts: Timeouts,
        *,
        max_idle: int = MAX_IDLE_PER_BACKEND,
        dialer: Dialer | None = None,
        server_name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.timeouts = timeouts
        self._max_idle = max_idle
        self._dialer = dialer or Dialer()
        self.server_name = server_name
        self._servers = Servers()
        self._clock = clock
        self._heads = ResponseHeads()
        self._first = self
        self._lock = Lock()
        self._idle: defaultdict[Origin, deque[Connection]] = defaultdict(deque)

    def for_checks(self, seconds: float, keeps: bool) -> BackendAdapter:
        """Another one, that waits no longer than this, and keeps no connection, or one to each backend."""
        timeouts = Timeouts(seconds, seconds, seconds, pool_idle_timeout=CHECKS_IDLE_TIMEOUT if keeps else 0)
        return BackendAdapter(timeouts, max_idle=int(keeps), dialer=self._dialer, server_name=self.server_name)

    def with_timeouts(self, timeouts: Timeouts) -> BackendAdapter:
        """The same one, for requests that wait for as long as this: they share its connections."""
        made = copy.copy(self)
        made.timeouts = timeouts
        return made

    def note_old(self, origin: Origin) -> None:
        """A check was answered in HTTP/1.0. One in HTTP/1.1 proves less: another part of the server may answer it."""
        self._servers.at(origin).is_old = True

    def use(self, timeouts: Timeouts, server_name: str | None) -> None:
        """From the next wait and the next connection on; those with another server name are not kept."""
        self.timeouts = timeouts
        if server_name != self.server_name:
            self.server_name = server_name
            self.close()

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
        return self.exchange(as_outgoing(request), origin_of(request))

    def exchange(self, request: OutgoingRequest, origin: Origin, sent: Sent | None = None) -> BackendResponse:
        """Send `request` to `origin`, unless `send_now` has, and return when the response head is here.

        Raises ConnectFailed, ConnectTimedOut, LengthRequired (nothing was sent), ConnectionLost, ResponseTimedOut,
        InvalidResponse; whatever the request's body iterator raises comes through. A reused connection that died before
        any byte of a response gets one more try on a fresh one, for idempotent methods with a replayable body only.
        """
        request.is_resent = False
        if sent is None:
            request.connect_seconds = None
            if request.is_chunked and self._servers.at(origin).is_old:
                request.collect(origin.url)
            if request.lacks_host:
                request.set_host(origin.authority)
            sent = self._send(self._take(origin, request) or self._connect(origin, request), request)
        try:
            return self._receive(sent)
        except ConnectionLost as error:
            if not (error.stale and request.is_retriable) or request.client.is_gone:
                raise
        request.is_resent = True
        return self._receive(self._send(self._connect(origin, request), request))

    def send_now(
        self, request: OutgoingRequest, origin: Origin, may_connect: bool = False, opened: Connection | None = None
    ) -> Sent | None:
        """Send a replayable request on the connection that was `opened` for it, a kept one or, if it `may_connect`, a
        new one, as far as that needs no further waiting. None if none will do. Raises as `exchange` until it is
        sent."""
        if origin.scheme == "https" or request.is_special:
            return None
        connection = opened or self._take(origin, request)
        if connection is None:
            if not may_connect:
                return None
            connection = self._connect(origin, request)
        request.client.attach(connection)
        deadline = min(time.monotonic() + self.timeouts.response_timeout, request.deadline)
        sent = Sent(connection, request, request.heads or self._heads, deadline)
        try:
            sent.write_now()
        except BaseException:
            sent.close()
            raise
        return sent

    def begin(self, request: OutgoingRequest, origin: Origin) -> Sent | None:
        """A request that `write_now` will send once its new connection can be written to. None if that cannot be had
        without waiting."""
        try:
            connection = self._dialer.begin(origin)
        except OSError:  # whoever waits is told what it is
            return None
        if connection is None:
            return None
        connection.server = self._servers.at(origin)
        return Sent(connection, request, self._heads, time.monotonic() + self.timeouts.response_timeout)

    def open(self, origin: Origin) -> Connection:
        """A new connection, to be used, or given back. Raises as a connect does."""
        connection = self._dialer.dial(origin, self.timeouts.connect_timeout, self.server_name)
        connection.server = self._servers.at(origin)
        return connection

    def look(self, sent: Sent, most: int = SMALL_BODY) -> bool:
        """Take in what has come, without waiting. True if that is the whole response, and its body has no more than
        FIRST or `most` bytes: `sent` has it then. If not, `exchange` waits for the rest, or raises what went wrong."""
        connection, request = sent.connection, sent.request
        try:
            data = connection.receive_now(FIRST)
            if data is None:
                return False
            plain = sent.heads.plain(data) if sent.is_whole and sent.begun is None else None
            if plain is None or plain.whole != len(data) or request.method == "HEAD":
                return self._look_closer(sent, data, most)
            # Of the usual shape, and all of it: by far the most are so.
            request.client.detach()
            connection.server.is_old = False
            self.give_back(connection)
            sent.response = BackendResponse(plain, Body(data[plain.size :]), request)
            return True
        except BackendError as error:
            sent.fail(error)
            return False

    def _look_closer(self, sent: Sent, data: bytes, most: int) -> bool:
        sent.take(data)
        if not sent.head.has_head:
            return False
        sent.response = self._respond(sent)
        body = sent.response.body
        assert isinstance(body, ResponseBody)
        if not body.is_complete:
            body.take_in(most)
            if body.is_complete:
                body.close()
        return body.is_complete

    def _send(self, connection: Connection, request: OutgoingRequest) -> Sent:
        timeouts = self.timeouts
        seconds, deadline = timeouts.response_timeout, time.monotonic() + timeouts.response_timeout
        if request.is_replayable:
            deadline = min(deadline, request.deadline)
        else:  # a streamed body may take as long as it needs to come; there is only one attempt with it anyway
            seconds = timeouts.idle_timeout
        request.client.attach(connection)
        sent = Sent(connection, request, request.heads or self._heads, deadline)
        try:
            connection.set_timeout(seconds)
            sent.write()
        except BaseException:
            sent.close()
            raise
        return sent

    def _receive(self, sent: Sent) -> BackendResponse:
        try:
            if sent.failure is not None:
                raise sent.failure
            if sent.rest:
                sent.connection.set_timeout(self.timeouts.response_timeout)
                sent.write_rest()
            if sent.response is None:
                sent.receive_head(self._seconds_left(sent))
                sent.response = self._respond(sent)
        except BaseException:
            sent.close()
            sent.failure = None  # raised, it refers to `sent` as well: garbage of the slow kind otherwise
            raise
        return sent.response

    def _respond(self, sent: Sent) -> BackendResponse:
        """The head is here. Gives the connection back at once if the body is here too."""
        request, connection = sent.request, sent.connection
        if sent.head.status == 101 and isinstance(request, Handshake):
            request.switched(sent.head.lines)
        body = ResponseBody(
            connection,
            sent.head,
            is_head_request=request.method == "HEAD",
            give_back=self.give_back,
            client=request.client,
        )
        connection.server.is_old = sent.head.version == "1.0"
        is_spoilt = request.logs_in or (connection.is_tls and self._is_misnamed(connection))
        if is_spoilt or not (sent.is_whole and sent.is_clean):
            body.refuse_reuse()
        if body.is_complete:
            body.close()
        else:
            connection.set_timeout(self.timeouts.idle_timeout)
        return BackendResponse(sent.head, body, request)

    def _is_misnamed(self, connection: Connection) -> bool:
        """It is from before `server_name` was replaced."""
        named = getattr(connection.sock, "server_hostname", None)
        return named != name_for(connection.origin, self._first.server_name)

    def _seconds_left(self, sent: Sent) -> float:
        """For the rest of the response head. A streamed body took its own time to be sent."""
        if not sent.request.is_replayable:
            return self.timeouts.response_timeout
        return max(0.001, sent.deadline - time.monotonic())

    def _connect(self, origin: Origin, request: OutgoingRequest) -> Connection:
        started = time.monotonic()
        try:
            seconds = min(self.timeouts.connect_timeout, request.deadline - started)
            connection = self._dialer.dial(origin, max(0.001, seconds), self.server_name)
        finally:
            request.connect_seconds = time.monotonic() - started
        connection.server = self._servers.at(origin)
        return connection

    # The pool.

    def _take(self, origin: Origin, request: OutgoingRequest) -> Connection | None:
        """The most recently used idle connection that is good for this request; closes those that are good for none."""
        now = self._clock()
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                connection = idle.pop()
                seconds = now - connection.idle_since
                if seconds > connection.server.safe_idle and not request.is_retriable:
                    idle.append(connection)  # for one that can be
                    return None
            is_seen = connection.is_watched and request.is_retriable
            if seconds <= self.timeouts.pool_idle_timeout and (is_seen or not connection.has_input()):
                connection.received_before = connection.received
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose last response was read to its end, or that has had no request yet."""
        connection.idle_since = self._clock()
        with self._lock:
            idle = self._idle[connection.origin]
            if len(idle) < self._max_idle:
                idle.append(connection)
                return
        connection.close()

    def idle(self) -> dict[str, int]:
        """Kept connections per URL of an origin."""
        with self._lock:
            return {origin.url: len(idle) for origin, idle in self._idle.items()}

    def close_idle(self) -> None:
        """Close what has been idle too long or has ended, and learn from it how long servers keep connections."""
        with self._lock:
            origins = list(self._idle)
        for origin in origins:
            while not self._is_oldest_good(origin):
                pass

    def _is_oldest_good(self, origin: Origin) -> bool:
        """Or there is none. Closes it if it is not."""
        with self._lock:
            idle = self._idle.get(origin)
            if not idle:
                self._idle.pop(origin, None)
                return True
            connection = idle.popleft()
        seconds = self._clock() - connection.idle_since
        has_ended = not connection.is_watched and connection.has_input()
        connection.server.note_idle(seconds, has_ended)
        if has_ended or seconds > self.timeouts.pool_idle_timeout:
            connection.close()
            return False
        with self._lock:
            self._idle[origin].appendleft(connection)
        return True

    def close(self) -> None:
        """Close all idle connections; those in use are closed by their owners."""
        with self._lock:
            kept = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in kept:
            connection.close()
