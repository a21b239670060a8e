"""The way to the backends: a `requests` Transport Adapter made for a reverse proxy.

It keeps the contract of `requests` (PreparedRequest in, Response out, its exceptions) and leaves out what a session
adds and a proxy must not have: a cookie jar shared by all clients, proxies and .netrc from the environment, redirects,
rewritten paths, decompression. Header lines go out and come back in order and byte for byte.

Connections are kept alive per backend and reused last in, first out. Before reuse a socket is checked for EOF; one
that has been idle longer than `pool_idle_timeout` is closed (keep that below the backend's own keep-alive time-out).
Sockets block, and the kernel does the timing (SO_RCVTIMEO): Python's own time-outs poll before every receive.
Responses are parsed by llhttp, Node's parser.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import httptools
from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter

from balancer.backends import Origin
from balancer.errors import (
    BodyTruncated,
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    InvalidResponse,
    ResponseTimedOut,
)
from balancer.messages import BODILESS_STATUSES, IDEMPOTENT, HeaderLines, Line, parse_content_length

CHUNK = 65536  # bytes per receive: with a few of them in flight per connection, memory stays flat
MAX_HEAD = 65536  # bytes of a response head, interim responses included
MAX_IDLE_PER_BACKEND = 1024  # idle sockets kept; above that they are closed after use


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `response` is until the response head is complete, `idle` between two pieces of either body."""

    connect: float = 3.0
    response: float = 30.0
    idle: float = 60.0


class Watcher(Protocol):
    """Who must be able to cut a connection from another thread while we block on it: the client's side."""

    def attach(self, connection: Connection) -> None: ...

    def detach(self) -> None: ...


class OutgoingRequest(PreparedRequest):
    """A PreparedRequest that knows its raw target, its origin and the client that waits for it.

    body: None, bytes (sent with the head, can be sent again), or an iterator of bytes (streamed, once; chunked unless
    `content_length` is set).
    """

    def __init__(self, method: str, target: bytes, lines: list[Line]) -> None:
        # Not calling PreparedRequest.__init__: every field is set here.
        self.method = method
        self.target = target
        self.headers = HeaderLines(lines)  # type: ignore[assignment]
        self.body: Any = None
        self.hooks = {}
        self.url: str | None = None
        self._cookies = None
        self._body_position = None
        self.content_length: int | None = None
        self.watcher: Watcher | None = None

    @property
    def is_replayable(self) -> bool:
        return self.body is None or isinstance(self.body, bytes)

    @property
    def is_retriable(self) -> bool:
        """A second try after something was sent is allowed: RFC 9110 section 9.2.2, and the body is still here."""
        return self.method in IDEMPOTENT and self.is_replayable

    def head(self) -> bytes:
        """Request line and header section; framing fields are added here and nowhere else."""
        lines = [b"%s %s HTTP/1.1" % (str(self.method).encode(), self.target)]
        lines += [b"%s: %s" % line for line in self.headers.lines]  # type: ignore[attr-defined]
        if isinstance(self.body, bytes):
            lines.append(b"content-length: %d" % len(self.body))
        elif self.content_length is not None:
            lines.append(b"content-length: %d" % self.content_length)
        elif self.body is not None:
            lines.append(b"transfer-encoding: chunked")
        lines.append(b"\r\n")
        return b"\r\n".join(lines)


class BackendResponse(Response):
    """A `requests.Response` over `ResponseBody`; made without the cookie jar that the base class builds each time."""

    def __init__(self, head: ResponseHead, body: ResponseBody, request: PreparedRequest) -> None:
        self.status_code: int = head.status
        self.reason = head.reason.decode("latin-1")
        self.headers = HeaderLines(head.lines)  # type: ignore[assignment]
        self.lines = head.lines
        self.body = self.raw = body
        self.request = request
        self.url = request.url or ""
        self.encoding = None
        self.history = []
        self._content = False  # type: ignore[assignment]
        self._content_consumed = False
        self._next = None


class ResponseHead:
    """Collects what llhttp finds: status, reason, header lines, and the body bytes that came with the head."""

    __slots__ = ("parser", "status", "reason", "lines", "pieces", "has_head", "has_end", "keeps_alive")

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.reason = b""
        self.lines: list[Line] = []
        self.pieces: list[bytes] = []
        self.has_head = False
        self.has_end = False
        self.keeps_alive = False

    def feed(self, data: bytes) -> bool:
        """Parse. Returns False if bytes followed the end of the response. Raises InvalidResponse."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise InvalidResponse("the backend switched protocols without being asked") from None
        except httptools.HttpParserError as error:
            if self.has_end:
                return False
            raise InvalidResponse(f"the backend's response is malformed: {error}") from None
        return True

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self.has_end:
            # Bytes after a complete response belong to no request; the parser must not mix them in.
            raise InvalidResponse("the backend sent a second response")

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer: discarded, it must not become a header (RFC 9110 section 6.5.1)
            self.lines.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.has_head = self.status >= 200
        self.keeps_alive = self.parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        if self.has_head:
            self.has_end = True
        else:
            # 1xx: WSGI cannot pass it on, so it is swallowed (RFC 9110 section 15.2); the real one follows.
            self.lines.clear()
            self.reason = b""

    def take(self) -> bytes:
        """The body bytes parsed so far, once."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.pieces = []
        return data


class Connection:
    """One socket to a backend, in blocking mode."""

    __slots__ = ("sock", "origin", "idle_since", "is_reused", "_timeout", "_is_tls")

    def __init__(self, sock: socket.socket, origin: Origin) -> None:
        self.sock = sock
        self.origin = origin
        self.idle_since = 0.0
        self.is_reused = False
        self._timeout = 0.0
        self._is_tls = isinstance(sock, ssl.SSLSocket)

    def set_timeout(self, seconds: float) -> None:
        """For sends and receives from now on; no system call if nothing changes."""
        if seconds == self._timeout:
            return
        self._timeout = seconds
        if self._is_tls:  # the ssl module retries a receive that the kernel timed out, so Python must do the timing
            self.sock.settimeout(seconds)
            return
        if sys.platform == "win32":
            value = struct.pack("@L", int(seconds * 1000))
        else:
            value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive(self) -> bytes:
        """Up to CHUNK bytes, b"" at EOF. Raises ResponseTimedOut, ConnectionLost."""
        try:
            return self.sock.recv(CHUNK)
        except (TimeoutError, BlockingIOError):
            raise ResponseTimedOut(f"{self.origin.url} sent nothing for {self._timeout:g} s") from None
        except OSError as error:
            raise ConnectionLost(f"{self.origin.url}: {error.strerror or error}") from error

    def has_input(self) -> bool:
        """True if a receive would not block: while idle, that means EOF, an alert, or bytes nobody asked for."""
        if self._is_tls or sys.platform == "win32":  # neither can peek without blocking
            return self._is_readable()
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _is_readable(self) -> bool:
        if sys.platform == "win32":
            return bool(select.select([self.sock], [], [], 0)[0])
        poller = select.poll()  # not select(): it cannot take descriptors above 1023, and those are common here
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(0))

    def abort(self) -> None:
        """Wake whoever blocks on this socket, from any thread. The owner still has to close it."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already down

    def close(self) -> None:
        self.sock.close()


class ResponseBody:
    """The body of one response; iterate, or call `read_chunk`. `close` is due on every ending and is idempotent.

    Closing gives the connection back if the body was read to its end and may be followed by another response, and
    closes it otherwise. Also file-like enough for `requests.Response` (`read`, `stream`).
    """

    __slots__ = (
        "_adapter",
        "_connection",
        "_head",
        "_left",
        "_is_chunked",
        "_pending",
        "_watcher",
        "_can_reuse",
        "is_complete",
    )

    def __init__(
        self, adapter: BackendAdapter, connection: Connection, head: ResponseHead, request: PreparedRequest
    ) -> None:
        self._adapter = adapter
        self._connection: Connection | None = connection
        self._head = head
        self._watcher: Watcher | None = getattr(request, "watcher", None)
        self._can_reuse = head.keeps_alive
        # RFC 9112 section 6.3: no body, else chunked, else so many bytes, else until EOF.
        self._left: int | None
        self._is_chunked = False
        if request.method == "HEAD" or head.status in BODILESS_STATUSES:
            self._left = 0
        else:
            self._left, self._is_chunked = _framing(head)
        self._pending = head.take()
        if self._left is not None:
            self._pending = self._count(self._pending)
        self.is_complete = self._left == 0 or (self._is_chunked and head.has_end)

    @property
    def buffered(self) -> bytes:
        """What is here already, without a receive."""
        return self._pending

    def refuse_reuse(self) -> None:
        """The request was not sent whole, or bytes followed the response: this connection must not carry another."""
        self._can_reuse = False

    def read_chunk(self) -> bytes:
        """The next piece, b"" at the end. Raises BodyTruncated, ResponseTimedOut."""
        data, self._pending = self._pending, b""
        while not data and not self.is_complete:
            data = self._receive()
        return data

    def _receive(self) -> bytes:
        if self._connection is None:
            raise BodyTruncated("the body was closed before it was read")
        try:
            data = self._connection.receive()
        except ConnectionLost as error:
            raise BodyTruncated(f"the backend's body broke off: {error}") from error
        if self._left is not None:
            if not data:
                raise BodyTruncated(f"the backend closed {self._left} bytes before the end of the body")
            data = self._count(data)
            self.is_complete = self._left == 0
            return data
        if not self._is_chunked:
            self.is_complete = not data
            return data
        if not data:
            raise BodyTruncated("the backend closed before the last chunk")
        if not self._head.feed(data):
            self._can_reuse = False
        self.is_complete = self._head.has_end
        return self._head.take()

    def _count(self, data: bytes) -> bytes:
        """Take `data` off the announced length; bytes beyond it belong to no response and are dropped."""
        assert self._left is not None
        if len(data) > self._left:
            data, self._can_reuse = data[: self._left], False
        self._left -= len(data)
        return data

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._watcher is not None:
            self._watcher.detach()
        if self.is_complete and self._can_reuse:
            self._adapter.give_back(connection)
        else:
            connection.close()

    # What requests.Response asks of `raw`.

    def stream(self, amount: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        while chunk := self.read_chunk():
            yield chunk

    def read(self, amount: int | None = None, decode_content: bool | None = None) -> bytes:
        return b"".join(self.stream())

    def release_conn(self) -> None:
        self.close()


class BackendAdapter(BaseAdapter):
    """Sends requests to backends over pooled connections. Thread-safe.

    `_lock` guards `_idle`: per origin, the idle connections, the newest last. Sockets are opened, checked and closed
    outside it.
    """

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        *,
        pool_idle_timeout: float = 4.0,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.timeouts = timeouts or Timeouts()
        self._pool_idle_timeout = pool_idle_timeout
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

    def exchange(self, request: OutgoingRequest, origin: Origin) -> BackendResponse:
        """Send `request` to `origin` and return when the response head is here.

        Raises ConnectFailed and ConnectTimedOut (nothing was sent), ConnectionLost, ResponseTimedOut, InvalidResponse;
        whatever the request's body iterator raises comes through. A reused connection that died before any byte of a
        response gets one more try on a fresh one, for idempotent methods with a replayable body only.
        """
        connection = self._take(origin) or self._connect(origin)
        try:
            return self._exchange_on(connection, request)
        except ConnectionLost as error:
            if not (error.stale and request.is_retriable):
                raise
        return self._exchange_on(self._connect(origin), request)

    def _exchange_on(self, connection: Connection, request: OutgoingRequest) -> BackendResponse:
        watcher = request.watcher
        if watcher is not None:
            watcher.attach(connection)
        try:
            head = ResponseHead()
            connection.set_timeout(self.timeouts.response if request.is_replayable else self.timeouts.idle)
            sent = _Sending(connection, request, head).run()
            clean = _receive_head(connection, head, self.timeouts.response)
            body = ResponseBody(self, connection, head, request)
        except BaseException:
            if watcher is not None:
                watcher.detach()
            connection.close()
            raise
        if not (sent and clean):
            body.refuse_reuse()
        if body.is_complete:
            body.close()
        else:
            connection.set_timeout(self.timeouts.idle)
        return BackendResponse(head, body, request)

    def _connect(self, origin: Origin) -> Connection:
        try:
            sock = socket.create_connection((origin.host, origin.port), self.timeouts.connect)
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url} did not accept within {self.timeouts.connect:g} s") from None
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            raise ConnectFailed(f"{origin.url}: {error.strerror or error}", refused=refused) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "https":
                sock = self._wrap(sock, origin)
            else:
                sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return Connection(sock, origin)

    def _wrap(self, sock: socket.socket, origin: Origin) -> ssl.SSLSocket:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            return self._tls.wrap_socket(sock, server_hostname=origin.host)
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url}: no TLS handshake within {self.timeouts.connect:g} s") from None
        except (OSError, ValueError) as error:
            raise ConnectFailed(f"{origin.url}: TLS: {error}") from error

    # The pool.

    def _take(self, origin: Origin) -> Connection | None:
        """The most recently used idle connection that is still good; closes those that are not."""
        oldest = self._clock() - self._pool_idle_timeout
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                connection = idle.pop() if idle else None
            if connection is None:
                return None
            if connection.idle_since >= oldest and not connection.has_input():
                connection.is_reused = True
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose last response was read to its end."""
        connection.idle_since = self._clock()
        with self._lock:
            idle = self._idle.setdefault(connection.origin, deque())
            kept = len(idle) < MAX_IDLE_PER_BACKEND
            if kept:
                idle.append(connection)
        if not kept:
            connection.close()

    def close_idle(self, origin: Origin | None = None) -> None:
        """Close what has been idle too long; all idle connections to `origin` if given."""
        oldest = self._clock() - self._pool_idle_timeout
        expired: list[Connection] = []
        with self._lock:
            for key, idle in self._idle.items():
                while idle and (key == origin or idle[0].idle_since < oldest):
                    expired.append(idle.popleft())
        for connection in expired:
            connection.close()

    def close(self) -> None:
        """Close all idle connections; those in use are closed by their owners."""
        with self._lock:
            pools, self._idle = self._idle, {}
        for idle in pools.values():
            for connection in idle:
                connection.close()


class _Sending:
    """Writes one request; if a streamed body is refused before its end (413, 401), stops and says so."""

    def __init__(self, connection: Connection, request: OutgoingRequest, head: ResponseHead) -> None:
        self._connection = connection
        self._request = request
        self._head = head

    def run(self) -> bool:
        """True if the whole request was sent. A broken pipe is not final: the answer may be here already."""
        request = self._request
        head = request.head()
        if request.body is None:
            return self._write(head)
        if isinstance(request.body, bytes):
            return self._write(head + request.body)
        return self._write(head) and self._write_stream(request.body, request.content_length is None)

    def _write(self, data: bytes) -> bool:
        try:
            self._connection.sock.sendall(data)
        except (TimeoutError, BlockingIOError):
            raise ResponseTimedOut(f"{self._connection.origin.url} stopped reading the request") from None
        except OSError:
            return False
        return True

    def _write_stream(self, chunks: Iterator[bytes], chunked: bool) -> bool:
        for chunk in chunks:
            if chunk and not self._write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk):
                return False
            if not self._head.has_head and self._connection.has_input() and self._is_refused():
                return False
        return self._write(b"0\r\n\r\n") if chunked else True

    def _is_refused(self) -> bool:
        """Something came back early: an interim response and a success are no reason to stop sending."""
        data = self._connection.receive()
        if data:
            self._head.feed(data)
        return not data or self._head.status >= 300


def _receive_head(connection: Connection, head: ResponseHead, seconds: float) -> bool:
    """Receive until `head` is complete, `seconds` at most. True if nothing followed the response."""
    clean, received, deadline = True, 0, 0.0
    connection.set_timeout(seconds)
    while not head.has_head:
        try:
            data = connection.receive()
        except ConnectionLost as error:
            raise ConnectionLost(str(error), stale=connection.is_reused and not received) from error
        if not data:
            raise ConnectionLost(
                f"{connection.origin.url} closed the connection without a complete response",
                stale=connection.is_reused and not received,
            )
        received += len(data)
        clean = head.feed(data)
        if not head.has_head:  # rare: the head came in pieces, so each receive gets only what is left of the time
            deadline = deadline or time.monotonic() + seconds
            connection.set_timeout(max(0.001, deadline - time.monotonic()))
            if received > MAX_HEAD:
                raise InvalidResponse(f"the backend's response head is larger than {MAX_HEAD} bytes")
    return clean


def _framing(head: ResponseHead) -> tuple[int | None, bool]:
    """(bytes of the body by Content-Length or None, chunked); (None, False) is until EOF. Raises InvalidResponse."""
    codings: list[bytes] = []
    lengths: list[bytes] = []
    for name, value in head.lines:
        lowered = name.lower()
        if lowered == b"content-length":
            lengths.append(value)
        elif lowered == b"transfer-encoding":
            codings.append(value.lower())
    if codings and (codings != [b"chunked"] or lengths):
        raise InvalidResponse(f"the backend's response has the framing {codings + lengths!r}")
    if not lengths:
        return None, bool(codings)
    try:
        (length,) = {parse_content_length(value) for value in lengths}
    except ValueError:
        raise InvalidResponse(f"the backend's response has Content-Length {b', '.join(lengths)!r}") from None
    return length, False


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
