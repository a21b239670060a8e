"""Percentiles, histograms and schedules: what test_client.py computes, without a network."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.connection import Sample, clock
from loadtest.latencies import EXACT_SAMPLES, Latencies, rank_of
from loadtest.options import parse_options
from loadtest.recording import CONDENSE_EVERY, MAX_BACKENDS, OTHERS, SLOWEST, Recording, Run
from loadtest.results import describe, histogram, times_ms
from loadtest.schedule import ClosedLoop, Load, OpenLoop
from loadtest.target import Identity, parse_target

SECONDS = st.floats(1e-6, 1000)


def sample(seconds: float, reason: str | None = None, backend: str = "b") -> Sample:
    status = None if reason else 200
    return Sample(due=1.0, begin=1.0, first_byte=1.0, end=1.0 + seconds, status=status, backend=backend, reason=reason)


def recorded(*samples: Sample, first: int = 1) -> Recording:
    recording = Recording()
    for number, each in enumerate(samples, first):
        recording.add(each, number)
    return recording


# --- percentiles ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 1000))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], per_mille: int) -> None:
    found = Latencies(values).percentiles([per_mille])[0]
    reached = [v for v in sorted(set(values)) if sum(other <= v for other in values) * 1000 >= per_mille * len(values)]
    assert found == reached[0]


def test_percentiles_by_hand() -> None:
    ranks = [50, 300, 400, 500, 1000]
    assert Latencies([15, 20, 35, 40, 50]).percentiles(ranks) == [15, 20, 20, 35, 50]
    assert Latencies(range(1, 101)).percentiles([950]) == [95]
    assert rank_of(1000, 999) == 999


@given(st.lists(SECONDS, min_size=1, max_size=300), st.integers(1, 1000))
def test_counted_percentiles_are_less_than_one_percent_high(values: list[float], per_mille: int) -> None:
    exact, counted = Latencies(values), Latencies(values)
    counted.condense()
    true, found = exact.percentiles([per_mille])[0], counted.percentiles([per_mille])[0]
    assert true * (1 - 1e-9) <= found <= true * 1.0100001
    assert counted.limits() == exact.limits() == (min(values), max(values))
    assert len(counted) == len(values) and exact.is_exact and not counted.is_exact


@given(st.lists(SECONDS, min_size=2, max_size=100))
def test_mean_and_deviation_survive_condensing(values: list[float]) -> None:
    counted = Latencies(values[:1])
    counted.condense()
    counted.merge(Latencies(values[1:]))
    mean, deviation = Latencies(values).mean_and_deviation()
    found, around = counted.mean_and_deviation()
    assert found == pytest.approx(mean)
    assert deviation is not None and around == pytest.approx(deviation, rel=1e-6, abs=1e-6 * mean + 1e-9)


def test_of_nothing_and_of_one() -> None:
    assert set(times_ms(Latencies()).values()) == {None}
    one = times_ms(Latencies([0.002]))
    assert (one["stdev"], one["p50"], one["max"]) == (None, 2.0, 2.0)


# --- recordings -------------------------------------------------------------------------------------------------------


def test_latency_leaves_failures_out() -> None:
    recording = recorded(sample(0.001), sample(0.003), sample(9.0, "timeout"))
    found = times_ms(recording.latency())
    assert (found["min"], found["mean"], found["max"]) == (1.0, 2.0, 3.0)
    assert found["stdev"] == pytest.approx(math.sqrt(2), abs=1e-4)
    assert (recording.requests, recording.failed) == (3, 1)


def test_every_latency_is_kept_up_to_a_million_and_counted_after_that() -> None:
    samples = [sample(0.001)] * CONDENSE_EVERY
    assert recorded(*samples, first=EXACT_SAMPLES - CONDENSE_EVERY + 1).latency().is_exact
    beyond = recorded(*samples, first=EXACT_SAMPLES + 1)
    assert not beyond.latency().is_exact
    assert all(not len(times.exact) for times in beyond.times())
    run = Run(beyond, seconds=1.0)
    assert describe(run, {}, (), ())["client"]["exact_percentiles"] is False


def test_names_without_end_share_one_tally() -> None:
    recording = recorded(*(sample(0.001, backend=f"b{number}") for number in range(1500)))
    assert len(recording.backends) == MAX_BACKENDS + 1
    assert recording.backends[OTHERS].count == 500


def test_recordings_add_up() -> None:
    one = recorded(*(sample(n / 1000, backend="a") for n in range(1, 9)))
    two = recorded(*(sample(n / 10, backend="b") for n in range(1, 4)), sample(1, "reset"))
    one.merge(two)
    assert (one.requests, one.failed, one.backends["a"].count, one.backends["b"].count) == (12, 1, 8, 4)
    assert [slow.latency for slow in sorted(one.slowest)] == pytest.approx([0.007, 0.008, 0.1, 0.2, 0.3])
    assert len(one.slowest) == SLOWEST


@pytest.mark.parametrize(
    ("cpu", "wakeup", "saturated"), [(0.5, 0.0001, False), (0.95, 0.0001, True), (0.5, 0.02, True), (0.5, 0.004, False)]
)
def test_a_client_is_saturated_by_its_cpu_or_by_waiting_for_its_turn(
    cpu: float, wakeup: float, saturated: bool
) -> None:
    run = Run(recorded(*[sample(0.02)] * 10), seconds=1.0, cpu=cpu, wakeup_lag=Latencies([wakeup] * 5))
    found = describe(run, {}, (), ())["client"]
    assert found["saturated"] is saturated
    assert (found["cpu_ratio"], found["cpu_us_per_request"]) == (cpu, cpu * 100_000)


@pytest.mark.parametrize(("seconds", "failures", "saturated"), [(0.4, 0, False), (0.6, 5, True), (0.6, 6, False)])
def test_a_short_run_or_one_of_failures_does_not_tell_who_was_the_limit(
    seconds: float, failures: int, saturated: bool
) -> None:
    samples = [sample(0.02, "connect refused" if number < failures else None) for number in range(10)]
    run = Run(recorded(*samples), seconds=seconds, cpu=seconds)
    assert describe(run, {}, (), ())["client"]["saturated"] is saturated


def test_a_client_is_saturated_if_more_than_one_percent_was_sent_late() -> None:
    def found(late: int) -> bool:
        lag = Latencies([0.5] * late + [0.0001] * (100 - late))
        run = Run(recorded(*[sample(0.02)] * 100), seconds=1.0, cpu=0.1, lag=lag)
        client = describe(run, {}, (), ())["client"]
        assert (client["late_sends"], client["max_schedule_lag_ms"]) == (late, 500.0)
        return bool(client["saturated"])

    assert (found(1), found(2)) == (False, True)


# --- histograms -------------------------------------------------------------------------------------------------------


@given(st.lists(SECONDS, min_size=1, max_size=300), st.booleans())
def test_every_answer_is_in_the_histogram_once(values: list[float], condensed: bool) -> None:
    latencies = Latencies(values)
    if condensed:
        latencies.condense()
    buckets = histogram(latencies, ())
    bounds = [bucket["le_ms"] for bucket in buckets if bucket["le_ms"] is not None]
    assert sum(bucket["count"] for bucket in buckets) == len(values)
    assert bounds == sorted(set(bounds)) and 1 <= len(bounds) <= 13
    assert buckets[-1]["le_ms"] is None or buckets[-1]["le_ms"] * (1 + 1e-9) >= max(values) * 1000


def test_a_few_slow_answers_do_not_press_all_others_into_one_bucket() -> None:
    values = Latencies([0.005 * 1.0001**number for number in range(6000)] + [1.0] * 9)
    counts = [bucket["count"] for bucket in histogram(values, ())]
    assert max(counts) < 1500 and counts[-1] == 9


def test_bounds_as_asked() -> None:
    values = Latencies([0.001, 0.0010001, 0.005, 0.1])
    assert histogram(values, [1, 5]) == [
        {"le_ms": 1, "count": 1}, {"le_ms": 5, "count": 2}, {"le_ms": None, "count": 1}
    ]  # fmt: skip
    assert [bucket["count"] for bucket in histogram(values, [1000])] == [4]


# --- schedules --------------------------------------------------------------------------------------------------------


def never() -> bool:
    return False


@given(st.floats(0.1, 1000), st.floats(0, 100), st.integers(0, 1000))
def test_due_times_rise_and_reach_the_rate(rate: float, ramp_up: float, number: int) -> None:
    schedule = OpenLoop(Load(None, 1, 1e9, rate, ramp_up), 0.0, never, never)
    offsets = [schedule.offset(number + n) for n in range(3)]
    assert offsets == sorted(offsets)
    if offsets[0] >= ramp_up:
        assert offsets[1] - offsets[0] == pytest.approx(1 / rate, rel=1e-6)
    ramped = rate * ramp_up / 2  # requests of the whole ramp
    assert schedule.offset(0) == pytest.approx(0, abs=1e-9)  # a ramp of 5e-324 s: half of it is nothing
    assert ramp_up <= schedule.offset(math.ceil(ramped)) <= ramp_up + 1 / rate + 1e-6


def test_the_pace_is_the_average_of_a_ramp_up() -> None:
    loop = OpenLoop(Load(50, 1, rate=10_000, ramp_up=0.01), clock(), never, lambda: False)
    assert loop.pace() is None
    while loop.take(0):
        pass
    pace = loop.pace()
    assert pace and pace.due == pytest.approx(5000)
    assert pace.behind >= 0 and pace.sent == pytest.approx(50 / (0.01 + pace.behind))


def test_tickets_are_handed_out_once_whatever_the_number_of_workers() -> None:
    taken: list[int] = []
    for schedule in (
        ClosedLoop(Load(1000, 8), clock(), never),
        OpenLoop(Load(1000, 8, rate=1_000_000), clock(), never, never),
    ):
        taken.clear()

        def work(source: ClosedLoop | OpenLoop = schedule) -> None:
            while ticket := source.take(0):
                taken.append(ticket.number)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == list(range(1, 1001))


# --- where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "path"),
    [
        ("http://a", "a", 80, "a", "/api/process"),
        ("http://a#top", "a", 80, "a", "/api/process"),
        ("http://a/", "a", 80, "a", "/"),
        ("a:90/", "a", 90, "a:90", "/"),
        ("HTTPS://a:/x", "a", 443, "a", "/x"),
        ("http://a?x=1", "a", 80, "a", "/?x=1"),
        ("a/x?u=http://b", "a", 80, "a", "/x?u=http://b"),
        ("http://a/x?#top", "a", 80, "a", "/x?"),
        ("http://a//b/../c%2Fd%20;e=%C3%A4", "a", 80, "a", "//b/../c%2Fd%20;e=%C3%A4"),
        ("http://[::1]:90/", "::1", 90, "[::1]:90", "/"),
        ("http://[fe80::1%25eth0]/", "fe80::1%eth0", 80, "[fe80::1]", "/"),
    ],
)
def test_the_very_url_is_requested(url: str, host: str, port: int, authority: str, path: str) -> None:
    """A path of "/" was taken for none, and an empty query lost."""
    target = parse_target(parse_options([url], {}))
    assert (target.host, target.port, target.authority, target.path) == (host, port, authority, path)


# --- cookies ----------------------------------------------------------------------------------------------------------


def test_cookies_are_kept_replaced_and_forgotten() -> None:
    options = parse_options(["--clients", "1", "http://127.0.0.1:1"], {})
    who = Identity(options, parse_target(options), "198.18.0.1")
    assert b"Cookie" not in who.request
    who.remember(["a=1; Path=/; HttpOnly", "b=2; Max-Age=60"])
    assert b"\r\nCookie: a=1; b=2\r\n\r\n" in who.request
    who.remember(["a=3", "b=; Max-Age=0", ";;;", 'c="x y"'])
    assert b'\r\nCookie: a=3; c="x y"\r\n\r\n' in who.request
    who.remember([f"n{number}=1" for number in range(60)])
    assert who.request.count(b"=1") == 50 and b"n59=1" in who.request and b"a=3" not in who.request
    assert who.request.startswith(b"GET /api/process HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
