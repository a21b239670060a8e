"""The hooks of filters, on every way that a request can take; and what a strategy is told of a request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from filtered_balancer import Telling
from support import PYTHON, BalancerProcess, Process, exchange, fetch, get, ok, split_response, wait_until
from test_http2 import curl
from wire import WireBackend, post

from balancer.config.settings import BackendSettings, Settings
from balancer.loadbalancer import create_app

PROGRAM = Path(__file__).with_name("filtered_balancer.py")


class FilteredBalancer(BalancerProcess):
    """With the filters or the strategy that `kind` names."""

    def __init__(self, url: str, kind: str) -> None:
        Process.__init__(self, [PYTHON, str(PROGRAM), url, kind])
        self.url = wait_until(self._listening, 30, "the balancer listens").group(1)
        wait_until(self.is_ready, 30, "the balancer is ready")

    def count(self, done: str) -> int:
        return self.lines.count(f"done {done}")


@pytest.fixture(scope="module", params=["telling", "waiting"])
def filtered(scripted: WireBackend, request: pytest.FixtureRequest) -> Iterator[FilteredBalancer]:
    scripted.reset()
    balancer = FilteredBalancer(scripted.url, request.param)
    balancer.waits = request.param == "waiting"
    yield balancer
    balancer.stop()


def ask(balancer: FilteredBalancer, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    status, lines, body = split_response(exchange(balancer.port, data))
    return status, dict(lines), body


def test_each_hook_is_called_at_its_step_and_the_express_way_is_kept(
    filtered: FilteredBalancer, scripted: WireBackend
) -> None:
    """One that waits has a worker thread from beginning to end."""
    scripted.reset()
    for _ in range(2):  # the first connects, and needs a thread for that
        status, lines, body = ask(filtered, get(b"/express"))
    assert (status, body, lines[b"x-served-by"]) == (200, b"ok", b"one")
    told, backend, thread = lines[b"x-told"].decode().split()
    assert (told, backend, thread.partition("-")[0]) == ("200", "one", "worker" if filtered.waits else "express")
    senders = [request.values(b"x-sender") for request in scripted.requests]
    assert senders[-1] != [b"worker"] if not filtered.waits else senders == [[b"worker"]] * 2
    wait_until(lambda: filtered.count("1.1 GET /express 200") == 2)


def test_the_ways_of_a_worker_and_of_http2_are_the_same(filtered: FilteredBalancer, scripted: WireBackend) -> None:
    scripted.reset()
    scripted.answer(ok(b"x" * 300_000))
    upload = post(b"Transfer-Encoding: chunked", b"Connection: close", body=b"1\r\nx\r\n0\r\n\r\n", target=b"/chunked")
    status, lines, body = ask(filtered, upload)
    assert (status, len(body), lines[b"x-told"].split()[:2]) == (200, 300_000, [b"200", b"one"])
    assert curl(filtered, path="/h2") == (200, "x" * 300_000)
    assert all(request.values(b"x-sender") for request in scripted.requests) and len(scripted.requests) == 2
    wait_until(lambda: filtered.count("1.1 POST /chunked 200") == filtered.count("2 GET /h2 200") == 1)


@pytest.mark.parametrize(("path", "status", "told"), [("/no-entry", 403, b"no entry"), ("/error", 400, b"not this")])
def test_what_is_not_admitted_is_answered_before_its_body_comes(
    filtered: FilteredBalancer, scripted: WireBackend, path: str, status: int, told: bytes
) -> None:
    scripted.reset()
    with_body = post(b"Content-Length: 100000", b"Connection: close", target=path.encode())
    for data in (get(path.encode()), with_body):
        answer = ask(filtered, data)
        assert answer[0] == status and told in answer[2]
        assert answer[1][b"x-told"].startswith(b"%d None " % status) and b"x-request-id" in answer[1]
    assert curl(filtered, path=path)[0] == status
    assert scripted.seen == 0


@pytest.mark.parametrize("hook", ["admit", "send", "answer", "done"])
@pytest.mark.parametrize("size", [2, 300_000])
def test_a_filter_that_fails_costs_its_request_and_nothing_else(
    filtered: FilteredBalancer, scripted: WireBackend, hook: str, size: int
) -> None:
    scripted.reset()
    scripted.answer(ok(b"x" * size))
    path = f"/fail-{hook}".encode()
    for data in (get(path), post(b"Content-Length: 1", b"Connection: close", body=b"x", target=path)):
        status, _, body = ask(filtered, data)
        assert (status, len(body)) == (200, size) if hook == "done" else (status == 500 and b"internal error" in body)
    wait_until(lambda: f"{hook} fails" in filtered.output, what="the log has the cause")
    assert ask(filtered, get(b"/next"))[0] == 200  # its place was given back
    wait_until(lambda: filtered.status()["statistics"]["active_requests"] == 0)
    assert filtered.backend("one")["active_connections"] == 0


def test_filters_see_what_comes_through_wsgi(scripted: WireBackend) -> None:
    scripted.reset()
    backend = BackendSettings(id="one", url=scripted.url)
    app = create_app(Settings(backends=(backend,)), filters=[Telling()])
    balancer = app.extensions["balancer"]
    balancer.start()
    try:
        wait_until(balancer.control.is_serving)
        answer = app.test_client().get("/x")
        assert answer.status_code == 200 and answer.headers["X-Told"].startswith("200 one ")
        assert app.test_client().get("/no-entry").data == b"no entry"
    finally:
        balancer.stop()


def test_a_strategy_is_told_of_the_request(scripted: WireBackend) -> None:
    """And not what its client claims to be."""
    scripted.reset()
    balancer = FilteredBalancer(scripted.url, "by_header")
    try:
        for name in ("one", "two", "two"):
            answer = fetch(f"{balancer.url}/by-header", X_Wanted=name, X_Forwarded_For="1.2.3.4")
            assert (answer[0], answer[1]["x-served-by"]) == (200, name)
    finally:
        balancer.stop()
