"""Connections of clients: kept alive, slow, held back, left; RFC 9112 is "M"."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from support import (
    Balancer,
    StartProcess,
    connect,
    exchange,
    failures_of,
    get,
    is_idle,
    newest,
    ok,
    split_response,
    wait_until,
)
from wire import (
    CHUNKED_ABC,
    HEAD_OK,
    MIB,
    WireBackend,
    hang_up,
    post,
    read_response,
    request,
    resident_bytes,
    values,
    wait_closed,
)


def test_client_connections_are_kept_alive(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.3: requests of all framings one after another, up to one that is malformed."""
    chunked = post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC)
    messages = [request(), post(b"Content-Length: 3", body=b"abc"), chunked, request(), request(b"*")]
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        statuses = []
        for message in messages:
            sock.sendall(message)
            statuses.append(read_response(stream)[0])
    assert statuses == [200, 200, 200, 200, 400]
    assert backend.seen == 4


def test_pipelined_requests_are_answered_in_order(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.3.2."""
    backend.script = lambda sock, got: sock.sendall(ok(got.target + got.body))
    messages = [request(b"/1"), post(b"Content-Length: 3", body=b"abc", target=b"/2"), request(b"/3"), request(b"/4")]
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(b"".join(messages))
        assert [read_response(stream)[2] for _ in messages] == [b"/1", b"/2abc", b"/3", b"/4"]


def test_connection_close_is_honoured(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.6: nothing after it is read as a request."""
    data = exchange(balancer.port, get() + request(b"/second"))
    assert data.count(b"HTTP/1.1 200") == 1
    assert values(split_response(data)[1], b"connection") == [b"close"]
    assert backend.seen == 1


def pour(sock: socket.socket, size: int) -> int:
    """Send `size` bytes or until the other side has had enough; returns how many."""
    piece, sent = b"x" * 65536, 0
    with suppress(OSError):
        while sent < size:
            sent += sock.send(piece[: size - sent])
    return sent


def test_a_slow_client_holds_the_backend_back(start_process: StartProcess, scripted: WireBackend) -> None:
    """Back-pressure: while the client does not read, the backend is not read either, and memory stays flat."""
    size = 96 * MIB
    sent = [0]

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: %d\r\n\r\n" % size)
        piece = b"y" * 65536
        while sent[0] < size:
            sent[0] += sock.send(piece)

    scripted.script = script
    balancer = start_process("--idle-timeout=60")
    before = resident_bytes(balancer.pid)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        assert wait_until(standstill(sent)) < 48 * MIB  # what the kernel's buffers of two connections hold
        assert resident_bytes(balancer.pid) - before < 16 * MIB
        assert hashlib.sha256(read_response(stream)[2]).digest() == hashlib.sha256(b"y" * size).digest()


def standstill(counter: list[int]) -> Callable[[], int]:
    """A condition: the count, once it is above 0 and has not moved for half a second."""
    before, since = 0, time.monotonic()

    def look() -> int:
        nonlocal before, since
        if counter[0] != before:
            before, since = counter[0], time.monotonic()
        return before if time.monotonic() - since > 0.5 else 0

    return look


def test_a_slow_backend_holds_the_client_back(start_process: StartProcess, scripted: WireBackend) -> None:
    """Back-pressure the other way: an upload is not taken in faster than the backend reads it."""
    go = threading.Event()

    def on_head(sock: socket.socket, _: Any) -> bool:
        go.wait(60)
        return False

    scripted.on_head = on_head
    sent = [0]

    def send(sock: socket.socket) -> None:
        piece = b"x" * 65536
        while sent[0] < 96 * MIB:
            sent[0] += sock.send(piece)

    balancer = start_process("--idle-timeout=60")
    before = resident_bytes(balancer.pid)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: %d" % (96 * MIB)))
        sender = threading.Thread(target=send, args=(sock,))
        sender.start()
        try:
            assert wait_until(standstill(sent)) < 48 * MIB
            assert resident_bytes(balancer.pid) - before < 16 * MIB
        finally:
            go.set()
        assert read_response(stream)[0] == 200
        sender.join(60)
    assert scripted.requests[0].body == b"x" * (96 * MIB)


def test_a_client_that_reads_nothing_is_cut_off(hasty: Balancer, backend: WireBackend) -> None:
    """`idle_timeout` towards the client: the backend's connection is freed, and the backend is not to blame."""
    done = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: %d\r\n\r\n" % (96 * MIB))
        pour(sock, 96 * MIB)
        done.set()

    backend.script = script
    with connect(hasty.port) as sock:
        sock.sendall(request())
        assert done.wait(60)
        wait_until(lambda: is_idle(hasty))
    assert newest(hasty)["status"] == 499
    assert failures_of(hasty) == 0


def assert_client_gone(balancer: Balancer, backend_id: str = "only") -> None:
    """Recorded as 499, nothing left behind, no fault of the backend."""
    wait_until(lambda: is_idle(balancer), what="nothing is in flight")
    record = newest(balancer)
    assert (record["status"], record["reason"], record["complete"]) == (499, "client_gone", False)
    backend = balancer.backend(backend_id)
    assert backend["healthy"] is True and backend["health"]["consecutive_failures"] == 0


LEAVING = {
    "GET": request(),
    "POST": post(b"Content-Length: 3", body=b"abc"),
    "POST large": post(b"Content-Length: 200000", body=b"x" * 200_000),
    "POST chunked": post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC),
}


@pytest.mark.parametrize("data", LEAVING.values(), ids=LEAVING)
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_while_the_backend_works(
    balancer: Balancer, backend: WireBackend, data: bytes, reset: bool
) -> None:
    """Rule 27: the backend connection is closed at once, by no time-out; 499."""
    closed = backend.stall()
    before = balancer.backend("only")["aborted_requests"]
    with connect(balancer.port) as sock:
        sock.sendall(data)
        wait_until(lambda: backend.requests)
        if reset:
            with suppress(ConnectionAbortedError):
                hang_up(sock, reset=True)
    assert closed.acquire(timeout=60)
    assert_client_gone(balancer)
    assert balancer.backend("only")["aborted_requests"] == before + 1
    assert backend.seen == 1, "a request whose client has left is not retried"


def test_a_client_that_leaves_during_the_answer(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, an endless answer: the backend's next sends fail."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                sock.sendall(b"3\r\nabc\r\n")
        except OSError:
            closed.set()
            raise

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        assert any(b"abc" in line for line in stream)
    assert closed.wait(60)
    assert_client_gone(balancer)


def test_a_client_that_leaves_a_quiet_stream(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, an event stream in which nothing happens: noticed at once all the same."""
    closed = backend.stall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    with connect(balancer.port) as sock:
        sock.sendall(request())
        wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
    assert closed.acquire(timeout=60)
    assert_client_gone(balancer)


@pytest.mark.parametrize("framing", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
def test_a_client_that_leaves_during_its_upload(balancer: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 19 and 27: the backend sees that the request is not complete."""
    with connect(balancer.port) as sock:
        sock.sendall(post(framing, body=b"30d40\r\n" + b"x" * 200_000 + b"\r\n"))
        wait_until(lambda: balancer.backend("only")["active_connections"])
    wait_until(lambda: backend.broken, what="the backend's connection is closed")
    assert_client_gone(balancer)
    assert backend.requests == []


def test_a_client_that_half_closes_counts_as_gone(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.6, a known gap: hyper takes a half-closed connection for a client that has left, as nginx does by default."""
    backend.script = lambda sock, _: wait_closed(sock, 5) or sock.sendall(ok())
    exchange(balancer.port, request(), half_close=True)
    wait_until(lambda: is_idle(balancer))
    assert newest(balancer)["status"] == 499
