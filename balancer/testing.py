"""A plugin of pytest's: balancers and backends in the process of your tests, and why a request went where it went.

    def test_failover(load_balancer, backend_factory):
        backends = [backend_factory("good"), backend_factory("bad", fault="reset")]
        lb = load_balancer(backends)
        assert requests.get(lb.url).status_code == 200

Once installed, pytest finds it by itself; `-p no:balancer.testing` leaves it out. docs/library.md says more.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pytest

if TYPE_CHECKING:
    from balancer.loadbalancer import LoadBalancer

Fault = Literal["hang", "reset", "broken"]

LOOK_SECONDS = 0.01  # how often a request that hangs looks whether it still has to
STOP_SECONDS = 0.1  # for what is in flight when a test ends
SHOWN = 20  # requests in the report of a failed test, and as many events

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "latency": (lambda it: isinstance(it, int | float) and 0 <= it <= 86400, "a number of seconds from 0 to 86400"),
    "status": (lambda it: isinstance(it, int) and 200 <= it <= 599, "a whole number from 200 to 599"),
    "body": (lambda it: isinstance(it, bytes), "bytes"),
    "fault": (lambda it: it is None or it in get_args(Fault), "'hang', 'reset', 'broken' or None"),
    "healthy": (lambda it: isinstance(it, bool), "True or False"),
    "health_path": (lambda it: isinstance(it, str) and it.startswith("/"), "a path such as /health"),
}


class Received(NamedTuple):
    """A request as a backend got it. `headers` has the last line of each name, in lower case; `lines` has all."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    lines: list[tuple[str, str]]


class Backend:
    """An HTTP server on a port of its own. Its attributes may be changed at any time.

    `latency` in seconds, `status` and `body` are those of every answer. `fault` "hang" gives none for as long as it is
    set, "reset" breaks the connection off instead, "broken" in the midst of the body. `healthy` is what `health_path`
    says; `received` has all other requests, oldest first. A wrong value is a ValueError, a wrong name an
    AttributeError.
    """

    __slots__ = ("_server", "_thread", "closing", "id", "received", "url", *CHECKS)

    def __init__(
        self,
        id: str,
        *,
        latency: float = 0.0,
        status: int = 200,
        body: bytes = b"ok",
        fault: Fault | None = None,
        healthy: bool = True,
        health_path: str = "/health",
    ) -> None:
        self.id = id
        self.latency = latency
        self.status = status
        self.body = body
        self.fault = fault
        self.healthy = healthy
        self.health_path = health_path
        self.received: list[Received] = []
        self.closing = Event()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(LOOK_SECONDS,), name=f"backend-{id}")
        self._thread.start()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS:
            fits, expected = CHECKS[name]
            if not fits(value):
                raise ValueError(f"{name} = {value!r}: expected {expected}")
        super().__setattr__(name, value)

    def close(self) -> None:
        """Cut everybody off and be gone: from now on its port refuses connections."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that `server_close` joins them
    request_queue_size = 128

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.connections: set[socket.socket] = set()  # each thread puts its own in and takes it out
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has left, or was cut off."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        self.server.connections.add(self.connection)
        try:
            super().handle()
        finally:
            self.server.connections.discard(self.connection)

    def answer(self) -> None:
        backend = self.server.backend
        if self.path == backend.health_path:
            self._send(200 if backend.healthy else 503, b"")
            return
        lines = self.headers.items()
        names = {name.lower(): value for name, value in lines}
        backend.received.append(Received(self.command, self.path, names, self._body(), lines))
        backend.closing.wait(backend.latency)
        while backend.fault == "hang" and not backend.closing.wait(LOOK_SECONDS):
            pass
        if backend.closing.is_set():
            self.close_connection = True
        elif backend.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())
            self.close_connection = True
        else:
            self._send(backend.status, backend.body, missing=1 if backend.fault == "broken" else 0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # whatever the method
            return self.answer
        raise AttributeError(name)

    def _send(self, status: int, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        if status != 204:  # RFC 9110 section 8.6
            self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)
        self.close_connection = self.close_connection or missing > 0

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def log_message(self, format: str, *arguments: Any) -> None:
        """pytest's output is for the tests."""


_balancers = pytest.StashKey[list["LoadBalancer"]]()


class Ends(NamedTuple):
    backends: ExitStack
    balancers: ExitStack


@pytest.fixture
def _ends() -> Iterator[Ends]:
    """What is to be closed when the test ends. Balancers stop first, whichever fixture came first: or they would log
    that their backends have failed."""
    with ExitStack() as backends, ExitStack() as balancers:
        yield Ends(backends, balancers)


@pytest.fixture
def backend_factory(_ends: Ends) -> Callable[..., Backend]:
    """`backend_factory(id, latency=..., status=..., body=..., fault=..., healthy=..., health_path=...)` is a Backend
    that serves until the test ends."""
    made: list[Backend] = []

    def make(id: str = "", **behaviour: Any) -> Backend:
        made.append(Backend(id or f"backend_{len(made) + 1}", **behaviour))
        _ends.backends.callback(made[-1].close)
        return made[-1]

    return make


@pytest.fixture
def load_balancer(request: pytest.FixtureRequest, _ends: Ends) -> Callable[..., LoadBalancer]:
    """`load_balancer(backends, **settings)` is a LoadBalancer that serves until the test ends. Its backends may be
    Backends too. If the test fails, the report says what it did with each request."""
    from balancer.loadbalancer import LoadBalancer  # half a second, for tests that need it

    made = request.node.stash[_balancers] = []

    def start(backends: Any = None, **settings: Any) -> LoadBalancer:
        balancer = LoadBalancer(backends, **settings).start()
        _ends.balancers.callback(balancer.stop, STOP_SECONDS)
        made.append(balancer)
        return balancer

    return start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:  # the test, or the set-up or teardown of a fixture
        for balancer in item.stash.get(_balancers, []):
            report.sections.append((f"Load balancer {balancer.url}", "\n".join(_story(balancer))))
    return report


def _story(balancer: LoadBalancer) -> Iterator[str]:
    """What happened, and why each request went where it went; oldest first."""
    for event in balancer.events()[-SHOWN:]:
        yield f"{_time(event)} {event['kind']} {event['backend'] or ''}: {event['message']}"
    for why in reversed(balancer.requests(SHOWN)):
        reason = f", {why['reason']}" if why["reason"] else ""
        yield f"{_time(why)} {why['method']} {why['path']}: {why['status']} in {why['response_time']:.3f} s{reason}"
        for attempt in why["tried"]:
            outcome = attempt["error"] or attempt["outcome"]
            among = ", ".join(f"{each['id']} ({each['active']} in flight)" for each in attempt["candidates"])
            yield f"    {attempt['backend']}: {outcome}; {attempt['algorithm']} among {among}"
            yield from (f"    not {backend}: {cause}" for backend, cause in attempt["excluded"].items())
        yield from (f"    not {backend}: {cause}" for backend, cause in why["excluded"].items())
        if why["not_retried"] or why["error"]:
            yield f"    {why['not_retried'] or why['error']}"


def _time(record: Mapping[str, Any]) -> str:
    return time.strftime("%H:%M:%S", time.localtime(record["timestamp"]))
