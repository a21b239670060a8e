"""HTTP/2 without TLS (prior knowledge): through curl and h2load, and frame by frame where those are too well-behaved.

RFC 9113 is "H". What a client could smuggle into the HTTP/1.1 request behind us is the interesting part.
"""

from __future__ import annotations

import hashlib
import re
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import Balancer, is_idle, ok, wait_until
from wire import WireBackend, hang_up, wait_closed

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = 8
INITIAL_WINDOW_SIZE, WINDOW = 4, 65535  # a setting; its value until it is set, and of the connection (H 6.9.2)
FRAME = 16384  # bytes of a frame at most, unless the other side allows more
Pairs = list[tuple[bytes, bytes]]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, timeout=50, check=True)
    return done.stdout.decode("latin-1")


def curl(balancer: Balancer, *arguments: str, path: str = "/") -> tuple[int, str]:
    """(status, body), over HTTP/2 for sure."""
    command = ["curl", "-sS", "--http2-prior-knowledge", "-w", "\n%{http_code} %{http_version}", *arguments]
    output = run(*command, balancer.url + path)
    body, _, last = output.rpartition("\n")
    status, version = last.split()
    assert version == "2"
    return int(status), body


class Stream:
    """What came on one stream."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.body = b""
        self.is_ended = False
        self.reset_code: int | None = None

    @property
    def is_over(self) -> bool:
        return self.is_ended or self.reset_code is not None


class Client:
    """Sends frames as it is told; header names and values are literals, so that anything can be put into them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._input = sock.makefile("rb")
        self.streams: dict[int, Stream] = {}
        self._initial = WINDOW
        self._windows = {0: WINDOW}  # what may be sent on each stream, and on all of them together (0)
        self._pongs = 0
        self.is_closed = self.is_told_to_go = False
        settings = b"\0\1" + (0).to_bytes(4, "big") + b"\0\4" + (2**24).to_bytes(4, "big")  # no table, a large window
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))

    def close(self) -> None:
        self._input.close()

    def request(self, stream: int, *extra: tuple[bytes, bytes], method: bytes = b"GET", end: bool = True) -> None:
        """Pseudo-header fields in `extra` take the place of the usual ones; others follow."""
        pseudo = {b":method": method, b":scheme": b"http", b":path": b"/", b":authority": b"test"}
        pseudo |= {name: value for name, value in extra if name.startswith(b":")}
        fields = [(name, value) for name, value in pseudo.items() if value]
        self.fields(stream, fields + [line for line in extra if not line[0].startswith(b":")], end=end)

    def fields(self, stream: int, fields: Pairs, *, end: bool = True) -> None:
        self.streams.setdefault(stream, Stream())
        self._windows.setdefault(stream, self._initial)
        block = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)
        self._send(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)

    def data(self, stream: int, data: bytes, *, end: bool = True) -> None:
        self._windows[0] -= len(data)
        self._windows[stream] -= len(data)
        self._send(DATA, END_STREAM if end else 0, stream, data)

    def upload(self, stream: int, what: int | bytes, *, patience: float = 10) -> int:
        """Send this, or zeros, without END_STREAM, as the windows allow it (H 5.2). Returns how many bytes could
        not be sent, because nothing came for `patience` seconds that allows more."""
        left = memoryview(bytes(what))
        while left and (most := min(len(left), FRAME, self._room(stream, patience))):
            self.data(stream, bytes(left[:most]), end=False)
            left = left[most:]
        return len(left)

    def _room(self, stream: int, patience: float) -> int:
        """What may be sent on it now, or within `patience` seconds."""
        deadline = time.monotonic() + patience
        while not (self.is_closed or self.streams[stream].is_over):
            if (room := min(self._windows[0], self._windows[stream])) > 0:
                return room
            if time.monotonic() > deadline:
                break
            self.sync()
            select.select([self._sock], [], [], 0.001)  # not as fast as it can be asked for
        return 0

    def sync(self) -> None:
        """Read what has come: all frames until the answer to a PING."""
        awaited = self._pongs + 1
        self._send(PING, 0, 0, bytes(8))
        while self._pongs < awaited and not self.is_closed:
            self._read_frame()

    def raw(self, data: bytes) -> None:
        """Frames as they are."""
        self._sock.sendall(data)

    def cancel(self, stream: int) -> None:
        self._send(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        try:
            self._sock.sendall(frame(kind, flags, stream, payload))
        except OSError:
            self.is_closed = True

    def begin(self, stream: int) -> None:
        """Read until the head of this stream's answer is here."""
        found = self.streams[stream]
        while not (found.status or found.is_over or self.is_closed):
            self._read_frame()

    def finish(self, stream: int) -> Stream:
        """Read until this stream, or the connection, is over."""
        found = self.streams[stream]
        while not (found.is_over or self.is_closed):
            self._read_frame()
        return found

    def read_to_end(self) -> None:
        while not self.is_closed:
            self._read_frame()

    def _read_frame(self) -> None:
        try:
            head = self._input.read(9)
            size = int.from_bytes(head[:3], "big")
            payload = self._input.read(size)
        except ConnectionResetError:
            head = b""
        if len(head) < 9:
            self.is_closed = True
            return
        kind, flags, stream = head[3], head[4], self.streams.setdefault(int.from_bytes(head[5:9], "big"), Stream())
        if kind == HEADERS:
            stream.status = stream.status or _status(payload)
        elif kind == DATA:
            stream.body += payload
        elif kind == RST_STREAM:
            stream.reset_code = int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self.is_told_to_go = True
        elif kind == WINDOW_UPDATE:
            self._windows[int.from_bytes(head[5:9], "big")] += int.from_bytes(payload, "big")
        elif kind == PING and flags & ACK:
            self._pongs += 1
        elif kind in (SETTINGS, PING) and not flags & ACK:
            if kind == SETTINGS:
                self._apply(payload)
            self._send(kind, ACK, 0, payload if kind == PING else b"")
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            stream.is_ended = True

    def _apply(self, settings: bytes) -> None:
        for at in range(0, len(settings), 6):
            if int.from_bytes(settings[at : at + 2], "big") == INITIAL_WINDOW_SIZE:
                before, self._initial = self._initial, int.from_bytes(settings[at + 2 : at + 6], "big")
                for stream in self._windows.keys() - {0}:
                    self._windows[stream] += self._initial - before


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _string(text: bytes) -> bytes:
    """A string literal of RFC 7541 section 5.2, not Huffman-coded."""
    size, head = len(text), bytes([min(len(text), 127)])
    if size >= 127:
        size -= 127
        while size >= 128:
            head += bytes([size % 128 + 128])
            size //= 128
        head += bytes([size])
    return head + text


STATIC_STATUSES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
HUFFMAN_DIGITS = {"00000": 0, "00001": 1, "00010": 2} | {f"{0b011001 + n:06b}": 3 + n for n in range(7)}


def _status(block: bytes) -> int:
    """`:status` is the first field; an update of the table size may stand before it."""
    while block[0] & 0xE0 == 0x20:
        block = block[1:]
    if block[0] & 0x80:
        return STATIC_STATUSES[block[0] & 0x7F]
    text = block[2 : 2 + (block[1] & 0x7F)]
    if not block[1] & 0x80:
        return int(text)
    bits, digits = f"{int.from_bytes(text, 'big'):0{8 * len(text)}b}", ""
    while len(digits) < 3:
        size = 5 if bits[:5] in HUFFMAN_DIGITS else 6
        digits, bits = digits + str(HUFFMAN_DIGITS[bits[:size]]), bits[size:]
    return int(digits)


@contextmanager
def client(balancer: Balancer) -> Iterator[Client]:
    with socket.create_connection(("127.0.0.1", balancer.port), timeout=60) as sock:
        connected = Client(sock)
        try:
            yield connected
        finally:
            connected.close()


# What ordinary clients do.


def test_get(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.3.1: :authority becomes Host; Via names version 2; the target is kept; HTTP/1.1 to the backend."""
    backend.answer(ok(b"hello", b"X-Many: 2", b"X-Many: 1"))
    status, output = curl(balancer, "-i", path="/a%2Fb;c?d=%20")
    assert status == 200 and output.endswith("hello")
    assert re.findall(r"x-many: (\d)", output) == ["2", "1"]
    (got,) = backend.requests
    assert got.head.startswith(b"GET /a%2Fb;c?d=%20 HTTP/1.1\r\n")
    assert got.values(b"host") == [f"127.0.0.1:{balancer.port}".encode()]
    assert re.fullmatch(rb"2 lb-1\.[0-9a-f]+", got.values(b"via")[0])
    assert not got.values(b"content-length") + got.values(b"transfer-encoding") + got.values(b"connection")
    assert not [name for name, _ in got.lines if name.startswith(b":")]


def test_post_with_content_length(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.1.1."""
    assert curl(balancer, "-d", "name=value")[0] == 200
    (got,) = backend.requests
    assert (got.body, got.values(b"content-length")) == (b"name=value", [b"10"])
    assert not got.values(b"transfer-encoding")


@pytest.mark.parametrize("pieces", [[b"abc"], [b"abc", b"def", b""], [b"", b"abc"], [b"x" * 16_000] * 3])
def test_post_without_content_length(balancer: Balancer, backend: WireBackend, pieces: list[bytes]) -> None:
    """H 8.1: the end of the stream ends the body; to the backend it goes as chunks."""
    with client(balancer) as h2:
        h2.request(1, method=b"POST", end=False)
        for piece in pieces[:-1]:
            h2.data(1, piece, end=False)
        h2.data(1, pieces[-1])
        assert h2.finish(1).status == 200
    (got,) = backend.requests
    assert (got.body, got.values(b"transfer-encoding")) == (b"".join(pieces), [b"chunked"])


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"GET", b"DELETE"])
@pytest.mark.parametrize("by_data", [False, True])
def test_an_empty_body_without_content_length(
    balancer: Balancer, backend: WireBackend, method: bytes, by_data: bool
) -> None:
    """H 8.1: no body at all, so it can be retried and is not sent as chunks."""
    with client(balancer) as h2:
        h2.request(1, method=method, end=not by_data)
        if by_data:
            h2.data(1, b"")
        assert h2.finish(1).status == 200
    (got,) = backend.requests
    assert got.body == b""
    assert not got.values(b"transfer-encoding")


@pytest.mark.parametrize(("count", "other", "status"), [(120, 0, 200), (120, 110, 431)])
def test_cookie_crumbs_count_as_the_one_line_that_they_become(
    balancer: Balancer, backend: WireBackend, count: int, other: int, status: int
) -> None:
    """H 8.2.3: browsers split cookies, so that HPACK can know each."""
    crumbs = [(b"cookie", b"name-%d=%d" % (number, number)) for number in range(count)]
    with client(balancer) as h2:
        h2.request(1, *crumbs, *((b"x-%d" % number, b"1") for number in range(other)))
        assert h2.finish(1).status == status
    cookies = [b"; ".join(value for _, value in crumbs)]
    assert [got.values(b"cookie") for got in backend.requests] == ([cookies] if status == 200 else [])


def test_many_streams_at_once(balancer: Balancer, backend: WireBackend) -> None:
    """H 5.1.2: 2,000 requests, 32 at a time on each of 4 connections; none fails, all are counted."""
    before = balancer.status()["statistics"]["total_requests"]
    output = run("h2load", "-n", "2000", "-c", "4", "-m", "32", f"{balancer.url}/load")
    assert "2000 succeeded, 0 failed, 0 errored" in output and "2000 2xx" in output
    wait_until(lambda: is_idle(balancer))
    assert balancer.status()["statistics"]["total_requests"] == before + 2000


def test_streams_do_not_wait_for_each_other(balancer: Balancer, backend: WireBackend) -> None:
    """H 5: the second request of a connection is answered while the first still waits."""
    second_done = threading.Event()

    def script(sock: socket.socket, got: Any) -> None:
        if got.target == b"/first":
            assert second_done.wait(60)
        sock.sendall(ok(got.target))

    backend.script = script
    with client(balancer) as h2:
        h2.request(1, (b":path", b"/first"))
        wait_until(lambda: backend.requests)
        h2.request(3, (b":path", b"/second"))
        assert h2.finish(3).body == b"/second"
        assert not h2.streams[1].is_over
        second_done.set()
        assert h2.finish(1).body == b"/first"


def test_large_bodies_both_ways(balancer: Balancer, backend: WireBackend, tmp_path: Path) -> None:
    """H 5.2: flow control; a million bytes up (the limit of this balancer), 16 MiB down."""
    body = b"0123456789" * 100_000
    (tmp_path / "body").write_bytes(body)
    answer = b"y" * (16 * 1024 * 1024)
    backend.answer(ok(answer))
    assert curl(balancer, "--data-binary", f"@{tmp_path}/body", "-o", f"{tmp_path}/answer")[0] == 200
    assert backend.requests[0].body == body
    got = (tmp_path / "answer").read_bytes()
    assert hashlib.sha256(got).digest() == hashlib.sha256(answer).digest()


@pytest.mark.parametrize(
    ("method", "answer", "status"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", 200),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", 304),
        (b"GET", b"garbage\r\n\r\n", 502),
    ],
)
def test_statuses(balancer: Balancer, backend: WireBackend, method: bytes, answer: bytes, status: int) -> None:
    """H 8.1: the stream ends properly, and the next one works."""
    backend.answer(answer)
    with client(balancer) as h2:
        h2.request(1, method=method)
        found = h2.finish(1)
        assert (found.status, found.is_ended) == (status, True)
        backend.answer(ok(b"next"))
        h2.request(3)
        assert h2.finish(3).body == b"next"


def test_413(balancer: Balancer, backend: WireBackend) -> None:
    """S 15.5.14: by Content-Length, and by what has come."""
    with client(balancer) as h2:
        h2.request(1, (b"content-length", b"1000001"), method=b"POST", end=False)
        assert h2.finish(1).status == 413
    assert backend.seen == 0


def test_431(balancer: Balancer, backend: WireBackend) -> None:
    """RFC 6585 section 5, or an error of the stream or connection (H 10.5.1)."""
    with client(balancer) as h2:
        h2.request(1, *[(b"x-%d" % number, b"a" * 100) for number in range(150)])
        found = h2.finish(1)
        assert found.status == 431 or (found.status is None and (found.is_over or h2.is_closed))
    assert backend.seen == 0


def test_trailers_are_discarded(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.1 and S 6.5.1."""
    with client(balancer) as h2:
        h2.request(1, (b"te", b"trailers"), method=b"POST", end=False)
        h2.data(1, b"abc", end=False)
        h2.fields(1, [(b"x-trailer", b"1"), (b"host", b"evil")])
        assert h2.finish(1).status == 200
    (got,) = backend.requests
    assert got.body == b"abc"
    assert not got.values(b"x-trailer") + got.values(b"te")
    assert got.values(b"host") == [b"test"]


# What must not get through: HTTP/2 fields can hold what would be another request in HTTP/1.1.

SMUGGLING = {
    "line end in value": [(b"x-a", b"1\r\nX-Evil: 1")],
    "line feed in value": [(b"x-a", b"1\nX-Evil: 1")],
    "NUL in value": [(b"x-a", b"1\x002")],
    "line end in name": [(b"x-a: 1\r\nx-evil", b"1")],
    "colon in name": [(b"x-a:x-evil", b"1")],
    "blank in name": [(b"x-a ", b"1")],
    "empty name": [(b"", b"1")],
    "capitals in name": [(b"X-Evil", b"1")],
    "line end in path": [(b":path", b"/ HTTP/1.1\r\nX-Evil: 1\r\n\r\n")],
    "blank in path": [(b":path", b"/a /evil")],
    "no path": [(b":path", b"")],
    "relative path": [(b":path", b"evil")],
    "blank in method": [(b":method", b"GET /evil HTTP/1.1")],
    "line end in method": [(b":method", b"GET / HTTP/1.1\r\nX-Evil: 1\r\n\r\nGET")],
    "line end in authority": [(b":authority", b"test\r\nX-Evil: 1")],
    "user info in authority": [(b":authority", b"user@test")],
    "no authority and no host": [(b":authority", b"")],
    "two hosts": [(b":authority", b""), (b"host", b"a"), (b"host", b"b")],
    "transfer-encoding": [(b"transfer-encoding", b"chunked")],
    "connection": [(b"connection", b"close")],
    "upgrade": [(b"upgrade", b"websocket")],
    "te other than trailers": [(b"te", b"gzip")],
    "unknown pseudo-header": [(b":evil", b"1")],
    "CONNECT": [(b":method", b"CONNECT")],
    "TRACE": [(b":method", b"TRACE")],
    "length no number": [(b"content-length", b"+3")],
    "lengths differ": [(b"content-length", b"3"), (b"content-length", b"4")],
}


@pytest.mark.parametrize("fields", SMUGGLING.values(), ids=SMUGGLING)
def test_malformed_requests_do_not_reach_the_backend(balancer: Balancer, backend: WireBackend, fields: Pairs) -> None:
    """H 8.1.1, 8.2, 8.2.1, 8.2.2, 8.3: refused with a 4xx, or by an error of the stream or the connection."""
    with client(balancer) as h2:
        h2.request(1, *fields, method=b"POST", end=False)
        h2.data(1, b"abc")
        found = h2.finish(1)
    assert found.status is None or 400 <= found.status < 500 or found.status == 501
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []


@pytest.mark.parametrize("body", [b"", b"ab", b"abcdef", b"abcGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n"])
def test_a_length_that_lies_does_not_reach_the_backend(balancer: Balancer, backend: WireBackend, body: bytes) -> None:
    """H 8.1.1: Content-Length that is not the sum of the DATA frames; nothing complete goes on, nothing is smuggled."""
    with client(balancer) as h2:
        h2.request(1, (b"content-length", b"3"), method=b"POST", end=False)
        h2.data(1, body)
        found = h2.finish(1)
    assert found.status is None or found.status >= 400
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []


@pytest.mark.parametrize("length", [0, 3, 50_000, 100_000])
@pytest.mark.parametrize("more", [b"d", b"GET /evil HTTP/1.1\r\nHost: evil\r\n\r\n"])
def test_what_follows_all_that_content_length_promised_does_not_come_too_late(
    balancer: Balancer, backend: WireBackend, length: int, more: bytes
) -> None:
    """H 8.1.1: the request seems complete, and must not go on before its stream has ended."""
    with client(balancer) as h2:
        h2.request(1, (b"content-length", b"%d" % length), method=b"POST", end=False)
        assert h2.upload(1, length) == 0
        h2.request(3, (b":path", b"/other"))
        assert h2.finish(3).status == 200  # so the first has had its chance
        h2.data(1, more)
        found = h2.finish(1)
    assert found.status is None or 400 <= found.status < 500
    wait_until(lambda: is_idle(balancer))
    assert [got.target for got in backend.requests] == [b"/other"]


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
def test_a_length_without_a_body_does_not_reach_the_backend(
    balancer: Balancer, backend: WireBackend, method: bytes
) -> None:
    """H 8.1.1: END_STREAM with the head, or with an empty frame after it."""
    with client(balancer) as h2:
        h2.request(1, (b"content-length", b"5"), method=method)
        h2.request(3, (b"content-length", b"5"), method=method, end=False)
        h2.data(3, b"")
        found = [h2.finish(stream) for stream in (1, 3)]
    assert all(stream.status is None or 400 <= stream.status < 500 for stream in found)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []


def test_an_empty_body_may_end_after_its_head(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.1: END_STREAM comes with a frame of its own, as from clients that stream."""
    with client(balancer) as h2:
        h2.request(1, (b"content-length", b"0"), method=b"POST", end=False)
        h2.sync()
        h2.data(1, b"")
        assert h2.finish(1).status == 200
    assert backend.requests[0].values(b"content-length") == [b"0"]


def test_authority_and_host_that_differ(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.3.1: refused, or one of them only is sent on."""
    with client(balancer) as h2:
        h2.request(1, (b"host", b"other"))
        status = h2.finish(1).status
    assert status in (200, 400)
    assert [len(got.values(b"host")) for got in backend.requests] == [1] * (status == 200)


# Endings.


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"]
)
def test_a_truncated_answer_does_not_end_the_stream(balancer: Balancer, backend: WireBackend, framing: bytes) -> None:
    """H 8.1 and M 8: reset, never END_STREAM; and the others go on."""

    def script(sock: socket.socket, got: Any) -> None:
        if got.target == b"/other":
            sock.sendall(ok(b"survived"))
            return
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + framing)
        has_begun.wait(60)
        hang_up(sock)

    has_begun = threading.Event()  # what is known to be broken before anything went on is answered with 502

    backend.script = script
    with client(balancer) as h2:
        h2.request(1)
        h2.begin(1)
        has_begun.set()
        found = h2.finish(1)
        h2.request(3, (b":path", b"/other"))
        assert h2.finish(3).body == b"survived"
    assert found.reset_code is not None and not found.is_ended


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
def test_a_cancelled_stream_leaves_the_others_alone(balancer: Balancer, backend: WireBackend, begun: bytes) -> None:
    """H 5.4.2: browsers cancel single requests all the time. The backend connection of that one is closed at once."""
    closed = threading.Event()

    def script(sock: socket.socket, got: Any) -> None:
        if got.target == b"/cancelled":
            sock.sendall(begun)
            if wait_closed(sock):
                closed.set()
            return
        assert closed.wait(60)
        sock.sendall(ok(b"survived"))

    backend.script = script
    with client(balancer) as h2:
        h2.request(1, (b":path", b"/cancelled"))
        h2.request(3, (b":path", b"/other"))
        wait_until(lambda: len(backend.requests) == 2)
        if begun:
            h2.begin(1)
        h2.cancel(1)
        assert closed.wait(60)
        other = h2.finish(3)
    assert (other.status, other.body) == (200, b"survived")
    wait_until(lambda: is_idle(balancer))
    assert sorted(record["status"] for record in balancer.status(2)["recent_requests"]) == [200, 499]


def test_a_cancelled_upload_leaves_the_others_alone(balancer: Balancer, backend: WireBackend) -> None:
    """Cancelled before its first byte, while another stream waits for its answer."""
    go_on = backend.hold()
    with client(balancer) as h2:
        h2.request(1, (b":path", b"/other"))
        wait_until(lambda: len(backend.requests) == 1)
        h2.request(3, (b":path", b"/upload"), method=b"POST", end=False)
        wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 2)
        h2.cancel(3)
        wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 1)
        go_on.set()
        other = h2.finish(1)
    assert (other.status, other.body) == (200, b"/other")
    wait_until(lambda: is_idle(balancer))
    assert sorted(record["status"] for record in balancer.status(2)["recent_requests"]) == [200, 499]


def test_an_upload_that_never_starts_is_408(hasty: Balancer) -> None:
    """Rule 27, without a length: the first byte does not come in time."""
    with client(hasty) as h2:
        h2.request(1, method=b"POST", end=False)
        assert h2.finish(1).status == 408
    assert hasty.status(1)["recent_requests"][0]["status"] == 408


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_connection_that_closes_ends_all_its_streams(balancer: Balancer, backend: WireBackend, method: bytes) -> None:
    """Client gone: each backend connection is closed, each request recorded as 499."""
    closed = backend.stall()
    with client(balancer) as h2:
        for stream in (1, 3, 5):
            h2.request(stream, method=method, end=method == b"GET")
            if method == b"POST":
                h2.data(stream, b"abc")
        wait_until(lambda: len(backend.requests) == 3)
    assert all(closed.acquire(timeout=60) for _ in range(3))
    wait_until(lambda: is_idle(balancer))
    assert [record["status"] for record in balancer.status(3)["recent_requests"]] == [499] * 3
    assert balancer.backend("only")["health"]["consecutive_failures"] == 0


def test_a_client_that_leaves_during_its_upload(balancer: Balancer, backend: WireBackend) -> None:
    """H 8.1: the backend sees that the request is not complete."""
    with client(balancer) as h2:
        h2.request(1, method=b"POST", end=False)
        h2.data(1, b"abc", end=False)
        wait_until(lambda: balancer.backend("only")["active_connections"])
    wait_until(lambda: backend.broken)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []
    assert balancer.status(1)["recent_requests"][0]["status"] == 499
