"""Passive ejection, latency outliers, fail-open and slow start: on a pool whose clock the test moves, and for real."""

from __future__ import annotations

import http.client
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

import pytest
import test_backends
from support import Balancer, Clock, fetch, fetch_json, ok, options, wait_until
from test_backends import GOOD, ORIGIN
from wire import WireBackend

from balancer.balancing.backends import Backend
from balancer.balancing.ejection import MIN_SAMPLES, WINDOW_SECONDS, slow_outliers
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool, Lease
from balancer.balancing.strategies import REGISTRY, create
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads


class Pool(test_backends.Pool):
    """Backends a, b, ... that are up; time moves when the test says so, and no chance in how long things last."""

    def __init__(self, names: str = "abc", **settings: Any) -> None:
        rng = random.Random()
        rng.random = lambda: 0.0  # type: ignore[method-assign]
        super().__init__(rng=rng, **settings)
        for name in names:
            self.add_up(name)
        self.told.clear()

    def one(self, backend_id: str) -> Backend:
        return next(backend for backend in self.backends() if backend.id == backend_id)

    def only(self, backend_id: str) -> list[str]:
        return [backend.id for backend in self.backends() if backend.id != backend_id]

    def fail(self, backend_id: str, times: int = 5) -> None:
        for _ in range(times):
            self.lease(None, self.only(backend_id)).release(failure="answered 503")

    def succeed(self, backend_id: str, times: int = 1, seconds: float = 0.01) -> None:
        for _ in range(times):
            self.lease(None, self.only(backend_id)).release(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.sweep()

    def shares(self, times: int = 60) -> Counter[str]:
        counts: Counter[str] = Counter()
        for _ in range(times):
            lease = self.lease(None)
            counts[lease.backend.id] += 1
            lease.release()
        return counts

    def states(self) -> dict[str, str]:
        return {backend["id"]: backend["state"] for backend in self.snapshot()}


# Failures in a row.


def test_five_failures_in_a_row_eject_and_four_do_not() -> None:
    pool = Pool()
    pool.fail("a", 4)
    pool.succeed("a")
    pool.fail("a", 4)
    assert pool.states()["a"] == "up" and pool.told == []
    pool.fail("a", 1)
    assert pool.states()["a"] == "ejected" and pool.told == [("backend_ejected", "a")]
    assert set(pool.shares()) == {"b", "c"}
    assert pool.snapshot()[0]["ejection"] == {
        "status": "ejected",
        "consecutive_failures": 0,
        "count": 1,
        "until": pool.now + 30,
        "reason": "5 failures in a row, the last: answered 503",
    }


def test_a_request_that_says_nothing_of_the_backend_does_not_count() -> None:
    pool = Pool()
    pool.fail("a", 4)
    pool.lease(None, ["b", "c"]).release()  # the client left
    pool.fail("a", 1)
    assert pool.states()["a"] == "ejected"


def test_zero_turns_it_off() -> None:
    pool = Pool(eject_after=0)
    pool.fail("a", 100)
    assert pool.states()["a"] == "up"


def test_a_trial_of_one_request_decides_about_the_return() -> None:
    pool = Pool()
    pool.fail("a")
    pool.pass_time(29.9)
    assert pool.states()["a"] == "ejected"
    pool.pass_time(0.1)
    assert pool.states()["a"] == "trial"
    trial = pool.lease(None, ["b", "c"])
    others = [pool.lease(None) for _ in range(10)]
    assert {lease.backend.id for lease in others} == {"b", "c"}
    assert others[0].choice.describe()["excluded"] == {"a": "its trial request is under way"}
    trial.release(0.01)
    assert pool.states()["a"] == "up"
    assert pool.told == [("backend_ejected", "a"), ("backend_trial", "a"), ("backend_returned", "a")]


def test_a_trial_that_nobody_can_judge_is_repeated() -> None:
    pool = Pool()
    pool.fail("a")
    pool.pass_time(30)
    pool.lease(None, ["b", "c"]).release()
    assert pool.states()["a"] == "trial"
    pool.succeed("a")
    assert pool.states()["a"] == "up"


def test_maintenance_ends_an_ejection() -> None:
    pool = Pool()
    pool.fail("a")
    for admin_state in ("maint", "ready"):
        pool.update("a", {"admin_state": admin_state})
    pool.record_check(pool.one("a"), GOOD)
    assert pool.states()["a"] == "up"


def test_each_ejection_in_a_row_is_longer_up_to_the_limit() -> None:
    pool = Pool(eject_max_seconds=100.0)
    pool.fail("a")
    lasted = []
    for _ in range(5):
        before = pool.now
        lasted.append(pool.snapshot()[0]["ejection"]["until"] - before)
        pool.pass_time(lasted[-1])
        pool.fail("a", 1)  # the trial
    assert lasted == [30, 60, 90, 100, 100]


def test_good_behaviour_makes_the_next_ejection_shorter_again() -> None:
    pool = Pool()
    for _ in range(2):
        pool.fail("a")
        pool.pass_time(100)
        pool.succeed("a")
    assert pool.snapshot()[0]["ejection"]["count"] == 2
    pool.pass_time(61)  # two times 30 s without a fault
    pool.fail("a")
    assert pool.snapshot()[0]["ejection"]["count"] == 1


def test_requests_from_before_the_ejection_change_nothing() -> None:
    pool = Pool()
    late = [pool.lease(None, ["b", "c"]) for _ in range(3)]
    pool.fail("a")
    late[0].release(0.01)
    late[1].release(failure="too slow")
    assert pool.states()["a"] == "ejected"
    pool.pass_time(30)
    late[2].release(failure="too slow")
    assert pool.states()["a"] == "trial"


# How much of the pool may be out.


@pytest.mark.parametrize(
    ("names", "share", "out"), [("ab", 0.5, 1), ("abc", 0.5, 1), ("abcd", 0.5, 2), ("abcd", 0.0, 1), ("abcd", 1.0, 3)]
)
def test_only_a_share_of_the_pool_may_be_out_and_never_all(names: str, share: float, out: int) -> None:
    pool = Pool(names, eject_max_share=share)
    for name in names:
        pool.fail(name)
    assert list(pool.states().values()).count("ejected") == out


def test_the_last_one_is_never_ejected() -> None:
    pool = Pool("a")
    pool.fail("a", 20)
    assert pool.shares() == {"a": 60}


def test_the_last_one_on_trial_stays() -> None:
    pool = Pool("ab")
    pool.fail("a")
    pool.record_refused(pool.one("b"), "refused")
    pool.pass_time(30)
    pool.fail("a", 1)
    assert pool.states() == {"a": "up", "b": "down"}


def test_an_ejected_one_is_used_when_everybody_else_has_gone_since() -> None:
    pool = Pool("ab")
    pool.fail("a")
    pool.record_refused(pool.one("b"), "refused")
    assert pool.shares() == {"a": 60}
    pool.record_check(pool.one("b"), GOOD)
    assert pool.shares() == {"b": 60}


def test_the_last_good_one_is_not_ejected_while_another_is_on_trial() -> None:
    pool = Pool("ab")
    pool.fail("a")
    pool.pass_time(30)
    trial = pool.lease(None, ["b"])
    pool.fail("b", 10)
    assert pool.states() == {"a": "trial", "b": "up"} and pool.shares() == {"b": 60}
    trial.release(failure="too slow")
    assert pool.states() == {"a": "ejected", "b": "up"}


def test_a_trial_is_no_limit_when_nobody_else_is_left() -> None:
    pool = Pool("ab")
    pool.fail("a")
    pool.pass_time(30)
    pool.lease(None, ["b"])
    pool.record_refused(pool.one("b"), "refused")
    assert pool.shares() == {"a": 60}


def test_who_is_in_maintenance_takes_no_share_of_those_that_may_be_out() -> None:
    pool = Pool("abc")
    pool.fail("a")
    pool.update("a", {"admin_state": "maint"})
    pool.fail("b")
    assert pool.states()["b"] == "ejected"


@pytest.mark.parametrize(("is_good", "state"), [(True, "up"), (False, "trial")])
def test_the_head_of_a_good_answer_ends_the_trial_however_long_the_rest_takes(is_good: bool, state: str) -> None:
    pool = Pool()
    pool.fail("a")
    pool.pass_time(30)
    lease = pool.lease(None, ["b", "c"])
    lease.answered(0.01, is_good)
    assert pool.states()["a"] == state
    lease.release(**({} if is_good else {"failure": "answered 503"}))
    assert pool.states()["a"] == ("up" if is_good else "ejected")


# Health checks and ejection.


def test_a_backend_that_came_back_from_the_dead_is_not_ejected_any_more() -> None:
    pool = Pool()
    pool.fail("a")
    pool.record_refused(pool.one("a"), "refused")
    pool.record_check(pool.one("a"), GOOD)
    assert pool.states()["a"] == "up"


def test_failures_of_a_dead_backend_do_not_eject_it() -> None:
    pool = Pool()
    leases = [pool.lease(None, ["b", "c"]) for _ in range(8)]
    pool.record_refused(pool.one("a"), "refused")
    for lease in leases:
        lease.release(failure="refused")
    pool.record_check(pool.one("a"), GOOD)
    assert pool.states()["a"] == "up" and ("backend_ejected", "a") not in pool.told


@pytest.mark.parametrize(("ends", "state"), [(False, "ejected"), (True, "up")])
def test_a_good_check_ends_an_ejection_only_if_asked_to(ends: bool, state: str) -> None:
    pool = Pool(eject_ends_on_check=ends)
    pool.fail("a")
    pool.record_check(pool.one("a"), GOOD)
    assert pool.states()["a"] == state


# Slower than the others.


@pytest.mark.parametrize(
    ("means", "slow"),
    [
        ({"a": 0.01, "b": 0.01, "c": 0.1}, {"c"}),
        ({"a": 0.01, "b": 0.012, "c": 0.014}, set()),
        ({"a": 0.01, "b": 0.01, "c": 0.0149}, set()),  # equal peers: a tenth of the median is the least spread
        ({"a": 0.0001, "b": 0.0001, "c": 0.004}, set()),  # and a millisecond
        ({"a": 0.01, "b": 0.1}, set()),
        ({}, set()),
        ({"a": 0.01, "b": 0.011, "c": 0.012, "d": 0.5, "e": 0.6}, {"d", "e"}),
    ],
)
def test_outliers_are_measured_by_median_and_deviation(means: dict[str, float], slow: set[str]) -> None:
    assert set(slow_outliers(means, 5.0)[0]) == slow


@pytest.mark.parametrize(
    ("mode", "state", "told"),
    [("off", "up", []), ("shadow", "up", ["backend_slow"]), ("enforce", "ejected", ["backend_ejected"])],
)
def test_a_slow_backend_is_named_or_ejected(mode: str, state: str, told: list[str]) -> None:
    pool = Pool(latency_ejection=mode)
    for name, seconds in (("a", 0.5), ("b", 0.01), ("c", 0.011)):
        pool.succeed(name, MIN_SAMPLES, seconds)
    pool.pass_time(WINDOW_SECONDS)
    assert pool.states() == {"a": state, "b": "up", "c": "up"}
    assert [kind for kind, _ in pool.told] == told


def test_a_few_slow_requests_are_no_evidence() -> None:
    pool = Pool(latency_ejection="enforce")
    pool.succeed("a", MIN_SAMPLES - 1, 5.0)
    for name in "bc":
        pool.succeed(name, MIN_SAMPLES, 0.01)
    pool.pass_time(WINDOW_SECONDS)
    assert pool.states()["a"] == "up"
    pool.succeed("a", 1, 5.0)  # a new window
    pool.pass_time(WINDOW_SECONDS)
    assert pool.states()["a"] == "up"


# Fail-open.


def test_below_the_panic_threshold_health_is_ignored() -> None:
    pool = Pool("abcd", panic_threshold=0.5)
    for name in "ab":
        pool.record_refused(pool.one(name), "refused")
    assert set(pool.shares()) == {"c", "d"} and not pool.is_panicking  # half is not below half
    pool.record_refused(pool.one("c"), "refused")
    assert pool.is_panicking
    assert pool.shares() == {"a": 15, "b": 15, "c": 15, "d": 15}
    pool.update("a", {"admin_state": "maint"})  # the operator's word still counts
    assert set(pool.shares()) == {"b", "c", "d"}
    pool.record_check(pool.one("b"), GOOD)
    assert not pool.is_panicking and set(pool.shares()) == {"b", "d"}
    kinds = [kind for kind, _ in pool.told if kind.startswith("panic")]
    assert kinds == ["panic_on", "panic_off"]


def test_there_is_no_panic_before_the_first_checks() -> None:
    pool = Pool("", panic_threshold=0.9)
    pool.add("a", Origin("http", "127.0.0.1", 1))
    assert not pool.is_panicking


# Slow start.


def test_a_backend_that_comes_back_gets_its_share_little_by_little() -> None:
    pool = Pool("ab", slow_start=10.0)
    assert pool.shares() == {"a": 30, "b": 30}  # never at the start of the process
    pool.record_refused(pool.one("a"), "refused")
    pool.record_check(pool.one("a"), GOOD)
    assert 2 <= pool.shares(100)["a"] <= 6  # a tenth of a half
    pool.pass_time(5)
    assert pool.snapshot()[0]["admission"] == 0.5
    assert 20 <= pool.shares(100)["a"] <= 30
    pool.pass_time(5)
    assert pool.snapshot()[0]["admission"] == 1.0
    assert pool.shares() == {"a": 30, "b": 30}


def test_slow_start_does_not_apply_when_nobody_else_is_there() -> None:
    pool = Pool("a", slow_start=10.0)
    pool.record_refused(pool.one("a"), "refused")
    pool.record_check(pool.one("a"), GOOD)
    assert pool.shares() == {"a": 60}


def test_an_ejected_backend_starts_slowly_too() -> None:
    pool = Pool("ab", slow_start=10.0)
    pool.fail("a")
    pool.pass_time(30)
    pool.succeed("a")
    assert pool.shares(100)["a"] <= 6


def traffic_of_one_that_came_back(algorithm: str, size: int, weight: int = 1) -> float:
    """What it gets in the first 3 of 20 s, as a share of what it got before. Each has about two requests in flight."""
    time, chance = Clock(), random.Random(1)
    pool = BackendPool(
        create(algorithm, clock=time, rng=chance), options(PoolOptions, slow_start=20.0), clock=time, wall_clock=time
    )
    for number in range(size):
        pool.record_check(pool.add(f"b{number}", ORIGIN, weight=weight if number == 0 else 1), GOOD)
    first, *_ = pool.backends()
    in_flight: list[tuple[float, int, Lease]] = []
    rate = 60 * (size - 1 + weight)

    def run(seconds: float) -> float:
        """Its share of the requests of so many seconds."""
        before = first.counts.selected
        for number in range(int(seconds * rate)):
            time.now += 1 / rate
            while in_flight and in_flight[0][0] <= time.now:
                _, _, lease = heappop(in_flight)
                lease.release(0.03)
            client = f"192.0.{chance.randrange(256)}.{chance.randrange(256)}"
            lease = pool.lease(Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", client, [(b"host", b"a")]))
            heappush(in_flight, (time.now + chance.uniform(0.02, 0.04), number, lease))
        return (first.counts.selected - before) / int(seconds * rate)

    usual = run(10)
    pool.record_refused(first, "refused")
    run(1)
    pool.record_check(first, GOOD)
    return run(3) / usual


@pytest.mark.parametrize("algorithm", REGISTRY)
@pytest.mark.parametrize(("size", "weight"), [(2, 1), (10, 1), (10, 3), (30, 1)])
def test_a_slow_start_thins_traffic_out_whatever_chooses(algorithm: str, size: int, weight: int) -> None:
    assert 0.095 <= traffic_of_one_that_came_back(algorithm, size, weight) <= 0.15


# For real.

Pair = tuple[Balancer, WireBackend, WireBackend]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Backend `bad` beside `good`; an ejection lasts a second."""
    bad, good = WireBackend(), WireBackend()
    balancer = Balancer(
        f"--backend=bad={bad.url}", f"--backend=good={good.url}", "--algorithm=round_robin", "--eject-seconds=1"
    )
    yield balancer, bad, good
    balancer.stop()
    bad.close()
    good.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n", "answered 503"), (b"nonsense\r\n\r\n", "malformed")],
)
def test_a_backend_that_passes_its_checks_and_fails_its_requests_is_ejected_and_comes_back(
    pair: Pair, answer: bytes, reason: str
) -> None:
    balancer, bad, _ = pair
    bad.answer(answer)
    wait_until(lambda: fetch(f"{balancer.url}/x") and balancer.backend("bad")["state"] == "ejected")
    assert reason in balancer.backend("bad")["ejection"]["reason"]
    seen = len(bad.requests)
    assert {fetch(f"{balancer.url}/x")[0] for _ in range(10)} == {200}
    assert len(bad.requests) == seen
    bad.answer(ok())
    wait_until(lambda: fetch(f"{balancer.url}/x")[0] == 200 and balancer.backend("bad")["state"] == "up")
    kinds = [event["kind"] for event in fetch_json(f"{balancer.url}/events")["events"] if event["backend"] == "bad"]
    assert kinds[-3:] == ["backend_ejected", "backend_trial", "backend_returned"]


def test_client_errors_never_eject(pair: Pair) -> None:
    balancer, bad, good = pair
    for backend in (bad, good):
        backend.answer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    assert {fetch(f"{balancer.url}/x")[0] for _ in range(30)} == {404}
    assert balancer.backend("bad")["state"] == "up" and balancer.backend("bad")["ejection"]["consecutive_failures"] == 0


def test_a_body_that_breaks_off_counts(pair: Pair) -> None:
    balancer, bad, _ = pair
    bad.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000, close=True)

    def is_ejected() -> bool:
        with suppress(http.client.HTTPException, OSError):
            fetch(f"{balancer.url}/x")
        return bool(balancer.backend("bad")["state"] == "ejected")

    wait_until(is_ejected)
    assert "before the end of the body" in balancer.backend("bad")["ejection"]["reason"]
