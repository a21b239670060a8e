"""Hedged requests: a GET whose answer is late goes to a second backend too, and the first good answer wins."""

from __future__ import annotations

import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import pytest
from exposition import scrape, value
from support import (
    Balancer,
    Clock,
    RawRequest,
    StartProcess,
    connect,
    fetch,
    get,
    is_idle,
    newest,
    ok,
    options,
    wait_until,
)
from wire import WireBackend, ask, hang_up, wait_closed

from balancer.balancing.backends import LastCheck
from balancer.balancing.hedging import FEWEST_TIMES, RESERVED, SAVED, Hedging
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.speed import Speed
from balancer.balancing.strategies import create
from balancer.edge.call import Call
from balancer.edge.express import LOOK_SECONDS, LOOK_SHARE, Express
from balancer.edge.workers import WorkerPool
from balancer.errors import ConnectFailed
from balancer.forwarding.race import Opening
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads
from balancer.upstream.transport import BackendAdapter, Timeouts

LATE = 0.05
GOOD = LastCheck(1.0, 0.001, 200, None)
BAD = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nbad"


class Fleet:
    """Backends that hold each request until the test says what comes of it, and a balancer with a kept connection to
    each. `asked` has who was asked, in turn; `answer` ends the waiting of one of these."""

    def __init__(self, *flags: str, names: str = "abc") -> None:
        self.asked: list[str] = []
        self.peers: list[socket.socket] = []
        self._does: list[Future[Callable[[socket.socket], None]]] = []
        self._lock = threading.Lock()
        self.backends = {name: WireBackend() for name in names}
        self.balancer = Balancer(
            *(f"--backend={name}={backend.url}" for name, backend in self.backends.items()),
            "--algorithm=round_robin", f"--hedge={LATE}", "--hedge-budget=1", "--pool-idle-timeout=60", *flags,
        )  # fmt: skip
        self._hedging = self.balancer.library.control.pools.default.hedging
        self._options = self._hedging.options
        self.warm()
        if self._options.hedge == LATE:  # not before the first backend is known to be asked
            self.forbid()
        for name, backend in self.backends.items():
            backend.script = lambda sock, request, name=name: self._hold(name, sock)

    def warm(self) -> None:
        """By requests that are not hedged."""
        for _ in self.backends:
            assert fetch(f"{self.balancer.url}/warm", method="POST")[0] == 200

    def _hold(self, name: str, sock: socket.socket) -> None:
        does: Future[Callable[[socket.socket], None]] = Future()
        with self._lock:
            self.asked.append(name)
            self.peers.append(sock)
            self._does.append(does)
        does.result(60)(sock)

    def forbid(self) -> None:
        """Until `allow` nothing is late."""
        self._hedging.options = replace(self._options, hedge=60.0)

    def allow(self) -> None:
        self._hedging.options = self._options

    def wait_asked(self, count: int) -> None:
        wait_until(lambda: self.asked, "a backend is asked")
        if count > 1:
            self.allow()
        wait_until(lambda: len(self.asked) >= count, f"{count} backends are asked, not only {self.asked}")

    def answer(self, number: int, data: bytes = b"") -> None:
        """Whoever was asked as the `number`th; with its name by default."""
        data = data or ok(self.asked[number].encode())
        self._does[number].set_result(lambda sock: sock.sendall(data))

    def fail(self, number: int) -> None:
        self.answer(number, b"no HTTP\r\n\r\n")

    def is_closed(self, number: int) -> bool:
        return wait_closed(self.peers[number])

    def wait_long(self) -> None:
        """Until a second backend would have been asked."""
        self.allow()
        looks = self.looks
        until = time.monotonic() + 2 * LATE
        wait_until(lambda: self.looks >= looks + 5 and time.monotonic() > until, "it has looked for late ones")

    @property
    def looks(self) -> int:
        return self._looks[0]

    _looks = [0]  # noqa: RUF012

    def hedges(self) -> dict[str, int]:
        found: dict[str, int] = self.balancer.status()["pools"][0]["hedges"]
        return found

    def is_blamed(self, name: str) -> bool:
        found: int = self.balancer.backend(name)["ejection"]["consecutive_failures"]
        return found > 0

    def assert_asked_once(self, pool: ThreadPoolExecutor, **headers: str) -> dict[str, str]:
        """A request, however late its answer is. Its header lines."""
        before = len(self.asked)
        answer = pool.submit(fetch, self.balancer.url, **headers)
        self.wait_asked(before + 1)
        self.wait_long()
        assert len(self.asked) == before + 1
        self.answer(before)
        status, lines, _ = answer.result(60)
        assert status == 200
        return lines

    def close(self) -> None:
        for number, does in enumerate(self._does):
            if not does.done():
                self.answer(number)
        self.balancer.stop()
        for backend in self.backends.values():
            backend.close()


Make = Callable[..., Fleet]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> Iterator[Make]:
    made: list[Fleet] = []
    expire = Express._expire

    def counted(self: Express, now: float) -> None:
        expire(self, now)
        Fleet._looks[0] += 1

    monkeypatch.setattr(Express, "_expire", counted)

    def make(*flags: str, names: str = "abc") -> Fleet:
        made.append(Fleet(*flags, names=names))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


Both = Callable[..., tuple[Fleet, Future[Any]]]


@pytest.fixture
def both(make: Make, pool: ThreadPoolExecutor) -> Both:
    """A request for which two backends are asked, and its answer to come."""

    def begin(*flags: str, method: str = "GET") -> tuple[Fleet, Future[Any]]:
        fleet = make(*flags)
        answer = pool.submit(fetch, fleet.balancer.url, None, method)
        fleet.wait_asked(2)
        return fleet, answer

    return begin


def outcomes(record: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(each["backend"], each["outcome"], each["hedge"]) for each in record["tried"]]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_second_backend_answers_first(both: Both, method: str) -> None:
    fleet, answer = both(method=method)
    fleet.answer(1)
    first, second = fleet.asked
    assert answer.result(60)[0::2] == (200, b"" if method == "HEAD" else second.encode())
    assert fleet.is_closed(0)
    record = newest(fleet.balancer)
    assert outcomes(record) == [(first, "dropped", False), (second, "200", True)]
    assert (record["server_id"], record["attempts"], record["not_retried"]) == (second, 2, None)
    assert record["tried"][0]["seconds"] >= record["tried"][1]["at"] >= LATE
    explained = fetch(f"{fleet.balancer.url}/requests/{record['request_id']}")[2]
    assert b'"already tried"' in explained and b'"hedge":true' in explained.replace(b" ", b"")
    assert not fleet.is_blamed(first) and is_idle(fleet.balancer)
    told = scrape(fleet.balancer.url)
    assert value(told, "lb_hedges_total", pool="default", result="won") == 1
    assert value(told, "lb_hedge_late_seconds", pool="default") == LATE
    assert fleet.balancer.status()["statistics"]["retries"] == 0
    assert not any(name == "lb_retries_total" and count for (name, _), count in told.items())


def test_the_first_backend_answers_first(both: Both) -> None:
    fleet, answer = both()
    fleet.answer(0)
    first, second = fleet.asked
    assert answer.result(60)[2] == first.encode()
    assert fleet.is_closed(1)
    record = newest(fleet.balancer)
    assert outcomes(record) == [(first, "200", False), (second, "dropped", True)] and record["server_id"] == first
    assert fleet.hedges() == {"won": 0, "lost": 1, "failed": 0, "left": 0}
    assert not fleet.is_blamed(second) and is_idle(fleet.balancer)


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"])
@pytest.mark.parametrize("slow", [0, 1])
def test_half_a_head_is_no_answer(both: Both, begun: bytes, slow: int) -> None:
    """Nor is an interim one (RFC 9110 section 15.2): whoever sends no more loses."""
    fleet, answer = both()
    fleet.peers[slow].sendall(begun)
    fleet.wait_long()
    fleet.answer(1 - slow)
    assert answer.result(60)[2] == fleet.asked[1 - slow].encode()
    assert [each[1] for each in outcomes(newest(fleet.balancer))][slow] == "dropped"
    assert fleet.is_closed(slow) and is_idle(fleet.balancer)


def test_a_surprise_of_ours_leaves_nothing_behind(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, answer = both()
    monkeypatch.setattr(BackendAdapter, "look", Mock(side_effect=RuntimeError("a surprise")))
    fleet.answer(1)
    assert answer.result(60)[0] == 503 and is_idle(fleet.balancer)
    assert fleet.is_closed(0)


def test_a_large_answer_goes_on_alone(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet, body = make(), os.urandom(1_000_000)
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(2)
    fleet.answer(1, ok(body))
    assert answer.result(60)[2] == body and fleet.is_closed(0)
    assert [each[1] for each in outcomes(newest(fleet.balancer))] == ["dropped", "200"]


def test_a_backend_without_a_kept_connection_is_asked_on_a_new_one(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make()
    for backend in fleet.backends.values():
        backend.drop_connections()
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(2)
    fleet.answer(1)
    assert answer.result(60)[2] == fleet.asked[1].encode() and fleet.is_closed(0)


def test_a_connection_is_opened_for_one_race_and_kept_if_that_is_over() -> None:
    """Whoever else comes meanwhile does not take it."""
    with WireBackend() as backend, closing(BackendAdapter(Timeouts(5, 5, 5, 5))) as adapter:
        origin = Origin.parse(backend.url)
        wanted, early, late = (Opening(adapter, origin) for _ in range(3))
        wanted.run()
        connection = wanted.take()
        assert connection is not None and wanted.is_over and wanted.take() is None and not adapter.idle()
        connection.close()
        early.run()
        early.drop()
        assert adapter.idle() == {backend.url: 1}
        late.drop()
        late.run()
        assert adapter.idle() == {backend.url: 2}


def test_nothing_is_opened_over_tls(make: Make, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, opening = make(names="ab"), Mock(side_effect=ConnectFailed("in vain"))
    monkeypatch.setattr(BackendAdapter, "open", opening)
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(1)
    other = fleet.balancer.library.control.pools.default.get("ab".replace(fleet.asked[0], ""))
    assert other is not None
    other.origin = other.origin._replace(scheme="https")
    fleet.wait_long()
    fleet.answer(0)
    assert answer.result(60)[0] == 200 and not opening.called
    assert sum(fleet.hedges().values()) == 0 and is_idle(fleet.balancer)


def test_a_backend_that_is_removed_before_it_is_asked_ends_nothing(
    make: Make, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the connection to it is still being opened: what is in flight on the other one goes on."""
    fleet, go = make(names="ab"), threading.Event()
    opening: list[str] = []

    def wait(self: BackendAdapter, origin: Origin) -> NoReturn:
        opening.append(origin.url)
        go.wait(60)
        raise ConnectFailed("in vain")

    monkeypatch.setattr(BackendAdapter, "open", wait)
    for backend in fleet.backends.values():
        backend.drop_connections()
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(1)
    fleet.allow()
    wait_until(lambda: opening, "a connection to the second one is opened")
    (first,) = fleet.asked
    second = "ab".replace(first, "")
    assert fetch(f"{fleet.balancer.url}/backends/{second}?force=1", method="DELETE")[0] == 200
    go.set()
    fleet.answer(0)
    assert answer.result(60)[2] == first.encode()
    assert outcomes(newest(fleet.balancer)) == [(first, "200", False)]
    assert not fleet.is_blamed(first) and sum(fleet.hedges().values()) == 0


def test_a_request_whose_filters_wait_is_sent_twice_too(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make()
    proxy = fleet.balancer.library.proxy
    waits = replace(proxy.routes.usual, waits=True)
    proxy.routes = replace(proxy.routes, usual=waits, rare=waits)
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(2)
    fleet.answer(1)
    assert answer.result(60)[2] == fleet.asked[1].encode() and fleet.is_closed(0)


NEVER = [
    get(b"/", b"Content-Length: 0", method=b"POST"),
    get(b"/", method=b"DELETE"),
    get(b"/", method=b"OPTIONS"),
    get(b"/", b"Content-Length: 1") + b"x",
    get(b"/", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    .replace(b"Connection: close", b"Connection: upgrade"),
]  # fmt: skip


def test_what_may_have_an_effect_is_not_sent_twice(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make()
    answers = []
    for number, data in enumerate(NEVER):
        answers.append(pool.submit(ask, fleet.balancer.port, data))
        fleet.wait_asked(number + 1)
    fleet.wait_long()
    assert len(fleet.asked) == len(NEVER)
    for number in range(len(NEVER)):
        fleet.answer(number)
    assert {answer.result(60)[0] for answer in answers} <= {200, 502}  # a WebSocket that was refused
    assert sum(fleet.hedges().values()) == 0


@pytest.mark.parametrize("flag", ["--hedge-budget=0.01", "--hedge=off", "--hedge=auto"])
def test_without_budget_samples_or_being_asked_to_none_is_sent_twice(
    make: Make, pool: ThreadPoolExecutor, flag: str
) -> None:
    fleet = make(flag)
    fleet.assert_asked_once(pool)
    assert sum(fleet.hedges().values()) == 0


def test_a_client_that_is_bound_stays_where_it_is(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make("--sticky=true")
    first = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(1)
    fleet.answer(0)
    fleet.assert_asked_once(pool, Cookie=first.result(60)[1]["set-cookie"].partition(";")[0])


def test_the_only_backend_is_not_asked_twice(make: Make, pool: ThreadPoolExecutor) -> None:
    make(names="a").assert_asked_once(pool)


def test_not_while_it_drains(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make()
    fleet.balancer.library.bridges[0].is_draining = True
    fleet.assert_asked_once(pool)


def test_only_where_there_is_room(make: Make, pool: ThreadPoolExecutor) -> None:
    """Both have one request, the third waits in the queue: nobody gets a second place, and it is spent on nobody."""
    fleet = make(names="ab")
    for name in "ab":
        fetch(f"{fleet.balancer.url}/backends/{name}", {"max_connections": 1}, "PATCH")
    answers = [pool.submit(fetch, fleet.balancer.url) for _ in range(3)]
    fleet.wait_asked(2)
    fleet.wait_long()
    assert sorted(fleet.asked) == ["a", "b"]
    fleet.forbid()
    for number in range(3):
        wait_until(lambda number=number: len(fleet.asked) > number, "its turn has come")
        fleet.answer(number)
    assert [answer.result(60)[0] for answer in answers] == [200] * 3
    assert sum(fleet.hedges().values()) == 0 and is_idle(fleet.balancer)


def test_the_client_leaves(make: Make) -> None:
    fleet = make()
    with connect(fleet.balancer.port) as sock:
        sock.sendall(get(b"/"))
        fleet.wait_asked(2)
    assert fleet.is_closed(0)
    record = newest(fleet.balancer)
    assert record["status"] == 499 and [each[1] for each in outcomes(record)] == ["", ""]
    assert fleet.hedges()["left"] == 1
    assert not any(map(fleet.is_blamed, fleet.backends)) and is_idle(fleet.balancer)


@pytest.mark.parametrize("failing", [0, 1])
def test_one_of_two_fails(both: Both, failing: int) -> None:
    fleet, answer = both()
    fleet.fail(failing)
    wait_until(lambda: fleet.is_blamed(fleet.asked[failing]), "it is blamed")
    fleet.answer(1 - failing)
    assert answer.result(60)[2] == fleet.asked[1 - failing].encode()
    record = newest(fleet.balancer)
    assert [each[1] for each in outcomes(record)][failing] == "http_protocol_error" and len(fleet.asked) == 2
    assert fleet.hedges() == {"won": 1 - failing, "lost": 0, "failed": failing, "left": 0}
    assert fleet.balancer.status()["statistics"]["retries"] == 0


def test_both_fail_and_a_third_one_is_asked(both: Both) -> None:
    fleet, answer = both()
    fleet.fail(0)
    fleet.fail(1)
    fleet.wait_asked(3)
    fleet.answer(2)
    assert answer.result(60)[2] == fleet.asked[2].encode() and sorted(fleet.asked) == ["a", "b", "c"]
    assert all(map(fleet.is_blamed, fleet.asked[:2]))
    assert fleet.balancer.status()["statistics"]["retries"] == 1
    told = scrape(fleet.balancer.url)
    assert [count for (name, _), count in told.items() if name == "lb_retries_total" and count] == [1]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_good_answer_wins_against_an_error(both: Both, bad: int) -> None:
    fleet, answer = both("--hedge=1")
    fleet.answer(bad, BAD)
    idle = {"name": "lb_backend_connections_idle", "backend": fleet.asked[bad]}
    wait_until(lambda: value(scrape(fleet.balancer.url), **idle) == 1, "its answer has come")
    fleet.answer(1 - bad)
    status, _, body = answer.result(60)
    assert (status, body) == (200, fleet.asked[1 - bad].encode())
    assert [each[1] for each in outcomes(newest(fleet.balancer))][bad] == "503"
    assert fleet.is_blamed(fleet.asked[bad]) and is_idle(fleet.balancer)


@pytest.mark.parametrize("is_other_bad", [False, True])
def test_an_error_is_passed_on_when_nothing_better_comes_soon(both: Both, is_other_bad: bool) -> None:
    fleet, answer = both("--eject-after=0")
    fleet.answer(1, BAD)
    if is_other_bad:
        fleet.answer(0, BAD.replace(b"bad", b"BAD"))
    assert answer.result(60)[0] == 503
    assert is_other_bad or fleet.is_closed(0)
    first, second = fleet.asked
    assert outcomes(newest(fleet.balancer)) == [
        (first, "503" if is_other_bad else "dropped", False),
        (second, "503", True),
    ]
    assert fleet.is_blamed(second) and fleet.is_blamed(first) == is_other_bad and is_idle(fleet.balancer)


def test_an_error_that_comes_before_the_second_attempt_is_passed_on(make: Make, pool: ThreadPoolExecutor) -> None:
    fleet = make("--hedge=30")
    answer = pool.submit(fetch, fleet.balancer.url)
    fleet.wait_asked(1)
    fleet.answer(0, BAD)
    assert answer.result(60)[0] == 503 and len(fleet.asked) == 1


def test_the_time_limit_is_for_both_together(both: Both) -> None:
    fleet, answer = both("--response-timeout=0.6", "--retries=0")
    assert answer.result(60)[0] == 504
    assert fleet.is_closed(0) and fleet.is_closed(1) and len(fleet.asked) == 2
    record = newest(fleet.balancer)
    first, second = fleet.asked
    assert outcomes(record) == [(first, "http_response_timeout", False), (second, "dropped", True)]
    assert fleet.is_blamed(first) and not fleet.is_blamed(second) and is_idle(fleet.balancer)


@pytest.mark.parametrize("removed", [0, 1])
def test_a_backend_is_removed_at_once_meanwhile(both: Both, removed: int) -> None:
    fleet, answer = both()
    fetch(f"{fleet.balancer.url}/backends/{fleet.asked[removed]}?force=1", method="DELETE")
    assert fleet.is_closed(removed)
    fleet.answer(1 - removed)
    assert answer.result(60)[2] == fleet.asked[1 - removed].encode()
    assert not fleet.is_blamed(fleet.asked[1 - removed])


def test_a_reload_switches_it_on_and_off(tmp_path: Path, make: Make, pool: ThreadPoolExecutor) -> None:
    file = tmp_path / "balancer.toml"
    fleet = make()
    fleet.balancer.stop()
    lines = [f'[[backends]]\nid = "{name}"\nurl = "{backend.url}"' for name, backend in fleet.backends.items()]

    def write(hedge: str) -> None:
        file.write_text("\n".join(["hedge_budget = 1.0", hedge, *lines]), encoding="utf-8")

    def ask_one(backends: int) -> None:
        """A request that reaches so many."""
        before = len(fleet.asked)
        answer = pool.submit(fetch, fleet.balancer.url)
        fleet.wait_asked(before + backends)
        fleet.wait_long()
        assert len(fleet.asked) == before + backends
        for number in range(before, len(fleet.asked)):
            fleet.answer(number)
        assert answer.result(60)[0] == 200

    write("")
    fleet.balancer = Balancer(f"--config={file}")
    for hedge, backends in (("", 1), (f"hedge = {LATE}", 2), ('hedge = "off"', 1)):
        write(hedge)
        assert fetch(f"{fleet.balancer.url}/reload", method="POST")[0] == 200
        ask_one(backends)


def test_no_more_than_the_budget_when_everything_is_slow(make: Make, pool: ThreadPoolExecutor) -> None:
    """1,000 requests, of which each is late."""
    fleet = make("--hedge=0.001", "--hedge-budget=0.05")
    before = sum(len(backend.requests) for backend in fleet.backends.values())
    warmed = len(fleet.backends)
    pause = threading.Event()

    def slow(sock: socket.socket, request: RawRequest) -> None:
        pause.wait(0.03)
        sock.sendall(ok())

    for backend in fleet.backends.values():
        backend.script = slow
    statuses = list(pool.map(lambda _: fetch(fleet.balancer.url)[0], range(1000)))
    assert statuses == [200] * 1000 and is_idle(fleet.balancer)
    hedges = sum(fleet.hedges().values())
    assert sum(len(backend.requests) for backend in fleet.backends.values()) - before <= 1000 + hedges
    assert 0 < hedges <= 0.05 * (1000 + warmed)


def test_a_storm_leaves_nothing_behind(make: Make, pool: ThreadPoolExecutor) -> None:
    """Late, failing and good backends, clients that leave: every request is answered or left once, all places are
    given back, and every connection is closed or kept."""
    fleet = make("--hedge=0.005", "--eject-after=0", "--retry-budget=1", "--response-timeout=0.5")
    chance, pause = random.Random(5), threading.Event()

    def script(sock: socket.socket, request: RawRequest) -> None:
        drawn = chance.random()
        pause.wait(0.03 * drawn if drawn > 0.5 else 0)
        if drawn > 0.97:
            hang_up(sock)
        sock.sendall(BAD if drawn > 0.92 else ok(bytes(200_000)) if drawn > 0.88 else ok())

    for backend in fleet.backends.values():
        backend.script = script

    def one(number: int) -> int:
        if number % 10 == 0:
            with connect(fleet.balancer.port) as sock:
                sock.sendall(get(b"/"))
                sock.settimeout(0.01 * chance.random())
                try:
                    return int(bool(sock.recv(1)))
                except TimeoutError:
                    return 0
        return fetch(fleet.balancer.url)[0]

    fleet.warm()
    descriptors = len(os.listdir("/proc/self/fd"))
    before = fleet.balancer.status()["statistics"]["total_requests"]
    found = list(pool.map(one, range(1500)))
    wait_until(lambda: is_idle(fleet.balancer), "nothing is in flight")
    assert {status for status in found if status > 1} <= {200, 502, 503, 504}
    hedges, statistics = fleet.hedges(), fleet.balancer.status()["statistics"]
    assert 1350 <= statistics["total_requests"] - before <= 1500  # of some that left, nothing came
    assert hedges["won"] > 0 and hedges["lost"] > 0
    told = scrape(fleet.balancer.url)
    attempts = sum(count for (name, _), count in told.items() if name == "lb_backend_requests_total")
    assert attempts == statistics["total_requests"] + statistics["retries"] + sum(hedges.values())
    kept = sum(count for (name, _), count in told.items() if name == "lb_backend_connections_idle")
    wait_until(
        lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2 * kept + 16, "connections of the losers are closed"
    )


def test_looking_for_late_ones_takes_a_small_share_of_the_time() -> None:
    """However many wait."""

    def look() -> float:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return 0.01

    express, before = Express(WorkerPool(1, 1, 1.0), look), time.monotonic()
    express.run_once()
    assert express._next_look >= before + 0.02 / LOOK_SHARE
    express.stop()


def test_a_race_without_its_second_attempt_is_looked_at_soon_whoever_was_brought_since() -> None:
    """It may lack a connection, which a worker opens in no time."""
    express = Express(WorkerPool(1, 1, 1.0), lambda: 0.2)
    old, new = (Call(Mock(is_draining=True), Mock(scope={"http_version": "1.1"})) for _ in range(2))
    new.started = math.inf
    express._races[old] = Mock(is_waiting=True, deadline=math.inf)
    express._waiting |= {1: new, 2: old}
    express.run_once()
    assert express._pause == express._tick < LOOK_SECONDS
    express.stop()


def test_all_workers_count_as_one(start_process: StartProcess) -> None:
    held, quick = WireBackend(), WireBackend()
    with held, quick:
        balancer = start_process(
            f"--backend=held={held.url}", f"--backend=quick={quick.url}", "--algorithm=round_robin",
            "--workers=2", f"--hedge={LATE}", "--hedge-budget=1",
        )  # fmt: skip
        go = held.hold()
        assert [fetch(balancer.url)[0] for _ in range(20)] == [200] * 20
        wait_until(lambda: is_idle(balancer), "all have ended")
        (shown,) = balancer.status()["pools"]
        assert shown["hedges"]["won"] == len(held.requests) > 0
        assert balancer.status()["statistics"]["retries"] == 0
        told = scrape(balancer.url)
        assert value(told, "lb_hedges_total", pool="default", result="won") == len(held.requests)
        assert not any(name == "lb_retries_total" and count for (name, _), count in told.items())
        go.set()


# What is late, and how many there may be.


def hedging(clock: Clock | None = None, **settings: Any) -> Hedging:
    return Hedging(options(PoolOptions, **settings), clock or Clock())


def test_what_is_late_follows_the_pool() -> None:
    clock = Clock()
    pool = hedging(clock, hedge="auto")
    for number in range(FEWEST_TIMES - 1):
        pool.answered(0.001 * number)
    assert pool.late() is None
    pool.answered(0.2)
    assert pool.late() == pytest.approx(0.094)
    for _ in range(5000):
        pool.answered(0.001)
    assert pool.late() == pytest.approx(0.094)  # it looks once a second
    clock.now += 1
    assert pool.late() == 0.01  # no sooner


def test_the_budget_is_a_share_of_the_requests() -> None:
    pool = hedging(hedge="auto", hedge_budget=0.05)
    spent = 0
    for _ in range(1000):
        pool.count()
        spent += pool.spend(is_urgent=True)
    assert spent == 50
    for _ in range(10_000):
        pool.count()
    assert [pool.spend(is_urgent=False) for _ in range(SAVED)].count(True) == SAVED - RESERVED
    assert [pool.spend(is_urgent=True) for _ in range(SAVED)].count(True) == RESERVED
    pool.refund()
    assert pool.spend(is_urgent=True) and not pool.spend(is_urgent=True)
    pool.refund()
    pool.options = options(PoolOptions, hedge="off")
    assert not pool.spend(is_urgent=True)


def test_who_answers_nobody_is_asked_last() -> None:
    """By a strategy that knows nothing of time."""
    pool = BackendPool(create("round_robin"), options(PoolOptions))
    for name in "ab":
        pool.record_check(pool.add(name, Origin("http", "127.0.0.1", 1)), GOOD)
    asked = Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", "192.0.2.1", [(b"host", b"a")])

    def drop(count: int, *, is_late: bool = True) -> None:
        """As many requests of `a` as these are answered by `b`."""
        for lease in (pool.lease(asked, ["b"]) for _ in range(count)):
            second = pool.lease_beside(lease, asked)
            assert second is not None and second.backend.id == "b"
            second.release(0.01)
            lease.drop(is_late)

    def chosen() -> set[str]:
        leases = [pool.lease(asked) for _ in range(4)]
        for lease in leases:
            lease.release(0.01)
        return {lease.backend.id for lease in leases}

    drop(1)
    assert chosen() == {"a", "b"}  # it has answered
    drop(1)
    drop(5, is_late=False)
    assert chosen() == {"a", "b"}
    drop(2)
    assert chosen() == {"b"} and pool.snapshot()[0]["health"]["reason"] == "2 requests in a row were answered by others"
    pool.record_check(pool.backends()[0], GOOD)
    assert chosen() == {"a", "b"}


def test_a_backend_that_was_not_waited_for_is_as_slow_as_it_was_silent() -> None:
    speed = Speed()
    speed.sent(0.0)
    speed.answered(0.04, 0.04)
    speed.sent(1.0)
    assert speed.dropped(1.2) == pytest.approx(0.2) and speed.response_time(1.2) == pytest.approx(0.2)
    speed.sent(1.2)
    assert speed.silence(1.5) == pytest.approx(0.5)  # it goes on owing an answer
    speed.sent(1.5)
    speed.answered(0.02, 1.52)
    assert speed.dropped(1.53) is None and speed.silence(1.6) == 0
    speed.sent(2.0)
    assert speed.silence(2.1) < 0.3
