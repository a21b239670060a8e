"""Clients that send anything: generated requests, mutated bytes, broken HTTP/2 frames.

What the backend gets must be what a strict reader (`reference.py`) finds in the bytes, in that order, and nothing else:
no smuggled request, no smuggled header line. The client gets well-formed answers or the end of the connection, in time.

Runs are the same every time. FUZZ_EXAMPLES=5000 makes them longer, FUZZ_SEED=N different; pytest's header shows both.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from reference import Message, requests_in, response_in
from support import BalancerProcess, connect, get, ok, split_response, wait_until
from wire import WireBackend

pytestmark = pytest.mark.timeout(int(os.environ.get("FUZZ_TIMEOUT", "60")))

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
SILENCE = 0.15  # seconds without an answer after which the client ends its side
BOUND = 10.0  # seconds within which the connection must be over then

CANARY = b"GET /canary HTTP/1.1\r\nHost: test\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
REFUSALS = {400, 405, 408, 411, 413, 414, 417, 421, 431, 500, 501, 502, 503, 504, 505, 508} - {500}
ADDED = {b"host", b"content-length", b"transfer-encoding", b"x-request-id", b"via"}


@pytest.fixture(scope="module")
def scripted() -> Iterator[WireBackend]:
    backend = WireBackend()
    yield backend
    backend.close()


def answer(sock: socket.socket, request: Any) -> None:
    """A checksum of what came, so that an answer can be told from that to another request."""
    method, target, _ = request.head.split(b" ", 2)
    digest = checksum(method, target, request.body)
    data = ok(digest)
    sock.sendall(data[: -len(digest)] if method == b"HEAD" else data)


def checksum(method: bytes, target: bytes, body: bytes) -> bytes:
    return hashlib.sha256(b"%s %s\n%s" % (method, target, body)).hexdigest().encode()


def talk(port: int, data: bytes) -> bytes:
    """All that comes back. Fails if the connection does not end in time."""
    received = b""
    with connect(port) as sock, suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(data)
        sock.settimeout(SILENCE)
        while True:
            try:
                chunk = sock.recv(65536)
            except TimeoutError:
                if sock.gettimeout() == BOUND:
                    raise AssertionError(f"the connection did not end within {BOUND} s") from None
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(BOUND)
                continue
            if not chunk:
                break
            received += chunk
    return received


def probe(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    """Send `data`, and hold what came of it on both sides against the reference."""
    balancer_lines = len(balancer.lines)
    backend.requests.clear()
    backend.broken.clear()
    backend.script = answer
    received = talk(balancer.port, data)
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0, BOUND, "the request has ended")
    wanted, rest = requests_in(data)
    event(f"{len(backend.requests)} requests and {len(backend.broken)} broken ones at the backend")
    event("answered " + (received.split(b" ", 2)[1].decode() if received else "with nothing"))
    check_backend(backend, wanted, rest)
    methods = [message.start[0] for message in wanted] + [rest.lstrip(b"\r\n").partition(b" ")[0]]
    if not data.startswith(b"PRI * HTTP/2.0"):
        check_answers(received, methods, backend)
    assert not any("Traceback" in line for line in balancer.lines[balancer_lines:])
    status, _, body = split_response(talk(balancer.port, get(b"/good")))
    assert (status, body) == (200, checksum(b"GET", b"/good", b""))


def check_backend(backend: WireBackend, wanted: list[Message], rest: bytes) -> None:
    """Everything it saw was asked for, in this order; what broke off was under way."""
    left = iter(wanted)
    for request in backend.requests:
        method, target, lines = read_strictly(request.head)
        match = next((m for m in left if m.start == (method, target) and m.body == request.body), None)
        assert match is not None and not match.is_refused, f"nobody sent {request.head!r} with {request.body!r}"
        check_lines(lines, match)
    for request in backend.broken:
        method, target, _ = read_strictly(request.head)
        under_way = rest.lstrip(b"\r\n").startswith(method + b" ") or (method, target) in [m.start for m in wanted]
        assert under_way and target != b"/canary", request.head


def read_strictly(head: bytes) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
    """(method, target, header lines); a head that any two servers could read differently fails."""
    assert head.endswith(b"\r\n\r\n")
    first, *texts = head[:-4].split(b"\r\n")
    assert re.fullmatch(rb"[!-~]+ [!-~]+ HTTP/1\.1", first), first
    for text in texts:
        assert re.fullmatch(rb"[!#$%&'*+\-.^`|~0-9a-z]+: ?[\t\x20-\x7e\x80-\xff]*", text), text
    method, target, _ = first.split(b" ")
    return method, target, [(name, value.strip()) for name, _, value in (text.partition(b":") for text in texts)]


def check_lines(lines: list[tuple[bytes, bytes]], sent: Message) -> None:
    names = [name for name, _ in lines]
    assert names.count(b"host") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    for name, value in lines:
        if name not in ADDED and not name.startswith(b"x-forwarded-"):
            assert (name, value) in sent.lines


def check_answers(received: bytes, methods: list[bytes], backend: WireBackend) -> None:
    """Well-formed answers, as many as there were requests at most; a good one only to what the backend saw."""
    seen = list(backend.requests)
    for method in methods:
        if not received:
            return
        message = response_in(received, method)
        status = int(message.start[0])
        if status == 200:
            assert seen, "answered without the backend"
            request = seen.pop(0)
            expected = checksum(*request.head.split(b" ", 2)[:2], request.body)
            assert message.body == (b"" if method == b"HEAD" else expected)
        else:
            assert status in REFUSALS, status
        received = message.rest
    assert not received, f"more answers than requests: {received!r}"


# Requests that are nearly right: about half of them have a flaw, most of those one only.

METHODS = [b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"M-SEARCH", b"get"]
ODD_METHODS = [
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"G T",
    b"",
    b"GET\0",
    b"POST\t",
    b"GET\r",
    b"X" * 300,
    b"G\xe9T",
    b"GET /a\r\n",
]
TARGETS = [
    b"/x",
    b"/x?",
    b"/x?q=1",
    b"/x#f",
    b"/%00",
    b"/%2e%2e/x",
    b"//x",
    b"/a/../b",
    b"/x;y",
    b"http://other/x?q",
    b"/%zz%",
]
ODD_TARGETS = [
    b"*",
    b"",
    b"x",
    b"http://u:p@test/x",
    b"http://",
    b"http:/x",
    b"test:80",
    b"?q",
    b"#",
    b"http://test?q#f",
]
ODD_TARGETS += [
    b"/\xe9",
    b"/\x7f",
    b"/a b",
    b"/a\tb",
    b"/\0",
    b"/\r",
    b'/<>"^`{|}',
    b"\\x",
    b"/" + b"a" * 9000,
    b"http://[::1/x",
]
ODD_TARGETS += [
    b"/x HTTP/1.1\r\nX: y\r\n\r\nGET /canary",
    b"http://test\\x",
    b"file:///x",
    b"/x\xc2\xa0",
    b"HTTP://TEST/x",
]
VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]
ODD_VERSIONS = [
    b"HTTP/0.9",
    b"HTTP/1.2",
    b"HTTP/2.0",
    b"HTTP/9.9",
    b"http/1.1",
    b"HTTP/1",
    b"HTTP/1.1 ",
    b" HTTP/1.1",
    b"",
]
ODD_VERSIONS += [b"HTTP/01.1", b"HTTP/1.1\t", b"HTTP /1.1", b"HTTP/1.1x", b"HTTP/1.10"]
HEADERS = [
    b"X-A: 1",
    b"X-A:2",
    b"X-B: \t3 ",
    b"X-C:",
    b"X_D: 4",
    b"Cookie: a=1",
    b"Connection: close",
    b"Connection: x-a",
]
HEADERS += [b"Connection: host, content-length, transfer-encoding, via", b"Via: 1.1 x", b"TE: trailers", b"X: \xff\xfe"]
HEADERS += [b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: upgrade, http2-settings", b"X-Request-ID: ok-1"]
HEADERS += [b"X-Forwarded-For: 6.6.6.6", b"X-Request-ID: a b", b"Trailer: Host", b"Proxy: evil", b"Keep-Alive: x"]
HEADERS += [b"X: GET /canary HTTP/1.1", b"X: " + b"v" * 9000, b"Connection: keep-alive"]
ODD_HEADERS = [
    b" folded",
    b"\tfolded",
    b"X: a\r\n b",
    b"no colon",
    b": no name",
    b"X Y: 1",
    b"X\0: 1",
    b"X: a\0b",
    b"X: a\rb",
]
ODD_HEADERS += [
    b"X: a\nb: c",
    b"X: \x7f",
    b"X: \x01",
    b"X\xe9: 1",
    b"(X): 1",
    b"X: " + b"v" * 20000,
    b"Host: a b",
    b"Expect: x",
]
ODD_HEADERS += [
    b"Host: test/x",
    b"Host: u@test",
    b"Host: test\0",
    b"Host: test",
    b"Host: other",
    b"Host:",
    b"\0",
    b"\xff",
]
LENGTHS = [
    b"3",
    b"0",
    b"37",
    b"+3",
    b"-3",
    b"3_0",
    b"0x3",
    b"03",
    b"3 ",
    b" 3",
    b"3,3",
    b"3, 3",
    b"3;",
    b"",
    b"1e1",
    b"3.0",
]
LENGTHS += [
    b"\xd9\xa3",
    b"\xb3",
    b"9" * 19,
    b"18446744073709551619",
    b"3\x0b",
    b"3\0",
    b"3 3",
    b"4294967299",
    b"\xef\xbc\x93",
]
CODINGS = [
    b"chunked",
    b"Chunked",
    b"chunked ",
    b"\tchunked",
    b"xchunked",
    b"chunked, identity",
    b"gzip, chunked",
    b"gzip",
]
CODINGS += [
    b"identity",
    b"chunked,chunked",
    b"chunked;q=1",
    b'"chunked"',
    b"chunked\x0b",
    b"",
    b",chunked",
    b"chun\0ked",
]
NAMES = [b"%s", b"%s", b"%s", b"%s ", b" %s", b"%s\t", b"\x0b%s", b"%s\0", b"\xef\xbb\xbf%s", b"X-%s", b"%s\r"]
LENGTH, CODING = b"Content-Length", b"Transfer-Encoding"
ODD_FRAMINGS = [name % LENGTH + b": " + value for name in NAMES for value in LENGTHS]
ODD_FRAMINGS += [name % CODING + b": " + value for name in NAMES for value in CODINGS]
CHUNKED = [
    b"3\r\nabc\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"25\r\n" + CANARY + b"\r\n0\r\n\r\n",
    b"3;x=y\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
]
CHUNKED += [b"3 \r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\nHost: evil\r\n\r\n", b"003\r\nabc\r\n00\r\n\r\n"]
ODD_CHUNKED = [
    b"3\nabc\n0\n\n",
    b"0x3\r\nabc\r\n0\r\n\r\n",
    b"+3\r\nabc\r\n0\r\n\r\n",
    b"g\r\n" + CANARY,
    b"-1\r\n" + CANARY,
]
ODD_CHUNKED += [
    b"2\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabc0\r\n\r\n",
    b"FFFFFFFFFFFFFFFF\r\n" + CANARY,
    b"3\r\nabc\r\n\r\n" + CANARY,
]
ODD_CHUNKED += [b"10000000000000003\r\nabc\r\n0\r\n\r\n", b"\r\n3\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\n\n" + CANARY]
ODD_CHUNKED += [
    b"3\r\nabc\r\n0\r\n: x\r\n\r\n",
    b"3\r\r\nabc\r\n0\r\n\r\n",
    b'3;x="a\nb"\r\nabc\r\n0\r\n\r\n',
    b"3;\0\r\nabc\r\n0\r\n\r\n",
]
ODD_CHUNKED += [
    b"0_3\r\nabc\r\n0\r\n\r\n",
    b"3,\r\nabc\r\n0\r\n\r\n",
    b"0;" + CANARY + b"\r\n\r\n",
    b"3\r\nabc\r\n0\r\nX\0: 1\r\n\r\n",
]
BODIES = [b"", b"abc", CANARY, b"abc" + CANARY, b"0\r\n\r\n" + CANARY, b"x" * 70000]
ODD_ENDS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n", b"\x0b\r\n", b"\xc2\x85"]
FRAMINGS = [(b"", b"")] * 3 + [(b"%s: %d" % (LENGTH, len(body)), body) for body in BODIES]
FRAMINGS += [(CODING + b": chunked", body) for body in CHUNKED]


@st.composite
def requests(draw: Callable[..., Any]) -> bytes:
    """One request out of good and odd parts, and perhaps a good one after it."""

    def pick(good: Any, odd: Any, one_in: int = 12) -> Any:
        return draw(st.sampled_from(odd if draw(st.integers(1, one_in)) == 1 else good))

    def end() -> bytes:
        found: bytes = pick([b"\r\n"], ODD_ENDS, 60)
        return found

    framing, body = draw(st.sampled_from(FRAMINGS))
    lines = [
        pick([b"Host: test"], [b""]),
        framing,
        *(pick(HEADERS, ODD_HEADERS) for _ in range(draw(st.integers(0, 3)))),
    ]
    if draw(st.integers(1, 3)) == 1:
        lines.append(draw(st.sampled_from(ODD_FRAMINGS)))
        body = draw(st.sampled_from([body, *BODIES, *CHUNKED]))
    elif body in CHUNKED:
        body = pick([body], ODD_CHUNKED, 2)
    lines = draw(st.permutations([line for line in lines if line]))
    data = b" ".join([pick(METHODS, ODD_METHODS), pick(TARGETS, ODD_TARGETS), pick(VERSIONS, ODD_VERSIONS)]) + end()
    data += b"".join(line + end() for line in lines) + end() + body
    return data + draw(st.sampled_from([b"", NEXT, CANARY + NEXT]))


GOOD = [
    b"GET /x?a=b HTTP/1.1\r\nHost: test\r\nX-A: 1\r\nCookie: a=1\r\n\r\n" + NEXT,
    b"POST /x HTTP/1.1\r\nHost: test\r\nContent-Length: 37\r\n\r\n" + CANARY + NEXT,
    b"PUT /x HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n25\r\n"
    + CANARY
    + b"\r\n0\r\nX-T: 1\r\n\r\n"
    + NEXT,
    b"HEAD http://test/x HTTP/1.1\r\nHost: test\r\nConnection: close, x-a\r\nX-A: 1\r\n\r\n",
    b"DELETE /x HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc" + NEXT,
]
PIECES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"0",
    b"1",
    b"-",
    b"_",
    b"%",
    b"\x7f",
    b"\x80",
]
PIECES += [
    b"\xff",
    b"chunked",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"HTTP/1.1",
    CANARY,
    b"/",
    b"?",
    b"#",
]


@st.composite
def mutations(draw: Callable[..., Any]) -> bytes:
    """A good request with a few bytes changed, taken out, put in, doubled, or cut off."""
    data = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=3)))
        size = draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["put", "replace", "delete", "double", "cut"]))
        if kind == "put":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "double":
            data = data[: at + size] + data[at : at + size] + data[at + size :]
        elif draw(st.integers(0, 3)) == 0:
            data = data[:at]
    return data


fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@seed(SEED)
@fuzzing
@given(data=requests())
def test_generated_requests(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    probe(balancer, backend, data)


@seed(SEED)
@fuzzing
@given(data=mutations())
def test_mutated_requests(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    probe(balancer, backend, data)
