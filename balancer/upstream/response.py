"""Responses of backends: parsing the head, framing the body, and deciding whether the connection may be used again.

A head of the usual shape is parsed by `responseheads`, everything else and chunked bodies by llhttp (Node's parser,
through httptools). A body of known length is counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import httptools
from requests import PreparedRequest, Response
from requests.cookies import RequestsCookieJar

from balancer.errors import BackendError, BodyTruncated, ConnectionLost, InvalidResponse
from balancer.protocol.client import UNWATCHED, Client
from balancer.protocol.messages import BODILESS_STATUSES, NONE, HeaderLines, Line, nominated, parse_content_length
from balancer.protocol.responseheads import MAX_HEAD, PlainHead, ResponseHeads
from balancer.protocol.texts import shown
from balancer.upstream.connection import CHUNK, FIRST, Connection

Data = TypeVar("Data", bytes, bytes | None)


class BackendResponse(Response):
    """A `requests.Response` over a body; made without the cookie jar that the base class builds each time."""

    # What the base class sets for each response, and what is the same for all of ours.
    encoding = None
    history: list[Response] = []  # noqa: RUF012
    _content = False  # type: ignore[assignment]
    _content_consumed = False
    _next = None

    def __init__(self, head: PlainHead | ResponseHead, body: Body, request: PreparedRequest) -> None:
        self.status_code: int = head.status
        self.reason = head.reason
        self.head = head
        self.body = self.raw = body
        self.request = request

    @property
    def url(self) -> str:  # type: ignore[override]
        return self.request.url or ""

    @property
    def cookies(self) -> RequestsCookieJar:  # type: ignore[override]
        """None: `Set-Cookie` lines are the client's, not ours."""
        return RequestsCookieJar()

    @property
    def headers(self) -> HeaderLines:  # type: ignore[override]
        return HeaderLines(self.head.lines)


class ResponseHead:
    """A response head as it comes in: status, reason, header lines, and the body bytes that came with it."""

    __slots__ = (
        *("_heads", "_parser", "status", "reason", "lines", "plain", "_collected", "options", "pieces", "size"),
        *("_may_switch", "version", "has_head", "has_end", "keeps_alive"),
    )

    def __init__(self, heads: ResponseHeads, may_switch: bool = False) -> None:
        self._heads = heads
        self._may_switch = may_switch
        self._parser: httptools.HttpResponseParser | None = None
        self.status = 0
        self.reason = ""
        self.version = "1.1"
        self._collected: list[Line] = []
        self.lines: Sequence[Line] = self._collected
        self.plain: PlainHead | None = None  # if it is one
        self.options: frozenset[bytes] = NONE  # of `Connection`
        self.pieces: list[bytes] = []
        self.size = 0  # bytes received until the head was complete
        self.has_head = False
        self.has_end = False  # only llhttp tells; a body of known length is counted by ResponseBody
        self.keeps_alive = False

    def feed(self, data: bytes) -> bool:
        """Parse. Returns False if bytes followed the end of the response. Raises InvalidResponse."""
        if self._parser is None:
            plain = self._heads.plain(data)
            if plain is not None:
                self._take(plain, data)
                return True
            self._parser = httptools.HttpResponseParser(self)
            # Some servers pad the size of a chunk; it cannot be taken for another one.
            self._parser.set_dangerous_leniencies(lenient_spaces_after_chunk_size=True)
        return self._feed_parser(self._parser, data)

    def _take(self, plain: PlainHead, data: bytes) -> None:
        self.plain = plain
        self.status, self.reason, self.lines, self.options = plain.status, plain.reason, plain.lines, plain.options
        self.has_head = True
        self.keeps_alive = b"close" not in plain.options  # RFC 9112 section 9.3
        if len(data) > plain.size:
            self.pieces.append(data[plain.size :])

    @property
    def for_client(self) -> Sequence[Line]:
        """The lines for the client."""
        if self.plain is not None:
            return self.plain.for_client
        return self._heads.for_client(self.lines, self.status, self.options)

    def is_large(self) -> bool:
        return sum(len(name) + len(value) + len(b": \r\n") for name, value in self.lines) > MAX_HEAD

    def _feed_parser(self, parser: httptools.HttpResponseParser, data: bytes) -> bool:
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as switched:
            if not self._may_switch:
                raise InvalidResponse("the backend switched protocols without being asked") from None
            self.pieces.append(data[switched.args[0] :])  # of the other protocol
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
        self.reason += reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer: discarded, it must not become a header (RFC 9110 section 6.5.1)
            self._collected.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 100:
            raise InvalidResponse("the backend's response has no valid status")
        self.version = version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):  # llhttp also takes 0.9 and 2.0, which have no status line
            raise InvalidResponse(f"the backend's response has the version HTTP/{version}")
        self.has_head = self.status >= 200 or (self.status == 101 and self._may_switch)
        # Not llhttp's own judgement: it takes an answer to HEAD without a length for one that lasts until EOF.
        self.options = nominated(self.lines)
        is_persistent = version == "1.1" or b"keep-alive" in self.options
        self.keeps_alive = is_persistent and b"close" not in self.options  # RFC 9112 section 9.3

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        if self.has_head:
            self.has_end = True
        else:
            # 1xx: WSGI cannot pass it on, so it is swallowed (RFC 9110 section 15.2); the real one follows.
            self._collected.clear()
            self.reason = ""

    def end(self) -> None:
        """No more of it is parsed. The parser refers to us: only the garbage collector could free the two."""
        self._parser = None

    def take(self) -> bytes:
        """The body bytes parsed so far, once."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.pieces = []
        return data


class Body:
    """The body of one response: call `read_chunk`. `close` is due on every ending and is idempotent. Also file-like
    enough for `requests.Response` (`read`, `stream`).

    One whose bytes were all here with its head is only this: its connection serves another request already.
    """

    __slots__ = ("buffered", "is_complete")

    def __init__(self, data: bytes) -> None:
        self.buffered = data  # what is here already, without a receive
        self.is_complete = True

    def read_chunk(self, most: int | None = None) -> bytes:
        """The next piece of up to `most` bytes, b"" at the end. Raises BodyTruncated, ResponseTimedOut."""
        data = self.buffered[:most]
        self.buffered = b"" if most is None else self.buffered[most:]
        return data

    def close(self) -> None:
        pass

    def stream(self, amount: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        try:
            while chunk := self.read_chunk():
                yield chunk
        finally:
            self.close()

    def read(self, amount: int | None = None, decode_content: bool | None = None) -> bytes:
        return b"".join(self.stream())

    def release_conn(self) -> None:
        self.close()


class ResponseBody(Body):
    """One that comes in pieces. Closing gives the connection back if the body was read to its end and may be followed
    by another response, and closes it otherwise."""

    __slots__ = (
        *("_give_back", "_connection", "_head", "_left", "_is_chunked", "_framing_bytes"),
        *("_client", "_can_reuse"),
    )

    def __init__(
        self,
        connection: Connection,
        head: ResponseHead,
        *,
        is_head_request: bool,
        give_back: Callable[[Connection], None],
        client: Client = UNWATCHED,
    ) -> None:
        self._give_back = give_back
        self._connection: Connection | None = connection
        self._head = head
        self._client = client
        self._can_reuse = head.keeps_alive
        # RFC 9112 section 6.3: no body, else chunked, else so many bytes, else until EOF.
        self._left, self._is_chunked = _framing(head)  # also where there is no body: what it says is passed on
        self._framing_bytes = 0  # received since the last byte of body
        if is_head_request or head.status in BODILESS_STATUSES:
            self._left, self._is_chunked = 0, False
        self.buffered = head.take()
        if self._left is not None:
            self.buffered = self._count(self.buffered)
        elif not self._is_chunked:
            self._can_reuse = False  # it lasts until EOF
        self.is_complete = self._left == 0 or (self._is_chunked and head.has_end)

    def refuse_reuse(self) -> None:
        """The request was not sent whole, or bytes followed the response: this connection must not carry another."""
        self._can_reuse = False

    def read_chunk(self, most: int | None = None) -> bytes:
        data = super().read_chunk(most)
        while not data and not self.is_complete:
            if self._connection is None:
                raise BodyTruncated("the body was closed before it was read")
            data = self._take(self._receive(self._connection.receive, most or CHUNK))
        return data

    def take_in(self, most: int) -> None:
        """Receive what has come already, without waiting, if the body may have no more than `most` bytes. Raises as
        `read_chunk`."""
        while self._connection is not None and not self.is_complete and len(self.buffered) + (self._left or 0) <= most:
            data = self._receive(self._connection.receive_now, max(most, FIRST))
            if data is None:
                return
            self.buffered += self._take(data)

    def read_out(self, most: int, deadline: float) -> bytes:
        """Receive what is left, so that the backend can write all of it, and close: no more than `most` bytes, nor
        later than `deadline`, which is of time.monotonic()."""
        data = self.buffered[:most]
        self.buffered = b""
        try:
            while self._connection is not None and not self.is_complete and (self._left or 1) <= most - len(data):
                if (seconds := deadline - time.monotonic()) <= 0:
                    break
                self._connection.set_timeout(max(0.001, seconds))
                data += self.read_chunk(min(most - len(data), CHUNK))
        except BackendError:
            pass  # whoever calls this wanted the head above all
        finally:
            self.close()
        return data

    def take_over(self) -> tuple[Connection, bytes]:
        """The connection, on which another protocol is spoken from now on, and what has come of that."""
        connection, self._connection = self._connection, None
        assert connection is not None
        self._head.end()
        return connection, self.buffered

    def _receive(self, receive: Callable[[int], Data], most: int) -> Data:
        try:
            return receive(most)
        except ConnectionLost as error:
            raise BodyTruncated(f"the backend's body broke off: {error}") from error

    def _take(self, data: bytes) -> bytes:
        """The part of the body in what was received, b"" for EOF."""
        if self._left is not None:
            if not data:
                raise BodyTruncated(f"the backend closed {self._left} bytes before the end of the body")
            data = self._count(data)
            self.is_complete = self._left == 0
            return data
        if not self._is_chunked:
            if not data and self._connection is not None and self._connection.is_aborted:
                raise BodyTruncated("the body was ended before its end")
            self.is_complete = not data
            return data
        if not data:
            raise BodyTruncated("the backend closed before the last chunk")
        if not self._head.feed(data):
            self._can_reuse = False
        self.is_complete = self._head.has_end
        body = self._head.take()
        self._framing_bytes = 0 if body else self._framing_bytes + len(data)
        if self._framing_bytes > MAX_HEAD:  # a chunk size or a trailer without end, which llhttp goes on collecting
            raise InvalidResponse(f"the backend sent more than {MAX_HEAD} bytes of chunk framing or trailers")
        return body

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
        self._head.end()
        self._client.detach()
        if self.is_complete and self._can_reuse:
            self._give_back(connection)
        else:
            connection.close()


def _framing(head: ResponseHead) -> tuple[int | None, bool]:
    """(bytes of the body by Content-Length or None, chunked); (None, False) is until EOF. Raises InvalidResponse."""
    if head.plain is not None:
        return head.plain.length, False
    lengths = [value for name, value in head.lines if name == b"content-length"]
    codings = [value.lower() for name, value in head.lines if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or lengths):
        raise InvalidResponse(f"the backend's response has the framing {shown(b', '.join(codings + lengths))}")
    if not lengths:
        return None, bool(codings)
    try:
        length = parse_content_length(lengths[0])
        if any(parse_content_length(value) != length for value in lengths[1:]):
            raise ValueError
    except ValueError:
        raise InvalidResponse(f"the backend's response has Content-Length {shown(b', '.join(lengths))}") from None
    return length, False
