"""The express way: what needs no thread takes none, and whatever goes wrong on it goes on elsewhere."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, NoReturn

import pytest
from stub_granian import Client, piece
from support import (
    Balancer,
    connect,
    fetch,
    free_port,
    get,
    ok,
    options,
    read_all,
    split_response,
    wait_until,
)
from wire import WireBackend, post, read_response

from balancer.balancing.backends import LastCheck
from balancer.edge import bridge
from balancer.edge.bridge import WATCH_AFTER_SECONDS
from balancer.edge.express import Express
from balancer.edge.workers import WorkerPool
from balancer.forwarding.forwarding import Forwarding
from balancer.loadbalancer import LoadBalancer
from balancer.protocol.origin import Origin
from balancer.upstream.connection import Connection
from balancer.upstream.transport import BackendAdapter, OutgoingRequest, Timeouts
from bench import guard

Both = dict[str, WireBackend]


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[Balancer]:
    """Two backends `a` and `b`, each with a kept connection; a minute to answer, unless a test sets another time."""
    seconds = getattr(request, "param", 60)
    made = {name: WireBackend() for name in "ab"}
    balancer = Balancer(
        *(f"--backend={name}={backend.url}" for name, backend in made.items()),
        "--algorithm=round_robin", f"--response-timeout={seconds}", "--pool-idle-timeout=30", "--thread-idle-timeout=1",
    )  # fmt: skip
    balancer.backends = made  # type: ignore[attr-defined]
    yield balancer
    balancer.stop()
    for backend in made.values():
        backend.close()


@pytest.fixture
def backends(started: Balancer) -> dict[str, WireBackend]:
    """Both have answered once, so a request without a body finds a kept connection."""
    made: dict[str, WireBackend] = started.backends  # type: ignore[attr-defined]
    for _ in range(4):
        assert fetch(f"{started.url}/warm")[0] == 200
    for backend in made.values():
        backend.requests.clear()
    return made


def script_all(backends: Both, script: Any) -> None:
    for backend in backends.values():
        backend.script = script


def script_once(backends: Both, first: Any, then: bytes) -> None:
    """Whichever is asked first does as `first` says; from then on both answer `then`."""

    def script(sock: socket.socket, request: Any) -> None:
        script_all(backends, lambda sock, request: sock.sendall(ok(then)))
        first(sock, request)

    script_all(backends, script)


@pytest.mark.parametrize("body", [None, b"x", bytes(65536)])
def test_requests_in_flight_need_no_threads(body: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes 0.1 s after its head rightly gets a thread, and on a busy machine any may: not so here."""
    monkeypatch.setattr(bridge, "WATCH_AFTER_SECONDS", 60)
    backend, count = WireBackend(), 100
    go = backend.hold()

    def workers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("worker-")]

    def ask(data: bytes) -> bytes:
        with connect(balancer.port) as sock:
            sock.settimeout(60)
            sock.sendall(data)
            return read_all(sock)

    def asked(target: bytes) -> bytes:
        if body is None:
            return get(target)
        return get(target, b"Content-Length: %d" % len(body), method=b"POST") + body

    def all_at_once() -> None:
        """All are in flight, and no thread waits for any of them: those that opened connections have ended."""
        go.clear()
        backend.requests.clear()
        with ThreadPoolExecutor(count) as clients:
            answers = [clients.submit(ask, asked(b"/%d" % number)) for number in range(count)]
            wait_until(lambda: len(backend.requests) == count)
            wait_until(lambda: not workers(), "no thread waits")
            go.set()
            bodies = [split_response(answer.result())[2] for answer in answers]
            assert bodies == [b"/%d" % number for number in range(count)]

    limits = ("--thread-idle-timeout=1", "--pool-idle-timeout=60", "--response-timeout=60")
    with closing(backend), Balancer(f"--backend={backend.url}", *limits) as balancer:
        all_at_once()  # on new connections
        all_at_once()  # on kept ones


@pytest.mark.parametrize("started", [1], indirect=True)
def test_an_answer_that_does_not_come_is_given_up_and_asked_for_elsewhere(started: Balancer, backends: Both) -> None:
    script_once(backends, lambda sock, request: None, b"second")
    assert fetch(f"{started.url}/x", X_Request_ID="late-1")[2] == b"second"
    told = next(one for one in started.status()["recent_requests"] if one["request_id"] == "late-1")
    assert [attempt["outcome"] for attempt in told["tried"]] == ["http_response_timeout", "200"]
    assert told["tried"][0]["connect"] is None and told["tried"][0]["seconds"] > 0.9


@pytest.mark.parametrize("pause", [0.0, 3 * WATCH_AFTER_SECONDS])
def test_a_small_body_may_come_in_pieces_and_late(started: Balancer, backends: Both, pause: float) -> None:
    body = os.urandom(60_000)
    with connect(started.port) as client, client.makefile("rb") as stream:
        for turn in range(3):
            client.sendall(post(b"Content-Length: 60000", target=b"/%d" % turn))
            for start in range(0, 60_000, 15_000):
                threading.Event().wait(pause or 0.01)
                client.sendall(body[start : start + 15_000])
            assert read_response(stream)[0] == 200
    assert [one.body for backend in backends.values() for one in backend.requests] == [body] * 3


def test_a_small_body_of_many_pieces_is_one_for_a_thread(started: Balancer, backends: Both) -> None:
    body = os.urandom(100)
    with connect(started.port) as client, client.makefile("rb") as stream:
        client.sendall(post(b"Content-Length: 100"))
        for byte in body:
            client.sendall(bytes([byte]))
            threading.Event().wait(0.001)
        assert read_response(stream)[0] == 200
    assert [one.body for backend in backends.values() for one in backend.requests] == [body]


@pytest.mark.parametrize("pause", [0.0, 3 * WATCH_AFTER_SECONDS])
def test_a_client_that_leaves_in_a_small_body_troubles_no_backend(
    started: Balancer, backends: Both, pause: float
) -> None:
    with connect(started.port) as client:
        client.sendall(post(b"Content-Length: 10", body=b"12345"))
        wait_until(lambda: started.status()["statistics"]["active_requests"] == 1)
        threading.Event().wait(pause)
    wait_until(lambda: started.status()["statistics"]["active_requests"] == 0)
    assert started.status()["statistics"]["aborted_requests"] == 1
    assert not any(backend.requests for backend in backends.values())  # after a pause one has what had come
    assert not any(started.backend(each)["health"]["consecutive_failures"] for each in backends)


class Narrow:
    """A socket that takes so many bytes at once, none if its backend reads nothing."""

    def __init__(self, sock: socket.socket, room: int) -> None:
        self.whole = sock
        self._room = room

    def send(self, data: bytes, flags: int = 0) -> int:
        assert flags & socket.MSG_DONTWAIT, "it would hold up whoever brings requests"
        if not self._room:
            raise BlockingIOError
        return self.whole.send(data[: self._room], flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


@pytest.mark.parametrize("room", [0, 1000])
def test_a_request_that_goes_out_in_part_is_finished_by_a_thread(room: int) -> None:
    """`send_now` sends what the socket takes at once, `exchange` the rest."""
    body = os.urandom(1_000_000)
    adapter, backend = BackendAdapter(options(Timeouts)), WireBackend()
    origin = Origin.parse(backend.url)
    try:
        adapter.exchange(OutgoingRequest("GET", b"/", [(b"host", b"a")]), origin)
        (kept,) = adapter._idle[origin]
        kept.sock = Narrow(kept.sock, room)  # type: ignore[assignment]
        outgoing = OutgoingRequest("POST", b"/", [(b"host", b"a")])
        outgoing.set_body(body)
        sent = adapter.send_now(outgoing, origin)
        assert sent is not None and 0 < len(sent.rest) and not sent.is_whole
        kept.sock = kept.sock.whole  # type: ignore[attr-defined]
        assert adapter.exchange(outgoing, origin, sent).status_code == 200
        assert sent.is_whole
        assert [one.body for one in backend.requests] == [b"", body]
    finally:
        adapter.close()
        backend.close()


def break_off(sock: socket.socket, request: Any) -> None:
    """Head, a piece of the body and the end of the connection in one packet, so that they are seen together."""
    sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", socket.MSG_MORE)
    sock.shutdown(socket.SHUT_RDWR)


def test_an_answer_that_breaks_off_with_its_head_is_asked_for_elsewhere(started: Balancer, backends: Both) -> None:
    script_once(backends, break_off, b"second")
    assert fetch(f"{started.url}/x", X_Request_ID="broken-1")[::2] == (200, b"second")
    told = next(one for one in started.status()["recent_requests"] if one["request_id"] == "broken-1")
    assert [attempt["outcome"] for attempt in told["tried"]] == ["http_response_incomplete", "200"]
    assert {attempt["backend"] for attempt in told["tried"]} == {"a", "b"}


def test_a_post_whose_answer_breaks_off_with_its_head_is_a_502(started: Balancer, backends: Both) -> None:
    script_all(backends, break_off)
    assert fetch(f"{started.url}/x", method="POST", X_Request_ID="broken-2")[0] == 502
    told = next(one for one in started.status()["recent_requests"] if one["request_id"] == "broken-2")
    assert (told["reason"], told["attempts"], told["bytes_out"]) == ("http_response_incomplete", 1, 0)
    assert sum(len(backend.requests) for backend in backends.values()) == 1


@pytest.mark.parametrize("size", [0, 1, 65536, 3_000_000])
@pytest.mark.parametrize("pieces", [1, 7])
def test_answers_of_any_size_and_in_any_pieces_come_through_whole(
    started: Balancer, backends: Both, size: int, pieces: int
) -> None:
    data = ok(os.urandom(size), b"X-Check: yes")
    pause = threading.Event()

    def script(sock: socket.socket, request: Any) -> None:
        for start in range(0, len(data), -(-len(data) // pieces)):
            sock.sendall(data[start : start + -(-len(data) // pieces)])
            pause.wait(0.01)

    script_all(backends, script)
    for _ in range(3):
        status, headers, body = fetch(f"{started.url}/x")
        assert (status, headers["x-check"], body) == (200, "yes", data[-size:] if size else b"")


def test_a_client_that_leaves_takes_its_backend_connection_with_it(started: Balancer, backends: Both) -> None:
    ended = threading.Event()

    def script(sock: socket.socket, request: Any) -> None:
        sock.settimeout(60)
        ended.set() if sock.recv(1) == b"" else None

    script_all(backends, script)
    with connect(started.port) as client:
        client.sendall(get(b"/left"))
        wait_until(lambda: any(backend.requests for backend in backends.values()))
    assert ended.wait(60)
    wait_until(lambda: started.status()["statistics"]["aborted_requests"] == 1)
    assert all(backend["active_connections"] == 0 for backend in started.status()["backend_servers"])
    assert all(backend["ejection"]["consecutive_failures"] == 0 for backend in started.status()["backend_servers"])


# In this process.


@pytest.fixture
def parts() -> Iterator[tuple[LoadBalancer, Any]]:
    """A wired balancer whose three backends are believed to be up, and its bridge; nothing runs."""
    balancer = LoadBalancer([f"{name}=http://127.0.0.1:{free_port()}" for name in "abc"])
    (bridge,) = balancer.make_bridges()
    for backend in balancer.control.pool.backends():
        balancer.control.pool.record_check(backend, LastCheck(1.0, 0.001, 200, None))
    yield balancer, bridge
    bridge.pool.stop(5)
    balancer.stop_parts()


def states(balancer: LoadBalancer) -> list[tuple[str, int, int]]:
    shown = balancer.control.pool.snapshot()
    return [(b["state"], b["active_connections"], b["ejection"]["consecutive_failures"]) for b in shown]


def test_a_backend_is_not_blamed_when_the_balancer_has_no_thread(parts: tuple[LoadBalancer, Any]) -> None:
    balancer, bridge = parts
    bridge.pool.stop(1)  # takes nothing any more
    for _ in range(20):
        client = Client()
        bridge.accept(client)
        assert (client.status, client.is_done) == (503, True)
    assert states(balancer) == [("up", 0, 0)] * 3 and bridge.active == 0


def surprise(forwarding: Any) -> bool:
    raise RuntimeError("surprise")


def test_a_surprise_on_the_way_in_is_answered_and_forgotten(
    parts: tuple[LoadBalancer, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer, bridge = parts
    monkeypatch.setattr(Forwarding, "start", surprise)
    client = Client()
    bridge.accept(client)
    assert (client.status, client.is_done, bridge.active) == (503, True, 0)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [(record.message, str((record.exc_info or [None] * 2)[1])) for record in errors] == [
        ("request failed", "surprise")
    ]
    assert balancer.control.statistics.snapshot()[0]["active_requests"] == 0


def test_a_surprise_while_a_worker_connects_is_answered_and_forgotten(
    parts: tuple[LoadBalancer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    balancer, bridge = parts
    monkeypatch.setattr(Forwarding, "connect", surprise)
    client = Client()
    bridge.accept(client)
    wait_until(lambda: client.is_done)
    assert (client.status, bridge.active) == (503, 0)
    assert states(balancer) == [("up", 0, 0)] * 3


def test_a_surprise_after_a_body_has_come_is_answered_and_forgotten(
    parts: tuple[LoadBalancer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bridge = parts
    monkeypatch.setattr(Forwarding, "start", surprise)
    client = Client(guard.Kind("POST", b"x"))
    bridge.accept(client)
    assert (client.status, bridge.active) == (None, 1)
    client.asked[0].keep(piece(b"x", more=False))
    assert (client.status, client.is_done, bridge.active) == (503, True, 0)


def test_the_watch_for_leaving_clients_outlives_a_surprise(
    parts: tuple[LoadBalancer, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bridge = parts
    monkeypatch.setattr(Forwarding, "start", lambda forwarding: True)
    bridge.express.wait_for = lambda call: True  # and never answers it
    watched: list[Client] = []

    class Surprising(Client):
        def receive(self) -> NoReturn:
            watched.append(self)
            raise RuntimeError("surprise")

    async def watch() -> None:
        task = asyncio.create_task(bridge.watch())
        while len(watched) < 3 and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()

    clients = [Surprising() for _ in range(3)]
    for client in clients:
        bridge.accept(client)
    asyncio.run(watch())
    assert watched == clients and caplog.text.count("watching clients failed") == 3


class Handed(WorkerPool):
    """Workers that note what they get."""

    def __init__(self) -> None:
        super().__init__(1, 1, 1.0)
        self.calls: list[tuple[Any, bool]] = []

    def submit(self, call: Any, is_control: bool, *, is_under_way: bool = False) -> bool:
        self.calls.append((call, is_under_way))
        return True


class SentCall:
    """A call whose request was sent, to be answered until `deadline`."""

    def __init__(self, deadline: float) -> None:
        self.forwarding = self.sent = self
        self.connection: Connection
        self.rest = b""
        self.deadline = deadline
        self.is_expired = False

    def connect(self, sock: socket.socket) -> None:
        self.connection = Connection(sock, Origin("http", "127.0.0.1", 1))

    def expire(self) -> None:
        self.is_expired = True


def test_a_call_that_is_overdue_before_it_is_watched_is_not_lost() -> None:
    """The thread that brings it is between its two steps."""
    workers, call = Handed(), SentCall(0.0)
    express = Express(workers)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        call.connect(listener)
        express._waiting[listener.fileno()] = call  # type: ignore[assignment]
        express.run_once()
    assert workers.calls == [(call, True)] and call.is_expired and express._waiting == {}
    express.stop()


def test_a_descriptor_that_is_used_again_loses_no_call() -> None:
    """The first call is found overdue before it is watched, its connection closed, and the next one gets its number."""
    workers, overdue, following = Handed(), SentCall(0.0), SentCall(math.inf)
    looked: list[Any] = []

    class Interrupted(Express):
        def _watch(self, descriptor: int, connection: Connection) -> None:
            if self._waiting[descriptor] is overdue:  # type: ignore[comparison-overlap]
                self._expire(time.monotonic())
                overdue.connection.close()
                ours, peer = (sockets.enter_context(each) for each in socket.socketpair())
                assert ours.fileno() == descriptor
                following.connect(ours)
                assert self.wait_for(following)  # type: ignore[arg-type]
                peer.send(b"x")
            super()._watch(descriptor, connection)

        def _look(self, call: Any) -> None:
            looked.append(call)

    express = Interrupted(workers)
    with ExitStack() as sockets:
        overdue.connect(sockets.enter_context(socket.socket()))
        assert express.wait_for(overdue)  # type: ignore[arg-type]
        for _ in range(2):  # each time on the same connection
            express.run_once()
            assert looked.pop() is following and not looked
            assert express.wait_for(following)  # type: ignore[arg-type]
    assert workers.calls == [(overdue, True)] and overdue.is_expired and not following.is_expired
    express.stop()


def test_what_comes_while_nobody_waits_for_it_is_left_and_found_later() -> None:
    """The thread that brings a call is between sending its request and saying so; then a worker reads an answer."""
    looked: list[Any] = []

    class Looking(Express):
        def _look(self, call: Any) -> None:
            looked.append(call.connection.sock.recv(9))

    express, call = Looking(Handed()), SentCall(math.inf)
    with ExitStack() as sockets:
        ours, peer = (sockets.enter_context(each) for each in socket.socketpair())
        call.connect(ours)
        for expected in (b"first", b"second", b"third"):
            if expected != b"first":  # else it was never watched
                peer.send(expected)
                express.run_once()
                assert not looked and express._watched == {} and not call.connection.is_watched
            assert express.wait_for(call)  # type: ignore[arg-type]
            if expected == b"first":
                peer.send(expected)
            express.run_once()
            assert looked.pop() == expected and list(express._watched.values()) == [call.connection]
            assert call.connection.is_watched
    express.stop()


def test_a_surprise_with_one_answer_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Surprised(Express):
        def _look(self, call: Any) -> None:
            raise RuntimeError("surprise")

    express = Surprised(Handed())
    with ExitStack() as stack:
        for _ in range(3):
            ours, peer = (stack.enter_context(sock) for sock in socket.socketpair())
            call = SentCall(math.inf)
            call.connect(ours)
            assert express.wait_for(call)  # type: ignore[arg-type]
            peer.send(b"x")
        express.run_once()
    assert caplog.text.count("passing on an answer failed") == 3 and express._waiting == {}
    express.stop()


@pytest.mark.parametrize("started", [3], indirect=True)
def test_the_rest_of_a_head_gets_only_what_is_left_of_its_time(started: Balancer, backends: Both) -> None:
    pause = threading.Event()

    def script(sock: socket.socket, request: Any) -> None:
        pause.wait(2.5)
        sock.sendall(b"HTTP/1.1 200")

    script_all(backends, script)
    assert fetch(f"{started.url}/x", method="POST", X_Request_ID="rest-1")[0] == 504
    told = next(one for one in started.status()["recent_requests"] if one["request_id"] == "rest-1")
    assert told["attempts"] == 1 and told["response_time"] < 2.5 + 3
