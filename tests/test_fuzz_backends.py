"""Backends that say anything: generated answers, mutated bytes, and heads, interim answers and trailers without end.

The client gets the answer that a strict reader (`reference.py`) finds in the bytes, or 502 or 504, or one that breaks
off so that it shows; never one that looks whole and is wrong. The next request gets its own answer.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import pytest
from fuzzing import MIB, SEED, fuzzing, mutations, patient, pick_from
from fuzzing import replay as replay
from hypothesis import currently_in_test_context, event, example, given, seed
from hypothesis import strategies as st
from reference import Incomplete, Invalid, Message, response_in
from support import BalancerProcess, connect, ok
from wire import Broken, WireBackend, hang_up, read_response, request, resident_bytes

pytestmark = patient

UPLOAD = b"x" * 300_000  # more than the balancer reads before it sends

serial = count()


@pytest.fixture(scope="module")
def scripted_balancer(scripted: WireBackend) -> Iterator[BalancerProcess]:
    """Time limits that a slow machine keeps; the backend is to be thought of as up."""
    limits = ["--response-timeout=5", "--idle-timeout=5", "--health-timeout=10", "--health-fall=10"]
    with BalancerProcess(f"--backend=only={scripted.url}", *limits) as balancer:
        yield balancer


def probe(balancer: BalancerProcess, backend: WireBackend, method: bytes, data: bytes, end: str) -> None:
    """Answer one request with `data` and `end` (fin, reset, or open: another request may follow), and look at the rest.

    An `open` answer that is not whole would cost its time-out, so those are ended after all.
    """
    lines, number = len(balancer.lines), next(serial)
    wanted = read(data, method)
    if end == "open" and (isinstance(wanted, Incomplete) or lasts_until_end(data, method)):
        end = "fin"

    def script(sock: socket.socket, got: Any) -> None:
        if got.target == b"/fuzz":
            with suppress(OSError):  # refused before it was over
                sock.sendall(data)
            if end != "open":
                hang_up(sock, reset=end == "reset")
        else:
            sock.sendall(ok(got.target))

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/fuzz", method=method))
        is_open = check(stream, method, wanted, end)
        if is_open:
            sock.sendall(request(b"/next-%d" % number))
            check_next(stream, number)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/next-%d" % number))
        check_next(stream, number)
    assert not any("Traceback" in line for line in balancer.lines[lines:])


def read(data: bytes, method: bytes) -> Message | Exception:
    try:
        return response_in(data, method)
    except (Incomplete, Invalid) as error:
        return error


def lasts_until_end(data: bytes, method: bytes) -> bool:
    try:
        response_in(data, method, is_end=False)
    except (Incomplete, Invalid) as error:
        return isinstance(error, Incomplete)
    return False


def probe_upload(balancer: BalancerProcess, backend: WireBackend, data: bytes, end: str) -> None:
    """The answer comes while the client still sends, which is when a backend refuses an upload."""
    lines, number = len(balancer.lines), next(serial)
    wanted = read(data, b"POST")

    def on_head(sock: socket.socket, got: Any) -> bool:
        if got.target == b"/fuzz":
            with suppress(OSError):
                sock.sendall(data)
            if end == "reset":
                hang_up(sock, reset=True)
        return bool(got.target == b"/fuzz")

    backend.script = lambda sock, got: sock.sendall(ok(got.target))
    backend.on_head = on_head
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        with suppress(ConnectionError):  # it may be refused before it is over
            sock.sendall(request(b"/fuzz", b"Content-Length: %d" % len(UPLOAD), method=b"POST") + UPLOAD)
        check(stream, b"POST", wanted, "reset")  # as the upload is not read, the end may be a reset
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/next-%d" % number))
        check_next(stream, number)
    assert not any("Traceback" in line for line in balancer.lines[lines:])


def check(stream: Any, method: bytes, wanted: Message | Exception, end: str) -> bool:
    """Judge what the client got. True if its connection is still good."""
    try:
        status, lines, body = read_response(stream, method)
    except (Broken, ConnectionError) as error:
        count_case(f"broken off, the reference says {type(wanted).__name__}, {end}")
        assert not isinstance(wanted, Message) or end == "reset", f"a good answer broke off: {error}"
        return False
    for name, value in lines:
        assert re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9a-z]+", name) and re.fullmatch(rb"[\t\x20-\x7e\x80-\xff]*", value)
    if status in (502, 504) and (method == b"HEAD" or is_refusal(body)):
        count_case(f"{status}, the reference says {type(wanted).__name__}")
        return True  # it may be more careful than the reference
    count_case(f"passed on, the reference says {type(wanted).__name__}")
    assert isinstance(wanted, Message), f"a bad answer passed for a good one: {status} {body!r}, {wanted!r}"
    assert (b"%d" % status, body) == (wanted.start[0], wanted.body)
    return not any(name == b"connection" and value.lower() == b"close" for name, value in lines)


def count_case(text: str) -> None:
    """For `--hypothesis-show-statistics`."""
    if currently_in_test_context():
        event(text)


def is_refusal(body: bytes) -> bool:
    with suppress(ValueError):
        return "load_balancer_id" in json.loads(body)
    return False


def check_next(stream: Any, number: int) -> None:
    status, _, body = read_response(stream)
    assert (status, body) == (200, b"/next-%d" % number)


# Answers that are nearly right.

STATUSES = [
    b"200 OK", b"200", b"200 ", b"404 Not Found", b"500 x", b"204 No", b"304 Not Modified", b"299 \xe9", b"503 a\tb",
]  # fmt: skip
ODD_STATUSES = [
    b"99 x", b"1000 x", b"-200 OK", b"2 0 0", b"20 OK", b"+200 OK", b"200OK", b"", b" 200 OK", b"0200 OK", b"101 Up",
    b"600 x", b"999 x", b"000 x", b"200 a\0b", b"200 a\rb", b"200 a\nX: b", b"\xb2\xb0\xb0 OK", b"200\tOK",
]  # fmt: skip
VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]
ODD_VERSIONS = [
    b"HTTP/0.9", b"HTTP/2.0", b"http/1.1", b"HTTP/1.2", b"HTTP/1", b"", b"ICY", b"HTTP/11", b"HTTP/1.1\t",
    b" HTTP/1.1",
]  # fmt: skip
HEADERS = [
    b"X-A: 1", b"X-B:", b"X-C: \t2 ", b"Set-Cookie: a=1", b"Set-Cookie: b=2", b"Connection: keep-alive", b"X: \xff",
    b"Connection: close", b"Connection: x-a", b"Keep-Alive: timeout=5", b"Server: x", b"Date: then", b"Upgrade: h2c",
    b"Trailer: X-T", b"Content-Type: text/plain", b"X: " + b"v" * 20000, b"Content-Encoding: gzip", b"Via: 1.1 x",
]  # fmt: skip
ODD_HEADERS = [
    b" folded", b"X: a\r\n b", b"no colon", b": no name", b"X Y: 1", b"X : 1", b"X\0: 1", b"X: a\0b", b"X: a\rb",
    b"\0", b"X: a\nb: c", b"X: \x7f", b"X: \x01", b"X\xe9: 1", b"(X): 1", b"X: " + b"v" * 70000, b"HTTP/1.1 200 OK",
    b"\xff",
]  # fmt: skip
LENGTHS = [
    b"3", b"0", b"30", b"+3", b"-3", b"3_0", b"0x3", b"03", b"3 ", b"3,3", b"3, 4", b"", b"1e1", b"9" * 19, b"3\x0b",
    b"3 3", b"18446744073709551619", b"\xd9\xa3", b"3\0", b"4294967299", b"\xef\xbc\x93",
]  # fmt: skip
CODINGS = [
    b"chunked", b"Chunked", b"xchunked", b"chunked, identity", b"gzip, chunked", b"gzip", b"identity",
    b"chunked,chunked", b"", b",chunked", b"chunked;q=1", b"chunked\x0b", b"chun\0ked", b"chunked ",
]  # fmt: skip
NAMES = [b"%s"] * 9 + [b"%s ", b" %s", b"%s\t", b"\x0b%s", b"%s\0", b"X-%s"]
LENGTH, CODING = b"Content-Length", b"Transfer-Encoding"
ODD_FRAMINGS = [name % LENGTH + b": " + value for name in NAMES for value in LENGTHS]
ODD_FRAMINGS += [name % CODING + b": " + value for name in NAMES for value in CODINGS]
SECOND = ok(b"evil")
CHUNKED = [
    b"3\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n", b"3;x=y\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", b"003\r\nabc\r\n00\r\n\r\n",
    b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"11170\r\n" + b"x" * 70000 + b"\r\n0\r\n\r\n",
]  # fmt: skip
ODD_CHUNKED = [
    b"3\nabc\n0\n\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"+3\r\nabc\r\n0\r\n\r\n", b"g\r\nabc", b"-1\r\nabc",
    b"3\r\nabc\r\n\r\n", b"2\r\nabc\r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"FFFFFFFFFFFFFFFF\r\nabc", b"3\r\nabc\r\n",
    b"3\r\nabc\r\n0\r\n", b"10000000000000003\r\nabc\r\n0\r\n\r\n", b"\r\n3\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabc\r\n0\r\n: x\r\n\r\n", b"3 \r\nabc", b"3\r\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\nX\0: 1\r\n\r\n",
    b"3\r\nabcXX0\r\n\r\n", b"3;\0\r\nabc\r\n0\r\n\r\n",
]  # fmt: skip
BODIES = [b"", b"abc", SECOND, b"x" * 70000]
FRAMINGS = [(b"", b""), (b"", b"abc"), (b"", SECOND)] + [(b"%s: %d" % (LENGTH, len(body)), body) for body in BODIES]
FRAMINGS += [(CODING + b": chunked", body) for body in CHUNKED]
ODD_ENDS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n", b"\x0b\r\n"]
INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 102 \r\n\r\n",
    b"HTTP/1.1 100 x\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.0 100 x\r\nConnection: close\r\n\r\n", b"\r\n",
]  # fmt: skip
ENDINGS = st.sampled_from(["open", "open", "fin", "fin", "reset"])
ASKING = st.sampled_from([b"GET", b"GET", b"GET", b"HEAD", b"POST"])


@st.composite
def answers(draw: Callable[..., Any]) -> bytes:
    """An answer out of good and odd parts, perhaps after interim ones, perhaps with something behind it."""

    pick = partial(pick_from, draw)

    def end() -> bytes:
        found: bytes = pick([b"\r\n"], ODD_ENDS, 60)
        return found

    framing, body = draw(st.sampled_from(FRAMINGS))
    lines = [framing, *(pick(HEADERS, ODD_HEADERS) for _ in range(draw(st.integers(0, 3))))]
    if draw(st.integers(1, 3)) == 1:
        lines.append(draw(st.sampled_from(ODD_FRAMINGS)))
        body = draw(st.sampled_from([body, *BODIES, *CHUNKED]))
    elif body in CHUNKED:
        body = pick([body], ODD_CHUNKED, 2)
    lines = draw(st.permutations([line for line in lines if line]))
    data = b"".join(pick([b""], INTERIM, 8) for _ in range(2))
    data += pick(VERSIONS, ODD_VERSIONS) + b" " + pick(STATUSES, ODD_STATUSES) + end()
    data += b"".join(line + end() for line in lines) + end() + body
    return data + draw(st.sampled_from([b"", b"", b"x", b"\r\n", SECOND, b"\0" * 10]))


GOOD = [
    ok(b"abc", b"X-A: 1", b"Set-Cookie: a=1"),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\nX-T: 1\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    b"HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\nuntil the end",
    b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 3\r\n\r\n",
]  # fmt: skip
PIECES = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"1", b"9", b"-", b"\x7f",
    b"\x80", b"\xff", b"chunked", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1 200 OK\r\n",
    SECOND, INTERIM[0],
]  # fmt: skip


@seed(SEED)
@fuzzing
@given(method=ASKING, data=answers(), end=ENDINGS)
@example(method=b"HEAD", data=b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\n", end="fin")  # found before
@example(method=b"GET", data=b"HTTP/2.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", end="open")
@example(method=b"GET", data=b"HTTP/0.9 200 OK\r\n\r\nabc", end="fin")
def test_generated_answers(
    balancer: BalancerProcess, backend: WireBackend, method: bytes, data: bytes, end: str
) -> None:
    probe(balancer, backend, method, data, end)


@seed(SEED)
@fuzzing
@given(method=ASKING, data=mutations(GOOD, PIECES), end=ENDINGS)
def test_mutated_answers(balancer: BalancerProcess, backend: WireBackend, method: bytes, data: bytes, end: str) -> None:
    probe(balancer, backend, method, data, end)


@seed(SEED)
@fuzzing
@given(
    data=st.one_of(answers(), mutations(GOOD, PIECES), st.sampled_from(GOOD)),
    end=st.sampled_from(["fin", "fin", "reset"]),
)
def test_answers_to_uploads_that_are_not_read(
    balancer: BalancerProcess, backend: WireBackend, data: bytes, end: str
) -> None:
    probe_upload(balancer, backend, data, end)


@pytest.mark.parametrize("data", GOOD)
@pytest.mark.parametrize("end", ["fin", "reset"])
def test_answers_cut_off_after_every_byte(
    balancer: BalancerProcess, backend: WireBackend, data: bytes, end: str
) -> None:
    for length in range(len(data)):
        probe(balancer, backend, b"POST", data[:length], end)


@pytest.mark.parametrize("data", GOOD)
def test_a_good_answer_is_passed_on(balancer: BalancerProcess, backend: WireBackend, data: bytes) -> None:
    """Or the fuzzers above would prove nothing."""
    backend.script = lambda sock, _: (sock.sendall(data), hang_up(sock))[0]
    wanted = response_in(data, b"GET")
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/fuzz"))
        status, _, body = read_response(stream)
    assert (b"%d" % status, body) == (wanted.start[0], wanted.body)


# Without end. Each piece is sent until the balancer hangs up, or 64 MiB have gone; the trickles end by the time limit.

ENDLESS = {
    "a header line": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
    "header lines": (b"HTTP/1.1 200 OK\r\n", b"X-A: 1\r\n" * 400),
    "a reason": (b"HTTP/1.1 200 ", b"x" * 4096),
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100),
    "blank lines": (b"", b"\r\n" * 2000),
    "a trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 4096),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: 1\r\n" * 400),
    "a chunk extension": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;", b"x" * 4096),
    "a chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 4096),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_cut_off(balancer: BalancerProcess, backend: WireBackend, what: str) -> None:
    first, more = ENDLESS[what]
    sent: list[int] = []

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(first)
        while sum(sent) < 64 * MIB:
            sock.sendall(more)
            sent.append(len(more))

    backend.script = script
    before = resident_bytes(balancer.pid)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/fuzz", method=b"POST"))
        try:
            status = read_response(stream)[0]
        except (Broken, ConnectionError):
            status = 0
    assert status in (0, 502)
    assert sum(sent) < 16 * MIB  # what the buffers of two sockets hold, and some more
    assert resident_bytes(balancer.pid) < before + 16 * MIB
    backend.script = lambda sock, got: sock.sendall(ok(got.target))
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/next-0"))
        check_next(stream, 0)
