"""Requests as backends get them.

Clients send the same header section over and over: whoever keeps a connection does with each request. So what follows
from one is worked out once, and looked up from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from requests import PreparedRequest

from balancer.connection import Watcher
from balancer.errors import BalancerError
from balancer.messages import (
    IDEMPOTENT,
    HeaderLines,
    Line,
    Network,
    check_codings,
    check_count,
    check_host,
    notable,
    request_lines,
    trace_id,
)
from balancer.origin import Origin
from balancer.tables import Table

# Clients choose what they send: bytes that all header sections that are kept may take, and each of them. Beside its own
# bytes, twice, a line takes about LINE_BYTES of objects, however short it is, and a section HEAD_BYTES.
HEADS_ROOM, LARGEST_HEAD = 2 * 1024 * 1024, 8192
LINE_BYTES, HEAD_BYTES = 200, 1200
MOST_LINES = 100  # of a header section; more, which HTTP/2 may bring, are not even looked at
_EACH_TIME_NEW = frozenset({b"x-request-id", b"traceparent"})  # to keep a section that has one would be in vain

# What a RequestHead depends on: header lines as received, peer, scheme, HTTP version.
Received = tuple[tuple[Line, ...], str, str, str]


class RequestHead:
    """What follows from the header section of a request. One may serve many requests, so it never changes."""

    __slots__ = ("lines", "raw", "fields", "length", "is_bodiless", "trace_id", "is_worker_script", "refusal")

    def __init__(self, received: Received, pseudonym: bytes, trusted: Sequence[Network], max_lines: int) -> None:
        lines, peer, scheme, version = received
        self.fields = notable(lines[:MOST_LINES])  # values by name, one for each line
        self.length = b",".join(self.fields.get(b"content-length", ())).decode("latin-1")  # as sent, "" without one
        # HTTP/2 tells only at its end whether there is a body.
        self.is_bodiless = not self.length and b"transfer-encoding" not in self.fields and version != "2"
        self.trace_id = self._trace_id()
        self.is_worker_script = b"service-worker" in self.fields
        self.refusal: BalancerError | None = None
        self.lines: tuple[Line, ...] = ()  # for the backend, without framing fields and X-Request-ID
        try:
            check_count(lines, max_lines)
            check_host(self.fields.get(b"host", ()), version)
            check_codings(self.fields.get(b"transfer-encoding", ()))
            self.lines = tuple(
                request_lines(
                    lines,
                    self.fields,
                    peer=peer,
                    scheme=scheme,
                    http_version=version,
                    pseudonym=pseudonym,
                    trusted=trusted,
                )
            )
        except BalancerError as error:
            self.refusal = error.to_keep()
        self.raw = on_the_wire(self.lines)

    def _trace_id(self) -> str | None:
        """Takes out what is not valid: `tracestate` means nothing alone (W3C Trace Context, section 3.3)."""
        found = trace_id(self.fields.get(b"traceparent", ()))
        if found is None:
            self.fields.pop(b"traceparent", None)
            self.fields.pop(b"tracestate", None)
        return found


def _weigh(received: Received, head: RequestHead) -> int:
    """0 if it will hardly come again, or takes too much; what goes to the backend may be much less than what came."""
    if head.refusal is not None or not head.fields.keys().isdisjoint(_EACH_TIME_NEW):
        return 0
    lines = received[0]
    size = HEAD_BYTES + LINE_BYTES * len(lines) + 2 * sum(map(len, chain.from_iterable(lines)))
    return size if size <= LARGEST_HEAD else 0


class RequestHeads:
    """Looks up, or works out, what follows from a header section. Any thread may call.

    `pseudonym` is our name in `Via`; claims of peers in `trusted` networks are believed; sections of more than
    `max_lines` are refused.
    """

    def __init__(
        self, pseudonym: bytes = b"lb-1", trusted: Sequence[Network] = (), max_lines: int = MOST_LINES
    ) -> None:
        self.pseudonym, self.trusted, self.max_lines = pseudonym, trusted, max_lines
        self._work_out = partial(RequestHead, pseudonym=pseudonym, trusted=trusted, max_lines=max_lines)
        self._table: Table[Received, RequestHead] = Table(self._work_out, HEADS_ROOM, _weigh)

    def of(self, lines: Sequence[Line], peer: str, scheme: str, version: str) -> RequestHead:
        received = (tuple(lines), peer, scheme, version)
        return self._table[received] if len(lines) <= self.max_lines else self._work_out(received)


class OutgoingRequest(PreparedRequest):
    """A PreparedRequest that knows its raw target and the client that waits for it.

    `shared` is what it has in common with others of its client, `own` are header lines of this request alone.

    body: None, bytes (sent with the head, can be sent again), or an iterator of bytes or of lists of them, which are
    sent at once (streamed, once; chunked unless `content_length` is set).
    """

    # What the base class sets for each request, and what most requests leave as it is.
    body: Any = None
    hooks: dict[str, Any] = {}  # noqa: RUF012
    url: str | None = None
    _cookies = None
    _body_position = None
    content_length: int | None = None
    watcher: Watcher | None = None
    deadline = math.inf  # of time.monotonic(), for all attempts together
    connect_seconds: float | None = None  # what the last attempt spent on a new connection, None for a kept one
    is_resent = False  # the last attempt's kept connection had died, so it was sent once more on a fresh one

    def __init__(self, method: str, target: bytes, own: Sequence[Line], shared: RequestHead | None = None) -> None:
        # Not calling PreparedRequest.__init__: every field is here.
        self.method = method
        self.target = target
        self.own = own
        self.shared = shared

    @property
    def lines(self) -> list[Line]:
        return [*self.shared.lines, *self.own] if self.shared is not None else [*self.own]

    @property
    def headers(self) -> HeaderLines:  # type: ignore[override]
        return HeaderLines(self.lines)

    @property
    def is_replayable(self) -> bool:
        return self.body is None or isinstance(self.body, bytes)

    @property
    def is_retriable(self) -> bool:
        """A second try after something was sent is allowed: RFC 9110 section 9.2.2, and the body is still here."""
        return self.method in IDEMPOTENT and self.is_replayable

    def head(self) -> bytes:
        """Request line and header section; framing fields are added here and nowhere else."""
        return b"%s %s HTTP/1.1\r\n%s%s%s\r\n" % (
            str(self.method).encode(),
            self.target,
            self.shared.raw if self.shared is not None else b"",
            on_the_wire(self.own),
            self._framing(),
        )

    def _framing(self) -> bytes:
        if self.body is None:
            # RFC 9110 section 8.6
            return b"content-length: 0\r\n" if self.method in ("POST", "PUT", "PATCH") else b""
        if isinstance(self.body, bytes):
            return b"content-length: %d\r\n" % len(self.body)
        if self.content_length is not None:
            return b"content-length: %d\r\n" % self.content_length
        return b"transfer-encoding: chunked\r\n"


def on_the_wire(lines: Sequence[Line]) -> bytes:
    return b"".join([b"%s: %s\r\n" % line for line in lines])


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
    if body is None or isinstance(body, bytes):
        outgoing.body = body
    else:
        outgoing.body = body.encode() if isinstance(body, str) else iter(body)
    return outgoing
