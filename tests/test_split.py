"""Requests of one route over several pools: by key, and a canary's steps on a clock of our own."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.forwarding.route import Route, Routes
from balancer.forwarding.split import Split
from balancer.observe.canary import ENOUGH, INTERVAL_SECONDS, Canary, CanaryOptions, is_worse
from balancer.observe.canary import Side as Counted
from balancer.observe.record import Record
from balancer.protocol.request import Request


class Side(Routes):
    """Where a request may go: finds itself."""

    def find(self, request: Request) -> Route:
        return cast(Route, self)


def split(*shares: float) -> Split:
    route = cast(Route, None)
    sides = [Side(route, route) for _ in shares]
    return Split(route, route, sides, lambda: shares, lambda request: cast(bytes, request), random.Random(1))


def picked(of: Split, key: bytes) -> int:
    """Which of them."""
    found = of.find(cast(Request, key))
    return next(number for number, side in enumerate(of.sides) if cast(Any, side) is found)


@given(st.binary(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_whoever_is_with_the_last_pool_stays_there_when_its_share_grows(key: bytes, one: float, other: float) -> None:
    less, more = sorted((one, other))
    if picked(split(1 - less, less), key) == 1:
        assert picked(split(1 - more, more), key) == 1


@pytest.mark.parametrize("shares", [(0.95, 0.05), (0.5, 0.5), (0.2, 0.3, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_each_pool_has_its_share_of_the_keys_and_of_requests_without_one(shares: tuple[float, ...]) -> None:
    of = split(*shares)
    for keys in ([b"client %d" % number for number in range(10_000)], [b""] * 10_000):
        found = [picked(of, key) for key in keys]
        for number, share in enumerate(shares):
            assert found.count(number) / 10_000 == pytest.approx(share, abs=0.02)


class Setting:
    """A canary of three steps, each held for 60 s."""

    def __init__(self) -> None:
        self.now = 0.0
        self.news: list[tuple[str, str]] = []
        self.canary = Canary(
            CanaryOptions(("stable", "canary"), (0.01, 0.25, 1.0), 60.0),
            lambda kind, text: self.news.append((kind, text)),
            clock=lambda: self.now,
        )

    def pass_time(self, seconds: float, **sides: Any) -> None:
        """Each interval brings to each side what `stable` and `canary` say: (requests, failed ones, seconds)."""
        end = self.now + seconds
        while self.now < end:
            for name, (total, failed, each) in sides.items():
                serve(getattr(self.canary, name), total, failed, each)
            self.now += INTERVAL_SECONDS
            self.canary.look()


def serve(side: Counted, total: int, failed: int, seconds: float) -> None:
    for number in range(total):
        record = Record(0.0, "GET", "/", "id")
        record.status, record.backend, record.seconds = (502 if number < failed else 200), "b", seconds
        side.add(record)


GOOD = (2 * ENOUGH, 0, 0.05)


def test_a_canary_that_does_well_goes_up_step_by_step_and_stays() -> None:
    setting = Setting()
    assert setting.canary.share == 0.01
    setting.pass_time(70, stable=GOOD, canary=GOOD)
    assert setting.canary.share == 0.25
    setting.pass_time(200, stable=GOOD, canary=GOOD)
    assert (setting.canary.share, setting.canary.state) == (1.0, "done")
    assert [kind for kind, _ in setting.news] == ["canary_step", "canary_step", "canary_done"]
    assert setting.news[0][1].startswith("gets 25% now: 0 of 400 requests failed, p95 ")


@pytest.mark.parametrize("bad", [(2 * ENOUGH, 40, 0.05), (2 * ENOUGH, 0, 0.2)])
def test_a_canary_that_fails_or_is_slow_gets_nothing_any_more(bad: tuple[int, int, float]) -> None:
    setting = Setting()
    setting.pass_time(70, stable=GOOD, canary=GOOD)
    setting.pass_time(10, stable=GOOD, canary=bad)
    assert (setting.canary.share, setting.canary.state) == (0.0, "returned")
    assert list(setting.canary.shares()) == [1.0, 0.0]
    setting.pass_time(600, stable=GOOD)
    assert setting.canary.share == 0.0
    assert [kind for kind, _ in setting.news] == ["canary_step", "canary_returned"]


def test_what_happens_to_both_sends_nobody_back_and_too_few_requests_say_nothing() -> None:
    setting = Setting()
    setting.pass_time(50, stable=(2 * ENOUGH, 100, 0.5), canary=(2 * ENOUGH, 100, 0.5))
    assert setting.canary.state == "growing"
    few = Setting()
    few.pass_time(600, stable=GOOD, canary=(1, 1, 9.0))
    assert (few.canary.share, few.canary.state) == (0.01, "growing")


def test_clients_that_leave_say_nothing_of_a_canary() -> None:
    side = Counted()
    record = Record(0.0, "GET", "/", "id")
    record.status, record.complete = 499, False
    side.add(record)
    assert side.counts() == (0, 0, 0.0)


def test_equally_good_sides_are_seldom_taken_for_worse() -> None:
    rng = random.Random(4)

    def draw(total: int) -> tuple[int, int, float]:
        return total, sum(rng.random() < 0.05 for _ in range(total)), 0.05

    assert not any(is_worse(draw(ENOUGH), draw(1000)) for _ in range(500))
    assert sum(is_worse((ENOUGH, 40, 0.05), draw(1000)) for _ in range(50)) == 50
