"""Limits: exact, bounded, charged only where all say yes, and given back on every ending."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Balancer, connect, exchange, fetch, fetch_json, get, ok, split_response, wait_until
from test_http2 import curl
from test_websocket import Echo
from websockets.sync.client import connect as connect_websocket
from wire import WireBackend, hang_up, post

from balancer import Filter, LoadBalancer, wiring
from balancer.config import settings
from balancer.errors import LimitReached, SettingsError
from balancer.filters.debts import Debts
from balancer.filters.limit import SECOND, Limit, LimitOptions
from balancer.filters.limits import KeyView, Limiter, Limits
from balancer.forwarding.answer import Answer, whole
from balancer.observe.events import Events
from balancer.observe.record import Record
from balancer.protocol.addresses import Network, parse_network
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

CLIENT = "127.0.0.1"


class Moment:
    """Nanoseconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 10**18

    def __call__(self) -> int:
        return self.now


def limiter_of(*limits: LimitOptions, clock: Callable[[], int] | None = None) -> Limiter:
    limiter = Limiter(Events(), clock or Moment())
    limiter.use(limits)
    return limiter


def request(peer: str = CLIENT, *lines: tuple[bytes, bytes], trusted: tuple[Network, ...] = ()) -> Request:
    heads = RequestHeads(b"lb.test", trusted)
    return Request(heads, "GET", "/", b"/", "1.1", "http", peer, [(b"host", b"test"), *lines])


def is_admitted(limits: Limits, asked: Request | None = None) -> bool:
    with suppress(LimitReached):
        limits.admit(asked or request())
        return True
    return False


def look(limiter: Limiter, name: str, key: str) -> KeyView:
    limit = limiter.find(name)
    assert limit is not None
    return limiter.look(limit, key)


@contextmanager
def limiting(backend: WireBackend | Echo, *limits: LimitOptions, **more: Any) -> Iterator[LoadBalancer]:
    """One route for everything, with all of them, in a time that only the test moves."""
    names = [limit.name for limit in limits]
    tables = {"limits": [asdict(limit) for limit in limits], "routes": [{"name": "all", "limits": names}]}
    with patch.object(wiring, "Limiter", partial(Limiter, clock=Moment())):
        balancer = LoadBalancer(backend.url, health_timeout=5, **tables, **more)
    with balancer:
        wait_until(balancer.control.is_serving)
        yield balancer


def ask(balancer: LoadBalancer, data: bytes | None = None) -> tuple[int, dict[bytes, bytes], bytes]:
    status, lines, body = split_response(exchange(port_of(balancer), data or get()))
    return status, dict(lines), body


def port_of(balancer: LoadBalancer) -> int:
    return int(balancer.url.rpartition(":")[2])


# What is counted.


@given(
    count=st.integers(1, 7),
    unit=st.sampled_from("smh"),
    burst=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 3 * 3600 * SECOND), st.sampled_from("ab")), max_size=40),
    scale=st.sampled_from([1, 10, 1000, 10**5]),
)
def test_what_passes_is_what_a_bucket_that_leaks_has_room_for(
    count: int, unit: str, burst: int, steps: list[tuple[int, str]], scale: int
) -> None:
    limit, now = Limit(LimitOptions("a", f"{count}/{unit}", burst)), 0
    interval = {"s": 1, "m": 60, "h": 3600}[unit] * SECOND // count
    levels: dict[str, Fraction] = {}
    last = Counter[str]()
    for step, key in steps:
        now += step // scale
        left = max(Fraction(0), levels.get(key, Fraction(0)) - Fraction(now - last[key], interval))
        last[key], passes = now, left + 1 <= burst
        levels[key] = left + passes
        wait = limit.wait(key, now)
        assert (wait <= 0) == passes
        assert passes or limit.wait(key, now + wait - 1) > 0 >= limit.wait(key, now + wait)
        if passes:
            limit.take(key, now)
        assert limit.left(key, now)[0] == int(burst - levels[key])


def test_exactly_so_many_pass_under_32_threads() -> None:
    """And who is refused by one limit is charged by no other."""
    options = LimitOptions("small", "500/h"), LimitOptions("large", "1000/h", key="global")
    limiter = limiter_of(*options)
    limits = limiter.filter(["small", "large"])
    with ThreadPoolExecutor(32) as threads:
        passed = sum(threads.map(lambda number: is_admitted(limits, request(f"10.0.0.{number % 3}")), range(3200)))
    counts = [view["requests"] for view in limiter.describe()]
    assert [passed, *(count["allowed"] for count in counts)] == [1000] * 3
    assert sum(count["refused"] for count in counts) >= 2200


def test_exactly_so_many_pass_over_sockets(scripted: WireBackend) -> None:
    scripted.reset()
    with limiting(scripted, LimitOptions("a", "100/h"), LimitOptions("b", "1000/h")) as balancer:
        with ThreadPoolExecutor(32) as threads:
            statuses = Counter(threads.map(lambda _: ask(balancer)[0], range(320)))
        assert statuses == {200: 100, 429: 220} and scripted.seen == 100
        views = fetch_json(f"{balancer.url}/limits")["limits"]
        assert [view["requests"] for view in views] == [
            {"allowed": 100, "refused": 220, "shadow": 0},
            {"allowed": 100, "refused": 0, "shadow": 0},
        ]
        assert fetch_json(f"{balancer.url}/limits/b?key={CLIENT}")["remaining"] == 900


def test_a_flood_of_keys_frees_nobody_and_the_table_stays_small() -> None:
    """Neither whoever owes much nor the flood: all get what so many keys as there is room for may have."""
    limit, room = Limit(LimitOptions("a", "1/h", 10)), 50
    limit.debts = Debts(room)
    for _ in range(10):
        limit.take("victim", 0)
    passed = 0
    for number in range(100 * room):
        if limit.wait(f"key {number}", number) <= 0:
            limit.take(f"key {number}", number)
            passed += 1
        assert len(limit.debts) <= room and limit.wait("victim", number) > 0
    assert passed == (room - 1) * 10
    assert limit.wait("key 0", 100 * room) > 0 and limit.wait("new", 100 * room) > 0
    assert limit.left("new", 0)[0] == 0
    for number in range(room):  # a day later nobody owes anything
        assert limit.wait(f"late {number}", 10**14) <= 0
        limit.take(f"late {number}", 10**14)
    assert len(limit.debts) <= room and limit.debts.evicted == passed - (room - 1)


@given(
    room=st.integers(1, 5),
    burst=st.integers(1, 4),
    steps=st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abcdefgh")), max_size=200),
)
def test_no_key_gets_more_than_with_room_for_all(room: int, burst: int, steps: list[tuple[int, str]]) -> None:
    bounded, whole_table, now = Limit(LimitOptions("a", "1/s", burst)), Limit(LimitOptions("a", "1/s", burst)), 0
    bounded.debts = Debts(room)
    for tenths, key in steps:
        now += tenths * SECOND // 10
        if bounded.wait(key, now) <= 0:
            bounded.take(key, now)
            assert whole_table.wait(key, now) <= 0
            whole_table.take(key, now)
        debts = bounded.debts
        assert len(debts) <= room and sorted(key for _, key in debts._heap) == sorted(debts)
        assert all(at <= debts[key] for at, key in debts._heap)


def test_keys_that_owe_nothing_are_forgotten_as_others_come() -> None:
    limit = Limit(LimitOptions("a", "1/s", 1))
    for number in range(10_000):
        limit.take(str(number), number * SECOND // 10)
    assert len(limit.debts) < 20


# By what.


HEADER, OTHER = (b"x-team", b"one-secret-value"), (b"x-team", b"two")
TOLD = (b"x-forwarded-for", b"192.0.2.1")


@pytest.mark.parametrize(
    ("key", "first", "second", "is_same"),
    [
        ("client_ip", request("192.0.2.1"), request("192.0.2.2"), False),
        ("client_ip", request("2001:db8::1"), request("2001:db8::ffff"), True),
        ("client_ip", request("2001:db8::1"), request("2001:db8:0:1::1"), False),
        ("client_ip", request("10.0.0.9", TOLD), request("192.0.2.1"), True),  # behind a trusted proxy
        ("client_ip", request("10.0.0.9", TOLD), request("10.0.0.9"), False),
        ("client_ip", request("192.0.2.9", TOLD), request("192.0.2.1"), False),  # who claims it to be one
        ("header:X-Team", request("10.0.0.1", HEADER), request("10.0.0.2", HEADER), True),
        ("header:X-Team", request("10.0.0.1", HEADER), request("10.0.0.1", OTHER), False),
        ("header:X-Team", request("192.0.2.1"), request("192.0.2.1"), True),  # by client, without
        ("header:X-Team", request("192.0.2.1"), request("192.0.2.2"), False),
        ("subject", request("192.0.2.1"), request("192.0.2.2"), False),
        ("route", request("192.0.2.1"), request("192.0.2.2"), True),
        ("global", request("192.0.2.1"), request("192.0.2.2", HEADER), True),
    ],
)
def test_what_belongs_together(key: str, first: Request, second: Request, is_same: bool) -> None:
    limiter = limiter_of(LimitOptions("a", "1/h", key=key))
    limits = limiter.filter(["a"], "v1", (parse_network("10.0.0.0/8"),))
    assert is_admitted(limits, first) and is_admitted(limits, second) is not is_same
    assert "secret" not in repr([vars(limit) for limit in limiter._limits.values()])


def test_a_subject_is_one_wherever_it_comes_from_and_a_route_has_its_own() -> None:
    limiter = limiter_of(LimitOptions("who", "1/h", key="subject"), LimitOptions("where", "1/h", key="route"))
    asked = [request("192.0.2.1"), request("192.0.2.2")]
    for each in asked:
        each.subject = "acme"
    assert [is_admitted(limiter.filter(["who"]), each) for each in asked] == [True, False]
    assert look(limiter, "who", "acme")["remaining"] == 0
    assert [is_admitted(limiter.filter(["where"], route)) for route in ("v1", "v1", "v2")] == [True, False, True]
    assert look(limiter, "where", "v3")["remaining"] == 1


# What clients and operators see.


@pytest.mark.usefixtures("short_linger")
def test_who_is_refused_is_told_until_when_and_nothing_reaches_a_backend(scripted: WireBackend) -> None:
    scripted.reset()
    scripted.answer(ok(b"ok", b'RateLimit: "theirs";r=1;t=9'))
    with limiting(scripted, LimitOptions("per_client", "2/m", 2), access_log_format="json") as balancer:
        status, lines, _ = split_response(exchange(port_of(balancer), get()))
        assert status == 200 and (b"ratelimit-policy", b'"per_client";q=2;w=60') in lines
        told = [value for name, value in lines if name == b"ratelimit"]
        assert told == [b'"theirs";r=1;t=9', b'"per_client";r=1;t=30']
        assert ask(balancer)[1][b"ratelimit"] == b'"per_client";r=0;t=30'
        upload = post(b"Content-Length: 1000000", b"Connection: close")
        for data in (get(), get(method=b"HEAD"), upload):
            status, lines_of, body = ask(balancer, data)
            assert (status, lines_of[b"retry-after"]) == (429, b"30")
            assert lines_of[b"ratelimit"] == b'"per_client";r=0;t=30'
            assert lines_of[b"content-type"] == b"application/problem+json"
        problem = json.loads(body)
        assert problem["type"].endswith("#quota-exceeded") and problem["violated-policies"] == ["per_client"]
        assert (problem["status"], problem["title"]) == (429, "Too Many Requests")
        assert problem["error"] == problem["detail"] and "30 s" in problem["error"]
        assert curl(balancer)[0] == 429  # type: ignore[arg-type]
        assert scripted.seen == 2
        record = fetch_json(f"{balancer.url}/requests/{problem['request_id']}")
        assert (record["status"], record["reason"], record["limit"]) == (429, "limit_reached", "per_client")
        assert (record["server_id"], record["attempts"]) == (None, 0) and "per_client" in record["error"]
        (backend,) = fetch_json(f"{balancer.url}/status")["backend_servers"]
        assert backend["total_requests"] == 2
        metrics = fetch(f"{balancer.url}/metrics")[2].decode()
        assert 'lb_limit_requests_total{limit="per_client",outcome="refused"} 4.0' in metrics
        assert 'lb_request_errors_total{reason="limit_reached"} 4.0' in metrics
        messages = [event["message"] for event in balancer.events() if event["kind"] == "limit_reached"]
        assert messages == ["limit per_client (2/m) is reached: requests are refused"]


def test_it_says_how_it_stands_without_spending(scripted: WireBackend) -> None:
    scripted.reset()
    with limiting(scripted, LimitOptions("a", "3/m", in_flight=5), LimitOptions("b", "1/s", key="global")) as balancer:
        moment: Any = balancer.control.limiter.clock
        for _ in range(3):
            told = fetch_json(f"{balancer.url}/limits/a?key={CLIENT}")
            assert told == {"name": "a", "key": CLIENT, "remaining": 3, "retry_after": 0, "reset": 0, "in_flight": 0}
        for _ in range(3):
            assert ask(balancer)[0] == 200
            moment.now += SECOND
        told = fetch_json(f"{balancer.url}/limits/a?key={CLIENT}")
        assert (told["remaining"], told["retry_after"], told["reset"]) == (0, 17, 57)
        assert fetch_json(f"{balancer.url}/limits/b")["remaining"] == 1
        view = fetch_json(f"{balancer.url}/limits")["limits"][0]
        assert (view["rate"], view["burst"], view["key"], view["in_flight"]) == ("3/m", 3, "client_ip", 5)
        assert (view["keys"], view["requests_in_flight"], view["mode"]) == (1, 0, "enforce")
        status, _, body = fetch(f"{balancer.url}/limits/c")
        assert status == 404 and b"no limit 'c'" in body


def test_a_shadow_counts_and_refuses_nothing(scripted: WireBackend) -> None:
    scripted.reset()
    shadow = LimitOptions("s", "1/h", mode="shadow", in_flight=1)
    with limiting(scripted, shadow, LimitOptions("a", "3/h")) as balancer:
        answers = [ask(balancer) for _ in range(4)]
        assert [answer[0] for answer in answers] == [200, 200, 200, 429]
        assert answers[1][1][b"ratelimit-policy"] == b'"a";q=3;w=3600'
        counts = [view["requests"] for view in fetch_json(f"{balancer.url}/limits")["limits"]]
        assert counts == [{"allowed": 1, "refused": 0, "shadow": 3}, {"allowed": 3, "refused": 1, "shadow": 0}]
        told = [record["limit"] for record in balancer.requests(4)]
        assert told == ["a", "s", "s", None]
        assert fetch_json(f"{balancer.url}/limits/s?key={CLIENT}")["in_flight"] == 0


def test_events_are_few() -> None:
    moment = Moment()
    limiter = limiter_of(LimitOptions("a", "1/h"), clock=moment)
    limits = limiter.filter(["a"])
    for _ in range(1000):
        is_admitted(limits)
        moment.now += SECOND // 10
    assert limiter._events.counts()["limit_reached"] == 2  # one a minute


# In flight.


class Later(Filter):
    """What comes after the limits: each path fails in its own way."""

    def admit(self, request: Request) -> Answer | None:
        if request.path == "/fail":
            raise RuntimeError("admit fails")
        return whole(403) if request.path == "/no-entry" else None

    def answer(self, request: Request, record: Record, lines: list[Any]) -> list[Any]:
        if request.path == "/fail-answer":
            raise RuntimeError("answer fails")
        return lines

    def done(self, request: Request, record: Record) -> None:
        raise RuntimeError("done fails")


class Earlier(Later):
    """The same before them."""


@pytest.mark.parametrize("others", [Earlier(), None], ids=["behind a filter that fails", "before one"])
def test_a_place_is_given_back_on_every_ending(scripted: WireBackend, others: Any) -> None:
    scripted.reset()
    limiter = limiter_of(LimitOptions("a", in_flight=1))
    limits = limiter.filter(["a"])
    filters = [limits, Later()] if others is None else [others, limits]

    def in_flight() -> int:
        return limiter.describe()[0]["requests_in_flight"]

    with LoadBalancer(scripted.url, filters=filters, retries=0, health_timeout=5) as balancer:
        wait_until(balancer.control.is_serving)
        for path in (b"/", b"/no-entry", b"/fail", b"/fail-answer"):
            assert ask(balancer, get(path))[0] in (200, 403, 500)
            wait_until(lambda: in_flight() == 0, path.decode())
        scripted.answer(ok(b"x" * 300_000))
        for data in (get(), post(b"Content-Length: 3", b"Connection: close", body=b"abc")):
            assert ask(balancer, data)[0] == 200
            wait_until(lambda: in_flight() == 0, "a large answer is over")
        assert curl(balancer)[0] == 200  # type: ignore[arg-type]
        wait_until(lambda: in_flight() == 0, "a large answer over HTTP/2 is over")
        scripted.script = lambda sock, request: hang_up(sock, reset=True)
        assert ask(balancer)[0] == 502
        wait_until(lambda: in_flight() == 0, "the backend failed")
        come, go = Event(), Event()
        scripted.script = lambda sock, request: (come.set(), go.wait(), sock.sendall(ok()))
        with connect(port_of(balancer)) as sock:
            sock.sendall(get())
            assert come.wait(60) and in_flight() == 1
            assert ask(balancer)[0] == 429
        wait_until(lambda: in_flight() == 0, "the client has left")
        go.set()
        scripted.reset()
        assert ask(balancer)[0] == 200


def test_a_websocket_is_in_flight_until_it_ends() -> None:
    echo = Echo()
    try:
        with limiting(echo, LimitOptions("a", in_flight=1)) as balancer:

            def in_flight() -> int:
                return int(fetch_json(f"{balancer.url}/limits/a?key={CLIENT}")["in_flight"])

            with connect_websocket(balancer.url.replace("http", "ws") + "/x") as client:
                client.send("one")
                assert client.recv() == "one" and in_flight() == 1
                status, lines, _ = ask(balancer)
                assert (status, lines[b"retry-after"]) == (429, b"1")
                assert lines[b"ratelimit-policy"] == b'"a";q=1;qu="concurrent-requests"'
                assert lines[b"ratelimit"] == b'"a";r=0'
            wait_until(lambda: in_flight() == 0)
    finally:
        echo.stop()


# Its settings.


def test_a_reload_keeps_what_is_owed_where_nothing_has_changed() -> None:
    same, other = LimitOptions("same", "1/h", in_flight=2), LimitOptions("other", "1/h", in_flight=2)
    limiter = limiter_of(same, other)
    under_way = request()
    old = limiter.filter(["same", "other"])
    assert is_admitted(old, under_way)
    limiter.use([same, LimitOptions("other", "2/h", in_flight=2), LimitOptions("new", "1/h")])
    stands = [look(limiter, name, CLIENT) for name in ("same", "other", "new")]
    assert [(each["remaining"], each["in_flight"]) for each in stands] == [(0, 1), (2, 1), (1, 0)]
    assert [view["requests"]["allowed"] for view in limiter.describe()] == [1, 1, 0]
    old.done(under_way, Record(0.0, "GET", "/", "id"))
    assert [view["requests_in_flight"] for view in limiter.describe()] == [0, 0, 0]


FILE = """
backends = [{{ url = "{url}" }}]
[[limits]]
name = "kept"
rate = "1/h"
[[limits]]
name = "changed"
rate = "{rate}"
[[routes]]
name = "all"
limits = {names}
"""


def test_a_reload_changes_what_is_limited_for_whoever_comes_next(scripted: WireBackend, tmp_path: Path) -> None:
    scripted.reset()
    file = tmp_path / "balancer.toml"

    def write(rate: str, names: str) -> None:
        file.write_text(FILE.format(url=scripted.url, rate=rate, names=names), encoding="utf-8")

    write("1/h", '["kept", "changed"]')
    with Balancer(f"--config={file}") as balancer:
        assert [fetch(balancer.url)[0] for _ in range(2)] == [200, 429]
        write("2/h", '["changed"]')
        changes = fetch_json(f"{balancer.url}/reload?dry_run=1", {})["changes"]
        assert {change["what"] for change in changes} == {"limits.changed", "routes.all"}
        assert fetch(balancer.url)[0] == 429  # it was only asked
        fetch_json(f"{balancer.url}/reload", {})
        assert [fetch(balancer.url)[0] for _ in range(3)] == [200, 200, 429]
        write("2/h", '["kept"]')
        fetch_json(f"{balancer.url}/reload", {})
        assert fetch(balancer.url)[0] == 429  # what it owed is kept
        write("2/h", '["kept", "unknown"]')
        status, _, body = fetch(f"{balancer.url}/reload", {})
        assert status == 422 and b"limits 'unknown' is unknown; there are: changed, kept" in body


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({}, 'limits nothing; expected rate, as "100/m", or in_flight'),
        ({"burst": 5, "in_flight": 1}, "burst belongs to a rate"),
        ({"rate": "0/m"}, "expected N/s, N/m or N/h, such as 100/m"),
        ({"rate": "5/d"}, "rate = '5/d' (program): expected N/s"),
        ({"rate": "5/m\n"}, "expected N/s"),
        ({"rate": 5}, "expected N/s"),
        ({"rate": "5/m", "burst": True}, "expected a whole number from 1 to 1000000"),
        ({"in_flight": 0}, "expected a whole number from 1 to 1000000"),
        ({"rate": "5/m", "key": "cookie:a"}, "expected client_ip, subject, header:NAME, route or global"),
        ({"rate": "5/m", "key": "header:a b"}, "expected client_ip, subject"),
        ({"rate": "5/m", "mode": "off"}, "expected enforce or shadow"),
        ({"rate": "5/m", "on_store_failure": "panic"}, "expected local, open or closed"),
        ({"rate": "5/m", "bursts": 5}, "bursts'"),
    ],
)
def test_a_wrong_limit_is_refused_in_one_line(limit: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings.given({"limits": [{"name": "a", **limit}]})
    assert told in str(refused.value) and "\n" not in str(refused.value)
