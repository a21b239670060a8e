"""Backends get another path than clients ask for, and clients may get back what they can ask for."""

from __future__ import annotations

import re

from balancer.errors import AmbiguousPath
from balancer.filters.directanswers import AMBIGUOUS
from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.protocol.messages import Line
from balancer.protocol.paths import Rewriting, is_ambiguous, raw_path
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest

_LOCATION = re.compile(rb"(?:https?://([^/?#]*))?(/(?!/)[^?#]*)", re.IGNORECASE)
_COOKIE_PATH = re.compile(rb"(;[ \t]*path[ \t]*=[ \t]*)([^;]*)", re.IGNORECASE)


class Rewrite(Filter):
    """By `rewriting`: the path of what is sent, which must mean the same to all readers then, unless it
    `takes_ambiguous`."""

    def __init__(self, rewriting: Rewriting, *, takes_ambiguous: bool = False) -> None:
        self._rewriting = rewriting
        self._takes_ambiguous = takes_ambiguous

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        if outgoing.target == b"*":  # it has no path
            return
        outgoing.target = self._rewriting.of_target(outgoing.target)
        if not self._takes_ambiguous and is_ambiguous(raw_path(outgoing.target)):
            raise AmbiguousPath(AMBIGUOUS)


class RewriteAnswers(Filter):
    """`Location`, and `Path` of cookies, as clients see what the backend names there. Locations on other hosts stay;
    `host` is what backends are told that they are called, if that is not the client's `Host`."""

    def __init__(self, rewriting: Rewriting, host: bytes) -> None:
        self._rewriting = rewriting
        self._host = host

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        if record.backend is None or record.error is not None:  # our own
            return lines
        return [(name, self._changed(request, name, value)) for name, value in lines]

    def _changed(self, request: Request, name: bytes, value: bytes) -> bytes:
        if name == b"location":
            return self._location(request, value)
        if name == b"set-cookie":
            return _COOKIE_PATH.sub(lambda match: match[1] + self._rewriting.of_answer(match[2].strip()), value)
        return value

    def _location(self, request: Request, value: bytes) -> bytes:
        found = _LOCATION.match(value)
        if found is None:
            return value
        seen = self._rewriting.of_answer(found[2]) + value[found.end() :]
        if found[1] is None or found[1] in request.values(b"host"):
            return value[: found.start(2)] + seen
        return seen if found[1] == self._host else value
