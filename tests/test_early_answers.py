"""Whoever waits for one side notices the other: a backend that answers, or hangs up, while the client still sends.

RFC 9110 section 10.1.1, RFC 9112 section 9.6. The time limits are far away, so nothing but the answer ends a wait.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from fleet import Pair
from support import Balancer, Start, connect, newest, ok, wait_until
from test_http2 import client, curl
from wire import WireBackend, hang_up, post, read_response, wait_closed

REFUSED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
EXPECT = b"100-continue"

# What has come of a body when its client pauses: by length, one that is read first and one that is not, or in chunks.
BEGUN = {
    "small": (b"Content-Length: 100", b"0123456789"),
    "small, nothing of it": (b"Content-Length: 100", b""),
    "large": (b"Content-Length: 500000", b"0123456789"),
    "large, nothing of it": (b"Content-Length: 500000", b""),
    "chunked": (b"Transfer-Encoding: chunked", b"a\r\n0123456789\r\n"),
    "chunked, nothing of it": (b"Transfer-Encoding: chunked", b""),
}


def answer_early(sock: socket.socket, _: Any, *, backend: WireBackend, size: int, answer: bytes) -> bool:
    """Once `size` bytes of the body are here, and the balancer waits for more."""
    backend.streams[sock].read(size)
    if not answer:
        hang_up(sock)
    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    Event().wait(0.3)
    sock.sendall(answer)
    wait_closed(sock)
    return True


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize(("answer", "status"), [(REFUSED, 401), (b"", 502)], ids=["401", "hangs up"])
@pytest.mark.parametrize(("framing", "begun"), BEGUN.values(), ids=BEGUN)
def test_an_early_answer_reaches_a_client_that_pauses(
    balancer: Balancer, backend: WireBackend, framing: bytes, begun: bytes, answer: bytes, status: int
) -> None:
    backend.on_head = partial(answer_early, backend=backend, size=len(begun), answer=answer)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(framing, body=begun))
        assert read_response(stream)[0] == status
        assert wait_closed(sock)  # after a while in which the rest may come
    assert newest(balancer)["status"] == status and len(backend.broken) == 0


@pytest.mark.parametrize(("answer", "status"), [(REFUSED, 401), (b"", 502)], ids=["401", "hangs up"])
def test_an_early_answer_comes_from_a_backend_that_reads_no_more(pair: Pair, answer: bytes, status: int) -> None:
    def refuse(sock: socket.socket, _: Any) -> bool:
        is_full.wait(60)
        if not answer:
            hang_up(sock, reset=True)
        sock.sendall(answer)
        return is_over.wait(60)  # it neither reads nor closes

    def send() -> None:
        with suppress(OSError):
            while True:
                sent.append(client.send(bytes(65536)))

    def is_stuck() -> bool:
        before = len(sent)
        return not is_full.wait(0.5) and 0 < before == len(sent)

    sent: list[int] = []
    is_full, is_over = Event(), Event()
    pair.on_head(refuse)
    with connect(pair.port) as client, client.makefile("rb") as stream:
        client.sendall(post(b"Content-Length: 1000000000"))
        sending = Thread(target=send, name="upload")
        sending.start()
        wait_until(is_stuck, what="nothing goes on any more")
        is_full.set()
        try:
            assert read_response(stream)[0] == status
        finally:
            is_over.set()
            client.shutdown(socket.SHUT_RDWR)
        sending.join()


@pytest.mark.parametrize("lines", [[], [(b"content-length", b"100")], [(b"content-length", b"500000")]])
@pytest.mark.parametrize("begun", [b"", b"0123456789"])
def test_an_early_answer_ends_a_stream_that_pauses_alone(
    balancer: Balancer, backend: WireBackend, lines: list[tuple[bytes, bytes]], begun: bytes
) -> None:
    size = len(b"a\r\n0123456789\r\n" if begun and not lines else begun)
    backend.on_head = partial(answer_early, backend=backend, size=size, answer=REFUSED)
    with client(balancer) as h2:
        h2.request(1, *lines, method=b"POST", end=False)
        if begun:
            h2.data(1, begun, end=False)
        found = h2.finish(1)
        assert (found.status, found.body) == (401, b"no")
        backend.on_head = None
        h2.request(3)
        assert h2.finish(3).status == 200


def test_a_success_is_no_reason_to_stop(balancer: Balancer, backend: WireBackend) -> None:
    """The backend may go on reading; and what the client sends after a pause goes on."""
    body = []

    def answer(sock: socket.socket, _: Any) -> bool:
        body.append(backend.streams[sock].read(5))
        sock.sendall(ok(b"done"))
        body.append(backend.streams[sock].read(5))
        read_on.set()
        return wait_closed(sock)

    read_on = Event()
    backend.on_head = answer
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 10", body=b"01234"))
        assert not read_on.wait(0.5)
        sock.sendall(b"56789")
        assert read_response(stream)[::2] == (200, b"done")
    assert read_on.wait(60) and b"".join(body) == b"0123456789"


def test_a_success_after_which_the_backend_hangs_up_reaches_a_client_that_pauses(
    balancer: Balancer, backend: WireBackend
) -> None:
    def answer(sock: socket.socket, _: Any) -> bool:
        backend.streams[sock].read(5)
        sock.sendall(ok(b"done"))
        hang_up(sock)

    backend.on_head = answer
    for framing, begun in ((b"Content-Length: 500000", b"01234"), (b"Transfer-Encoding: chunked", b"5\r\n01234\r\n")):
        with connect(balancer.port) as sock, sock.makefile("rb") as stream:
            sock.sendall(post(framing, body=begun))
            assert read_response(stream)[::2] == (200, b"done")


def test_a_success_is_better_than_to_tell_a_client_that_it_was_too_slow(start: Start, backend: WireBackend) -> None:
    def answer(sock: socket.socket, _: Any) -> bool:
        backend.streams[sock].read(5)
        sock.sendall(ok(b"done"))
        return wait_closed(sock)

    backend.on_head = answer
    slow = start("--idle-timeout=1")
    with connect(slow.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 500000", body=b"01234"))
        assert read_response(stream)[::2] == (200, b"done")


# HTTP/2 clients that wait for 100 (Continue), which Granian cannot send there.


@pytest.mark.parametrize(("answer", "status"), [(REFUSED, 401), (ok(), 200)])
def test_a_client_that_waits_for_100_gets_the_backends_answer(
    balancer: Balancer, backend: WireBackend, answer: bytes, status: int
) -> None:
    backend.on_head = partial(answer_early, backend=backend, size=0, answer=answer)
    with client(balancer) as h2:
        h2.request(1, (b"expect", EXPECT), (b"content-length", b"100"), method=b"POST", end=False)
        assert h2.finish(1).status == status


@pytest.mark.parametrize("lines", [[], [(b"content-length", b"100")], [(b"content-length", b"500000")]])
def test_a_client_that_waits_for_100_is_told_to_go_without(
    balancer: Balancer, backend: WireBackend, lines: list[tuple[bytes, bytes]]
) -> None:
    """RFC 9110 section 15.5.18; no backend is to blame."""
    with client(balancer) as h2:
        h2.request(1, (b"expect", EXPECT), *lines, method=b"POST", end=False)
        assert h2.finish(1).status == 417
        h2.request(3, method=b"POST", end=False)
        h2.data(3, b"abc")
        assert h2.finish(3).status == 200
    assert balancer.backend("only")["health"]["consecutive_failures"] == 0


@pytest.mark.parametrize("size", [10, 500_000])
def test_a_client_that_does_not_wait_for_long_is_served(
    balancer: Balancer, backend: WireBackend, size: int, tmp_path: Path
) -> None:
    """curl waits for 1 s."""
    (tmp_path / "body").write_bytes(bytes(size))
    assert curl(balancer, "-H", "Expect: 100-continue", "--data-binary", f"@{tmp_path}/body")[0] == 200
    assert backend.requests[0].body == bytes(size) and not backend.requests[0].values(b"expect")
