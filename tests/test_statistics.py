"""Counters that add up, percentiles within 3 %, bounded rings."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Clock, make_attempt, make_record
from werkzeug.test import Client

from balancer.balancing.backends import LastCheck
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.errors import ResponseTimedOut
from balancer.forwarding.retrybudget import RetryBudget
from balancer.loadbalancer import create_app
from balancer.observe.events import Events
from balancer.observe.histogram import BOUNDS, Histogram
from balancer.observe.record import PATH_SHOWN, Record
from balancer.observe.statistics import (
    FORMER_KEPT,
    NO_REQUESTS,
    RECENT_KEPT,
    SAMPLED_KEPT,
    SAMPLED_PER_SECOND,
    TROUBLED_KEPT,
    Counters,
    Statistics,
)
from balancer.protocol.origin import Origin


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def statistics(clock: Clock) -> Statistics:
    return Statistics(clock=clock, wall_clock=clock)


def record(status: int = 200, backend: str | None = "a", seconds: float = 0.01, complete: bool = True) -> Record:
    return make_record(backend, status, seconds, complete=complete)


def finish(statistics: Statistics, *records: Record) -> None:
    for one in records:
        statistics.begin()
        statistics.record(one)


statuses = st.sampled_from([100, 200, 204, 301, 404, 499, 500, 502, 503, 599])
records = st.builds(
    record, statuses, st.sampled_from(["a", "b", None]), st.floats(0, 200, allow_nan=False), st.booleans()
)


# Percentiles.


def exact(samples: list[float], share: float) -> float:
    """Nearest rank: the smallest sample that at least `share` of all do not exceed."""
    return sorted(samples)[max(0, math.ceil(round(share * len(samples), 9)) - 1)]


@given(st.lists(st.floats(BOUNDS[0], BOUNDS[-1]), min_size=1, max_size=200))
def test_percentiles_are_within_3_percent(samples: list[float]) -> None:
    histogram = Histogram()
    for seconds in samples:
        histogram.add(seconds)
    for name, share in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99)):
        told = histogram.summary()[name]
        assert told is not None
        assert told == pytest.approx(exact(samples, share), rel=0.03)


@given(st.floats(0.001, 100))
def test_what_takes_51_to_53_ms_is_told_so(scale: float) -> None:
    """It was told as 54 ms, then as 62, 71 and 82."""
    histogram = Histogram()
    samples = [scale * (0.051 + 0.002 * step / 1000) for step in range(1000)]
    for seconds in samples:
        histogram.add(seconds)
    assert histogram.percentiles(0.5, 0.95, 0.99) == pytest.approx(
        [exact(samples, share) for share in (0.5, 0.95, 0.99)], rel=0.03
    )


@pytest.mark.parametrize("count", [1, 2, 20, 100, 700, 1000, 1100, 2300])
def test_percentiles_pick_the_exact_rank_where_it_is_a_whole_number(count: int) -> None:
    # One sample in a hundred is slow: p99 is the last fast one, whatever the floating point says of 0.99 * count.
    histogram = Histogram()
    samples = [10.0] * (count // 100) + [0.01] * (count - count // 100)
    for seconds in samples:
        histogram.add(seconds)
    assert histogram.percentiles(0.99, 0.50) == pytest.approx([exact(samples, 0.99), 0.01], rel=0.03)


@pytest.mark.parametrize(("seconds", "told"), [(0.0, BOUNDS[0]), (1e-9, BOUNDS[0]), (1e6, BOUNDS[-1])])
def test_beyond_the_buckets_their_end_is_told(seconds: float, told: float) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    assert histogram.percentiles(0.5, 0.99) == [told, told]


def test_no_samples_no_percentiles() -> None:
    assert Histogram().summary() == {"p50": None, "p95": None, "p99": None}


def test_a_histogram_does_not_grow() -> None:
    histogram = Histogram()
    for step in range(10_000):
        histogram.add(step / 10)
    assert len(histogram.counts) <= len(BOUNDS) + 1 and histogram.total == 10_000


# What counts as what.


def test_answers_of_our_own_and_what_broke_off_are_no_response_times(statistics: Statistics) -> None:
    """With all backends drained p50 fell to 0.1 ms."""
    own = [record(503, backend=None, seconds=0.0001), record(502, backend="a", seconds=0.0001)]
    for one in own:
        one.reason = "no_backend"
    own.append(record(410, backend=None, seconds=0.0001))  # a route's own
    finish(statistics, *own, record(backend="a", seconds=0.2))
    whole, backends, _ = statistics.snapshot()
    assert (
        whole["latency"]
        == backends["a"]["latency"]
        == dict.fromkeys(("p50", "p95", "p99"), pytest.approx(0.2, rel=0.03))
    )
    assert whole["avg_response_time"] == pytest.approx(0.2)
    assert (whole["total_requests"], backends["a"]["total_requests"]) == (4, 2)


@pytest.mark.parametrize(
    ("status", "complete", "failed", "aborted", "code"),
    [
        (200, True, 0, 0, "2xx"),
        (304, True, 0, 0, "3xx"),
        (404, True, 0, 0, "4xx"),
        (499, False, 1, 1, None),
        (500, True, 1, 0, "5xx"),
        (502, True, 1, 0, "5xx"),
        (200, False, 1, 0, "2xx"),
    ],
)
def test_a_request_failed_without_a_complete_answer_or_with_500_and_above(
    status: int, complete: bool, failed: int, aborted: int, code: str | None
) -> None:
    counters = Counters()
    counters.add(record(status, complete=complete))
    told = counters.describe()
    assert (told["failed_requests"], told["successful_requests"]) == (failed, 1 - failed)
    assert told["aborted_requests"] == aborted
    assert [name for name, count in told["codes"].items() if count] == ([code] if code else [])


def test_the_average_is_of_all_requests() -> None:
    counters = Counters()
    for seconds in (0.1, 0.2, 0.6):
        counters.add(record(seconds=seconds))
    assert counters.describe()["avg_response_time"] == pytest.approx(0.3)
    assert NO_REQUESTS["avg_response_time"] == 0.0


def assert_adds_up(told: dict[str, Any]) -> None:
    assert told["total_requests"] == told["successful_requests"] + told["failed_requests"]
    assert told["total_requests"] == sum(told["codes"].values()) + told["aborted_requests"]
    assert told["aborted_requests"] <= told["total_requests"]


@given(st.lists(records, max_size=60))
def test_totals_add_up_at_any_moment(given_records: list[Record]) -> None:
    statistics = Statistics()
    for done, one in enumerate(given_records, start=1):
        finish(statistics, one)
        whole, backends, recent = statistics.snapshot()
        assert whole["total_requests"] == done and whole["active_requests"] == 0
        for told in (whole, *backends.values()):
            assert_adds_up(told)
        unassigned = sum(e.backend is None for e in given_records[:done])
        assert sum(told["total_requests"] for told in backends.values()) == done
        assert backends[None]["total_requests"] == unassigned
        assert len(recent) == min(done, 20)
        assert recent[0]["status"] == one.status


def test_a_status_that_is_none_counts_as_a_server_error(statistics: Statistics) -> None:
    finish(statistics, record(600), record(999))
    whole = statistics.snapshot()[0]
    assert (whole["codes"]["5xx"], whole["failed_requests"]) == (2, 2)


def test_counts_of_backends_that_are_long_gone_stay_in_the_sum(statistics: Statistics) -> None:
    for number in range(FORMER_KEPT + 50):
        finish(statistics, record(backend=f"b{number}"))
        statistics.forget(f"b{number}")
    counters = statistics.lifetime().counters
    assert sum(one.total for one in counters.values()) == FORMER_KEPT + 50
    assert len(counters) <= FORMER_KEPT + 2


@pytest.mark.usefixtures("restless")
def test_threads_lose_nothing(statistics: Statistics) -> None:
    plan = [record(200, "a"), record(503, None), record(404, "b"), record(499, "a", complete=False)]

    def work() -> None:
        for _ in range(150):
            statistics.retried()
            finish(statistics, *plan)
            assert_adds_up(statistics.snapshot(0)[0])

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work) for _ in range(8)]:
            future.result(60)
    whole, backends, _ = statistics.snapshot()
    assert (whole["total_requests"], whole["failed_requests"], whole["aborted_requests"]) == (4800, 2400, 1200)
    assert {name: told["total_requests"] for name, told in backends.items()} == {"a": 2400, "b": 1200, None: 1200}
    assert whole["active_requests"] == 0


# The rings.


def test_a_recent_request_says_what_was_tried_and_cuts_long_paths() -> None:
    one = record(504)
    one.path = "/" + "x" * 1000
    one.reason = "http_response_timeout"
    one.attempts = [
        make_attempt("b", "connection_refused", 0.001, error="http://b: refused"),
        make_attempt("a", "http_response_timeout", 1.0),
    ]
    told = one.describe()
    assert (told["attempts"], told["reason"]) == (2, "http_response_timeout")
    assert told["tried"][0] == {
        "backend": "b",
        "outcome": "connection_refused",
        "seconds": 0.001,
        "connect": None,
        "resent": False,
        "hedge": False,
        "error": "http://b: refused",
        "at": 0.0,
    }
    assert one.explain()["tried"][0]["candidates"] == [{"id": "b", "active": 3, "score": None}]
    assert one.explain()["tried"][0]["excluded"] == {"absent": "maint"}
    assert len(told["path"]) == PATH_SHOWN


def test_a_request_can_be_found_by_its_id_the_troubled_ones_longer(statistics: Statistics) -> None:
    failed, plain = record(502), record(200)
    failed.request_id, plain.request_id = "failed", "plain"
    finish(statistics, *(record() for _ in range(SAMPLED_PER_SECOND)))
    finish(statistics, plain, failed)
    assert statistics.find("plain") is plain
    finish(statistics, *(record() for _ in range(RECENT_KEPT)))
    assert statistics.find("plain") is None
    assert statistics.find("failed") is failed
    finish(statistics, *(record(500) for _ in range(TROUBLED_KEPT)))
    assert statistics.find("failed") is statistics.find("never") is None


def test_of_many_the_first_of_each_second_are_kept(statistics: Statistics, clock: Clock) -> None:
    ids = [f"{second}-{number}" for second in range(3) for number in range(3 * SAMPLED_PER_SECOND)]
    for number, request_id in enumerate(ids):
        clock.now = 1000.0 + number // (3 * SAMPLED_PER_SECOND)
        one = record()
        one.request_id = request_id
        finish(statistics, one)
    kept = [request_id for request_id in ids if statistics.find(request_id) is not None]
    newest = ids[-RECENT_KEPT:]
    assert kept == [one for one in ids if int(one.split("-")[1]) < SAMPLED_PER_SECOND or one in newest]
    clock.now += 1
    finish(statistics, *(record() for _ in range(RECENT_KEPT)))
    for _ in range(SAMPLED_KEPT // SAMPLED_PER_SECOND):
        clock.now += 1
        finish(statistics, *(record() for _ in range(SAMPLED_PER_SECOND)))
    assert not any(statistics.find(request_id) for request_id in ids)


def test_requests_per_second_are_the_mean_of_the_last_whole_seconds(statistics: Statistics, clock: Clock) -> None:
    def rate() -> Any:
        return statistics.snapshot()[0]["requests_per_second"]

    for _ in range(5):
        finish(statistics, *(record() for _ in range(10)))
        clock.now += 1.0
    assert rate() == 10.0
    finish(statistics, record())  # this second is not whole yet
    assert rate() == 10.0
    clock.now += 3.0
    assert rate() == pytest.approx((20 + 1) / 5)
    clock.now += 60.0
    assert rate() == 0.0


def test_refused_writes_cannot_drive_other_events_out() -> None:
    events = Events()
    events.add("backend_down", "a", "refused", "error")
    for number in range(600):
        events.add("write_refused", None, f"POST /reset from {number}", "warning")
    kept, latest = events.since(0)
    assert [(event["kind"], event["count"]) for event in kept] == [("backend_down", 1), ("write_refused", 600)]
    assert (latest, kept[1]["message"]) == (601, "POST /reset from 599")


# Reset, retries, removed backends.


def test_reset_zeroes_everything_but_what_is_in_flight(statistics: Statistics, clock: Clock) -> None:
    finish(statistics, record(), record(502))
    statistics.begin()
    statistics.retried()
    clock.now = 200.0
    statistics.reset()
    whole, backends, recent = statistics.snapshot()
    assert (whole["total_requests"], whole["failed_requests"], whole["retries"]) == (0, 0, 0)
    assert whole["latency"] == {"p50": None, "p95": None, "p99": None}
    assert (whole["active_requests"], whole["start_time"]) == (1, 200.0)
    assert (list(backends), recent) == ([None], [])
    statistics.record(record())
    assert statistics.snapshot()[0]["active_requests"] == 0


def test_retries_keep_to_their_budget(statistics: Statistics, clock: Clock) -> None:
    choices = [0]
    budget = RetryBudget(lambda: choices[0], statistics.retried, clock=clock)
    allowed = [budget.spend(0.2, 1) for _ in range(11)]  # one a second, of ten seconds
    assert allowed == [True] * 10 + [False]
    choices[0] = 60 + 12  # retries among them
    assert [budget.spend(0.2, 1) for _ in range(3)] == [True, True, False]  # 20 % of 60 are 12
    assert statistics.snapshot()[0]["retries"] == 12
    clock.now += 9
    assert not budget.spend(0.2, 1)
    choices[0] = 0
    clock.now += 2  # now all of it is more than 10 s ago
    assert [budget.spend(0.2, 1) for _ in range(11)] == allowed


def test_a_forgotten_backend_stays_in_the_total(statistics: Statistics) -> None:
    finish(statistics, record(backend="a"), record(backend="b"))
    statistics.forget("a")
    whole, backends, _ = statistics.snapshot()
    assert whole["total_requests"] == 2
    assert list(backends) == [None, "b"]
    finish(statistics, record(backend="a"))
    assert statistics.snapshot()[1]["a"]["total_requests"] == 1


def test_a_later_backend_of_the_same_name_starts_at_zero() -> None:
    """The last request of a backend that is being removed ends after the backend is forgotten."""
    app = create_app(Settings(backends=(BackendSettings(id="a", url="http://127.0.0.1:1"),)))
    proxy = app.extensions["balancer"].proxy
    route = proxy.routes.usual
    pool = route.pool
    pool.record_check(pool.get("a"), LastCheck(1.0, 0.001, 200, None))

    class RemovedMeanwhile:
        def exchange(self, request: Any, origin: Origin, sent: None) -> Any:
            pool.remove("a")
            raise ResponseTimedOut("too slow")

    proxy.routes = replace(proxy.routes, usual=replace(route, adapter=RemovedMeanwhile()))
    assert Client(app).get("/x").status_code == 504
    assert pool.backends() == []
    pool.add("b", Origin("http", "127.0.0.1", 1))
    assert list(app.extensions["control"].statistics.snapshot()[1]) == [None, "a"]
    pool.remove("b")
    assert list(app.extensions["control"].statistics.snapshot()[1]) == [None]  # they do not pile up
    pool.add("a", Origin("http", "127.0.0.1", 1))
    told = Client(app).get("/status", environ_base={"REMOTE_ADDR": "127.0.0.1"}).get_json()
    assert told["backend_servers"][0]["total_requests"] == 0
    assert told["statistics"]["total_requests"] == told["statistics"]["unassigned_requests"] == 1
