"""The past by the second: nothing lost, counted twice, shifted or made up, whatever clock and operator do."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleet import Demo
from hypothesis import given
from hypothesis import strategies as st
from support import Balancer, Clock, StartProcess, fetch, fetch_json, make_record, wait_until
from wire import WireBackend

from balancer.observe.history import SLOTS, History, Reading
from balancer.observe.statistics import Statistics

START = 1000.25  # a whole second and a bit, and a whole ten of them


class Recorded:
    """A history over real statistics, at a time that only the test moves."""

    def __init__(self) -> None:
        self.clock = Clock(START)
        self.statistics = Statistics(clock=self.clock, wall_clock=self.clock)
        self.in_flight: dict[str, int] = {}
        self.waiting = 0
        self.history = History(self._read, wall_clock=self.clock, clock=self.clock)
        self.history.look()

    def _read(self) -> Reading:
        return Reading(self.statistics.lifetime(), dict(self.in_flight), self.waiting)

    def finish(self, count: int = 1, backend: str | None = "a", status: int = 200, seconds: float = 0.01) -> None:
        for _ in range(count):
            self.statistics.begin()
            self.statistics.record(make_record(backend, status, seconds))

    def look_at(self, now: float) -> float:
        self.clock.now = now
        return self.history.look()

    def points(self, step: int = 1, since: int = 0) -> list[dict[str, Any]]:
        return [{**slot} for slot in self.history.since(step, since)]

    def told(self, step: int = 1) -> list[tuple[int, int]]:
        return [(point["at"], point["requests"]) for point in self.points(step)]


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_each_second_has_what_ended_in_it(recorded: Recorded) -> None:
    recorded.finish(3)
    assert recorded.points() == []  # the second still runs
    recorded.look_at(1001.01)
    recorded.finish(2)
    recorded.look_at(1002.01)
    recorded.look_at(1003.01)
    assert recorded.told() == [(1000, 3), (1001, 2), (1002, 0)]


def test_a_point_has_the_fields_of_the_contract(recorded: Recorded) -> None:
    recorded.finish(98, "a", 200, 0.010)
    recorded.finish(2, "a", 502, 2.0)
    recorded.finish(1, "b", 404, 0.1)
    recorded.finish(1, None, 503, 0.0002)
    recorded.statistics.retried()
    recorded.statistics.begin()  # still under way
    recorded.in_flight, recorded.waiting = {"a": 1, "idle": 0, "busy": 4}, 7
    recorded.look_at(1001.0)
    (point,) = recorded.points()
    backends, times = point.pop("backends"), point.pop("times")
    assert [count for _, count in times] == [98, 1, 2]  # what is our own is no time of a backend
    assert all(bound / 1.3 < took <= bound for (bound, _), took in zip(times, (0.01, 0.1, 2.0), strict=True))
    assert point == {
        "at": 1000,
        "requests": 102,
        "failed": 3,
        "retries": 1,
        "in_flight": 1,
        "waiting": 7,
        "p50": pytest.approx(0.01, rel=0.03),
        "p95": pytest.approx(0.01, rel=0.03),
        "p99": pytest.approx(2.0, rel=0.03),
    }
    assert set(backends) == {"a", "b", "busy"}
    assert backends["b"] == {"requests": 1, "failed": 0, "in_flight": 0} | dict.fromkeys(
        ("p50", "p95", "p99"), pytest.approx(0.1, rel=0.03)
    )
    assert (backends["a"]["requests"], backends["a"]["failed"], backends["a"]["in_flight"]) == (100, 2, 1)
    assert backends["busy"] == {"requests": 0, "failed": 0, "in_flight": 4, "p50": None, "p95": None, "p99": None}


def test_percentiles_are_those_of_the_slot_alone(recorded: Recorded) -> None:
    recorded.finish(1000, seconds=5.0)
    recorded.look_at(1001.0)
    recorded.finish(10, seconds=0.002)
    recorded.look_at(1002.0)
    recorded.look_at(1003.0)
    slow, fast, none = recorded.points()
    assert slow["p50"] == pytest.approx(5.0, rel=0.03)
    assert fast["p99"] == fast["backends"]["a"]["p99"] == pytest.approx(0.002, rel=0.03)
    assert none["p50"] is none["p95"] is none["p99"] is None


def test_ten_seconds_are_the_sum_of_their_seconds(recorded: Recorded) -> None:
    for second in range(1001, 1026):
        recorded.finish(second - 1000, seconds=0.01 if second % 2 else 0.1)
        recorded.in_flight = {"a": second % 7}
        recorded.look_at(second + 0.02)
    ones, tens = recorded.points(1), recorded.points(10)
    assert [point["at"] for point in tens] == [1000, 1010]
    for ten in tens:
        within = [point for point in ones if ten["at"] <= point["at"] < ten["at"] + 10]
        assert len(within) == 10
        assert ten["requests"] == sum(point["requests"] for point in within)
        assert ten["backends"]["a"]["in_flight"] == max(p["backends"]["a"]["in_flight"] for p in within) == 6
        assert ten["p99"] == pytest.approx(0.1, rel=0.03)


def test_a_reset_makes_no_number_negative(recorded: Recorded) -> None:
    recorded.finish(50)
    recorded.look_at(1001.0)
    recorded.finish(5)
    recorded.statistics.reset()
    recorded.finish(2)
    recorded.look_at(1002.0)
    assert recorded.told() == [(1000, 50), (1001, 7)]
    assert recorded.statistics.snapshot()[0]["total_requests"] == 2


def test_a_cleared_history_starts_with_the_next_look(recorded: Recorded) -> None:
    recorded.finish(50)
    recorded.look_at(1001.0)
    recorded.history.clear()
    assert recorded.points(1) == recorded.points(10) == []
    recorded.finish(9)
    recorded.look_at(1002.0)
    assert recorded.points(1) == []
    recorded.finish(4)
    recorded.look_at(1003.0)
    assert recorded.told() == [(1002, 4)]


def test_a_backend_that_is_removed_and_comes_back_makes_no_number_negative(recorded: Recorded) -> None:
    recorded.finish(20, "a")
    recorded.look_at(1001.0)
    recorded.finish(3, "a")
    recorded.statistics.forget("a")
    recorded.finish(2, "a")
    recorded.look_at(1002.0)
    assert recorded.points()[-1]["backends"]["a"]["requests"] == recorded.points()[-1]["requests"] == 5


@pytest.mark.parametrize("now", [1003.5, 1007.0, 87400.0])
def test_what_a_late_look_finds_is_told_once_and_no_slot_is_made_up(recorded: Recorded, now: float) -> None:
    recorded.finish(1)
    recorded.look_at(1001.0)
    recorded.finish(6)
    recorded.look_at(now)  # the machine slept, or the clock was set forward
    recorded.finish(2)
    recorded.look_at(now + 1)
    assert recorded.told() == [(1000, 1), (1001, 6), (int(now), 2)]


def test_a_look_that_comes_early_changes_nothing(recorded: Recorded) -> None:
    recorded.finish(1)
    assert recorded.look_at(1000.9) == pytest.approx(0.1)
    assert recorded.points() == []
    assert recorded.look_at(1001.0) == pytest.approx(1.0)
    assert recorded.told() == [(1000, 1)]


@pytest.mark.parametrize("back_to", [1002.5, 1004.1, 990.0])
def test_a_clock_set_back_leaves_no_slot_in_the_future_and_loses_no_open_one(
    recorded: Recorded, back_to: float
) -> None:
    for second in range(1001, 1006):
        recorded.finish(1)
        recorded.look_at(second)
    recorded.finish(7)
    recorded.look_at(back_to)
    assert recorded.told() == [(at, 1) for at in range(1000, 1005) if at < int(back_to)]
    recorded.finish(2)
    recorded.look_at(back_to + 1)
    assert recorded.told()[-1] == (int(back_to), 9)
    times = [at for at, _ in recorded.told()]
    assert times == sorted(set(times))


@given(st.lists(st.tuples(st.floats(-30, 100, allow_nan=False), st.integers(0, 5), st.booleans()), max_size=40))
def test_whatever_the_clock_does_slots_rise_and_are_over_and_never_negative(
    steps: list[tuple[float, int, bool]],
) -> None:
    recorded = Recorded()
    for seconds, count, reset in steps:
        recorded.finish(count)
        if reset:
            recorded.statistics.reset()
        recorded.look_at(max(0.0, recorded.clock.now + seconds))
        for step in SLOTS:
            points = recorded.points(step)
            times = [point["at"] for point in points]
            assert times == sorted(set(times))
            assert all(at % step == 0 and at + step <= recorded.clock.now for at in times)
            assert all(point["requests"] >= 0 and point["failed"] >= 0 for point in points)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 5)), max_size=40))
def test_no_request_is_lost_or_told_twice(steps: list[tuple[float, int]]) -> None:
    recorded = Recorded()
    for seconds, count in steps:
        recorded.finish(count)
        recorded.look_at(recorded.clock.now + seconds)
    recorded.look_at(recorded.clock.now + 10)
    for step in SLOTS:
        assert sum(point["requests"] for point in recorded.points(step)) == sum(count for _, count in steps)


def test_what_is_kept_is_bounded_and_since_cuts_it(recorded: Recorded) -> None:
    for second in range(1001, 1001 + 4000):
        recorded.look_at(second)
    ones, tens = recorded.told(1), recorded.told(10)
    assert (len(ones), len(tens)) == (300, 360)
    assert ones[-1][0] == 4999 and ones[0][0] == 4700
    assert tens[-1][0] == 4990 and tens[0][0] == 1400
    assert [point["at"] for point in recorded.points(1, since=4997)] == [4998, 4999]
    assert [point["at"] for point in recorded.points(10, since=4979)] == [4980, 4990]
    assert recorded.points(1, since=4999) == []


def test_totals_are_exact_while_threads_record_and_others_read(recorded: Recorded, restless: None) -> None:
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            recorded.points()

    with ThreadPoolExecutor(6) as threads:
        reader = threads.submit(read)
        writers = [threads.submit(recorded.finish, 200, name) for name in ("a", "b", "a", None)]
        total, second, is_last = 0, 1000, False
        while not is_last:
            is_last = all(writer.done() for writer in writers)
            second += 1
            recorded.look_at(second)
            total += sum(point["requests"] for point in recorded.points(1, since=second - 2))
        done.set()
        reader.result()
    assert total == recorded.statistics.snapshot()[0]["total_requests"] == 800


def test_the_thread_is_named_stops_at_once_and_survives_a_surprise() -> None:
    looked = threading.Semaphore(0)
    statistics = Statistics()

    def read() -> Reading:
        looked.release()
        if threading.current_thread().name == "history":
            raise RuntimeError("surprise")
        return Reading(statistics.lifetime(), {}, 0)

    history = History(read)
    history.start()
    try:
        assert all(looked.acquire(timeout=60) for _ in range(3))  # the first one, and two that failed
        assert "history" in [thread.name for thread in threading.enumerate()]
    finally:
        history.stop()
    assert "history" not in [thread.name for thread in threading.enumerate()]
    history.stop()


def test_a_window_has_what_came_in_it_and_its_own_percentiles(recorded: Recorded) -> None:
    recorded.finish(100, seconds=1.0)
    for second in range(1, 70):
        recorded.finish(9, seconds=0.01)
        recorded.finish(1, "b", 503, seconds=0.2)
        recorded.look_at(START + second)
    recorded.finish(5)  # since the latest look
    for seconds, covered in ((10, 19), (60, 69), (300, 69)):
        window = recorded.history.window(seconds)
        assert window is not None and window.seconds == covered
        assert window.whole["requests"] == 10 * covered + (100 if covered == 69 else 0)
        times = dict.fromkeys(("p50", "p95", "p99"), pytest.approx(0.2, rel=0.03))
        assert window.of("b") == {"requests": covered, "failed": covered, **times}
    recorded.history.clear()
    assert recorded.history.window(10) is None
    recorded.look_at(START + 70)
    recorded.finish(3)
    recorded.look_at(START + 71)
    window = recorded.history.window(60)
    assert window is not None and (window.seconds, window.whole["requests"], window.of("b")) == (1, 3, None)


# Through the API of a real process.


def test_a_reload_of_the_page_keeps_the_past(demo: Demo) -> None:
    for _ in range(12):
        assert fetch(f"{demo.url}/api/process")[0] == 200

    def past() -> Any:
        answer = fetch_json(f"{demo.url}/history?step=1&since=0")
        return answer if sum(point["requests"] for point in answer["points"]) >= 12 else None

    answer = wait_until(past, "all requests are history")
    assert answer["step"] == 1
    totals: dict[str, int] = {}
    for point in answer["points"]:
        assert point["at"] + 1 <= answer["now"]
        assert point["requests"] == sum(backend["requests"] for backend in point["backends"].values())
        assert (point["p50"] is None) is (point["requests"] == 0)
        for backend_id, backend in point["backends"].items():
            totals[backend_id] = totals.get(backend_id, 0) + backend["requests"]
    assert totals == {"backend_1": 6, "backend_2": 4, "backend_3": 2}
    newest = answer["points"][-1]["at"]
    newer = wait_until(lambda: fetch_json(f"{demo.url}/history?since={newest}")["points"], "the next second")
    assert all(point["at"] > newest for point in newer)


def test_requests_in_flight_show_and_a_reset_clears(scripted: WireBackend) -> None:
    release = scripted.hold()
    with Balancer(f"--backend=only={scripted.url}") as balancer, ThreadPoolExecutor(1) as client:
        answer = client.submit(fetch, f"{balancer.url}/slow")
        try:

            def seen() -> bool:
                points = fetch_json(f"{balancer.url}/history")["points"]
                return any(p["in_flight"] == 1 and p["backends"]["only"]["in_flight"] == 1 for p in points)

            wait_until(seen, "the request in flight is in a slot")
        finally:
            release.set()
        assert answer.result()[0] == 200
        newest = fetch_json(f"{balancer.url}/history")["points"][-1]["at"]
        assert fetch(f"{balancer.url}/reset", {})[0] == 200
        assert [p for p in fetch_json(f"{balancer.url}/history")["points"] if p["at"] <= newest] == []


@pytest.mark.parametrize("query", ["step=2", "step=0", "step=x", "step=-1", "since=-1", "since=1.5", "since=x"])
def test_a_bad_query_is_refused_in_words(balancer: Balancer, query: str) -> None:
    status, _, body = fetch(f"{balancer.url}/history?{query}")
    assert status == 400 and query.partition("=")[0].encode() in body


def test_a_process_that_was_stopped_for_a_while_has_a_gap_and_loses_nothing(
    start_process: StartProcess,
) -> None:
    process = start_process()
    for _ in range(6):
        fetch(f"{process.url}/api/process")
    process.send(signal.SIGSTOP)
    stopped = time.time()
    try:
        wait_until(lambda: time.time() > stopped + 3.2, "the pause is over")
    finally:
        process.send(signal.SIGCONT)
    resumed = time.time()
    for _ in range(6):
        fetch(f"{process.url}/api/process")

    def past() -> Any:
        points = fetch_json(f"{process.url}/history")["points"]
        return points if sum(point["requests"] for point in points) >= 12 else None

    points = wait_until(past, "all requests are history")
    times = [point["at"] for point in points]
    assert times == sorted(set(times)) and sum(point["requests"] for point in points) == 12
    assert not [at for at in times if stopped + 1 < at < int(resumed) - 1]  # nobody looked
    assert sum(point["requests"] for point in points if point["at"] <= stopped + 1) >= 6  # where they belong
