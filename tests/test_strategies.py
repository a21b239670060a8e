"""How the next backend is chosen: exact shares, even spread, ties, and the contract that every strategy keeps."""

from __future__ import annotations

import importlib.metadata
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Clock, options

from balancer.balancing import strategies
from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.strategies import REGISTRY, Indexed, Strategy, create
from balancer.errors import SettingsError
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

ORIGIN = Origin("http", "127.0.0.1", 80)

DRAWING = {"power_of_two", "random", "consistent_hash"}  # strategies that leave something to chance

weights_of_some = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def backends(*weights: int) -> list[Backend]:
    return [Backend(letter, ORIGIN, weight) for letter, weight in zip("abcdefghijkl", weights, strict=False)]


def asked(number: int) -> Request:
    """Of another client each."""
    return Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", f"192.0.2.{number}", [(b"host", b"a")])


def picks(strategy: Strategy, candidates: list[Backend], count: int) -> str:
    strategy.prepare({backend.id: backend.weight for backend in candidates})
    return "".join(strategy.select(candidates, asked(number)).id for number in range(count))


# The contract, over everything that is registered.


@pytest.mark.parametrize("name", REGISTRY)
@given(data=st.data())
def test_every_strategy_returns_one_of_the_candidates(name: str, data: st.DataObject) -> None:
    clock = Clock()
    strategy = create(name, clock=clock, rng=random.Random(1))
    everyone = backends(*data.draw(weights_of_some))
    for _ in range(data.draw(st.integers(1, 6))):
        clock.now += data.draw(st.sampled_from([0.0, 0.1, 1e6]))
        for backend in everyone:
            backend.active = data.draw(st.integers(0, 5))
            backend.weight = data.draw(st.sampled_from([1, 2, 256]))
            if data.draw(st.booleans()):
                backend.speed.observe(data.draw(st.sampled_from([0.0, 1e-9, 0.01, 1e5])), clock.now)
        candidates = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
        assert strategy.select(candidates, asked(1)) in candidates


@pytest.mark.parametrize("name", REGISTRY)
def test_every_strategy_uses_all_idle_equal_backends(name: str) -> None:
    # Three for those that take turns; those that draw have 60 to do so, and a fixed seed.
    count = 60 if name in DRAWING else 3
    assert set(picks(create(name, rng=random.Random(1)), backends(1, 1, 1), count)) == {"a", "b", "c"}


@pytest.mark.parametrize("name", REGISTRY)
def test_no_strategy_changes_a_backend(name: str) -> None:
    candidates = backends(3, 2, 1)
    before = [repr(backend) for backend in candidates]
    picks(create(name), candidates, 10)
    assert [repr(backend) for backend in candidates] == before


@pytest.mark.parametrize("name", REGISTRY)
def test_every_strategy_says_what_it_is_in_one_paragraph(name: str) -> None:
    cls = REGISTRY[name]
    assert cls.name == name
    assert len(cls.description()) > 60 and "\n" not in cls.description()


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("weights", [(), (1,), (3, 2, 1)], ids=str)
def test_expected_shares_add_up_to_one_or_are_not_told(name: str, weights: tuple[int, ...]) -> None:
    shares = create(name).expected_shares(backends(*weights))
    assert shares is None or sum(shares.values()) == pytest.approx(1.0 if weights else 0.0)


# Round robin and weighted.


@given(st.integers(1, 10), st.integers(1, 40))
def test_round_robin_gives_everyone_the_same_in_every_round(size: int, count: int) -> None:
    counts = Counter(picks(create("round_robin"), backends(*[5] * size), count))
    assert max(counts.values()) - min((counts[letter] for letter in "abcdefghij"[:size]), default=0) <= 1


def test_round_robin_ignores_weight_and_load() -> None:
    candidates = backends(9, 1, 1)
    candidates[1].active = 50
    assert picks(create("round_robin"), candidates, 6) == "abcabc"


def test_round_robin_goes_on_with_those_who_are_left() -> None:
    strategy, everyone = create("round_robin"), backends(1, 1, 1)
    picks(strategy, everyone, 3)
    assert Counter(picks(strategy, everyone[:2], 10)) == {"a": 5, "b": 5}
    assert sorted(Counter(picks(strategy, everyone, 30)).values()) == [10, 10, 10]


@given(weights_of_some, st.integers(1, 3))
def test_weighted_is_exact_over_the_sum_of_the_weights(weights: list[int], rounds: int) -> None:
    strategy, candidates = create("weighted"), backends(*weights)
    for _ in range(rounds):
        counts = Counter(picks(strategy, candidates, sum(weights)))
        assert counts == {backend.id: backend.weight for backend in candidates}


def lead_and_lag(weights: list[int]) -> tuple[float, float]:
    """How far any backend gets ahead of its ideal share, and behind it, in any prefix of a full round."""
    strategy, candidates, total = create("weighted"), backends(*weights), sum(weights)
    counts: Counter[str] = Counter()
    lead = lag = 0.0
    for turn in range(1, total + 1):
        counts[strategy.select(candidates, None).id] += 1
        errors = [counts[backend.id] - turn * backend.weight / total for backend in candidates]
        lead, lag = max(lead, *errors, 0.0), max(lag, *(-error for error in errors), 0.0)
    return lead, lag


@given(st.lists(st.integers(1, 256), min_size=1, max_size=3))
def test_weighted_is_never_one_away_from_the_ideal_with_up_to_three_backends(weights: list[int]) -> None:
    assert max(lead_and_lag(weights)) < 1


@given(st.lists(st.sampled_from([1, 2, 3, 7, 20, 64, 241]), min_size=4, max_size=10))
def test_weighted_gives_nobody_one_too_many_and_owes_nobody_two(weights: list[int]) -> None:
    # Smooth weighted round robin bounds the lead by 1 - 1/n. The lag may pass 1 with ten very unequal backends.
    lead, lag = lead_and_lag(weights)
    assert lead < 1 and lag < 2


def test_weighted_has_no_bursts() -> None:
    assert picks(create("weighted"), backends(5, 1, 1), 7) == "aabacaa"


# Least connections.


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=8))
def test_least_connections_finds_the_least_load_per_weight(loads: list[tuple[int, int]]) -> None:
    candidates = backends(*(weight for _, weight in loads))
    for backend, (active, _) in zip(candidates, loads, strict=True):
        backend.active = active
    least = min(Fraction(active, weight) for active, weight in loads)
    chosen = create("least_connections").select(candidates, None)
    assert Fraction(chosen.active, chosen.weight) == least


@pytest.mark.parametrize("order", [(30, 10), (10, 30)], ids=str)
def test_the_busier_of_two_busy_backends_never_wins(order: tuple[int, int]) -> None:
    strategy, candidates = create("least_connections"), backends(1, 1)
    candidates[0].active, candidates[1].active = order
    assert {strategy.select(candidates, None).active for _ in range(100)} == {10}


@given(st.integers(2, 6), st.integers(0, 9))
def test_ties_of_equal_backends_rotate(size: int, active: int) -> None:
    candidates = backends(*[1] * size)
    for backend in candidates:
        backend.active = active
    assert set(Counter(picks(create("least_connections"), candidates, size * 4)).values()) == {4}


def test_ties_among_some_rotate_while_the_busy_one_waits() -> None:
    candidates = backends(1, 1, 1)
    candidates[1].active = 1
    assert picks(create("least_connections"), candidates, 4) == "acac"


def test_idle_backends_take_turns_by_weight() -> None:
    assert Counter(picks(create("least_connections"), backends(3, 2, 1), 60)) == {"a": 30, "b": 20, "c": 10}


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_loads_stay_level_while_requests_come_and_go(weights: list[int], chance: random.Random) -> None:
    strategy, candidates = create("least_connections"), backends(*weights)
    for _ in range(60):
        chosen = strategy.select(candidates, None)
        assert all(chosen.active * other.weight <= other.active * chosen.weight for other in candidates)
        chosen.active += 1
        busy = chance.choice(candidates)
        busy.active -= chance.randint(0, busy.active)


# Power of two.


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=2, max_size=6), st.integers())
def test_power_of_two_never_takes_the_most_loaded(loads: list[tuple[int, int]], seed: int) -> None:
    candidates = backends(*(weight for _, weight in loads))
    for backend, (active, _) in zip(candidates, loads, strict=True):
        backend.active = active
    chosen = create("power_of_two", rng=random.Random(seed)).select(candidates, None)
    assert any(
        Fraction(chosen.active, chosen.weight) <= Fraction(other.active, other.weight)
        for other in candidates
        if other is not chosen
    )


def test_power_of_two_compares_exactly_two() -> None:
    candidates = backends(1, 1, 1)
    for backend, active in zip(candidates, (0, 1, 2), strict=True):
        backend.active = active
    counts = Counter(picks(create("power_of_two", rng=random.Random(1)), candidates, 3000))
    # Of the three pairs two have the least loaded in them, and none is won by the most loaded.
    assert counts["a"] == pytest.approx(2000, abs=120) and counts["b"] == pytest.approx(1000, abs=120)
    assert counts["c"] == 0


def test_power_of_two_draws_by_weight() -> None:
    counts = Counter(picks(create("power_of_two", rng=random.Random(1)), backends(3, 2, 1), 6000))
    assert [counts[letter] for letter in "abc"] == pytest.approx([3000, 2000, 1000], abs=200)


# Least response time, and peak EWMA where it is the same.

BY_TIME = ["least_response_time", "peak_ewma"]


def drive(clock: Clock, strategy: Strategy, candidates: list[Backend], speed: dict[str, float]) -> Iterator[str]:
    """One request after the other; each takes what `speed` says of its backend."""
    while True:
        chosen = strategy.select(candidates, None)
        clock.now += speed[chosen.id]
        chosen.speed.observe(speed[chosen.id], clock.now)
        yield chosen.id


def take(requests: Iterator[str], count: int) -> Counter[str]:
    return Counter(next(requests) for _ in range(count))


@pytest.mark.parametrize("name", BY_TIME)
def test_going_by_time_moves_to_the_fast_backend(clock: Clock, name: str) -> None:
    speed = {"a": 0.2, "b": 0.01, "c": 0.2}
    requests = drive(clock, create(name, clock=clock), backends(1, 1, 1), speed)
    assert take(requests, 100)["b"] >= 95


@pytest.mark.parametrize("name", BY_TIME)
def test_going_by_time_comes_back_to_a_backend_that_recovered(clock: Clock, name: str) -> None:
    speed = {"a": 0.2, "b": 0.01}
    requests = drive(clock, create(name, clock=clock), backends(1, 1), speed)
    take(requests, 100)
    speed["a"] = 0.001
    take(requests, 3000)  # 30 s: the memory of 0.2 s has halved six times
    assert take(requests, 100)["a"] >= 95


@pytest.mark.parametrize("name", BY_TIME)
def test_a_slow_backend_that_stays_slow_is_tried_only_now_and_then(clock: Clock, name: str) -> None:
    requests = drive(clock, create(name, clock=clock), backends(1, 1), {"a": 0.2, "b": 0.01})
    take(requests, 100)
    assert 1 <= take(requests, 6000)["a"] <= 10  # a minute


@pytest.mark.parametrize("name", BY_TIME)
def test_never_measured_is_tried_first_but_not_flooded(clock: Clock, name: str) -> None:
    strategy, candidates = create(name, clock=clock), backends(1, 1)
    candidates[0].speed.observe(0.05, clock.now)
    assert strategy.select(candidates, None).id == "b"
    candidates[1].active = 1  # its first answer is not here yet
    assert strategy.select(candidates, None).id == "a"


@pytest.mark.parametrize(
    ("active", "weight", "expected"),
    [((3, 0), (1, 1), "b"), ((0, 0), (1, 3), "b"), ((1, 1), (4, 1), "a"), ((0, 1), (1, 3), "b")],
)
def test_requests_in_flight_and_weight_count(
    clock: Clock, active: tuple[int, int], weight: tuple[int, int], expected: str
) -> None:
    candidates = backends(*weight)
    for backend, count in zip(candidates, active, strict=True):
        backend.speed.observe(0.05, clock.now)
        backend.active = count
    assert create("least_response_time", clock=clock).select(candidates, None).id == expected


@pytest.mark.parametrize("name", BY_TIME)
def test_equal_response_times_take_turns(clock: Clock, name: str) -> None:
    candidates = backends(1, 1, 1)
    for backend in candidates:
        backend.speed.observe(0.05, clock.now)
    assert picks(create(name, clock=clock), candidates, 6) == "abcabc"


@pytest.mark.parametrize("name", BY_TIME)
def test_whether_an_answer_is_owed_tells_apart_what_is_else_equal(clock: Clock, name: str) -> None:
    strategy, (backend,) = create(name, clock=clock), backends(1)
    assert isinstance(strategy, Indexed)
    backend.speed.observe(0.05, clock.now)
    strategy.gather([backend])
    backend.speed.sent(clock.now)
    strategy.changed(backend)
    backend.speed.answered(None, clock.now)  # given up at once, which says nothing of it
    strategy.changed(backend)
    assert strategy.choose(asked(1)) is backend


def test_one_slow_answer_counts_in_full_only_for_peak_ewma(clock: Clock) -> None:
    candidates = backends(1, 1)
    for backend, seconds in zip(candidates, (0.01, 0.05), strict=True):
        backend.speed.observe(seconds, clock.now)
    candidates[0].speed.observe(0.1, clock.now)  # remembered: 0.028 on average, 0.1 at its peak
    assert create("least_response_time", clock=clock).select(candidates, None).id == "a"
    assert create("peak_ewma", clock=clock).select(candidates, None).id == "b"
    clock.now += 5  # a half-life for both, and b has a fresh sample
    candidates[1].speed.observe(0.08, clock.now)
    assert create("peak_ewma", clock=clock).select(candidates, None).id == "a"


@pytest.mark.parametrize("name", BY_TIME)
def test_a_backend_that_stalls_is_left_before_its_first_late_answer(clock: Clock, name: str) -> None:
    pool = pool_of(clock, name, "stalls", "slower")
    for _ in range(50):
        for backend_id, seconds in (("stalls", 0.01), ("slower", 0.02)):
            pool.lease(None, [other for other in ("stalls", "slower") if other != backend_id]).release(seconds)
    stuck = pool.lease(None, ["slower"])
    chosen = []
    for _ in range(100):
        clock.now += 0.01
        lease = pool.lease(None)
        chosen.append(lease.backend.id)
        if lease.backend.id == "slower":
            lease.release(0.02)
    # Nothing has come from it, so that all it is known for are fast answers, and only the waiting tells.
    assert chosen.count("stalls") <= 2
    assert stuck.backend.speed.response_time(clock.now) < 0.02


# The registry.


def test_a_new_strategy_has_no_memory() -> None:
    used = create("weighted")
    picks(used, backends(3, 2, 1), 4)
    assert picks(create("weighted"), backends(3, 2, 1), 6) == "abacba"


def test_an_unknown_name_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        create("fastest")
    assert all(name in str(caught.value) for name in ("fastest", *REGISTRY))


class Last(Strategy):
    """The last candidate."""

    def select(self, candidates: Any, request: Any) -> Backend:
        chosen: Backend = candidates[-1]
        return chosen


def install_entry_point(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint("last", value, strategies.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(strategies, "REGISTRY", dict(REGISTRY))


def test_a_strategy_of_another_package_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    install_entry_point(monkeypatch, f"{__name__}:Last")
    strategies.load_entry_points()
    assert create("last").select(backends(1, 1), None).id == "b"


@pytest.mark.parametrize("value", ["no_such_module_here:Last", f"{__name__}:NoSuchClass", f"{__name__}:backends"])
def test_a_strategy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    install_entry_point(monkeypatch, value)
    with pytest.raises(SettingsError, match="'last'"):
        strategies.load_entry_points()


@pytest.mark.parametrize("name", ["", 5, "a b", "a\n", "x" * 65, "round_robin"])
def test_what_is_no_name_or_is_taken_registers_nothing(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    monkeypatch.setattr(strategies, "REGISTRY", dict(REGISTRY))
    with pytest.raises(SettingsError, match="strategy .*(expected a name|has this name already)"):
        strategies.strategy(name)(type("Mine", (Strategy,), {}))
    assert REGISTRY == strategies.REGISTRY


def test_a_module_may_be_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "REGISTRY", dict(REGISTRY))
    for _ in range(2):
        again = strategies.strategy("last")(type("Last", (Strategy,), {}))
    assert strategies.REGISTRY["last"] is again


def pool_of(clock: Clock, name: str, *backend_ids: str) -> BackendPool:
    pool = BackendPool(create(name, clock=clock), options(PoolOptions), clock=clock)
    for backend_id in backend_ids:
        backend = pool.add(backend_id, Origin("http", "127.0.0.1", 1))
        pool.record_check(backend, LastCheck(0.0, 0.0, 200, None))
    return pool


@pytest.mark.parametrize("name", BY_TIME)
def test_going_by_time_is_not_drawn_to_a_backend_that_only_fails(clock: Clock, name: str) -> None:
    pool = pool_of(clock, name, "good", "bad")
    chosen = []
    for _ in range(50):
        lease = pool.lease(None)
        chosen.append(lease.backend.id)
        clock.now += 0.01
        if lease.backend.id == "good":
            lease.release(0.01)
        else:
            lease.release(failure="test")
    assert chosen.count("bad") <= 2


# Turns go on, whatever changes.


@pytest.mark.parametrize("name", ["round_robin", "weighted", "least_connections"])
def test_shares_are_right_with_other_weights_after_each_request(clock: Clock, name: str) -> None:
    pool = pool_of(clock, name, "a", "b", "c")
    counts: Counter[str] = Counter()
    for number in range(1200):
        weights = (3, 2, 1) if number % 2 else (1, 2, 3)
        for backend_id, weight in zip("abc", weights, strict=True):
            pool.update(backend_id, {"weight": weight})
        lease = pool.lease(None)
        counts[lease.backend.id] += 1
        lease.release(0.01)
    assert [counts[backend_id] for backend_id in "abc"] == pytest.approx([400, 400, 400], abs=2)


@pytest.mark.parametrize("name", ["round_robin", "weighted", "least_connections"])
def test_shares_are_right_while_backends_come_and_go(clock: Clock, name: str) -> None:
    """One is away for every other request, another is new each time: the two that stay share the rest."""
    pool = pool_of(clock, name, "a", "b", "c")
    counts: Counter[str] = Counter()
    for number in range(600):
        pool.update("c", {"admin_state": "ready" if number % 2 else "drain"})
        added = pool.add(f"new-{number}", ORIGIN)
        pool.record_check(added, LastCheck(0.0, 0.0, 200, None))
        lease = pool.lease(None)
        counts[lease.backend.id[0]] += 1
        lease.release(0.01)
        pool.remove(added.id)
    # Of three on even turns, of four on odd ones.
    assert [counts[backend_id] for backend_id in "abc"] == pytest.approx([175, 175, 75], abs=3)
