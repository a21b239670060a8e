"""A request on its way to a backend: what has gone out of it, and what has come back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

from balancer.errors import BackendError, InvalidResponse, ResponseTimedOut
from balancer.protocol.client import Unwanted
from balancer.protocol.responseheads import MAX_HEAD, ResponseHeads
from balancer.upstream.connection import DONTWAIT, FIRST, Connection
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import BackendResponse, ResponseHead
from balancer.upstream.tcpinfo import has_hung_up

_HAS_SENDMSG = hasattr(socket.socket, "sendmsg")  # Windows has none


class Sent:
    """A request that is on its way, and what has come back so far."""

    __slots__ = (
        *("connection", "request", "heads", "begun", "deadline"),
        *("rest", "is_whole", "is_clean", "response", "failure"),
    )

    def __init__(self, connection: Connection, request: OutgoingRequest, heads: ResponseHeads, deadline: float) -> None:
        self.connection = connection
        self.request = request
        self.heads = heads
        self.begun: ResponseHead | None = None  # the head of the response, once some of it is here; few need it
        self.deadline = deadline  # of time.monotonic(), for the response head
        self.rest = b""  # what is still to be sent
        self.is_whole = False  # all of the request was sent
        self.is_clean = True  # nothing followed the response
        self.response: BackendResponse | None = None
        self.failure: BackendError | None = None

    @property
    def head(self) -> ResponseHead:
        if self.begun is None:
            self.begun = ResponseHead(self.heads, self.request.may_switch)
        return self.begun

    def write(self) -> None:
        """Send the request. If a streamed body is refused before its end (413, 401), stop. A broken pipe is not final:
        the answer may be here already."""
        request = self.request
        head = request.head()
        if request.body is None:
            self.is_whole = self._write(head)
        elif request.is_replayable:
            self.is_whole = self._write(head, request.body)
        else:
            self.is_whole = self._write(head) and self._write_stream(request.body)

    def write_now(self) -> None:
        """Send as much of a replayable request as goes without waiting, and leave the `rest`."""
        request = self.request
        data = request.head() + (request.body or b"")
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

    def receive_head(self, seconds: float) -> None:
        """Receive until the response head is complete. Raises ResponseTimedOut after so many seconds, and as `take`."""
        connection, deadline = self.connection, time.monotonic() + seconds
        connection.set_timeout(seconds)
        while not self.head.has_head:
            try:
                data = connection.receive(FIRST)
            except ResponseTimedOut:
                url = connection.origin.url
                raise ResponseTimedOut(f"{url} sent no complete response head within {seconds:.3g} s") from None
            self.take(data)
            if not self.head.has_head:  # rare: it came in pieces, so each receive gets only what is left of the time
                connection.set_timeout(max(0.001, deadline - time.monotonic()))

    def take(self, data: bytes) -> None:
        """One receive's worth of a response head, b"" for EOF. Raises ConnectionLost, InvalidResponse."""
        head = self.head
        if not data:
            raise self.connection.lost("it closed the connection without a complete response")
        head.size += len(data)
        self.is_clean = head.feed(data) and self.is_clean
        if head.size > MAX_HEAD and (not head.has_head or head.is_large()):  # else most of it is body
            raise InvalidResponse(f"the backend's response head is larger than {MAX_HEAD} bytes")

    def fail(self, error: BackendError) -> None:
        """Whoever goes on with it will find this, and no response."""
        self.response, self.failure = None, error.to_keep()

    def expire(self) -> None:
        """The response head has not come in time."""
        self.fail(ResponseTimedOut(f"{self.connection.origin.url} sent no complete response head in time"))

    def close(self) -> None:
        """The connection is of no use to anybody any more."""
        self.request.client.detach()
        if self.begun is not None:
            self.begun.end()
        self.connection.close()

    def _write(self, *parts: bytes | memoryview) -> bool:
        connection, done = self.connection, 0
        try:
            if len(parts) > 1 and _HAS_SENDMSG and not connection.is_tls:
                done = connection.sock.sendmsg(parts)  # not one by one: the backend would wake up for each
                if done == sum(map(len, parts)):
                    return True
            rest = memoryview(b"".join(parts))[done:]
            while rest:
                if self.request.is_replayable and time.monotonic() >= self.deadline:  # it reads, but too slowly
                    raise TimeoutError
                rest = rest[connection.sock.send(rest) :]
        except (TimeoutError, BlockingIOError):
            raise ResponseTimedOut(f"{self.connection.origin.url} stopped reading the request") from None
        except OSError:
            return False
        return True

    def _write_stream(self, chunks: Iterator[bytes | list[bytes]]) -> bool:
        is_chunked, client = self.request.is_chunked, self.request.client
        client.watch_upload(self.is_unwanted)
        try:
            for chunk in chunks:
                pieces = chunk if isinstance(chunk, list) else [chunk]
                if is_chunked and (size := sum(map(len, pieces))):
                    pieces = [b"%x\r\n" % size, *pieces, b"\r\n"]
                if not self._push(pieces):
                    return False
        except Unwanted:
            return False
        finally:
            client.watch_upload(None)
        return self._write(b"0\r\n\r\n") if is_chunked else True

    def _push(self, pieces: Sequence[bytes | memoryview]) -> bool:
        """Send a part of a streamed body. False if no more is wanted, also of one that a backend stops reading."""
        connection, left = self.connection, sum(map(len, pieces))
        if not DONTWAIT:
            return self._write(*pieces) and not self.is_unwanted()
        while True:
            try:
                done = connection.send_now(pieces)
            except OSError:
                return False  # as in `_write`
            if self.is_unwanted():
                return False
            left -= done
            if not left:
                return True
            pieces = [memoryview(b"".join(pieces) if len(pieces) > 1 else pieces[0])[done:]]
            connection.wait_for_room(or_input=not self.head.has_head)

    def is_unwanted(self, after_any: bool = False) -> bool:
        """Whether an answer is here that ends the sending: a refusal, or one after which the backend has hung up. After
        a success it may read on, unless `after_any` answer no more is to come. An interim response is none. Raises as
        `take`."""
        if not self.head.has_head and self.connection.has_input():  # cheaper than to try
            data = self.connection.receive_now()
            if data is not None:
                self.take(data)
        return self.head.has_head and (after_any or self.head.status >= 300 or has_hung_up(self.connection.sock))
