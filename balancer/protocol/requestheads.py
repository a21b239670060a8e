"""What follows from the header section of a request, worked out once.

Clients send the same header section over and over: whoever keeps a connection does with each request. So what follows
from one is looked up from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

from balancer.errors import BalancerError
from balancer.protocol.messages import (
    Line,
    Network,
    body_length,
    check_codings,
    check_count,
    check_host,
    notable,
    request_lines,
    trace_id,
)
from balancer.protocol.tables import Table

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
        self.length: int | None = None  # of the body in bytes, if it is told
        # HTTP/2 tells only at its end whether there is a body (RFC 9113 section 8.1).
        self.is_bodiless = version != "2" and self.fields.keys().isdisjoint((b"content-length", b"transfer-encoding"))
        self.trace_id = self._trace_id()
        self.is_worker_script = b"service-worker" in self.fields
        self.refusal: BalancerError | None = None
        self.lines: tuple[Line, ...] = ()  # for the backend, without framing fields and X-Request-ID
        try:
            check_count(lines, max_lines)
            codings = self.fields.get(b"transfer-encoding", ())
            self.length = body_length(self.fields.get(b"content-length", ()), codings)
            check_host(self.fields.get(b"host", ()), version)
            check_codings(codings)
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


def on_the_wire(lines: Sequence[Line]) -> bytes:
    return b"".join([b"%s: %s\r\n" % line for line in lines])
