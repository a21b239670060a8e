"""Where a request ends, and nothing smuggled behind it; RFC 9110 is "S", RFC 9112 "M"."""

from __future__ import annotations

import re
import socket
import threading
from typing import Any

import pytest
from support import Balancer, connect, exchange, is_idle, split_response, wait_until
from wire import CHUNKED_ABC, WireBackend, ask, post, read_response, request

SMUGGLED = CHUNKED_ABC + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 4", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 0", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 4"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 40"],
    ],
)
def test_content_length_with_transfer_encoding(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rule 14, M 6.3, a known gap: not 400; the server in front goes by Transfer-Encoding alone and closes after it.

    RFC 9112 allows that. What counts: one request arrives, framed anew, and what follows is not taken for another.
    """
    data = exchange(balancer.port, post(*lines, body=SMUGGLED))
    assert data.count(b"HTTP/1.1 ") == 1
    (got,) = backend.requests
    assert got.body == b"abc"
    assert not got.values(b"content-length") and not backend.broken


BAD_CODINGS = [
    *([b"gzip"], [b"chunked, gzip"], [b"xchunked"], [b'"chunked"'], [b"\x0bchunked"], [b""], [b"chunked;q=1"]),
    *([b"gzip, chunked"], [b"chunked, chunked"], [b"chunked", b"chunked"], [b"identity", b"chunked"]),
    *([b"gzip", b"chunked"], [b"chunked", b"identity"], [b"chunked,"], [b"x, chunked"]),
]
BAD_LENGTHS = [
    *([b"+3"], [b"-3"], [b"0x3"], [b"1_0"], [b"3 4"], [b"3, 4"], [b"3.0"], [b""], [b"\xb2"], ["\u0663".encode()]),
    *([b"99999999999999999999999"], [b"18446744073709551616"], [b"3", b"4"], [b"3", b"+3"], [b"3;"], [b"\x0b3"]),
    *([b"three"], [b"1e3"], [b"9" * 19]),
]
BAD_FRAMING = [
    *([b"Transfer-Encoding: " + coding for coding in codings] for codings in BAD_CODINGS),
    *([b"Content-Length: " + length for length in lengths] for lengths in BAD_LENGTHS),
]


@pytest.mark.parametrize("lines", BAD_FRAMING, ids=lambda lines: ascii(b" + ".join(lines))[2:-1])
def test_malformed_framing_is_refused(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rules 15 and 16, M 6.1, 6.2 and 6.3: closed, and nothing is sent on. Anything but one `chunked` is 400 or 501.

    To forward `gzip, chunked` as `chunked` would change the content: the backend could not know that it is compressed.
    """
    data = exchange(balancer.port, post(b"Connection: close", *lines, body=SMUGGLED))
    assert split_response(data)[0] in ((400, 501) if b"Transfer" in lines[0] else (400,))
    assert (data.count(b"HTTP/1.1 "), backend.seen) == (1, 0)


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_transfer_encoding_in_http_1_0_is_refused(balancer: Balancer, backend: WireBackend, connection: bytes) -> None:
    """Rule 15, M 6.1."""
    lines = [b"Transfer-Encoding: chunked", b"Connection: " + connection]
    data = exchange(balancer.port, request(b"/", *lines, method=b"POST", body=CHUNKED_ABC, version=b"1.0"))
    assert split_response(data)[0] == 400
    assert backend.seen == 0


@pytest.mark.parametrize("lines", [[b"Content-Length: 3", b"Content-Length: 3"], [b"Content-Length: 003"]])
def test_a_length_that_says_one_thing_is_sent_on_once(
    balancer: Balancer, backend: WireBackend, lines: list[bytes]
) -> None:
    """Rule 16, M 6.3: equal repeats may be collapsed, leading zeros are digits; what we send is our own number."""
    assert ask(balancer.port, post(*lines, body=b"abc"))[0] == 200
    assert backend.requests[0].values(b"content-length") == [b"3"]
    assert backend.requests[0].body == b"abc"


BAD_CHUNKS = {
    "plus": b"+3\r\nabc\r\n0\r\n\r\n",
    "hex prefix": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "leading blank": b" 3\r\nabc\r\n0\r\n\r\n",
    "negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "no hex": b"g\r\nabc\r\n0\r\n\r\n",
    "overflow": b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "empty": b"\r\nabc\r\n0\r\n\r\n",
    "data longer": b"3\r\nabcd\r\n0\r\n\r\n",
    "line feeds": b"3\nabc\n0\n\n",
    "carriage return": b"3\rabc\r\n0\r\n\r\n",
    "line feed in extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "carriage return in extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "huge extension": b"3;" + b"a" * 70000 + b"\r\nabc\r\n0\r\n\r\n",
    "malformed trailer": b"3\r\nabc\r\n0\r\nX T: 1\r\n\r\n",
    "huge trailer": b"3\r\nabc\r\n0\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_malformed_chunks_are_refused(balancer: Balancer, backend: WireBackend, body: bytes) -> None:
    """Rules 16 and 17, M 7.1: 400 and close. The backend never sees the end of such a request."""
    data = exchange(balancer.port, post(b"Transfer-Encoding: chunked", body=body + b"GET /smuggled HTTP/1.1\r\n\r\n"))
    assert split_response(data)[0] == 400
    assert data.count(b"HTTP/1.1 ") == 1
    assert backend.requests == []


@pytest.mark.parametrize(
    "body", [CHUNKED_ABC, b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n', b"003\r\nabc\r\n00\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n"]
)
def test_chunks_are_decoded_and_framed_anew(balancer: Balancer, backend: WireBackend, body: bytes) -> None:
    """Rule 17, M 7.1.1: extensions and the client's own framing stop here (a blank after the size is tolerated)."""
    assert ask(balancer.port, post(b"Transfer-Encoding: cHuNkEd", body=body))[0] == 200
    (got,) = backend.requests
    assert (got.body, got.values(b"transfer-encoding")) == (b"abc", [b"chunked"])


MALFORMED_LINES = {
    "obs-fold": b"X-A: 1\r\n 2\r\n",
    "obs-fold with tab": b"X-A: 1\r\n\t2\r\n",
    "space before colon": b"X-A : 1\r\n",
    "tab before colon": b"X-A\t: 1\r\n",
    "bare CR in value": b"X-A: 1\r2\r\n",
    "bare CR in name": b"X\r-A: 1\r\n",
    "NUL": b"X-A: 1\x002\r\n",
    "control character": b"X-A: 1\x012\r\n",
    "DEL": b"X-A: 1\x7f2\r\n",
    "no colon": b"X-A\r\n",
    "empty name": b": 1\r\n",
    "delimiter in name": b"X(A): 1\r\n",
    "name not ASCII": b"X\xe9: 1\r\n",
    "hidden Transfer-Encoding": b"Transfer-Encoding : chunked\r\n",
}


@pytest.mark.parametrize("line", MALFORMED_LINES.values(), ids=MALFORMED_LINES)
def test_malformed_header_lines_are_refused(balancer: Balancer, backend: WireBackend, line: bytes) -> None:
    """Rule 18, M 2.2, 5.1, 5.2 and S 5.5: 400, closed, nothing sent."""
    data = exchange(balancer.port, b"GET / HTTP/1.1\r\nHost: test\r\n" + line + b"\r\n" + request(b"/second"))
    assert split_response(data)[0] == 400
    assert data.count(b"HTTP/1.1 ") == 1
    assert backend.seen == 0


def test_a_head_with_bare_line_feeds_is_understood_and_sent_on_properly(
    balancer: Balancer, backend: WireBackend
) -> None:
    """Rule 18, M 2.2, a known gap: a recipient MAY take LF for a line end; the backend gets CRLF."""
    assert exchange(balancer.port, b"GET / HTTP/1.1\nHost: test\nConnection: close\n\n").startswith(b"HTTP/1.1 200")
    assert re.search(rb"(?<!\r)\n", backend.requests[0].head) is None


def test_request_trailers_are_discarded(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 25, M 7.1.2 and S 6.5.1: never merged into the header section; and no `TE: trailers` upstream."""
    body = b"3\r\nabc\r\n0\r\nX-Trailer: 1\r\nHost: evil\r\nContent-Length: 9\r\n\r\n"
    lines = [b"Transfer-Encoding: chunked", b"TE: trailers", b"Trailer: X-Trailer"]
    assert ask(balancer.port, post(*lines, body=body))[0] == 200
    (got,) = backend.requests
    assert got.body == b"abc"
    assert got.values(b"host") == [b"test"]
    assert not got.values(b"x-trailer") + got.values(b"te") + got.values(b"trailer")


@pytest.mark.parametrize(
    "lines", [[b"Content-Length: 10"], [b"Content-Length: 100000"], [b"Transfer-Encoding: chunked"]]
)
def test_a_truncated_request_never_looks_complete(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rule 19, M 8: the client stops in the middle."""
    exchange(balancer.port, post(*lines, body=b"3\r\nabc\r\n"), half_close=True)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []


def test_expect_continue_is_answered_here(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 23, S 10.1.1: terminated; the backend gets no Expect and the body."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Expect: 100-continue", b"Content-Length: 3"))
        assert stream.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert backend.requests == []
        sock.sendall(b"abc")
        assert stream.readline() == b"\r\n"
        assert read_response(stream)[0] == 200
    assert backend.requests[0].body == b"abc"
    assert not backend.requests[0].values(b"expect")


def test_expect_is_ignored_in_http_1_0(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 23, S 10.1.1: an HTTP/1.0 client gets no interim answer."""
    lines = [b"Expect: 100-continue", b"Content-Length: 3"]
    data = exchange(balancer.port, request(b"/", *lines, method=b"POST", body=b"abc", version=b"1.0"))
    assert data.startswith(b"HTTP/1.0 200")
    assert backend.requests[0].body == b"abc"


def test_a_refusal_comes_instead_of_100_continue(balancer: Balancer, backend: WireBackend) -> None:
    """Rules 23 and 27, S 10.1.1 and 15.5.14: no body is asked for that will not be read, and the connection closes."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Expect: 100-continue", b"Content-Length: 1000001"))
        assert stream.readline().startswith(b"HTTP/1.1 413 ")
        stream.read()
    assert backend.seen == 0


def test_a_request_body_is_streamed_too(balancer: Balancer, backend: WireBackend) -> None:
    """The backend gets the first chunk before the client sends the second."""
    first = threading.Event()

    def on_head(sock: socket.socket, got: Any) -> bool:
        first.set()
        return False

    backend.on_head = on_head
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n"))
        assert first.wait(60)
        sock.sendall(b"3\r\ndef\r\n0\r\n\r\n")
        assert read_response(stream)[0] == 200
    assert backend.requests[0].body == b"abcdef"
