"""Origins, leases, health and what the operator changes: the state behind the pool's lock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Event, Lock
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import options

from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.changes import Change, Notifier
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import create
from balancer.errors import SettingsError, Unavailable
from balancer.protocol.origin import Origin

ORIGIN = Origin("http", "127.0.0.1", 5001)
GOOD = LastCheck(at=1.0, duration=0.001, status=200, error=None)
BAD = LastCheck(at=2.0, duration=0.001, status=500, error="answered 500")
LATE = LastCheck(at=2.0, duration=0.4, status=None, error="no answer within 0.4 s", timed_out=True)
CHECKS = {"+": GOOD, "-": BAD}


class Pool(BackendPool):
    """A pool with a clock that only the test moves, and a diary of what the listeners were told."""

    def __init__(self, algorithm: str = "round_robin", rng: random.Random | None = None, **settings: Any) -> None:
        self.now = 1000.0
        super().__init__(
            create(algorithm),
            options(PoolOptions, **{"queue_limit": 0} | settings),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            rng=rng,
        )
        self.told: list[tuple[str, str]] = []
        self.on_change(lambda change: self.told.append((change.kind, change.backend)))

    def add_up(self, backend_id: str, weight: int = 1, max_connections: int | None = None) -> Backend:
        backend = self.add(backend_id, ORIGIN, weight=weight, max_connections=max_connections)
        self.record_check(backend, GOOD)
        return backend

    def ids(self) -> list[str]:
        return [backend.id for backend in self.backends()]


@pytest.fixture
def pool() -> Pool:
    """Backends a and b, both up."""
    pool = Pool()
    pool.add_up("a")
    pool.add_up("b")
    pool.told.clear()
    return pool


@pytest.fixture
def timed_pool() -> Pool:
    """The same, with a strategy that looks at response times."""
    pool = Pool("least_response_time")
    pool.add_up("a")
    pool.add_up("b")
    return pool


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(number)` in `count` threads that start together; raises what any of them raised."""
    barrier = Barrier(count)

    def run(number: int) -> None:
        barrier.wait(60)
        work(number)

    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(run, number) for number in range(count)]:
            future.result(60)


# Origins.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:5001", Origin("http", "127.0.0.1", 5001)),
        ("http://Example.COM", Origin("http", "example.com", 80)),
        ("https://a-b.example/", Origin("https", "a-b.example", 443)),
        (" http://localhost:1 ", Origin("http", "localhost", 1)),
        ("http://[::1]:8080", Origin("http", "::1", 8080)),
        ("HTTP://a:65535", Origin("http", "a", 65535)),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, expected: Origin) -> None:
    assert Origin.parse(url) == expected
    assert Origin.parse(expected.url) == expected


NO_ORIGINS = (
    "127.0.0.1:5001 localhost //a:80 ftp://a file:///etc/passwd javascript:alert(1) http:// http://:80 http://a:0 "
    "http://a:70000 http://a:-1 http://a:+80 http://a:x http://a:\u0668\u0660 http://a/path http://a// http://a? "
    "http://a?q=1 http://a#f http://[::1 http://[::1]x:80 http://x[::1]:80 http://[v1.x]:80 http://[v1.x] "
    "http://h\u00f6st http://a\\b http://a,b http://127.0..1 http://a..b"
)
TOO_LONG = f"http://{'a' * 64}.example"


@pytest.mark.parametrize("url", ["", "http://a b", "http://a\r\nHost: b", TOO_LONG, *NO_ORIGINS.split()])
def test_anything_else_is_no_origin(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Origin.parse(url)
    assert "\n" not in str(caught.value)


PASSWORDS = (
    "http://user:hunter2@a:80 http://hunter2@a https://user:hunter2@a/path ftp://user:hunter2@a user:hunter2@a "
    "http://user:hunter2@a:70000 http://user:hunter2@a:port http://user:hunter2@[::1 http://user:hunter2@a\u2100 "
    "http://user:hunter2@"
)


@pytest.mark.parametrize("url", PASSWORDS.split(), ids=ascii)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Origin.parse(url)
    assert "hunter2" not in str(caught.value)


# Leases.


def test_release_is_idempotent(pool: Pool) -> None:
    first, other = pool.lease(None), pool.lease(None, exclude=["b"])
    assert first.backend is other.backend
    for _ in range(3):
        first.release(0.1)
    assert first.backend.active == 1


def release(lease: Lease, number: int) -> None:
    lease.release()


@pytest.mark.usefixtures("restless")
def test_release_counts_once_even_from_two_threads_at_once(pool: Pool) -> None:
    for _ in range(50):
        in_threads(2, partial(release, pool.lease(None)))
    assert [backend.active for backend in pool.backends()] == [0, 0]


def test_the_excluded_are_not_chosen(pool: Pool) -> None:
    assert [pool.lease(None, exclude=["a"]).backend.id for _ in range(3)] == ["b", "b", "b"]


def unknown_pool() -> Pool:
    pool = Pool()
    pool.add("a", ORIGIN)
    return pool


def full_pool() -> Pool:
    pool = Pool()
    pool.add_up("a", max_connections=1)
    pool.lease(None)
    return pool


def weightless_pool() -> Pool:
    pool = Pool()
    pool.add_up("a", weight=0)
    return pool


@pytest.mark.parametrize(
    ("make", "exclude", "cause"),
    [
        (Pool, [], "no backend is configured"),
        (unknown_pool, [], "full or not checked yet"),
        (weightless_pool, [], "no backend is available"),
        (full_pool, [], "full or not checked yet"),
        (full_pool, ["a"], "no other backend"),
    ],
)
def test_unavailable_says_why(make: Callable[[], Pool], exclude: list[str], cause: str) -> None:
    with pytest.raises(Unavailable, match=cause) as caught:
        make().lease(None, exclude)
    assert caught.value.status == 503


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(
    "algorithm", ["round_robin", "weighted", "least_connections", "power_of_two", "least_response_time", "peak_ewma"]
)
def test_threads_never_exceed_max_connections_and_leave_nothing_behind(algorithm: str) -> None:
    pool = Pool(algorithm)
    limits = {"a": 3, "b": 2, "c": None}
    for backend_id, limit in limits.items():
        pool.add_up(backend_id, max_connections=limit)
    pool.update("c", {"max_connections": 1})
    highest: Counter[str] = Counter()
    served: Counter[int] = Counter()

    def work(number: int) -> None:
        for _ in range(200):
            try:
                lease = pool.lease(None)
            except Unavailable:
                continue
            served[number] += 1
            active = lease.backend.active
            highest[lease.backend.id] = max(highest[lease.backend.id], active)
            lease.release(0.001)

    in_threads(16, work)
    assert highest["a"] <= 3 and highest["b"] <= 2 and highest["c"] <= 1
    assert [backend.active for backend in pool.backends()] == [0, 0, 0]
    assert sum(served.values()) > 0


def test_an_answer_that_has_begun_counts_at_once_and_once(timed_pool: Pool) -> None:
    lease = timed_pool.lease(None, exclude=["b"])
    backend = lease.backend
    timed_pool.now += 0.3
    assert backend.speed.silence(timed_pool.now) == pytest.approx(0.3)
    lease.answered(0.2)
    lease.answered(9.0)
    assert (backend.speed.unanswered, backend.active) == (0, 1)
    timed_pool.now += 60  # a long body is no silence
    assert backend.speed.silence(timed_pool.now) == 0.0
    lease.release(9.0)
    lease.answered(9.0)
    assert (backend.speed.unanswered, backend.active) == (0, 0)
    assert backend.speed.response_time(timed_pool.now - 60) == pytest.approx(0.2)


def test_silence_is_since_the_newest_answer_while_others_wait(timed_pool: Pool) -> None:
    first, _second = (timed_pool.lease(None, exclude=["b"]) for _ in range(2))
    timed_pool.now += 0.5
    first.release(0.5)
    timed_pool.now += 0.1
    assert first.backend.speed.silence(timed_pool.now) == pytest.approx(0.1)


def test_a_request_given_up_on_says_how_slow_the_backend_is_at_least(timed_pool: Pool) -> None:
    lease = timed_pool.lease(None, exclude=["b"])
    lease.backend.speed.observe(0.1, timed_pool.now)
    timed_pool.now += 2
    lease.release()
    assert lease.backend.speed.response_time(timed_pool.now) > 0.4
    quick = timed_pool.lease(None, exclude=["b"])
    before = quick.backend.speed.response_time(timed_pool.now)
    quick.release()
    assert quick.backend.speed.response_time(timed_pool.now) == before


@pytest.mark.parametrize("samples", [(0.1, 0.9), (0.9, 0.1)])
def test_the_peak_rises_at_once_and_falls_only_with_time(samples: tuple[float, float]) -> None:
    backend = Backend("a", Origin("http", "127.0.0.1", 1))
    for seconds in samples:
        backend.speed.observe(seconds, 0.0)
    assert [backend.speed.peak_time(now) for now in (0.0, 5.0)] == pytest.approx([0.9, 0.45])


def test_a_first_byte_time_is_remembered_and_a_request_without_one_teaches_nothing(timed_pool: Pool) -> None:
    timed_pool.lease(None, exclude=["b"]).release(0.2)
    timed_pool.lease(None, exclude=["a"]).release()
    a, b = timed_pool.backends()
    assert a.speed.response_time(timed_pool.now) == pytest.approx(0.2)
    assert b.speed.response_time(timed_pool.now) == 0.0


@pytest.mark.parametrize(("usual", "after"), [(0.0, 1.0), (0.01, 0.208), (4.0, 4.8)])
def test_a_failure_counts_as_slow_whatever_is_usual(timed_pool: Pool, usual: float, after: float) -> None:
    if usual:
        timed_pool.lease(None, exclude=["b"]).release(usual)
    timed_pool.lease(None, exclude=["b"]).release(failure="test")
    assert timed_pool.backends()[0].speed.response_time(timed_pool.now) == pytest.approx(after)


def test_a_backend_that_comes_back_is_measured_anew(pool: Pool) -> None:
    backend = pool.backends()[0]
    pool.lease(None, exclude=["b"]).release(3.0)
    pool.record_refused(backend, "refused")
    pool.record_check(backend, LastCheck(0.0, 0.0, 200, None))
    assert backend.speed.response_time(pool.now) == 0.0


# The remembered response time.


def test_response_time_halves_in_five_seconds() -> None:
    backend = Backend("a", ORIGIN)
    backend.speed.observe(0.8, now=0.0)
    assert [backend.speed.response_time(now) for now in (0.0, 5.0, 15.0)] == pytest.approx([0.8, 0.4, 0.1])


def test_a_fresh_memory_moves_by_a_fifth_and_a_stale_one_at_once() -> None:
    backend = Backend("a", ORIGIN)
    backend.speed.observe(1.0, now=0.0)
    backend.speed.observe(2.0, now=0.0)
    assert backend.speed.response_time(0.0) == pytest.approx(1.2)
    backend.speed.observe(0.01, now=1000.0)
    assert backend.speed.response_time(1000.0) == pytest.approx(0.01)


@given(st.lists(st.tuples(st.floats(1e-6, 100), st.floats(0, 1e6)), min_size=1, max_size=20))
def test_response_time_stays_within_what_was_measured(samples: list[tuple[float, float]]) -> None:
    backend, now = Backend("a", ORIGIN), 0.0
    for seconds, pause in samples:
        now += pause
        backend.speed.observe(seconds, now)
    slowest = max(seconds for seconds, _ in samples)
    assert 0 < backend.speed.response_time(now) <= slowest * 1.000001


# Health.


@given(st.integers(1, 4), st.integers(1, 4), st.text("+-", max_size=30))
def test_health_follows_the_rule_and_tells_changes_only(fall: int, rise: int, checks: str) -> None:
    pool = Pool(health_fall=fall, health_rise=rise)
    backend = pool.add("a", ORIGIN)
    status, run, previous, changes = "unknown", 0, "", ["backend_added"]
    for check in checks:
        run, previous = (run + 1 if check == previous else 1), check
        wanted, needed = ("up", rise) if check == "+" else ("down", fall)
        if status != wanted and (status == "unknown" or run >= needed):
            status = wanted
            changes.append(f"backend_{wanted}")
        pool.record_check(backend, CHECKS[check])
        assert backend.health.status == status
        assert backend.is_ready == (status == "up")
        assert (backend.health.reason is None) == (status != "down")
    assert [kind for kind, _ in pool.told] == changes


def late(pool: Pool, backend: Backend, times: int = 2) -> Backend:
    """So many checks in a row time out, one each half second."""
    for _ in range(times):
        pool.now += 0.5
        pool.record_check(backend, LATE)
    return backend


def test_a_backend_that_requests_keep_busy_is_not_down_but_asked_last(pool: Pool) -> None:
    a, b = pool.backends()
    leases = [pool.lease(None), pool.lease(None)]
    assert late(pool, a).health.status == "up"
    chosen = [pool.lease(None) for _ in range(3)]
    assert [lease.backend for lease in chosen] == [b, b, b]
    assert chosen[0].choice.describe()["excluded"] == {"a": f"busy: {LATE.error}"}
    late(pool, b)
    assert {pool.lease(None).backend for _ in range(2)} == {a, b}  # who else?
    leases[0].release(0.5)
    assert [pool.lease(None).backend for _ in range(2)] == [a, a]  # it has answered
    pool.record_check(b, GOOD)
    assert {pool.lease(None).backend for _ in range(2)} == {a, b}
    assert "backend_down" not in dict(pool.told)


def test_a_backend_that_is_silent_for_as_long_as_a_request_may_take_is_down(pool: Pool) -> None:
    """However many of them are in flight. Whatever comes of an answer shows that it lives."""
    a, _ = pool.backends()
    streams, waits = pool.lease(None), pool.lease(None, ["b"])
    assert streams.backend is waits.backend is a
    late(pool, a, 50)
    streams.alive()
    assert late(pool, a, 59).health.status == "up"
    waits.release(failure="no answer in time")  # which is no answer
    assert late(pool, a).health.status == "down"


@pytest.mark.parametrize("checks", [[LATE, LATE], [BAD, BAD], [LATE, BAD]])
def test_only_requests_in_flight_and_only_silence_excuse_a_failed_check(pool: Pool, checks: list[LastCheck]) -> None:
    a, _ = pool.backends()
    lease = pool.lease(None)
    if checks[-1] is LATE:
        lease.release(0.1)
    for check in checks:
        pool.now += 0.5
        pool.record_check(a, check)
    assert (a.health.status, a.health.reason) == ("down", checks[-1].error)


def test_a_down_backend_shows_its_newest_reason_and_since_when(pool: Pool) -> None:
    backend = pool.backends()[0]
    for pool.now, error in ((1010.0, "first"), (1011.0, "second"), (1012.0, "third")):
        pool.record_check(backend, LastCheck(pool.now, 0.4, None, error))
    health = pool.snapshot()[0]["health"]
    assert (health["status"], health["reason"], health["since"]) == ("down", "third", 1011.0)
    assert health["last_check"] == LastCheck(at=1012.0, duration=0.4, status=None, error="third").describe()
    assert (health["consecutive_failures"], health["consecutive_successes"]) == (3, 0)


@pytest.mark.parametrize(
    ("checks", "expected"), [("", True), ("+", False), ("+-", True), ("+--", False), ("+--+", True), ("+--++", False)]
)
def test_the_next_check_comes_soon_while_a_change_is_in_the_air(checks: str, expected: bool) -> None:
    pool = Pool(health_rise=2)
    backend = pool.add("a", ORIGIN)
    for check in checks:
        pool.record_check(backend, CHECKS[check])
    assert backend.health.is_in_transition is expected


def test_a_refused_connect_takes_a_backend_down_at_once(pool: Pool) -> None:
    backend = pool.backends()[0]
    pool.record_refused(backend, "refused")
    pool.record_refused(backend, "refused again")
    assert (backend.health.status, backend.health.reason) == ("down", "refused")
    assert [pool.lease(None).backend.id for _ in range(2)] == ["b", "b"]
    assert pool.told == [("backend_down", "a")]


def test_after_a_refused_connect_it_takes_rise_good_checks() -> None:
    pool = Pool(health_rise=2)
    backend = pool.add_up("a")
    pool.record_check(backend, GOOD)
    pool.record_refused(backend, "refused")
    seen = []
    for _ in range(2):
        pool.record_check(backend, GOOD)
        seen.append(backend.health.status)
    assert seen == ["down", "up"]


@pytest.mark.parametrize("report", ["check", "refused"])
def test_news_of_a_removed_backend_is_ignored(pool: Pool, report: str) -> None:
    backend = pool.backends()[0]
    pool.remove("a")
    successor = pool.add("a", ORIGIN)
    pool.told.clear()
    if report == "check":
        pool.record_check(backend, GOOD)
    else:
        pool.record_refused(backend, "refused")
    assert successor.health.status == "unknown"
    assert pool.told == []


def test_the_first_round_is_over_when_all_that_are_checked_are_known() -> None:
    pool = Pool()
    for backend_id in ("a", "b"):
        pool.add(backend_id, ORIGIN)
    assert not pool.has_had_first_round()
    pool.record_check(pool.backends()[0], BAD)
    assert not pool.has_had_first_round()
    pool.update("b", {"admin_state": "maint"})
    assert pool.has_had_first_round()


# What the operator changes.


@pytest.mark.parametrize("state", ["drain", "maint"])
def test_a_drained_backend_gets_nothing_and_finishes_what_it_has(pool: Pool, state: str) -> None:
    lease = pool.lease(None, exclude=["b"])
    pool.update("a", {"admin_state": state})
    assert {pool.lease(None).backend.id for _ in range(4)} == {"b"}
    assert (pool.snapshot()[0]["state"], pool.snapshot()[0]["drained"]) == (state, False)
    lease.release()
    shown = pool.snapshot()[0]
    told = {"drain": ("drained", [("backend_changed", "a"), ("backend_drained", "a")])}
    assert (shown["state"], pool.told) == told.get(state, (state, [("backend_changed", "a")]))
    assert (shown["admin_state"], shown["drained"], shown["active_connections"]) == (state, True, 0)
    assert shown["healthy"] is True
    pool.update("a", {"admin_state": "ready"})
    if state == "maint":  # nobody has looked at it meanwhile
        assert {pool.lease(None).backend.id for _ in range(4)} == {"b"}
        pool.record_check(pool.backends()[0], GOOD)
    assert {pool.lease(None).backend.id for _ in range(4)} == {"a", "b"}


def test_a_removed_backend_of_the_same_name_is_another_one(pool: Pool) -> None:
    old = pool.lease(None, exclude=["b"])
    pool.remove("a")
    with pytest.raises(SettingsError, match="'a' is being removed"):
        pool.add("a", ORIGIN)
    old.release()
    new = pool.add_up("a")
    assert new is not old.backend and new.active == 0


def test_removing_while_threads_lease_ends_with_nobody_left(pool: Pool) -> None:
    def work(number: int) -> None:
        if number == 0:
            pool.remove("a")
        for _ in range(100):
            lease = pool.lease(None)
            lease.release()

    in_threads(8, work)
    assert pool.ids() == ["b"]
    assert pool.backends()[0].active == 0
    assert [kind for kind, backend in pool.told if backend == "a"].count("backend_removed") == 1


def test_live_state_survives_a_change(pool: Pool) -> None:
    lease = pool.lease(None, exclude=["b"])
    pool.update("a", {"weight": 5, "max_connections": 7})
    shown = pool.snapshot()[0]
    assert (shown["weight"], shown["max_connections"], shown["active_connections"]) == (5, 7, 1)
    assert shown["healthy"] is True
    lease.release()


def test_weight_zero_takes_a_backend_out_and_a_weight_brings_it_back(pool: Pool) -> None:
    pool.update("a", {"weight": 0})
    assert {pool.lease(None).backend.id for _ in range(4)} == {"b"}
    pool.update("a", {"weight": 1})
    assert {pool.lease(None).backend.id for _ in range(4)} == {"a", "b"}


def test_a_limit_set_at_run_time_counts_from_the_next_lease(pool: Pool) -> None:
    for _ in range(3):
        pool.lease(None, exclude=["b"])
    pool.update("a", {"max_connections": 3})
    assert {pool.lease(None).backend.id for _ in range(3)} == {"b"}
    pool.update("a", {"max_connections": None})
    assert "a" in {pool.lease(None).backend.id for _ in range(3)}


def test_only_real_changes_are_told(pool: Pool) -> None:
    pool.update("a", {"weight": 1, "admin_state": "drain"})
    assert pool.told == [("backend_changed", "a"), ("backend_drained", "a")]


@pytest.mark.parametrize("call", [lambda pool: pool.update("x", {"weight": 1}), lambda pool: pool.remove("x")])
def test_an_unknown_id_is_a_key_error(pool: Pool, call: Callable[[Pool], object]) -> None:
    with pytest.raises(KeyError):
        call(pool)
    assert pool.told == []


def test_a_backend_without_an_id_gets_a_free_one() -> None:
    pool = Pool()
    pool.add("backend_2", ORIGIN)
    assert pool.add(None, ORIGIN).id == "backend_3"
    pool.remove("backend_2")
    assert pool.add(None, ORIGIN).id == "backend_2"


@pytest.mark.parametrize("algorithm", ["weighted", "least_connections"])
def test_a_change_of_weights_is_exact_from_the_next_lease(algorithm: str) -> None:
    pool = Pool(algorithm)
    pool.add_up("a", 200)
    pool.add_up("b", 1)

    def counts(requests: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        for _ in range(requests):
            lease = pool.lease(None)
            seen[lease.backend.id] += 1
            lease.release()
        return seen

    counts(100)  # b has been promised a turn, and a owes it: half of 201
    pool.update("a", {"weight": 1})
    assert counts(10) == {"a": 5, "b": 5}


# Reading.


def test_a_snapshot_has_plain_values_that_do_not_move(pool: Pool) -> None:
    before = pool.snapshot()
    pool.lease(None)
    pool.update("b", {"weight": 9})
    assert [(row["id"], row["active_connections"], row["weight"]) for row in before] == [("a", 0, 1), ("b", 0, 1)]
    assert before[0]["url"] == "http://127.0.0.1:5001"


def test_repr_tells_the_state(pool: Pool) -> None:
    pool.lease(None)
    pool.record_refused(pool.backends()[1], "refused")
    assert repr(pool) == "<BackendPool 1 up, 1 not, 1 active, round_robin>"


def test_a_listener_may_use_the_pool(pool: Pool) -> None:
    seen: list[list[str]] = []
    pool.on_change(lambda change: seen.append(pool.ids()))
    pool.add("c", ORIGIN)
    assert seen == [["a", "b", "c"]]


def test_listeners_hear_of_changes_in_their_order_whoever_tells() -> None:
    """Two threads, each of which notes under their owner's lock and tells without it; to tell of one's takes longer."""
    notifier, lock, is_telling, pause = Notifier(), Lock(), Event(), Event()
    noted: list[str] = []
    told: list[str] = []

    def listen(change: Change) -> None:
        if change.text.startswith("slow"):
            is_telling.set()
            pause.wait(0.005)
        told.append(change.text)

    def change(name: str) -> None:
        for number in range(20):
            with lock:
                noted.append(f"{name} {number}")
                notifier.note("backend_changed", "a", noted[-1], "info")
            notifier.notify()

    notifier.on_change(listen)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(change, "slow")
        assert is_telling.wait(60)
        change("quick")
        slow.result(60)
    assert told == noted


@pytest.mark.parametrize("name", ["round_robin", "weighted", "least_connections", "power_of_two"])
def test_times_are_not_measured_for_those_who_do_not_look_at_them(name: str, timed_pool: Pool) -> None:
    before = timed_pool.lease(None, exclude=["b"])
    timed_pool.use(create(name))
    lease = timed_pool.lease(None, exclude=["b"])
    a = timed_pool.backends()[0]
    lease.release(0.5)
    assert (a.speed.ewma, a.speed.unanswered) == (0.0, 1)
    before.release(0.5)  # leased when they still counted
    assert (a.speed.ewma, a.speed.unanswered, a.active) == (0.5, 0, 0)


# Moving, leaving and coming back.

ELSEWHERE = Origin("http", "127.0.0.1", 5002)


def test_what_the_old_address_did_says_nothing_of_the_new_one(pool: Pool) -> None:
    old = [pool.lease(None, exclude=["b"]) for _ in range(3)]
    pool.apply(PoolChanges(update={"a": {"origin": ELSEWHERE}}))
    a = pool.backends()[0]
    pool.record_refused(a, "refused", ORIGIN)
    pool.record_check(a, GOOD, ORIGIN)
    old[0].answered(9.0)
    for lease in old:
        lease.release(failure="too slow")
    assert (a.health.status, a.speed.ewma, a.speed.unanswered, a.active) == ("unknown", 0.0, 0, 0)
    pool.record_check(a, GOOD, ELSEWHERE)
    assert a.health.status == "up"


def test_a_leaving_backend_goes_even_if_it_is_put_into_maintenance(pool: Pool) -> None:
    lease = pool.lease(None, exclude=["b"])
    pool.remove("a")
    pool.update("a", {"admin_state": "maint"})
    lease.release()
    assert pool.ids() == ["b"]


def test_who_takes_the_name_of_a_leaving_one_goes_on_with_its_counts(pool: Pool) -> None:
    lease = pool.lease(None, exclude=["b"])
    pool.remove("a")
    pool.apply(PoolChanges(add=[Backend("a", ELSEWHERE)]))
    assert pool.told[-2:] == [("backend_removed", "a"), ("backend_added", "a")]
    new = pool.get("a")
    assert new is not None and (new.counts.selected, new.active) == (1, 0)
    lease.release()
    assert pool.get("a") is new
