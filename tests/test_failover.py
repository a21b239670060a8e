"""Backends that die, hang, lie or are changed by the operator, under load: what clients notice of it (nothing)."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any
from unittest.mock import Mock

import pytest
from fleet import Demo
from support import Balancer, Served, fetch, fetch_json, ok, options, wait_until
from wire import WireBackend, hang_up

from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.strategies import create
from balancer.fleet.health import FRESH_EVERY, Checks, HealthChecker, HealthOptions
from balancer.protocol.origin import Origin


@dataclass(frozen=True)
class Answer:
    """What one client saw; `status` 0 if the connection broke."""

    at: float
    method: str
    status: int
    served_by: str
    text: str


class Load:
    """Keep-alive clients that together send `per_second` requests until the block ends."""

    def __init__(self, port: int, per_second: float = 80, clients: int = 8, method: str = "GET") -> None:
        self._port = port
        self._pause = clients / per_second
        self._method = method
        self.ended = Event()
        self._lock = Lock()
        self.answers: list[Answer] = []
        self.threads = [Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self.ended.wait(self._pause):
            answer = self._ask(connection)
            with self._lock:
                self.answers.append(answer)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> Answer:
        status, served_by, text = 0, "", ""
        try:
            connection.request(self._method, "/api/process", body=b"{}" if self._method == "POST" else None)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
            status, served_by = response.status, response.headers.get("X-Served-By", "")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            text = repr(error)
        return Answer(time.monotonic(), self._method, status, served_by, text)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        self.wait_for(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def wait_for(self, count: int) -> list[Answer]:
        """The next `count` answers."""
        start = len(self.answers)
        wait_until(lambda: len(self.answers) >= start + count, f"{count} answers")
        return self.answers[start : start + count]

    def wait_for_server(self, backend: str) -> None:
        start = len(self.answers)
        wait_until(lambda: any(a.served_by == backend for a in self.answers[start:]), what=f"traffic on {backend}")

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]


def events(balancer: Served, kind: str, backend: str) -> list[dict[str, Any]]:
    newest = fetch_json(f"{balancer.url}/events")["events"]
    return [event for event in newest if (event["kind"], event["backend"]) == (kind, backend)]


def patch(balancer: Served, backend: str, **changes: Any) -> None:
    assert fetch(f"{balancer.url}/backends/{backend}", changes, "PATCH")[0] == 200


# Killed and started again.


@pytest.mark.parametrize("algorithm", ["weighted", "least_connections", "peak_ewma"])
def test_a_backend_killed_under_load_costs_no_get_and_comes_back(demo: Demo, algorithm: str) -> None:
    fetch(f"{demo.url}/algorithm", {"algorithm": algorithm})
    victim = demo.backends[1]
    with Load(demo.balancer.port) as load:
        victim.kill()
        demo.balancer.wait_healthy(victim.id, False)
        load.wait_for(60)
        assert victim.id not in {answer.served_by for answer in load.wait_for(20)}
        victim.start()
        load.wait_for_server(victim.id)  # from the moment it answers its own health check
        load.wait_for(20)
    assert load.failed == []
    status = demo.balancer.status(100)
    assert status["statistics"]["failed_requests"] == 0
    assert status["statistics"]["total_requests"] == len(load.answers)
    assert [event["severity"] for event in events(demo.balancer, "backend_down", victim.id)] == ["error"]
    assert len(events(demo.balancer, "backend_up", victim.id)) == 2


def test_a_backend_killed_with_many_requests_in_flight_costs_no_get(demo: Demo) -> None:
    """About a third of 40 requests in flight die at the same moment, and every one is retried elsewhere."""
    fetch(f"{demo.url}/algorithm", {"algorithm": "round_robin"})
    for backend in demo.backends:
        backend.delay = 0.15
    with Load(demo.balancer.port, per_second=1000, clients=40) as load:
        load.wait_for(300)  # whose share may be sent again
        victim = demo.backends[1]
        victim.delay = 60.0  # or those that are counted would be answered before it is killed
        before = victim.seen
        wait_until(lambda: victim.seen >= before + 8)
        victim.kill()
        load.wait_for(200)
    assert load.failed == []
    assert demo.balancer.status()["statistics"]["retries"] >= 5


def test_a_killed_backend_costs_only_the_posts_that_were_on_it(demo: Demo) -> None:
    """A POST whose answer is lost must not be sent twice; those that could not connect go elsewhere."""
    with Load(demo.balancer.port, method="POST") as load:
        demo.backends[0].kill()
        demo.balancer.wait_healthy("backend_1", False)
        before = len(load.answers)
        load.wait_for(60)
    assert [answer for answer in load.answers[before + 8 :] if answer.status != 200] == []
    assert len(load.failed) <= 8
    for answer in load.failed:
        assert answer.status == 502
        body = json.loads(answer.text)
        assert body["error"] and body["load_balancer_id"] and body["request_id"]


# Health checks that are answered wrongly. The checks ask for /check, so that the scripts here see them.


def hang(sock: socket.socket, request: Any) -> None:
    """Give no answer until the other side goes."""
    sock.recv(1)


def drip(sock: socket.socket, request: Any) -> None:
    """A byte now and then, for ever: never quite silent."""
    pause = Event()
    with suppress(OSError):
        for number in range(100_000):
            sock.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: "[number : number + 1] or b"x")
            pause.wait(0.05)


def reset(sock: socket.socket, request: Any) -> None:
    """Answer with a TCP reset: nobody reads on, so the socket is closed, and with this option that is a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.shutdown(socket.SHUT_RD)


class Checked:
    """Scripted backends behind one balancer that asks each for /check."""

    def __init__(self, stack: ExitStack, *more_flags: str, **scripts: Any) -> None:
        self.backends: dict[str, WireBackend] = {}
        for name, script in scripts.items():
            backend = self.backends[name] = WireBackend()
            stack.callback(backend.close)
            if callable(script):
                backend.script = script
            else:
                backend.answer(script)
        flags = [f"--backend={name}={backend.url}" for name, backend in self.backends.items()]
        self.balancer = Balancer(
            *flags, "--health-path=/check", "--health-timeout=0.4", "--expose-backend", *more_flags
        )
        stack.callback(self.balancer.stop)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


BAD_CHECKS: dict[str, tuple[Any, str]] = {
    "hangs": (hang, "within 0."),
    "closes": (lambda sock, request: sock.shutdown(socket.SHUT_RDWR), "closed"),
    "resets": (reset, "reset"),
    "drips": (drip, "s"),
    "answers-500": (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "500"),
    "answers-404": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
    "no-http": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed"),
    "endless-head": (b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 200_000, ""),
}
GOOD_CHECKS: dict[str, bytes] = {
    "good": ok(),
    "no-content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "moved": b"HTTP/1.1 301 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    "not-modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "long-body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nstart",
}


def test_wrong_answers_to_health_checks_are_told_apart_and_delay_nobody(stack: ExitStack) -> None:
    scripts = {name: script for name, (script, _) in BAD_CHECKS.items()} | GOOD_CHECKS
    checked = Checked(stack, **scripts)
    balancer = checked.balancer
    for name in GOOD_CHECKS:
        balancer.wait_healthy(name, True)
    for name, (_, word) in BAD_CHECKS.items():
        health = wait_until(lambda name=name: down(balancer, name), name)
        assert word in health["reason"], name
        assert health["last_check"]["error"] and health["last_check"]["duration"] < 20

    # The good ones are checked at their usual pace beside the bad ones, and a change is seen at once.
    at = balancer.backend("good")["health"]["last_check"]["at"]
    wait_until(lambda: balancer.backend("good")["health"]["last_check"]["at"] > at + 0.9)
    checked.backends["good"].answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    balancer.wait_healthy("good", False)
    assert "503" in balancer.backend("good")["health"]["reason"]
    checked.backends["good"].answer(ok())
    balancer.wait_healthy("good", True)

    # A redirect counts as good and is not followed.
    assert {request.target for request in checked.backends["moved"].requests} == {b"/check"}

    # A backend that hangs can recover too.
    checked.backends["hangs"].answer(ok())
    balancer.wait_healthy("hangs", True)

    # Those that are down get no requests.
    for name in GOOD_CHECKS:
        if name != "good":  # what they answer is for health checks only
            assert fetch(f"{balancer.url}/backends/{name}", method="DELETE")[0] == 200
    assert {fetch(f"{balancer.url}/x")[1]["x-served-by"] for _ in range(20)} == {"good", "hangs"}


def down(balancer: Balancer, name: str) -> dict[str, Any] | None:
    health: dict[str, Any] = balancer.backend(name)["health"]
    return health if health["status"] == "down" and health["reason"] else None


def test_a_name_that_does_not_resolve_is_down_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with Balancer("--backend=lost=http://no-such-host.invalid:80") as balancer:
        assert wait_until(lambda: down(balancer, "lost"))["reason"]
    assert "Traceback" not in caplog.text


def test_backends_with_one_worker_each_lose_no_request(stack: ExitStack) -> None:
    """They answer no check while they work, and each request takes longer than it takes to call a backend down."""
    balancer: Balancer

    def failed() -> int:
        return sum(counts.failed_checks for counts in balancer.library.pool.counts().values())

    def one_worker() -> Any:
        worker = Lock()

        def script(sock: socket.socket, request: Any) -> None:
            with worker:
                if request.target != b"/check":
                    enough = failed() + 8
                    wait_until(lambda: failed() >= enough)
                sock.sendall(ok())

        return script

    balancer = Checked(stack, one=one_worker(), two=one_worker()).balancer
    with ThreadPoolExecutor(4) as clients:
        assert list(clients.map(lambda _: fetch(f"{balancer.url}/x")[0], range(8))) == [200] * 8
    assert not [event for event in balancer.library.events() if event["kind"] == "backend_down"]


def test_the_page_of_a_check_is_read_to_its_end(stack: ExitStack) -> None:
    """A backend that is cut off while it writes sees a reset, others the end or the next check."""
    ends: list[bytes | None] = []

    def script(sock: socket.socket, request: Any) -> None:
        try:
            sock.sendall(ok(b"x" * 500_000))
            ends.append(sock.recv(1))
        except OSError:
            ends.append(None)

    checked = Checked(stack, "--health-timeout=5", large=script)
    wait_until(lambda: len(ends) >= 3)
    assert set(ends) <= {b"", b"G"}
    assert checked.balancer.backend("large")["healthy"]


OFTEN = "--health-interval=0.1"


def test_a_quiet_backend_is_checked_on_a_kept_connection_and_now_and_then_on_its_own(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept one would not notice that nobody can connect any more. Neither needs a thread."""
    with_thread: list[Any] = []
    check = HealthChecker.check_once
    monkeypatch.setattr(HealthChecker, "check_once", lambda *args: with_thread.append(args) or check(*args))
    backend = Checked(stack, OFTEN, keeps=ok()).backends["keeps"]
    wait_until(lambda: len(backend.requests) >= 2 * FRESH_EVERY + 2)
    assert max(Counter(backend.peers).values()) >= FRESH_EVERY
    closing = (b"close" in request.values(b"connection") for request in backend.requests)
    assert sum(closing) > sum(not keeps for _, _, _, keeps, *_ in with_thread)  # which the very first one had


def test_a_kept_connection_that_has_died_is_no_failure(stack: ExitStack) -> None:
    """Its server may end it at any time, even when the check is on its way."""
    checked = Checked(stack, OFTEN, drops=ok())
    backend = checked.backends["drops"]
    served: Counter[socket.socket] = Counter()

    def twice(sock: socket.socket, request: Any) -> None:
        served[sock] += 1
        if served[sock] == 3:
            hang_up(sock)
        sock.sendall(ok())

    backend.script = twice
    wait_until(lambda: list(served.values()).count(3) >= 3)
    backend.answer(ok())
    wait_until(lambda: max(Counter(backend.peers).values()) >= 4)
    backend.drop_connections()
    wait_until(lambda: len(backend.used) == 1)
    assert checked.balancer.library.pool.counts()["drops"].failed_checks == 0


def test_whom_nobody_checks_any_more_keeps_no_connection(stack: ExitStack) -> None:
    """It hangs just then: who is removed in that moment would else have it until the balancer ends."""
    checked = Checked(stack, OFTEN, "--health-timeout=60", frozen=ok())
    backend = checked.backends["frozen"]
    wait_until(lambda: max(Counter(backend.peers).values(), default=0) >= 3)
    closed, seen = backend.stall(), len(backend.requests)
    wait_until(lambda: len(backend.requests) > seen)
    patch(checked.balancer, "frozen", admin_state="maint")
    assert closed.acquire(timeout=30)


def test_a_long_or_late_answer_on_a_kept_connection_is_waited_for(stack: ExitStack) -> None:
    pause = Event()

    def in_pieces(sock: socket.socket, request: Any) -> None:
        answer = ok(b"x" * 300_000)
        sock.sendall(answer[:30])
        pause.wait(0.05)
        sock.sendall(answer[30:])

    checked = Checked(stack, "--health-timeout=5", slow=in_pieces)
    wait_until(lambda: max(Counter(checked.backends["slow"].peers).values(), default=0) >= 4)
    assert checked.balancer.library.pool.counts()["slow"].failed_checks == 0


def test_a_backend_that_stops_listening_but_keeps_its_connections_is_down(stack: ExitStack) -> None:
    checked = Checked(stack, OFTEN, keeps=ok())
    backend, balancer = checked.backends["keeps"], checked.balancer
    wait_until(lambda: len(backend.requests) >= 4)
    backend.listener.shutdown(socket.SHUT_RDWR)
    balancer.wait_healthy("keeps", False)
    wait_until(lambda: "refused" in balancer.backend("keeps")["health"]["reason"].lower())
    before = balancer.library.pool.counts()["keeps"]
    wait_until(lambda: balancer.library.pool.counts()["keeps"].failed_checks >= before.failed_checks + 5)
    assert balancer.library.pool.counts()["keeps"].ups == before.ups


def test_a_hundred_hanging_backends_delay_no_check_of_the_others(stack: ExitStack) -> None:
    """More than there are places for such."""
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
    checked = Checked(stack, good=ok())
    for number in range(100):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert fetch(f"{checked.balancer.url}/backends", {"id": f"silent-{number}", "url": url})[0] == 201
    assert "within 0." in wait_until(lambda: down(checked.balancer, "silent-99"))["reason"]
    checked.backends["good"].answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    checked.balancer.wait_healthy("good", False)


# The operator at work, under load.


def test_a_backend_in_maintenance_is_not_checked_and_one_that_drains_is(stack: ExitStack) -> None:
    checked = Checked(stack, one=ok(), two=ok())
    patch(checked.balancer, "one", admin_state="maint")
    patch(checked.balancer, "two", admin_state="drain")
    one, two = checked.backends["one"].requests, checked.backends["two"].requests
    seen = len(two)
    wait_until(lambda: len(two) >= seen + 2)  # what was under way is over
    asked, seen = len(one), len(two)
    wait_until(lambda: len(two) >= seen + 3)
    assert len(one) == asked
    assert fetch(f"{checked.balancer.url}/x")[0] == 503
    patch(checked.balancer, "one", admin_state="ready")
    wait_until(lambda: len(one) > asked)


def test_maintenance_leaves_no_checks_behind_that_go_on_beside_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BackendPool(create("round_robin"), options(PoolOptions))
    pool.add("a", Origin("http", "127.0.0.1", 1))
    checker = HealthChecker(lambda: None)
    begun: list[Checks] = []
    monkeypatch.setattr(checker, "_begin", lambda checks, number, now: begun.append(checks))
    checker.use([Mock(pool=pool, options=options(HealthOptions))])
    checker._round()
    (old,) = begun
    for state in ("maint", "ready"):
        pool.update("a", {"admin_state": state})
        checker.wake()
        checker._round()
    checker._again.append(old)  # one was under way, and has ended
    checker._round()
    assert begun.count(old) == 1 and len(set(map(id, begun))) == 2
    checker.stop()


def test_the_request_time_limit_covers_all_attempts() -> None:
    """The first backend closes after a while, the second never answers: it gets what is left, not a time of its own."""
    asked: list[Any] = []

    def script(sock: socket.socket, request: Any) -> None:
        asked.append(request)
        if len(asked) == 1:
            Event().wait(1)
            raise ConnectionAbortedError
        sock.recv(1)

    with ExitStack() as stack:
        backends = [stack.enter_context(WireBackend()) for _ in range(3)]
        for backend in backends:
            backend.script = script
        flags = [f"--backend={backend.url}" for backend in backends]
        balancer = stack.enter_context(Balancer(*flags, "--response-timeout=600", "--request-timeout=3"))
        assert fetch(f"{balancer.url}/")[0] == 504
        (record,) = balancer.status(1)["recent_requests"]
        assert record["attempts"] == 2 and record["tried"][1]["seconds"] < record["response_time"] - 0.9
        assert record["not_retried"] == "request_timeout of 3 s is over"
