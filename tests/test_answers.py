"""What backends answer, and where it ends; RFC 9110 is "S", RFC 9112 "M"."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from fleet import Pair
from support import Balancer, Start, connect, exchange, get, is_idle, newest, ok, split_response, wait_until
from wire import (
    CHUNKED_ABC,
    HEAD_OK,
    Broken,
    WireBackend,
    ask,
    hang_up,
    post,
    read_chunks,
    read_response,
    request,
    values,
)

LENGTH_3 = b"Content-Length: 3\r\n\r\nabc"

MALFORMED_ANSWERS = {
    "length no number": HEAD_OK + b"Content-Length: x\r\n\r\nabc",
    "length +3": HEAD_OK + b"Content-Length: +3\r\n\r\nabc",
    "length 1_0": HEAD_OK + b"Content-Length: 1_0\r\n\r\n0123456789",
    "length hex": HEAD_OK + b"Content-Length: 0x3\r\n\r\nabc",
    "length negative": HEAD_OK + b"Content-Length: -3\r\n\r\nabc",
    "length empty": HEAD_OK + b"Content-Length:\r\n\r\nabc",
    "length too big": HEAD_OK + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "length list": HEAD_OK + b"Content-Length: 3, 4\r\n\r\nabc",
    "lengths differ": HEAD_OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "coding gzip": HEAD_OK + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "coding gzip, chunked": HEAD_OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED_ABC,
    "coding chunked, gzip": HEAD_OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNKED_ABC,
    "coding twice": HEAD_OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC,
    "length then coding": HEAD_OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC,
    "coding then length": HEAD_OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + CHUNKED_ABC,
    "garbage": b"garbage\r\n\r\n",
    "HTTP/0.9 style": b"<html>hello</html>\r\n",
    **{f"version {one}": f"HTTP/{one} 200 OK\r\n".encode() + LENGTH_3 for one in ("0.9", "2.0", "3.0")},
    "status 2x0": b"HTTP/1.1 2x0 OK\r\n" + LENGTH_3,
    "status of 2 digits": b"HTTP/1.1 99 OK\r\n" + LENGTH_3,
    "status of 4 digits": b"HTTP/1.1 1000 OK\r\n" + LENGTH_3,
    "status 000": b"HTTP/1.1 000 OK\r\n" + LENGTH_3,
    "CR in reason": b"HTTP/1.1 200 O\rK\r\n" + LENGTH_3,
    "NUL in value": HEAD_OK + b"X: a\x00b\r\n" + LENGTH_3,
    "control character in value": HEAD_OK + b"X: a\x01b\r\n" + LENGTH_3,
    "bare CR in value": HEAD_OK + b"X: a\rSet-Cookie: evil=1\r\n" + LENGTH_3,
    "bare LF": HEAD_OK + b"X: a\nSet-Cookie: evil=1\r\n" + LENGTH_3,
    "obs-fold": HEAD_OK + b"X: a\r\n b\r\n" + LENGTH_3,
    "blank before first line": HEAD_OK + b" X: a\r\n" + LENGTH_3,
    "space before colon": HEAD_OK + b"Content-Length : 3\r\n\r\nabc",
    "no colon": HEAD_OK + b"X\r\n" + LENGTH_3,
    "empty name": HEAD_OK + b": a\r\n" + LENGTH_3,
    "delimiter in name": HEAD_OK + b"X(: a\r\n" + LENGTH_3,
    "huge head": HEAD_OK + b"X: " + b"a" * 300_000 + b"\r\n" + LENGTH_3,
    "a large head in one piece": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "a large head of small lines": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 12_000 + b"Content-Length: 0\r\n\r\n",
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000,
    "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nx",
    "101 bare": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "chunk size garbage": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "chunk size +3": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
    "chunk size 0x3": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
}


def next_peer_differs(balancer: Balancer, backend: WireBackend) -> bool:
    """True if the next request comes on another connection than the last one."""
    used = backend.peers[-1]
    backend.answer(ok(b"next"))
    assert ask(balancer.port, request(b"/next"))[2] == b"next"
    return backend.peers[-1] != used


@pytest.mark.parametrize("answer", MALFORMED_ANSWERS.values(), ids=MALFORMED_ANSWERS)
def test_malformed_answers_become_502(balancer: Balancer, backend: WireBackend, answer: bytes) -> None:
    """Rules 16, 18, 19, 24 and 27, M 2.2, 5, 6.3 and 11.1: 502, nothing of it passed on, connection not used again."""
    backend.answer(answer)
    status, lines, body = ask(balancer.port, request())
    assert (status, sorted(json.loads(body))) == (502, ["error", "load_balancer_id", "request_id"])
    assert not values(lines, b"set-cookie") + values(lines, b"x")
    assert next_peer_differs(balancer, backend)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_close_before_the_head_is_complete_becomes_502(
    balancer: Balancer, backend: WireBackend, answer: bytes, reset: bool
) -> None:
    """Rule 27, S 15.6.3."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(answer)
        hang_up(sock, reset=reset)

    backend.script = script
    assert ask(balancer.port, post(b"Content-Length: 0"))[0] == 502
    assert backend.seen == 1


def test_an_answer_that_comes_while_idle_is_given_to_nobody(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 19, M 11.2: bytes on an idle connection end it."""
    sent = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(ok(b"first"))
        wait_until(lambda: is_idle(balancer))
        sock.sendall(ok(b"evil"))
        sent.set()

    backend.script = script
    assert ask(balancer.port, request())[2] == b"first"
    assert sent.wait(60)
    assert next_peer_differs(balancer, backend)


CHUNKED = HEAD_OK + b"Transfer-Encoding: cHuNkEd\r\n\r\n"
# Whether the connection is used again after such an answer to such a method: rules 17, 19 and 21, M 6.3, 9.3 and 9.6.
ENDINGS = {
    "length": (b"GET", HEAD_OK + LENGTH_3, True),
    "length with zeros": (b"GET", HEAD_OK + b"Content-Length: 003\r\n\r\nabc", True),
    "blanks after chunk sizes": (b"GET", CHUNKED + b"3  \r\nabc\r\n0\t\r\n\r\n", True),
    "blanks before an extension": (b"GET", CHUNKED + b"3 ;ext=1\r\nabc\r\n0\r\n\r\n", True),
    "the same length twice": (b"GET", HEAD_OK + LENGTH_3.replace(b"\r\n\r\n", b"\r\nContent-Length: 03\r\n\r\n"), True),
    "chunks, whose extensions are not relayed": (b"GET", CHUNKED + b"3;ext=1\r\nabc\r\n0\r\n\r\n", True),
    "an empty line before, and no reason": (b"GET", b"\r\nHTTP/1.1 200\r\n" + LENGTH_3, True),
    "HTTP/1.0 that keeps": (b"GET", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + LENGTH_3, True),
    "HEAD without length": (b"HEAD", HEAD_OK + b"X: 1\r\n\r\n", True),
    "close": (b"GET", HEAD_OK + b"Connection: close\r\n" + LENGTH_3, False),
    "close among others": (b"GET", HEAD_OK + b"Connection: foo, Close\r\n" + LENGTH_3, False),
    "HTTP/1.0": (b"GET", b"HTTP/1.0 200 OK\r\n" + LENGTH_3, False),
    "chunks in HTTP/1.0, M 6.1": (b"GET", CHUNKED.replace(b"1.1", b"1.0") + CHUNKED_ABC, False),
    "more after the length": (b"GET", HEAD_OK + LENGTH_3 + b"more", False),
    "more after the last chunk": (b"GET", CHUNKED + CHUNKED_ABC + b"more", False),
    "a second answer": (b"GET", HEAD_OK + LENGTH_3 + ok(b"evil"), False),
    "a second answer after chunks": (b"GET", CHUNKED + CHUNKED_ABC + ok(b"evil"), False),
    "a body for HEAD": (b"HEAD", HEAD_OK + LENGTH_3, False),
    "a body for 204": (b"GET", b"HTTP/1.1 204 No Content\r\n" + LENGTH_3, False),
    "a body for 304": (b"GET", b"HTTP/1.1 304 Not Modified\r\n" + LENGTH_3, False),
}


@pytest.mark.parametrize(("method", "answer", "is_kept"), ENDINGS.values(), ids=ENDINGS)
def test_the_connection_is_used_again_after_a_complete_answer_alone(
    balancer: Balancer, backend: WireBackend, method: bytes, answer: bytes, is_kept: bool
) -> None:
    """A second answer in the same packet must not be given to the next client (M 11.2)."""
    backend.answer(answer)
    status, _, body = ask(balancer.port, request(method=method), method)
    assert body == (b"abc" if method == b"GET" and status == 200 else b"")
    wait_until(lambda: is_idle(balancer))
    assert next_peer_differs(balancer, backend) is not is_kept


LOGINS = [b"NTLM TlRMTVNTUAAB", b"Negotiate YII=", b"negotiate YII="]


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"POST"])
def test_a_connection_that_was_logged_in_serves_nobody_else(
    balancer: Balancer, backend: WireBackend, method: bytes, login: bytes
) -> None:
    """RFC 4559 section 6: whoever came next on it would be served as whoever logged in."""
    framing = [b"Transfer-Encoding: chunked"] if method == b"POST" else []
    body = CHUNKED_ABC if framing else b""
    data = request(b"/", b"Authorization: " + login, *framing, method=method, body=body)
    for answer in (b"HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM TlRM\r\nContent-Length: 0\r\n\r\n", ok(b"hello")):
        backend.answer(answer)
        assert ask(balancer.port, data)[0] == int(answer.split()[1])
        assert next_peer_differs(balancer, backend)


def test_a_connection_whose_answer_says_that_it_is_logged_in_serves_nobody_else(
    balancer: Balancer, backend: WireBackend
) -> None:
    backend.answer(ok(b"hello", b"Persistent-Auth: true"))
    assert ask(balancer.port, request(b"/", b"Authorization: Unheard of"))[2] == b"hello"
    assert next_peer_differs(balancer, backend)


@pytest.fixture(params=["request", "check"])
def old(start: Start, scripted: WireBackend, request: pytest.FixtureRequest) -> Balancer:
    """In front of a backend that has answered a request, or a health check, in HTTP/1.0."""
    scripted.answer(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    balancer = start() if request.param == "request" else start("--health-path=/check")
    if request.param == "request":
        assert ask(balancer.port, get(b"/check"))[0] == 200
    return balancer


def test_a_small_chunked_body_goes_with_its_length_to_http_1_0(old: Balancer, scripted: WireBackend) -> None:
    """M 6.1: whoever speaks HTTP/1.0 would take it for empty."""
    assert ask(old.port, post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC))[0] == 200
    (got,) = (got for got in scripted.requests if got.target != b"/check")
    assert (got.body, got.values(b"content-length"), got.values(b"transfer-encoding")) == (b"abc", [b"3"], [])


def test_a_large_chunked_body_is_refused_for_http_1_0(old: Balancer, scripted: WireBackend) -> None:
    """411 instead of a body that gets lost, and the backend is not to blame."""
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (70000, b"x" * 70000)
    status, _, told = ask(old.port, post(b"Transfer-Encoding: chunked", body=body))
    assert (status, json.loads(told)["error"]) == (411, "the request body needs a Content-Length")
    assert {got.target for got in scripted.requests} == {b"/check"} and not scripted.broken
    assert old.backend("only")["failed_requests"] == 0
    assert "HTTP/1.0" in newest(old)["tried"][0]["error"]
    assert ask(old.port, post(b"Content-Length: 70000", body=b"x" * 70000))[0] == 200


def test_response_trailers_are_discarded(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 25, S 6.5.1: not merged into the header section, also when they come late."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3\r\nabc\r\n")
        sock.sendall(b"0\r\nX-T: 1\r\nSet-Cookie: evil=1\r\n\r\n")

    backend.script = script
    data = exchange(balancer.port, get())
    assert b"abc" in data and b"X-T" not in data and b"x-t" not in data and b"evil" not in data


def test_a_body_until_eof_is_relayed_and_framed(balancer: Balancer, backend: WireBackend) -> None:
    """M 6.3, rule 8 of it: chunked to an HTTP/1.1 client, whose connection can stay open."""
    backend.answer(HEAD_OK + b"\r\nabc", close=True)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(request())
            assert read_response(stream)[2] == b"abc"


def test_chunks_of_an_answer_are_framed_by_us(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 17: the client sees valid chunks whatever sizes the backend used."""

    has_begun = threading.Event()  # an answer that is here whole at once goes on whole, with its length

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for number in range(50):
            sock.sendall(b"%x;n=%d\r\n%s\r\n" % (number + 1, number, b"z" * (number + 1)))
        has_begun.wait(60)
        sock.sendall(b"0;last\r\n\r\n")

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        while stream.readline() != b"\r\n":
            pass
        has_begun.set()
        assert read_chunks(stream) == b"z" * sum(range(51))


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC]
)
@pytest.mark.parametrize("keep", [False, True])
def test_http_1_0_clients_get_no_chunks(hasty: Balancer, backend: WireBackend, framing: bytes, keep: bool) -> None:
    """Rule 17, M 6.1 and 9.3: closed after the answer unless keep-alive was asked for and a length is known."""
    backend.answer(HEAD_OK + framing)
    lines = [b"Connection: keep-alive"] if keep else []
    status, got, body = split_response(exchange(hasty.port, request(b"/", *lines, version=b"1.0")))
    assert (status, body) == (200, b"abc")
    assert not values(got, b"transfer-encoding")


TRUNCATED = {
    "length": b"Content-Length: 10\r\n\r\nabc",
    "between chunks": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "in a chunk": b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "in the last chunk": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    "chunk size garbage": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n",
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("framing", TRUNCATED.values(), ids=TRUNCATED)
def test_a_truncated_answer_reaches_the_client_as_truncated(
    balancer: Balancer, backend: WireBackend, framing: bytes, late: bool
) -> None:
    """Rule 20, M 8: no last chunk, fewer bytes than announced. `late`: the client has had the first bytes before.

    What comes with the break in one packet may be lost with it; what came before must not.
    """
    reached = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        if late:
            head, _, body = framing.partition(b"\r\n\r\n")
            first = body[: body.index(b"abc") + 3]
            sock.sendall(HEAD_OK + head + b"\r\n\r\n" + first)
            assert reached.wait(60)
            sock.sendall(body[len(first) :])
        else:
            sock.sendall(HEAD_OK + framing)
        hang_up(sock)

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        if late:
            wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
            reached.set()
        try:
            status: int | None = read_response(stream)[0]
        except (Broken, ConnectionResetError):
            status = None
    assert status is None or (status == 502 and not late), "the answer looks complete"
    wait_until(lambda: is_idle(balancer))
    record = newest(balancer)
    assert record["complete"] is (status == 502)
    assert record["reason"] in ("http_response_incomplete", "http_protocol_error", "connection_terminated")


def test_a_reset_in_a_body_until_eof_is_truncation(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 20, M 8: only a proper close ends such a body."""
    reached = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"\r\nabc")
        assert reached.wait(60)
        hang_up(sock, reset=True)

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
        reached.set()
        with pytest.raises((Broken, ConnectionResetError)):
            read_response(stream)


def test_a_truncated_answer_counts_as_a_failure_of_the_backend(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 20 and the counts of /status; the client's keep-alive connection is cut."""
    before = balancer.backend("only")["failed_requests"]
    backend.answer(HEAD_OK + b"Content-Length: 10\r\n\r\nabc", close=True)
    exchange(balancer.port, request())  # returns only because the connection is closed
    wait_until(lambda: balancer.backend("only")["failed_requests"] == before + 1)


BODILESS = {
    "HEAD with length": (b"HEAD", HEAD_OK + b"Content-Length: 10\r\n\r\n"),
    "HEAD chunked": (b"HEAD", HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "204 with length": (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n"),
    "204 chunked": (b"GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "304": (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "304 with length": (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 30\r\nETag: x\r\n\r\n"),
    "304 chunked": (b"GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "HEAD 404": (b"HEAD", b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"),
}


@pytest.mark.parametrize(("method", "answer"), BODILESS.values(), ids=BODILESS)
def test_bodiless_answers_end_with_their_head(
    balancer: Balancer, backend: WireBackend, method: bytes, answer: bytes
) -> None:
    """Rule 21, S 8.6, 9.3.2 and M 6.1, 6.3: both connections carry the next exchange at once."""
    backend.answer(answer)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(method=method))
        status, lines, _ = read_response(stream, method)
        backend.answer(ok(b"next"))
        sock.sendall(request(b"/next"))
        assert read_response(stream)[2] == b"next"
    if status == 204:
        assert not values(lines, b"content-length") + values(lines, b"transfer-encoding")
    elif method == b"HEAD":
        assert values(lines, b"content-length") == values(split_response(answer)[1], b"content-length")
    assert backend.peers[0] == backend.peers[1]


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nSet-Cookie: evil=1\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 3,
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_interim_answers_are_swallowed(balancer: Balancer, backend: WireBackend, interim: bytes, apart: bool) -> None:
    """Rule 22, S 15.2, a known gap: WSGI cannot send 103. Its fields must not get into the final answer."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in [interim, ok(b"final")] if apart else [interim + ok(b"final")]:
            sock.sendall(piece)

    backend.script = script
    data = exchange(balancer.port, get())
    status, lines, body = split_response(data)
    assert (status, body) == (200, b"final")
    assert not values(lines, b"link") + values(lines, b"set-cookie")
    wait_until(lambda: is_idle(balancer))
    assert not next_peer_differs(balancer, backend)


@pytest.mark.parametrize("status", [b"500 X", b"502 X", b"503 X", b"504 X", b"404 X", b"429 X"])
def test_statuses_of_the_backend_are_answers_not_failures(pair: Pair, status: bytes) -> None:
    """Rule 27: passed on unchanged, not retried, with body and fields."""
    pair.script(
        lambda sock, _: sock.sendall(b"HTTP/1.1 " + status + b"\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc")
    )
    got, lines, body = ask(pair.port, request())
    assert (b"%d X" % got, body, values(lines, b"retry-after")) == (status, b"abc", [b"7"])
    assert pair.seen == 1


def test_redirects_are_passed_on_not_followed(balancer: Balancer, backend: WireBackend) -> None:
    """Python traps."""
    backend.answer(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n")
    status, lines, _ = ask(balancer.port, request())
    assert (status, values(lines, b"location")) == (302, [b"http://elsewhere.example/"])
    assert backend.seen == 1


def test_events_arrive_one_by_one(balancer: Balancer, backend: WireBackend) -> None:
    """The head before any body, then each event before the next is sent."""
    go = threading.Semaphore(0)
    events = [b"data: 1\n\n", b"data: 2\n\n"]

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            assert go.acquire(timeout=60)
            sock.sendall(b"%x\r\n%s\r\n" % (len(event), event))
        assert go.acquire(timeout=60)
        sock.sendall(b"0\r\n\r\n")

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        while stream.readline() != b"\r\n":
            pass
        for event in events:
            go.release()
            assert stream.readline() == b"%x\r\n" % len(event)
            assert stream.read(len(event) + 2) == event + b"\r\n"
        go.release()
        assert stream.read(5) == b"0\r\n\r\n"
