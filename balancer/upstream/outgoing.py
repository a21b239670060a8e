"""Requests as backends get them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from requests import PreparedRequest

from balancer.protocol.client import UNWATCHED, Client
from balancer.protocol.messages import (
    IDEMPOTENT,
    HeaderLines,
    Line,
)
from balancer.protocol.origin import Origin
from balancer.protocol.requestheads import RequestHead, on_the_wire


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
    client: Client = UNWATCHED
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
