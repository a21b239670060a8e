"""The hooks of filters, on every way that a request can take; and what a strategy is told of a request."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support import exchange, fetch, get, ok, split_response, wait_until
from test_http2 import curl
from wire import WireBackend, post

from balancer import Filter, LoadBalancer, Strategy, strategy
from balancer.balancing import strategies
from balancer.balancing.backends import Backend
from balancer.errors import ClientError
from balancer.forwarding.answer import Answer, whole
from balancer.observe.record import Record
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest


class Telling(Filter):
    """Tells what it sees, and by which thread it was called; every hook fails on /fail-HOOK and /exit-HOOK."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str, str, int]] = []

    def admit(self, request: Request) -> Answer | None:
        self._fail("admit", request)
        if request.path == "/error":
            raise ClientError("not this one")
        return whole(403, b"no entry", (b"content-type", b"text/plain")) if request.path == "/no-entry" else None

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        self._fail("send", request)
        outgoing.lines = [*outgoing.lines, (b"x-sender", thread().encode())]

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        self._fail("answer", request)
        return [*lines, (b"x-told", f"{record.status} {record.backend} {thread()}".encode())]

    def done(self, request: Request, record: Record) -> None:
        self.ended.append((request.version, request.method, request.path, record.status))
        self._fail("done", request)

    def _fail(self, hook: str, request: Request) -> None:
        if request.path == f"/fail-{hook}":
            raise RuntimeError(f"{hook} fails")
        if request.path == f"/exit-{hook}":
            sys.exit(f"{hook} fails")


class Waiting(Telling):
    waits = True


class Unused(Filter):
    """No hook, so it is never called."""


def thread() -> str:
    return threading.current_thread().name.partition("-")[0]


class Filtered(LoadBalancer):
    """With room for one request: a place that is not given back is noticed by the next."""

    def __init__(self, url: str, telling: Any) -> None:
        backends = [{"id": "one", "url": url, "max_connections": 1}]
        super().__init__(backends, filters=[telling, Unused()], expose_backend=True, health_timeout=5)
        self.telling = telling

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="module", params=[Telling, Waiting])
def filtered(scripted: WireBackend, request: pytest.FixtureRequest) -> Iterator[Filtered]:
    scripted.reset()
    with Filtered(scripted.url, request.param()) as balancer:
        yield balancer


def ask(balancer: Filtered, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    status, lines, body = split_response(exchange(balancer.port, data))
    return status, dict(lines), body


def test_each_hook_is_called_at_its_step_and_the_express_way_is_kept(filtered: Filtered, scripted: WireBackend) -> None:
    """One that waits has a worker thread from beginning to end."""
    scripted.reset()
    for _ in range(2):  # the first connects, and needs a thread for that
        status, lines, body = ask(filtered, get(b"/express"))
    assert (status, body, lines[b"x-served-by"]) == (200, b"ok", b"one")
    waits = filtered.telling.waits
    assert lines[b"x-told"] == b"200 one " + (b"worker" if waits else b"express")
    senders = [request.values(b"x-sender") == [b"worker"] for request in scripted.requests]
    assert senders == ([True, True] if waits else [False, False])
    wait_until(lambda: filtered.telling.ended.count(("1.1", "GET", "/express", 200)) == 2)


def test_the_ways_of_a_worker_and_of_http2_are_the_same(filtered: Filtered, scripted: WireBackend) -> None:
    scripted.reset()
    scripted.answer(ok(b"x" * 300_000))
    chunked = (b"Transfer-Encoding: chunked", b"Connection: close")
    status, lines, body = ask(filtered, post(*chunked, body=b"1\r\nx\r\n0\r\n\r\n", target=b"/chunked"))
    assert (status, len(body), lines[b"x-told"].split()[:2]) == (200, 300_000, [b"200", b"one"])
    assert curl(filtered, path="/h2") == (200, "x" * 300_000)
    assert all(request.values(b"x-sender") for request in scripted.requests) and len(scripted.requests) == 2
    for ended in (("1.1", "POST", "/chunked", 200), ("2", "GET", "/h2", 200)):
        wait_until(lambda ended=ended: filtered.telling.ended.count(ended) == 1)


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize(("path", "status", "told"), [("/no-entry", 403, b"no entry"), ("/error", 400, b"not this")])
def test_what_is_not_admitted_is_answered_before_its_body_comes(
    filtered: Filtered, scripted: WireBackend, path: str, status: int, told: bytes
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
@pytest.mark.parametrize("how", ["fail", "exit"])
def test_a_filter_that_fails_costs_its_request_and_nothing_else(
    filtered: Filtered, scripted: WireBackend, caplog: pytest.LogCaptureFixture, hook: str, how: str, size: int
) -> None:
    scripted.reset()
    scripted.answer(ok(b"x" * size))
    path = f"/{how}-{hook}".encode()
    for data in (get(path), post(b"Content-Length: 1", b"Connection: close", body=b"x", target=path)):
        status, _, body = ask(filtered, data)
        if hook == "done":
            assert (status, len(body)) == (200, size)
        else:
            assert status == 500 and b"internal error" in body
    wait_until(lambda: causes(caplog) == [f"{hook} fails"] * 2, what="the log has each cause once")
    assert ask(filtered, get(b"/next"))[0] == 200  # its place was given back
    wait_until(lambda: filtered.pool.backends()[0].active == 0)


def causes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has with a traceback."""
    return [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


class Careless(Filter):
    """Each hook does what the test says."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.admitted: Any = None
        self.changes: Callable[[Request], dict[str, Any]] = lambda request: {}
        self.answered: Callable[[list[Line]], Any] = lambda lines: lines

    def admit(self, request: Request) -> Answer | None:
        admitted: Answer | None = self.admitted
        return admitted

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        for name, value in self.changes(request).items():
            setattr(outgoing, name, value)

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        changed: list[Line] = self.answered(lines)
        return changed


@pytest.fixture(scope="module")
def careless(scripted: WireBackend) -> Iterator[Filtered]:
    with Filtered(scripted.url, Careless()) as balancer:
        yield balancer


HOST = (b"host", b"test")
WRONG_LINES: list[Any] = [
    *((b"x-a", value) for value in (b"a\r\nx-evil: 1", b"a\n", b"\0", "text", None)),
    *((name, b"1") for name in (b"x a", b"x\r\ny", b"x:y", b"", "text", b"content-length", b"Transfer-Encoding")),
    (b"connection", b"close"),
    b"x-a: 1",
]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"send": lambda request, line=line: {"lines": [HOST, line]}} for line in WRONG_LINES),
        {"send": lambda request: {"lines": [HOST, (b"x-path", request.path.encode("latin-1"))]}},
        {"send": lambda request: {"lines": []}},
        {"send": lambda request: {"lines": [HOST, (b"Host", b"other")]}},
        *({"send": lambda request, t=target: {"target": t}} for target in (b"/a b", b"/\r\nx-evil: 1", b"x", "/a")),
        *({"send": lambda request, m=method: {"method": m}} for method in ("A B", "A\r\n", "TRACE", "")),
        {"send": lambda request: {"body": "text"}},
        *({"answer": lambda lines, line=line: [*lines, line]} for line in WRONG_LINES),
        *({"answer": lambda lines, given=given: given} for given in ("text", None, [])),
        {"answer": lambda lines: lines.clear() or lines},
        *({"admit": whole(403, b"no", line)} for line in WRONG_LINES),
        {"admit": "text"},
        {"admit": Answer(403, "Forbidden", [], "text")},  # type: ignore[arg-type]
        {"admit": Answer(99, "No", [], b"")},
    ],
)
def test_what_a_filter_makes_is_checked_before_it_goes_out(
    careless: Filtered, scripted: WireBackend, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    """A path is unquoted, so a client could put lines into whatever a filter makes of it."""
    scripted.reset()
    telling: Any = careless.telling
    telling.admitted = wrong.get("admit")
    telling.changes = wrong.get("send", telling.changes)
    telling.answered = wrong.get("answer", telling.answered)
    try:
        status, lines, body = ask(careless, get(b"/a%0d%0ax-evil:%201"))
    finally:
        telling.reset()
    assert status == 500 and b"internal error" in body and b"x-evil" not in lines
    assert len(causes(caplog)) == 1 and scripted.seen == ("answer" in wrong)
    assert ask(careless, get(b"/next"))[0] == 200  # its place was given back
    wait_until(lambda: [r["status"] for r in careless.requests(2)] == [200, 500])


def test_a_body_that_a_filter_sets_is_framed_anew(careless: Filtered, scripted: WireBackend) -> None:
    telling: Any = careless.telling
    for body in (b"longer", None):
        scripted.reset()
        telling.changes = lambda request, body=body: {"body": body}
        assert ask(careless, post(b"Content-Length: 1", b"Connection: close", body=b"x"))[0] == 200
        assert [(r.body, r.values(b"content-length")) for r in scripted.requests] == [
            (body or b"", [b"%d" % len(body or b"")])
        ]
    telling.reset()


def test_filters_see_what_comes_through_wsgi(filtered: Filtered, scripted: WireBackend) -> None:
    scripted.reset()
    answer = filtered.app.test_client().get("/x")
    assert answer.status_code == 200 and answer.headers["X-Told"].startswith("200 one ")
    assert filtered.app.test_client().get("/no-entry").data == b"no entry"


def test_a_strategy_is_told_of_the_request(scripted: WireBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what its client claims to be."""
    scripted.reset()
    monkeypatch.setattr(strategies, "REGISTRY", dict(strategies.REGISTRY))

    @strategy("by_header")
    class ByHeader(Strategy):
        """The backend that X-Wanted names."""

        def select(self, candidates: Sequence[Backend], request: Request) -> Backend:
            asked = (request.method, request.path, request.headers["X-Wanted"], request.headers["X-Forwarded-For"])
            return next(backend for backend in candidates if asked == ("GET", "/by-header", backend.id, "127.0.0.1"))

    backends = [f"{name}={scripted.url}" for name in ("one", "two")]
    with LoadBalancer(backends, algorithm="by_header", expose_backend=True) as balancer:
        wait_until(lambda: all(backend.is_ready for backend in balancer.pool.backends()))
        for name in ("one", "two", "two"):
            answer = fetch(f"{balancer.url}/by-header", X_Wanted=name, X_Forwarded_For="1.2.3.4")
            assert (answer[0], answer[1]["x-served-by"]) == (200, name)
