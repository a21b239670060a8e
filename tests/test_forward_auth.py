"""Another server decides: what it is told, what becomes of its answer, and that nothing goes on without one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from guarded import Guarded, api_keys, guarded
from support import RawRequest, exchange, ok, split_response, wait_until
from wire import WireBackend, post

from balancer.filters import forwardauth

SAID = (b"X-Auth-Subject: ann", b"X-User: ann", b"X-Else: 1", b"Set-Cookie: a=1", b"Set-Cookie: b=2")
YES = b"\r\n".join((b"HTTP/1.1 204 No Content", *SAID, b"", b""))


@pytest.fixture(scope="module")
def server() -> Iterator[WireBackend]:
    with WireBackend() as made:
        yield made


def table(server: WireBackend) -> dict[str, Any]:
    return {"name": "sso", "type": "forward", "url": f"{server.url}/verify?x=1", "copy_headers": ["X-User"]}


@pytest.fixture(scope="module")
def started(scripted: WireBackend, server: WireBackend) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwardauth, "ANSWER_SECONDS", 30.0)  # a busy machine is no finding
        with guarded(scripted, table(server)) as made:
            yield made


@pytest.fixture
def balancer(started: Guarded, server: WireBackend) -> Guarded:
    started.backend.reset()
    server.reset()
    server.answer(YES)
    return started


def test_it_is_told_of_the_same_request_and_backends_get_what_it_says(balancer: Guarded, server: WireBackend) -> None:
    lines = (
        b"Cookie: session=1",
        b"Authorization: Basic eDp5",
        b"X-User: root",
        b"X-Auth-Subject: root",
        b"If-None-Match: x",
    )
    lines += (
        b"X-Forwarded-Method: GET",
        b"X-Forwarded-Uri: /open",
        b"Range: bytes=0-1",
        b"Upgrade: h2c",
    )
    status, answer, _ = balancer.ask(*lines, target=b"/a%2f/../b?q=%20", method=b"DELETE")
    assert status == 200 and [value for name, value in answer if name == b"set-cookie"] == [b"a=1", b"b=2"]
    assert (b"cache-control", b"private") in answer
    (asked,), (forwarded,) = server.requests, balancer.backend.requests
    assert asked.head.startswith(b"GET /verify?x=1 HTTP/1.1\r\n") and asked.body == b""
    told = (b"x-forwarded-method", b"x-forwarded-uri", b"x-forwarded-host", b"cookie", b"authorization", b"host")
    assert [asked.values(name) for name in told] == [
        [b"DELETE"],
        [b"/a%2f/../b?q=%20"],
        [b"test"],
        [b"session=1"],
        [b"Basic eDp5"],
        [server.url.removeprefix("http://").encode()],
    ]
    for name in (b"x-user", b"x-auth-subject", b"if-none-match", b"range", b"upgrade"):
        assert asked.values(name) == []
    assert forwarded.target == b"/a%2f/../b?q=%20"
    names = (b"x-user", b"x-auth-subject", b"x-else", b"cookie", b"authorization", b"if-none-match")
    assert [forwarded.values(name) for name in names] == [
        [b"ann"],
        [b"ann"],
        [],
        [b"session=1"],
        [b"Basic eDp5"],
        [b"x"],
    ]
    assert balancer.requests(1)[0]["subject"] == "ann"


def test_what_it_does_not_say_nobody_else_does(balancer: Guarded, server: WireBackend) -> None:
    server.answer(ok())
    assert balancer.status(b"X-User: root", b"X-Auth-Subject: root") == 200
    assert balancer.backend.requests[0].values(b"x-user") + balancer.backend.requests[0].values(b"x-auth-subject") == []


@pytest.mark.parametrize("status", [302, 401, 403, 429])
@pytest.mark.usefixtures("short_linger")
def test_its_refusal_is_the_answer(balancer: Guarded, server: WireBackend, status: int) -> None:
    said = ok(b"no", b"Location: https://login.example/", b"Set-Cookie: a=1", b"Server: sso")
    server.answer(said.replace(b"200 OK", b"%d No" % status))
    found, lines, told = balancer.ask()
    assert (found, told) == (status, b"no") and balancer.backend.seen == 0
    record = balancer.requests(1)[0]
    assert (record["reason"], record["error"]) == ("http_request_denied", f"sso: {server.url}/verify answered {status}")
    assert (b"location", b"https://login.example/") in lines and (b"set-cookie", b"a=1") in lines
    assert [value for name, value in lines if name == b"server"] == [b"load-balancer"]
    sent = post(b"Content-Length: 100000", b"Connection: close")  # and no body: nobody waits for one
    assert split_response(exchange(balancer.port, sent))[0] == status


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 304 X\r\n\r\n",
        b"HTTP/1.1 419 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 401 X\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000,
        b"HTTP/1.1 401 X\r\nTransfer-Encoding: chunked\r\n\r\n" + b"11170\r\n" + b"x" * 70_000,
        b"HTTP/1.1 401 X\r\nContent-Length: 5\r\n\r\nx",
        b"HTTP/1.1 204 X\r\nX-Auth-Subject: " + b"x" * 300 + b"\r\n\r\n",
        b"HTTP/1.1 200 X\r\nX-Big: " + b"x" * 100_000 + b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"",
    ],
    ids=range(11),
)
def test_without_a_proper_answer_nothing_goes_on(balancer: Guarded, server: WireBackend, answer: bytes) -> None:
    server.answer(answer, close=True)
    status, lines, _ = balancer.ask()
    assert (status, dict(lines)[b"content-type"]) == (503, b"application/problem+json")
    record = balancer.requests(1)[0]
    assert (record["reason"], balancer.backend.seen) == ("auth_unavailable", 0)
    assert balancer.pool.snapshot()[0]["health"]["consecutive_failures"] == 0


def trickle_head(sock: socket.socket, request: RawRequest) -> None:
    pause = threading.Event()
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    while not pause.wait(0.02):
        sock.sendall(b"x-a: 1\r\n")  # until the other side has closed


def trickle_body(sock: socket.socket, request: RawRequest) -> None:
    pause = threading.Event()
    sock.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 10000\r\n\r\n")
    while not pause.wait(0.02):
        sock.sendall(b"x")


@pytest.mark.parametrize(
    "script", [lambda sock, request: sock.recv(1), trickle_head, trickle_body], ids=["hang", "head", "body"]
)
def test_it_has_so_long_and_no_longer_for_all_of_it(
    balancer: Guarded, server: WireBackend, monkeypatch: pytest.MonkeyPatch, script: Callable[..., None]
) -> None:
    monkeypatch.setattr(forwardauth, "ANSWER_SECONDS", 0.2)
    server.script = script
    assert balancer.status() == 503 and balancer.backend.seen == 0


def test_when_it_is_dead_nothing_goes_on_and_others_may_say_yes(scripted: WireBackend) -> None:
    with WireBackend() as dead:
        dead.close()
        with guarded(scripted, api_keys("acme-key"), table(dead)) as made:
            assert made.status() == 503 and made.status(b"X-API-Key: acme-key", b"X-User: root") == 200
            assert [request.values(b"x-user") for request in made.backend.requests] == [[]]


def test_no_more_than_a_few_requests_ask_at_once(
    balancer: Guarded, server: WireBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, lock, now, most = threading.Event(), threading.Lock(), 0, 0

    def script(sock: socket.socket, request: RawRequest) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        gate.wait()
        with lock:
            now -= 1
        sock.sendall(YES)

    server.script = script
    with ThreadPoolExecutor(forwardauth.AT_ONCE + 8) as pool:
        asked = [pool.submit(balancer.status) for _ in range(forwardauth.AT_ONCE)]
        wait_until(lambda: now == forwardauth.AT_ONCE, "all turns are taken")
        with monkeypatch.context() as patch:
            patch.setattr(forwardauth, "ANSWER_SECONDS", 0.01)
            assert balancer.status() == 503
        asked += [pool.submit(balancer.status) for _ in range(8)]
        wait_until(lambda: balancer.control.statistics.lifetime().active == len(asked), "the others wait for a turn")
        gate.set()
        assert {each.result() for each in asked} == {200} and most == forwardauth.AT_ONCE
    wait_until(lambda: not balancer.control.statistics.lifetime().active)
