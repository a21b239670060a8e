"""What goes to the client: an answer whole or in pieces, and the balancer's own answers.

A small answer that came whole is handed on whole. Anything else is streamed, and its `ResponseStream` sees to it on
every ending that the backend's connection is kept or closed, and that the request is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, Protocol

from balancer.errors import BackendError, BackendRemoved, BalancerError, ClientGone
from balancer.protocol.headerrules import check_filtered
from balancer.protocol.messages import BODILESS_STATUSES, SERVER_LINE, Line

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

    from balancer.upstream.response import Body


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Answer(NamedTuple):
    """To the client. A body in pieces is closed whatever happens, and takes care of its backend then."""

    status: int
    reason: str
    lines: list[Line]  # names in lower case
    body: bytes | ResponseStream

    def check(self) -> None:
        """Of a filter's making. Raises ValueError if it is no answer."""
        if not (200 <= self.status <= 599 and isinstance(self.body, bytes)):
            raise ValueError(f"a filter's answer is {self.status!r} with {type(self.body).__name__}; expected bytes")
        length = (b"content-length", b"%d" % len(self.body))
        check_filtered(self.lines, [line for line in self.lines if line == length])

    def as_wsgi(self, start_response: StartResponse) -> Iterable[bytes]:
        """Text, and a body to iterate over."""
        lines = [line for line in self.lines if line is not SERVER_LINE]  # another server names itself
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in lines]
        try:
            start_response(f"{self.status} {self.reason}", headers)
        except BaseException:  # it refuses a header line
            if not isinstance(self.body, bytes):
                self.body.close()
            raise
        return [self.body] if isinstance(self.body, bytes) else self.body


def whole(status: int, body: bytes = b"", *lines: Line) -> Answer:
    """One of the balancer's own."""
    length = (b"content-length", b"%d" % len(body))
    lines = lines if status in BODILESS_STATUSES else (*lines, length)
    return Answer(status, _PHRASES.get(status, ""), [SERVER_LINE, *lines], body)


def refusal(error: BalancerError, balancer_id: str, request_id: str) -> Answer:
    """To a request that got no answer from a backend."""
    # A client that left reads no answer; 499 is for records alone.
    status = HTTPStatus.BAD_REQUEST if isinstance(error, ClientGone) else error.status
    text = error.public or str(error)
    told: dict[str, object] = {"error": text, "load_balancer_id": balancer_id, "request_id": request_id}
    media_type = b"application/json"
    if error.is_problem:
        told |= {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": text}
        told |= error.members
        media_type = b"application/problem+json"
    return whole(status, json.dumps(told).encode(), (b"content-type", media_type), *error.headers)


class Ending(Protocol):
    """What a response body that comes in pieces tells of its request, and asks of it."""

    def is_client_gone(self) -> bool: ...

    def count_out(self, size: int) -> None: ...

    def finish(self, status: int, *, reason: str | None = None, complete: bool = True, failure: str = "") -> None: ...


class ResponseStream:
    """A response body on its way to the client, as WSGI wants it: iterate, then `close` whatever happened.

    A piece has at most `most` bytes, if that is set; it may be changed before each.
    """

    __slots__ = ("_ending", "_body", "_status", "most", "_is_flushed", "_is_finished")

    def __init__(self, ending: Ending, body: Body, status: int) -> None:
        self._ending = ending
        self._body = body
        self._status = status
        self.most: int | None = None
        self._is_flushed = bool(body.buffered)
        self._is_finished = False

    @property
    def is_here(self) -> bool:
        """No piece has to be waited for."""
        return self._body.is_complete

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._is_flushed:  # our server sends the head when it sees this; any other server does nothing
            self._is_flushed = True
            return b""
        if self._is_finished:
            raise StopIteration
        try:
            chunk = self._body.read_chunk(self.most)
        except BackendError as error:
            if self._ending.is_client_gone():
                self.close()
            else:
                self._finish(error.reason, complete=False, failure=str(error))
            raise
        self._ending.count_out(len(chunk))
        if self._body.is_complete and not self._body.buffered:  # counted before the client can see the end
            self._finish()
        return chunk

    def close(self, why: type[ClientGone | BackendRemoved] = ClientGone) -> None:
        """Idempotent. Before the end it means that the client left: the backend connection is closed at once."""
        if not self._is_finished:
            if issubclass(why, ClientGone):
                self._status = why.status
            self._finish(why.reason, complete=False)

    def _finish(self, reason: str | None = None, *, complete: bool = True, failure: str = "") -> None:
        self._is_finished = True
        self._body.close()
        self._ending.finish(self._status, reason=reason, complete=complete, failure=failure)
