"""Requests that belong together go to the same backend: by a key of theirs, or by a cookie of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fleet import Demo, start_demo
from support import Balancer, exchange, fetch, get, split_response
from wire import values

from balancer.balancing.backends import Backend
from balancer.balancing.options import StrategyOptions
from balancer.balancing.ring import MOST_POINTS, Ring
from balancer.balancing.strategies import Strategy, create
from balancer.config import settings
from balancer.errors import SettingsError
from balancer.protocol.addresses import parse_network
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads
from balancer.protocol.requestkey import request_key

KEYS = [b"key %d" % number for number in range(5000)]
TEN = {f"b{number}": 1 for number in range(10)}


def owners(weights: dict[str, int]) -> list[str]:
    ring = Ring(weights)
    return [next(ring.owners(key)) for key in KEYS]


def request(target: bytes = b"/", *lines: tuple[bytes, bytes], peer: str = "192.0.2.1") -> Request:
    heads = RequestHeads(trusted=(parse_network("10.0.0.0/8"),))
    path = target.partition(b"?")[0].decode()
    return Request(heads, "GET", path, target, "1.1", "http", peer, [(b"host", b"a"), *lines])


# The ring.


def test_a_key_has_the_same_backend_in_every_process() -> None:
    """Values of this very version: others would move every session at an update."""
    ring = Ring({"a": 1, "b": 1, "c": 2})
    assert "".join(next(ring.owners(b"%d" % number)) for number in range(16)) == "accccccbcbccbaac"


def test_one_backend_of_ten_moves_a_tenth_of_the_keys_and_no_other() -> None:
    before = owners(TEN)
    for changed in ({name: 1 for name in TEN if name != "b3"}, TEN | {"b10": 1}):
        moved = [(old, new) for old, new in zip(before, owners(changed), strict=True) if old != new]
        assert len(moved) <= 0.12 * len(KEYS)
        assert all(old == "b3" or new == "b10" for old, new in moved)


def test_keys_are_spread_by_weight() -> None:
    counts = Counter(owners({"small": 1, "large": 3}))
    assert 2.2 < counts["large"] / counts["small"] < 3.8


def test_there_is_a_most_of_points() -> None:
    ring = Ring({f"b{number}": 256 for number in range(100)})
    assert MOST_POINTS <= len(ring._points) <= MOST_POINTS + 100


# The choice.


def hashing(backends: list[Backend], **options: Any) -> Strategy:
    strategy = create("consistent_hash", StrategyOptions(**options))
    strategy.prepare({backend.id: backend.weight for backend in backends})
    return strategy


def test_no_backend_has_more_than_its_share_in_flight_however_skewed_the_keys_are() -> None:
    backends = [Backend(name, Origin("http", "127.0.0.1", 80)) for name in TEN]
    strategy = hashing(backends, hash_key="path")
    for number in range(1000):
        chosen = strategy.select(backends, request(b"/hot" if number % 4 else b"/%d" % number))
        chosen.active += 1
        assert chosen.active <= 1.25 * (number + 1) / 10 + 1
    first = strategy.select(backends, request(b"/hot"))
    first.active += 300
    assert strategy.select(backends, request(b"/hot")) is not first
    assert re.fullmatch(r"above its share: \d+ in flight of at most 163", strategy.passed_over[first.id])


def test_a_key_goes_to_its_next_backend_and_comes_back() -> None:
    backends = [Backend(name, Origin("http", "127.0.0.1", 80)) for name in TEN]
    strategy = hashing(backends, hash_key="path")
    first = strategy.select(backends, request(b"/a"))
    rest = [backend for backend in backends if backend is not first]
    assert len({strategy.select(rest, request(b"/a")).id for _ in range(5)}) == 1
    assert strategy.select(backends, request(b"/a")) is first


def test_requests_without_the_key_and_backends_not_yet_on_the_ring_take_turns() -> None:
    backends = [Backend(name, Origin("http", "127.0.0.1", 80)) for name in "abc"]
    strategy = hashing(backends[:1], hash_key="header:X-User")
    assert {strategy.select(backends, request()).id for _ in range(3)} == {"a", "b", "c"}
    assert strategy.select(backends[1:], request(b"/", (b"x-user", b"1"))).id in "bc"


@pytest.mark.parametrize(
    "text, asked, key",
    [
        ("client_ip", request(), b"192.0.2.1"),
        ("client_ip", request(peer="2001:db8::1:2"), b"2001:db8::"),
        ("client_ip", request(b"/", (b"x-forwarded-for", b"1.2.3.4")), b"192.0.2.1"),
        ("client_ip", request(b"/", (b"x-forwarded-for", b"9.9.9.9, 1.2.3.4"), peer="10.0.0.1"), b"1.2.3.4"),
        ("path", request(b"/a?b=1"), b"/a"),
        ("header:X-User", request(b"/", (b"x-user", b"1"), (b"x-user", b"2")), b"1, 2"),
        ("header:X-User", request(), b""),
        ("header:x-forwarded-host", request(b"/", (b"x-forwarded-host", b"claimed")), b"a"),
        ("cookie:s", request(b"/", (b"cookie", b"ss=1; s=2; s=3")), b"2"),
        ("cookie:s", request(b"/", (b"cookie", b's="2"')), b"2"),
        ("cookie:s", request(b"/", (b"cookie", b"ss=1")), b""),
        ("query:u", request(b"/?uu=1&u=%41"), b"A"),
        ("query:u", request(b"/?xu=1"), b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_a_key(text: str, asked: Request, key: bytes) -> None:
    assert request_key(text, (parse_network("10.0.0.0/8"),))(asked) == key


@pytest.mark.parametrize("text", ["", "header", "header:", "header:a b", "cookie:a;b", "ip", "path:x"])
def test_what_is_no_key_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingsError, match="expected client_ip, path, header:NAME, cookie:NAME or query:NAME"):
        settings.given({"hash_key": text})


# Over sockets.


@pytest.fixture
def demo() -> Iterator[Demo]:
    running = start_demo("--algorithm=consistent_hash", "--hash-key=header:X-User", "--sticky")
    yield running
    running.stop()


def ask(demo: Demo, *lines: bytes, at: bytes = b"/") -> tuple[str, list[bytes]]:
    """Who answered, and our cookies in the answer."""
    _, found, _ = split_response(exchange(demo.balancer.port, get(at, *lines)))
    [served] = values(found, b"x-served-by")
    return served.decode(), values(found, b"set-cookie")


def test_a_user_stays_and_moves_only_when_the_backend_is_gone(demo: Demo) -> None:
    users = [b"X-User: %d" % number for number in range(20)]
    first = [ask(demo, user)[0] for user in users]
    assert len(set(first)) == 3 and [ask(demo, user)[0] for user in users] == first
    demo.backends[0].kill()
    demo.balancer.wait_healthy("backend_1", False)
    second = [ask(demo, user)[0] for user in users]
    assert all(now == before for before, now in zip(first, second, strict=True) if before != "backend_1")
    demo.backends[0].start()
    demo.balancer.wait_healthy("backend_1", True)
    assert [ask(demo, user)[0] for user in users] == first
    fetch(f"{demo.url}/algorithm", {"algorithm": "random"})
    assert {ask(demo, users[0])[0] for _ in range(60)} == {"backend_1", "backend_2", "backend_3"}


def test_a_cookie_binds_until_its_backend_cannot_any_more(demo: Demo) -> None:
    served, [told] = ask(demo)
    assert re.fullmatch(rb"lb=v1\.[0-9a-f]{16}; Path=/; HttpOnly; SameSite=Lax", told)
    cookie = b"Cookie: a=1; " + told.partition(b";")[0] + b"; c=3"
    for _ in range(6):
        assert ask(demo, cookie) == (served, [])
    chosen = demo.backends[int(served[-1]) - 1]
    assert chosen.requests[-1].values(b"cookie") == [b"a=1; c=3"]
    assert [b"v1." in request.head for request in chosen.requests] == [False] * 7
    assert demo.balancer.library.requests(1)[0]["tried"][0]["algorithm"] == "sticky"

    fetch(f"{demo.url}/backends/{served}", {"admin_state": "drain"}, "PATCH")
    assert ask(demo, cookie) == (served, [])  # its clients may finish
    assert ask(demo)[0] != served
    fetch(f"{demo.url}/backends/{served}", {"admin_state": "maint"}, "PATCH")
    other, [again] = ask(demo, cookie)
    assert other != served and ask(demo, b"Cookie: " + again.partition(b";")[0]) == (other, [])


def test_the_cookie_of_a_dead_backend_is_replaced_within_the_request(demo: Demo) -> None:
    served, [told] = ask(demo)
    demo.backends[int(served[-1]) - 1].kill()
    other, [again] = ask(demo, b"Cookie: " + told)
    assert other != served and again != told


@pytest.mark.parametrize("value", [b"", b"v1.", b"v1.0000000000000000", b"backend_1", b"v1.\xff", b"x" * 4000])
def test_a_made_up_cookie_binds_nobody_and_does_not_go_on(demo: Demo, value: bytes) -> None:
    served, told = ask(demo, b"Cookie: lb=" + value)
    assert len(told) == 1
    assert b"lb=" not in demo.backends[int(served[-1]) - 1].requests[-1].head or not value


def test_its_value_is_the_same_in_every_balancer_that_has_the_same_secret() -> None:
    def told(*arguments: str, trusted: bytes = b"Accept: x") -> bytes:
        running = start_demo("--algorithm=weighted", "--sticky=true", *arguments)
        try:
            served, [cookie] = ask(running, trusted)
        finally:
            running.stop()
        assert served == "backend_1"
        return cookie

    plain = told()
    assert told() == plain
    secure = told("--sticky-max-age=60", "--trusted-proxies=127.0.0.1", trusted=b"X-Forwarded-Proto: https")
    assert secure == plain + b"; Max-Age=60; Secure"


def test_a_reload_changes_the_key(tmp_path: Any) -> None:
    file = tmp_path / "lb.toml"
    file.write_text('algorithm = "consistent_hash"\nhash_key = "header:X-User"\nbackends = []\n')
    with Balancer("--config", str(file), wait_ready=False) as balancer:
        file.write_text(
            'algorithm = "consistent_hash"\nhash_key = "path"\nsticky_secret = "s3cret-and-longer"\nbackends = []\n'
        )
        status, _, data = fetch(f"{balancer.url}/reload", {})
        assert status == 200 and b"hash_key" in data and b"s3cret-and-longer" not in data
        assert balancer.library.pool._strategy.options.hash_key == "path"
