"""Errors of the balancer's own: statuses, limits, time; RFC 9110 is "S"."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
from fleet import Pair
from support import Balancer, connect, exchange, failures_of, get, is_idle, newest, wait_until
from wire import HEAD_OK, Broken, Line, WireBackend, ask, post, read_response, request, values, wait_closed


def assert_own_error(parsed: tuple[int, list[Line], bytes], status: int) -> None:
    got, lines, body = parsed
    answer = json.loads(body)
    assert (got, values(lines, b"content-type")) == (status, [b"application/json"])
    assert sorted(answer) == ["error", "load_balancer_id", "request_id"]
    assert answer["load_balancer_id"] == "lb-1" and answer["error"]
    assert values(lines, b"x-request-id") == [answer["request_id"].encode()]


def test_no_backend_is_503_with_retry_after(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, S 15.6.4."""
    backend.is_healthy = False
    balancer.wait_healthy("only", False)
    parsed = ask(balancer.port, request())
    assert_own_error(parsed, 503)
    assert int(values(parsed[1], b"retry-after")[0]) > 0
    assert backend.seen == 0
    assert newest(balancer)["server_id"] is None


def test_own_502_says_why_but_has_no_retry_after(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27 and 28: JSON; Proxy-Status is not sent unless asked for."""
    backend.answer(b"garbage\r\n\r\n")
    parsed = ask(balancer.port, request())
    assert_own_error(parsed, 502)
    assert not values(parsed[1], b"retry-after") + values(parsed[1], b"proxy-status")


def test_head_gets_no_body_with_our_errors(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 21, S 9.3.2, for answers of the balancer itself."""
    backend.answer(b"garbage\r\n\r\n")
    data = exchange(balancer.port, get(method=b"HEAD"))
    assert data.startswith(b"HTTP/1.1 502 ") and data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("data", [request(), post(b"Content-Length: 3", body=b"abc")], ids=["GET", "POST"])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_no_answer_in_time_is_504(hasty: Balancer, backend: WireBackend, data: bytes, answer: bytes) -> None:
    """Rule 27, S 15.6.5: nothing, half a head, or only an interim answer; the backend's connection is closed."""
    closed = backend.stall(answer)
    assert_own_error(ask(hasty.port, data), 504)
    assert closed.acquire(timeout=60)
    assert newest(hasty)["reason"] == "http_response_timeout"


def test_a_head_that_trickles_is_504_too(hasty: Balancer, backend: WireBackend) -> None:
    """Rule 27: the limit is for the whole head, not between two bytes of it."""
    pause = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"X: ")
        while not pause.wait(0.05):
            sock.sendall(b"a")

    backend.script = script
    try:
        assert_own_error(ask(hasty.port, request()), 504)
    finally:
        pause.set()


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 9\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"\r\nabc"]
)
def test_a_body_that_stalls_is_cut(hasty: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 20 and 27, `idle_timeout`: cut, both sides, without a proper end."""
    closed = backend.stall(HEAD_OK + framing)
    with connect(hasty.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        with pytest.raises((Broken, ConnectionResetError)):
            read_response(stream)
    assert closed.acquire(timeout=60)
    assert newest(hasty)["complete"] is False


def test_413_by_content_length_before_the_body_is_sent(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, S 15.5.14 and rule 19: the answer comes without the body, then the connection is closed."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 1000001"))
        assert_own_error(read_response(stream), 413)
        assert wait_closed(sock), "a connection with an unread body must not be kept"
    assert backend.seen == 0


def test_413_in_the_middle_of_a_chunked_body(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27: the backend never sees the end of it."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Transfer-Encoding: chunked"))
        with suppress(OSError):
            for _ in range(20):
                sock.sendall(b"%x\r\n%s\r\n" % (65536, b"a" * 65536))
        assert_own_error(read_response(stream), 413)
        assert wait_closed(sock)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []
    assert failures_of(balancer) == 0


def test_the_largest_body_that_is_allowed_passes(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27: a million bytes in either framing."""
    body = b"x" * 1_000_000
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert ask(balancer.port, post(b"Content-Length: 1000000", body=body))[0] == 200
    assert ask(balancer.port, post(b"Transfer-Encoding: chunked", body=chunked))[0] == 200
    assert [len(got.body) for got in backend.requests] == [1_000_000] * 2


@pytest.mark.parametrize(
    "data", [get(b"/", b"X: " + b"a" * 20_000), get(b"/", *[b"X: a"] * 3000)], ids=["long", "many"]
)
def test_431_for_a_large_head(balancer: Balancer, backend: WireBackend, data: bytes) -> None:
    """Rule 27, RFC 6585 section 5."""
    assert exchange(balancer.port, data).startswith(b"HTTP/1.1 431 ")
    assert backend.seen == 0


def test_414_for_a_long_target(pair: Pair) -> None:
    """Rule 27, S 15.5.15. Where `max_header_bytes` is smaller than the target, the answer is 431 instead."""
    assert exchange(pair.port, get(b"/" + b"a" * 70_000)).startswith(b"HTTP/1.1 414 ")
    assert ask(pair.port, request(b"/" + b"a" * 60_000))[0] == 200
    assert pair.seen == 1


def test_431_comes_first_if_the_head_is_limited_below_the_target(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, a known gap: 431 stands in for 414."""
    assert exchange(balancer.port, get(b"/" + b"a" * 20_000)).startswith(b"HTTP/1.1 431 ")
    assert backend.seen == 0


@pytest.mark.parametrize("data", [b"GET", b"GET / HTTP/1.1\r\nHost: t"], ids=["part", "no end"])
def test_a_slow_head_is_cut_off(hasty: Balancer, backend: WireBackend, data: bytes) -> None:
    """Rule 27, `header_timeout`: closed, with 408 or without a word (the server in front says nothing)."""
    answer = exchange(hasty.port, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert backend.seen == 0


@pytest.mark.parametrize("framing", [b"Content-Length: 10", b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
def test_a_request_body_that_stalls_is_408_and_closed(hasty: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 19 and 27, S 15.5.9: the client is at fault, and an unread body must not keep its connection open."""
    with connect(hasty.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(framing, body=b"3\r\nabc\r\n"))
        status = read_response(stream)[0]
        assert wait_closed(sock), "the connection stays open for a body that never comes"
    wait_until(lambda: is_idle(hasty))
    assert (status, backend.requests, failures_of(hasty)) == (408, [], 0)
