"""Clients that send anything: generated requests, mutated bytes, broken HTTP/2 frames.

What the backend gets must be what a strict reader (`reference.py`) finds in the bytes, in that order, and nothing else:
no smuggled request, no smuggled header line. The client gets well-formed answers or the end of the connection, in time.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
from fuzzing import EXAMPLES, MIB, SEED, fuzzing, mutations, patient, pick_from
from fuzzing import replay as replay
from hypothesis import event, example, given, seed, settings
from hypothesis import strategies as st
from reference import Message, requests_in, response_in
from support import BalancerProcess, connect, fetch, ok, read_all, wait_until
from wire import WireBackend, resident_bytes

pytestmark = patient

SILENCE = 0.15  # seconds without an answer after which the client ends its side
BOUND = 60.0  # seconds within which the connection must be over then

CANARY = b"GET /canary HTTP/1.1\r\nHost: test\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
REFUSALS = {400, 405, 408, 411, 413, 414, 417, 421, 431, 501, 502, 503, 504, 505, 508}  # a 500 is a finding
ADDED = {b"host", b"content-length", b"transfer-encoding", b"x-request-id", b"via"}


@pytest.fixture(scope="module")
def scripted_balancer(scripted: WireBackend) -> Iterator[BalancerProcess]:
    """Small limits for clients; long ones for the backend, which is to be thought of as up on a slow machine too."""
    balancer = BalancerProcess(
        f"--backend=only={scripted.url}",
        "--health-timeout=10",
        "--health-fall=10",
        "--response-timeout=10",
        "--idle-timeout=3",
        "--header-timeout=2",
        "--max-request-body=1000000",
        "--max-header-bytes=16384",
    )
    yield balancer
    balancer.stop()


def answer(sock: socket.socket, request: Any) -> None:
    """A checksum of what came, so that an answer can be told from that to another request."""
    method, target, _ = request.head.split(b" ", 2)
    digest = checksum(method, target, request.body)
    data = ok(digest)
    sock.sendall(data[: -len(digest)] if method == b"HEAD" else data)


def checksum(method: bytes, target: bytes, body: bytes) -> bytes:
    return hashlib.sha256(b"%s %s\n%s" % (method, target, body)).hexdigest().encode()


def talk(port: int, data: bytes) -> tuple[bytes, bool]:
    """(all that comes back, True if the client had to end it). Fails if the connection does not end in time."""
    received, was_silent = b"", False
    with connect(port) as sock, suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(data)
        sock.settimeout(SILENCE)
        while True:
            try:
                chunk = sock.recv(65536)
            except TimeoutError:
                if was_silent:
                    raise AssertionError(f"the connection did not end within {BOUND} s") from None
                was_silent = True
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(BOUND)
                continue
            if not chunk:
                break
            received += chunk
    return received, was_silent


def exchange(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> bytes:
    """What comes back for `data`; the backend then has everything that it will get."""
    backend.requests.clear()
    backend.broken.clear()
    backend.script = answer
    received, was_silent = talk(balancer.port, data)
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0, "the request has ended")
    if was_silent or b"chunked" in data.lower() or data.startswith(PREFACE):
        backend.drop_connections()  # the balancer may have given up what the backend still reads
    return received


def probe(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    """Send `data`, and hold what came of it on both sides against the reference."""
    balancer_lines = len(balancer.lines)
    received = exchange(balancer, backend, data)
    wanted, rest = requests_in(data)
    event(f"{len(backend.requests)} requests and {len(backend.broken)} broken ones at the backend")
    event("answered " + (received.split(b" ", 2)[1].decode() if received else "with nothing"))
    check_backend(backend, wanted, rest)
    methods = [message.start[0] for message in wanted] + [rest.lstrip(b"\r\n").partition(b" ")[0]]
    if not data.startswith(b"PRI * HTTP/2.0"):
        check_answers(received, methods, backend)
    assert b"Traceback" not in received
    assert not any("Traceback" in line for line in balancer.lines[balancer_lines:])
    check_good(balancer)


def check_good(balancer: BalancerProcess) -> None:
    """Whatever came before, the next client is served."""
    status, _, body = fetch(f"{balancer.url}/good")
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
        method, target, lines = read_strictly(request.head)
        check_framing(lines)
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


def check_framing(lines: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in lines]
    assert names.count(b"host") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1


def check_lines(lines: list[tuple[bytes, bytes]], sent: Message) -> None:
    check_framing(lines)
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
    b"TRACE", b"CONNECT", b"PRI", b"G T", b"", b"GET\0", b"POST\t", b"GET\r", b"X" * 300, b"G\xe9T", b"GET /a\r\n",
]  # fmt: skip
TARGETS = [
    b"/x", b"/x?", b"/x?q=1", b"/x#f", b"/%00", b"/%2e%2e/x", b"//x", b"/a/../b", b"/x;y", b"http://other/x?q",
    b"/%zz%",
]  # fmt: skip
ODD_TARGETS = [
    b"*", b"", b"x", b"http://u:p@test/x", b"http://", b"http:/x", b"test:80", b"?q", b"#", b"http://test?q#f",
    b"/\xe9", b"/\x7f", b"/a b", b"/a\tb", b"/\0", b"/\r", b'/<>"^`{|}', b"\\x", b"/" + b"a" * 9000, b"http://[::1/x",
    b"/x HTTP/1.1\r\nX: y\r\n\r\nGET /canary", b"http://test\\x", b"file:///x", b"/x\xc2\xa0", b"HTTP://TEST/x",
]  # fmt: skip
VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]
ODD_VERSIONS = [
    b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b"HTTP/1", b"HTTP/1.1 ", b" HTTP/1.1", b"",
    b"HTTP/01.1", b"HTTP/1.1\t", b"HTTP /1.1", b"HTTP/1.1x", b"HTTP/1.10",
]  # fmt: skip
HEADERS = [
    b"X-A: 1", b"X-A:2", b"X-B: \t3 ", b"X-C:", b"X_D: 4", b"Cookie: a=1", b"Connection: close", b"Connection: x-a",
    b"Connection: host, content-length, transfer-encoding, via", b"Via: 1.1 x", b"TE: trailers", b"X: \xff\xfe",
    b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: upgrade, http2-settings", b"X-Request-ID: ok-1",
    b"X-Forwarded-For: 6.6.6.6", b"X-Request-ID: a b", b"Trailer: Host", b"Proxy: evil", b"Keep-Alive: x",
    b"X: GET /canary HTTP/1.1", b"X: " + b"v" * 9000, b"Connection: keep-alive",
]  # fmt: skip
ODD_HEADERS = [
    b" folded", b"\tfolded", b"X: a\r\n b", b"no colon", b": no name", b"X Y: 1", b"X\0: 1", b"X: a\0b", b"X: a\rb",
    b"X: a\nb: c", b"X: \x7f", b"X: \x01", b"X\xe9: 1", b"(X): 1", b"X: " + b"v" * 20000, b"Host: a b", b"Expect: x",
    b"Host: test/x", b"Host: u@test", b"Host: test\0", b"Host: test", b"Host: other", b"Host:", b"\0", b"\xff",
]  # fmt: skip
LENGTHS = [
    b"3", b"0", b"37", b"+3", b"-3", b"3_0", b"0x3", b"03", b"3 ", b" 3", b"3,3", b"3, 3", b"3;", b"", b"1e1", b"3.0",
    b"\xd9\xa3", b"\xb3", b"9" * 19, b"18446744073709551619", b"3\x0b", b"3\0", b"3 3", b"4294967299",
    b"\xef\xbc\x93",
]  # fmt: skip
CODINGS = [
    b"chunked", b"Chunked", b"chunked ", b"\tchunked", b"xchunked", b"chunked, identity", b"gzip, chunked", b"gzip",
    b"identity", b"chunked,chunked", b"chunked;q=1", b'"chunked"', b"chunked\x0b", b"", b",chunked", b"chun\0ked",
]  # fmt: skip
NAMES = [b"%s"] * 9 + [b"%s ", b" %s", b"%s\t", b"\x0b%s", b"%s\0", b"\xef\xbb\xbf%s", b"X-%s", b"%s\r"]
LENGTH, CODING = b"Content-Length", b"Transfer-Encoding"
ODD_FRAMINGS = [name % LENGTH + b": " + value for name in NAMES for value in LENGTHS]
ODD_FRAMINGS += [name % CODING + b": " + value for name in NAMES for value in CODINGS]
CHUNKED = [
    b"3\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n", b"25\r\n" + CANARY + b"\r\n0\r\n\r\n",
    b"3;x=y\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\nHost: evil\r\n\r\n",
    b"003\r\nabc\r\n00\r\n\r\n",
]  # fmt: skip
ODD_CHUNKED = [
    b"3\nabc\n0\n\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"+3\r\nabc\r\n0\r\n\r\n", b"g\r\n" + CANARY, b"-1\r\n" + CANARY,
    b"2\r\nabc\r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"FFFFFFFFFFFFFFFF\r\n" + CANARY, b"3\r\nabc\r\n\r\n" + CANARY,
    b"10000000000000003\r\nabc\r\n0\r\n\r\n", b"\r\n3\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\n\n" + CANARY,
    b"3\r\nabc\r\n0\r\n: x\r\n\r\n", b"3\r\r\nabc\r\n0\r\n\r\n", b'3;x="a\nb"\r\nabc\r\n0\r\n\r\n',
    b"3;\0\r\nabc\r\n0\r\n\r\n", b"0_3\r\nabc\r\n0\r\n\r\n", b"3,\r\nabc\r\n0\r\n\r\n", b"0;" + CANARY + b"\r\n\r\n",
    b"3\r\nabc\r\n0\r\nX\0: 1\r\n\r\n",
]  # fmt: skip
BODIES = [b"", b"abc", CANARY, b"abc" + CANARY, b"0\r\n\r\n" + CANARY, b"x" * 70000]
ODD_ENDS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n", b"\x0b\r\n", b"\xc2\x85"]
FRAMINGS = [(b"", b"")] * 3 + [(b"%s: %d" % (LENGTH, len(body)), body) for body in BODIES]
FRAMINGS += [(CODING + b": chunked", body) for body in CHUNKED]


@st.composite
def requests(draw: Callable[..., Any]) -> bytes:
    """One request out of good and odd parts, and perhaps a good one after it."""

    pick = partial(pick_from, draw)

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
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"1", b"-", b"_", b"%", b"\x7f",
    b"\x80", b"\xff", b"chunked", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", CANARY,
    b"/", b"?", b"#",
]  # fmt: skip


@seed(SEED)
@fuzzing
@given(data=requests())
@example(data=b"POST /x HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n" + NEXT)  # found before
@example(data=b"GET /x HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n" + NEXT)
def test_generated_requests(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    probe(balancer, backend, data)


@seed(SEED)
@fuzzing
@given(data=mutations(GOOD, PIECES))
def test_mutated_requests(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    probe(balancer, backend, data)


@pytest.mark.parametrize("data", GOOD)
def test_requests_cut_off_after_every_byte(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    """All of them at once, each on a connection of its own, which the client then ends on its side."""
    backend.script = answer
    wanted, _ = requests_in(data)
    starts = [message.start for message in wanted]
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(balancer.port)) for _ in data]
        for length, sock in enumerate(sockets):
            sock.sendall(data[:length])
            sock.shutdown(socket.SHUT_WR)
        for sock in sockets:
            read_all(sock)  # `connect` has given each 10 s
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0)
    for request in backend.requests:
        method, target, _ = read_strictly(request.head)
        assert (method, target) in starts
        assert request.body == next(message.body for message in wanted if message.start == (method, target))
    assert "Traceback" not in balancer.output


# Without end: each piece is sent until the balancer hangs up; what it must not do is read on and on, or keep it.

CHUNKED_POST = b"POST /x HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "nothing but line ends": (b"", b"\r\n" * 2000),
    "a method": (b"", b"X" * 4096),
    "a target": (b"GET /", b"x" * 4096),
    "a header line": (b"GET /x HTTP/1.1\r\nX: ", b"x" * 4096),
    "header lines": (b"GET /x HTTP/1.1\r\nHost: test\r\n", b"X-A: 1\r\n" * 500),
    "a chunk size": (CHUNKED_POST, b"0" * 4096),
    "a chunk extension": (CHUNKED_POST + b"3;", b"x" * 4096),
    "chunk extensions": (CHUNKED_POST, b"1;" + b"x" * 4000 + b"\r\na\r\n"),
    "a trailer": (CHUNKED_POST + b"0\r\nX: ", b"x" * 4096),
    "trailers": (CHUNKED_POST + b"0\r\n", b"X-A: 1\r\n" * 500),
    "HTTP/2 settings": (PREFACE, b"\0\0\0\4\0\0\0\0\0" * 400),
    "HTTP/2 pings": (PREFACE, b"\0\0\x08\6\0\0\0\0\0" + b"x" * 8),
    "HTTP/2 header blocks": (PREFACE + b"\0\0\1\1\0\0\0\0\1\x82", b"\0\x0f\xa0\x09\0\0\0\0\1" + b"\0\1x\1y" * 800),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_cut_off(balancer: BalancerProcess, backend: WireBackend, what: str) -> None:
    first, more = ENDLESS[what]
    before, deadline, is_over = resident_bytes(balancer.pid), time.monotonic() + BOUND, False
    with connect(balancer.port) as sock:
        sock.settimeout(2)  # that it reads no further is as good
        try:
            sock.sendall(first)
            while time.monotonic() < deadline:
                sock.sendall(more)
        except OSError:
            is_over = True
    assert is_over, "the balancer reads on and on"
    assert resident_bytes(balancer.pid) < before + 16 * MIB
    backend.script = answer
    check_good(balancer)
    assert not [request for request in backend.requests if request.target != b"/good"]


# HTTP/2: good requests, frame by frame, with an odd one put in, or with bytes changed.


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header line in HPACK, neither indexed nor compressed."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


GET_BLOCK, POST_BLOCK = b"\x82\x86\x84\x41\x04test", b"\x83\x86\x44\x02/x\x41\x04test"
ODD_LINES = [
    literal(b"a", b"1\r\nGET /canary"), literal(b"transfer-encoding", b"chunked"), literal(b"Host", b"x"),
    literal(b"content-length", b"37"), literal(b"content-length", b"+0"), literal(b"connection", b"close"), b"\x82",
    literal(b":path", b"/canary"), literal(b"a\r\nb", b"1"), literal(b"a b", b"1"), literal(b"", b"1"), b"\x80",
    literal(b"host", b"other"), literal(b"te", b"trailers"), literal(b"x\0", b"1"), literal(b"x", b"\0"), b"\xff" * 9,
    literal(b"upgrade", b"h2c"), literal(b"x_y", b"1"), literal(b"via", b"x"), literal(b":x", b"1"),
    b"\x3f\xe1\xff\x7f",
]  # fmt: skip
ODD_BLOCKS = [
    literal(b":method", method) + b"\x86\x84\x41\x04test" for method in (b"GET /", b"", b"CONNECT", b"G\r\nT")
]
ODD_BLOCKS += [
    b"\x82\x86" + literal(b":path", path) + b"\x41\x04test" for path in (b"", b"x", b"/x\r\nGET /canary", b"/ b")
]
ODD_BLOCKS += [
    b"\x82\x86\x84" + literal(b":authority", host) for host in (b"", b"a b", b"u@test", b"test\0", b"a\r\nX: y")
]
ODD_BLOCKS += [
    b"\x82\x86" + literal(b":path", path) + b"\x41\x04test" for path in (b"/\xe9", b"*", b"http://other/", b"/#f")
]
ODD_BLOCKS += [
    b"", b"\x82", b"\x86\x84\x41\x04test", literal(b"x", b"1") + GET_BLOCK, *(GET_BLOCK + line for line in ODD_LINES),
]  # fmt: skip
PAYLOADS = [
    b"", b"\0\0\0\1", b"\0\0\0\0", b"\0\3\0\0\0\x64", b"\0\4\xff\xff\xff\xff", b"\0\2\0\0\0\2", b"\xff" * 9, b"x" * 8,
    b"\0\0\0\0\0\0\0\x08", b"\x80\0\0\1\xff", CANARY, b"\x05abc", b"\0\0\0\1\0", b"\0\1\0\0\0\0", GET_BLOCK,
]  # fmt: skip


@st.composite
def frames(draw: Callable[..., Any]) -> bytes:
    """Requests on a connection of HTTP/2, most of them good."""
    found = []
    for stream in range(1, 2 * draw(st.integers(1, 4)), 2):
        block = draw(st.sampled_from([GET_BLOCK, GET_BLOCK, POST_BLOCK, draw(st.sampled_from(ODD_BLOCKS))]))
        kind = draw(st.sampled_from(["whole", "whole", "body", "continued", "trailers"]))
        if kind == "whole":
            found += [frame(1, 5, stream, block)]
        elif kind == "continued":
            found += [frame(1, 1, stream, block[:3]), frame(9, 4, stream, block[3:])]
        else:
            found += [frame(1, 4, stream, block), frame(0, 0, stream, b"abc"), frame(0, 0, stream, CANARY)]
            found += [frame(0, 1, stream, b"") if kind == "body" else frame(1, 5, stream, literal(b"host", b"evil"))]
    if draw(st.booleans()):
        kind, flags = draw(st.sampled_from([*range(10), 0xFF])), draw(st.sampled_from([0, 1, 4, 5, 0x2D, 0xFF]))
        payload = draw(st.one_of(st.sampled_from(PAYLOADS), st.binary(max_size=20)))
        length = draw(st.sampled_from([None] * 5 + [0, len(payload) + 1, 16385, 2**24 - 1]))
        stream = draw(st.sampled_from([0, 1, 1, 3, 5, 2, 2**31 - 1, 2**31 + 1]))
        found.insert(draw(st.integers(0, len(found))), frame(kind, flags, stream, payload, length))
    data = b"".join(found)
    if draw(st.integers(1, 4)) == 1:
        at, piece = draw(st.integers(0, len(data))), draw(st.binary(min_size=1, max_size=2))
        data = data[:at] + piece + data[at + draw(st.integers(0, 2)) :]
    return PREFACE + frame(4, 0, 0, b"") + data + frame(7, 0, 0, bytes(8))  # GOAWAY: no need to wait for more


@seed(SEED)
@settings(fuzzing, max_examples=EXAMPLES // 2)  # the slowest
@given(data=frames())
def test_http2_frames(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    """The connection ends in time, and what gets through is one sane request after another."""
    lines = len(balancer.lines)
    exchange(balancer, backend, data)
    event(f"{len(backend.requests)} requests and {len(backend.broken)} broken ones at the backend")
    for request in backend.requests + backend.broken:
        method, target, fields = read_strictly(request.head)
        assert method in (b"GET", b"POST") and target in (b"/", b"/x"), request.head
        check_framing(fields)
    assert not any("Traceback" in line for line in balancer.lines[lines:])
    check_good(balancer)
