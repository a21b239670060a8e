"""Response heads of the usual shape, parsed line by line.

Backends send the same few lines over and over, and busy ones the same whole head many times a second, so both are
looked up among those seen before, and only what is new is parsed: a third of what callbacks from a parser cost. This
takes nothing that llhttp would refuse, but for a Content-Length that is said twice. Whatever is not plain in the
narrowest sense (another version, an interim response, chunked, a folded or odd line) is left to llhttp, which decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from balancer.protocol.headerrules import NO_RULES, HeaderRules
from balancer.protocol.messages import (
    BODILESS_STATUSES,
    NONE,
    Line,
    connection_options,
    is_content_length,
    named,
    response_lines,
)
from balancer.protocol.tables import Table

# RFC 9112 section 4: the reason phrase may be empty, the blank before it may not be left out.
_STATUS = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)\Z")
# A token, and a value without control characters (RFC 9110 sections 5.1 and 5.5); blanks around it are not part of it.
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)\Z")

MAX_HEAD = 65536  # bytes of a response head, interim responses included; also of chunk framing or trailers at a stretch
# What backends send must not fill the memory. Bytes of all status lines, lines and heads that are kept, and of the
# longest of each; beside its own bytes, twice, a line takes about LINE_BYTES of objects, a head HEAD_BYTES.
STATUSES_ROOM, LINES_ROOM, HEADS_ROOM = 65536, 262144, 1048576
LONGEST_LINE, LONGEST_HEAD = 128, 1024
LINE_BYTES, HEAD_BYTES = 250, 700


@dataclass(frozen=True, slots=True)
class PlainHead:
    """One object may serve many responses at the same time, so nothing in it ever changes."""

    version: ClassVar[str] = "1.1"
    status: int
    reason: str
    lines: tuple[Line, ...]  # names in lower case
    options: frozenset[bytes]  # of `Connection`
    length: int | None  # Content-Length
    size: int  # bytes of the head, the empty line included
    for_client: tuple[Line, ...]  # the lines for the client
    whole: int | None  # bytes of the response, unless to HEAD, if the connection can be kept after so many of them


def _parse_status(line: bytes) -> tuple[int, str] | None:
    match = _STATUS.match(line)
    return None if match is None else (int(match[1]), match[2].decode("latin-1"))


def _parse_line(line: bytes) -> Line | None:
    match = _LINE.match(line)
    if match is None:
        return None
    name, value = match[1].lower(), match[2].rstrip(b" \t")
    if name == b"transfer-encoding" or (name == b"content-length" and not is_content_length(value)):
        return None
    return name, value


def _weigh_line(line: bytes, parsed: object) -> int:
    return LINE_BYTES + 2 * len(line) if len(line) <= LONGEST_LINE else 0


def _weigh_head(data: bytes, head: PlainHead | None) -> int:
    """Its lines may be in no other table any more."""
    if len(data) > LONGEST_HEAD:
        return 0
    return HEAD_BYTES + 2 * len(data) + LINE_BYTES * (len(head.lines) if head is not None else 0)


class ResponseHeads:
    """Looks up, or parses, heads of responses. Any thread may call. `rules` change what goes to clients."""

    def __init__(self, rules: HeaderRules = NO_RULES) -> None:
        self.rules = rules
        self._statuses = Table(_parse_status, STATUSES_ROOM, _weigh_line)
        self._lines = Table(_parse_line, LINES_ROOM, _weigh_line)
        self._heads = Table(self._parse, HEADS_ROOM, _weigh_head)

    def plain(self, data: bytes) -> PlainHead | None:
        """The head at the start of `data`, None if it is not whole or not plain."""
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
        return self._heads[data[:end]] if end > 0 else None

    def for_client(self, lines: Sequence[Line], status: int, options: frozenset[bytes]) -> list[Line]:
        """The lines for the client; `options` are those of `Connection`."""
        return self.ruled(response_lines(lines, status, options))

    def ruled(self, lines: list[Line]) -> list[Line]:
        """Lines for the client, those of our own answers as well, by the rules."""
        return named(self.rules.applied(lines)) if self.rules else lines

    def _parse(self, data: bytes) -> PlainHead | None:
        first, *rest = data.split(b"\r\n")
        status = self._statuses[first]
        if status is None:
            return None
        lines: list[Line] = []
        options, length = NONE, None
        for raw in rest:
            line = self._lines[raw]
            if line is None:
                return None
            if line[0] == b"content-length":
                if length is not None and length != int(line[1]):
                    return None
                if length is not None:  # said twice (RFC 9110 section 8.6)
                    continue
                length = int(line[1])
            lines.append(line)
            options |= connection_options(*line)
        size = len(data) + len(b"\r\n\r\n")
        can_be_kept = length is not None and status[0] not in BODILESS_STATUSES and b"close" not in options
        return PlainHead(
            *status,
            tuple(lines),
            options,
            length,
            size,
            for_client=tuple(self.for_client(lines, status[0], options)),
            whole=size + (length or 0) if can_be_kept else None,
        )
