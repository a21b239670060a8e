"""HTTP/1.1 read strictly, from a whole byte string: what the fuzzers hold the balancer's reading against.

Strict but for the leniencies that docs/architecture.md names. In a request a bare line feed ends a line,
`Content-Length` gives way to `Transfer-Encoding`, a fragment and an empty query are dropped, `Host` wins over an
authority. What stands in a trailer section is nobody's business, only where it ends. Line ends before a response are
skipped, as they are before a request (RFC 9112 section 2.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Line = tuple[bytes, bytes]

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\Z")
REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e\x80-\xff]+) HTTP/1\.[01]\Z")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?\Z")  # the reason is not passed on
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
DIGITS = re.compile(rb"[0-9]{1,18}\Z")


class Invalid(Exception):
    """No message, by RFC 9112."""


class Incomplete(Exception):
    """The bytes end before the message does."""


@dataclass(frozen=True)
class Message:
    """A request or a response. `start` is (method, target) or (status,); `rest` is what follows it.

    One that `is_refused` ends where it seems to, but must not be forwarded: its body is coded more than once.
    """

    start: tuple[bytes, ...]
    lines: tuple[Line, ...]
    body: bytes
    rest: bytes
    is_refused: bool = False


def requests_in(data: bytes) -> tuple[list[Message], bytes]:
    """The valid, complete requests at the beginning, and what follows them."""
    found: list[Message] = []
    while data:
        try:
            found.append(_request(data))
        except (Invalid, Incomplete):
            break
        data = found[-1].rest
    return found, data


def _request(data: bytes) -> Message:
    first, lines, rest = _head(data.lstrip(b"\r\n"), is_lenient=True)
    match = REQUEST_LINE.match(first)
    if match is None:
        raise Invalid(first)
    codings, lengths = _values(lines, b"transfer-encoding"), _values(lines, b"content-length")
    names = [name.strip() for name in b",".join(codings).lower().split(b",")]
    if codings:
        if names[-1] != b"chunked":  # RFC 9112 section 6.3: nobody can say where it ends
            raise Invalid(codings)
        body, rest = _chunked(rest)
    else:
        body, rest = _counted(rest, _length(lengths) if lengths else 0)
    return Message((match[1], origin_form(match[2])), lines, body, rest, is_refused=len(names) > 1)


def origin_form(target: bytes) -> bytes:
    """As the balancer forwards it."""
    target = target.partition(b"#")[0]
    if match := re.match(rb"(?i)[a-z][a-z0-9+.-]*://[^/?]*", target):
        target = target[match.end() :]
        if not target.startswith(b"/"):
            target = b"/" + target
    path, mark, query = target.partition(b"?")
    return path + (mark + query if query else b"")


def response_in(data: bytes, method: bytes, *, is_end: bool = True) -> Message:
    """The final response at the beginning. `is_end`: the connection ends after `data`, so EOF ends a body.

    Raises Invalid, Incomplete.
    """
    while True:
        first, lines, rest = _head(data.lstrip(b"\r\n"), is_lenient=False)
        match = STATUS_LINE.match(first)
        if match is None or match[1] == b"101":
            raise Invalid(first)
        if not match[1].startswith(b"1"):
            break
        data = rest
    codings, lengths = _values(lines, b"transfer-encoding"), _values(lines, b"content-length")
    if codings and (lengths or codings[0].lower() != b"chunked" or len(codings) > 1):
        raise Invalid(codings + lengths)
    length = _length(lengths) if lengths else 0
    if method == b"HEAD" or match[1] in (b"204", b"304"):
        body = b""
    elif codings:
        body, rest = _chunked(rest)
    elif lengths:
        body, rest = _counted(rest, length)
    elif is_end:
        body, rest = rest, b""
    else:
        raise Incomplete(rest)
    return Message((match[1],), lines, body, rest)


def _head(data: bytes, *, is_lenient: bool) -> tuple[bytes, tuple[Line, ...], bytes]:
    """(start line, header lines, what follows the empty line)."""
    texts: list[bytes] = []
    while True:
        text, end, data = data.partition(b"\n")
        if not end:
            raise Incomplete(text)
        if text.endswith(b"\r"):
            text = text[:-1]
        elif not is_lenient:
            raise Invalid(text)
        if not text:
            break
        texts.append(text)
    if not texts:
        raise Invalid("no start line")
    return texts[0], tuple(_line(text) for text in texts[1:]), data


def _line(text: bytes) -> Line:
    name, colon, value = text.partition(b":")
    value = value.strip(b" \t")
    if not colon or not TOKEN.match(name) or not VALUE.match(value):
        raise Invalid(text)
    return name.lower(), value


def _values(lines: tuple[Line, ...], name: bytes) -> list[bytes]:
    return [value for key, value in lines if key == name]


def _length(values: list[bytes]) -> int:
    """Of several lines that say the same, one counts."""
    if not all(DIGITS.match(value) for value in values) or len({int(value) for value in values}) > 1:
        raise Invalid(values)
    return int(values[0])


def _counted(data: bytes, length: int) -> tuple[bytes, bytes]:
    if len(data) < length:
        raise Incomplete(data)
    return data[:length], data[length:]


def _chunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        match = CHUNK.match(data)
        if match is None:
            raise (Invalid if b"\n" in data else Incomplete)(data)
        size, data = int(match[1], 16), data[match.end() :]
        if not size:
            return body, _after_trailers(data)
        piece, data = _counted(data, size)
        end, data = _counted(data, 2)
        if end != b"\r\n":
            raise Invalid(end)
        body += piece


def _after_trailers(data: bytes) -> bytes:
    while True:
        text, end, data = data.partition(b"\r\n")
        if not end:
            raise Incomplete(text)
        if not text:
            return data
