"""What is sent again, and what never is; RFC 9110 is "S", RFC 9112 "M"."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from fleet import Pair
from support import Balancer, failures_of, is_idle, newest, ok, wait_until
from wire import CHUNKED_ABC, WireBackend, ask, hang_up, post, request

from balancer.protocol.origin import Origin


def retries_of(balancer: Balancer) -> int:
    count: int = balancer.status()["statistics"]["retries"]
    return count


def once_refusing(*, reset: bool) -> Callable[[socket.socket, Any], None]:
    """A script for both backends: whoever gets the first request hangs up, everything after that is answered."""
    first = iter([True])

    def script(sock: socket.socket, _: Any) -> None:
        if next(first, False):
            hang_up(sock, reset=reset)
        sock.sendall(ok(b"second try"))

    return script


IDEMPOTENT = [
    request(),
    request(method=b"HEAD"),
    request(method=b"OPTIONS"),
    request(method=b"DELETE"),
    request(b"/", b"Content-Length: 3", method=b"PUT", body=b"abc"),
    request(b"/", b"Content-Length: 3", body=b"abc"),
]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("data", IDEMPOTENT, ids=lambda data: ascii(data[:7])[2:-1])
def test_an_idempotent_request_goes_to_another_backend(pair: Pair, data: bytes, reset: bool) -> None:
    """Rule 26, S 9.2.2: broken off before the head; both attempts are recorded, one retry is counted."""
    pair.script(once_refusing(reset=reset))
    before = retries_of(pair.balancer)
    method = data.split(b" ")[0]
    assert ask(pair.port, data, method)[0] == 200
    assert [len(backend.requests) for backend in pair.backends.values()] == [1, 1]
    assert pair.requests[0].body == pair.requests[1].body
    assert len({got.values(b"x-request-id")[0] for got in pair.requests}) == 1
    record = newest(pair.balancer)
    assert record["attempts"] == 2
    assert {attempt["backend"] for attempt in record["tried"]} == {"a", "b"}
    assert retries_of(pair.balancer) == before + 1


NOT_REPEATABLE = [
    post(b"Content-Length: 3", body=b"abc"),
    request(b"/", b"Content-Length: 3", method=b"PATCH", body=b"abc"),
    request(b"/", method=b"FOO"),
    request(b"/", b"Transfer-Encoding: chunked", method=b"PUT", body=CHUNKED_ABC),
    request(b"/", b"Content-Length: 200000", method=b"PUT", body=b"x" * 200_000),
]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("data", NOT_REPEATABLE, ids=["POST", "PATCH", "FOO", "PUT chunked", "PUT large"])
def test_other_requests_are_never_sent_twice(pair: Pair, data: bytes, reset: bool) -> None:
    """Rule 26, S 9.2.2: not idempotent, or a body that is gone after the first try. 502, one try."""
    pair.script(once_refusing(reset=reset))
    assert ask(pair.port, data)[0] == 502
    assert pair.seen == 1
    assert newest(pair.balancer)["attempts"] == 1


def test_a_bad_answer_to_get_is_retried_elsewhere(pair: Pair) -> None:
    """Rule 26 and design 6: what is no HTTP counts as no answer."""
    answers = iter([b"garbage\r\n\r\n", ok(b"good")])
    pair.script(lambda sock, _: sock.sendall(next(answers)))
    assert ask(pair.port, request())[2] == b"good"
    assert pair.seen == 2


def test_a_bad_answer_to_post_is_not_retried(pair: Pair) -> None:
    """Rule 26."""
    pair.script(lambda sock, _: sock.sendall(b"garbage\r\n\r\n"))
    assert ask(pair.port, post(b"Content-Length: 3", body=b"abc"))[0] == 502
    assert pair.seen == 1


def test_every_backend_is_tried_once_at_most(pair: Pair) -> None:
    """Rule 26: a failed retry is not retried on the same backend; 502 with the last cause."""
    pair.script(lambda sock, _: hang_up(sock))
    assert ask(pair.port, request())[0] == 502
    assert [backend.seen for backend in pair.backends.values()] == [1, 1]
    assert newest(pair.balancer)["reason"] == "connection_terminated"


def test_a_retry_that_finds_no_other_backend_is_not_counted(balancer: Balancer, backend: WireBackend) -> None:
    """Statistics: `retries` are further attempts that were made; with one backend there are none."""
    before = retries_of(balancer)
    backend.answer(b"garbage\r\n\r\n")
    assert ask(balancer.port, request())[0] == 502
    assert (newest(balancer)["attempts"], retries_of(balancer)) == (1, before)


@pytest.mark.parametrize(
    "data",
    [request(), post(b"Content-Length: 3", body=b"abc"), post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC)],
    ids=["GET", "POST", "POST chunked"],
)
def test_a_refused_connect_is_retried_for_any_method(data: bytes) -> None:
    """Rule 26: nothing was sent. The checks are an hour apart here, so that only the data path can notice."""
    gone = WireBackend()
    with WireBackend() as alive:
        with Balancer(
            f"--backend=gone={gone.url}",
            f"--backend=alive={alive.url}",
            "--algorithm=round_robin",
            "--health-interval=3600",
        ) as balancer:
            gone.close()
            assert ask(balancer.port, data)[0] == ask(balancer.port, data)[0] == 200
            assert alive.seen == 2
            assert sorted(record["attempts"] for record in balancer.status()["recent_requests"]) == [1, 2]
            assert balancer.backend("gone")["healthy"] is False
            assert [backend["failed_requests"] for backend in balancer.status()["backend_servers"]] == [0, 0]


def warm_up(balancer: Balancer, backend: WireBackend) -> None:
    """Leave one idle connection in the pool, the only one, of which no POST is afraid however busy this machine is."""
    balancer.library.pools.parts["default"].adapter._servers.at(Origin.parse(backend.url)).safe_idle = 60
    assert ask(balancer.port, request(b"/warm-up"))[0] == 200
    wait_until(lambda: is_idle(balancer))


def stale_once(backend: WireBackend, *, reset: bool) -> None:
    """From now on the connection that is pooled dies on its next request; fresh ones work."""
    pooled = set(backend.peers)

    def script(sock: socket.socket, _: Any) -> None:
        if sock.getpeername()[1] in pooled:
            hang_up(sock, reset=reset)
        sock.sendall(ok(b"fresh"))

    backend.script = script


@pytest.mark.parametrize("reset", [False, True])
def test_a_get_on_a_stale_connection_gets_one_fresh_try(balancer: Balancer, backend: WireBackend, reset: bool) -> None:
    """Rule 26, M 9.3.1: died before any byte came back; no failure of the backend, no retry counted."""
    warm_up(balancer, backend)
    before = retries_of(balancer)
    stale_once(backend, reset=reset)
    assert ask(balancer.port, request())[2] == b"fresh"
    assert backend.seen == 3
    assert (newest(balancer)["attempts"], retries_of(balancer), failures_of(balancer)) == (1, before, 0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("framing", [b"Content-Length: 3", b"Transfer-Encoding: chunked"])
def test_a_post_on_a_stale_connection_is_not_sent_again(
    balancer: Balancer, backend: WireBackend, framing: bytes, reset: bool
) -> None:
    """Rule 26, S 9.2.2: it may have been carried out."""
    warm_up(balancer, backend)
    stale_once(backend, reset=reset)
    assert ask(balancer.port, post(framing, body=CHUNKED_ABC if b"chunked" in framing else b"abc"))[0] == 502
    assert backend.seen == 2


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_closed_while_idle_is_not_used(balancer: Balancer, backend: WireBackend, reset: bool) -> None:
    """Rule 26: EOF is seen before reuse, so even POST is safe."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(ok(b"first"))
        wait_until(lambda: is_idle(balancer))
        hang_up(sock, reset=reset)

    backend.script = script
    assert ask(balancer.port, request())[2] == b"first"
    wait_until(lambda: not backend.used, what="the backend has closed its side")
    backend.answer(ok(b"second"))
    assert ask(balancer.port, post(b"Content-Length: 3", body=b"abc"))[2] == b"second"
    assert backend.seen == 2
