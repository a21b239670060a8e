"""What follows from the header section of a request, worked out once.

A client that keeps its connection sends the same header section with each request. So what follows from one is looked
up from then on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from copy import copy
from itertools import chain
from typing import NamedTuple

from balancer.errors import BalancerError
from balancer.protocol.addresses import Network
from balancer.protocol.headerrules import NO_RULES, HeaderRules
from balancer.protocol.messages import (
    CREDENTIALS,
    Line,
    body_length,
    check_codings,
    check_count,
    check_host,
    is_plain,
    join_cookies,
    request_id,
    request_lines,
    trace_id,
    without_cookies,
)
from balancer.protocol.tables import Table

# Clients choose what they send: bytes that all header sections that are kept may take, and each of them. Beside its own
# bytes, twice, a line takes about LINE_BYTES of objects, however short it is, and a section HEAD_BYTES.
HEADS_ROOM, LARGEST_HEAD = 2 * 1024 * 1024, 8192
LINE_BYTES, HEAD_BYTES = 200, 1200
MOST_LINES = 100  # of a header section; more, which HTTP/2 may bring, are not even looked at
NAMES_ROOM, NAME_BYTES, LONGEST_NAME = 65536, 150, 64  # for field names, of each beside its own bytes, and to be kept
_RARE = frozenset({b"service-worker", b"max-forwards"})
_EACH_TIME_NEW = frozenset(
    {b"x-request-id", b"traceparent", b"sec-websocket-key"}
)  # to keep a section that has one would be in vain
# Without a Host; or it may log its connection in.
_SPECIAL = re.compile(rb"\Ahost: \r|^authorization: (?i:ntlm|nego)", re.MULTILINE)

# What a RequestHead depends on: header lines as received, peer, scheme, HTTP version.
Section = tuple[tuple[Line, ...], str, str, str]


class HeadChange(NamedTuple):
    """What a route changes in header sections, after the rules that hold for all: the `Host`, empty for the client's
    and None to leave it, and by its own rules."""

    host: bytes | None
    rules: HeaderRules


class RequestHead:
    """What follows from the header section of a request. One may serve many requests, so it never changes."""

    __slots__ = (
        *("lines", "raw", "fields", "length", "is_bodiless", "request_id", "trace_id"),
        *("is_rare", "is_special", "refusal", "bindings"),
    )

    def __init__(self, section: Section, heads: RequestHeads) -> None:
        lines, peer, scheme, version = section
        if version == "2":
            lines = join_cookies(lines)
        if heads.ours:
            lines = tuple(line for line in lines if line[0] not in heads.ours)
        self.bindings: dict[bytes, bytes] = {}  # values of our own cookies, by their names
        if heads.cookies:
            lines, self.bindings = without_cookies(lines, heads.cookies)
        self.fields = heads.fields(lines[:MOST_LINES])  # values by name, one for each line, of what is not plain
        self.length: int | None = None  # of the body in bytes, if it is told
        # HTTP/2 tells only at its end whether there is a body (RFC 9113 section 8.1).
        self.is_bodiless = version != "2" and self.fields.keys().isdisjoint((b"content-length", b"transfer-encoding"))
        self.request_id = request_id(self.fields.get(b"x-request-id", ()))
        self.trace_id = self._trace_id()
        self.is_rare = not self.fields.keys().isdisjoint(_RARE)  # what few clients send, and some filters look at
        self.refusal: BalancerError | None = None
        self.lines: tuple[Line, ...] = ()  # for the backend, without framing fields and X-Request-ID
        try:
            check_count(lines, heads.max_lines)
            codings = self.fields.get(b"transfer-encoding", ())
            self.length = body_length(self.fields.get(b"content-length", ()), codings)
            check_host(self.fields.get(b"host", ()), version)
            check_codings(codings)
            made = request_lines(
                lines,
                self.fields,
                peer=peer,
                scheme=scheme,
                http_version=version,
                pseudonym=heads.pseudonym if heads.via else None,
                trusted=heads.trusted,
            )
            if heads.host:
                made[0] = (b"host", heads.host)
            self.lines = tuple(heads.rules.applied(made) if heads.rules else made)
        except BalancerError as error:
            self.refusal = error.to_keep()
        self._write()

    def _write(self) -> None:
        self.raw = b"".join([b"%s: %s\r\n" % line for line in self.lines])  # as they go out
        self.is_special = _SPECIAL.search(self.raw) is not None  # `OutgoingRequest` looks closer

    def changed(self, change: HeadChange) -> RequestHead:
        """With what one route makes of its lines."""
        host, rules = change
        made = copy(self)
        lines = self.lines
        if host is not None and lines:  # of what is refused there are none
            lines = ((b"host", host or self.fields.get(b"host", [b""])[0]), *lines[1:])
        made.lines = tuple(rules.applied(lines))
        made._write()
        return made

    def replaced(self, gone: Collection[bytes], added: Sequence[Line]) -> RequestHead:
        """Without the fields that are `gone` and with the lines that are `added`. Credentials go as the client sent
        them: what the operator has set instead is for the backend."""
        made = copy(self)
        made.lines = (*(line for line in self.lines if not self._goes(gone, *line)), *added)
        made._write()
        return made

    def _goes(self, gone: Collection[bytes], name: bytes, value: bytes) -> bool:
        return name in gone and (name not in CREDENTIALS or value in self.fields.get(name, ()))

    def _trace_id(self) -> str | None:
        """What is not valid does not go on, nor does `tracestate` without it (W3C Trace Context, section 3.3)."""
        found = trace_id(self.fields.get(b"traceparent", ()))
        if found is None:
            self.fields |= {name: [] for name in (b"traceparent", b"tracestate") if name in self.fields}
        return found


def _weigh_name(name: bytes, is_plain: bool) -> int:
    return NAME_BYTES + len(name) if len(name) <= LONGEST_NAME else 0


class RequestHeads:
    """Looks up, or works out, what follows from a header section. Any thread may call.

    `pseudonym` is our name in `Via`, unless `via` says that there is none; claims of peers in `trusted` networks are
    believed; sections of more than `max_lines` are refused; `rules` change what goes to backends; `host` is their
    `Host`, empty for the client's; `cookies` are the names of ours, which backends do not get; `ours` are fields in
    which we alone tell backends something.
    """

    def __init__(
        self,
        pseudonym: bytes = b"lb-1",
        trusted: Sequence[Network] = (),
        max_lines: int = MOST_LINES,
        rules: HeaderRules = NO_RULES,
        host: bytes = b"",
        via: bool = True,
        cookies: Collection[bytes] = (),
        ours: Collection[bytes] = (),
    ) -> None:
        self.via, self.cookies, self.ours = via, cookies, ours
        self.pseudonym, self.trusted, self.max_lines, self.rules = pseudonym, trusted, max_lines, rules
        self.host = host
        self._size_of_rules = rules.size
        self._are_plain = Table(is_plain, NAMES_ROOM, _weigh_name)
        self._table: Table[Section, RequestHead] = Table(self._work_out, HEADS_ROOM, self._weigh)

    def _weigh(self, section: Section, head: RequestHead) -> int:
        """0 if it will hardly come again, or takes too much; what goes to the backend may be much less than it."""
        if head.refusal is not None or not head.fields.keys().isdisjoint(_EACH_TIME_NEW):
            return 0
        lines = section[0]
        size = HEAD_BYTES + LINE_BYTES * len(lines) + 2 * sum(map(len, chain.from_iterable(lines)))
        return size + self._size_of_rules if size <= LARGEST_HEAD else 0

    def of(self, lines: Sequence[Line], peer: str, scheme: str, version: str) -> RequestHead:
        section = (tuple(lines), peer, scheme, version)
        return self._table[section] if len(lines) <= self.max_lines else self._work_out(section)

    def fields(self, lines: Sequence[Line]) -> dict[bytes, list[bytes]]:
        """Values by name, one for each line, of what does not just go on: one or two of ten lines, mostly."""
        found: dict[bytes, list[bytes]] = {}
        for name, value in lines:
            if not self._are_plain[name]:
                found.setdefault(name, []).append(value)
        return found

    def _work_out(self, section: Section) -> RequestHead:
        return RequestHead(section, self)


ChangedHeads = Table[tuple[RequestHead, HeadChange], RequestHead]


def changed_heads() -> ChangedHeads:
    """The same, as routes change them."""
    return Table(lambda given: given[0].changed(given[1]), HEADS_ROOM, weigh_made)


def weigh_made(given: tuple[RequestHead, object], made: RequestHead) -> int:
    """With the head from which it is made, which may be in no other table any more."""
    if len(made.raw) > LARGEST_HEAD or not made.fields.keys().isdisjoint(_EACH_TIME_NEW):
        return 0
    return sum(HEAD_BYTES + LINE_BYTES * len(head.lines) + 2 * len(head.raw) for head in (given[0], made))
