"""Requests as backends get them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from requests import PreparedRequest

from balancer.errors import ClientError, LengthRequired
from balancer.protocol.client import UNWATCHED, Client
from balancer.protocol.headerrules import check_filtered, is_token
from balancer.protocol.messages import IDEMPOTENT, HeaderLines, Line, check_method, check_target, logs_in
from balancer.protocol.origin import Origin
from balancer.protocol.requestheads import RequestHead
from balancer.protocol.responseheads import ResponseHeads

MOST_COLLECTED = 65536  # bytes of a body whose length is not known, for a server that must be told


class OutgoingRequest(PreparedRequest):
    """A PreparedRequest that knows its raw target and the client that waits for it.

    `shared` is what it has in common with others of its client, `own` are header lines of this request alone. `framing`
    says how long the body is.
    """

    # What the base class sets for each request, and what most requests leave as it is.
    body: Any = None
    is_replayable = True  # all of the body is here, so that it can be sent again
    is_chunked = False
    framing = b""
    hooks: dict[str, Any] = {}  # noqa: RUF012
    url: str | None = None
    _cookies = None
    _body_position = None
    client: Client = UNWATCHED
    deadline = math.inf  # of time.monotonic(), for all attempts together
    connect_seconds: float | None = None  # what the last attempt spent on a new connection, None for a kept one
    heads: ResponseHeads | None = None  # by whose rules it is answered, the adapter's own if there are none
    # Of these `exchange` takes care, so they have a thread. One that lacks its Host gets the backend's; one that logs
    # in does so for its connection, and for all that follows on it (RFC 4559 section 6).
    is_special = lacks_host = logs_in = False
    may_switch = False  # to another protocol, by a 101: `Handshake`
    is_resent = False  # the last attempt's kept connection had died, so it was sent once more on a fresh one

    def __init__(self, method: str, target: bytes, own: Sequence[Line], shared: RequestHead | None = None) -> None:
        # Not calling PreparedRequest.__init__: every field is here.
        self.method = method
        self.target = target
        self.own = own
        self.shared = shared
        if shared is None or shared.is_special:
            self._look_closer()
        if method in ("POST", "PUT", "PATCH"):  # RFC 9110 section 8.6
            self.framing = b"content-length: 0\r\n"

    def share(self, head: RequestHead) -> None:
        """Go out with the lines of this one, before a filter has changed any."""
        self.shared = head
        if self.is_special or head.is_special:
            self._look_closer()

    def set_body(self, body: bytes | Iterator[bytes | list[bytes]], length: int | None = None) -> None:
        """Bytes, which are sent with the head; or an iterator of bytes or of lists of them, which are sent at once:
        streamed, once, and chunked unless its `length` is known."""
        self.body = body
        if isinstance(body, bytes):
            length = len(body)
        else:
            self.is_replayable = False
        self.is_chunked = length is None
        self.framing = b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length

    def collect(self, url: str) -> None:
        """Take in a body of unknown length, so that it goes with one: a server that speaks HTTP/1.0 would not find it
        otherwise (RFC 9112 section 6.1). Raises LengthRequired, and as the body does."""
        pieces: list[bytes] = []
        for chunk in self.body:
            pieces += chunk if isinstance(chunk, list) else [chunk]
            if sum(map(len, pieces)) > MOST_COLLECTED:
                raise LengthRequired(
                    f"the request body has more than {MOST_COLLECTED} bytes and no Content-Length, and {url} speaks "
                    "HTTP/1.0"
                )
        self.set_body(b"".join(pieces))
        self.is_replayable = True

    def set_host(self, authority: str) -> None:
        self.lines = [(b"host", authority.encode("ascii")), *(line for line in self.lines if line[0] != b"host")]

    def _look_closer(self) -> None:
        lines = self.lines
        self.lacks_host = self.lacks_host or (b"host", b"") in lines
        self.logs_in = any(logs_in(*line) for line in lines)
        self.is_special = self.lacks_host or self.logs_in

    def check(self, before: Sequence[Line]) -> None:
        """After filters have changed it, whose lines were `before` and `own`: frame the body that it has now. Raises
        ValueError if this would not be one request on the wire, and for a line that is not for filters."""
        if isinstance(self.body, bytes) or (self.body is None and self.framing):
            self.set_body(self.body or b"")
        elif self.body is not None and self.is_replayable:
            raise ValueError(f"a filter set the body to {type(self.body).__name__}; expected bytes")
        method = str(self.method)
        if not is_token(method.encode()):
            raise ValueError(f"a filter set the method to {method!r:.80}; expected one such as GET")
        try:
            check_method(method)
            check_target(method, self.target)
        except ClientError as error:
            raise ValueError(f"a filter made it {method} {self.target!r:.80}: {error}") from None
        if self.shared is not None:
            return  # its lines are as they were
        lines = self.lines
        check_filtered(lines, before)
        if [name.lower() for name, _ in lines].count(b"host") != 1:
            raise ValueError("a filter left no Host line, or more than one")

    def head(self) -> bytes:
        """Request line and header section."""
        raw = self.shared.raw if self.shared is not None else b""
        for line in self.own:
            raw += b"%s: %s\r\n" % line
        return b"%s %s HTTP/1.1\r\n%s%s\r\n" % (str(self.method).encode(), self.target, raw, self.framing)

    @property
    def lines(self) -> list[Line]:
        return [*self.shared.lines, *self.own] if self.shared is not None else [*self.own]

    @lines.setter
    def lines(self, lines: Sequence[Line]) -> None:
        self.own, self.shared = [*lines], None
        self._look_closer()

    @property
    def headers(self) -> HeaderLines:  # type: ignore[override]
        return HeaderLines(self.lines)

    @property
    def is_retriable(self) -> bool:
        """A second try after something was sent is allowed: RFC 9110 section 9.2.2, and the body is still here."""
        return self.method in IDEMPOTENT and self.is_replayable


def _netloc(request: PreparedRequest) -> str:
    return str(request.url).partition("://")[2].partition("/")[0]


def origin_of(request: PreparedRequest) -> Origin:
    """Where any PreparedRequest goes, by its URL. Raises SettingsError."""
    scheme = str(request.url).partition("://")[0]
    return Origin.parse(f"{scheme}://{_netloc(request)}")


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
    if isinstance(body, str):
        body = body.encode()
    if body is not None:
        outgoing.set_body(body if isinstance(body, bytes) else iter(body))
    return outgoing
