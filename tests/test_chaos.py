"""Real processes, mixed traffic (HTTP/1, HTTP/2, WebSocket), and everything going wrong that can: what may be lost is
stated, and nothing else is.

Of every request the balancer may lose only what it must: a POST or PATCH (or a body that it does not hold) whose
backend failed after it was sent, and an answer whose backend broke off after its head, which then shows. It never
executes a POST twice, never passes a wrong body or message, and its counters agree with its clients to the last
request. A WebSocket may end with its backend alone, or with the balancer.

CHAOS_ROUNDS=200 makes the last test run for longer, CHAOS_SEED=N with other dice; both are printed with the table.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from threading import Event

import pytest
from certificates import Files, make_pair
from chaos import (
    ChaosBackend,
    Fleet,
    Footprint,
    Table,
    judge_all,
    make_table,
    repeat,
    running_fleet,
    settle,
)
from chaos_backend import answer_body
from chaos_traffic import KIB, MIB, Http1Client, Plan, Traffic
from redis_server import RedisServer
from support import PATIENCE, BalancerProcess, fetch, fetch_json, wait_until
from wire import read_response, values

from balancer.edge.process import raise_descriptor_limit

pytestmark = pytest.mark.timeout(int(os.environ.get("CHAOS_TIMEOUT", "180")))

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "6"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
ALGORITHMS = ("round_robin", "weighted", "least_connections", "least_response_time")
IDLE_CLIENTS = 2000
UNFINISHED, LEAVING = 20, 5  # clients that stop in the middle of their upload, or of the answer
GROWTH = 32 * MIB  # resident memory: bodies of 1 MiB leave holes in the heap, a leak goes on growing


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Table:
    return make_table(pytestconfig)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("chaos")) as fleet:
        with Traffic(fleet.url) as traffic:  # imports done, caches filled, threads there
            traffic.wait_for(100)
        yield fleet


@pytest.fixture
def fleet(started: Fleet) -> Iterator[Fleet]:
    """All good before and after; a scenario that leaves threads or sockets behind fails."""
    started.begin()
    yield started
    started.settled()


# One fault at a time. Each leaves its backend as it found it.

Disorder = Callable[[Fleet, ChaosBackend, Traffic], None]


def killed(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    victim.kill()
    fleet.balancer.wait_healthy(victim.name, False)
    traffic.wait_for(30)
    victim.start()
    fleet.balancer.wait_healthy(victim.name, True)


def all_others_killed(fleet: Fleet, survivor: ChaosBackend, traffic: Traffic) -> None:
    dead = [backend for backend in fleet.backends if backend is not survivor]
    for backend in dead:
        backend.kill()
    for backend in dead:
        fleet.balancer.wait_healthy(backend.name, False)
    traffic.wait_for(30)
    for backend in dead:
        backend.start()
        fleet.balancer.wait_healthy(backend.name, True)


def stopped(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    victim.send(signal.SIGSTOP)
    try:
        fleet.balancer.wait_healthy(victim.name, False)
        traffic.wait_for(30)
    finally:
        victim.send(signal.SIGCONT)
    fleet.balancer.wait_healthy(victim.name, True)


@contextmanager
def faulty(victim: ChaosBackend, kind: str, every: int = 1, seconds: float = 0.0) -> Iterator[None]:
    victim.fault(kind, every, seconds)
    try:
        yield
    finally:
        victim.fault()


def retries(fleet: Fleet) -> int:
    count: int = fleet.balancer.status()["statistics"]["retries"]
    return count


def slowed(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    with faulty(victim, "slow", seconds=0.3):
        traffic.wait_for(30)


# A third of one backend's answers is bad: more would use up the retry budget, which is there to be used up then.


def talking_garbage(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    with faulty(victim, "garbage", every=3):
        traffic.wait_for(60)


def resetting_before_the_head(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    """Until one has been tried elsewhere: on a kept connection it is sent once more to the same backend, uncounted."""
    before = retries(fleet)
    with faulty(victim, "reset_head", every=3):
        traffic.wait_for(60)
        wait_until(lambda: retries(fleet) > before, "one was tried elsewhere")


def resetting_in_the_body(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    with faulty(victim, "reset_body", every=3):
        traffic.wait_for(60)


def ending_in_the_body(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    with faulty(victim, "end_body", every=3):
        traffic.wait_for(60)


def hanging(fleet: Fleet, victim: ChaosBackend, traffic: Traffic) -> None:
    """Until one has been given up and tried elsewhere, which takes the response time-out."""
    before = retries(fleet)
    with faulty(victim, "hang", every=4):
        wait_until(lambda: retries(fleet) > before, "one was tried elsewhere")


# In these an answer may break off after its head.
CUTTING = (killed, all_others_killed, resetting_in_the_body, ending_in_the_body)
DISORDERS = (*CUTTING, stopped, slowed, talking_garbage, resetting_before_the_head, hanging)
LONG = (killed, all_others_killed, stopped, slowed, hanging)  # they last until something is noticed
LONGEST = (all_others_killed, stopped, hanging)  # which take seconds
PAUSE = 0.06  # seconds between the requests of a client meanwhile


@pytest.mark.parametrize("disorder", DISORDERS)
def test_one_backend_after_another_goes_wrong(fleet: Fleet, table: Table, disorder: Disorder) -> None:
    victims = fleet.backends[:1] if disorder in LONGEST else fleet.backends
    with Traffic(fleet.url, pause=PAUSE if disorder in LONG else 0.0) as traffic:
        for victim in victims:
            disorder(fleet, victim, traffic)
            traffic.wait_for(20)
    row = settle(fleet, table, f"{disorder.__name__} ({len(victims)} x)", traffic.outcomes, cut=disorder in CUTTING)
    if disorder in (talking_garbage, resetting_before_the_head):
        assert row.retried > 0


# Two of them, and Redis in between.


def test_two_members_and_a_partition_cost_nothing(tmp_path: Path, table: Table) -> None:
    """Each is decided over while they are apart; the later word counts when they are together again."""
    with RedisServer(tmp_path) as redis, running_fleet(tmp_path, f"--redis-url={redis.url}", "--id=one") as fleet:
        flags = [f"--backend={each.name}={each.url}" for each in fleet.backends]
        with BalancerProcess(*flags, f"--redis-url={redis.url}", "--id=two") as other:

            def are(state: str) -> bool:
                found = [each.status()["cluster"] for each in (fleet.balancer, other)]
                return all(each["state"] == state and each["members"] == 2 for each in found)

            wait_until(lambda: are("together"), "they know each other")
            fleet.begin()
            with Traffic(fleet.url) as traffic, Traffic(other.url) as beside:
                redis.send(signal.SIGSTOP)
                wait_until(lambda: are("alone"), "they are apart")
                for url, weight in ((fleet.url, 3), (other.url, 5)):
                    assert fetch(f"{url}/backends/a", {"weight": weight}, "PATCH")[0] == 200
                traffic.wait_for(30)
                redis.send(signal.SIGCONT)
                wait_until(lambda: are("together"), "they are together")
                for each in (fleet.balancer, other):
                    wait_until(lambda one=each: one.backend("a")["weight"] == 5, "the later word counts")
                traffic.wait_for(10)
            assert {outcome.kind for outcome in beside.outcomes} == {"answered"}
            settle(fleet, table, "partition of two", traffic.outcomes)


# The operator at work.

Change = Callable[[Fleet], Iterator[None]]


def switching(fleet: Fleet) -> Iterator[None]:
    for name in ALGORITHMS:
        assert fetch(f"{fleet.url}/algorithm", {"algorithm": name})[0] == 200
        yield


def coming_and_going(fleet: Fleet) -> Iterator[None]:
    url = fleet.backends[0].url
    assert fetch(f"{fleet.url}/backends", {"id": "extra", "url": url, "weight": 2})[0] == 201
    yield
    assert fetch(f"{fleet.url}/backends/extra", {"weight": 1, "max_connections": 3}, "PATCH")[0] == 200
    yield
    assert fetch(f"{fleet.url}/backends/extra", method="DELETE")[0] in (200, 202)
    yield
    wait_until(lambda: fetch(f"{fleet.url}/backends/extra")[0] == 404, "extra is gone")


def draining(fleet: Fleet) -> Iterator[None]:
    for state in ("drain", "ready", "maint", "ready"):
        assert fetch(f"{fleet.url}/backends/b", {"admin_state": state}, "PATCH")[0] == 200
        yield


def reloading(fleet: Fleet) -> Iterator[None]:
    """Backends leave the file and come back, weights and settings change, and a file that is bad changes nothing."""
    a, b, c = fleet.backends
    for backends, algorithm in (((a, b), "weighted"), ((c, b, a), "round_robin"), ((b, c), "least_connections")):
        fleet.configure(*backends, algorithm=algorithm)
        fleet.balancer.send(signal.SIGHUP)
        wait_until(lambda: fleet.names() == {backend.name for backend in backends})  # noqa: B023
        yield
        fleet.configure(*backends, algorithm="no such thing")
        assert fetch(f"{fleet.url}/reload", {})[0] == 422
    fleet.configure(algorithm="weighted", queue_limit=2000)
    fleet.reload()
    yield
    fleet.configure()
    fleet.balancer.send(signal.SIGHUP)
    wait_until(lambda: fetch_json(f"{fleet.url}/reload?dry_run=1", {})["changes"] == [])
    yield


def rerouting(fleet: Fleet) -> Iterator[None]:
    """Routes come, change and go, and so does the pool of some, which takes a backend from the others."""
    a, b, c = fleet.backends
    pool = f'[[pools]]\nname = "some"\n[[pools.backends]]\nid = "{c.name}"\nurl = "{c.url}"\n'
    routes = [
        f'[[routes]]\nname = "some"\npool = "some"\n{more}\n'
        for more in ('methods = ["POST"]', 'methods = ["POST", "GET"]\nresponse_timeout = 2', 'host = "*.test"')
    ]
    routes.append(routes[0] + "request_headers = { set = { X-Some = '1' } }\n[[routes]]\nname = 'all'\nretries = 2\n")
    for tables in ("", *routes, ""):  # a new pool has no backend that is known to be up
        fleet.configure(a, b, tables=pool + tables)
        fleet.reload()
        fleet.balancer.wait_healthy(c.name)
        yield
    fleet.configure()
    fleet.reload()
    fleet.balancer.wait_healthy(c.name)
    yield


def filling_up(fleet: Fleet) -> Iterator[None]:
    """One request at a time for each backend: the others wait their turn."""
    for limit in (1, None):
        for backend in fleet.backends:
            assert fetch(f"{fleet.url}/backends/{backend.name}", {"max_connections": limit}, "PATCH")[0] == 200
        yield
        if limit == 1:
            wait_until(lambda: fleet.balancer.status()["statistics"]["waiting_requests"] > 0)


@pytest.mark.parametrize("change", [switching, coming_and_going, draining, reloading, rerouting, filling_up])
def test_changes_by_the_operator_cost_nothing(fleet: Fleet, table: Table, change: Change) -> None:
    with Traffic(fleet.url) as traffic:
        for _ in range(2):
            for _ in change(fleet):
                traffic.wait_for(10)
    row = settle(fleet, table, change.__name__, traffic.outcomes)
    assert row.answered == row.sent


# A backend that fails while its health checks are good: the balancer must see it by the traffic.


# Clients that are no better.


class SlowReader:
    """Asks for 1 MiB and takes it in sips."""

    def __init__(self, port: int, key: str) -> None:
        self.plan = Plan(key, "GET", f"/{key}?size={MIB}&plain=1", 0, False, MIB)
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        self._sock.settimeout(PATIENCE)
        self._sock.connect(("127.0.0.1", port))
        self._sock.sendall(b"GET %s HTTP/1.1\r\nHost: test\r\n\r\n" % self.plan.target.encode())
        self._stream = self._sock.makefile("rb", 2 * KIB)
        self._sips = self._stream.readline()

    def step(self) -> None:
        self._sips += self._stream.read(2 * KIB)

    def finish(self) -> bool:
        """True if all of it was right."""
        with self._sock, self._stream:
            head, _, body = self._sips.partition(b"\r\n\r\n")
            body += self._stream.read(MIB - len(body))
        return head.startswith(b"HTTP/1.1 200 ") and body == answer_body(self.plan.digest, MIB)


class SlowWriter:
    """Sends 100 KiB in drips: more than the balancer waits for before it chooses a backend."""

    def __init__(self, port: int, key: str) -> None:
        self.plan = Plan(key, "POST", f"/{key}?size=200&plain=1", 100 * KIB, False, 200)
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        head = b"POST %s HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n"
        self._sock.sendall(head % (self.plan.target.encode(), self.plan.length))
        self._left = self.plan.body

    def step(self) -> None:
        self._sock.sendall(self._left[:500])
        self._left = self._left[500:]

    def finish(self) -> bool:
        with self._sock, self._sock.makefile("rb") as stream:
            self._sock.sendall(self._left)
            status, lines, body = read_response(stream)
        right = values(lines, b"x-digest") == [self.plan.digest.encode()]
        return status == 200 and right and body == answer_body(self.plan.digest, 200)


def test_slow_half_open_and_leaving_clients_cost_the_others_nothing(fleet: Fleet, table: Table) -> None:
    port = fleet.balancer.port
    with ExitStack() as stack, Traffic(fleet.url, pause=PAUSE) as traffic:
        slow: list[SlowReader | SlowWriter] = [SlowReader(port, f"slow-reader-{n}") for n in range(10)]
        slow += [SlowWriter(port, f"slow-writer-{n}") for n in range(10)]
        for number in range(2 * UNFINISHED):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(b"POST /half-open HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n")
            if number % 2:
                sock.sendall(b"\r\nonly this much")
        for number in range(LEAVING):  # more than the buffers of all sockets on its way hold
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            sock.sendall(b"GET /leaving-%d?size=%d&plain=1 HTTP/1.1\r\nHost: test\r\n\r\n" % (number, 16 * MIB))
            assert sock.recv(KIB).startswith(b"HTTP/1.1 200 ")
        for _ in range(15):
            traffic.wait_for(15)
            for client in slow:
                client.step()
        assert all(client.finish() for client in slow)
        stack.close()
        traffic.wait_for(30)
    row = settle(
        fleet, table, "slow, half-open, leaving clients", traffic.outcomes, others=len(slow), left=UNFINISHED + LEAVING
    )
    assert row.answered == row.sent


def test_thousands_of_idle_connections_cost_the_others_nothing(fleet: Fleet, table: Table) -> None:
    raise_descriptor_limit()
    before = Footprint.of(fleet.balancer.pid)
    with ExitStack() as stack, Traffic(fleet.url, pause=PAUSE) as traffic:
        for number in range(IDLE_CLIENTS):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", fleet.balancer.port), timeout=PATIENCE))
            if number % 4 == 0:  # every fourth has been of use before
                sock.sendall(b"GET /idle-%d?size=0&plain=1 HTTP/1.1\r\nHost: test\r\n\r\n" % number)
                assert sock.recv(KIB).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: Footprint.of(fleet.balancer.pid).files >= IDLE_CLIENTS, "all are accepted")
        traffic.wait_for(50)
        during = Footprint.of(fleet.balancer.pid)
        assert during.threads < before.threads + 64
    row = settle(fleet, table, f"{IDLE_CLIENTS} idle connections", traffic.outcomes, others=IDLE_CLIENTS // 4)
    assert row.answered == row.sent
    table.notes.append(f"idle connections: before {before}; during {during}; after {fleet.settled()}")


# Everything together, and what is left of it.


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Change]]:
    """A fleet whose clients speak TLS, and what renews its listener."""
    folder = tmp_path_factory.mktemp("secure")
    ca, serial = make_pair("the CA", is_ca=True), count()
    files = Files(folder, make_pair(signed_by=ca))
    (folder / "ca.pem").write_bytes(ca.certificate)

    def renewing(fleet: Fleet) -> Iterator[None]:
        number = next(serial)
        files.write(make_pair(f"n{number}.test", signed_by=ca))
        fleet.reload()
        wait_until(lambda: fleet.balancer.status()["tls"]["names"][0] == f"n{number}.test", "it is shown to clients")
        yield
        fleet.configure(header_timeout=50 + number % 2)
        fleet.reload()
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))  # which OpenSSL takes for the system's
        with running_fleet(folder, *files.flags) as fleet:
            yield fleet, renewing


def test_after_rounds_of_everything_nothing_is_left_over(secure: tuple[Fleet, Change], table: Table) -> None:
    fleet, renewing = secure
    fleet.begin()
    rng, ended = random.Random(SEED), Event()
    before: Footprint | None = None
    with Traffic(fleet.url, seed=SEED) as traffic:
        operators = [
            repeat(lambda change=change, answers=answers: paced(change(fleet), traffic, ended, answers), ended)  # type: ignore[misc]
            for change, answers in ((switching, 25), (coming_and_going, 25), (renewing, 100))
        ]
        try:
            for number in range(ROUNDS):
                rng.choice(DISORDERS)(fleet, rng.choice(fleet.backends), traffic)
                traffic.wait_for(20)
                if number == ROUNDS // 3:
                    before = Footprint.of(fleet.balancer.pid)
        finally:
            ended.set()
            for operator in operators:
                operator.join()
    during = Footprint.of(fleet.balancer.pid)
    settle(fleet, table, f"everything, {ROUNDS} rounds, seed {SEED}", traffic.outcomes, cut=True)
    after = fleet.settled()
    assert before is not None
    assert after.resident < before.resident + GROWTH
    table.notes.append(f"everything: after a third {before}; at the end {during}; when idle {after}")


def paced(steps: Iterator[None], traffic: Traffic, ended: Event, answers: int) -> Iterator[None]:
    """A change by the operator for every so many answers."""
    for _ in steps:
        goal = len(traffic.outcomes) + answers
        wait_until(lambda goal=goal: ended.is_set() or len(traffic.outcomes) >= goal)  # type: ignore[misc]
        yield


# The end.


def answered_while_busy(fleet: Fleet, traffic: Traffic) -> int:
    """How many had ended when at least 8 were in flight, else 0."""
    ended = len(traffic.outcomes)
    return ended if fleet.balancer.status()["statistics"]["active_requests"] >= 8 else 0


def test_sigterm_lets_requests_in_flight_finish(secure: tuple[Fleet, Change], table: Table) -> None:
    """Who was not answered was not executed either: the balancer took nothing that it did not finish."""
    fleet, _ = secure
    fleet.begin()
    for backend in fleet.backends:
        backend.fault("slow", seconds=0.5)
    with Traffic(fleet.url, clients=16, kinds=[Http1Client]) as traffic:
        before = wait_until(lambda: answered_while_busy(fleet, traffic), "8 requests in flight")
        fleet.balancer.send(signal.SIGTERM)
        assert fleet.balancer.wait() == 0
    assert sum(outcome.kind == "answered" for outcome in traffic.outcomes[before:]) >= 8
    assert [o for o in traffic.outcomes if o.kind not in ("answered", "empty")] == []
    executed = fleet.executed()
    assert [o for o in traffic.outcomes if o.kind == "empty" and executed[o.plan.key]] == []
    judge_all(fleet, table, "SIGTERM", traffic.outcomes, {"answered", "empty"}, 0)
    assert fleet.balancer.output.count("draining: ") == 1
